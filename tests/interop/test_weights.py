"""Weights out to every kind of file and back, to the bit."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import MODEL, MODELS, assert_equal_trees, random_params, random_state

from crate_jax import Crate, load_weights, save_weights
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.config import ModelConfig, TrainConfig, to_dict
from crate_jax.interop import load_fitted, read_class_names
from crate_jax.models.zoo import architecture

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_MODELS = {
    "crate_cls": Crate(32, 8, 10, width=48, depth=3, num_heads=4),
    "crate_mean_rect": Crate(
        (16, 24), (4, 8), 7, 32, 2, 2, head_dim=8, pool="mean", in_channels=1, eta=0.2
    ),
    "crate_single_head": Crate(16, 4, 5, width=24, depth=2, num_heads=1),
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".NPZ"])
@pytest.mark.parametrize("name", MODELS)
def test_our_formats_round_trip(tmp_path, name, suffix):
    params = random_params(MODELS[name])
    path = tmp_path / f"weights{suffix}"
    save_weights(path, jax.tree.map(jnp.asarray, params), MODELS[name])
    back = load_weights(path, MODELS[name])
    assert_equal_trees(back, params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(back))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".b.PTH.TAR"])
@pytest.mark.parametrize("name", MODELS)
def test_pytorch_files_round_trip(torch, tmp_path, name, suffix):
    params = random_params(MODELS[name])
    save_weights(tmp_path / f"weights{suffix}", params, MODELS[name])
    assert_equal_trees(load_weights(tmp_path / f"weights{suffix}", MODELS[name]), params)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_an_official_checkpoint_comes_back_as_it_was(torch, tmp_path, name):
    """pth → params → every format → params → pth: the official names, shapes and bits."""
    from crate_jax.parity.torch_reference import from_flax_model

    model = GOLDEN_MODELS[name]
    path = GOLDEN / f"{name}.pth.tar"
    for suffix in ("npz", "safetensors", "pth"):
        params = load_weights(path, model)
        path = tmp_path / f"weights.{suffix}"
        save_weights(path, params, model)
    official = torch.load(GOLDEN / f"{name}.pth.tar", weights_only=True)["state_dict"]
    official = {key.removeprefix("module."): value for key, value in official.items()}
    written = torch.load(path, weights_only=True)
    assert written.keys() == official.keys()
    for key, value in official.items():
        assert written[key].dtype == torch.float32 and torch.equal(written[key], value), key
    from_flax_model(model).load_state_dict(written, strict=True)


def test_what_other_programs_read_of_pytorch_files(torch, tmp_path):
    """The official scripts: ``torch.load(f)["state_dict"]`` into a model under DataParallel."""
    from crate_jax.parity.torch_reference import from_flax_model

    official = torch.nn.DataParallel(from_flax_model(MODEL))
    expected = {name: torch.tensor(value) for name, value in random_state(MODEL).items()}
    for name, keys, prefix in (
        ("w.pth.tar", ["state_dict"], "module."),
        ("w.ckpt", ["state_dict"], ""),
        ("w.bin", [], ""),
    ):
        save_weights(tmp_path / name, random_params(MODEL), MODEL)
        written = torch.load(tmp_path / name, weights_only=True)
        for key in keys:
            assert list(written) == [key]
            written = written[key]
        assert written.keys() == {prefix + key for key in expected}
        for key, value in expected.items():
            assert torch.equal(written[prefix + key], value)
        (official if prefix else official.module).load_state_dict(written, strict=True)


def test_safetensors_state_their_model(tmp_path):
    model = MODELS["wide subspaces"].clone(eta=0.25, pool="mean", dtype=jnp.bfloat16)
    params = random_params(model)
    save_weights(tmp_path / "w.safetensors", params, model)
    loaded = load_fitted(tmp_path / "w.safetensors", None)
    assert architecture(loaded.model) == architecture(model)
    assert loaded.model.eta == 0.25 and loaded.model.dtype == jnp.float32
    assert_equal_trees(loaded.params, params)
    save_weights(tmp_path / "w.npz", params, model)
    with pytest.raises(ValueError, match=r"w\.npz must state its model; it does not\. Name the"):
        load_fitted(tmp_path / "w.npz", None)


def test_a_file_names_its_classes(tmp_path):
    params, names = random_params(MODEL), ("ant", "bee", "Käfer, gelb", "\n", "5")
    for name, layout in (("w.safetensors", None), ("w.npz", None), ("o.npz", "official")):
        save_weights(tmp_path / name, params, MODEL, layout=layout, class_names=names)
        loaded = load_fitted(tmp_path / name, MODEL)
        assert loaded.class_names == read_class_names(tmp_path / name) == names
        assert loaded.report == []
        assert_equal_trees(loaded.params, params)
        assert_equal_trees(load_weights(tmp_path / name, MODEL), params)
    with pytest.raises(FileNotFoundError, match=r"must be a file .*nowhere\.npz, not there\."):
        read_class_names(tmp_path / "nowhere.npz")
    save_weights(tmp_path / "w.npz", params, MODEL)
    assert load_fitted(tmp_path / "w.npz", MODEL).class_names == ()
    with pytest.raises(ValueError, match=r"one for each of the 5 outputs of the model; got 4\. N"):
        save_weights(tmp_path / "w.npz", params, MODEL, class_names=names[:4])
    with pytest.raises(ValueError, match=r"class_names must be \(\) for PyTorch's files; got 5 f"):
        save_weights(tmp_path / "w.pth", params, MODEL, class_names=names)
    assert not (tmp_path / "w.pth").exists()


def test_a_weights_file_is_read_without_orbax(tmp_path, monkeypatch):
    save_weights(tmp_path / "w.npz", random_params(MODEL), MODEL, class_names="abcde")
    monkeypatch.setitem(sys.modules, "crate_jax.checkpoint.reading", None)
    assert load_fitted(tmp_path / "w.npz", MODEL).class_names == tuple("abcde")


def test_names_that_are_no_text_are_refused(tmp_path):
    from safetensors.numpy import save_file

    arrays = random_state(MODEL)
    save_file(arrays, tmp_path / "w.safetensors", metadata={"crate_jax.class_names": "[1, 2]"})
    with pytest.raises(ValueError, match=r"must name its classes as text; got \[1, 2\]\. Convert"):
        load_weights(tmp_path / "w.safetensors", MODEL)


def test_constants_that_differ_are_refused_or_taken_on_request(tmp_path):
    path = tmp_path / "w.safetensors"
    params = random_params(MODEL)
    save_weights(path, params, MODEL.clone(eta=0.2, pool="mean"))
    with pytest.raises(ValueError, match=r"pool mean where the model has cls, eta 0\.2 where the"):
        load_weights(path, MODEL)
    with pytest.raises(ValueError, match=r"they have pool mean where the model has cls\. "):
        load_weights(path, MODEL, fit=("eta",))
    loaded = load_fitted(path, MODEL, fit=("eta", "pool"))
    assert_equal_trees(loaded.params, params)
    assert loaded.report == [
        "pool: cls, where the weights had mean",
        "eta: 0.1, where the weights had 0.2",
    ]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_names_in_npz_and_safetensors(tmp_path, prefix):
    from safetensors.numpy import save_file

    state = {prefix + key: value for key, value in random_state(MODEL).items()}
    np.savez(tmp_path / "w.npz", **state)
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.npz", "w.safetensors"):
        assert_equal_trees(load_weights(tmp_path / name, MODEL), random_params(MODEL))


def test_half_precision_and_other_wrappings_of_our_names(tmp_path):
    from safetensors.numpy import save_file

    model = MODELS["no projection"]
    save_weights(tmp_path / "w.npz", random_params(model), model)
    with np.load(tmp_path / "w.npz") as file:
        arrays = dict(file)
    assert "blocks/ista/D" in arrays and "head/bias" in arrays
    for dtype in (jnp.bfloat16, np.float16):
        half = {f"params/{key}": value.astype(dtype) for key, value in arrays.items()}
        # NumPy writes bfloat16 as two bytes without a type.
        np.savez(tmp_path / "half.npz", **half)
        save_file(half, tmp_path / "half.safetensors")
        for name in ("half.npz", "half.safetensors"):
            D = load_weights(tmp_path / name, model)["blocks"]["ista"]["D"]
            assert D.dtype == np.float32
            np.testing.assert_array_equal(D, arrays["blocks/ista/D"].astype(dtype).astype("f4"))


def test_flags_of_a_training_script_beside_the_weights(torch, tmp_path):
    state = {key: torch.tensor(value) for key, value in random_state(MODEL).items()}
    flags = argparse.Namespace(lr=1e-3, data="/data")
    torch.save({"model": state, "args": flags, "epoch": 3}, tmp_path / "w.pth")
    assert_equal_trees(load_weights(tmp_path / "w.pth", MODEL), random_params(MODEL))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints, the second of `random_params`."""
    workdir = tmp_path_factory.mktemp("run")
    fields = dict(width=6, depth=3, num_heads=2, image_size=(8,), patch_size=(4,))
    config = TrainConfig(model=ModelConfig(name="crate_tiny_patch16_224", **fields))
    newest = random_params(MODEL)
    checkpointer = Checkpointer(workdir)
    for step, params in ((1, jax.tree.map(np.zeros_like, newest)), (20, newest)):
        state = jax.tree.map(jnp.asarray, {"step": np.int32(step), "params": params, "mu": params})
        checkpointer.save(step, state, {"ema": False, "config": to_dict(config)})
    checkpointer.wait()
    checkpointer.close()
    return workdir


