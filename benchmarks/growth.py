"""Does the cost of a training step grow with depth, batch and tokens as the formula says?

    python benchmarks/growth.py --output growth.json

The float32 training step of CRATE-T that `step.py` times, at several depths, batch sizes and image
sizes, one of these changed at a time. All cases of one sweep live in one process and take turns,
round by round; growth is the median over the rounds of a case's time by that of the middle case in
the same round, which is also the same program in every sweep. Beside it stands the same by formula
(batch times `crate_jax.models.cost.step_flops`), and the quotient of the two: 1 is what the formula
says. The formula counts matrix products alone (no softmax, no norms), and takes them to be equally
fast at every size; what a step costs at any size (AdamW, say) pulls the quotient of small cases up
and of large ones down. So where growth is said to be linear, in depth and batch, the time of each
further layer and image is given too.

Memory is the arguments and the temporary arrays of the compiled step; beside it what of it the
layers keep for the backward pass, by formula (batch times `activation_bytes`).

The last line is a JSON object; --output writes it into a file, and the tables beside it as
Markdown. Use an idle machine: the load on it before the start is in the JSON.
"""

import argparse
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `python benchmarks/growth.py` puts benchmarks/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from contenders import TX, Contender, finish, jax_contenders
from growth_table import UNITS, growth, report, seconds_each
from hardware import describe_cpu
from publish import publish
from timing import race

from crate_jax import Crate, create_model
from crate_jax.models.classifier import pair
from crate_jax.models.cost import activation_bytes, step_flops
from crate_jax.tasks import Classify
from crate_jax.training.state import init_state

LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it
MODEL = "crate_tiny_patch16_224"
BASE = {"depth": 6, "batch_size": 4, "image_size": 224}
SWEEPS = {  # BASE is the middle case of each
    "depth": (3, 6, 12),
    "batch_size": (2, 4, 8),
    "image_size": (64, 128, 224, 384),
}


def make_step(model: Crate, batch_size: int) -> Contender:
    """The training step on a random batch that is already on the device."""
    rng = np.random.default_rng(0)
    H, W = pair(model.image_size)
    images = rng.normal(size=(batch_size, H, W, model.in_channels)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, batch_size)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    state = jax.jit(lambda key: init_state(Classify(model), TX, key))(jax.random.key(0))
    return jax_contenders(model, state, batch)["train"]


def measure(sweep: str, rounds: int) -> dict[str, Any]:
    """One row a case of a sweep, and for depth and batch size what each further one takes."""
    rows, runs, flops = [], {}, []
    for value in SWEEPS[sweep]:
        case = BASE | {sweep: value}
        model = create_model(MODEL, depth=case["depth"], image_size=case["image_size"])
        step = make_step(model, case["batch_size"])
        if not np.isfinite(finish(step.run())):  # this call compiles, before the clock starts
            sys.exit(f"The loss must be finite; got another at {sweep} {value}.")
        runs[str(value)] = step.run
        flops.append(case["batch_size"] * step_flops(model))
        kept = case["batch_size"] * activation_bytes(model)
        case |= {"tokens": model.num_tokens, "memory_bytes": step.memory()}
        rows.append(case | {"activation_bytes_by_formula": kept})
    times = list(race(runs, rounds, finish).values())
    for row, of_case, grown in zip(rows, times, growth(times, flops), strict=True):
        row["seconds"] = statistics.median(of_case)
        row["images_per_s"] = row["batch_size"] / row["seconds"]
        row |= grown
    found: dict[str, Any] = {"cases": [{k: shorten(v) for k, v in row.items()} for row in rows]}
    if sweep in UNITS:
        found["seconds_each"] = [shorten(s) for s in seconds_each(SWEEPS[sweep], times)]
    return found


def shorten(value: float) -> float:
    """Five digits of what is no whole number, as in `step.py`."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a .json file; the tables go beside it as .md")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1.")
    if args.output and args.output.suffix != ".json":
        parser.error(f"--output must end in .json; got {args.output}.")

    # On a GPU JAX would round the operands of float32 products to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    result = {
        "model": MODEL,
        "sweeps": {sweep: measure(sweep, args.rounds) for sweep in SWEEPS},
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "cpu": describe_cpu(),
            "load_average_before": round(LOAD, 2),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "command": " ".join(["python", "benchmarks/growth.py", *sys.argv[1:]]),
        "dtype": "float32",
        "rounds": args.rounds,
    }
    markdown = report(result)
    publish(result, markdown, args.output)


if __name__ == "__main__":
    main()
