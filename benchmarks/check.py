"""Has a step become slower? A fresh result of `step.py` against the committed one.

    python benchmarks/step.py --models ... --output new.json
    python benchmarks/check.py new.json benchmarks/results/step_cpu_2core.json

Compared are the ratios to PyTorch, and our bytes of memory: never times, which the day and the
machine decide. Prints what moved by more than 10 %, and what is missing; ends with 1 if a ratio
fell so far, the memory grew so far, or a figure is missing, and with 0 otherwise.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 0.1
FIGURES = ("ratio_eager", "ratio_compile", "memory_bytes_ours")
RESULTS = Path(__file__).resolve().parent / "results"


def load(path: Path) -> dict[str, Any]:
    """A result of step.py.

    Raises:
        ValueError: the file is no such thing.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file; got {error}.") from None
    sections = ("batch_sizes", "hardware")
    known = isinstance(result, dict) and all(isinstance(result.get(s), dict) for s in sections)
    values = figures(result).values() if known else ()
    if not values or not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
        raise ValueError(f"{path} must be a result of benchmarks/step.py. Write it with --output.")
    return result


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What is compared, of all that is in a result."""
    return {key: value for key, value in result.items() if key.rpartition("/")[2] in FIGURES}


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for each figure that moved or is missing, and whether the new result is as good.

    Raises:
        ValueError: the two were measured on different work.
    """
    shared = new["batch_sizes"].keys() & old["batch_sizes"].keys()
    for what, a, b in [
        ("dtype", new.get("dtype"), old.get("dtype")),
        *((f"batch size of {m}", new["batch_sizes"][m], old["batch_sizes"][m]) for m in shared),
    ]:
        if a != b:
            raise ValueError(f"The {what} must be the same in both; got {a} and {b}.")
    lines, good = [], True
    for model in sorted(old["batch_sizes"].keys() - shared):
        lines.append(f"{model}: not measured")
    for key, before in figures(old).items():
        if key.partition("/")[0] not in shared:
            continue
        if key not in new:
            lines.append(f"{key}: missing, was {before:,}")
            good = False
            continue
        change = new[key] / before - 1
        if abs(change) > TOLERANCE:
            grew, memory = change > 0, key.endswith("memory_bytes_ours")
            word = ("smaller", "larger")[grew] if memory else ("slower", "faster")[grew]
            lines.append(f"{key}: {word}, {before:,} -> {new[key]:,} ({change:+.0%})")
            good = good and grew != memory
    return lines, good


def path(text: str) -> Path:
    """A path; ~ is the home directory."""
    return Path(text).expanduser()


def main() -> None:
    """Compare, print, and end with 1 if the new result is worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("new", type=path, help="what step.py has just written")
    parser.add_argument(
        "committed", type=path, nargs="?", help="default: of that name, in benchmarks/results"
    )
    args = parser.parse_args()
    committed = args.committed or RESULTS / args.new.name
    if args.new.resolve() == committed.resolve():
        sys.exit(f"{args.new} must not be compared with itself. Write the new result elsewhere.")
    try:
        new, old = load(args.new), load(committed)
        lines, good = compare(new, old)
    except ValueError as error:
        sys.exit(str(error))
    if any(new["hardware"].get(what) != old["hardware"].get(what) for what in ("device", "cpu")):
        print("Not measured on the same hardware: ratios carry over only in part.")
    print("\n".join(lines or [f"{len(figures(old))} figures, none moved by {TOLERANCE:.0%}."]))
    sys.exit(not good)


if __name__ == "__main__":
    main()
