"""What the model's settings cost: the training step with each, in time and memory.

    python benchmarks/variants.py --model crate_base_patch16_224 --batch-size 256 --dtype bfloat16

The training step that `step.py` times, ours alone, with attention by other kernels, with the
backward pass by automatic differentiation, with parts of the forward pass computed again, and with
one or all layers in an iteration of the loop. All take turns, round by round; a ratio is the median
over the rounds of the first one's time by theirs, and the lowest and highest stand beside it. The
memory is the arguments and the temporary arrays of the compiled step; the first call traces and
compiles. What the device does not run, or has too little memory for, is left out and listed under
"omitted". The last line is JSON; --output writes it, and the table beside it as Markdown.
"""

import argparse
import itertools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from contenders import training_step
from frame import Result, command_line, positive, publish, table
from timing import finish, quotients, race, spread

from crate_jax import create_model

ONE = {"scan_unroll": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "attention by cudnn": {"attention_kernel": "cudnn"},
    "one layer at a time": ONE,
    "all layers at a time": {"scan_unroll": 0},  # 0 stands for the depth
    "attention by xla": {"attention_kernel": "xla"},
    "attention by xla, one layer at a time": {"attention_kernel": "xla"} | ONE,
    "autodiff, one layer at a time": {"backward": "autodiff"} | ONE,
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}  # of the loss after an update, as in step.py


def measure(args: argparse.Namespace) -> Result:
    """One row a variant, and what was left out."""
    rows: dict[str, Result] = {}
    runs, omitted, expected = {}, {}, None
    for name, changes in itertools.islice(VARIANTS.items(), args.settings):
        model = create_model(args.model, dtype=jnp.dtype(args.dtype))
        changes = {k: v or model.depth for k, v in changes.items()}
        try:
            step = training_step(model.clone(**changes), args.batch_size)
            start = time.perf_counter()
            finish(step.run())
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if isinstance(error, ValueError) and "attention_kernel" not in str(error):
                raise
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
        middle = statistics.median(of)
        rows[name] |= {"seconds": middle, "images_per_s": args.batch_size / middle}
        rows[name] |= spread("ratio", quotients(base, of))
    return {"variants": rows, "omitted": omitted}


def report(result: Result) -> list[str]:
    """The table, and how it is read."""
    heads = "training step | ms | images/s | speed | memory, MB | first call, s"
    rows = (
        f"{name} | {1e3 * row['seconds']:.4g} | {row['images_per_s']:.4g} | {row['ratio']:.2f} "
        f"({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}) | "
        f"{row['memory_bytes'] / 1e6:,.0f} | {row['first_s']:.1f}"
        for name, row in result["variants"].items()
    )
    what = "{model}, batch {batch_size}, {dtype}; medians of {rounds} rounds.".format_map(result)
    return [*table(heads, rows), "", what]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(
        __doc__, model="crate_base_patch16_224", batch_size=8, dtypes=True, rounds=7
    )
    parser.add_argument(
        "--settings", type=positive, default=len(VARIANTS), help="how many of them, from the first"
    )
    args = parser.parse_args()
    if args.dtype == "float32":  # on a GPU JAX would round the operands to TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_enable_compilation_cache", False)
    publish(args, measure(args), "optax", report=report)


if __name__ == "__main__":
    main()
