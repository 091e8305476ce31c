"""How fast is a step? Ours against PyTorch, eager and compiled, on the same device.

Forward pass (inference) and full training step (loss with label smoothing 0.1, gradients, AdamW) of
the Flax model, under `jax.jit` with donated state, and of the same model in PyTorch
(`crate_jax.interop.torch_reference`, the official operations). Both get the same weights, the same
batch, already on the device, and the same precision: float32 products at full precision in both, or
float32 weights with bfloat16 products (autocast in PyTorch). All contenders live in one process and
take turns, round by round; a ratio is the median over the rounds of their time by ours in that
round, so that what slows the machine for a while slows all of them. Before the clock starts, logits
and losses must agree.

    python benchmarks/step.py --models crate_tiny_patch16_224 --batch-size 8

The last line is a JSON object. A ratio > 1 means that ours is faster. What PyTorch could not
compile is left out of the ratios, and listed with the reason under "omitted". Use an idle machine:
the load on it before the start is in the JSON.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
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
import optax
import torch
import torch.nn.functional as F

from crate_jax import Crate, create_model, list_models
from crate_jax.interop.torch_reference import TorchCrate, from_flax_model
from crate_jax.interop.torch_weights import to_state_dict
from crate_jax.training.state import TrainState, init_state
from crate_jax.training.step import make_train_step

SMOOTHING = 0.1
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY = 4e-4, 0.9, 0.999, 1e-8, 0.1
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # share of the largest logit, and of the loss
LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it
MIN_ROUND_SECONDS = 0.2  # a contender's turn repeats its call until it takes about this long

TX = optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY)

# One call of it does the work (asynchronously, maybe) and returns logits or the loss.
Contender = Callable[[], Any]


def jax_contenders(model: Crate, state: TrainState, batch: dict) -> dict[str, Contender]:
    """Ours: mode to contender."""
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images, train=False))
    step = jax.jit(make_train_step(model, TX, label_smoothing=SMOOTHING), donate_argnums=0)
    key, params = jax.random.key(1), state.params
    held = jax.tree.map(jnp.copy, state)  # donated at each step; params stay for the forward pass

    def train():
        nonlocal held
        held, metrics = step(held, batch, key)
        return metrics["loss"]

    return {"forward": lambda: apply(params, batch["image"]), "train": train}


def torch_contenders(
    make_model: Callable[[], TorchCrate], batch: tuple, dtype: str, compiled: bool
) -> dict[str, Contender]:
    """Theirs: mode to contender; nothing is compiled before the first call."""
    images, labels = batch
    wrap = torch.compile if compiled else lambda function: function

    def autocast():
        return torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    evaluated, trained = make_model().eval(), make_model().train()
    forward_fn = wrap(evaluated)
    loss_fn = wrap(lambda x, y: F.cross_entropy(trained(x), y, label_smoothing=SMOOTHING))
    optimizer = torch.optim.AdamW(
        trained.parameters(),
        lr=LEARNING_RATE,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )

    def forward():
        with torch.no_grad(), autocast():
            return forward_fn(images)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_fn(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {"forward": forward, "train": train}


def finish(result: Any) -> np.ndarray:
    """Wait for the work behind a result, and bring it to the host."""
    if isinstance(result, torch.Tensor):
        if result.is_cuda:
            torch.cuda.synchronize()
        return result.float().cpu().numpy()
    return np.asarray(jax.block_until_ready(result), np.float32)


def seconds(contender: Contender, calls: int) -> float:
    """Seconds a call, over some calls in a row."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        contender()
    finish(contender())
    return (time.perf_counter() - start) / calls


def check_agreement(name: str, ours: np.ndarray, theirs: np.ndarray, dtype: str) -> None:
    """Refuse to time two functions that differ."""
    error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not error <= TOLERANCE[dtype]:
        sys.exit(f"{name} must agree to {TOLERANCE[dtype]:g} of its scale; got {error:.1e}.")


