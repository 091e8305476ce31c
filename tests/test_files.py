"""Files written whole or not at all."""

import pytest

from crate_jax.files import written_aside


def test_the_new_takes_the_place_of_the_old_at_the_end(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert aside.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_a_failure_leaves_the_old_and_nothing_else(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), written_aside(path) as aside:
        aside.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_a_folder_in_its_place(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="must be a file; it is a folder"),
        written_aside(tmp_path),
    ):
        raise AssertionError("nothing to write to")


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="must lie in an existing folder; there is no"),
        written_aside(tmp_path / "no" / "weights.npz"),
    ):
        raise AssertionError("nothing to write to")
