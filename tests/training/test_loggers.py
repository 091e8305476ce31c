"""What Weights & Biases and Trackio get of a run: by stand-ins of their interface, and really."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from command import ROOT

from crate_jax.config import TrainConfig, to_dict
from crate_jax.training import loggers
from crate_jax.training.loggers import check_loggers, pictures
from crate_jax.training.loop import train
from crate_jax.training.progress import Reporter


class Stranger(types.ModuleType):
    """What both packages have in common, of which everything is written down."""

    def __init__(self, name, broken=()):
        super().__init__(name)
        self.begun, self.logged, self.ended, self.summary = [], [], [], {}
        self.Image = lambda picture: ("picture", picture.shape, picture.dtype.name)
        self.Settings = lambda **settings: settings
        self.broken = broken

    def init(self, **how):
        print("a greeting")
        self._act("init")
        self.begun.append(how)
        return self

    def log(self, values, *, step):
        self._act(f"log {step}")
        self.logged.append((step, values))

    def finish(self, **how):
        self._act("finish")
        self.ended.append(how)

    def _act(self, what):
        if what in self.broken:
            raise RuntimeError(f"no {what}\nand more")


@pytest.fixture
def both(monkeypatch):
    """Stand-ins for both packages."""
    found = {name: Stranger(name) for name in ("wandb", "trackio")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def reporter(folder, *names, start=0, name="digits"):
    config = TrainConfig(name=name, loggers=names)
    record = {"step": start, "summary": {"test/top1": 0.5}}
    return Reporter(folder, config, 10, record, headline="top1")


def told(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_they_get_what_the_files_get(both, tmp_path, capsys):
    image = np.linspace(0, 1, 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4, 1)
    with reporter(tmp_path, "wandb", "trackio") as report:
        report.trained(1, {"loss": 2.0}, log=True)
        report.inspected(2, {"objective/R": 3.0}, {"seen": image})
        report.tested(2, {"top1": 0.75})
    lines = told(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 2]
    pair = ("picture", (3, 4, 3), "uint8")
    shown = {"wandb": {"seen": [pair, pair]}, "trackio": {"seen/0": pair, "seen/1": pair}}
    for name, module in both.items():
        scalars = [{"step": step, **values} for step, values in module.logged]
        assert scalars[:2] + scalars[3:] == lines
        assert module.logged[2] == (2, shown[name])
        (how,) = module.begun
        assert how["config"] == to_dict(TrainConfig(loggers=("wandb", "trackio")))
        assert how["project"] == "crate_jax" and how["resume"] == "allow"
    assert both["wandb"].begun[0]["dir"] == str(tmp_path)
    assert both["wandb"].begun[0]["settings"] == {"console": "off"}  # bars are not recorded
    assert both["wandb"].summary == {"train/loss": 2.0, "test/top1": 0.75}
    assert both["wandb"].ended == [{"exit_code": 0}] and both["trackio"].ended == [{}]
    assert capsys.readouterr().out == ""  # the last line of stdout is a command's result


def test_a_run_is_known_by_one_name_however_often_it_is_resumed(both, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for start in (0, 3, 6):
        with reporter(tmp_path / "a", "wandb", "trackio", start=start, name="mine: a/b"):
            pass
    with reporter(tmp_path / "b", "wandb"):
        pass
    *same, other = [how["id"] for how in both["wandb"].begun]
    assert len(same) == 3 and len(set(same)) == 1 and other != same[0]
    assert same[0].startswith("mine--a-b-") and other.startswith("digits-")
    assert [how["name"] for how in both["trackio"].begun] == same
    assert json.loads((tmp_path / "a/loggers.json").read_text()) == {"name": same[0]}


def test_a_run_that_fails_is_told_as_such(both, tmp_path):
    with pytest.raises(FloatingPointError), reporter(tmp_path, "wandb"):
        raise FloatingPointError
    assert both["wandb"].ended == [{"exit_code": 1}]


def test_one_that_fails_on_the_way_is_told_once_and_costs_nothing(both, tmp_path, capsys):
    both["wandb"].broken = ("log 2", "finish")
    both["trackio"].broken = ("finish",)
    with reporter(tmp_path, "wandb", "trackio") as report:
        for step in (1, 2, 3):
            report.trained(step, {"loss": 1.0 * step}, log=True)
    assert [line["train/loss"] for line in told(tmp_path)] == [1.0, 2.0, 3.0]
    assert [step for step, _ in both["wandb"].logged] == [1]
    assert [step for step, _ in both["trackio"].logged] == [1, 2, 3]
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert said == [
        "wandb failed at step 2 (RuntimeError: no log 2); the run goes on without it, and its own "
        "files have everything",
        "trackio failed at the end (RuntimeError: no finish); the run goes on without it, and its "
        "own files have everything",
    ]


def test_a_run_in_a_bucket_keeps_no_files_there_and_is_ended_once(both):
    logger = loggers.LOGGERS["wandb"](both["wandb"], "gs://bucket/run", {}, "name")
    assert both["wandb"].begun[0]["dir"] is None
    opened = loggers.Loggers({"wandb": logger}, print)
    for _ in range(2):
        opened.close({}, failed=False)
    assert both["wandb"].ended == [{"exit_code": 0}]


def test_nobody_else_logs(both, tmp_path):
    """Neither another process of a run, nor a run that is complete."""
    config = TrainConfig(loggers=("wandb",))
    for enabled, step in ((False, 0), (True, 10)):
        record = {"step": step, "summary": {}}
        with Reporter(tmp_path, config, 10, record, headline="top1", enabled=enabled) as report:
            report.trained(step, {"loss": 1.0}, log=True)
    assert both["wandb"].begun == [] and not (tmp_path / "loggers.json").exists()


def test_a_training_with_loggers_ends_with_the_bits_of_one_without(both, tmp_path, tiny_config):
    plain = train(tiny_config(), tmp_path / "plain")
    found = train(tiny_config(loggers=("wandb,trackio",)), tmp_path / "run")
    assert {k: v for k, v in found.items() if k not in ("seconds", "workdir")} == {
        k: v for k, v in plain.items() if k not in ("seconds", "workdir")
    }
    for module in both.values():
        assert [{"step": step, **values} for step, values in module.logged] == told(
            tmp_path / "run"
        )
        assert module.begun[0]["config"]["loggers"] == ["wandb", "trackio"]


@pytest.mark.parametrize(
    ("names", "missing", "message"),
    [
        (
            ("wandbb",),
            (),
            r"^loggers must be out of wandb, trackio; got wandbb\. Did you mean wandb\?",
        ),
        (
            ("wandb",),
            ("wandb",),
            r"^loggers must be installed; wandb is not\. .*'crate-jax\[wandb\]'",
        ),
        (("trackio",), ("trackio",), r"^loggers must be installed; trackio is not\."),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(
    both, monkeypatch, tmp_path, tiny_config, names, missing, message
):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(loggers=names), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        check_loggers(names)
    with pytest.raises(ValueError, match=message):  # a Reporter of somebody's own
        reporter(tmp_path, *names)
    assert [*tmp_path.iterdir()] == []


def test_one_that_does_not_begin_ends_the_run_before_its_first_step(both, tmp_path, tiny_config):
    both["wandb"].broken = ("init",)
    message = (
        r"^loggers must begin; wandb does not \(RuntimeError: no init\)\. Log in or check the "
        r"network, set WANDB_MODE=offline, or leave it out of --config\.loggers\.$"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny_config(loggers=("trackio", "wandb")), tmp_path / "run")
    assert both["trackio"].ended == [{}] and both["trackio"].logged == []
    assert not (tmp_path / "run/metrics.jsonl").exists()
    both["wandb"].broken, both["trackio"].broken = (), ("init",)
    with pytest.raises(ValueError, match=r"trackio does not .* the network, or leave it out of"):
        train(tiny_config(loggers=("trackio",)), tmp_path / "run")


def test_pictures_are_three_channels_of_bytes():
    grey, colour = np.float32([[[[0.0], [1.0]]]]), np.uint8([[[[1, 2, 3]]]])
    assert [x.tolist() for x in pictures(grey)] == [[[[0, 0, 0], [255, 255, 255]]]]
    assert [x.tolist() for x in pictures(colour)] == [[[[1, 2, 3]]]]
    assert loggers.PROJECT == "crate_jax"


# A process of its own: these packages start others, and hold on to the one that they are in.
REALLY = """
import sys, pathlib, numpy as np
from crate_jax.config import TrainConfig
from crate_jax.training.progress import Reporter
folder, name, start = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = TrainConfig(loggers=(name,))
with Reporter(folder, config, 10, {"step": start, "summary": {}}, headline="top1") as report:
    report.trained(start + 1, {"loss": 2.0 + start}, log=True)
    report.inspected(start + 2, {}, {"seen": np.linspace(0, 1, 128).reshape(2, 8, 8, 1)})
    report.tested(start + 3, {"top1": 0.75})
