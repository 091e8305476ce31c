"""Metrics of a run in a bucket: they grow here and are stored whole."""

import json
import time

import fsspec
import pytest

from crate_jax.files import located
from crate_jax.training import mirror
from crate_jax.training.mirror import Mirror
from crate_jax.training.writer import MetricsWriter


def names(bucket):
    fs = fsspec.filesystem(bucket.partition("://")[0], use_listings_cache=False)
    return sorted(path.rpartition("/")[2] for path in fs.find(bucket))


def test_what_was_written_is_there_when_it_is_waited_for_and_at_the_end(bucket):
    workdir = located(bucket, "workdir")
    writer = MetricsWriter(workdir)
    writer.write(1, {"loss": 2.0})
    assert names(bucket) == []
    writer.flush()
    first, metrics = names(bucket)
    assert first.startswith("events.out.tfevents.") and metrics == "metrics.jsonl"
    writer.write(2, {"loss": 1.0})
    (writer.folder / "trace").mkdir()
    (writer.folder / "trace" / "x.pb").write_bytes(b"x")
    writer.close()
    assert not writer.folder.exists()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "loss": 3.0 - step} for step in (1, 2)
    ]
    assert (workdir / "trace" / "x.pb").read_bytes() == b"x"
    resumed = MetricsWriter(workdir, start_step=1)
    resumed.close()
    assert (workdir / "metrics.jsonl").read_text().splitlines() == lines[:1]
    assert len(names(bucket)) == 4  # a second file of events


def test_from_time_to_time_it_is_stored_while_the_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.0)
    monkeypatch.setattr(mirror, "TIMES", 0)
    workdir = located(bucket, "workdir")
    mirrored = Mirror(workdir)
    (mirrored.folder / "a").write_text("1")
    mirrored.changed()
    deadline = time.monotonic() + 60
    while not (workdir / "a").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(mirror, "EVERY_S", 1000.0)
    mirrored.flush()
    (mirrored.folder / "a").write_text("12")
    mirrored.changed()  # not due
    assert (workdir / "a").read_text() == "1"
    mirrored.close()
    assert (workdir / "a").read_text() == "12"


def test_a_bucket_that_refuses_is_told_when_it_is_waited_for(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.0)
    mirrored = Mirror(located(bucket.replace("bucket", "no-such-bucket"), "workdir"))
    (mirrored.folder / "a").write_text("1")
    mirrored.changed()
    with pytest.raises(OSError):
        mirrored.flush()
    with pytest.raises(OSError):
        mirrored.close()
    assert not mirrored.folder.exists()


def test_a_local_run_has_its_files_where_they_are(tmp_path):
    mirrored = Mirror(tmp_path)
    (tmp_path / "a").write_text("1")
    mirrored.fetch("a")
    mirrored.changed()
    mirrored.flush()
    mirrored.close()
    assert mirrored.folder == tmp_path and [p.name for p in tmp_path.iterdir()] == ["a"]
