"""`evaluate --watch`: beside a training process, with checkpoints that go, and how it ends."""

import json
import shutil

import pytest
from command import TINY, start
from tensorboardX.proto.event_pb2 import Event

from crate_jax.cli import following, watching
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.data.stores.tfrecord import index_records, read_record
from crate_jax.training import mirror
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)


def config(steps):
    return TrainConfig(
        batch_size=48,
        eval_batch_size=32,
        total_steps=steps,
        eval_every_steps=1,
        keep_latest=5,
        model=ModelConfig(name="crate_tiny_patch16_224", **FIELDS),
        data=DataConfig(
            eval_split="test[:40]", train_transforms="resize(16)", eval_transforms="resize(16)"
        ),
        optim=OptimConfig(lr=1e-2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, each with a checkpoint and an evaluation of its own."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(config(3), folder)
    return folder


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """No checkpoint is evaluated twice; a watcher that does so would not end."""
    evaluate, seen = watching._Split.evaluate, []

    def counted(self, step, *trained):
        if (self, step) in seen:
            pytest.fail(f"step {step} is evaluated again")
        seen.append((self, step))
        return evaluate(self, step, *trained)

    monkeypatch.setattr(watching._Split, "evaluate", counted)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, that may be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said_by_training(run):
    """By step what the training process measured on the same split."""
    return {
        line["step"]: {k.removeprefix("test/"): v for k, v in line.items() if k.startswith("test/")}
        for line in lines_of(run / "metrics.jsonl")
        if "test/top1" in line
    }


def agree(lines, run):
    """Lines hold what training said of their steps."""
    said = said_by_training(run)
    for line in lines:
        measured = {k: v for k, v in line.items() if k not in ("step", "dataset", "split")}
        assert measured == pytest.approx(said[line["step"]], rel=1e-6)


def test_beside_a_training_process(tmp_path, call):
    """It sees every checkpoint that it is in time for, and ends with the run."""
    run = tmp_path / "run"
    flags = [*TINY, "--config.model.depth=1", "--config.total_steps=12"]
    flags += ["--config.eval_every_steps=3", "--config.keep_latest=2"]
    training = start("train.py", "--config=configs/digits.py", f"--workdir={run}", *flags)
    status, found, err = call("evaluate", "--workdir", run, "--watch", "--interval", 0.1)
    out, trouble = training.communicate(timeout=600)
    assert training.returncode == 0, trouble
    assert (status, err) == (0, "")
    lines = lines_of(run / "evaluations/evaluations.jsonl")
    assert lines[-1]["step"] == 12 == found["step"] and found["evaluated"] == len(lines) > 0
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    agree(lines, run)
    assert found["top1"] == json.loads(out.splitlines()[-1])["test/top1"]


def test_each_checkpoint_as_it_comes_and_then_the_end(finished, tmp_path, monkeypatch, capsys):
    """A folder that is not there, a first checkpoint, two more, and the last step of the run."""
    run, looks = tmp_path / "run", []

    def wait(seconds):
        assert seconds == 2.5
        looks.append(seconds)
        if len(looks) > 4:
            pytest.fail("it does not end with the run")
        if len(looks) == 2:
            shutil.copytree(finished, run, ignore=shutil.ignore_patterns("2", "3"))
        elif len(looks) == 4:
            for step in "23":
                shutil.copytree(finished / "checkpoints" / step, run / "checkpoints" / step)

    monkeypatch.setattr(following.time, "sleep", wait)
    assert main(["evaluate", "--workdir", str(run), "--watch", "--interval=2.5"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert said[0] == f"waiting for the first checkpoint of a run in {run}"
    assert [line.split("  ")[0] for line in said[1:]] == ["step 1", "step 2", "step 3"]
    assert len(looks) == 4
    found, path = json.loads(last), run / "evaluations/evaluations.jsonl"
    assert (found["evaluated"], found["deleted"], found["output"]) == (3, 0, str(path))
    lines = lines_of(path)
    assert [(x["step"], x["dataset"], x["split"]) for x in lines] == [
        (step, "digits", "test[:40]") for step in (1, 2, 3)
    ]
    agree(lines, run)
    assert len({line["loss"] for line in lines}) == 3
    assert {**found, "split": 0} == {**found, **lines[-1], "split": 0}
    (events,) = path.parent.glob("events*")
    index = index_records(str(events))
    read = [
        Event.FromString(read_record(str(events), int(at), int(n), check_crc=True))
        for at, n in index
    ]
    values = {(e.step, v.tag): v.simple_value for e in read for v in e.summary.value}
    for line in lines:
        assert values[line["step"], "test[:40]/top1"] == pytest.approx(line["top1"], rel=1e-6)

    # Once more: nothing is left to do, and the same is said.
    assert main(["evaluate", "--workdir", str(run), "--watch"]) == 0
    (only,) = capsys.readouterr().out.splitlines()
    again = json.loads(only)
    assert again["evaluated"] == 0 and again["step"] == 3 and lines_of(path) == lines


def test_a_line_that_a_crash_cut_off_and_lines_of_another_split_do_not_count(run, call):
    path = run / "evaluations/evaluations.jsonl"
    path.parent.mkdir()
    other = dict(step=2, dataset="digits", split="test")
    path.write_text(json.dumps(other) + "\n" + '{"step": 3, "data')
    status, found, _ = call("evaluate", "--workdir", run, "--watch")
    assert status == 0 and found["evaluated"] == 3
    whole = [line for line in path.read_text().splitlines() if not line.endswith("data")]
    assert [json.loads(line)["step"] for line in whole] == [2, 1, 2, 3]


class Far(mirror.Mirror):
    """A mirror of a folder that is here as one of a bucket."""

    def __init__(self, workdir):
        self.workdir, self.folder = workdir, workdir.with_name("near")

    def fetch(self, name):
        if (self.workdir / name).exists():
            shutil.copy(self.workdir / name, self.folder / name)

    def flush(self):
        shutil.copytree(self.folder, self.workdir, dirs_exist_ok=True)

    close = flush


def test_a_folder_in_a_bucket_goes_on_from_its_lines_and_has_each_line_at_once(
    run, monkeypatch, call
):
    monkeypatch.setattr(mirror, "Mirror", Far)
    far, evaluate, there = run / "far", watching._Split.evaluate, []

    def and_look(self, step, *trained):
        there.append([line["step"] for line in lines_of(far / watching.NAME)])
        return evaluate(self, step, *trained)

    far.mkdir()
    (far / watching.NAME).write_text('{"step": 1, "dataset": "digits", "split": "test[:40]"}\n')
    monkeypatch.setattr(watching._Split, "evaluate", and_look)
    status, found, err = call("evaluate", "--workdir", run, "--watch", "--output", far)
    assert (status, err, found["evaluated"]) == (0, "", 2)
    assert there == [[1], [1, 2]]
    assert [line["step"] for line in lines_of(far / watching.NAME)] == [1, 2, 3]
    assert len([*far.glob("events*")]) == 1


def test_a_checkpoint_that_is_deleted_before_it_is_read(run, monkeypatch, capsys):
    """The second goes while the first is evaluated, as a run deletes what it need not keep."""
    evaluate = watching._Split.evaluate

    def and_delete(self, step, *trained):
        if step == 1:
            shutil.rmtree(run / "checkpoints/2")
        return evaluate(self, step, *trained)

    monkeypatch.setattr(watching._Split, "evaluate", and_delete)
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)
    assert main(["evaluate", "--workdir", str(run), "--watch"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "step 2: deleted before it was read"
    found = json.loads(out[-1])
    assert (found["evaluated"], found["deleted"], found["step"]) == (2, 1, 3)


def test_a_checkpoint_that_is_damaged_and_stays_is_an_error(run, capsys, monkeypatch):
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)
    for file in (run / "checkpoints/2").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"x" * file.stat().st_size)
    assert main(["evaluate", "--workdir", str(run), "--watch"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("step 1  loss") and out.count("\n") == 1
    assert "checkpoint must be readable; step 2 in" in err and err.count("\n") == 1
    assert [line["step"] for line in lines_of(run / "evaluations/evaluations.jsonl")] == [1]


@pytest.mark.parametrize("after", [0, 2])
def test_an_interruption_ends_it_in_one_line(run, monkeypatch, capsys, after):
    """It says what it knows; of a run that has nothing yet it says that it was interrupted."""
    looks = []

    def interrupt(seconds):
        looks.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", interrupt)
    if not after:
        assert main(["evaluate", "--workdir", str(run / "nothing"), "--watch"]) == 130
        out, err = capsys.readouterr()
        assert out == f"waiting for the first checkpoint of a run in {run / 'nothing'}\n"
        assert err.startswith("error: interrupted") and err.count("\n") == 1
        assert not (run / "nothing").exists()
    else:
        heard = []
        monkeypatch.setattr(watching, "answered", lambda: heard.append(True))
        shutil.rmtree(run / "checkpoints/3")  # so that there is something to wait for
        assert main(["evaluate", "--workdir", str(run), "--watch"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and json.loads(out.splitlines()[-1])["evaluated"] == after
        assert heard == [True]  # nobody ends the process while it closes its files
    assert looks == [5.0]


def test_a_run_whose_end_is_not_known_is_watched_on(run, monkeypatch):
    """Of an older version, which did not record how many examples there were."""
    from crate_jax.checkpoint import reading
    from crate_jax.checkpoint.manager import Checkpointer
    from crate_jax.config import to_dict

    reader = Checkpointer(run, read_only=True)
    record = reader.restore_record(3)
    try:
        assert watching._is_complete(reader, str(run))
        by_epochs = config(None)
        by_epochs.total_epochs = 3 / 31  # of 1500 // 48 steps
        monkeypatch.setattr(
            reader, "restore_record", lambda step: record | {"config": to_dict(by_epochs)}
        )
        assert watching._is_complete(reader, str(run))
        by_epochs.total_epochs = 4 / 31
        assert not watching._is_complete(reader, str(run))
        monkeypatch.setattr(reading, "read_facts", lambda workdir: {})
        by_epochs.total_epochs = 3 / 31
        assert not watching._is_complete(reader, str(run))

        def gone(step):
            raise ValueError("step 3 cannot be read")

        monkeypatch.setattr(reader, "restore_record", gone)
        assert not watching._is_complete(reader, str(run))
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--watch"], "--watch must go with --workdir, a run."),
        (["--watch", "--weights=w.npz"], "--watch must go with --workdir, a run."),
        (["--watch", "--workdir=r", "--step=1"], "--watch must go without --step; got both."),
        (["--watch", "--workdir=r", "--detail"], "--watch must go without --detail, --confusion"),
        (["--watch", "--workdir=r", "--interval=0"], "--interval must be seconds > 0; got 0."),
        (["--watch", "--workdir=r", "--interval=nan"], "--interval must be seconds > 0; got nan."),
        (
            ["--watch", "--workdir=r", "--output=/dev/null/x"],
            "--output must be a folder; /dev/null",
        ),
        (["--workdir=r", "--interval=3"], "--interval must go with --watch. Leave it out"),
        (["--workdir=r", "--output=o"], "--output must go with --watch. Leave it out"),
    ],
)
def test_what_it_refuses(call, monkeypatch, arguments, line):
    monkeypatch.setattr(following.time, "sleep", lambda _: pytest.fail("it waits"))
    status, found, err = call("evaluate", *arguments)
    assert status == 2 and found is None and line in err and err.count("\n") == 1
