"""Checkpoints give back the bits they were given, keep what they should, and say what is wrong."""

import errno
import gc
import json
import logging
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crate_jax.checkpoint.best import Best
from crate_jax.checkpoint.faults import OtherTreeError
from crate_jax.checkpoint.folder import FOLDER, sweep
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import inspect, read_params, restore_params
from crate_jax.parallel import make_mesh, replicated, state_shardings


def host_state(seed=0):
    """Every kind of leaf a state has; floats of every exponent, with the special values."""
    rng = np.random.default_rng(seed)
    floats = rng.integers(0, 2**32, 64 * 48, np.uint32).view(np.float32).reshape(64, 48)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    return {
        "params": {"ista": {"D": floats}, "bias": special},
        "ema_params": {"ista": {"D": floats[::-1].copy()}, "bias": special[::-1].copy()},
        "opt": (np.int32(7), {"mu": rng.normal(size=2048).astype(ml_dtypes.bfloat16)}, {}),
        "step": np.int32(11),
    }


def abstract(state, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), state, shardings
    )


def on_mesh(state, spec="data:-1"):
    """The state laid out on a mesh, and what to restore it by."""
    shardings = state_shardings(jax.tree.map(jnp.asarray, state), make_mesh(spec))
    return jax.device_put(state, shardings), abstract(state, shardings)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, np.shape(a)) == (b.dtype, np.shape(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small(step):
    """A state that says which step it is of."""
    return {"params": {"w": jnp.full((4,), step, jnp.float32)}, "step": jnp.int32(step)}


F32_5, F16_4 = jax.ShapeDtypeStruct((5,), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float16)


def small_abstract():
    return jax.eval_shape(lambda: small(0))


def write(workdir, tops, **options):
    """Save steps 1, 2, … with these metrics, None for none; the checkpointer that did."""
    checkpointer = Checkpointer(workdir, **options)
    for step, top in enumerate(tops, start=1):
        metrics = None if top is None else {"test/top1": top, "test/loss": 1 / (1 + step)}
        checkpointer.save(step, small(step), {"step": step}, metrics)
    checkpointer.wait()
    return checkpointer


def listing(folder):
    """Every path below with its size and time of change."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


# --- what is restored -----------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["data:-1", "data:2,fsdp:4"])
@pytest.mark.parametrize("restored", ["fsdp:-1", "data:4,fsdp:2", "one device"])
def test_restored_bit_for_bit_on_another_mesh(tmp_path, saved, restored):
    expected = host_state()
    state, _ = on_mesh(expected, saved)
    if restored == "one device":
        single = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        wanted = abstract(expected, jax.tree.map(lambda x: single, expected))
    else:
        _, wanted = on_mesh(expected, restored)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(11, state, {})
    found, _ = checkpointer.restore(11, wanted)
    checkpointer.close()
    assert_same_bits(found, expected)
    for array, target in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == target.sharding
    if restored == "fsdp:-1":
        assert found["params"]["ista"]["D"].addressable_shards[0].data.shape == (64, 6)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    expected = host_state()
    state, wanted = on_mesh(expected)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {})
    state = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    jax.block_until_ready(state)
    found, _ = checkpointer.restore(1, wanted)
    checkpointer.close()
    assert_same_bits(found, expected)


def test_record_is_given_back(tmp_path):
    record = {
        "step": 3,
        "examples_seen": 2**53 + 1,
        "rate": 0.1 + 0.2,
        "tiny": 5e-324,
        "config": {"name": "λ · ε", "sizes": [32, 64], "none": None, "flag": True, "empty": {}},
    }
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, small(3), record)
    assert checkpointer.restore(3, small_abstract())[1] == record
    assert checkpointer.restore_record(3) == record
    checkpointer.close()
    assert (tmp_path / FOLDER / "3").is_dir()


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tops, options, steps, best",
    [
        ([0.1, 0.9, 0.3, 0.4, 0.5], {}, [2, 4, 5], 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], {}, [4, 5], 5),
        ([0.9, 0.8, 0.7, 0.6], {"keep_best": 2}, [1, 2, 3, 4], 1),
        ([0.9, 0.8, 0.7, 0.6], {"keep_latest": 1}, [1, 4], 1),
        ([0.9, 0.1, 0.2, 0.3], {"keep_best": 0}, [3, 4], 4),
        ([0.9, None, 0.2, None, None], {}, [1, 4, 5], 1),
    ],
)
def test_latest_and_best_are_kept(tmp_path, tops, options, steps, best):
    checkpointer = write(tmp_path, tops, **options)
    assert checkpointer.steps == steps
    assert checkpointer.latest_step == len(tops)
    assert checkpointer.resolve("best") == best
    for step in steps:
        state, record = checkpointer.restore(step, small_abstract())
        assert record == {"step": step}
        assert_same_bits(state, small(step))
    checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / FOLDER).iterdir()) == steps
    # Whoever opens the run later knows the same best, and goes on deleting by the same rule.
    again = Checkpointer(tmp_path, **options)
    assert (again.steps, again.resolve("best")) == (steps, best)
    again.save(6, small(6), {}, {"test/top1": 1.0})
    again.wait()
    assert again.resolve("best") == 6
    again.close()


@pytest.mark.parametrize(("higher", "best"), [(True, 1), (False, 4)])
def test_the_best_is_told_by_a_metric_and_its_direction(tmp_path, higher, best):
    """Of losses 1/2, 1/3, 1/4, 1/5; the record says by which, so a reader need not know."""
    by = Best("test/loss", higher)
    write(tmp_path, [0.6, 0.9, 0.8, 0.7], best=by, keep_latest=4).close()
    reader = Checkpointer(tmp_path, read_only=True)
    assert (reader.best, reader.resolve("best")) == (by, best)
    reader.close()
    other = Checkpointer(tmp_path, best=Best("test/top1", higher=True), read_only=True)
    assert other.resolve("best") == 2
    other.close()


@pytest.mark.parametrize(("higher", "kept"), [(True, [1, 4]), (False, [2, 4])])
def test_what_is_kept_goes_by_the_direction(tmp_path, higher, kept):
    checkpointer = write(
        tmp_path, [0.9, 0.1, 0.5, 0.4], best=Best("test/top1", higher), keep_latest=1
    )
    assert checkpointer.steps == kept
    checkpointer.close()


def test_a_run_whose_records_do_not_say_is_judged_by_the_highest_top1(tmp_path):
    write(tmp_path, [0.9, 0.1], best=Best("test/loss", higher=False)).close()
    for record in tmp_path.glob(f"{FOLDER}/*/record/metadata"):
        values = json.loads(record.read_text())
        del values["best"], values["checksum"]
        record.write_text(json.dumps(values))
    reader = Checkpointer(tmp_path, read_only=True)
    assert (reader.best, reader.resolve("best")) == (Best("test/top1", higher=True), 1)
    reader.close()


def test_a_damaged_record_does_not_say_what_is_best(tmp_path):
    by = Best("test/loss", higher=False)
    write(tmp_path, [0.9, 0.1, 0.2], best=by, keep_latest=3).close()
    (tmp_path / FOLDER / "3/record/metadata").write_text("{")
    record = tmp_path / FOLDER / "2/record/metadata"
    record.write_text(record.read_text().replace("test/loss", "test/lass"))
    reader = Checkpointer(tmp_path, read_only=True)
    assert reader.best == by
    reader.close()


def test_existing_step_is_left_as_it_is_and_that_is_said(tmp_path):
    checkpointer = write(tmp_path, [0.5, 0.6])
    before = listing(tmp_path / FOLDER)
    with pytest.raises(FileExistsError, match=r"^step must be new; .*/checkpoints holds 2 already"):
        checkpointer.save(2, small(99), {"step": 99}, {"test/top1": 0.99})
    checkpointer.wait()
    assert listing(tmp_path / FOLDER) == before
    state, record = checkpointer.restore(2, small_abstract())
    checkpointer.close()
    assert_same_bits(state, small(2))
    assert record == {"step": 2}


# --- which step -----------------------------------------------------------------------------------


def test_steps_by_name_and_number(tmp_path):
    checkpointer = write(tmp_path, [0.9, 0.1, 0.2])
    assert [checkpointer.resolve(s) for s in ("latest", "best", "1", 2, "3")] == [3, 1, 1, 2, 3]
    for wrong in ("newest", 4, "04x", "-1", ""):
        with pytest.raises(ValueError) as caught:
            checkpointer.resolve(wrong)
        assert str(caught.value) == (
            f"step must be latest, best or one of 1, 2, 3; got {wrong}. "
            f"The checkpoints are in {tmp_path / FOLDER}."
        )
    checkpointer.close()


def test_best_without_any_metric(tmp_path):
    checkpointer = write(tmp_path, [None, None])
    assert checkpointer.resolve("latest") == 2
    with pytest.raises(ValueError, match=r"step must be latest, best or one of 1, 2; got best\."):
        checkpointer.resolve("best")
    checkpointer.close()


def test_opening_for_reading_says_nothing(tmp_path):
    """Who calls `load_weights` has not set up logging: Python prints warnings then."""
    write(tmp_path, [0.5]).close()
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("absl")
    before = logger.level, logger.filters[:]
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        Checkpointer(tmp_path, read_only=True).close()
        logger.warning("of another matter")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
    assert said == ["of another matter"]
    assert logger.filters == before[1]


def test_no_checkpoint(tmp_path):
    message = (
        f"workdir must hold a checkpoint; {tmp_path} has none. Correct the path, or train first, "
        f"for example: python -m crate_jax train --config=digits --workdir={tmp_path}"
    )
    for prepare in (lambda: None, lambda: (tmp_path / FOLDER).mkdir()):
        prepare()
        for read in (
            lambda: Checkpointer(tmp_path, read_only=True),
            lambda: restore_params(tmp_path, small_abstract()["params"]),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                read()
            assert str(caught.value) == message
    assert [p.name for p in tmp_path.rglob("*")] == [FOLDER]


def test_a_run_that_has_not_saved_is_told_from_a_wrong_path(tmp_path, monkeypatch):
    """The path is the one that the user wrote, quoted where a shell would split it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"; my run has none\. .* --workdir='my run'$"):
        Checkpointer("my run", read_only=True)
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.json").write_text("{}")
    rest = r"Its training has saved nothing yet: wait, or start it again by the same command\.$"
    with pytest.raises(FileNotFoundError, match=rf"; my run has none\. {rest}"):
        Checkpointer("my run", read_only=True)


def test_new_run_has_no_step(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    assert (checkpointer.steps, checkpointer.latest_step) == ([], None)
    checkpointer.close()


# --- parameters alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_parameters_alone(tmp_path, ema):
    expected = host_state()
    state, _ = on_mesh(expected, "fsdp:-1")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(11, state, {"ema": ema})
    checkpointer.close()
    wanted = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, expected["params"]))
    found, step = restore_params(tmp_path, wanted)
    assert step == 11
    assert_same_bits(found, expected["ema_params" if ema else "params"])
    for array in jax.tree.leaves(found):
        assert array.devices() == {jax.local_devices()[0]}


