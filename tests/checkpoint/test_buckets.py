"""Checkpoints in a bucket do as on disk: what is kept, what is damaged, what is not finished."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import buckets
from crate_jax.checkpoint import s3
from crate_jax.checkpoint.faults import DamagedStepError, damages
from crate_jax.checkpoint.folder import COMMITTED, FOLDER
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import inspect, read_facts, read_params
from crate_jax.files import located, written_aside

TOP1 = (0.2, 0.9, 0.1, 0.3)
# Orbax's readers that nobody waited for complain when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.slow,
]


def noise(step):
    """A state of bytes that cannot be compressed."""
    rng = np.random.default_rng(step)
    w = rng.integers(0, 2**32, 3000, np.uint32).view(np.float32)
    return {"params": {"w": jnp.asarray(w)}, "step": jnp.int32(step)}


def write(workdir, count=3, keep_latest=3):
    checkpointer = Checkpointer(workdir, keep_latest=keep_latest)
    for step in range(1, count + 1):
        metrics = {"test/top1": TOP1[step - 1]}
        record = {"step": step, "facts": {"classes": ["a", "b"]}}
        checkpointer.save(step, noise(step), record, metrics)
    checkpointer.wait()
    return checkpointer


def files(workdir):
    """The file system of a bucket, and all paths below a workdir there, relative to it."""
    fs = fsspec.filesystem(workdir.partition("://")[0], use_listings_cache=False)
    root = fs._strip_protocol(workdir) + "/"
    return fs, root, [path.removeprefix(root) for path in fs.find(root)]


def restored(workdir, **kwargs):
    """The newest whole state, its record, what was wrong, and the steps that are there then."""
    checkpointer = Checkpointer(workdir, **kwargs)
    state, record, problems = checkpointer.restore_newest(jax.eval_shape(lambda: noise(0)))
    steps = checkpointer.steps
    checkpointer.close()
    return np.asarray(state["params"]["w"]).tobytes(), record["step"], problems, steps


def test_newest_and_best_are_kept_and_come_back_bit_for_bit(bucket):
    checkpointer = write(bucket, 4, keep_latest=2)
    assert (checkpointer.steps, checkpointer.best_step) == ([2, 3, 4], 2)
    assert checkpointer.metrics(2) == {"test/top1": 0.9}
    with pytest.raises(FileExistsError, match=rf"^step must be new; {bucket}/{FOLDER} holds 4 alr"):
        checkpointer.save(4, noise(4), {})
    checkpointer.close()
    fs, root, paths = files(bucket)
    assert {path.split("/")[1] for path in paths if path.startswith(FOLDER)} == {"2", "3", "4"}
    assert restored(bucket, keep_latest=2)[:3] == (noise(4)["params"]["w"].tobytes(), 4, [])
    params, record = read_params(bucket, "best")
    assert params["w"].tobytes() == noise(2)["params"]["w"].tobytes() and record["step"] == 2
    assert read_facts(bucket) == {"classes": ["a", "b"]}
    rows = inspect(bucket)
    assert [(row["step"], row["intact"], row["best"]) for row in rows] == [
        *[(2, True, True), (3, True, False), (4, True, False)]
    ]
    sizes = sum(fs.size(root + path) for path in paths if path.startswith(f"{FOLDER}/4/"))
    assert rows[-1]["mib"] == round(sizes / 2**20, 2) > 0


def flip(fs, path):
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 16
    fs.pipe_file(path, bytes(data))


DAMAGE = {
    "flipped bit": ("/d/", flip, "params/w is not what was saved"),
    "cut short": (
        "state/manifest.ocdbt",
        lambda fs, path: fs.pipe_file(path, fs.cat_file(path)[:9]),
        "",
    ),
    "record": ("record/metadata", flip, ""),
    "deleted": ("/d/", lambda fs, path: fs.rm(path), ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_run_goes_on(bucket, damage):
    write(bucket).close()
    where, harm, said = DAMAGE[damage]
    fs, root, paths = files(bucket)
    harmed = [root + p for p in paths if p.startswith(f"{FOLDER}/3/") and where in p]
    harm(fs, max(harmed, key=fs.size))
    (problem,) = restored(bucket)[2]
    assert problem.startswith(f"checkpoint must be readable; step 3 in {bucket}/{FOLDER} is not (")
    assert said in problem and problem.endswith("Use another step: 1, 2.")
    fs, _, paths = files(bucket)
    assert {path.split("/")[1] for path in paths if path.startswith(FOLDER)} == {
        *("1", "2", "damaged-3")
    }
    checkpointer = Checkpointer(bucket, keep_latest=3)
    assert checkpointer.steps == [1, 2]
    checkpointer.save(3, noise(3), {"step": 3})
    checkpointer.close()
    assert restored(bucket) == (noise(3)["params"]["w"].tobytes(), 3, [], [1, 2, 3])


def test_a_save_that_was_not_finished_is_no_step_and_is_swept(bucket):
    """As a killed run leaves it: all of a step but what Orbax adds last."""
    write(bucket).close()
    fs, root, _ = files(bucket)
    fs.rm(f"{root}{FOLDER}/3/{COMMITTED}")
    assert [row["step"] for row in inspect(bucket)] == [1, 2]
    assert any(path.startswith(f"{FOLDER}/3/") for path in files(bucket)[2])  # readers delete none
    assert restored(bucket) == (noise(2)["params"]["w"].tobytes(), 2, [], [1, 2])
    assert not any(path.startswith(f"{FOLDER}/3/") for path in files(bucket)[2])


def test_a_run_that_is_not_there(bucket):
    with pytest.raises(FileNotFoundError, match=rf"^workdir must hold a checkpoint; {bucket} has "):
        Checkpointer(bucket, read_only=True)
    wrong = bucket.replace("bucket", "no-such-bucket")
    for read_only in (True, False):
        message = r"^workdir must be reachable; \w+://no-such-bucket is not \(there is no such buc"
        with pytest.raises(ValueError, match=message):
            Checkpointer(wrong, read_only=read_only)


@pytest.mark.parametrize(("kind", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named(kind, extra, monkeypatch):
    package = buckets.PACKAGES[kind]

    def missing(protocol, **options):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(buckets, "filesystem", buckets.filesystem.__wrapped__)
    monkeypatch.setattr(fsspec, "filesystem", missing)
    message = rf"^workdir must be reachable; {kind}:// needs {package}, which is missing\. Install "
    with pytest.raises(ValueError, match=message + rf"it: pip install 'crate-jax\[{extra}\]'"):
        Checkpointer(f"{kind}://bucket/run")


def test_an_orbax_that_cannot_be_taught_is_told(monkeypatch, services):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    monkeypatch.setattr(s3, "_teach", s3._teach.__wrapped__)
    monkeypatch.delattr(tensorstore_utils, "build_kvstore_tspec")
    with pytest.raises(
        ValueError, match=r"^orbax-checkpoint must be a version that can store arrays in s3://; got"
    ):
        Checkpointer("s3://bucket/untaught").close()


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Forbidden"),
        TimeoutError(),
        ConnectionError("reset"),
        ValueError("Error reading s3://b/x: UNAVAILABLE: CURL error Couldn't connect to server"),
        ValueError("Error reading gs://b/x: HTTP response code: 403 with body: denied"),
    ],
)
def test_a_service_that_fails_is_no_damage(error):
    """A step that cannot be read now may be whole: nobody may set it aside."""
    message = r"^the checkpoint must be reachable; it is not \(\w+Error: .*\)\. Check the network"
    with (
        pytest.raises(buckets.ServiceError, match=message),
        damages(lambda error: DamagedStepError(str(error))),
    ):
        raise error
    with pytest.raises(DamagedStepError), damages(lambda error: DamagedStepError(str(error))):
        raise FileNotFoundError("bucket/run/record/metadata")


def test_a_file_in_a_bucket_appears_whole_or_not_at_all(bucket):
    path = located(f"{bucket}/config.json", "the file")
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert not path.exists()
    for text in ("one", "two"):
        with written_aside(path) as aside:
            aside.write_text(text)
        assert path.read_text() == text
    assert not aside.exists()
    with pytest.raises(FileNotFoundError), written_aside("s3://no-such-bucket/x") as aside:
        aside.write_text("lost")
