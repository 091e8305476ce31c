"""The TPU compiler's last schedule of a program: bundles of instructions, and how often each runs.

A TPU core issues one bundle a cycle, unless it waits. libtpu writes the schedule of each operation
as text, if it is told to: the lines of loops say where they begin, and which comparison ends them.
So a count of the bundles that run is a number of cycles without what is waited for. It is a static
estimate, and no measurement. Of operations that are the same it writes one schedule, which all of
them run.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # types alone: the path of the repository may not be there yet
    from crate_jax.planning.hlo import Computation, Instruction, Program

# What libtpu reads when it is loaded: to write the last stages alone, since all of them are
# gigabytes.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
)

_PRODUCTS = ("convolution", "dot", "custom-call")
# What tells two operations that do the same apart.
_NAMES = re.compile(r'metadata=\{[^}]*\}|%[\w.\-]+|"estimated_cycles":"\d+"')
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w*)\s*:")
_STARTS = re.compile(r"Start region (\d+)")
_JUMPS = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_ENDS = re.compile(r"scmp\.\w+\.\w+\.totalorder[^,]*?%s\d+_s\d+, (\d+)[^;}]*loop exit test")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one operation.

    Attributes:
        bundles: that run, each as often as it does.
        units: for each unit of the core how many bundles' worth of work it has, likewise.
        unknown: loops whose number of rounds the text does not say; they count once.
    """

    bundles: int
    units: dict[str, float]
    unknown: int


def schedules(folder: Path) -> dict[str, Schedule]:
    """The schedules that libtpu wrote into a folder, by the name of the operation.

    Raises:
        FileNotFoundError: it lacks a file about the units.
    """
    found = {}
    for path in folder.glob("*final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if name and not path.name.endswith("schedule-analysis_final_bundles.txt"):
            of_units = f"{name[1]}-*-final_hlo-static-per-bundle-utilization.txt"
            use = next(folder.glob(f"*-{of_units}"), None)
            if use is None:
                raise FileNotFoundError(f"{folder} must hold {of_units} beside {path.name}.")
            found[name[1]] = schedule(path.read_text(), use.read_text())
    return found


def shared(found: dict[str, Schedule], program: Program) -> dict[str, Schedule]:
    """Schedules, and those of operations that do the same as one that has one."""
    forms = {x.name: _form(x, inside, program) for x, inside in _operations(program)}
    by_form = {forms[name]: of for name, of in found.items() if name in forms}
    return {name: by_form[form] for name, form in forms.items() if form in by_form} | found


def without_schedule(
    names: Iterable[str], found: dict[str, Schedule], program: Program
) -> list[str]:
    """Which of some operations are products or calls, and have no schedule."""
    by_name = {x.name: x for x, _ in _operations(program)}
    return [n for n in names if n not in found and _has_product(by_name[n], program)]


def _operations(program: Program) -> Iterable[tuple[Instruction, Computation]]:
    for name in dict.fromkeys(name for name, _ in program.runs()):
        inside = program.computations[name]
        yield from ((x, inside) for x in inside.values())


def _form(x: Instruction, inside: Computation, program: Program) -> int:
    """A number that is the same of operations that do the same, whatever they are called."""
    taken = [inside[name].results for name in x.operands]
    called = [_form_of(program.computations[name], program) for name in x.called()]
    return hash((x.opcode, x.results, *taken, *called, _NAMES.sub("", x.text)))


def _form_of(inside: Computation, program: Program) -> int:
    forms: dict[str, int] = {}
    for x in inside.values():  # operands come first
        called = [_form_of(program.computations[name], program) for name in x.called()]
        taken = [forms[name] for name in x.operands]
        forms[x.name] = hash((x.opcode, x.results, *taken, *called, _NAMES.sub("", x.text)))
    return forms[inside.root.name]


def _has_product(x: Instruction, program: Program) -> bool:
    if x.opcode in _PRODUCTS:
        return True
    called = (program.computations[name] for name in x.called("calls"))
    return any(_has_product(inner, program) for inside in called for inner in inside.values())


def schedule(text: str, utilization: str) -> Schedule:
    """One operation's schedule.

    Args:
        text: of its ``final_bundles`` file.
        utilization: of its ``per-bundle-utilization`` file: what a core has of each unit, and of
            how many a bundle makes use.
    """
    lines = [line for line in text.splitlines() if _BUNDLE.match(line)]
    loops, unknown = _loops(lines)
    times = [1] * len(lines)
    for (first, last), rounds in loops.items():
        for i in range(first, last + 1):
            times[i] *= rounds
    _, names, capacities, _, *rows = utilization.splitlines()
    capacity = [int(n) for n in capacities.split()]
    used: Counter[str] = Counter()
    for n, row in zip(times, rows, strict=True):
        for name, of, count in zip(names.split(","), capacity, row.split(), strict=True):
            used[name.strip()] += n * int(count) / of
    return Schedule(sum(times), dict(used), unknown)


def _loops(lines: list[str]) -> tuple[dict[tuple[int, int], int], int]:
    """The rounds of each loop, by its first and last line, and how many say nothing of theirs."""
    spans, unknown = [], 0
    for first, line in enumerate(lines):
        if _BUNDLE.match(line)[1] != "LB":  # type: ignore[index]
            continue
        regions = set(_STARTS.findall(line))
        back = (i for i in range(first, len(lines)) if regions & set(_JUMPS.findall(lines[i])))
        last = next(back, None)
        if last is None:
            unknown += 1
        else:
            spans.append((first, last))
    rounds = {}
    for first, last in spans:
        inner = [span for span in spans if first < span[0] and span[1] <= last]
        own = (
            line
            for i, line in enumerate(lines[first : last + 1], first)
            if not any(a <= i <= b for a, b in inner)
        )
        ends = [int(found[1]) for line in own if (found := _ENDS.search(line))]
        if ends:
            rounds[first, last] = ends[0]
        else:
            unknown += 1
    return rounds, unknown
