"""The shared frame of every command: its end, and the folder of compiled programs."""

import json
import logging
import math
import os
import platform
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import absl.flags
import absl.logging
import jax

from crate_jax import interrupts
from crate_jax.cli.bars import shown
from crate_jax.cli.mistakes import complain, text
from crate_jax.errors import is_mistake
from crate_jax.files import Json, cache_folder, expanded, raise_open_files
from crate_jax.machine import explained
from crate_jax.parallel import LostProcess
from crate_jax.streams import failure, secure_streams, tolerant

JUDGED = ("within_tolerance", "intact", "works")  # what a result may say of its subject
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; schedulers restart on any status but 0


def run_command(command: Callable[[], Json], *, kept: bool = False) -> int:
    """Run a command: its result is the last line of stdout, a user's mistake one line of stderr.

    A mistake is an error that this project raises itself, or one of the operating system about a
    file; the machine's own errors are told like it. Any other is a bug and keeps its trace.

    A reader who leaves early, as ``head`` does, changes neither what is done nor the status: the
    status says what the command did. A full disk behind stdout does where the result is lost.

    Args:
        command: returns the result.
        kept: whether files hold what the command did, and nothing is lost with its result.

    Returns:
        Exit status: 0; 1 if the result says no to one of `JUDGED`; 2 for a mistake; `TRY_AGAIN` for
        a run that was told to stop and is saved, 130 for a command that was interrupted otherwise.
    """
    secure_streams()
    quiet_libraries()
    raise_open_files()
    try:
        with interrupts.raising(), shown():
            result = command()
    except KeyboardInterrupt as error:
        complain(str(error) or interrupts.LINE)
        interrupts.told()
        return TRY_AGAIN if error.args else interrupts.INTERRUPTED
    except LostProcess as error:
        complain(str(error))
        _leave(TRY_AGAIN)
    except Exception as error:
        line = text(error) if is_mistake(error) else explained(error)
        if line is not None:
            status = complain(line)
        elif jax.distributed.is_initialized():
            traceback.print_exc()
            status = 1
        else:
            raise
        if jax.distributed.is_initialized():
            _leave(status)
        return status
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    if not kept and (lost := failure(sys.stdout)):
        return complain(f"stdout must take the result; it did not ({lost}). Run again elsewhere.")
    return 0 if all(result.get(name, True) for name in JUDGED) else 1


def _leave(status: int) -> NoReturn:
    """End a process of several at once, which ends the others.

    On the way out JAX would wait for them, minutes, and they for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def quiet_libraries() -> None:
    """Only errors of Orbax, Grain and TFDS reach the terminal, unless --verbosity asks for more.

    The clients of buckets say nothing there.
    """
    if absl.flags.FLAGS.is_parsed() and absl.flags.FLAGS["verbosity"].present:
        return
    absl.logging.set_verbosity(absl.logging.ERROR)
    for name in ("gcsfs", "google.auth"):  # what they log, they raise as well
        logging.getLogger(name).setLevel(logging.CRITICAL)


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where.

    One folder for each kind of processor: code compiled for one may not run on another that
    shares the home directory.
    """
    given = jax.config.values["jax_compilation_cache_dir"]
    if given:
        given = expanded(given, "JAX_COMPILATION_CACHE_DIR")
        jax.config.update("jax_compilation_cache_dir", given)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        features = sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
        kind = f"{platform.machine()}-{zlib.crc32(repr(features).encode()):08x}"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_folder()) / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _check_cache(jax.config.values["jax_compilation_cache_dir"])


def _check_cache(folder: str) -> None:
    """Keep no programs where none can be kept: JAX would warn of each. Say so in one line.

    A folder that is there and may only be read gives the programs that it has.
    """
    if "://" in folder:  # a bucket
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        tolerant(sys.stderr).write(
            f"compiled programs are not kept: there can be no folder {folder} ({error.strerror}). "
            "JAX_COMPILATION_CACHE_DIR names another.\n"
        )
    else:
        if not os.access(folder, os.W_OK):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
