"""What the documents tell a reader to type: flags, commands and shell are parsed, and not run."""

import re
import shlex
import subprocess
import tomllib

import pytest
from absl import flags
from command import ROOT

from crate_jax.cli import main as cli
from crate_jax.cli.flags import config_flag, parse_config
from crate_jax.cli.recipes import DEFAULT
from crate_jax.config import TrainConfig, get_field, validate
from crate_jax.models.fields import FAMILIES, fields_of

DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CONTAINERS = sorted((ROOT / "docs" / "containers").glob("Dockerfile.*"))
ENDS = "();<>|&\n"  # of a command in shell
NAMES = {add.__name__.removeprefix("add_") for add in cli.COMMANDS}


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(text):
    """The shell in a document, but what tests/test_pages.py runs."""
    return re.findall(r"(?<!<!-- run -->\n)^```bash\n(.*?)^```", text, flags=re.M | re.S)


def command_lines(shell):
    """The arguments of each ``train.py …`` and ``-m crate_jax …``, in quotes or not."""
    shell = re.sub(r"(^|[ \t])#.*$", "", shell.replace("\\\n", " "), flags=re.M)
    lexer = shlex.shlex(shell, posix=True, punctuation_chars=ENDS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words, found = list(lexer), []
    for i, word in enumerate(words):
        if "train.py " in word or "-m crate_jax " in word:  # a command handed to another machine
            found += command_lines(word)
        elif word == "train.py" or (word == "crate_jax" and words[i - 1] == "-m"):
            rest = words[i + 1 :]
            end = next((n for n, w in enumerate(rest) if set(w) <= set(ENDS)), len(rest))
            found.append((word, [w for w in rest[:end] if w != "$@"]))
    return found


COMMANDS = [
    pytest.param(program, arguments, id=f"{name(path)}: {program} {' '.join(arguments)}"[:90])
    for path in DOCS
    for shell in blocks(path.read_text())
    for program, arguments in command_lines(shell)
]


def check(program, arguments, monkeypatch):
    """Parse a command as it would be, up to where it would begin to work."""
    if program == "crate_jax" and arguments[:1] == ["train"]:
        assert cli.parse(arguments).config_flags == arguments[1:]
        program, arguments = "train.py", arguments[1:]
    if program == "train.py":
        argv = ["train.py", *(a for a in arguments if a != "--help")]
        monkeypatch.chdir(ROOT)
        values = flags.FlagValues()
        config = config_flag(DEFAULT, argv, values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        assert values(argv) == ["train.py"]
        validate(config.value)
        return
    if arguments[-1:] == ["--help"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.parse(arguments)
        return
    args = cli.parse(arguments)
    assert args.function.__name__ == args.command
    if args.command == "plan":
        monkeypatch.chdir(ROOT)
        validate(parse_config(args.config, args.config_flags))


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_a_command_parses(program, arguments, monkeypatch):
    check(program, arguments, monkeypatch)


def test_commands_are_found_wherever_they_stand():
    shell = "\n".join(
        [
            "pip install -e . && python train.py",
            "python train.py --config=configs/digits.py \\",
            "    --config.optim.lr=1e-3   # a comment",
            'on 0 "docker run image -m crate_jax prepare --from a --to b" | sort',
            'srun python train.py --workdir=x "$@"',
        ]
    )
    assert command_lines(shell) == [
        ("train.py", []),
        ("train.py", ["--config=configs/digits.py", "--config.optim.lr=1e-3"]),
        ("crate_jax", ["prepare", "--from", "a", "--to", "b"]),
        ("train.py", ["--workdir=x"]),
    ]
    assert {name(path) for path in DOCS} >= {"README.md", "docs/tpu_pods.md"}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize(
    ("program", "arguments", "error"),
    [
        ("train.py", ["--config.data.workers=1"], KeyError),
        ("train.py", ["--config.data=1"], ValueError),
        ("train.py", ["--config=configs/imagenet1k.py:huge"], KeyError),
        ("train.py", ["--config.optim.optimizer=adam"], ValueError),
        ("train.py", ["--work=x"], flags.Error),
        ("crate_jax", ["train", "--config=imagenet1k:huge"], KeyError),
        ("crate_jax", ["checkpoint", "runs/x"], SystemExit),
        ("crate_jax", ["checkpoints", "--workdir=runs/x"], SystemExit),
    ],
)
def test_a_wrong_command_is_seen(program, arguments, error, monkeypatch):
    with pytest.raises(error):
        check(program, arguments, monkeypatch)


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_fields_commands_and_files_in_the_text_exist(path, monkeypatch):
    text = path.read_text()
    for field in re.findall(r"--config\.([a-z0-9_.]*[a-z0-9_])", text):
        section, _, own = field.partition(".")
        if section != "model" or not any(own in fields_of(family) for family in FAMILIES):
            get_field(TrainConfig(), field)
    folders = "benchmarks|configs|crate_jax|docs|tests"
    for file in re.findall(rf"\b(?:{folders})/[\w./]+\.(?:json|md|py)\b", text):
        assert (ROOT / file).is_file(), file
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    assert set(re.findall(r"-m crate_jax ([a-z]+)", text)) <= NAMES


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_shell_is_shell(path):
    for shell in blocks(path.read_text()):
        done = subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True)
        assert done.returncode == 0, shell + done.stderr


@pytest.mark.parametrize("path", CONTAINERS, ids=name)
def test_a_container_file_names_what_exists(path):
    text = path.read_text()
    for line in re.findall(r"^COPY (.*)", text, flags=re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"-e '\.\[([a-z0-9,]+)\]'", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert name(path) in text
    # What the build of the package reads must be in the image.
    assert {project["readme"], *project["license-files"], "setup.py"} <= set(text.split())


def test_the_first_page_says_what_each_extra_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = re.findall(r"^\| (`.*`) \| .+ \|$", (ROOT / "docs/start.md").read_text(), re.M)
    named = {extra for cell in table for extra in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert set(project["optional-dependencies"]) <= named
