"""What does measuring the objective of every layer cost, beside a plain forward pass?

    python benchmarks/measure.py --output benchmarks/results/measure_cpu_2core.json

R, R^c, ΔR, sparsity and LASSO of CRATE-B/16 on 256 images, as `crate_jax.analysis.measure` gives
them, against the forward pass on the same images in the same batches: medians of runs that take
turns. The geometry (ranks, angles, entropy) and the rates of the tokens that enter are timed apart,
once.
Weights are random: the time does not hang on them. The same measures by QR on the device
(`crate_jax.analysis.layerwise`) stand beside.
"""

import functools
import statistics
from typing import Any

import jax
import numpy as np
from frame import command_line, positive, publish
from timing import race

import crate_jax
from crate_jax.analysis import layerwise, measure
from crate_jax.analysis.measured import GEOMETRY, HALVES, OBJECTIVE


def main() -> None:
    """Time each, and publish the ratios."""
    parser = command_line(__doc__, rounds=3, model="crate_base_patch16_224", batch_size=16)
    parser.add_argument("--images", type=positive, default=256, help="how many are measured")
    args = parser.parse_args()
    model: Any = crate_jax.create_model(args.model)
    images = np.asarray(
        jax.random.normal(jax.random.key(0), (args.images, *model.input_shape)), np.float32
    )
    batches = np.split(images, args.images // args.batch_size)
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(1), images[:1])["params"]
    forward = jax.jit(lambda params, images: model.apply({"params": params}, images, train=False))
    by_qr = jax.jit(functools.partial(layerwise, model))

    def of(names):
        return lambda: measure(model, params, batches, names)

    def over_all(function):
        return [jax.block_until_ready(function(params, batch)) for batch in batches]

    beside = {
        "forward": lambda: over_all(forward),
        "objective": lambda: measure(model, params, batches, OBJECTIVE),
    }
    apart = {"by_qr": lambda: over_all(by_qr), "halves": of(HALVES)}
    apart |= {name: of((name,)) for name in GEOMETRY}
    for run in (beside | apart).values():
        run()  # compiles
    seconds = {**race(beside, args.rounds, finish=lambda _: None)}
    seconds |= race(apart, 1, finish=lambda _: None)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = {name: time / medians["forward"] for name, time in medians.items()}
    publish(args, {"seconds": medians, "ratio_to_forward": ratio})


if __name__ == "__main__":
    main()