def test_parameters_onto_a_mesh(tmp_path):
    expected = host_state()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(11, on_mesh(expected)[0], {"ema": False})
    checkpointer.close()
    mesh = make_mesh("fsdp:-1")
    shardings = {
        "ista": {"D": NamedSharding(mesh, PartitionSpec(None, "fsdp"))},
        "bias": replicated(mesh),
    }
    found, _ = restore_params(tmp_path, abstract(expected["params"], shardings))
    assert_same_bits(found, expected["params"])
    assert found["ista"]["D"].addressable_shards[0].data.shape == (64, 6)
    assert found["bias"].sharding == shardings["bias"]


def test_parameters_of_a_step(tmp_path):
    write(tmp_path, [0.9, 0.1, 0.2]).close()
    wanted = small_abstract()["params"]
    for asked, step in (("latest", 3), ("best", 1), ("2", 2), (3, 3)):
        found, number = restore_params(tmp_path, wanted, asked)
        assert number == step
        assert found["w"].tolist() == [step] * 4
    with pytest.raises(ValueError, match=r"step must be latest, best or one of 1, 2, 3; got 7\."):
        restore_params(tmp_path, wanted, 7)


# --- damage ---------------------------------------------------------------------------------------


def assert_unreadable(caught, tmp_path, step):
    """One line that names the step; frees what the failed read still holds."""
    message = str(caught.value)
    start = f"checkpoint must be readable; step {step} in {tmp_path / FOLDER} is not ("
    assert message.startswith(start), message
    assert re.search(r"\)\. (Use another step: \d+(, \d+)*|Train anew)\.$", message), message
    assert "\n" not in message
    assert len(message) < len(start) + 260
    caught.value.__traceback__ = caught.value.__cause__ = None
    gc.collect()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "data": lambda step: [truncate(p) for p in step.rglob("d/*")],
    "no data": lambda step: [p.unlink() for p in step.rglob("d/*")],
    "manifest": lambda step: truncate(step / "state/manifest.ocdbt"),
    "metadata": lambda step: truncate(step / "state/_METADATA"),
    "record": lambda step: truncate(step / "record/metadata"),
    "no record": lambda step: shutil.rmtree(step / "record"),
    "no state": lambda step: shutil.rmtree(step / "state"),
}


