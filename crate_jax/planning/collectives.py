"""What the devices of a compiled program send each other, read from its text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes of a value, by what XLA calls its type.
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
             "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?"
                     r"([\w.\-]+)|branch_computations=\{([^}]*)\}")  # fmt: skip
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its result on one device; of the whole gradient for an all-reduce, of the whole
            weight for an all-gather.
        group: how many devices take part in it together.
    """

    kind: str
    bytes: int
    group: int


def collectives(program: str, devices: int) -> Counter[Collective]:
    """The collectives that one run of a program executes, and how often.

    Args:
        program: the text of a compiled program (``compiled.as_text()``). What stands in a loop
            counts as often as the loop is known to run.
        devices: of the program: the group where the text names none.
    """
    inside, calls, entry = _read(program, devices)
    found: Counter[Collective] = Counter()

    def run(name: str, times: int) -> None:
        for collective in inside.get(name, ()):
            found[collective] += times
        for called, trips in calls.get(name, ()):
            run(called, times * trips)

    run(entry, 1)
    return found


def _read(
    program: str, devices: int
) -> tuple[dict[str, list[Collective]], dict[str, list[tuple[str, int]]], str]:
    """What each computation holds, what it calls and how often, and the name of the first."""
    inside: dict[str, list[Collective]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            entry = name if start[1] else entry
        elif match := _COLLECTIVE.search(line):
            size = sum(_shapes(match[1]))
            inside.setdefault(name, []).append(Collective(match[2], size, _group(line, devices)))
        elif " = " in line:
            trips = int(count[1]) if (count := _TRIPS.search(line)) else 1
            for one, several in _CALLED.findall(line):
                names = [one] if one else [n.strip(" %") for n in several.split(",")]
                calls.setdefault(name, []).extend((called, trips) for called in names)
    return inside, calls, entry


def _shapes(text: str) -> Iterator[int]:
    """Bytes of each array in the text of a type."""
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", text):
        if dtype in _ITEMSIZE:
            yield _ITEMSIZE[dtype] * math.prod(int(side) for side in sides.split(",") if side)


def _group(line: str, devices: int) -> int:
    """How many devices a collective joins, in any of XLA's spellings."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return devices
