"""Official weights in and out: every entry accounted for, every fault named."""

import sys
import types

import jax
import numpy as np
import pytest
from weights import MODEL, MODELS, assert_equal_trees, random_params, random_state

from crate_jax import load_weights, save_weights
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.interop import from_state_dict, to_state_dict
from crate_jax.interop.contents import read_contents
from crate_jax.interop.names import Known
from crate_jax.interop.pth import read


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(name):
    model = MODELS[name]
    params = random_params(model)
    state = to_state_dict(params, model)
    back = from_state_dict(state, model)
    assert_equal_trees(back, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(back))
    again = to_state_dict(back, model)
    assert again.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value)
        assert value.flags.c_contiguous and value.flags.owndata, key


def test_official_names_and_shapes():
    shapes = {key: value.shape for key, value in random_state(MODELS["wide subspaces"]).items()}
    layer = "transformer.layers.0"
    assert shapes == {
        "cls_token": (1, 1, 4),
        "pos_embedding": (1, 3, 4),
        "to_patch_embedding.1.weight": (48,),
        "to_patch_embedding.1.bias": (48,),
        "to_patch_embedding.2.weight": (4, 48),
        "to_patch_embedding.2.bias": (4,),
        "to_patch_embedding.3.weight": (4,),
        "to_patch_embedding.3.bias": (4,),
        f"{layer}.0.norm.weight": (4,),
        f"{layer}.0.norm.bias": (4,),
        f"{layer}.0.fn.qkv.weight": (15, 4),
        f"{layer}.0.fn.to_out.0.weight": (4, 15),
        f"{layer}.0.fn.to_out.0.bias": (4,),
        f"{layer}.1.norm.weight": (4,),
        f"{layer}.1.norm.bias": (4,),
        f"{layer}.1.fn.weight": (4, 4),
        "mlp_head.0.weight": (4,),
        "mlp_head.0.bias": (4,),
        "mlp_head.1.weight": (2, 4),
        "mlp_head.1.bias": (2,),
    }
    assert not any("to_out" in key for key in random_state(MODELS["no projection"]))