# Orbax's readers that nobody waited for complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_unreadable_step(tmp_path, damage):
    write(tmp_path, [0.1, 0.2]).close()
    DAMAGE[damage](tmp_path / FOLDER / "2")
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps == [1, 2]
    with pytest.raises(ValueError) as caught:
        checkpointer.restore(2, small_abstract())
    assert_unreadable(caught, tmp_path, 2)
    with pytest.raises(ValueError) as caught:
        restore_params(tmp_path, small_abstract()["params"])
    assert_unreadable(caught, tmp_path, 2)
    state, record = checkpointer.restore(1, small_abstract())
    checkpointer.close()
    assert_same_bits(state, small(1))
    assert record == {"step": 1}
    # The remedy of the message works.
    shutil.move(tmp_path / FOLDER / "2", tmp_path / "damaged")
    found, step = restore_params(tmp_path, small_abstract()["params"])
    assert (step, found["w"].tolist()) == (1, [1.0] * 4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "change, odd",
    [
        ({"params": {"w": F32_5}}, "params/w float32(4,), expected float32(5,)"),
        ({"params": {"w": F16_4}}, "params/w float32(4,), expected float16(4,)"),
        ({"step": {}}, "step int32(), expected none"),
        ({"more": F32_5}, "more not at all, expected float32(5,)"),
        ({"params": {"v": F32_5}}, "params/v not at all, expected float32(5,)"),
    ],
    ids=["shape", "dtype", "leaf missing", "leaf more", "other name"],
)
def test_another_tree_is_no_damage(tmp_path, change, odd):
    """It is refused by the first leaf that differs; the steps stay where they are."""
    checkpointer = write(tmp_path, [0.1, 0.2])
    before, tree = listing(tmp_path), small_abstract() | change
    message = (
        f"checkpoint must have the arrays of this config; step 2 in {tmp_path / FOLDER} has {odd}. "
        "Use the config and the data that the run was trained with."
    )
    reads = [lambda: checkpointer.restore(2, tree), lambda: checkpointer.restore_newest(tree)]
    if "params" in change:
        reads.append(lambda: restore_params(tmp_path, tree["params"]))
    for read in reads:
        with pytest.raises(OtherTreeError) as caught:
            read()
        assert str(caught.value) == message
    assert listing(tmp_path) == before
    assert_same_bits(checkpointer.restore_newest(small_abstract())[0], small(2))
    checkpointer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tree_that_is_not_the_saved_one_is_damage(tmp_path):
    """The record says, under a checksum, which arrays there were."""
    write(tmp_path, [0.1, 0.2]).close()
    path = tmp_path / FOLDER / "2/state/_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["tree_metadata"]["('params', 'w')"]
    path.write_text(json.dumps(metadata))
    checkpointer = Checkpointer(tmp_path)
    state, _, (problem,) = checkpointer.restore_newest(small_abstract())
    assert "step 2 in" in problem and "is not (its tree is not what was saved)" in problem
    assert_same_bits(state, small(1))
    checkpointer.close()


