"""Compiling for devices that are not here: with a line of progress, and once for each program."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.stages import Lowered

from crate_jax.errors import first_line
from crate_jax.files import cache_folder, expanded, written_aside
from crate_jax.machine import lacks_memory
from crate_jax.planning.topology import Topology

_SAY_EVERY_S = 15.0
_KEPT_AS = 2  # what is kept of a program changed so often


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of a compiler for a program.

    Attributes:
        text: the optimised program; empty where it was refused.
        memory: bytes that the compiler sets aside on a device: arguments and what is computed.
        seconds: that compiling took, whenever it was.
        refused: why the program does not fit, in the compiler's words.
    """

    text: str
    memory: int
    seconds: float
    refused: str = ""


def compile_for(
    topology: Topology, lowered: Lowered, say: Callable[[str], None] = lambda text: None
) -> Compiled:
    """Compile for a topology, or read what was made of the same program before.

    Kept is the text, in ``planned`` below the folder of compiled programs: JAX cannot read a
    program back for devices that are not here.

    Args:
        topology: that the program is lowered for.
        lowered: of its devices.
        say: is told now and then that the compiler is still at work.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails, for another reason than memory.
    """
    path = _folder() / f"{_key(topology, lowered)}.json.gz"
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # none, or not whole
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    start = time.monotonic()
    say(f"compiling for {topology.name} with {topology.compiler}; this takes a minute or several")
    with tempfile.TemporaryDirectory() as reports:
        dump = {"xla_dump_to": reports} if topology.platform == "tpu" else {}
        options = topology.options | dump
        try:
            compiled = _watched(lambda: lowered.compile(compiler_options=options), say)
        except jax.errors.JaxRuntimeError as error:
            if not lacks_memory(error):
                raise
            made = Compiled("", 0, round(time.monotonic() - start, 1), first_line(error))
        else:
            seconds = round(time.monotonic() - start, 1)
            made = Compiled(compiled.as_text(), _memory(topology, compiled, reports), seconds)
    with contextlib.suppress(OSError):  # it can be made again
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(made)).encode()))
    return made


def _memory(topology: Topology, compiled: Any, reports: str) -> int:
    """Bytes that a compiled program sets aside on a device.

    libtpu reports them among what it writes down of its work. Its `memory_analysis` counts some of
    them twice: of a program that it accepts for a chip of 15.75 GiB, it says 16.27.

    Raises:
        ValueError: libtpu wrote no report that is understood.
    """
    if topology.platform != "tpu":
        held = compiled.memory_analysis()
        return held.argument_size_in_bytes + held.temp_size_in_bytes
    for report in Path(reports).glob("*.after_optimizations-memory-usage-report.txt"):
        if found := re.search(r"\(color=0\)\s+Total bytes: (\d+)", report.read_text()):
            return int(found[1])
    raise ValueError(
        f"--topology={topology.name} must have a compiler that reports the memory of a program; "
        f"{topology.compiler} does not. pip install 'crate-jax[tpu-compiler]'."
    )


def _folder() -> Path:
    given = jax.config.values["jax_compilation_cache_dir"]
    folder = expanded(given, "JAX_COMPILATION_CACHE_DIR") if given else cache_folder()
    return Path(folder) / "planned"


def _key(topology: Topology, lowered: Lowered) -> str:
    """The key of all that the compiler's work depends on."""
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    options = repr(sorted(topology.options.items()))
    about = [str(_KEPT_AS), topology.name, topology.compiler, *flags, options]
    return hashlib.sha256("\n".join([*about, lowered.as_text()]).encode()).hexdigest()


def _watched(work: Callable[[], Any], say: Callable[[str], None]) -> Any:
    """Call a function in a thread: a compiler does not listen to Ctrl-C."""
    done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            with _without_cache():
                done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    start = time.monotonic()
    while True:
        try:
            result, error = done.get(timeout=_SAY_EVERY_S)
        except queue.Empty:
            say(f"compiling, {time.monotonic() - start:.0f} s")
            continue
        if error is not None:
            raise error
        return result


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """JAX's own cache would keep what it cannot read."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
