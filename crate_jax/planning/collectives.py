"""The communication between the devices of a compiled program, read from its text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from crate_jax.planning.hlo import Computation, Instruction, Program, read

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_WORK = ("fusion", "custom-call", "convolution", "dot", "while", "call", "conditional")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its result on one device, without padding; of the whole gradient for an
            all-reduce, of the whole weight for an all-gather, of a share for a reduce-scatter.
        group: the number of devices that take part in it together.
        stride: the number of devices that stand between one of the group and the next, and the one
            itself.
        overlaps: whether the program computes something between its start and its end.
    """

    kind: str
    bytes: int
    group: int
    stride: int = 1
    overlaps: bool = False


def collectives(program: str, devices: int) -> Counter[Collective]:
    """The collectives that one run of a program executes, and how often.

    Args:
        program: the text of a compiled program (``compiled.as_text()``). What stands in a loop
            counts as often as the loop is known to run. The parts in which a TPU carries one out,
            each inside an operation that computes something else meanwhile, count as one. So does
            a sum whose result is cut up at once, which a TPU carries out as a reduce-scatter.
        devices: the devices of the program: the group where the text names none.
    """
    parsed = read(program)
    found: Counter[Collective] = Counter()
    for name, trips in parsed.runs():
        inside = parsed.computations[name]
        seen: set[tuple[str, str]] = set()
        for instruction in inside.values():
            for inner, outer in _inside(parsed, instruction):
                kind = inner.opcode.removesuffix("-start")
                channel = inner.attribute(r"channel_id=(\d+)") or inner.name
                if kind in KINDS and (kind, channel) not in seen:
                    seen.add((kind, channel))
                    overlaps = "chain_id" in inner.text or _works_meanwhile(inside, instruction)
                    found[_collective(inner, outer, devices, overlaps)] += trips
    return found


def _works_meanwhile(inside: Computation, start: Instruction) -> bool:
    """True if a computation has work between an operation's start and its end."""
    names = list(inside)
    ends = [x.name for x in inside.users[start.name] if x.opcode.endswith("-done")]
    if not start.opcode.endswith("-start") or not ends:
        return False
    between = names[names.index(start.name) + 1 : names.index(ends[0])]
    return any(inside[name].opcode in _WORK for name in between)


def _inside(program: Program, x: Instruction) -> Iterator[tuple[Instruction, Instruction]]:
    """An instruction, or what stands in the computation of one that is fused; and the whole."""
    yield x, x
    if x.opcode in ("fusion", "async-start"):
        for name in x.called("calls"):
            for inner in program.computations[name].values():
                for each, _ in _inside(program, inner):
                    yield each, x


def _collective(x: Instruction, outer: Instruction, devices: int, overlaps: bool) -> Collective:
    kind, made = x.opcode.removesuffix("-start"), x.results
    if kind == "all-reduce" and "all-reduce-scatter" in next(outer.called("calls"), ""):
        kind, made = "reduce-scatter", outer.results
    elif x.opcode.endswith("-start") and kind != "all-reduce":
        made = made[1:2]  # after what it takes, and before counters
    group, stride = _group(x.text, devices)
    return Collective(kind, sum(array.content for array in made), group, stride, overlaps)


def _group(text: str, devices: int) -> tuple[int, int]:
    """The number of devices that a collective joins, and their distance, in XLA's spellings."""
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        joined = re.findall(r"'(\w+)'", mesh[3])
        ids = _ids(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        others = tuple(0 if axis not in joined else slice(None) for axis in sizes)
        members = ids[others].flatten().tolist()
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+?)(?:, |$)", text):
        members = _ids(iota[2])[: int(iota[1])].tolist()
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        members = [int(member) for member in listed[1].split(",")]
    else:
        members = list(range(devices))
    return len(members), members[1] - members[0] if len(members) > 1 else 1


def _ids(text: str) -> np.ndarray:
    """Devices in the order of ``[2,4]T(1,0)``: counted, laid out, and its sides swapped."""
    sides, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(sides))).reshape(_numbers(sides))
    return (ids.transpose(_numbers(order)) if order else ids).flatten()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