def test_step_that_does_not_exist(tmp_path):
    checkpointer = write(tmp_path, [0.1])
    with pytest.raises(ValueError) as caught:
        checkpointer.restore(5, small_abstract())
    assert_unreadable(caught, tmp_path, 5)
    checkpointer.close()


def leave_half_a_save(tmp_path, step):
    """What a killed save leaves: a folder under a temporary name."""
    folder = tmp_path / FOLDER / f"{step}.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / FOLDER / "2", folder)
    for path in list(folder.rglob("d/*")):
        truncate(path)
    (folder / "commit_success.txt").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("killed", [3, 5])
def test_killed_save_is_ignored_and_swept_up(tmp_path, killed):
    write(tmp_path, [0.1, 0.2]).close()
    leave_half_a_save(tmp_path, killed)
    checkpointer = Checkpointer(tmp_path)
    assert (checkpointer.steps, checkpointer.latest_step) == ([1, 2], 2)
    checkpointer.save(3, small(3), {"step": 3})
    state, record = checkpointer.restore(3, small_abstract())
    checkpointer.close()
    assert_same_bits(state, small(3))
    assert record == {"step": 3}
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["2", "3"]


def test_half_a_save_that_cannot_be_swept_up_is_no_obstacle(tmp_path, monkeypatch):
    """As on a network disk, or while writers of a failed save go on in the same process."""
    write(tmp_path, [0.1, 0.2]).close()
    leave_half_a_save(tmp_path, 3)

    def rmtree(path, ignore_errors=False, *args, **kwargs):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpointer = Checkpointer(tmp_path, keep_latest=5)
    checkpointer.save(4, small(4), {"step": 4})
    checkpointer.wait()
    assert checkpointer.steps == [1, 2, 4]
    monkeypatch.undo()
    checkpointer.close()
    Checkpointer(tmp_path).close()
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["1", "2", "4"]


