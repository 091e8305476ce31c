"""How fast is a step? Ours against PyTorch, eager and compiled, on the same device.

Forward pass (inference) and full training step (loss with label smoothing 0.1, gradients, AdamW) of
the Flax model, under `jax.jit` with donated state, and of the same model in PyTorch
(`crate_jax.parity.torch_reference`, the official operations). Both get the same weights, the same
batch, already on the device, and the same precision: float32 products at full precision in both, or
float32 weights with bfloat16 products, each as its users have it: ours keeps the tokens between
layers in bfloat16 too, PyTorch's autocast keeps them in float32 and moves more bytes. All
contenders live in one process and take turns, round by round; a ratio is the median over the rounds
of their time by ours in that round, so that what slows the machine for a while slows all of them;
the lowest and the highest of these stand beside it. Before the clock starts, logits must agree, and
the losses of two steps.

    python benchmarks/step.py --models crate_tiny_patch16_224:16,crate_base_patch16_224:8

A name may be followed by the batch size of that model. A ratio > 1 means that ours is faster.
Besides, of each contender: the seconds of the first call, with all tracing and compiling, and
nothing taken from a cache on the disk; and the bytes at the height of a call (ours: arguments and
temporary arrays of the compiled program; PyTorch's on a GPU only, for on a CPU it does not count
them). And of ours the share of the peak: the operations of the matrix products, by formula, a
second, by those of one large product of the same dtype, which takes its turn in the same rounds.

The last line is a JSON object; --output writes it into a file, and the table beside it as Markdown,
after each model anew: a run that is stopped keeps the models that are done. What PyTorch could not
compile, or has too little memory for beside the others, is left out, and listed with the reason
under "omitted". Use an idle machine: the load on it before the start is in the JSON.
"""

import argparse
import contextlib
import gc
import math
import os
import statistics
import sys
import tempfile
import time

# Both frameworks share the accelerator's memory; JAX would take three quarters of it at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# PyTorch's waiting CPU threads spin by default, which made it up to ten times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from contenders import Contender, ours, random_batch, start, variables_of
from frame import Result, command_line, parse_models, publish, table
from timing import copy_bytes_per_s, finish, large_product, quotients, race, spread
from torch_contenders import theirs

from crate_jax import create_model
from crate_jax.models.cost import multiply_adds, step_flops

# Share of the largest logit, and of the loss. In bfloat16 the 24 layers of CRATE-L come to 5e-2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
MODES = ("forward", "train")
NAMES = ("ours", "eager", "compile")
HEADS = "model | batch | mode | ours, images/s | eager | compile | ratio to eager"
HEADS += " | ratio to compile | memory, MB | first call, s | share of peak"


def first_calls(at: str, contenders: dict[str, Contender], dtype: str, omitted: dict) -> Result:
    """Seconds of the first call of each, which compiles, and bytes at the height of another one.

    Refuses to time functions that differ. What PyTorch cannot do is taken out of the contenders,
    and the reason noted.
    """
    numbers, expected = {}, np.zeros(())
    for name, contender in list(contenders.items()):
        start = time.perf_counter()
        try:
            first = finish(contender.run())
        except Exception as error:
            if name == "ours":
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            omitted[f"{at}/ratio_{name}"] = f"{type(error).__name__}: {reason}"
            del contenders[name]
            release()
            continue
        numbers[f"first_s_{name}"] = time.perf_counter() - start
        # The second loss is that after an update: it tells whether the gradients agree, too.
        result = np.stack([first, finish(contender.run())])
        if name == "ours":
            expected = result
        error = float(np.abs(expected - result).max() / np.abs(expected).max())
        if not error <= TOLERANCE[dtype]:
            limit = TOLERANCE[dtype]
            sys.exit(f"{at} of {name} must agree to {limit:g} of its scale; got {error:.1e}.")
        memory = contender.memory()
        if memory is not None:
            numbers[f"memory_bytes_{name}"] = memory
    return numbers


