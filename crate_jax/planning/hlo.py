"""The text of a compiled program, read: its computations, their instructions, their arrays.

It is the text of ``compiled.as_text()``, XLA's HLO after all of a compiler's passes. No library
reads it without XLA's own protocol buffers.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of a value, by what XLA calls its type; what is not here (tokens) has none.
_BITS = {"pred": 8, "bf16": 16, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (8, 16, 32, 64)}
_BITS |= {f"f{bits}": bits for bits in (16, 32, 64)}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation"
                     r"|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
        dtype: as XLA calls it.
        shape: its sides.
        content: bytes of its values.
        bytes: with the padding of its tiles.
        space: the memory that it lies in; 0 is the large one. Of a TPU 1 is VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    content: int
    bytes: int
    space: int

    @property
    def values(self) -> int:
        """The number of its values, without padding."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: in its computation.
        opcode: what it does.
        results: the arrays of what it makes.
        operands: names of what it takes.
        text: what follows the operands.
        is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def called(self, *kinds: str) -> Iterator[str]:
        """The computations that it calls as some of body, condition, to_apply, calls, ….

        Without kinds: all of them.
        """
        for kind, names in _CALLED.findall(self.text):
            if not kinds or kind in kinds:
                yield from _NAME.findall(names)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern, searched behind the operands."""
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The path of the JAX function that it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def parameter(self) -> int:
        """The number of a parameter."""
        return int(self.text.partition(")")[0])


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(x for x in self.values() if x.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take the result of an instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self}
        for user in self.values():
            for operand in dict.fromkeys(user.operands):
                found.setdefault(operand, []).append(user)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {x.parameter: x for x in self.values() if x.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> Iterator[tuple[str, int]]:
        """The computations whose instructions run one by one, and how often: entry and loops.

        A computation that is called twice comes twice. Those inside an instruction, such as a
        fusion's, do not come.
        """
        todo = [(self.entry, 1)]
        while todo:
            name, times = todo.pop(0)
            yield name, times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    trips = self.trips(instruction)
                    todo += [(body, times * trips) for body in instruction.called("body")]
                elif instruction.opcode in ("call", "conditional"):
                    todo += [(called, times) for called in instruction.called()]

    def trips(self, loop: Instruction) -> int:
        """The number of rounds of a loop; 1 if the program does not say.

        Some compilers write it down. Else it is what the condition compares its counter with, which
        starts from 0 in every loop of JAX's scan.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,) = loop.called("condition")
        bounds = self._constants(condition)
        return bounds[0] if len(bounds) == 1 else 1

    def _constants(self, name: str) -> list[int]:
        """The whole numbers in a computation and in those that it calls."""
        found = []
        for instruction in self.computations[name].values():
            if instruction.opcode == "constant" and instruction.text.partition(")")[0].isdigit():
                found.append(int(instruction.text.partition(")")[0]))
            for called in instruction.called():
                found += self._constants(called)
        return found


def read(text: str) -> Program:
    """The program that a text says."""
    computations: dict[str, Computation] = {}
    entry = ""
    inside = Computation()
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            inside = computations[start[2]] = Computation()
            entry = start[2] if start[1] else entry
        elif start := _INSTRUCTION.match(line):
            inside[start[2]] = _instruction(line[start.end() :], start[2], bool(start[1]))
    return Program(computations, entry)


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    written = rest[1 : end - 1]
    # The brackets of a constant or a parameter hold no operand.
    plain = opcode in ("constant", "parameter")
    return Instruction(
        name=name,
        opcode=opcode,
        results=tuple(arrays(kind)),
        operands=() if plain else tuple(_NAME.findall(written)),
        text=rest[1:] if plain else rest[end:],
        is_root=is_root,
    )


def _closing(text: str) -> int:
    """Find the end of the bracket that a text starts with."""
    depth = 0
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if depth == 0:
            return at.end()
    return len(text)


def arrays(text: str) -> Iterator[Array]:
    """The arrays in the text of a type, those inside tuples too."""
    for dtype, sides, order, layout in _ARRAY.findall(text):
        if dtype.startswith("f8"):
            bits = 8
        elif dtype in _BITS:
            bits = _BITS[dtype]
        else:
            continue
        shape = tuple(int(side) for side in sides.split(",") if side)
        space = re.search(r"S\((\d+)\)", layout)
        content, padded = (
            -(-math.prod(sides) * bits // 8) for sides in (shape, _padded(shape, order, layout))
        )
        yield Array(dtype, shape, content, padded, int(space[1]) if space else 0)


def _padded(shape: tuple[int, ...], order: str, layout: str) -> list[int]:
    """The sides as they lie in memory: the last ones whole tiles.

    ``{1,0,2:T(8,128)(2,1)}`` names the sides from the innermost on; the first tile is of the last
    of them. The second only orders what is inside the first.
    """
    inner_first = [int(i) for i in order.split(",") if i]
    sides = [shape[i] for i in reversed(inner_first)] if inner_first else list(shape)
    tiled = re.search(r"T\(([\d,*]+)\)", layout)
    if not tiled:
        return sides
    tile = [1 if side == "*" else int(side) for side in tiled[1].split(",")]
    sides = [1] * (len(tile) - len(sides)) + sides
    first = len(sides) - len(tile)
    return sides[:first] + [-(-n // t) * t for n, t in zip(sides[first:], tile, strict=True)]
