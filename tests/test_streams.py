"""A stream whose reader has gone costs nobody anything."""

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from command import LIMIT_S, ROOT, TINY, environment

from crate_jax.checkpoint.reading import inspect
from crate_jax.cli.main import main
from crate_jax.cli.running import run_command
from crate_jax.streams import Tolerant, failure, tolerant
from crate_jax.training.progress import Progress
from crate_jax.training.workdir import StopSignal


class Failing(io.StringIO):
    """A stream that takes so many texts, and then fails by an error."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left, self.tried = error, after, 0

    def write(self, text):
        self.tried += 1
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


GONE = [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"), ValueError("closed file")]


@pytest.mark.parametrize("error", GONE, ids=repr)
def test_nothing_more_is_tried_once_nobody_reads(error):
    stream = Failing(error, after=1)
    progress = Progress(9, stream)
    for _ in range(4):
        progress.update(1, {"loss": 0.5}, 1.0, 48.0)
    assert stream.getvalue().count("\n") == 1 and stream.tried == 2


def test_a_full_disk_may_have_room_again():
    stream = Failing(OSError(errno.ENOSPC, "No space left on device"))
    kept = tolerant(stream)
    assert kept.write("lost\n") == 5
    assert "No space left" in str(failure(kept))
    stream.left = 1
    kept.write("kept\n")
    assert stream.getvalue() == "kept\n"


def test_what_a_terminal_cannot_show_is_spelled_out():
    raw = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("CRATE-α\n")
    stream.flush()
    assert raw.getvalue() == b"CRATE-\\u03b1\n"


def test_no_stream_at_all():
    stream = tolerant(None)
    assert (stream.write("x"), stream.isatty()) == (1, False)
    assert tolerant(stream) is stream


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_the_status_says_what_the_command_did(number, monkeypatch, capsys):
    """A reader who leaves has what he wanted; who keeps the result in a file has lost it."""
    for kept in (True, False):
        monkeypatch.setattr(sys, "stdout", Failing(OSError(number, "the reason")))
        status = run_command(lambda: {"step": 1}, kept=kept)
        lost = number == errno.ENOSPC and not kept
        assert status == (2 if lost else 0)
        err = capsys.readouterr().err
        assert err.startswith("error: stdout must take the result; it did not (") == lost
        assert lost or not err
    monkeypatch.setattr(sys, "stdout", Failing(OSError(number, "the reason")))
    assert run_command(lambda: {"intact": False}, kept=True) == 1


def test_a_line_that_cannot_be_written_is_still_a_mistakes_status(monkeypatch):
    for error in GONE:
        monkeypatch.setattr(sys, "stderr", Failing(error))
        assert main(["summary", "crate_tyni_patch16_224"]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["summary", "crate_tyni_patch16_224"]) == 2


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_asks_a_run_to_stop(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.at(1) == (None if nohup else "SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


SUMMARY = f"{sys.executable} -m crate_jax summary crate_tiny_patch16_224"


def shell(line, **options):
    """A line of bash: status of its first command, and what came out on either stream."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (f"{SUMMARY} | head -c 0", 0),
        (f"{SUMMARY} >&- 2>&- <&-", 0),
        (f"{SUMMARY} >/dev/full 2>/dev/full", 2),
    ],
)
def test_commands_end_quietly(line, status):
    assert shell(line) == (status, "", "")


def test_a_run_whose_log_nobody_reads_is_saved(tmp_path):
    """Everything but the first line is written to a pipe that is closed."""
    flags = " ".join(f"'{flag}'" for flag in [*TINY, "--config.total_steps=3"])
    line = f"{sys.executable} train.py --workdir={tmp_path} {flags} 2>&1 | head -1"
    status, out, err = shell(line)
    assert (status, err) == (0, "") and out.startswith("step 1/3  loss ")
    (saved,) = inspect(tmp_path)
    assert saved["step"] == 3 and saved["intact"]
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """XLA and others write to descriptor 2, whatever it is."""
    program = (
        "import os\nfrom crate_jax.streams import secure_streams\nsecure_streams()\n"
        f"file = open({str(tmp_path / 'metrics')!r}, 'w')\n"
        "os.write(2, b'a library speaks')\nos.write(1, b'so does another')\n"
        "file.write('42')\n"
    )
    assert shell(f'{sys.executable} -c "{program}" >&- 2>&-')[0] == 0
    assert (tmp_path / "metrics").read_text() == "42"
    assert os.path.exists("/dev/null")
