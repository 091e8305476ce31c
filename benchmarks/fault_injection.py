"""Does a run survive what happens to machines? Faults at random moments of a digits run.

    python benchmarks/fault_injection.py --rounds 6
    python benchmarks/fault_injection.py --rounds 3 --recipes digits,digits:mae
    python benchmarks/fault_injection.py --rounds 10 --bucket gs --faults "kill -9"

Every round starts the same small run with train.py and does one thing to it, at a random step or in
the middle of a save: kill -9, SIGTERM, a file of the newest checkpoint cut short, a file or all of
it deleted, one bit of a file of it flipped, or the disk full for a while. The same command then
goes on; every second time it is struck again, by kill -9 or SIGTERM, while it imports, restores or
compiles, and started once more. At the end the parameters, and what the state holds beside them,
must be, bit for bit, those of a run that nothing happened to, and metrics.jsonl must hold the same
lines. Lost are the steps that were computed again.

With --recipes every one of these has so many rounds, made as small as `SMALL` says of its task.

With --bucket the runs are in a bucket: of an emulator that this program starts, or of a service.
Then a run is killed or told to stop; nothing is done to its files.

A full disk is a small tmpfs with a file that fills it; where none can be mounted (that takes root),
a limit on the size of any file that the run writes. Linux only. The last line is JSON; the exit
status is 1 if a round was not survived.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import jax
from frame import ROOT, command_line, publish

from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli.recipes import DEFAULT, load_recipe
from crate_jax.cli.running import quiet_libraries
from crate_jax.files import located

STEPS, SAVE_EVERY = 180, 15
RUN = [
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint_every_steps={SAVE_EVERY}",
    f"--config.eval_every_steps={3 * SAVE_EVERY}",
    "--config.log_every_steps=1",
    "--config.log_objective_every_steps=0",
    "--config.batch_size=48",
    "--config.optim.warmup_epochs=0",
    "--config.model.width=24",
    "--config.model.depth=2",
]
SCANS = [
    "--config.model.image_size=16,16",
    "--config.data.train_transforms=resize(16)|random_affine(degrees=10)",
    "--config.data.eval_transforms=resize(16)",
]
# By task, beside `RUN`.
SMALL = {
    "classify": SCANS,
    "masked_autoencoding": SCANS,
    "mcr2": [*SCANS, "--config.mcr2.dimension=16"],
    "simdino": [
        *SCANS,
        "--config.simdino.head_hidden=24",
        "--config.simdino.head_features=16",
        "--config.simdino.local_crops=2",
        "--config.simdino.local_size=8",
        "--config.simdino.local_transforms=random_resized_crop(8, min_area=0.2, max_area=0.5)",
        "--config.simdino.bank_size=64",
    ],
    "next_token": ["--config.model.context_length=16"],
}
TWO_SAVED = 3 * SAVE_EVERY + 1  # the step by which the third save has waited for the second
LAST_MOMENT = STEPS - 4 * SAVE_EVERY  # early enough to strike before the end
SAVE_S = 0.15  # about as long as a save takes
AGAIN = 0.5  # the share of restarts that are struck while they start
DISK_MIB = 8  # some twenty checkpoints
CLOCK = ("examples_per_s", "data_wait_share")  # in metrics.jsonl, and never the same twice

# With the first step at which each may strike: damage must leave a checkpoint to go back to.
FAULTS: dict[str, tuple[Callable[[random.Random, faults.Training], str], int]] = {
    "kill -9": (faults.kill, 1),
    "SIGTERM": (faults.terminate, 1),
    "truncation": (faults.truncate, TWO_SAVED),
    "deletion": (faults.delete, TWO_SAVED),
    "flipped bit": (faults.flip, TWO_SAVED),
    "full disk": (faults.fill_disk, 1),
}
IN_BUCKETS = ("kill -9", "SIGTERM")


def lines(workdir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says but for the clock; a line that is half written is left out."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
    return found


def flags_of(recipe: str) -> list[str]:
    """Those of a small run of a recipe.

    Raises:
        FileNotFoundError, KeyError, ValueError: there is none, or `SMALL` does not know its task.
    """
    if (task := load_recipe(recipe).task) not in SMALL:
        known = ", ".join(SMALL)
        raise ValueError(f"the task of {recipe} must be among {known}; got {task}. Add it there.")
    return [f"--config={recipe}", *RUN, *SMALL[task]]


def last_state(workdir: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every array that the run has learnt by its last step, by path."""
    params, extra, _ = read_trained(workdir, STEPS)
    leaves = jax.tree.leaves_with_path((params, extra))
    return {jax.tree_util.keystr(k): (str(x.dtype), x.shape, x.tobytes()) for k, x in leaves}


def wait_for_moment(rng: random.Random, run: faults.Training, first: int) -> int:
    """Until a random step, or until some time in the save that follows it; the step reached."""
    step = rng.randint(first, LAST_MOMENT)
    run.wait_until(lambda: run.step >= step)
    if rng.random() < 0.5:
        run.wait_until(lambda: faults.is_saving(run.workdir))
        time.sleep(rng.uniform(0, SAVE_S))
    return run.step