def test_reader_changes_nothing(tmp_path):
    write(tmp_path, [0.2, 0.1]).close()
    folder = leave_half_a_save(tmp_path, 3)  # perhaps a save under way, by the run that is read
    before = listing(tmp_path)
    reader = Checkpointer(tmp_path, read_only=True, keep_latest=1)
    assert (reader.steps, reader.resolve("best"), reader.resolve("latest")) == ([1, 2], 1, 2)
    assert_same_bits(reader.restore(2, small_abstract())[0], small(2))
    assert reader.restore_record(1) == {"step": 1}
    reader.close()
    restore_params(tmp_path, small_abstract()["params"])
    assert listing(tmp_path) == before
    assert folder.exists()


def test_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("run", [0.3]).close()
    assert json.loads((tmp_path / "run" / FOLDER / "1/metrics/metrics").read_text()) == {
        "test/top1": 0.3,
        "test/loss": 0.5,
    }
    found, _ = restore_params("run", small_abstract()["params"], "best")
    assert found["w"].tolist() == [1.0] * 4


# --- what is no damage ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        NameError("name 'x' is not defined"),
        ImportError("no module"),
    ],
    ids=repr,
)
def test_a_failing_system_or_a_bug_is_no_damage(tmp_path, monkeypatch, error):
    """Nothing is set aside, and what failed is what is told."""
    write(tmp_path, [0.1, 0.2]).close()
    checkpointer = Checkpointer(tmp_path)

    def restore(*args, **options):
        raise error

    monkeypatch.setattr(checkpointer._manager, "restore", restore)
    with pytest.raises(type(error)) as caught:
        checkpointer.restore_newest(small_abstract())
    assert caught.value is error
    assert checkpointer.steps == [1, 2]
    error = ValueError("UNAVAILABLE: Error opening file [OS error 116: ESTALE Stale file handle]")
    with pytest.raises(OSError, match="ESTALE Stale file handle") as caught:
        checkpointer.restore_newest(small_abstract())
    assert caught.value.errno == errno.ESTALE
    monkeypatch.undo()
    assert checkpointer.restore_newest(small_abstract())[1] == {"step": 2}
    checkpointer.close()


