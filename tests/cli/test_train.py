"""Recipes by name, the flags of `train`, and what of it is in an installed package."""

import importlib
import tomllib

import pytest
import setuptools  # noqa: F401, it brings distutils along
from absl import flags
from command import ROOT

import crate_jax
from crate_jax import __main__ as entry
from crate_jax.cli import main as cli
from crate_jax.cli import recipes as recipes_module
from crate_jax.cli.flags import config_flag, parse_config
from crate_jax.cli.recipes import DEFAULT, load_recipe, recipes
from crate_jax.cli.train import train
from crate_jax.version import VERSION

NAMES = ["alpha_imagenet1k", "alpha_imagenet21k", "cbsa_imagenet1k", "digits", "finetune"]
NAMES += ["imagenet1k", "mae_imagenet1k", "openwebtext", "simdino_imagenet1k", "text"]
NAMES += ["tost_imagenet1k"]
MINE = "from crate_jax.config import TrainConfig\n"
MINE += "def get_config(arg='none'):\n    return TrainConfig(name=f'mine_{arg}')\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A current directory without the repository, with a recipe of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("my", "home"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.py").write_text(MINE)
    return tmp_path


def test_recipes_by_name_and_by_file(elsewhere):
    assert DEFAULT == "digits" and list(recipes()) == NAMES
    for recipe, name in {
        "digits": "digits",
        "imagenet1k": "imagenet1k_small_paper",
        "imagenet1k:tiny-readme": "imagenet1k_tiny_readme",
        f"{ROOT}/configs/imagenet1k.py:base": "imagenet1k_base_paper",
        "my/recipe.py": "mine_none",
        "my/recipe.py:a": "mine_a",
        "~/recipe.py:b": "mine_b",
    }.items():
        assert load_recipe(recipe).name == name
        assert parse_config(recipe, ["--config.seed=3"]).seed == 3  # as `plan` takes it
        values = flags.FlagValues()
        holder = config_flag(DEFAULT, argv := ["train", f"--config={recipe}"], values)
        assert values(argv) == ["train"] and holder.value.name == name


@pytest.mark.parametrize(
    ("recipe", "start"),
    [
        ("digit", "a known recipe; got digit. Did you mean digits? Known by name: "),
        ("imagenet:small", "a known recipe; got imagenet. Did you mean imagenet1k? "),
        ("qqq", "a known recipe; got qqq. Known by name: "),
        ("my/recipes.py", "a file that exists; got my/recipes.py. Did you mean my/recipe.py? "),
        ("digits.py", "a file that exists; got digits.py. Did you mean digits? "),
        ("configs/zzz.py", "a file that exists; got configs/zzz.py. Known by name: "),
    ],
)
def test_an_unknown_recipe_suggests_the_nearest_and_lists_all(elsewhere, recipe, start):
    with pytest.raises(FileNotFoundError) as caught:
        load_recipe(recipe)
    message = str(caught.value)
    assert message.startswith(f"--config must be {start}")
    assert message.endswith(f"{', '.join(NAMES)}.")


def test_an_installed_package_has_the_recipes(monkeypatch, tmp_path):
    """They lie inside of it, whatever is beside it."""
    monkeypatch.chdir(ROOT)
    setup = importlib.import_module("distutils.core").run_setup("setup.py", stop_after="init")
    modules = setup.get_command_obj("build_py")
    modules.ensure_finalized()
    found = {(package, name): file for package, name, file in modules.find_all_modules()}
    assert {name for package, name in found if package == "crate_jax.configs"} == set(NAMES)
    assert found["crate_jax.configs", "digits"] == "configs/digits.py"
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "crate_jax").rglob("*.py")}
    assert sources <= set(found.values())
    assert {package.split(".")[0] for package, _ in found} == {"crate_jax"}

    # And that is where they are looked for, before what is beside it in a clone.
    assert recipes_module._FOLDERS == [ROOT / "crate_jax" / "configs", ROOT / "configs"]
    for folder in ("package", "beside"):
        (tmp_path / folder / "configs").mkdir(parents=True)
        (tmp_path / folder / "configs" / f"of_{folder}.py").write_text(MINE)
    folders = [tmp_path / "package" / "configs", tmp_path / "beside" / "configs"]
    monkeypatch.setattr(recipes_module, "_FOLDERS", folders)
    assert list(recipes()) == ["of_package"]


def test_the_command_leaves_its_flags_to_absl(capsys):
    assert cli.COMMANDS[0].__name__ == "add_train"  # --help lists it first
    arguments = [
        "--workdir",
        "a b",
        "-v",
        "1",
        "--noconfig.data.download",
        "--flagfile=f",
        "--help",
    ]
    args = cli.parse(["train", *arguments])
    assert (args.function, args.config_flags) == (train, arguments)
    with pytest.raises(SystemExit):
        cli.parse(["summary", "x", "--workdir=y"])
    assert "summary must get flags that it has; got --workdir." in capsys.readouterr().err


def test_the_version_stands_in_one_place():
    assert crate_jax.__version__ == VERSION
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    stated = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    module, _, name = stated.rpartition(".")
    assert getattr(importlib.import_module(module), name) == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    script = project["project"]["scripts"]["crate_jax"]
    module, _, name = script.partition(":")
    assert getattr(importlib.import_module(module), name) is entry.main
