"""`doctor`: what it says of an installation, and what of one that lacks something."""

import json
import tomllib
from importlib import metadata

import pytest
from command import ROOT

from crate_jax.cli import doctor, extras, main

SAID = ["Versions", "Devices", "Caches", "Extras: pip install 'crate-jax[NAME]' adds one"]


def test_every_extra_of_a_user_has_a_use():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.USES) == set(project["optional-dependencies"]) - {"test", "dev", "docs"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with extras: of what is here, of what is not, and of each other."""
    folder = tmp_path / "some_thing-1.0.dist-info"
    folder.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        "Name: some-thing",
        "Version: 1.0",
        "Requires-Dist: not-here-at-all>=3",
        "Requires-Dist: numpy>=1; extra == 'here'",
        "Requires-Dist: numpy>=9999; extra == 'old'",
        "Requires-Dist: nowhere-to-be-found>=2; extra == 'gone'",
        "Requires-Dist: without-a-version; extra == 'gone'",
        "Requires-Dist: some-thing[gone,all]; extra == 'all'",
        "Requires-Dist: numpy; extra == 'else' and python_version < '3'",
        "Requires-Dist: )what; extra == 'all'",
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "some-thing"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("here", []),
        ("old", ["numpy>=9999"]),
        ("gone", ["nowhere-to-be-found>=2", "without-a-version"]),
        ("all", ["nowhere-to-be-found>=2", "without-a-version"]),
        ("else", []),
    ],
)
def test_missing_packages_of_an_extra(package, extra, expected):
    assert extras.missing(extra, package) == expected


def test_nothing_is_known_of_a_package_that_is_not_installed():
    assert extras.missing("any", "nowhere-to-be-found") == []
    assert extras.version("nowhere-to-be-found") is None


def test_an_extra_that_is_absent_is_named_with_its_commands(monkeypatch, capsys):
    def version(name, really=metadata.version):
        if name.lower() == "jinja2":
            raise metadata.PackageNotFoundError(name)
        return really(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main.main(["doctor", "--no-training"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [requirement.split(">")[0] for requirement in found["missing"]["report"]] == ["jinja2"]
    assert "  report         missing    report, figure, compare --html" in lines
    assert "  segment        installed  segment --annotations" in lines
    assert found["versions"]["jax"] == metadata.version("jax")
    assert found["devices"][0] | {"memory_gib": None} == {
        **{"kind": "cpu", "platform": "cpu", "count": 8, "memory_gib": None}
    }
    assert [line for line in lines if line and line[0] != " "] == SAID
    assert max(map(len, lines)) < 80


def test_it_trains(capsys):
    assert main.main(["doctor"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["works"] is True and found["training_s"] > 0


def test_training_that_fails_is_told_and_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_STEPS", -1)
    assert main.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["works"] is False and found["error"].startswith("total_steps must be ")
    assert any(line.startswith("  a tiny CRATE  fails: total_steps must") for line in lines)


def test_what_lies_in_a_cache(tmp_path):
    assert doctor._size(tmp_path / "none") == "empty"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(bytes(3 * 2**20))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert doctor._size(tmp_path) == "3 MiB"


def test_a_cache_that_takes_too_long_to_count(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(doctor, "_COUNTING_S", -1.0)
    assert doctor._size(tmp_path) == "more than 0 MiB"


def test_the_cache_of_the_hub(tmp_path, monkeypatch, capsys):
    """Each file once: a snapshot holds links to it."""
    repository = tmp_path / "models--me--mine"
    for name in ("blobs", "snapshots/1"):
        (repository / name).mkdir(parents=True)
    (repository / "blobs/1").write_bytes(bytes(5 * 2**20))
    (repository / "snapshots/1/model.safetensors").symlink_to(repository / "blobs/1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor._caches()["weights of hf://"] == f"{tmp_path}, 5 MiB"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/far" + "/away" * 30)
    assert main.main(["doctor", "--no-training"]) == 0
    lines = capsys.readouterr().out.splitlines()[:-1]
    first = next(line for line in lines if line.startswith("  weights of hf://"))
    assert first.split()[-1].startswith("/far/away") and max(map(len, lines)) < 80
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert "weights of hf://" not in doctor._caches()