def test_a_bug_while_a_step_is_written_is_no_full_disk(tmp_path, monkeypatch):
    checkpointer = write(tmp_path, [0.1])

    def save(*args, **options):
        raise error

    monkeypatch.setattr(checkpointer._manager, "save", save)
    error = TypeError("Object of type X is not JSON serializable")
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(2, small(2), {})
    error = ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 28: ENOSPC No space left]")
    with pytest.raises(
        OSError, match=r"must take checkpoints; it did not \(ENOSPC No space left\]"
    ):
        checkpointer.save(2, small(2), {})
    monkeypatch.undo()
    checkpointer.close()


@pytest.mark.parametrize("text", ["null", '"x"', "[]"])
def test_a_record_of_another_type_is_damage(tmp_path, text):
    write(tmp_path, [0.1, 0.2]).close()
    (tmp_path / FOLDER / "2/record/metadata").write_text(text)
    checkpointer = Checkpointer(tmp_path)
    _, record, problems = checkpointer.restore_newest(small_abstract())
    assert record == {"step": 1} and len(problems) == 1
    checkpointer.close()


# --- going back to what is whole ------------------------------------------------------------------


def flip_one_bit(step):
    """In the largest data file of a step, where the array's bytes are."""
    path = max(step.rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[data.index(noise(2)["params"]["w"].tobytes()[:64]) + 17] ^= 16
    path.write_bytes(data)


def noise(step):
    """A state of bytes that cannot be compressed."""
    rng = np.random.default_rng(step)
    w = rng.integers(0, 2**32, 3000, np.uint32).view(np.float32)
    return {"params": {"w": jnp.asarray(w)}, "step": jnp.int32(step)}


def write_noise(workdir, count):
    checkpointer = Checkpointer(workdir, keep_latest=3)
    for step in range(1, count + 1):
        checkpointer.save(step, noise(step), {"step": step})
    checkpointer.wait()
    return checkpointer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flipped bit", *DAMAGE])
def test_damaged_steps_are_set_aside_and_the_run_goes_on(tmp_path, damage):
    write_noise(tmp_path, 3).close()
    (flip_one_bit if damage == "flipped bit" else DAMAGE[damage])(tmp_path / FOLDER / "2")
    truncate(tmp_path / FOLDER / "3/state/manifest.ocdbt")
    checkpointer = Checkpointer(tmp_path, keep_latest=3)
    state, record, problems = checkpointer.restore_newest(jax.eval_shape(lambda: noise(0)))
    assert_same_bits(state, noise(1))
    assert record == {"step": 1}
    assert [p.split("; ")[1].split(" in ")[0] for p in problems] == ["step 3", "step 2"]
    if damage == "flipped bit":
        assert "is not (params/w is not what was saved). Use another step: 1" in problems[1]
    assert (checkpointer.steps, checkpointer.latest_step) == ([1], 1)
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["1", "damaged-2", "damaged-3"]
    for step in (2, 3):
        checkpointer.save(step, noise(step), {"step": step})
    checkpointer.close()
    again = Checkpointer(tmp_path)
    assert again.steps == [1, 2, 3]
    assert_same_bits(again.restore_newest(jax.eval_shape(lambda: noise(0)))[0], noise(3))
    again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_set_aside_where_nothing_is_whole(tmp_path):
    write_noise(tmp_path, 2).close()
    for step in "12":
        truncate(tmp_path / FOLDER / step / "state/manifest.ocdbt")
    before = listing(tmp_path / FOLDER)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint must be readable; step 2 in") as caught:
        checkpointer.restore_newest(jax.eval_shape(lambda: noise(0)))
    assert_unreadable(caught, tmp_path, 2)
    assert listing(tmp_path / FOLDER) == before
    checkpointer.close()


def test_flipped_bit_is_found_by_readers_of_parameters(tmp_path):
    write_noise(tmp_path, 2).close()
    flip_one_bit(tmp_path / FOLDER / "2")
    wanted = jax.eval_shape(lambda: noise(0))["params"]
    readers = (lambda s: restore_params(tmp_path, wanted, s), lambda s: read_params(tmp_path, s))
    for read in readers:
        with pytest.raises(
            ValueError, match=r"step 2 in .* \(params/w is not what was saved\)\. U"
        ):
            read("latest")
        read(1)


def test_second_damage_of_a_step_gets_a_name_of_its_own(tmp_path):
    for _ in range(2):
        checkpointer = Checkpointer(tmp_path)
        for step in {1, 2} - set(checkpointer.steps):
            checkpointer.save(step, noise(step), {})
        checkpointer.close()
        flip_one_bit(tmp_path / FOLDER / "2")
        reader = Checkpointer(tmp_path)
        reader.restore_newest(jax.eval_shape(lambda: noise(0)))
        reader.close()
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [
        "1",
        "damaged-2",
        "damaged-2.1",
    ]


def test_run_without_digests_is_still_read(tmp_path):
    write_noise(tmp_path, 1).close()
    path = tmp_path / FOLDER / "1/record/metadata"
    record = json.loads(path.read_text())
    assert set(record.pop("digest")) == {"params/w", "step"}
    del record["checksum"]
    path.write_text(json.dumps(record))
    checkpointer = Checkpointer(tmp_path)
    assert_same_bits(checkpointer.restore(1, jax.eval_shape(lambda: noise(0)))[0], noise(1))
    checkpointer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_checkpoint_is_listed_with_what_is_wrong(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_latest=4)
    for step, top in ((1, 0.5), (2, 0.25), (3, None), (4, None)):
        metrics = None if top is None else {"test/top1": top}
        checkpointer.save(step, noise(step), {"step": step}, metrics)
    checkpointer.close()
    flip_one_bit(tmp_path / FOLDER / "2")
    truncate(tmp_path / FOLDER / "3/state/manifest.ocdbt")
    path = tmp_path / FOLDER / "4/record/metadata"
    path.write_text(json.dumps({"step": 4}))
    before = listing(tmp_path)
    found = inspect(tmp_path)
    assert listing(tmp_path) == before
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["intact"] for row in found] == [True, False, False, None]
    assert [row["best"] for row in found] == [True, False, False, False]
    assert [row["metrics"] for row in found] == [{"test/top1": 0.5}, {"test/top1": 0.25}, {}, {}]
    assert "(params/w is not what was saved)" in found[1]["problem"]
    assert "step 3 in" in found[2]["problem"] and "problem" not in found[3]
    assert all(0.01 <= row["mib"] < 0.1 for row in found)  # 12 kB, and what describes them


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut short", "emptied", "deleted"])
def test_no_file_of_the_newest_step_can_stop_a_run(tmp_path, damage):
    checkpointer = Checkpointer(tmp_path / "whole")
    for step in (1, 2):
        checkpointer.save(step, noise(step), {"step": step}, {"test/top1": 0.25 * step})
    checkpointer.close()
    newest = tmp_path / "whole" / FOLDER / "2"
    files = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
    assert len(files) > 10
    for i, file in enumerate(files):
        workdir = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", workdir)
        path = workdir / FOLDER / "2" / file
        if damage == "cut short":
            truncate(path)
        else:
            path.write_bytes(b"") if damage == "emptied" else path.unlink()
        again = Checkpointer(workdir)
        state, record, problems = again.restore_newest(jax.eval_shape(lambda: noise(0)))
        assert record["step"] == 2 - len(problems), file
        assert_same_bits(state, noise(record["step"]))
        again.save(3, noise(3), {"step": 3}, {"test/top1": 0.125})
        again.wait()
        assert again.latest_step == 3, file
        again.close()
    gc.collect()  # Orbax's readers that nobody waited for complain here, and in no other test


