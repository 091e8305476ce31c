"""The result of a plan, as lines for people."""

import textwrap
from collections.abc import Iterator

from crate_jax.columns import WIDTH
from crate_jax.files import Json


def table(found: Json) -> str:
    """The result of `plan` or `plan_on`.

    What formulas give and what a compiler gives stand apart.
    """
    lines = [*_by_formula(found), "", *_compiled(found["compiled"]), "", *_times(found)]
    lines += [line for text in _remedies(found) for line in textwrap.wrap(text, WIDTH)]
    return "\n".join(lines) + "\n"


def _by_formula(found: Json) -> Iterator[str]:
    yield f"{found['parameters']:,} parameters"
    yield ""
    yield "by formula, memory of a device     GiB"
    for name, size in found["memory"].items():
        yield f"  {name:<28}{size / 2**30:>10.3f}"
    yield f"added up in a step, MB        {found['gradient_bytes'] / 1e6:>10.1f}"
    yield f"gathered in a step, MB        {found['gathered_bytes'] / 1e6:>10.1f}"


def _compiled(compiled: Json) -> Iterator[str]:
    where = f" for {compiled['topology']}" if "topology" in compiled else ""
    yield f"compiled{where} in {compiled['dtype']}"
    if "refused" in compiled:
        why = f"  does not fit: {compiled['refused']}"
        yield from textwrap.wrap(why, WIDTH, subsequent_indent="    ")
        return
    yield f"{'':<30}count  compiled   formula"
    memory = [compiled[name] / 2**30 for name in ("memory", "memory_by_formula")]
    yield f"  {'memory, GiB':<33}" + "".join(f"{size:>10.3f}" for size in memory)
    for name, what in (("gradient", "added up"), ("gathered", "gathered")):
        sizes = [compiled[f"{name}_bytes{by}"] / 1e6 for by in ("", "_by_formula")]
        yield f"  {what + ', MB':<33}" + "".join(f"{size:>10.1f}" for size in sizes)
    for kind, of in compiled["collectives"].items():
        overlapping = f"   {of['overlapping']} overlapping" if of["overlapping"] else ""
        yield f"  {kind + ', MB':<26}{of['count']:>7}{of['bytes'] / 1e6:>10.1f}{overlapping}"
    if "moved" not in compiled:
        return
    yield f"  {'moved through memory, MB':<33}{compiled['moved'] / 1e6:>10.1f}"
    for opcode, size in compiled["moved_by_opcode"].items():
        if size > compiled["moved"] / 100:
            yield f"    {'by ' + opcode:<31}{size / 1e6:>10.1f}"
    yield f"  {'copies of all tokens':<26}{compiled['copies']:>7}"
    yield "  operations that move most (MB, share, times, what, from where)"
    for operation in compiled["moved_by"][:10]:
        share = f"{operation['bytes'] / max(1, compiled['moved']):.0%}"
        yield (
            f"  {operation['bytes'] / 1e6:>10.1f}{share:>5}{operation['trips']:>4}  "
            f"{operation['name'][:24]:<26}{_ending(operation['source'])}"
        )


def _ending(source: str, most: int = WIDTH - 49) -> str:
    return source if len(source) <= most else "…" + source[1 - most :]


_CELLS = (10, 10, 10, 10, 15, 6)  # columns of a time, of a range of times, and of a word


def _times(found: Json) -> Iterator[str]:
    if not found["chips"]:
        refused = "refused" in found["compiled"]
        yield f"no time: the {'program does not fit' if refused else 'peaks are unknown'}"
        return
    source = "of the program" if "topology" in found["compiled"] else "by formula"
    yield f"at peak, {source} (ms)"
    heads = ("compute", "memory", "links", "network", "step", "fits")
    yield " " * 9 + "".join(f"{h:>{n}}" for h, n in zip(heads, _CELLS, strict=True)) + "  bound by"
    for chip, seconds in found["chips"].items():
        cells = [
            f"{1e3 * seconds[f'{name}_s']:.2f}" if f"{name}_s" in seconds else ""
            for name in ("compute", "memory", "links", "network")
        ]
        low, high = (1e3 * s for s in seconds["step_s"])
        digits = 2 if high < 10 else 1 if high < 1000 else 0
        cells += [f"{low:.{digits}f}-{high:.{digits}f}", "yes" if seconds["fits"] else "NO"]
        row = "".join(f"{cell:>{n}}" for cell, n in zip(cells, _CELLS, strict=True))
        yield f"  {chip:<7}{row}  {seconds['bound_by']}"


def _remedies(found: Json) -> Iterator[str]:
    """Say what would fit where the step does not, once for each number of micro-batches."""
    enough: dict[int | None, list[str]] = {}
    for chip, seconds in found["chips"].items():
        if "accumulate_steps" in seconds:
            enough.setdefault(seconds["accumulate_steps"], []).append(chip)
    if "accumulate_steps" in found["compiled"]:
        whole = found["compiled"]["topology"]
        enough.setdefault(found["compiled"]["accumulate_steps"], []).append(whole)
    for steps, chips in enough.items():
        remedy = f"it would fit with --config.optim.accumulate_steps={steps}"
        if steps is None:
            remedy = "no optim.accumulate_steps is enough; take more devices, or a larger fsdp"
        yield f"by formula, {', '.join(chips)}: {remedy}"