def first_call(name: str, contender: Contender, omitted: dict[str, str]) -> np.ndarray | None:
    """The first result, which compiles; None, and the reason noted, if PyTorch cannot compile."""
    try:
        return finish(contender())
    except Exception as error:
        if not name.endswith("compile"):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        omitted[name] = f"{type(error).__name__}: {reason}"
        return None


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each contender in each round, one after the other within a round."""
    calls = {
        name: max(1, math.ceil(MIN_ROUND_SECONDS / seconds(contender, 1)))
        for name, contender in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(seconds(contender, calls[name]))
    return times


def measure(name: str, args: argparse.Namespace, device: str, omitted: dict) -> dict[str, float]:
    """All numbers of one model."""
    model: Any = create_model(name, dtype=jnp.dtype(args.dtype))
    state = jax.jit(lambda key: init_state(model, TX, key))(jax.random.key(0))
    weights = {k: torch.from_numpy(v) for k, v in to_state_dict(state.params, model).items()}

    def make_model() -> TorchCrate:
        reference = from_flax_model(model)
        reference.load_state_dict(weights)
        return reference.to(device)

    H = W = model.image_size
    rng = np.random.default_rng(0)
    images = rng.normal(size=(args.batch_size, H, W, model.in_channels)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, args.batch_size)
    ours_batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    theirs_batch = (torch.from_numpy(nchw).to(device), torch.from_numpy(labels).to(device))

    ours = jax_contenders(model, state, ours_batch)
    eager = torch_contenders(make_model, theirs_batch, args.dtype, compiled=False)
    compiled = torch_contenders(make_model, theirs_batch, args.dtype, compiled=True)
    numbers = {}
    for mode in ("forward", "train"):
        contenders = {"ours": ours[mode], "eager": eager[mode], "compile": compiled[mode]}
        expected = finish(contenders["ours"]())
        for other in ("eager", "compile"):
            ratio = f"{name}/{mode}/ratio_{other}"
            result = first_call(ratio, contenders[other], omitted)
            if result is None:
                del contenders[other]
            else:
                check_agreement(f"{name}/{mode} of {other}", expected, result, args.dtype)
        times = race(contenders, args.rounds)
        for other in list(times)[1:]:
            ratios = [b / a for a, b in zip(times["ours"], times[other], strict=True)]
            numbers[f"{name}/{mode}/ratio_{other}"] = statistics.median(ratios)
        for contender, values in times.items():
            numbers[f"{name}/{mode}/ms_{contender}"] = 1e3 * statistics.median(values)
        numbers[f"{name}/{mode}/images_per_s"] = args.batch_size / statistics.median(times["ours"])
    return numbers


def common_device(dtype: str) -> str:
    """PyTorch's name of the device that JAX uses, with both set to the same precision."""
    backend = jax.default_backend()
    if backend == "gpu" and not torch.cuda.is_available():
        sys.exit("PyTorch must have a GPU where JAX has one; got none. Set JAX_PLATFORMS=cpu.")
    if backend not in ("cpu", "gpu"):
        sys.exit(f"The backend must be cpu or gpu; got {backend}. Set JAX_PLATFORMS=cpu.")
    if dtype == "float32":  # on a GPU JAX would round the operands to TF32, and PyTorch would not
        jax.config.update("jax_default_matmul_precision", "highest")
        torch.set_float32_matmul_precision("highest")
    return "cuda" if backend == "gpu" else "cpu"


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpus = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "cpu": cpus[0] if cpus else platform.processor(),
            "cores": cores,
            "torch_threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "load_average_before": round(LOAD, 2),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax", "torch", "numpy")},
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "rounds": args.rounds,
    }


def print_table(numbers: dict[str, float], models: list[str]) -> None:
    """One row a model and mode; milliseconds a call, and ratios to ours."""
    print(f"{'':32}{'ours ms':>10}{'eager ms':>10}{'compile ms':>12}{'eager':>8}{'compile':>9}")
    for model in models:
        for mode in ("forward", "train"):
            get = lambda key, at=f"{model}/{mode}": numbers.get(f"{at}/{key}", math.nan)  # noqa: E731
            print(
                f"{model + ' ' + mode:32}{get('ms_ours'):10.2f}{get('ms_eager'):10.2f}"
                f"{get('ms_compile'):12.2f}{get('ratio_eager'):8.2f}{get('ratio_compile'):9.2f}"
            )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", required=True, help="names, separated by commas")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    args = parser.parse_args()
    models = args.models.split(",")
    for name in models:
        if name not in list_models():
            parser.error(f"--models must be among {', '.join(list_models())}; got {name}.")
    if min(args.batch_size, args.rounds) < 1:
        parser.error("--batch-size and --rounds must be at least 1.")
    device = common_device(args.dtype)
    numbers: dict[str, float] = {}
    omitted: dict[str, str] = {}
    for name in models:
        torch.compiler.reset()
        numbers |= measure(name, args, device, omitted)
    print_table(numbers, models)
    result = {k: float(f"{v:.5g}") for k, v in numbers.items()} | describe(args)
    if omitted:
        result["omitted"] = omitted
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