@contextlib.contextmanager
def new_folder(fault: str, scratch: Path) -> Iterator[Path]:
    """An empty folder, on a small disk of its own if that is to be full and can be mounted."""
    folder = scratch / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = (
        fault == "full disk"
        and shutil.which("mount")
        and subprocess.run(mount, capture_output=True).returncode == 0
    )
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def bucket(asked: str | None) -> Iterator[Path | None]:
    """A folder in a bucket, of an emulator that runs meanwhile or of a service; or None."""
    if asked is None or "://" in asked:
        yield located(asked, "--bucket") if asked else None
        return
    sys.path.append(str(ROOT / "tests"))
    import emulators

    with emulators.running(asked) as variables:
        os.environ.update(variables)
        yield located(f"{asked}://{emulators.BUCKET}/faults", "--bucket")


def play(
    fault: str,
    flags: list[str],
    rng: random.Random,
    scratch: Path,
    whole: tuple[Any, Any],
    runs: Path | None,
) -> dict[str, Any]:
    """One round.

    Args:
        fault: one of `FAULTS`.
        flags: of the run.
        rng: of this round alone.
        scratch: folder for all that it writes on this machine.
        whole: last state and lines of the run that nothing happened to.
        runs: where the run is; None: in the scratch folder.

    Returns:
        A row of the result; it has a ``problem`` if the round was not survived.
    """
    inject, first = FAULTS[fault]
    row: dict[str, Any] = {"fault": fault, "identical": False, "steps_lost": 0, "again": []}
    flags = [*flags, f"--config.on_failed_save={rng.choice(('stop', 'continue'))}"]
    with new_folder(fault, scratch) as folder:
        workdir = runs or folder / "run"
        try:
            with faults.Training(workdir, scratch / "compiled", *flags) as run:
                run.wait_until(lambda: run.has_stepped)
                start_up_s = run.age_s
                row["at_step"] = wait_for_moment(rng, run, first)
                row["what"] = inject(rng, run)
            reached = run.step
            while run.process.returncode != 0:
                with faults.Training(workdir, scratch / "compiled", *flags) as run:
                    if rng.random() < AGAIN:
                        row["again"].append(faults.strike_start(rng, run, start_up_s))
                    else:
                        run.end(0)
                if run.resumed_from is not None:
                    row["resumed_from"] = run.resumed_from
                    row["steps_lost"] += reached - run.resumed_from
                    reached = max(run.resumed_from, run.step)
            row["identical"] = last_state(workdir) == whole[0]
            if not row["identical"]:
                raise faults.NotSurvivedError("another state")
            if lines(workdir) != whole[1]:
                raise faults.NotSurvivedError("other lines in metrics.jsonl")
        except (faults.NotSurvivedError, ValueError, OSError) as error:
            row["problem"] = " ".join(str(error).split())
    return row


def left_alone(flags: list[str], workdir: Path, compiled: Path) -> tuple[Any, Any]:
    """Last state and lines of a run that nothing happens to."""
    with faults.Training(workdir, compiled, *flags) as run:
        run.end(0)
    return last_state(workdir), lines(workdir)


def main() -> int:
    """Of every recipe the run that nothing happens to, then its rounds; returns the exit status."""
    parser = command_line(__doc__, rounds=30)
    parser.add_argument("--recipes", default=DEFAULT, help="as for train's --config, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of what happens, and when")
    parser.add_argument("--faults", help=f"some of them, with commas: {','.join(FAULTS)}")
    parser.add_argument("--bucket", help="gs or s3: an emulator's; or gs://… or s3://…, new there")
    args = parser.parse_args()
    quiet_libraries()
    start, order = time.perf_counter(), random.Random(args.seed)
    possible = IN_BUCKETS if args.bucket else tuple(FAULTS)
    chosen = args.faults.split(",") if args.faults else possible
    if not set(chosen) <= set(possible):
        parser.error(f"--faults must be of {','.join(possible)}; got {args.faults}")
    try:
        recipes = {recipe: flags_of(recipe) for recipe in args.recipes.split(",")}
    except (FileNotFoundError, KeyError, ValueError) as error:
        parser.error(str(error.args[0]))
    played = [recipe for recipe in recipes for _ in range(args.rounds)]
    kinds = [kind for _ in played for kind in order.sample(chosen, len(chosen))]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, bucket(args.bucket) as runs:
        scratch = Path(name)
        for i, (recipe, kind) in enumerate(zip(played, kinds, strict=False), start=1):
            flags = recipes[recipe]
            if (i - 1) % args.rounds == 0:
                whole = left_alone(flags, scratch / f"whole{i}", scratch / "compiled")
            there = runs / str(i) if runs else None
            rng = random.Random(f"{args.seed} {i}")
            rows.append({"recipe": recipe} | play(kind, flags, rng, scratch, whole, there))
            print(f"round {i} of {len(played)}:", json.dumps(rows[-1]), flush=True)
    survived = sum("problem" not in row for row in rows)
    found = {
        "rounds": len(rows),
        "survived": survived,
        "identical": sum(row["identical"] for row in rows),
        "struck_while_starting": sum(len(row["again"]) for row in rows),
        "steps_lost": sum(row["steps_lost"] for row in rows),
        "steps_lost_most": max((row["steps_lost"] for row in rows), default=0),
        "steps": STEPS,
        "save_every_steps": SAVE_EVERY,
        "seconds": round(time.perf_counter() - start),
        "runs": rows,
    }
    services = {"gs": ("gcsfs", "gcp-storage-emulator"), "s3": ("s3fs", "moto")}
    packages = ["tensorstore", *services.get((args.bucket or "")[:2], ())] if args.bucket else []
    publish(args, found, "orbax-checkpoint", *packages)
    return 0 if survived == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
