"""How fast is an evaluation? Images a second of the evaluation step, on synthetic pixels.

    python benchmarks/evaluation.py --models crate_base_patch16_224:256 --dtype bfloat16

The step is that of `python -m crate_jax evaluate`: stored pixels (uint8) are normalised, classified
and counted on the device. Once with the batch on the device already, once with the batch handed
over from the host before each call. Both take turns, round by round. The last line is JSON;
--output writes it, and the table beside it as Markdown.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Program, start
from frame import Result, command_line, parse_models, publish, table
from timing import race

from crate_jax import create_model
from crate_jax.tasks import Classify


def measure(name: str, batch_size: int, dtype: str, rounds: int) -> Result:
    """Images a second both ways, the seconds of the first call, and the memory."""
    model = create_model(name, dtype=jnp.dtype(dtype))
    task, params = Classify(model), start(model).params
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, *model.input_shape), np.uint8),
        "label": rng.integers(0, model.num_classes, batch_size, np.int32),
        "mask": np.ones(batch_size, np.float32),
    }
    sums = Program(lambda params, batch: task.sums(params, (), batch))
    on_device = jax.device_put(batch)
    if float(sums(params, on_device)["examples"]) != batch_size:
        sys.exit(f"{name} must count {batch_size} examples; got another number.")
    runs = {
        "on_device": lambda: sums(params, on_device),
        "from_host": lambda: sums(params, jax.device_put(batch)),
    }
    seconds = {way: statistics.median(of) for way, of in race(runs, rounds).items()}
    rates = {f"images_per_s_{way}": batch_size / of for way, of in seconds.items()}
    return {"batch_size": batch_size, "memory_bytes": sums.memory()} | rates


def report(result: Result) -> list[str]:
    """The table, and how it is read."""
    rows = (
        f"{name} | {row['batch_size']} | {row['images_per_s_on_device']:.4g} | "
        f"{row['images_per_s_from_host']:.4g} | {row['memory_bytes'] / 1e6:,.0f}"
        for name, row in result["models"].items()
    )
    heads = "model | batch | images/s, on the device | images/s, from the host | memory, MB"
    return [*table(heads, rows), "", "{dtype}; medians of {rounds} rounds.".format_map(result)]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(__doc__, rounds=7, batch_size=8, dtypes=True)
    parser.add_argument(
        "--models", type=parse_models, required=True, help="name or name:batch_size, by commas"
    )
    args = parser.parse_args()
    found = {
        name: measure(name, own or args.batch_size, args.dtype, args.rounds)
        for name, own in args.models.items()
    }
    publish(args, {"models": found}, report=report)


if __name__ == "__main__":
    main()
