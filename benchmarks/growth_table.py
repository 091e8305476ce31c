"""What `growth.py` makes of its times: growth, time of each further one, Markdown."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

HEADS = ("depth", "batch", "image", "N", "images/s", "ms per step", "growth", "by formula")
HEADS += ("quotient", "memory, MB", "activations by formula, MB")
UNITS = {"depth": "layer", "batch_size": "image"}  # the sweeps in which growth is linear


def growth(times: list[list[float]], formula: list[int]) -> list[dict[str, float]]:
    """Each case by the middle one: measured, as a median of rounds, by formula, their quotient.

    Args:
        times: of each case, the seconds in each round.
        formula: of each case, what the formula says of its cost.
    """
    middle = len(times) // 2
    found = []
    for of_case, cost in zip(times, formula, strict=True):
        ratios = [a / b for a, b in zip(of_case, times[middle], strict=True)]
        measured, expected = statistics.median(ratios), cost / formula[middle]
        found.append(
            {
                "growth": measured,
                "lowest_growth": min(ratios),
                "highest_growth": max(ratios),
                "growth_by_formula": expected,
                "quotient": measured / expected,
            }
        )
    return found


def seconds_each(values: Sequence[int], times: list[list[float]]) -> list[float]:
    """Seconds that each further layer or image takes, from a case to the next; equal if linear."""
    return [
        statistics.median((b - a) / (more - less) for a, b in zip(before, after, strict=True))
        for (less, before), (more, after) in pairwise(zip(values, times, strict=True))
    ]


def line(row: dict[str, Any]) -> str:
    """One line of a table."""
    cells = [
        *(str(row[key]) for key in ("depth", "batch_size", "image_size", "tokens")),
        f"{row['images_per_s']:.3g}",
        f"{1e3 * row['seconds']:.4g}",
        f"{row['growth']:.3f} ({row['lowest_growth']:.3f} to {row['highest_growth']:.3f})",
        f"{row['growth_by_formula']:.3f}",
        f"{row['quotient']:.2f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        f"{row['activation_bytes_by_formula'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def slopes(sweep: str, found: dict[str, Any]) -> str:
    """What each further layer or image takes, as a sentence."""
    values, each = [row[sweep] for row in found["cases"]], found["seconds_each"]
    parts = [
        f"{1e3 * s:.4g} ms from {a} to {b}"
        for s, (a, b) in zip(each, pairwise(values), strict=True)
    ]
    return f"Each further {UNITS[sweep]} takes {', '.join(parts)}: x {each[-1] / each[0]:.2f}."


def report(result: dict[str, Any]) -> str:
    """The result as Markdown: a table a sweep, and what it was measured on."""
    hardware = result["hardware"]
    lines = []
    for sweep, found in result["sweeps"].items():
        lines += [f"| {' | '.join(HEADS)} |", "|" + " ---: |" * len(HEADS)]
        lines += [*map(line, found["cases"]), ""]
        lines += [slopes(sweep, found), ""] if sweep in UNITS else []
    lines += [
        f"Training step of {result['model']}, {result['dtype']}; medians of {result['rounds']} "
        "rounds, with the lowest and highest growth. Growth is by the middle case of the table "
        "(in the last one 224 pixels); quotient: measured growth by that of the formula.",
        "",
        f"- Device: {hardware['device']}; processor: {hardware['cpu']}; "
        f"load before: {hardware['load_average_before']}",
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
        f"- Command: `{result['command']}`",
    ]
    return "\n".join(lines) + "\n"
