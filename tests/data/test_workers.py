"""The number of worker processes beside that of cores."""

import os

import pytest

from crate_jax.data import workers


@pytest.mark.parametrize(("number", "cores", "said"), [(5, 2, "2 cores"), (3, 1, "1 core:")])
def test_many_more_workers_than_cores_are_told_once(number, cores, said, monkeypatch, caplog):
    workers.warn_of_many.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    for _ in range(2):
        workers.make_ready(number, 0)
    (message,) = caplog.messages
    assert message.startswith(f"data.num_workers is {number}, and this machine has {said}")
    assert message.endswith(f"Set --config.data.num_workers={cores}.")


def test_twice_the_cores_are_not_told(monkeypatch, caplog):
    workers.warn_of_many.cache_clear()
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    workers.make_ready(4, 0)
    assert caplog.messages == []