@pytest.mark.parametrize("changed", ['"step": 2', '"loss": 0.5', '"digest"', '"params/w"'])
def test_flipped_bit_of_a_record_is_found(tmp_path, changed):
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, noise(step), {"step": step, "loss": 0.5})
    checkpointer.close()
    path = tmp_path / FOLDER / "2/record/metadata"
    data = bytearray(path.read_bytes())
    data[data.index(changed.encode()) + len(changed) - (1 if changed[-1] != '"' else 2)] ^= 1
    path.write_bytes(data)
    again = Checkpointer(tmp_path)
    for read in (
        again.restore_record,
        lambda s: again.restore(s, jax.eval_shape(lambda: noise(0))),
    ):
        with pytest.raises(
            ValueError, match=r"\(its record is not what was saved\)\. Use another "
        ):
            read(2)
    _, record, _ = again.restore_newest(jax.eval_shape(lambda: noise(0)))
    assert record == {"step": 1, "loss": 0.5}
    again.close()


@pytest.mark.parametrize(
    "damaged",
    [
        '{"test/top1": 0.',
        '{"test/uop1": 0.9}',
        "[0.9]",
        "\xff",
        '{"test/top1": 0.99, "test/loss": 0.3333333333333333}',  # another digit
    ],
)
def test_step_with_unreadable_metrics_is_restored_but_not_the_best(tmp_path, damaged):
    checkpointer = write(tmp_path, [0.5, 0.9])
    checkpointer.close()
    path = tmp_path / FOLDER / "2/metrics/metrics"
    path.write_bytes(damaged.encode("latin-1"))
    reader = Checkpointer(tmp_path, read_only=True)
    assert (reader.latest_step, reader.best_step) == (2, 1)
    assert_same_bits(reader.restore(2, small_abstract())[0], small(2))
    with pytest.raises(ValueError, match=r"step 2 in .* \(its metrics cannot be read\)\. Use "):
        reader.metrics(2)
    reader.close()
    assert [row["intact"] for row in inspect(tmp_path)] == [True, False]


