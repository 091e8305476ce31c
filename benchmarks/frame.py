"""What all benchmarks share: the command line, turns of a child, and how a result is published.

A benchmark is its question and a dict of numbers; `publish` adds what they were measured on.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# `python benchmarks/step.py` puts benchmarks/ on the path, not the repository.
sys.path.insert(0, str(ROOT))

LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it
Result = dict[str, Any]


def command_line(
    question: str | None,
    *,
    rounds: int | None = None,
    model: str | None = None,
    batch_size: int | None = None,
    dtypes: bool = False,
) -> argparse.ArgumentParser:
    """A parser with --output, and with those of the common arguments that have a default here."""
    parser = argparse.ArgumentParser(
        description=question, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if model:
        parser.add_argument("--model", type=known_model, default=model)
    if batch_size:
        parser.add_argument("--batch-size", type=positive, default=batch_size)
    if dtypes:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    if rounds:
        parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--output", type=json_file, help="a .json file; tables go beside it as .md")
    return parser


def known_model(name: str) -> str:
    """A name of `crate_jax.list_models`."""
    from crate_jax import list_models

    if name not in list_models():
        raise argparse.ArgumentTypeError(f"must be among {', '.join(list_models())}; got {name}.")
    return name


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on; got {text}.")
    return int(text)


def parse_models(text: str) -> dict[str, int | None]:
    """Batch size by name, of ``name,name:batch_size,...``; None where it is not said."""
    sizes: dict[str, int | None] = {}
    for item in text.split(","):
        name, colon, own = item.partition(":")
        if known_model(name) in sizes:
            raise argparse.ArgumentTypeError(f"must name {name} once. Run the other size apart.")
        sizes[name] = positive(own) if colon else None
    return sizes


def json_file(text: str) -> Path:
    """A path that ends in .json."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must end in .json; got {text}.")
    return Path(text).expanduser()


def child(*arguments: object, **environment: str) -> Result:
    """Run a Python program of the project in a process of its own: the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def publish(
    args: argparse.Namespace,
    found: Result,
    *packages: str,
    report: Callable[[Result], Iterable[str]] | None = None,
    quiet: bool = False,
    **hardware: Any,
) -> None:
    """Print the tables and, as the last line, the JSON; write both to --output.

    Args:
        args: of the command line; they become part of the result.
        found: what was measured. Floats are cut to five digits.
        *packages: whose versions matter besides JAX's, Flax's and NumPy's.
        report: from the whole result to the lines of its tables.
        quiet: write alone, such as what there is so far.
        **hardware: what else matters of the machine.
    """
    import jax  # not at the top: a benchmark may have to set variables that JAX reads

    arguments = {k: v for k, v in vars(args).items() if type(v) in (int, float, str)}
    result = arguments | shorten(found)
    result["hardware"] = {
        "device": jax.devices()[0].device_kind,
        "cpu": describe_cpu(),
        "load_average_before": round(LOAD, 2),
    } | hardware
    names = filter(installed, ("jax", "flax", "numpy", *packages))
    result["versions"] = {"python": platform.python_version()} | {n: version(n) for n in names}
    result["command"] = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if report:
        text = "\n".join([*report(result), "", *measured_on(result)]) + "\n"
        if not quiet:
            print(text)
        if args.output:
            args.output.with_suffix(".md").write_text(text)
    if not quiet:
        print(json.dumps(result), flush=True)


def shorten(value: Any) -> Any:
    """Five digits of every float."""
    if isinstance(value, dict):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shorten(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def describe_cpu() -> str:
    """Cores that this process may use, and the processor's name, family and model.

    Some names, such as AMD EPYC, are those of several generations.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    first = {key.strip(): value.strip() for key, _, value in pairs}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    exact = "family {cpu family} model {model}".format_map(first) if "cpu family" in first else ""
    return f"{cores} x " + " ".join([first.get("model name", platform.machine()), exact]).strip()


def installed(name: str) -> str | None:
    """A package's version; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(heads: str, rows: Iterable[str], words: int = 1) -> list[str]:
    """Lines of a Markdown table; its first columns, as many as `words`, hold words.

    Heads and rows are cells with " | " between them.
    """
    columns = heads.count(" | ") + 1
    rule = " | ".join(["---"] * words + ["---:"] * (columns - words))
    return [f"| {cells} |" for cells in (heads, rule, *rows)]


def measured_on(result: Result) -> list[str]:
    """Hardware, versions, command and what was left out, as a list."""
    hardware = (f"{name.replace('_', ' ')} {value}" for name, value in result["hardware"].items())
    return [
        f"- Hardware: {'; '.join(hardware)}",
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
        f"- Command: `{result['command']}`",
        *(f"- Left out: {name}: {why}" for name, why in result.get("omitted", {}).items()),
    ]
