"""What a run writes and shows."""

import io
import json
import resource
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from crate_jax.training import progress
from crate_jax.training.progress import Progress, Reporter, Stopwatch
from crate_jax.training.writer import MetricsWriter


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"train/loss": 1.25, "train/top1": 0.5, "examples_per_s": 640.0}
SHOWN = {"loss": 1.25, "top1": 0.5}


def records(path):
    """The events of one of TensorBoard's files, by the TFRecord layout."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        for start, size in ((at, 8), (at + 12, length)):
            foot = int.from_bytes(data[start + size : start + size + 4], "little")
            assert foot == masked_crc32c(data[start : start + size])
        found.append(Event.FromString(data[at + 12 : at + 12 + length]))
        assert abs(found[-1].wall_time - time.time()) < 60
        at += length + 16
    return found


def events(workdir):
    """(step, tag, value) of every scalar in TensorBoard's files."""
    files = sorted(workdir.glob("events.out.tfevents*"))
    return [
        (event.step, value.tag, value.simple_value)
        for path in files
        for event in records(path)
        for value in event.summary.value
    ]


def test_scalars_reach_both_files(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"train/loss": 0.5})
    writer.write(4, {"train/loss": 0.25})
    writer.write(2**40, {"λ" * 200: -1e-3, "huge": 1e39})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "train/loss": 0.5},
        {"step": 4, "train/loss": 0.25},
        {"step": 2**40, "λ" * 200: -1e-3, "huge": 1e39},
    ]
    assert events(tmp_path) == [
        (3, "train/loss", 0.5),
        (4, "train/loss", 0.25),
        (2**40, "λ" * 200, float(np.float32(-1e-3))),
        (2**40, "huge", float("inf")),
    ]


def test_resuming_tells_tensorboard_what_to_forget(tmp_path):
    MetricsWriter(tmp_path).close()
    MetricsWriter(tmp_path, start_step=300).close()
    first, second = sorted(tmp_path.glob("events.out.tfevents*"))
    assert [(e.step, e.file_version) for e in records(first)] == [(0, "brain.Event:2")]
    version, start = records(second)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (301, SessionLog.START)


def test_a_full_disk_ends_the_writing_at_once(tmp_path):
    """It must not wait, as a queue would whose reader has ended."""
    writer = MetricsWriter(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # of every file
    try:
        with pytest.raises(OSError, match="large"):
            for step in range(1000):
                writer.write(step, VALUES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


def test_resuming_takes_back_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"ste')
    writer = MetricsWriter(tmp_path, start_step=2)
    writer.write(3, {"a": 4.0})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0},
        {"step": 3, "a": 4.0},
    ]


def test_a_terminal_sees_one_live_line_and_a_pipe_plain_lines():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = Progress(100, stream)
        progress.update(10, SHOWN, steps_per_s=0.5, examples_per_s=640.0)
        progress.update(20, SHOWN, steps_per_s=0.5, examples_per_s=640.0)
        progress.say("done")
    assert pipe.getvalue().splitlines() == [
        "step 10/100  loss 1.2500  top1 0.500  640 examples/s  ETA 3:00",
        "step 20/100  loss 1.2500  top1 0.500  640 examples/s  ETA 2:40",
        "done",
    ]
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().count("\n") == 2  # one ends the live line, one the last


def test_long_waits_are_told_in_hours():
    stream = io.StringIO()
    Progress(10_000, stream).update(0, SHOWN, steps_per_s=1.0, examples_per_s=1.0)
    assert stream.getvalue().endswith("ETA 2:46:40\n")


def test_the_stopwatch_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 13.0, 14.0, 14.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()  # at 0
    watch.pause()  # at 2
    watch.resume()  # at 10
    assert watch.lap() == 5.0  # at 13: 2 + 3
    assert watch.lap() == 1.0  # at 14


def test_throughput_counts_the_steps_since_the_last_line(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(progress.Stopwatch, "lap", lambda self: 2.0)
    record = {"step": 10, "summary": {"test/top1": 0.5}}
    with Reporter(tmp_path, tiny_config(), 100, record, headline="top1") as reporter:
        reporter.trained(11, {"loss": 3.0, "top1": 0.0}, log=False)
        reporter.trained(14, {"loss": 2.0, "top1": 0.0}, log=True)
        assert reporter.summary == {"test/top1": 0.5, "train/loss": 2.0}
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 14 and line["examples_per_s"] == 4 * 48 / 2


def test_only_the_lead_process_writes(tmp_path, tiny_config, capsys):
    record = {"step": 0, "summary": {}}
    with Reporter(tmp_path, tiny_config(), 9, record, headline="top1", enabled=False) as other:
        other.trained(1, {"loss": 1.0, "top1": 0.0}, log=True)
        other.inspected(1, {"a": 1.0}, {"b": np.zeros((1, 2, 2, 3))})
        other.tested(1, {"loss": 1.0, "top1": 0.0})
        assert other.summary["test/loss"] == 1.0
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""
