"""The code of the pages is run: Python as it stands, and shell that is marked for it.

A block is marked by an HTML comment on the line before it:

- ``<!-- run -->``: shell that is run; a training is cut to three steps.
- ``<!-- save as NAME -->``: a file that the blocks after it use.
- ``<!-- not run: REASON -->``: Python that cannot run here.

All blocks of a page share one empty folder, and its Python one namespace, in their order.
"""

import functools
import re
import subprocess
import sys

import pytest
from command import LIMIT_S, ROOT, environment

import crate_jax
from crate_jax import create_model

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
# One registers a model in tables of this process, which must go again; one is checked by value.
OWN_TEST = {
    "docs/extend.md": "tests/test_extend.py",
    "docs/from_other_libraries.md": "tests/test_other_libraries.py",
}
# The program of these tests in place of whichever is called python; a training is three steps.
PRELUDE = f"""
python() {{
    case " $* " in
        *" train "*) set -- "$@" --config.total_steps=3 --config.optim.warmup_epochs=0 \\
            --config.log_objective_every_steps=0 --config.eval_every_steps=0 ;;
    esac
    {sys.executable} "$@"
}}
"""


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(text):
    """Of Python and shell in a page: (kind, mark, code); a block without a mark has the mark ''."""
    found = [(m["kind"], m["mark"] or "", m["code"]) for m in BLOCK.finditer(text)]
    return [block for block in found if block[0] in ("python", "bash")]


def is_run(kind, mark):
    return mark == "run" if kind == "bash" else not mark.startswith("not run: ")


def shell(code, folder):
    """Run shell as a reader does, who stops at the first command that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", PRELUDE + code],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


RUN = [
    pytest.param(path, id=name(path))
    for path in PAGES
    if name(path) not in OWN_TEST
    and any(is_run(kind, mark) for kind, mark, _ in blocks(path.read_text()))
]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN)
def test_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name(path) == "README.md":  # a model in full size; its depth is what takes time to compile
        monkeypatch.setattr(crate_jax, "create_model", functools.partial(create_model, depth=2))
    found = {"__name__": path.stem}
    for kind, mark, code in blocks(path.read_text()):
        if mark.startswith("save as "):
            (tmp_path / mark.removeprefix("save as ")).write_text(code)
        elif is_run(kind, mark):
            if kind == "bash":
                shell(code, tmp_path)
            else:
                exec(compile(code, name(path), "exec"), found)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_mark_is_one(path):
    text = path.read_text()
    marked = blocks(text)
    for kind, mark, _ in marked:
        known = {"bash": r"|run", "python": r"|save as [\w.]+|not run: .{10,}"}[kind]
        assert re.fullmatch(known, mark), mark
    # A mark that stands before no block, or too far from it, has no effect.
    marks = re.findall(r"^<!-- ((?:run|save as|not run)\b.*) -->$", text, re.M)
    assert marks == [mark for _, mark, _ in marked if mark]


def test_pages_with_a_test_of_their_own_have_one():
    for page, test in OWN_TEST.items():
        assert page in (ROOT / test).read_text()


def test_blocks_are_found_with_their_marks(tmp_path):
    text = "\n".join(
        [
            *("<!-- run -->", "```bash", "touch a", "```", "", "```python", "x = 1", "```"),
            *("<!-- not run: needs a TPU pod -->", "```python", "y = 1", "```"),
            *("```", "no code", "```", "```bash", "false", "```"),
        ]
    )
    found = blocks(text)
    assert [code for _, _, code in found] == ["touch a\n", "x = 1\n", "y = 1\n", "false\n"]
    assert [is_run(kind, mark) for kind, mark, _ in found] == [True, True, False, False]
    shell(found[0][2], tmp_path)
    assert (tmp_path / "a").exists()
    with pytest.raises(AssertionError, match=r"^false\n"):
        shell("false\ntrue\n", tmp_path)