def release() -> None:
    """Give back what PyTorch keeps of the GPU's memory for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(name: str, batch_size: int, args: argparse.Namespace, omitted: dict) -> Result:
    """All numbers of one model, the keys as in the JSON."""
    model = create_model(name, dtype=jnp.dtype(args.dtype))
    flops = {"forward": 2 * multiply_adds(model), "train": step_flops(model)}
    product, product_flops = large_product(args.dtype)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    state, batch = start(model), random_batch(model, batch_size)
    ways = {"ours": ours(model, state, batch)} | theirs(model, variables_of(state), batch, device)
    numbers = {}
    for mode in MODES:
        at, contenders = f"{name}/{mode}", {who: of[mode] for who, of in ways.items()}
        found = first_calls(at, contenders, args.dtype, omitted)
        runs = {who: contender.run for who, contender in contenders.items()}
        times = race(runs | {"product": product}, args.rounds, finish)
        found["images_per_s"] = batch_size / statistics.median(times["ours"])
        for other in list(contenders)[1:]:
            found[f"images_per_s_{other}"] = batch_size / statistics.median(times[other])
            found |= spread(f"ratio_{other}", quotients(times[other], times["ours"]))
        share = flops[mode] * batch_size / product_flops
        found["share_of_peak"] = share * statistics.median(
            quotients(times["product"], times["ours"])
        )
        found["peak_flops_per_s"] = product_flops / statistics.median(times["product"])
        numbers |= {f"{at}/{key}": value for key, value in found.items()}
    return numbers


def prepare(dtype: str) -> None:
    """Set both frameworks to the same device and precision, and to compiling all that is asked."""
    backend = jax.default_backend()
    if backend == "gpu" and not torch.cuda.is_available():
        sys.exit("PyTorch must have a GPU where JAX has one; got none. Set JAX_PLATFORMS=cpu.")
    if backend not in ("cpu", "gpu"):
        sys.exit(f"The backend must be cpu or gpu; got {backend}. Set JAX_PLATFORMS=cpu.")
    if dtype == "float32":  # on a GPU JAX would round the operands to TF32, and PyTorch would not
        jax.config.update("jax_default_matmul_precision", "highest")
        torch.set_float32_matmul_precision("highest")
    jax.config.update("jax_enable_compilation_cache", False)
    # What torch.compile loads once a process is not the first model's to pay for.
    with contextlib.suppress(Exception):  # that it does not work is each model's to say
        device = "cuda" if backend == "gpu" else "cpu"
        torch.compile(torch.sin)(torch.ones(2, device=device, requires_grad=True))


def row(result: Result, model: str, mode: str) -> str:
    """A line of the table; a dash for what could not be measured."""

    def get(key: str) -> float:
        return result.get(f"{model}/{mode}/{key}", math.nan)

    def ratio(other: str) -> str:
        low, high = get(f"lowest_ratio_{other}"), get(f"highest_ratio_{other}")
        return f"{get(f'ratio_{other}'):.2f} ({low:.2f} to {high:.2f})"

    cells = [
        model,
        str(result["batch_sizes"][model]),
        mode,
        f"{get('images_per_s'):.3g}",
        *(f"{get(f'images_per_s_{other}'):.3g}" for other in NAMES[1:]),
        *map(ratio, NAMES[1:]),
        " / ".join(f"{get(f'memory_bytes_{who}') / 1e6:.0f}" for who in NAMES),
        " / ".join(f"{get(f'first_s_{who}'):.1f}" for who in NAMES),
        f"{get('share_of_peak'):.0%}",
    ]
    line = " | ".join(cells)
    return line.replace("nan (nan to nan)", "-").replace("nan%", "-").replace("nan", "-")


def report(result: Result) -> list[str]:
    """The table, and how it is read."""
    rows = (row(result, model, mode) for model in result["batch_sizes"] for mode in MODES)
    return [
        *table(HEADS, rows, words=3),
        "",
        f"{result['dtype']}; medians of {result['rounds']} rounds, with the lowest and highest "
        "ratio; a ratio > 1 means that ours is faster. PyTorch runs the official operations: three "
        "products in ISTA, softmax and attention apart. Memory and first call: ours / eager / "
        f"compile. The peak: {result['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s in a large matrix "
        f"product, {result['copy_bytes_per_s'] / 1e9:,.0f} GB/s in a copy (read and written).",
    ]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(__doc__, rounds=10, batch_size=8, dtypes=True)
    parser.add_argument(
        "--models", type=parse_models, required=True, help="name or name:batch_size, by commas"
    )
    args = parser.parse_args()
    batch_sizes = {name: own or args.batch_size for name, own in args.models.items()}
    del args.batch_size  # the result has those of the models
    found: Result = {"batch_sizes": {}}
    omitted: dict[str, str] = {}
    # An empty cache of torch.compile, so that each first call compiles.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        prepare(args.dtype)
        found["copy_bytes_per_s"] = copy_bytes_per_s()
        for name, batch_size in batch_sizes.items():
            torch.compiler.reset()
            release()
            found |= measure(name, batch_size, args, omitted)
            found["batch_sizes"][name] = batch_size
            peaks = [of for key, of in found.items() if key.endswith("/peak_flops_per_s")]
            found["peak_flops_per_s"] = statistics.median(peaks)
            publish(
                args,
                found | ({"omitted": omitted} if omitted else {}),
                "optax",
                "torch",
                report=report,
                torch_threads=torch.get_num_threads(),
                omp_wait_policy=os.environ["OMP_WAIT_POLICY"],
            )


if __name__ == "__main__":
    main()
