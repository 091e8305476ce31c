"""Does the cost of a training step grow with depth, batch and tokens as the formula says?

    python benchmarks/growth.py --output growth.json

The float32 training step of CRATE-T that `step.py` times, at several depths, batch sizes and image
sizes, one of these changed at a time. All cases of one sweep live in one process and take turns,
round by round; growth is the median over the rounds of a case's time by that of the middle case in
the same round, which is also the same program in every sweep. Beside it stands the same by formula
(batch times `crate_jax.models.cost.step_flops`), and the quotient of the two: 1 is what the formula
says. The formula counts matrix products alone (no softmax, no norms), and takes them to be equally
fast at every size; what a step costs at any size (AdamW, say) pulls the quotient of small cases up
and of large ones down. So where growth is said to be linear, in depth and batch, the time of each
further layer and image is given too.

Memory is the arguments and the temporary arrays of the compiled step; beside it what of it the
layers keep for the backward pass, by formula (batch times `activation_bytes`).

The last line is a JSON object; --output writes it into a file, and the tables beside it as
Markdown. Use an idle machine: the load on it before the start is in the JSON.
"""

import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise

import jax
import numpy as np
from contenders import training_step
from frame import Result, command_line, publish, table
from timing import finish, quotients, race, spread

from crate_jax import create_model
from crate_jax.models.cost import activation_bytes, step_flops

MODEL = "crate_tiny_patch16_224"
BASE = {"depth": 6, "batch_size": 4, "image_size": 224}
SWEEPS = {  # BASE is the middle case of each
    "depth": (3, 6, 12),
    "batch_size": (2, 4, 8),
    "image_size": (64, 128, 224, 384),
}
HEADS = "depth | batch | image | N | images/s | ms per step | growth | by formula | quotient"
HEADS += " | memory, MB | activations by formula, MB"
UNITS = {"depth": "layer", "batch_size": "image"}  # the sweeps in which growth is linear


def measure(sweep: str, rounds: int) -> Result:
    """One row a case of a sweep, and for depth and batch size what each further one takes."""
    rows, runs, flops = [], {}, []
    for value in SWEEPS[sweep]:
        case = BASE | {sweep: value}
        model = create_model(MODEL, depth=case["depth"], image_size=case["image_size"])
        step = training_step(model, case["batch_size"])
        if not np.isfinite(finish(step.run())):  # this call compiles, before the clock starts
            sys.exit(f"The loss must be finite; got another at {sweep} {value}.")
        runs[str(value)] = step.run
        flops.append(case["batch_size"] * step_flops(model))
        kept = case["batch_size"] * activation_bytes(model)
        case |= {"tokens": model.num_tokens, "memory_bytes": step.memory()}
        rows.append(case | {"activation_bytes_by_formula": kept})
    times = list(race(runs, rounds, finish).values())
    for row, of_case, grown in zip(rows, times, growth(times, flops), strict=True):
        row["seconds"] = statistics.median(of_case)
        row["images_per_s"] = row["batch_size"] / row["seconds"]
        row |= grown
    found: Result = {"cases": rows}
    if sweep in UNITS:
        found["seconds_each"] = seconds_each(SWEEPS[sweep], times)
    return found


def growth(times: list[list[float]], formula: list[int]) -> list[dict[str, float]]:
    """Each case by the middle one: measured, as a median of rounds, by formula, their quotient.

    Args:
        times: of each case, the seconds in each round.
        formula: of each case, what the formula says of its cost.
    """
    middle = len(times) // 2
    found = []
    for of_case, cost in zip(times, formula, strict=True):
        grown = spread("growth", quotients(of_case, times[middle]))
        expected = cost / formula[middle]
        quotient = grown["growth"] / expected
        found.append(grown | {"growth_by_formula": expected, "quotient": quotient})
    return found


def seconds_each(values: Sequence[int], times: list[list[float]]) -> list[float]:
    """Seconds that each further layer or image takes, from a case to the next; equal if linear."""
    return [
        statistics.median((b - a) / (more - less) for a, b in zip(before, after, strict=True))
        for (less, before), (more, after) in pairwise(zip(values, times, strict=True))
    ]


def line(row: Result) -> str:
    """One line of a table."""
    return (
        f"{row['depth']} | {row['batch_size']} | {row['image_size']} | {row['tokens']} | "
        f"{row['images_per_s']:.3g} | {1e3 * row['seconds']:.4g} | {row['growth']:.3f} "
        f"({row['lowest_growth']:.3f} to {row['highest_growth']:.3f}) | "
        f"{row['growth_by_formula']:.3f} | {row['quotient']:.2f} | {row['memory_bytes'] / 1e6:.0f} "
        f"| {row['activation_bytes_by_formula'] / 1e6:.0f}"
    )


def slopes(sweep: str, found: Result) -> str:
    """What each further layer or image takes, as a sentence."""
    values, each = [row[sweep] for row in found["cases"]], found["seconds_each"]
    parts = [
        f"{1e3 * s:.4g} ms from {a} to {b}"
        for s, (a, b) in zip(each, pairwise(values), strict=True)
    ]
    return f"Each further {UNITS[sweep]} takes {', '.join(parts)}: x {each[-1] / each[0]:.2f}."


def report(result: Result) -> list[str]:
    """A table a sweep, and how they are read."""
    lines = []
    for sweep, found in result["sweeps"].items():
        lines += [*table(HEADS, map(line, found["cases"]), words=0), ""]
        lines += [slopes(sweep, found), ""] if sweep in UNITS else []
    return [
        *lines,
        f"Training step of {result['model']}, {result['dtype']}; medians of {result['rounds']} "
        "rounds, with the lowest and highest growth. Growth is by the middle case of the table "
        "(in the last one 224 pixels); quotient: measured growth by that of the formula.",
    ]


def main() -> None:
    """Parse, measure, print, write."""
    args = command_line(__doc__, rounds=5).parse_args()
    # On a GPU JAX would round the operands of float32 products to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    sweeps = {sweep: measure(sweep, args.rounds) for sweep in SWEEPS}
    found = {"model": MODEL, "dtype": "float32", "sweeps": sweeps}
    publish(args, found, "optax", report=report)


if __name__ == "__main__":
    main()
