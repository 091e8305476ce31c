"""The result of `step.py` as Markdown."""

import math
from typing import Any

MODES = ("forward", "train")
CONTENDERS = ("ours", "eager", "compile")
SPEEDS = ("images_per_s", "images_per_s_eager", "images_per_s_compile")


def row(result: dict[str, Any], model: str, mode: str) -> str:
    """One line of the table; a dash for what could not be measured."""
    get = lambda key: result.get(f"{model}/{mode}/{key}", math.nan)  # noqa: E731

    def ratio(other: str) -> str:
        low, high = get(f"lowest_ratio_{other}"), get(f"highest_ratio_{other}")
        return f"{get(f'ratio_{other}'):.2f} ({low:.2f} to {high:.2f})"

    cells = [
        model,
        str(result["batch_sizes"][model]),
        mode,
        *(f"{get(key):.3g}" for key in SPEEDS),
        ratio("eager"),
        ratio("compile"),
        " / ".join(f"{get(f'memory_bytes_{who}') / 1e6:.0f}" for who in CONTENDERS),
        " / ".join(f"{get(f'first_s_{who}'):.1f}" for who in CONTENDERS),
        f"{get('share_of_peak'):.0%}",
    ]
    return f"| {' | '.join(cells)} |".replace("nan (nan to nan)", "-").replace("nan", "-")


def report(result: dict[str, Any]) -> str:
    """The result as Markdown: the table, and what it was measured on."""
    hardware = result["hardware"]
    heads = ["model", "batch", "mode", "ours, images/s", "eager", "compile", "ratio to eager"]
    heads += ["ratio to compile", "memory, MB", "first call, s", "share of peak"]
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | --- |" + " ---: |" * (len(heads) - 3)]
    lines += [row(result, model, mode) for model in result["batch_sizes"] for mode in MODES]
    lines += [
        "",
        f"{result['dtype']}; medians of {result['rounds']} rounds, with the lowest and highest "
        "ratio; a ratio > 1 means that ours is faster. PyTorch runs the official operations: three "
        "products in ISTA, softmax and attention apart. Memory and first call: ours / eager / "
        "compile.",
        "",
        f"- Device: {hardware['device']}; processor: {hardware['cpu']}; "
        f"load before: {hardware['load_average_before']}; PyTorch's waiting threads: "
        f"{hardware['omp_wait_policy']}",
        f"- Peak: {result['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s in a large matrix product, "
        f"{result['copy_bytes_per_s'] / 1e9:,.0f} GB/s in a copy (read and written)",
        "- Versions: " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
        f"- Command: `{result['command']}`",
        *(f"- Left out: {name}: {why}" for name, why in result.get("omitted", {}).items()),
    ]
    return "\n".join(lines) + "\n"
