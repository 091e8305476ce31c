"""Models with running statistics: files of all kinds, runs, and what may be fitted."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from weights import assert_equal_trees

from crate_jax import Crate, ToST, load_variables, save_weights
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.interop import from_state_dict, load_fitted, to_state_dict
from crate_jax.interop.fit import fit_params
from crate_jax.models.cost import abstract_variables
from crate_jax.training.loop import train

SIZES = dict(num_classes=3, width=8, depth=1, num_heads=2)
TOST = ToST(16, 4, **SIZES, mlp_ratio=2)
CBSA = Crate(16, 4, **SIZES, attention="cbsa", stem="convolutions", representatives=2)


def random_variables(model):
    """Different numbers in every entry."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_variables(model)
    )


@pytest.fixture(params=[TOST, CBSA], ids=["tost", "cbsa"])
def model(request):
    return request.param


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth", "ckpt", "pth.tar"])
def test_every_kind_of_file_holds_the_statistics(model, suffix, tmp_path):
    if suffix not in ("safetensors", "npz"):
        pytest.importorskip("torch")
    variables = random_variables(model)
    save_weights(tmp_path / f"w.{suffix}", variables, model)
    assert_equal_trees(load_variables(tmp_path / f"w.{suffix}", model), variables)
    if suffix == "safetensors":  # which states its model
        loaded = load_fitted(tmp_path / "w.safetensors", None)
        assert type(loaded.model) is type(model)
        assert_equal_trees({"params": loaded.params, **loaded.extra}, variables)


def test_a_state_dict_and_back(model):
    variables = random_variables(model)
    state = to_state_dict(variables, model)
    assert sum(name.endswith("running_mean") for name in state) == 2
    counters = {name.replace("_mean", "_count"): 0 for name in state if name.endswith("_mean")}
    counters = {name.replace("running_count", "num_batches_tracked"): 0 for name in counters}
    assert_equal_trees(from_state_dict(state | counters, model), variables)
    without = {name: array for name, array in state.items() if "running" not in name}
    assert to_state_dict(variables["params"], model).keys() == without.keys()
    with pytest.raises(ValueError, match=r"missing: .*running_mean"):
        from_state_dict(without, model)


def test_trees_that_a_users_program_wrote(tmp_path):
    variables = random_variables(TOST)
    on_device = jax.tree.map(jnp.asarray, variables)
    contents = {
        "variables": on_device,
        "state": {**on_device, "step": 3, "opt_state": {"mu": jnp.ones(2)}},
        "nested": {"model": {**on_device, "batch_stats_old": {"mean": jnp.ones(2)}}},
    }
    with ocp.StandardCheckpointer() as writer:
        for name, content in contents.items():
            (tmp_path / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(content))
            writer.save(tmp_path / name, content)
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(on_device["params"]),
        batch_stats=ocp.args.StandardSave(on_device["batch_stats"]),
    )
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        manager.save(3, args=items)
    for path in (*(f"{name}.msgpack" for name in contents), *contents, "items"):
        assert_equal_trees(load_variables(tmp_path / path, TOST), variables)


def test_a_tree_without_statistics_is_named(tmp_path):
    params = random_variables(TOST)["params"]
    (tmp_path / "w").write_bytes(flax.serialization.to_bytes(params))
    with pytest.raises(ValueError, match=r"missing: batch_stats/embedding/stem/stage_{0-1}/norm"):
        load_variables(tmp_path / "w", TOST)


# --- fitting --------------------------------------------------------------------------------------


def test_another_head_and_other_images(model, tmp_path):
    variables = random_variables(model)
    save_weights(tmp_path / "w.npz", variables, model)
    other = model.clone(num_classes=5, image_size=(24, 16))
    found = load_variables(tmp_path / "w.npz", other, fit=("head", "image_size"))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, abstract_variables(other))
    assert_equal_trees(found["batch_stats"], variables["batch_stats"])
    assert_equal_trees(found["params"]["blocks"], variables["params"]["blocks"])