"""


def really(folder, name, start):
    """A piece of a run that logs to the package itself, without a network."""
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", REALLY, str(folder), name, str(start)],
        cwd=folder,
        env=os.environ | offline | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    assert done.stdout == ""


def records_of(log):
    """The records of a file of wandb: LevelDB's log, behind seven bytes."""
    data, place, found, part = log.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768  # of the block; a record has its head in one
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found, part = [*found, part], b""
    return found


def test_wandb_itself(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for start in (0, 3):
        really(tmp_path, "wandb", start)
    name = json.loads((tmp_path / "loggers.json").read_text())["name"]
    logs = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    found = []
    for log in logs:
        for data in records_of(log):
            record = Record.FromString(data)
            values = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            found += [json.loads(values["train/loss"])] if "train/loss" in values else []
    assert len(logs) == 2 and found == [2.0, 5.0]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 4


def test_trackio_itself(tmp_path):
    pytest.importorskip("trackio")
    import sqlite3

    for start in (0, 3):
        really(tmp_path, "trackio", start)
    name = json.loads((tmp_path / "loggers.json").read_text())["name"]
    with sqlite3.connect(tmp_path / "trackio/crate_jax.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    rows = [(run, step, json.loads(values)) for run, step, values in rows]
    assert {run for run, _, _ in rows} == {name}
    assert [(s, x["train/loss"]) for _, s, x in rows if "train/loss" in x] == [(1, 2.0), (4, 5.0)]
    assert [s for _, s, x in rows if x.get("test/top1") == 0.75] == [3, 6]