def test_a_basis_of_one_subspace_of_one_layer_lands_where_the_equation_reads_it():
    state = random_state(MODEL)
    params = from_state_dict(state, MODEL)
    # Rows of qkv.weight are the basis vectors, subspace after subspace: row k·p + i is U_k's i-th.
    np.testing.assert_array_equal(
        params["blocks"]["mssa"]["U"][2, :, 1, 0], state["transformer.layers.2.0.fn.qkv.weight"][3]
    )
    np.testing.assert_array_equal(
        params["blocks"]["mssa"]["W_out"][2, 1, 0],
        state["transformer.layers.2.0.fn.to_out.0.weight"][:, 3],
    )
    np.testing.assert_array_equal(
        params["blocks"]["ista"]["D"][1], state["transformer.layers.1.1.fn.weight"]
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_any_float_becomes_float32(dtype):
    state = {key: value.astype(dtype) for key, value in random_state(MODEL).items()}
    params = from_state_dict(state, MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_missing_unknown_and_ill_shaped_entries_are_all_named():
    state = random_state(MODEL)
    for layer in (0, 2):
        del state[f"transformer.layers.{layer}.0.norm.bias"]
    state["transformer.layers.3.1.fn.weight"] = np.zeros((6, 6))
    state["fc.weight"] = np.zeros(3)
    state["mlp_head.1.bias"] = np.zeros(1000)
    with pytest.raises(ValueError, match="state must hold") as raised:
        from_state_dict(state, MODEL)
    message = str(raised.value)
    assert "missing: transformer.layers.{0,2}.0.norm.bias;" in message
    assert "unknown: transformer.layers.3.1.fn.weight, fc.weight;" in message
    assert "of another shape: mlp_head.1.bias (1000,) instead of (5,)." in message


def test_a_tree_that_is_not_the_models():
    params = random_params(MODEL)
    params["head"]["extra"] = params["head"].pop("kernel")
    params["head"]["bias"] = params["head"]["bias"][:2]
    with pytest.raises(ValueError, match="params must hold") as raised:
        to_state_dict(params, MODEL)
    for part in ("missing: head/kernel", "unknown: head/extra", "head/bias (2,) instead of (5,)"):
        assert part in str(raised.value)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch, prefix=""):
    return {prefix + key: torch.tensor(value) for key, value in random_state(MODEL).items()}


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt", ".t7", ".PTH"])
def test_every_suffix(torch, tmp_path, suffix):
    torch.save(tensors(torch), tmp_path / f"weights{suffix}")
    params = load_weights(tmp_path / f"weights{suffix}", MODEL)
    assert_equal_trees(params, random_params(MODEL))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model",), ("net",), ("net", "model")])
def test_every_wrapper_and_prefix(torch, tmp_path, prefix, wrapper):
    content = tensors(torch, prefix)
    for name in wrapper:
        content = {"epoch": 3, name: content, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "weights.pth")
    assert_equal_trees(load_weights(tmp_path / "weights.pth", MODEL), random_params(MODEL))


def test_half_precision_tensors(torch, tmp_path):
    half = {key: value.to(torch.bfloat16) for key, value in tensors(torch).items()}
    torch.save(half, tmp_path / "weights.pth")
    params = load_weights(str(tmp_path / "weights.pth"), MODEL)
    expected = half["mlp_head.1.bias"].float().numpy()
    np.testing.assert_array_equal(params["head"]["bias"], expected)
    assert params["head"]["bias"].dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(torch, tmp_path, bad):
    state = tensors(torch)
    state["transformer.layers.1.1.fn.weight"][0, 3] = bad
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"blocks/ista/D must be finite; got 1 value"):
        load_weights(tmp_path / "weights.pth", MODEL)


def test_files_that_hold_no_state_dict(torch, tmp_path):
    path = tmp_path / "weights.pth"
    for content, message in (
        ([1, 2], "must hold a state dict, bare or under state_dict, model, net; got list"),
        ({"epoch": 3}, "must hold only tensors; got int at epoch"),
        (tensors(torch) | tensors(torch, "module."), "name each parameter once; got .* twice"),
        (types.SimpleNamespace(a=1), "must hold tensors alone; it asks to run or build types.Simp"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_contents(path)
    for damaged in (b"", b"hello world\n" * 9, path.read_bytes()[:100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a whole PyTorch file; reading it"):
            read(path, Known())


def test_a_file_that_is_not_there(torch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(tmp_path / "nowhere.pth", MODEL)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth must be a file"):
        read(tmp_path / "nowhere.pth", Known())


def test_a_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "weights.pth").write_text("These are no weights.")
    with pytest.raises(ValueError, match=r"weights\.pth must be a whole PyTorch, safetensors or"):
        load_weights(tmp_path / "weights.pth", MODEL)


def test_without_pytorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02")  # as a pickle begins
    with pytest.raises(ValueError, match=r"must have PyTorch .* pip install 'crate-jax\[torch\]'$"):
        load_weights(tmp_path / "weights.pth", MODEL)
    target = tmp_path / "w.pth"
    with pytest.raises(ValueError, match=f"^{target} must have PyTorch"):
        save_weights(target, random_params(MODEL), MODEL)


def test_a_folder_is_a_run_and_its_newest_checkpoint_is_read(tmp_path):
    newest = random_params(MODEL)
    checkpointer = Checkpointer(tmp_path)
    for step, params in ((1, jax.tree.map(np.zeros_like, newest)), (2, newest)):
        state = jax.tree.map(jax.numpy.asarray, {"step": np.int32(step), "params": params})
        checkpointer.save(step, state, {"ema": False})
    checkpointer.wait()
    checkpointer.close()
    params = load_weights(tmp_path, MODEL)
    assert_equal_trees(params, newest)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
