"""What the model's settings cost: the training step with each, in time and memory.

    python benchmarks/variants.py --model crate_base_patch16_224 --batch-size 256 --dtype bfloat16

The training step that `step.py` times, ours alone, with the backward pass derived or by automatic
differentiation, with parts of the forward pass computed again, and with all layers unrolled. All
take turns, round by round; a ratio is the median over the rounds of the first one's time by theirs,
and the lowest and highest stand beside it. Memory is the arguments and the temporary arrays of the
compiled step; the first call traces and compiles. A setting that the device has too little memory
for is left out, and listed under "omitted". The last line is JSON; --output writes it, and the
table beside it as Markdown.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `python benchmarks/variants.py` puts benchmarks/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from contenders import TX, Contender, finish, jax_contenders
from hardware import describe_cpu
from publish import publish
from timing import race

from crate_jax import Crate, create_model, list_models
from crate_jax.models.classifier import pair
from crate_jax.training.state import init_state

LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it
VARIANTS: dict[str, dict[str, Any]] = {
    "derived": {},
    "autodiff": {"backward": "autodiff"},
    "derived, remat dots": {"remat": "dots"},
    "derived, remat full": {"remat": "full"},
    "derived, all layers unrolled": {"scan_unroll": 0},  # 0 stands for the depth
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}  # of the loss after an update, as in step.py


def make_step(model: Crate, batch_size: int) -> Contender:
    """The training step on a random batch that is already on the device."""
    rng = np.random.default_rng(0)
    H, W = pair(model.image_size)
    images = rng.normal(size=(batch_size, H, W, model.in_channels)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, batch_size)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    state = jax.jit(lambda key: init_state(model, TX, key))(jax.random.key(0))
    return jax_contenders(model, state, batch)["train"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row a variant, and what was left out."""
    rows: dict[str, dict[str, Any]] = {}
    runs, omitted, expected = {}, {}, None
    for name, changes in VARIANTS.items():
        model = create_model(args.model, dtype=jnp.dtype(args.dtype))
        changes = {k: v or model.depth for k, v in changes.items()}
        step = make_step(model.clone(**changes), args.batch_size)
        start = time.perf_counter()
        try:
            finish(step.run())
        except jax.errors.JaxRuntimeError as error:
            omitted[name] = (str(error).strip().splitlines() or [""])[0]
            continue
        first_s = time.perf_counter() - start
        loss = float(finish(step.run()))
        expected = expected or loss
        if not abs(loss - expected) <= TOLERANCE[args.dtype] * abs(expected):
            sys.exit(f"{name} must come to the loss {expected:.6g}; got {loss:.6g}.")
        runs[name] = step.run
        rows[name] = {"memory_bytes": step.memory(), "first_s": first_s}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    times = race(runs, args.rounds, finish)
    base = next(iter(times.values()))
    for name, of in times.items():
        ratios = [b / a for a, b in zip(of, base, strict=True)]
        rows[name] |= {
            "seconds": statistics.median(of),
            "images_per_s": args.batch_size / statistics.median(of),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
        }
    short = {
        name: {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in row.items()}
        for name, row in rows.items()
    }
    return {"variants": short, "omitted": omitted}


def report(found: dict[str, Any]) -> str:
    """The table as Markdown, and what it was measured on."""
    lines = [
        "| training step | ms | images/s | speed | memory, MB | first call, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {1e3 * row['seconds']:.4g} | {row['images_per_s']:.4g} | {row['ratio']:.2f} "
        f"({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}) | "
        f"{row['memory_bytes'] / 1e6:,.0f} | {row['first_s']:.1f} |"
        for name, row in found["variants"].items()
    ]
    lines += [
        *(f"\nLeft out: {name}: {why}" for name, why in found["omitted"].items()),
        "",
        f"{found['model']}, batch {found['batch_size']}, {found['dtype']}; medians of "
        f"{found['rounds']} rounds. {found['hardware']['cpu']}, {found['hardware']['device']}, "
        f"load before {found['hardware']['load_average_before']}. "
        + ", ".join(f"{name} {v}" for name, v in found["versions"].items()),
        "",
        f"`{found['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description="What the model's settings cost.")
    parser.add_argument("--model", choices=list_models(), default="crate_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a .json file; the table goes beside it as .md")
    args = parser.parse_args()
    if min(args.batch_size, args.rounds) < 1:
        parser.error("--batch-size and --rounds must be at least 1.")
    if args.output and args.output.suffix != ".json":
        parser.error(f"--output must end in .json; got {args.output}.")
    if args.dtype == "float32":  # on a GPU JAX would round the operands to TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_enable_compilation_cache", False)
    found = measure(args) | {
        "model": args.model,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "cpu": describe_cpu(),
            "load_average_before": round(LOAD, 2),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax")},
        "command": " ".join(["python", "benchmarks/variants.py", *sys.argv[1:]]),
    }
    publish(found, report(found), args.output)


if __name__ == "__main__":
    main()
