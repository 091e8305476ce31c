"""What is told in one line and what keeps its trace, by where and how an error was raised."""

import errno
import pickle
import runpy

import jax
import pytest

from crate_jax.errors import first_line, is_mistake, judged, of_the_system


def caught(source, package="crate_jax.somewhere", wrap=None):
    """The error of a function ``f`` in a module of this package, or of another."""
    names = {"__name__": package}
    exec(compile(source, f"{package}.py", "exec"), names)
    try:
        (wrap or (lambda f: f))(names["f"])()
    except Exception as error:
        return error
    raise AssertionError("it must fail")


FOR_USERS = [
    "raise ValueError('optim.lr must be > 0; got -1. Raise it.')",
    "raise KeyError('got larg. Did you mean large?')",
    "raise FileNotFoundError('workdir must hold a checkpoint')",
    "raise FloatingPointError('train/loss must be finite')",
    "raise OSError('the disk must take checkpoints')",
    "raise ValueError('of a library\\'s error') from ZeroDivisionError()",
    "try:\n  int('x')\n except ValueError as e:\n  raise KeyError('--seed must be 1') from e",
    "with open('/dev/null'):\n  raise ValueError(\n   'in a block, in'\n   ' several lines')",
]
BUGS = [
    "{4: 0}[8]",
    "int('x')",
    "a, b = 1, 2, 3",
    "[].remove(1)",
    "raise ValueError({}['a name'])",
    "raise TypeError('not for users')",
    "raise RuntimeError('not for users')",
    "import numpy; numpy.zeros(3) + numpy.zeros(4)",
    "import numpy\n with numpy.errstate(all='raise'): numpy.float32(1) / numpy.float32(0)",
    "try:\n  int('x')\n except ValueError:\n  raise",
    "with open('/dev/null'):\n  int('x')",
    "import json; json.loads('{')",
    "import io; raise io.UnsupportedOperation.__base__[0]",
]


def body(lines):
    return "def f():\n " + lines


@pytest.mark.parametrize("lines", FOR_USERS)
def test_what_the_package_raises_is_for_users(lines):
    assert is_mistake(caught(body(lines)))
    assert not is_mistake(caught(body(lines), package="recipe"))


@pytest.mark.parametrize("lines", BUGS)
def test_what_fails_in_its_lines_is_a_bug(lines):
    assert not is_mistake(caught(body(lines)))


@pytest.mark.parametrize("lines", [FOR_USERS[0], FOR_USERS[-1], BUGS[0], BUGS[-3]])
def test_traces_that_jax_has_shortened_are_judged_alike(lines):
    def traced(f):
        return lambda: jax.jit(lambda x: f())(0.0)

    assert is_mistake(caught(body(lines), wrap=traced)) == (lines in FOR_USERS)


def of_system(number, path=None):
    return OSError(number, "words", path)


@pytest.mark.parametrize(
    ("error", "system"),
    [
        (of_system(errno.ENOENT, "/no/file"), True),
        (of_system(errno.ENOSPC), True),
        (of_system(errno.EMFILE), True),
        (of_system(errno.ESTALE), True),
        (of_system(errno.EINVAL, "/a/mount"), True),
        (of_system(errno.EINVAL), False),
        (of_system(errno.EBADF), False),
        (of_system(errno.EPIPE), False),
        (of_system(errno.ESRCH), False),
        (OSError("a library's words"), False),
        (ValueError("x"), False),
    ],
)
def test_what_the_system_says(error, system):
    assert of_the_system(error) == is_mistake(error) == system


def test_a_librarys_error_about_the_network_is_the_systems():
    lines = (
        "try:\n  raise ConnectionRefusedError(111, 'refused')\n"
        " except OSError:\n  raise OSError('HTTPSConnectionPool: max retries exceeded')"
    )
    assert is_mistake(caught(body(lines), package="requests.adapters"))


def test_errors_of_a_recipes_own_lines_are_not(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def f():\n    return open('/no/such/file')\n")
    f = runpy.run_path(str(recipe))["f"]
    with pytest.raises(FileNotFoundError) as found:
        f()
    assert not is_mistake(found.value)


def test_a_judgement_survives_the_way_to_another_process():
    for lines, mistake in ((FOR_USERS[0], True), (BUGS[0], False)):
        error = pickle.loads(pickle.dumps(caught(body(lines), wrap=judged)))
        assert error.__traceback__ is None and is_mistake(error) is mistake


def test_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("x" * 300)) == "x" * 200


def test_a_chain_of_causes_that_leads_back_comes_to_an_end():
    first, second = OSError("one"), OSError("two")
    first.__cause__, second.__context__ = second, first
    assert not of_the_system(first)