# --- a disk that is full --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failed_save_is_reported_and_the_good_steps_stay(tmp_path):
    """No file may grow beyond 4 kB for a while, as on a full disk."""
    checkpointer = Checkpointer(tmp_path, keep_latest=2)
    for step in (1, 2):
        checkpointer.save(step, noise(step), {"step": step})
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = (
        r"checkpoints must take checkpoints; it did not \(.*large.*\)\. Intact: (1, )?2\. Free"
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for step in (3, 4, 5):
            with pytest.raises(OSError, match=message):
                checkpointer.save(step, noise(step), {"step": step})
                checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 2 in checkpointer.steps
    checkpointer.save(6, noise(6), {"step": 6})
    checkpointer.close()
    again = Checkpointer(tmp_path)
    assert again.steps[-2:] == [2, 6]
    for step in (2, 6):
        assert_same_bits(again.restore(step, jax.eval_shape(lambda: noise(0)))[0], noise(step))
    again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_closing_does_not_raise_what_a_save_could_not_write(tmp_path):
    """It would hide the error that ends a run; and the directory must be free for the next."""
    checkpointer = write_noise(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        checkpointer.save(2, noise(2), {"step": 2})
        checkpointer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / FOLDER / "3.orbax-checkpoint-tmp").mkdir()  # as a run that was killed leaves it
    again = Checkpointer(tmp_path)
    assert again.steps == [1]
    assert not (tmp_path / FOLDER / "3.orbax-checkpoint-tmp").exists()
    again.save(2, noise(2), {"step": 2})
    again.wait()
    assert again.steps == [1, 2]
    again.close()


def test_what_a_failed_save_left_is_swept(tmp_path):
    """Asked of the function: the writers of a failed save may outlive it, and write once more."""
    for name in ("3", "3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bytes").write_bytes(b"")
    sweep(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4.orbax-checkpoint-tmp"}
    sweep(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4.orbax-checkpoint-tmp"}
    sweep(tmp_path, "*")
    assert {path.name for path in tmp_path.iterdir()} == {"3"}
