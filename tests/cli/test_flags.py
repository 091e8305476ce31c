"""The flags of a recipe: types, the model's name before its fields, one line for each mistake."""

import pytest
from absl import flags
from command import ROOT

from crate_jax.cli.flags import config_flag, define_config_flag, parse_config, parse_flags
from crate_jax.config import ModelConfig, options, overrides, validate
from crate_jax.models.zoo import build_model
from crate_jax.options import is_of

DIGITS = str(ROOT / "configs" / "digits.py")
IMAGENET = str(ROOT / "configs" / "imagenet1k.py")


def parsed(*arguments, default=DIGITS):
    """The config of a command line, as train.py takes it."""
    argv, values = ["train.py", *arguments], flags.FlagValues()
    holder = config_flag(default, argv, values)
    assert values(argv) == ["train.py"]
    return holder.value


def test_without_flags_it_is_the_recipe():
    config = parsed()
    assert config.name == "digits" and config.model.width == 96
    assert parsed("--config", IMAGENET).name == "imagenet1k_small_paper"
    assert parsed(f"--config={IMAGENET}:tiny-readme").batch_size == 512


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--config.model.depth=6", "model.depth", 6),
        ("--config.model.image_size=32,48", "model.image_size", (32, 48)),
        ("--config.model.patch_size=4", "model.patch_size", (4,)),
        ("--config.model.head_dim=5", "model.head_dim", 5),
        ("--config.model.eta=1e-2", "model.eta", 0.01),
        ("--config.model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("--config.model.attention=mhsa", "model.attention", "mhsa"),
        ("--config.optim.no_decay=bias,scale", "optim.no_decay", ("bias,scale",)),
        ("--config.data.download", "data.download", True),
        ("--noconfig.data.download", "data.download", False),
        ("--config.total_steps=7", "total_steps", 7),
        ("--config.task=classify", "task", "classify"),
    ],
)
def test_a_flag_has_the_type_of_its_field(flag, path, value):
    config = parsed(flag)
    (found,) = (getattr(s, field.name) for p, s, field in options(config) if p == path)
    assert found == value and type(found) is type(value)


def test_every_field_has_a_flag():
    for path, section, field in options(parsed()):
        value = getattr(section, field.name)
        if value is None or value == ():
            examples = (1, 0.5, "x", True, (1,), ("x",))
            value = next(example for example in examples if is_of(example, field.type))
        word = ",".join(map(str, value)) if isinstance(value, tuple) else value
        config = parsed(f"--config.{path}={word}")
        (found,) = (getattr(s, f.name) for p, s, f in options(config) if p == path)
        assert found == value, path


def test_the_name_of_the_model_comes_first(other_family):
    for order in (1, -1):
        arguments = ["--config.model.ratio=2", "--config.model.name=other_tiny"][::order]
        model = parsed(*arguments).model
        assert isinstance(model, type(ModelConfig(name="other_tiny")))
        # What the recipe says, where the family has the field.
        assert (model.name, model.ratio, model.width, model.pool) == ("other_tiny", 2, 96, "mean")
    assert parsed("--config.model.name", "other_tiny").model.name == "other_tiny"
    name = "crate_base_patch16_224"
    recipe = overrides(parsed().model)
    assert overrides(parsed(f"--config.model.name={name}").model) == recipe


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "crate_alpha_tiny_patch16_224"])
def test_a_recipe_gives_way_where_a_model_does_not_take_its_values(name):
    """The mean over the tokens, which digits.py asks for, is no pool of these."""
    for order in (1, -1):
        arguments = [f"--config.model.name={name}", "--config.model.depth=2"]
        config = validate(parsed(*arguments[::order]))
        model = build_model(config.model)
        assert (config.model.name, model.pool, model.depth, model.width) == (name, "cls", 2, 96)
        arguments[1] = "--config.model.pool=mean"  # a flag does not
        with pytest.raises(ValueError, match=r"^model\.pool must be one of .*; got mean\."):
            validate(parsed(*arguments[::order]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--config.model.eta=2", "--config.model.name=other_tiny"],
            KeyError,
            "model.eta must name a field of other_tiny. Known: backward, depth, ",
        ),
        (["--config.model.ratio=2"], KeyError, "model.ratio must name a field of crate_tiny_patch"),
        (["--config.model.widht=2"], KeyError, "Did you mean width?"),
        (["--config.model.name=other_tny"], KeyError, "got other_tny. Did you mean other_tiny?"),
        (["--config.optim.lrr=1"], KeyError, "optim.lrr must name a field. Did you mean lr?"),
        (["--noconfig.data.downlod"], KeyError, "Did you mean download?"),
        (["--config.optim=1"], ValueError, "config.optim must be a field, not a section. Set "),
        (["--config=no.py"], FileNotFoundError, "--config must be a file that exists; got no.py."),
        ([f"--config={ROOT}/README.md"], ValueError, "README.md is none ("),
        ([f"--config={ROOT}/train.py"], ValueError, "--config must be a recipe; "),
        ([f"--config={IMAGENET}:larg"], KeyError, "got larg. Did you mean large?"),
    ],
)
def test_a_mistake_is_named_before_the_flags_are_parsed(arguments, error, message, other_family):
    with pytest.raises(error) as caught:
        config_flag(DIGITS, ["train.py", *arguments], flags.FlagValues())
    assert message in str(caught.value)


def test_a_value_of_another_type_is_a_mistake():
    for flag, line in {
        "--config.seed=x": r"^seed must be a whole number.*; got x\. Correct it\.$",
        "--config.optim.lr=1:2=3": r"^optim\.lr must be a number > 0; got 1:2=3\. Correct it\.$",
        "--config.model.depth=two": r"^model\.depth must be a whole number >= 1; got two\.",
    }.items():
        with pytest.raises(ValueError, match=line):
            parse_config(DIGITS, [flag])
    with pytest.raises(ValueError, match=r"Missing value for flag --config\.seed"):
        parse_config(DIGITS, ["--config.seed"])
    assert parse_config(f"{IMAGENET}:tiny", ["--config.model.depth=2"]).model.depth == 2


def test_a_recipe_that_sets_a_wrong_field_is_a_mistake(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from crate_jax.config import ModelConfig, TrainConfig\n"
        "def get_config():\n    return TrainConfig(model=ModelConfig(overcomplete=4))\n"
    )
    with pytest.raises(KeyError, match=r"model\.overcomplete must name a field of crate_small"):
        parsed(f"--config={recipe}")


def test_a_mistake_ends_the_process_with_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        define_config_flag(DIGITS, ["train.py", "--config.model.widht=3"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: model.widht must name a field of ")
    assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        parse_flags(["train.py", "x"])
    assert "the command line must hold flags alone; got x" in capsys.readouterr().err


def test_a_bug_keeps_its_trace(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config():\n    return {}['x']\n")
    with pytest.raises(KeyError, match="x"):
        define_config_flag(DIGITS, ["train.py", f"--config={recipe}"])


def test_the_help_names_the_recipe_and_not_all_of_it():
    values = flags.FlagValues()
    config_flag(DIGITS, ["train.py"], values)
    assert values["config"].default_as_str == repr(DIGITS)
