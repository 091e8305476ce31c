"""How long a training step takes to trace and compile, cold and from the persistent cache.

    python benchmarks/time_to_first_step.py --model crate_base_patch16_224 --batch-size 16

Every measurement is a process of its own; cold ones start with an empty cache, warm ones with what
the cold one left. Medians over the rounds; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import describe_cpu


def measure(model_name: str, batch_size: int) -> dict[str, float]:
    """Seconds to trace and to compile, in this process."""
    import jax
    import jax.numpy as jnp
    import optax

    from crate_jax import create_model
    from crate_jax.tasks import Classify
    from crate_jax.training.state import init_state
    from crate_jax.training.step import make_train_step

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    model, tx = create_model(model_name), optax.adamw(1e-3)
    task = Classify(model, label_smoothing=0.1)
    key = jax.random.key(0)
    start = time.perf_counter()
    state = jax.eval_shape(lambda key: init_state(task, tx, key), key)
    side = model.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    step = jax.jit(make_train_step(task, tx), donate_argnums=0)
    lowered = step.lower(state, batch, key)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}


def main() -> None:
    """Run the processes and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crate_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the JSON there too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.model, args.batch_size)))
        return

    command = [sys.executable, __file__, "--child", f"--model={args.model}"]
    command.append(f"--batch-size={args.batch_size}")
    root = str(Path(__file__).parents[1])
    runs: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": root}
            for kind in runs:
                out = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                runs[kind].append(sum(json.loads(out.stdout.splitlines()[-1]).values()))
    import jax

    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        **{kind: round(statistics.median(values), 2) for kind, values in runs.items()},
        "runs": {kind: [round(v, 2) for v in values] for kind, values in runs.items()},
        "hardware": f"{describe_cpu()}, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