def test_a_run_its_checkpoints_and_one_of_them(run):
    newest = random_params(MODEL)
    for path in (run, run / "checkpoints", run / "checkpoints" / "20"):
        assert_equal_trees(load_weights(path, MODEL), newest)
    first = load_weights(run / "checkpoints" / "1", MODEL)
    assert_equal_trees(first, jax.tree.map(np.zeros_like, newest))
    loaded = load_fitted(run, None)
    assert architecture(loaded.model) == architecture(MODEL)  # five classes, by its head
    with pytest.raises(FileNotFoundError, match="7, not there"):
        load_weights(run / "checkpoints" / "7", MODEL)
    (run / "checkpoints" / "7").mkdir()
    with pytest.raises(ValueError, match="checkpoint must be readable; step 7 in"):
        load_weights(run / "checkpoints" / "7", MODEL)


def test_a_checkpoint_without_its_state(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, {"params": jnp.ones(2)}, {"ema": False})
    checkpointer.close()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state")
    with pytest.raises(ValueError, match="checkpoint must be readable; step 3 in"):
        load_weights(tmp_path, MODEL)


def test_a_run_of_averaged_weights(tmp_path):
    params = random_params(MODEL)
    state = {"params": jax.tree.map(np.zeros_like, params), "ema_params": params}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, jax.tree.map(jnp.asarray, state), {"ema": True})
    checkpointer.close()
    assert_equal_trees(load_weights(tmp_path, MODEL), params)


