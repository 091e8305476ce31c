"""The bytes that an optimised program moves through the large memory of a device, by operation.

Every operand and every result counts once, if it lies in that memory (HBM) and not in one inside
the chip. Tiles are padded, and the padding moves too. Of a stacked array the slice counts that an
operation takes or writes, and not the whole. What renames an array moves nothing. It is a static
account of a program's text, and no measurement: caches, and what a product reads twice, are not in
it. XLA's own "bytes accessed" counts what stays inside the chip too, and a loop's body once.
"""

import dataclasses
from collections.abc import Iterable

from crate_jax.planning.collectives import KINDS
from crate_jax.planning.hlo import Array, Computation, Instruction, Program, read

# What renames, groups or waits; and what the loops and calls are, whose insides are counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("opt-barrier", "while", "call", "conditional", "partition-id", "replica-id"),
}
# Calls of the TPU compiler that do the same.
_FREE_CALLS = {
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_RENAMES = ("bitcast", "get-tuple-element", "reshape")
# All that a fusion may hold which only lays an array out anew.
_LAYOUT = {"parameter", "bitcast", "copy", "transpose", "reshape"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program, and what it moves each time it runs.

    Attributes:
        name: in the program's text.
        opcode: of a call the name of what is called, such as ``tpu_custom_call``, which is a
            Pallas kernel; of the two halves of an asynchronous operation that of the first.
        source: the path of the JAX function that it comes from, as JAX names it.
        reads: bytes that it reads from the large memory.
        writes: bytes that it writes there.
        trips: how often it runs in one run of the program.
        values: of the largest array that it makes, wherever it lies.
        is_copy: whether it only lays an array out anew, or copies it.
        cycles: what the TPU compiler estimates for it, by a cost model of its own; 0: nothing.
    """

    name: str
    opcode: str
    source: str
    reads: int
    writes: int
    trips: int
    values: int
    is_copy: bool
    cycles: int

    @property
    def bytes(self) -> int:
        """The bytes that it moves in one run of the program."""
        return self.trips * (self.reads + self.writes)


def account(text: str, *, spaces: Iterable[int] = (0,)) -> list[Operation]:
    """The operations of a program's entry and of the bodies of its loops.

    Args:
        text: the text of ``compiled.as_text()``.
        spaces: the numbers of the memory that counts: of a TPU 0; of a GPU 1 too, which is its
            memory set aside for collectives.

    Returns:
        Those that compute or move something, in the order of the program.
    """
    return _Account(read(text), frozenset(spaces)).operations()


def copies(operations: Iterable[Operation], values: int) -> int:
    """Count the copies of arrays of so many values or more in one run of a program."""
    return sum(x.trips for x in operations if x.is_copy and x.values >= values)


class _Account:
    """The account of one program."""

    def __init__(self, program: Program, spaces: frozenset[int]):
        self._program, self._spaces = program, spaces

    def operations(self) -> list[Operation]:
        found = []
        for name, trips in self._program.runs():
            inside = self._program.computations[name]
            found += [self._operation(x, inside, trips) for x in inside.values() if not _free(x)]
        return found

    def _operation(self, x: Instruction, inside: Computation, trips: int) -> Operation:
        results = _made(x, inside)
        return Operation(
            name=x.name,
            opcode=_target(x) or x.opcode,
            source=x.source,
            reads=sum(
                self._read_by(x, operand, inside, results) for operand in dict.fromkeys(x.operands)
            ),
            writes=sum(self._written(x, inside, results)),
            trips=trips,
            values=max((array.values for array in results), default=0),
            is_copy=self._only_copies(x),
            cycles=int(x.attribute(r'"estimated_cycles":"(\d+)"') or 0),
        )

    def _size(self, arrays: Iterable[Array]) -> int:
        """Bytes of those that lie in the memory that counts."""
        return sum(array.bytes for array in arrays if array.space in self._spaces)

    def _read_by(
        self, user: Instruction, name: str, inside: Computation, results: tuple[Array, ...]
    ) -> int:
        """Bytes that an instruction reads of one of its operands."""
        whole = self._size(inside[name].results)
        if not whole:
            return 0
        opcode = user.opcode.removesuffix("-start")
        if opcode in _SLICES and user.operands[0] == name:
            return min(whole, sum(array.bytes for array in results))
        if opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0  # the rest of it stays where it is
        if opcode in ("fusion", "async"):
            (called,) = user.called("calls")
            computation = self._program.computations[called]
            numbers = [i for i, operand in enumerate(user.operands) if operand == name]
            used = sum(
                self._used(computation, computation.parameters[i].name, whole) for i in numbers
            )
            return min(whole, used)
        return whole

    def _used(self, inside: Computation, name: str, whole: int) -> int:
        """Bytes that a fused computation reads of one of its values, of so many."""
        used = 0
        for user in inside.users[name]:
            if user.opcode in _RENAMES:
                used += self._used(inside, user.name, whole)
            elif user.opcode in _SLICES and user.operands[0] == name:
                used += sum(array.bytes for array in user.results)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass
            elif user.opcode == "tuple" or user.opcode in KINDS or _target(user) in _FREE_CALLS:
                pass  # handed on; a collective in parts counts where it starts
            elif user.opcode == "fusion":
                (called,) = user.called("calls")
                nested = self._program.computations[called]
                for i, operand in enumerate(user.operands):
                    if operand == name:
                        used += self._used(nested, nested.parameters[i].name, whole)
            else:
                return whole
            if used >= whole:
                return whole
        return used

    def _written(
        self, x: Instruction, inside: Computation, results: tuple[Array, ...]
    ) -> Iterable[int]:
        """Bytes that an instruction writes of each of its results."""
        if x.opcode.removesuffix("-start") == "dynamic-update-slice":
            yield min(self._size(results), _padded_size(inside[x.operands[1]]))
        elif x.opcode in ("fusion", "async-start"):
            (called,) = x.called("calls")
            computation = self._program.computations[called]
            root = computation.root
            made = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
            if len(made) == len(results):
                for value, array in zip(made, results, strict=True):
                    yield min(self._size([array]), self._made_anew(computation, value, array))
            else:
                yield self._size(results)
        else:
            yield self._size(results)

    def _made_anew(self, inside: Computation, value: Instruction, array: Array) -> int:
        """Bytes of a result of a fusion that it writes: an updated slice, nothing, or all."""
        while value.opcode in _RENAMES:
            value = inside[value.operands[0]]
        if value.opcode == "dynamic-update-slice":
            return _padded_size(inside[value.operands[1]])
        if value.opcode == "parameter" or value.opcode in KINDS:
            return 0
        if value.opcode == "fusion":
            (called,) = value.called("calls")
            nested = self._program.computations[called]
            if nested.root.opcode != "tuple":
                return self._made_anew(nested, nested.root, array)
        return array.bytes

    def _only_copies(self, x: Instruction) -> bool:
        if x.opcode != "fusion":
            return x.opcode in ("copy", "transpose")
        (called,) = x.called("calls")
        return {inner.opcode for inner in self._program.computations[called].values()} <= _LAYOUT


def _free(x: Instruction) -> bool:
    waits = x.opcode.endswith(("-done", "-update"))
    return x.opcode in _FREE or waits or _target(x) in _FREE_CALLS


def _target(x: Instruction) -> str | None:
    """The name of what a custom call calls."""
    return x.attribute(r'custom_call_target="([^"]*)"') if x.opcode == "custom-call" else None


def _made(x: Instruction, inside: Computation) -> tuple[Array, ...]:
    """The result of an instruction.

    The first half of an asynchronous one has the result of the second.
    """
    if (_target(x) or "").startswith("__cublas"):
        return x.results[:1]  # what follows is room to work in
    if not x.opcode.endswith("-start"):
        return x.results
    done = [user for user in inside.users[x.name] if user.opcode.endswith("-done")]
    return done[0].results if done else x.results


def _padded_size(x: Instruction) -> int:
    return sum(array.bytes for array in x.results)
