"""Running the project's commands as programs of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]

# Tests mostly compile, so they compile slow code fast, unless this is set, and so do the programs
# that they start unless told otherwise. jax 0.10 has two ways to emit fused code for CPUs, of which
# the older compiles in two thirds of the time; jax 0.11 has one, and no such flag.
OPTIMISED = os.environ.get("CRATE_JAX_TESTS_OPTIMISED") == "1"
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""

# Seconds after which a program counts as stuck, many times what one takes: a busy machine needs
# them, and where all is well nobody waits for them. pyproject.toml has those of a whole test.
LIMIT_S = 600

# A run of train.py that takes seconds: every field but these is the digits recipe's.
TINY = [
    "--config.model.width=24",
    "--config.model.depth=2",
    "--config.model.image_size=16,16",
    "--config.data.train_transforms=resize(16)|random_affine(degrees=10)",
    "--config.data.eval_transforms=resize(16)",
    "--config.batch_size=48",
    "--config.optim.warmup_epochs=0",
    "--config.log_every_steps=1",
    "--config.eval_every_steps=4",
    "--config.log_objective_every_steps=0",
]


def environment(devices=1, optimised=OPTIMISED):
    """Of a command: so many CPU devices, and whether it compiles as a user's does."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimised),
        "XLA_FLAGS": flags if optimised else f"{flags} {OLD_EMITTERS}",
    }


def start(*arguments, devices=1, group=False, optimised=OPTIMISED):
    """A command in the background, its output piped; as a process group of its own if asked for."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices, optimised),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def wait_for(count, text, workdir, *processes):
    """Until a run has logged a text so often; its processes must live meanwhile."""
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (log.exists() and log.read_text().count(text) >= count):
        assert all(p.poll() is None for p in processes), processes[0].stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def run(*arguments, devices=1, optimised=OPTIMISED):
    """A command to its end: (exit status, stdout, stderr)."""
    process = start(*arguments, devices=devices, optimised=optimised)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err
