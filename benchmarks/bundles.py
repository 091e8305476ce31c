"""The TPU compiler's last schedule of a program: bundles of instructions, and how often each runs.

A TPU core issues one bundle a cycle, unless it waits. libtpu writes the schedule of each operation
as text, if it is told to: the lines of loops say where they begin, and which comparison ends them.
So a count of the bundles that run is a number of cycles without what is waited for. It is a static
estimate, and no measurement.
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path

# What libtpu reads when it is loaded: to write the last stages alone, since all of them are
# gigabytes.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
)

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
    """The schedules that libtpu wrote into a folder, by the name of the operation."""
    found = {}
    for path in folder.glob("*final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if name and not path.name.endswith("schedule-analysis_final_bundles.txt"):
            use = next(folder.glob(f"*-{name[1]}-*-final_hlo-static-per-bundle-utilization.txt"))
            found[name[1]] = schedule(path.read_text(), use.read_text())
    return found


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
    for n, row in zip(times, rows, strict=False):
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
