"""What the TPU compiler makes of every recipe: memory, traffic and collectives, slice by slice.

    python benchmarks/slices.py --output benchmarks/results/slices.json

Needs ``pip install 'crate-jax[tpu-compiler]'`` and no TPU. Nothing is run, so no figure is a
measurement. A program takes minutes to compile and is kept: stop it, start it again, and it goes on
where it was. So another run, after a change of a formula, renews what formulas say in minutes.
--output is written after every case, and says which are left. docs/scaling.md holds the table that
this prints.
"""

import argparse
import os
import subprocess
import sys

from frame import Result, child, command_line, publish, table

NEAR = 0.1  # of what was compiled, that a formula may be off
POD = "v5e:16x16"
FIRST, THEN = ("v5e:4x4", POD), ("v6e:4x4", "v5p:2x2x4", "v4:2x2x4")
RECIPES = [
    *[f"imagenet1k:{size}" for size in ("tiny", "small", "base", "large")],
    *[f"alpha_imagenet21k:{size}" for size in ("base-32", "base-16", "large-14")],
    "alpha_imagenet1k:base-32",
    "finetune:cifar10-small",
]
CASES = [
    ("digits", "v5e:1x1", "data:-1"),
    *[(recipe, topology, "data:-1") for topology in FIRST for recipe in RECIPES],
    *[(f"imagenet1k:{size}", POD, "data:64,fsdp:4") for size in ("base", "large")],
    *[(recipe, topology, "data:-1") for topology in THEN for recipe in RECIPES],
]


def line(row: Result) -> str:
    """A line of the table."""
    compiled = row["compiled"]
    devices = row["mesh"]["data"] * row["mesh"]["fsdp"]
    formula = f"{compiled['memory_by_formula'] / 2**30:.3g}"
    cells = [row["recipe"], row["topology"], row["spec"], f"{row['batch_size'] // devices}"]
    if "refused" in compiled:
        return " | ".join([*cells, "does not fit", formula, *[""] * 6])
    cells += [f"{compiled['memory'] / 2**30:.3g}", formula, f"{off(compiled):+.1%}"]
    cells += [f"{compiled['moved'] / 1e9:.3g}", f"{compiled['copies']}", counts(compiled)]
    (seconds,) = row["chips"].values()
    low, high = (1e3 * s for s in seconds["step_s"])
    return " | ".join([*cells, f"{low:.3g} to {high:.3g}", seconds["bound_by"]])


def off(compiled: Result) -> float:
    """By how much the formula of the memory is off, as a share of what was compiled."""
    return compiled["memory_by_formula"] / compiled["memory"] - 1


def counts(compiled: Result) -> str:
    """How many collectives of each kind, and how many of them go on beside other work."""
    return ", ".join(
        f"{of['count']} {kind}" + (f" ({of['overlapping']} overlap)" if of["overlapping"] else "")
        for kind, of in compiled["collectives"].items()
    )


def report(result: Result) -> list[str]:
    """The table, and what it lacks; where the formula is not near."""
    heads = ["recipe", "slice", "mesh", "images a device", "GiB compiled", "GiB by formula"]
    heads += ["off", "GB moved", "copies", "collectives", "ms at least", "bound by"]
    lines = table(" | ".join(heads), map(line, result["rows"]), words=3)
    fit = [row for row in result["rows"] if "refused" not in row["compiled"]]
    far = [row for row in fit if abs(off(row["compiled"])) > NEAR]
    names = "; ".join(f"{row['recipe']} on {row['topology']}, {row['spec']}" for row in far)
    lines += ["", f"Off by more than {NEAR:.0%}: {names or 'none'}."]
    if result["left"]:
        lines += ["", f"Not compiled yet: {'; '.join(result['left'])}."]
    return lines


def plan(recipe: str, topology: str, spec: str, depth: int | None) -> Result:
    """The result of the command, without its longest list."""
    shallow = [f"--config.model.depth={depth}"] if depth else []
    found = child(
        *("-m", "crate_jax", "plan", f"--config={recipe}", *shallow),
        *(f"--topology={topology}", f"--mesh={spec}"),
    )
    found["compiled"].pop("moved_by", None)
    return found


def main() -> None:
    """Compile every case, print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="cases whose recipe or slice has this in it")
    parser.add_argument("--depth", type=int, help="layers instead of the recipe's, to try it out")
    args: argparse.Namespace = parser.parse_args()
    os.nice(10)
    rows, omitted = [], {}
    cases = {
        f"{recipe} on {topology}, {spec}": (recipe, topology, spec)
        for recipe, topology, spec in CASES
    }
    left = [case for case in cases if args.only in case]
    while left:
        case = left[0]
        recipe, topology, spec = cases[case]
        print(f"{case} ({len(rows)} done)", file=sys.stderr, flush=True)
        try:
            found = plan(recipe, topology, spec, args.depth)
        except subprocess.CalledProcessError as error:
            omitted[case] = f"status {error.returncode}"
        else:
            rows.append({"recipe": recipe, "topology": topology, "spec": spec} | found)
        left = left[1:]
        found_so_far = {"rows": rows, "omitted": omitted, "left": left}
        publish(args, found_so_far, "libtpu", report=report, quiet=bool(left))


if __name__ == "__main__":
    main()
