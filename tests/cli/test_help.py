"""The help of every command, both spellings of its flags, and `config`."""

import json
import re
import shlex

import pytest

from crate_jax.cli import main as cli
from crate_jax.cli.fields import RUN, listed
from crate_jax.cli.flags import joined, parse_config
from crate_jax.cli.train import usage
from crate_jax.config import get_field, options

COLUMNS, LINES = 80, 40
PARSER, SUBPARSERS = cli._parsers()
NAMES = list(SUBPARSERS.choices)
HELP = {"": PARSER.format_help(), "train": usage()} | {
    name: parser.format_help() for name, parser in SUBPARSERS.choices.items() if name != "train"
}


def examples(text):
    """The commands at the end of a help, as words after the program's name."""
    said = re.search(r"^Examples?:\n(.*)\Z", text, flags=re.M | re.S)
    assert said, text
    lines = said[1].replace(" \\\n", " ").splitlines()
    for line in lines:
        assert line.startswith("  python -m crate_jax "), line
    return [shlex.split(line)[3:] for line in lines]


def test_every_command_has_a_help():
    assert set(HELP) == {"", *NAMES} and len(NAMES) == len(cli.COMMANDS)


@pytest.mark.parametrize("name", HELP)
def test_help_is_one_screen(name):
    lines = HELP[name].splitlines()
    assert max(map(len, lines)) <= COLUMNS and 8 <= len(lines) <= LINES
    assert lines[0].startswith(f"usage: python -m crate_jax {name}".rstrip())
    # What it does, and of each flag what it is for.
    assert re.match(r"[A-Z]", lines[2])
    for line in lines:
        assert not re.fullmatch(r"  --\S+", line), line


@pytest.mark.parametrize("name", HELP)
def test_the_examples_of_a_help_parse(name):
    found = examples(HELP[name])
    assert 1 <= len(found) <= 3
    for words in found:
        assert words[0] == name or name in ("", "train")
        args = cli.parse(words)
        fields = args.config_flags
        if args.command == "train":
            fields = [w for w in fields if not w.startswith("--workdir")]
            recipe = fields.pop(0).removeprefix("--config=")
        else:
            recipe = args.config if args.command == "plan" else "digits"
        parse_config(recipe, fields)


def test_the_overview_names_every_command_once():
    starts = re.findall(r"^  ([a-z]+) {2,}\S", HELP[""], flags=re.M)
    assert starts == NAMES
    for heading in cli.GROUPS:
        assert f"\n{heading}\n  " in HELP[""]


def test_a_switch_takes_no_word():
    assert re.search(r"^  --version {2,}", HELP[""], flags=re.M)
    assert re.search(r"^  --detail {2,}", HELP["evaluate"], flags=re.M)
    assert re.search(r"^  --data_dir=PATH {2,}", HELP["evaluate"], flags=re.M)


def test_the_help_of_a_script_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/crate_jax", "doctor"])
    text = cli._parsers()[1].choices["doctor"].format_help()
    assert "usage: crate_jax doctor [flags]" in text and "\n  crate_jax doctor\n" in text


def test_a_flag_is_spelt_either_way():
    for one, other in (
        (["--data_dir=a", "--model-kwargs", "x=1"], ["--data-dir", "a", "--model_kwargs=x=1"]),
        (["--batch_size", "8"], ["--batch-size=8"]),
    ):
        first, second = (vars(cli.parse(["evaluate", *words])) for words in (one, other))
        assert first == second
    assert cli.parse(["evaluate", "--data-dir=a"]).data_dir == "a"
    assert cli.parse(["evaluate", "--model_kwargs", "x=1", "y=2"]).model_kwargs == ["x=1", "y=2"]