def test_other_channels_go_into_the_first_stage(model, tmp_path):
    variables = random_variables(model)
    save_weights(tmp_path / "w.npz", variables, model)
    grey = model.clone(in_channels=1)
    loaded = load_fitted(tmp_path / "w.npz", grey, fit=("in_channels",))
    assert loaded.report == ["embedding/stem/stage_0/kernel: 3 channels to 1"]
    of_grey = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 16, 1)), jnp.float32)
    found = grey.apply({"params": loaded.params, **loaded.extra}, of_grey, train=False)
    in_color = jnp.tile(of_grey, (1, 1, 1, 3))
    positive = jax.tree.map(np.abs, variables["batch_stats"])  # variances, and any means
    same = grey.apply({"params": loaded.params, "batch_stats": positive}, of_grey, train=False)
    expected = model.apply(variables | {"batch_stats": positive}, in_color, train=False)
    np.testing.assert_allclose(same, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 3)


def test_other_patches_have_other_stages(model):
    params = random_variables(model)["params"]
    with pytest.raises(ValueError, match=r"^model\.patch_size must be 4x4, .*; got 8x8\. A conv"):
        fit_params(params, model, model.clone(patch_size=8))


# --- runs -----------------------------------------------------------------------------------------


def config(name, **changes):
    sizes = dict(image_size=(16, 16), patch_size=(4, 4), width=8, depth=1, num_heads=2)
    values = dict(
        name="variables",
        batch_size=48,
        eval_batch_size=104,
        total_steps=2,
        log_objective_every_steps=2,
        model=ModelConfig(name=name, in_channels=1, **sizes),
        data=DataConfig(train_transforms="resize(16)", eval_transforms="resize(16)", num_threads=1),
        optim=OptimConfig(lr=3e-3, ema_decay=0.5),
    )
    return TrainConfig(**values | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and what it ended with."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config("tost_tiny_patch16_224"), workdir)


@pytest.mark.slow
def test_a_run_measures_its_layers(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    seen = {key.split("/")[1] for line in lines for key in line if key.startswith("objective/")}
    assert seen == {"rate_mean", "rate_reduction_mean", "coding_rate_mean", "coding_rate_std"}


@pytest.mark.slow
def test_a_run_goes_into_files_that_evaluate_as_it_did(run, tmp_path, capsys):
    workdir, summary = run
    loaded = load_fitted(workdir, None)
    mean = loaded.extra["batch_stats"]["embedding"]["stem"]["stage_0"]["norm"]["mean"]
    assert np.abs(mean).max() > 1e-3
    assert main(["convert", f"--from={workdir}", f"--to={tmp_path / 'w.npz'}"]) == 0
    found = load_variables(tmp_path / "w.npz", loaded.model)
    assert_equal_trees(found, {"params": loaded.params, **loaded.extra})
    kwargs = ["image_size=16", "patch_size=4", "width=8", "depth=1", "num_heads=2"]
    evaluate = ["evaluate", f"--weights={tmp_path / 'w.npz'}", "--model=tost_tiny_patch16_224"]
    evaluate += ["--dataset=digits", "--model-kwargs", *kwargs, "in_channels=1"]
    evaluate += ["--transforms=resize(16)"]
    capsys.readouterr()
    assert main(evaluate) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["top1"] == summary["test/top1"]
    assert abs(result["loss"] - summary["test/loss"]) < 1e-5


@pytest.mark.slow
def test_a_run_starts_from_another_ones_statistics(run, tmp_path):
    workdir, _ = run
    start = config(
        "tost_tiny_patch16_224",
        total_steps=1,
        init_weights=str(workdir),
        optim=OptimConfig(lr=1e-12, weight_decay=0.0),
    )
    train(start, tmp_path)
    before, after = (load_fitted(path, None) for path in (workdir, tmp_path))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.extra, after.extra)
    start = jax.tree.map(lambda a: np.abs(a).max(), before.extra)
    # One step moves them by a tenth; from nothing they would have gone half of the way or less.
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(start), strict=True):
        assert 0 < a < 0.3 * max(b, 0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before.params, after.params
    )
