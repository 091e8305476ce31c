"""Files of SimDINO and SimDINOv2: student and teacher, heads, registers, chunks of layers."""

from pathlib import Path

import jax
import numpy as np
import pytest
from weights import assert_equal_trees, random_params

from crate_jax import ViT, load_weights, save_weights
from crate_jax.interop import load_fitted, to_state_dict
from crate_jax.interop.networks import load_network, save_networks

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402 (needs PyTorch)

GOLDEN = Path(__file__).parents[1] / "golden" / "simdino_step.pth"
V1 = ViT(32, 8, 0, width=24, depth=2, num_heads=3, mlp_ratio=2)
V2 = ViT((8, 12), 4, 0, width=6, depth=4, num_heads=2, registers=3, layer_scale=0.1)
HEADS = {"linear0": (6, 7), "linear1": (7, 7), "linear2": (7, 5)}


def same_file(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# --- v1 -------------------------------------------------------------------------------------------


def test_the_teachers_backbone_is_read_unless_the_student_is_asked_for():
    content = torch.load(GOLDEN, weights_only=False)
    loaded = load_fitted(GOLDEN, V1)
    assert loaded.report == [
        "took teacher, averaged weights, and left aside student",
        "head: left aside, for the model has none (num_classes=0)",
    ]
    trees = {"teacher": loaded.params, "student": load_weights(GOLDEN, V1, which="student")}
    for which, params in trees.items():
        before = {"teacher": "backbone.", "student": "module.backbone."}[which]
        theirs = {before + name: a for name, a in to_state_dict(params, V1).items()}
        assert len(theirs) == 4 + 12 * 2 + 2
        same_file(theirs, {k: v for k, v in content[which].items() if k in theirs})
        others = content[which].keys() - theirs.keys()
        assert len(others) == 6 and all(".mlp." in name for name in others)


def test_a_head_for_classes_takes_the_place_of_the_projection():
    model = V1.clone(num_classes=5)
    with pytest.raises(
        ValueError, match=r"these weights have no head.*unknown: head.mlp.[{]0,2,4"
    ) as e:
        load_weights(GOLDEN, model)
    assert str(e.value).endswith("Build it with num_classes=0, or ask to fit: head.")
    params = load_weights(GOLDEN, model, fit="head")
    assert params["head"]["kernel"].shape == (24, 5)
    np.testing.assert_array_equal(
        params["blocks"]["mlp"]["W_in"], load_weights(GOLDEN, V1)["blocks"]["mlp"]["W_in"]
    )


def test_both_networks_come_back_as_they_were(tmp_path):
    content = torch.load(GOLDEN, weights_only=False)
    networks = {which: load_network(GOLDEN, V1, which) for which in ("student", "teacher")}
    head = networks["teacher"]["head"]
    np.testing.assert_array_equal(
        head["linear2"]["kernel"], content["teacher"]["head.mlp.4.weight"].numpy().T
    )
    save_networks(tmp_path / "w.pth", networks, V1, layout="simdino")
    back = torch.load(tmp_path / "w.pth", weights_only=True)
    assert back.keys() == {"student", "teacher"}
    for which, state in back.items():
        same_file(state, dict(content[which]))
    assert_equal_trees(load_network(tmp_path / "w.pth", V1), networks["teacher"])


def test_a_backbone_alone_is_written_where_the_official_evaluation_looks(tmp_path):
    params = random_params(V1)
    save_weights(tmp_path / "w.pth", params, V1, layout="simdino")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    state = {f"backbone.{name}": a for name, a in to_state_dict(params, V1).items()}
    same_file(content.pop("teacher"), state)
    assert not content
    assert_equal_trees(load_weights(tmp_path / "w.pth", V1), params)


# --- v2 -------------------------------------------------------------------------------------------


def network(rng):
    """Of our tree, with a head and a mask token."""
    head = {
        name: {"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1])}
        for name, s in HEADS.items()
    } | {"mask_token": rng.normal(size=6)}
    backbone = jax.tree.map(lambda x: 0.5 * x, random_params(V2))
    return backbone | {"head": jax.tree.map(lambda x: x.astype(np.float32), head)}


def official_pass(state, images):
    """DINOv2's forward pass, from its names: the class token behind the last norm."""
    state = {name.removeprefix("backbone."): torch.as_tensor(a) for name, a in state.items()}

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (6,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    B = len(x)
    x = torch.cat([state["cls_token"].expand(B, -1, -1), x], dim=1) + state["pos_embed"]
    x = torch.cat([x[:, :1], state["register_tokens"].expand(B, -1, -1), x[:, 1:]], dim=1)
    for i in range(4):
        at = next(k for k in state if k.endswith(f".{i}.ls1.gamma")).removesuffix(".ls1.gamma")
        qkv = linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x))
        q, k, v = qkv.reshape(B, -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-1, -2) * 3**-0.5).softmax(-1) @ v
        x = x + state[f"{at}.ls1.gamma"] * linear(
            f"{at}.attn.proj", seen.transpose(1, 2).flatten(2)
        )
        hidden = F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", x)))
        x = x + state[f"{at}.ls2.gamma"] * linear(f"{at}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


@pytest.fixture(scope="module")
def v2_file(tmp_path_factory):
    params = network(np.random.default_rng(0))
    path = tmp_path_factory.mktemp("v2") / "teacher_checkpoint.pth"
    save_networks(path, {"teacher": params}, V2, layout="simdinov2")
    return path, params


def test_names_of_v2_have_chunks_registers_factors_and_its_head(v2_file):
    path, params = v2_file
    state = torch.load(path, weights_only=True)["teacher"]
    assert len(state) == 6 + 14 * 4 + 2 + 6
    assert state["backbone.register_tokens"].shape == (1, 3, 6)
    assert state["backbone.mask_token"].shape == (1, 6)
    for i in range(4):  # four layers in four chunks
        scale = state[f"backbone.blocks.{i}.{i}.ls1.gamma"]
        np.testing.assert_array_equal(scale, params["blocks"]["mhsa_scale"][i])
    np.testing.assert_array_equal(
        state["dino_head.mlp.2.weight"], params["head"]["linear1"]["kernel"].T
    )


def test_the_model_computes_what_dinov2_does_of_the_same_file(v2_file):
    path, _ = v2_file
    state = torch.load(path, weights_only=True)["teacher"]
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    expected = official_pass(state, torch.tensor(images.transpose(0, 3, 1, 2)))
    params, _, report, *_ = load_fitted(path, V2)
    assert report == [
        "left aside mask_token (1)",
        "head: left aside, for the model has none (num_classes=0)",
    ]
    found = jax.jit(lambda p, x: V2.apply({"params": p}, x, train=False))(params, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [0, 1, 2, 4])
def test_any_number_of_chunks_is_read(chunks, v2_file, tmp_path):
    path, params = v2_file
    state = {}
    for name, array in torch.load(path, weights_only=True)["teacher"].items():
        parts = name.split(".")
        if parts[1] == "blocks":
            chunk = [str(int(parts[3]) // (4 // chunks))] if chunks else []
            name = ".".join([*parts[:2], *chunk, *parts[3:]])
        state[name] = array
    torch.save({"teacher": state}, tmp_path / "w.pth")
    assert_equal_trees(load_network(tmp_path / "w.pth", V2), params)
    backbone = {name: tree for name, tree in params.items() if name != "head"}
    assert_equal_trees(load_weights(tmp_path / "w.pth", V2), backbone)


def test_a_backbone_of_dinov2_alone(tmp_path):
    """It has the mask token that training starts from, which the official program asks for."""
    model = V2.clone(num_classes=5)
    params = random_params(model)
    save_weights(tmp_path / "w.pth", params, model)
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    assert "blocks.3.ls2.gamma" in state and "register_tokens" in state
    assert state["mask_token"].shape == (1, 6) and not state["mask_token"].any()
    assert_equal_trees(load_weights(tmp_path / "w.pth", model), params)


# --- what does not fit ----------------------------------------------------------------------------


def test_another_model_is_told_what_the_weights_have(v2_file):
    path, _ = v2_file
    with pytest.raises(ValueError, match="registers 3 where the model has None"):
        load_weights(path, V2.clone(registers=0))
    with pytest.raises(ValueError, match=r"unknown: blocks.\{0-3\}.ls1.gamma, blocks.\{0-3\}.ls2"):
        load_weights(path, V2.clone(layer_scale=None))
    message = r"model.registers must be 0 for weights with no register_tokens; got 4. Set model.reg"
    with pytest.raises(ValueError, match=message):
        load_weights(GOLDEN, V1.clone(registers=4))
    with pytest.raises(ValueError, match=message):
        load_network(GOLDEN, V1.clone(registers=4))


def test_a_network_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a network of the model under teacher; got"):
        load_network(GOLDEN, V1.clone(depth=3))
    params = load_network(GOLDEN, V1)
    with pytest.raises(ValueError, match=r"^student must hold the parameters of the model, and a "):
        save_networks(tmp_path / "w.pth", {"student": params}, V1.clone(width=12), "simdino")
    assert not list(tmp_path.iterdir())


def test_a_choice_that_a_file_does_not_offer_is_one_line(tmp_path):
    params = random_params(V1)
    for name in ("w.npz", "w.safetensors", "w.pth"):
        save_weights(tmp_path / name, params, V1)
        with pytest.raises(ValueError, match=rf"{name} must hold weights under student; it has no"):
            load_weights(tmp_path / name, V1, which="student")
