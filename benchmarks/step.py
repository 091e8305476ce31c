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
compile is left out, and listed with the reason under "omitted". Use an idle machine: the load on it
before the start is in the JSON.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Both frameworks share the accelerator's memory; JAX would take three quarters of it at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# PyTorch's waiting CPU threads spin by default, which made it up to ten times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# `python benchmarks/step.py` puts benchmarks/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from contenders import Contender, finish, make_contenders
from hardware import copy_bytes_per_s, describe_cpu, large_product
from publish import publish
from step_table import report
from timing import race

from crate_jax import create_model, list_models
from crate_jax.models.cost import multiply_adds, step_flops

# Share of the largest logit, and of the loss. In bfloat16 the 24 layers of CRATE-L come to 5e-2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it


def first_calls(at: str, contenders: dict[str, Contender], dtype: str, omitted: dict) -> dict:
    """Seconds of the first call of each, which compiles, and bytes at the height of another one.

    Refuses to time functions that differ. What PyTorch cannot compile is taken out of the
    contenders, and the reason noted.
    """
    numbers, expected = {}, np.zeros(())
    for name, contender in list(contenders.items()):
        start = time.perf_counter()
        try:
            first = finish(contender.run())
        except Exception as error:
            if name != "compile":
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            omitted[f"{at}/ratio_{name}"] = f"{type(error).__name__}: {reason}"
            del contenders[name]
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


def measure(
    name: str, batch_size: int, args: argparse.Namespace, omitted: dict[str, str]
) -> dict[str, float]:
    """All numbers of one model, the keys as in the JSON."""
    model = create_model(name, dtype=jnp.dtype(args.dtype))
    flops = {"forward": 2 * multiply_adds(model), "train": step_flops(model)}
    product, product_flops = large_product(args.dtype)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    numbers = {}
    for mode, contenders in make_contenders(model, batch_size, device).items():
        at = f"{name}/{mode}"
        found = first_calls(at, contenders, args.dtype, omitted)
        runs = {who: contender.run for who, contender in contenders.items()}
        times = race(runs | {"product": product}, args.rounds, finish)

        def ratios(other: str, to: dict[str, list[float]] = times) -> list[float]:
            return [b / a for a, b in zip(to["ours"], to[other], strict=True)]

        found["images_per_s"] = batch_size / statistics.median(times["ours"])
        for other in list(contenders)[1:]:
            found[f"images_per_s_{other}"] = batch_size / statistics.median(times[other])
            found[f"ratio_{other}"] = statistics.median(ratios(other))
            found[f"lowest_ratio_{other}"] = min(ratios(other))
            found[f"highest_ratio_{other}"] = max(ratios(other))
        share = flops[mode] * batch_size / product_flops
        found["share_of_peak"] = share * statistics.median(ratios("product"))
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


def describe(args: argparse.Namespace, batch_sizes: dict[str, int]) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "cpu": describe_cpu(),
            "torch_threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "load_average_before": round(LOAD, 2),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax", "torch", "numpy")},
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "batch_sizes": batch_sizes,
        "dtype": args.dtype,
        "rounds": args.rounds,
    }


def summarise(numbers: dict[str, float], copied: float) -> dict[str, Any]:
    """The numbers of the models so far, and the peaks, in five digits."""
    peaks = [value for key, value in numbers.items() if key.endswith("/peak_flops_per_s")]
    peak = {"peak_flops_per_s": statistics.median(peaks), "copy_bytes_per_s": copied}
    return {
        key: value if isinstance(value, int) else float(f"{value:.5g}")
        for key, value in (numbers | peak).items()
    }


def parse_models(text: str, default: int) -> dict[str, int]:
    """Batch size by name, of ``name,name:batch_size,...``.

    Raises:
        ValueError: no such model, one named twice, or what is no batch size.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, colon, own = item.partition(":")
        if name not in list_models():
            raise ValueError(f"--models must be among {', '.join(list_models())}; got {name}.")
        if name in sizes:
            raise ValueError(f"--models must name {name} once; run the other batch size apart.")
        if colon and not own.isdecimal():
            raise ValueError(f"--models must say name:batch_size; got {item}.")
        sizes[name] = int(own) if colon else default
    return sizes


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", required=True, help="name or name:batch_size, by commas")
    parser.add_argument("--batch-size", type=int, default=8, help="of models that have no other")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="a .json file; the table goes beside it as .md")
    args = parser.parse_args()
    try:
        batch_sizes = parse_models(args.models, args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    if min(*batch_sizes.values(), args.rounds) < 1:
        parser.error("batch sizes and --rounds must be at least 1.")
    if args.output and args.output.suffix != ".json":
        parser.error(f"--output must end in .json; got {args.output}.")

    numbers: dict[str, float] = {}
    omitted: dict[str, str] = {}
    done: dict[str, int] = {}
    # An empty cache of torch.compile, so that each first call compiles.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        prepare(args.dtype)
        copied = copy_bytes_per_s()
        for name, batch_size in batch_sizes.items():
            torch.compiler.reset()
            numbers |= measure(name, batch_size, args, omitted)
            done[name] = batch_size
            result = summarise(numbers, copied) | describe(args, done)
            if omitted:
                result["omitted"] = omitted
            publish(result, report(result), args.output)


if __name__ == "__main__":
    main()
