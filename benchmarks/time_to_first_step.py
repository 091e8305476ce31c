"""How long a training step takes to trace and compile, cold and from the persistent cache.

    python benchmarks/time_to_first_step.py --model crate_base_patch16_224 --batch-size 16

Every measurement is a process of its own; cold ones start with an empty cache, warm ones with what
the cold one left. Medians over the rounds; the last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
from frame import child, command_line, publish

from crate_jax import create_model
from crate_jax.tasks import Classify
from crate_jax.training.state import init_state
from crate_jax.training.step import make_train_step


def measure(model_name: str, batch_size: int) -> dict[str, float]:
    """Seconds to trace and to compile, in this process."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    model, tx = create_model(model_name), optax.adamw(1e-3)
    task = Classify(model, label_smoothing=0.1)
    key = jax.random.key(0)
    start = time.perf_counter()
    state = jax.eval_shape(lambda key: init_state(task, tx, key), key)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *model.input_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    step = jax.jit(make_train_step(task, tx), donate_argnums=0)
    lowered = step.lower(state, batch, key)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}


def main() -> None:
    """Run the processes and print their medians."""
    parser = command_line(__doc__, model="crate_base_patch16_224", batch_size=16, rounds=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.model, args.batch_size)))
        return
    options = [f"--model={args.model}", f"--batch-size={args.batch_size}"]
    runs: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for times in runs.values():
                parts = child(__file__, "--child", *options, JAX_COMPILATION_CACHE_DIR=cache)
                times.append(sum(parts.values()))
    medians = {kind: statistics.median(times) for kind, times in runs.items()}
    publish(args, medians | {"runs": runs})


if __name__ == "__main__":
    main()
