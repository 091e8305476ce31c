"""What holds for every objective: it goes on with the same bits, on any mesh, and is planned."""

import contextlib
import dataclasses
import json
import random

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from objectives import RECIPES, small

from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.parallel import make_mesh, replicated
from crate_jax.planning.plan import plan
from crate_jax.tasks import TASKS
from crate_jax.training import loop
from crate_jax.training.loop import train
from crate_jax.training.run import batches_after, jit_train_step, set_up
from crate_jax.training.state import init_sharded

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 10, 3
CLOCK = ("examples_per_s", "data_wait_share", "flops_share")  # never the same twice


class Killed(BaseException):
    """A process that is gone: nothing of the step at hand is saved."""


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Each program is compiled once: the runs of an objective share theirs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def config_of(task, **fields):
    """A run of ten steps on all eight devices."""
    every = dict(checkpoint_every_steps=SAVE_EVERY, eval_every_steps=5)
    every |= dict(log_objective_every_steps=5, total_steps=STEPS, batch_size=16)
    return small(task, **every | fields)


@pytest.fixture(scope="module", params=TASKS)
def whole(request, tmp_path_factory):
    """A task, and the folder and the summary of a run of it that nothing happened to."""
    workdir = tmp_path_factory.mktemp(request.param)
    return request.param, workdir, train(config_of(request.param), workdir)


def state_of(workdir):
    """Every array of the last checkpoint, the optimizer's and the extra among them."""
    with contextlib.closing(Checkpointer(workdir, read_only=True)) as reader:
        shapes = reader.saved_shapes(STEPS)
        asked = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        found, _ = reader.restore_part(STEPS, shapes, asked)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(found)}


def lines_of(workdir):
    """What metrics.jsonl says, without what the clock decides."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def test_every_task_has_a_small_run():
    assert RECIPES.keys() == TASKS.keys()
    assert {config_of(task).task for task in TASKS} == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_does_not_read_is_refused(task):
    """Of what some tasks read alone, each field has an effect or is refused."""
    fields = ("optim.label_smoothing", "data.mixup_alpha", "data.cutmix_alpha")
    fields += ("penalty.orthogonality", "penalty.srr")
    for field in fields:
        config = config_of(task, **{field.replace(".", "__"): 0.25})
        if field in TASKS[task].unread:
            message = (
                rf"^{field} must be 0 for the task {task}, which does not read it; got 0\.25\."
            )
            with pytest.raises(ValueError, match=message):
                set_up(config)
        else:
            run, (section, name) = set_up(config), field.split(".")
            held = run.task.penalties if section == "penalty" else run.task
            assert getattr(held, name) == 0.25


@pytest.mark.parametrize("field", ["train_transforms", "eval_transforms"])
def test_a_task_of_text_reads_no_transforms(field):
    config = config_of("next_token", **{f"data__{field}": "resize(16)"})
    message = (
        rf"^data\.{field} must be '' for the task next_token, which does not read it; got "
        rf"resize\(16\)\. Set --config\.data\.{field}=''\.$"
    )
    with pytest.raises(ValueError, match=message):
        set_up(config)


def test_killed_at_a_random_step_it_goes_on_with_the_same_bits(whole, tmp_path):
    task, workdir, summary = whole
    at = random.randint(SAVE_EVERY + 1, STEPS - 1)

    def kill(self, step):
        if step == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopSignal, "at", kill)
        with pytest.raises(Killed):
            train(config_of(task), tmp_path)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(saved) < at, "the step at hand must be lost"
    again = train(config_of(task), tmp_path)
    own = ("seconds", "workdir")
    assert {k: v for k, v in again.items() if k not in own} == {
        k: v for k, v in summary.items() if k not in own
    }
    ours, theirs = state_of(tmp_path), state_of(workdir)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=f"{path}, killed at {at}")
    assert lines_of(tmp_path) == lines_of(workdir), f"killed at {at}"


def losses_on(run):
    """Of ten steps, and whether each gave up the state before it."""
    state, shardings = init_sharded(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    step, key = jit_train_step(run, shardings), jax.device_put(run.key, replicated(run.mesh))
    found = []
    with contextlib.closing(batches_after(run, 0)) as batches, jax.transfer_guard("disallow"):
        for _ in range(STEPS):
            before = jax.tree.leaves(state)
            state, metrics = step(state, next(batches), key)
            assert all(x.is_deleted() for x in before), "the step must give up its state"
            found.append(metrics["loss"])
    return [float(loss) for loss in found]


def test_any_mesh_takes_the_same_steps(whole):
    task, workdir, _ = whole
    alone = set_up(config_of(task, parallel__mesh="data:1"), "train", devices=jax.devices()[:1])
    one = losses_on(alone)
    assert one[-1] != one[0] and np.isfinite(one).all()
    eight = [line["train/loss"] for line in lines_of(workdir) if "train/loss" in line]
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5, err_msg="8 devices")
    split = dataclasses.replace(alone, mesh=make_mesh("data:2,fsdp:4"))
    np.testing.assert_allclose(losses_on(split), one, rtol=0, atol=1e-5, err_msg="data:2,fsdp:4")


def test_a_plan_compiles_it(whole):
    found = plan(config_of(whole[0]), "data:2,fsdp:4")
    assert found["compiled"]["memory"] > 0 and found["compiled"]["collectives"]
    assert found["flops"] > 0