def test_metadata_is_plain_json(tmp_path):
    from safetensors import safe_open

    save_weights(tmp_path / "w.safetensors", random_params(MODEL), MODEL)
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        fields = json.loads(file.metadata()["crate_jax"])
    assert fields == architecture(MODEL)
    assert fields["image_size"] == [8, 8] and fields["head_dim"] == 3 and fields["pool"] == "cls"


def test_what_save_refuses_leaves_the_file_as_it_was(tmp_path):
    params = random_params(MODEL)
    for name in ("w.safetensors", "w.npz"):
        (tmp_path / name).write_text("before")
        broken = {key: value for key, value in params.items() if key != "head"}
        with pytest.raises(ValueError, match="got missing: head/bias, head/kernel"):
            save_weights(tmp_path / name, broken, MODEL)
        with pytest.raises(ValueError, match=r"head/bias \(5,\) instead of \(9,\)"):
            save_weights(tmp_path / name, params, MODEL.clone(num_classes=9))
        assert (tmp_path / name).read_text() == "before"
    for name in ("w.tar", "w.h5", "w"):
        with pytest.raises(ValueError, match=r"must be written as \.npz, \.safetensors, \.pth"):
            save_weights(tmp_path / name, params, MODEL)
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        save_weights(tmp_path / "none" / "w.npz", params, MODEL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.npz", "w.safetensors"]