def test_fields_of_a_recipe_are_one_word():
    words = ["--config.optim.lr", "-1", "a", "--config.data.data-dir=x-y", "--config.seed", "--b"]
    assert joined(words) == [
        *("--config.optim.lr=-1", "a", "--config.data.data_dir=x-y", "--config.seed", "--b")
    ]
    # These take no word of their own.
    for switch in ("--config.data.download", "--noconfig.data.download"):
        assert joined([switch, "digits"]) == [switch, "digits"]
    assert joined(["--config.nothing.here", "1"]) == ["--config.nothing.here=1"]
    args = cli.parse(["config", "--config.optim.lr", "3", "digits", "--json"])
    assert (args.recipe, args.config_flags) == ("digits", ["--config.optim.lr=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--wrkdir=x"], "got --wrkdir. Did you mean --workdir? See python -m "),
        (["report", "--step=1", "--imges", "x"], "got --imges. Did you mean --images?"),
        (["summary", "x", "--qqqqqq"], "it has; got --qqqqqq. See python -m crate_jax summary -"),
        (["segment", "--method=maskcutt"], "'maskcutt'. Did you mean maskcut? See"),
        (["evalute"], "the command must be one that there is; got evalute. Did you mean evaluate?"),
        (["evaluate", "--config.seed=1"], "evaluate must get flags that it has; got --config.seed"),
        (["--vresion"], "got --vresion. Did you mean --version?"),
        (["evaluate", "--work=x"], "got --work. Did you mean --workdir?"),
    ],
)
def test_a_mistake_suggests_the_nearest_name(words, message, call):
    status, found, err = call(*words)
    assert (status, found) == (2, None)
    assert message in err and err.count("\n") == 1


def test_words_after_two_dashes_are_no_flags():
    assert cli.parse(["checkpoints", "--", "--run"]).run == "--run"


def test_config_lists_every_field(capsys):
    assert cli.main(["config", "digits", "--config.optim.lr=5"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("    ")]
    assert max(map(len, told)) <= COLUMNS
    config = parse_config("digits", ["--config.optim.lr=5"])
    paths = [path for path, _, _ in options(config)]
    given = [shlex.split(line)[0] for line in lines if line not in told]
    assert [flag.partition("=")[0] for flag in given] == [f"--config.{path}" for path in paths]
    assert "--config.total_steps (unset)" in lines
    i = lines.index("--config.optim.lr=5.0")
    assert lines[i + 1] == "    peak learning rate; a number > 0"
    assert parse_config("digits", [flag for flag in given if flag.partition("=")[2]]) == config
    assert json.loads(last) == {"recipe": "digits", "name": "digits", "fields": len(paths)}


def test_config_lists_a_section():
    config = parse_config("digits", [])
    assert len(listed(config)) == sum(
        len(listed(config, section)) for section in (RUN, *sections_of(config))
    )
    assert all(text.startswith("--config.optim.") for text in listed(config, "optim"))
    assert listed(config, RUN)[0].startswith("--config.name=digits\n")


def sections_of(config):
    return {path.partition(".")[0] for path, _, _ in options(config) if "." in path}


def test_config_as_json(call):
    status, found, _ = call("config", "--config=imagenet1k:tiny", "--config.seed=9", "--json")
    config = parse_config("imagenet1k:tiny", [])
    assert status == 0 and found["seed"] == 9
    assert found["optim"]["lr"] == get_field(config, "optim.lr")
    assert found["model"]["name"] == config.model.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--config=text"], "config must get one recipe; got two. Leave --config out."),
        (["--json", "--section=optim"], "--json must go without --section"),
        (["--section=optm"], "--section must be a section; got optm. Did you mean optim?"),
        (["digit"], "got digit. Did you mean digits?"),
        (["--config.optim.lr=-1"], "optim.lr must be > 0; got -1.0"),
        (["--config.optim.lrr=1"], "optim.lrr must name a field. Did you mean lr?"),
    ],
)
def test_a_mistake_about_a_config_is_one_line(words, message, call):
    status, found, err = call("config", *words)
    assert (status, found) == (2, None)
    assert message in err and err.count("\n") == 1
