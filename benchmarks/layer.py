"""Where the time of a layer goes: operations, bytes, the floor, and what is reached, step by step.

    python benchmarks/layer.py --model crate_base_patch16_224 --batch-size 8

Every step of one layer runs as a program of its own, forward and backward, and all take turns. Its
floor is the longer of two times: its operations at the rate of a large matrix product, and its
bytes, every input and output once, at the rate of a copy, both measured on the same machine. The
floor on a chip, in bfloat16, is the same from its published peaks (`crate_jax.chips`). The whole
layer is one program, in which the compiler joins steps. Then attention alone, by every path there
is, at 197 and 785 tokens. The last line is JSON; --output writes it, and the tables beside it as
Markdown.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `python benchmarks/layer.py` puts benchmarks/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from hardware import copy_bytes_per_s, describe_cpu, large_product
from timing import race

from crate_jax import create_model, list_models
from crate_jax.chips import CHIPS
from crate_jax.models.cost import num_tokens
from crate_jax.models.crate import Crate, CrateBlock
from crate_jax.models.derivatives import ATTEND, NORMALISE
from crate_jax.models.layers import ista_step, product, subspace_tokens

LOAD = os.getloadavg()[0]  # over the last minute, before this program adds to it
SHOWN = ("h100", "v5e")
LENGTHS = (197, 785)  # tokens at 224 pixels, patches of 16 and of 8

Steps = dict[str, tuple[Callable[..., Any], tuple[Any, ...], int, float]]


def steps_of(model: Crate, batch_size: int) -> Steps:
    """Every step of a layer: function, inputs, operations forward, and how many times that back."""
    B, N, d, K, p = (
        batch_size, num_tokens(model), model.width, model.num_heads, model.subspace_dim
    )  # fmt: skip
    dtype = model.dtype
    keys = iter(jax.random.split(jax.random.key(0), 16))
    draw = lambda *shape, of=dtype: jax.random.normal(next(keys), shape, of)  # noqa: E731
    weight = lambda *shape: draw(*shape, of=jnp.float32) * shape[0] ** -0.5  # noqa: E731
    ones, zeros = jnp.ones(d), jnp.zeros(d)

    def norm(X, scale, bias):
        return NORMALISE["derived"](X, scale, bias, dtype)

    def there_and_back(W):
        """The two transposes around attention."""
        heads = jax.lax.optimization_barrier(W.transpose(0, 2, 1, 3).reshape(B * K, N, p))
        return heads.reshape(B, K, N, p).transpose(0, 2, 1, 3)

    def out(Z, O_MxKp, W):
        return Z + product(O_MxKp, W).reshape(B, N, d)

    ista = functools.partial(ista_step, eta=model.eta, lmbda=model.lmbda)
    dense = 2 * B * N * d * K * p
    return {
        "LayerNorm of MSSA": (norm, (draw(B, N, d), ones, zeros), 0, 2),
        "Uᵀ Z": (subspace_tokens, (draw(B, N, d), weight(d, K, p)), dense, 2),
        "transposes": (there_and_back, (draw(B, N, K, p),), 0, 2),
        "attention": (
            lambda W: ATTEND["derived"](W)[0], (draw(B * K, N, p),), 4 * B * K * N * N * p, 1.5
        ),
        "W_out, residual": (out, (draw(B, N, d), draw(B * N, K * p), weight(K * p, d)), dense, 2),
        "LayerNorm of ISTA": (norm, (draw(B, N, d), ones, zeros), 0, 2),
        "ISTA": (ista, (draw(B, N, d), weight(d, d)), 4 * B * N * d * d, 2),
    }  # fmt: skip


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def programs_of(steps: Steps) -> dict[str, dict[str, Any]]:
    """By "step, forward" and "step, backward": what to call, its operations and its bytes."""
    found = {}
    for name, (function, inputs, flops, back) in steps.items():
        forward = jax.jit(lambda *x, function=function: jax.vjp(function, *x))
        backward = jax.jit(lambda pull, gradient: pull(gradient))
        outputs, pull = forward(*inputs)
        gradients = backward(pull, outputs)
        found[f"{name}, forward"] = {
            "run": functools.partial(forward, *inputs),
            "flops": flops,
            "bytes": size(inputs) + size(outputs) + size(pull),
        }
        found[f"{name}, backward"] = {
            "run": functools.partial(backward, pull, outputs),
            "flops": int(back * flops),
            "bytes": size(pull) + size(outputs) + size(gradients),
        }
    return found


def whole_layer(model: Crate, batch_size: int) -> dict[str, Callable[[], Any]]:
    """One layer as one program: forward alone, and forward and backward."""
    block = CrateBlock(
        model.num_heads, model.subspace_dim, model.eta, model.lmbda, 0.0,
        model.dtype, model.backward, (),
    )  # fmt: skip
    Z = jax.random.normal(jax.random.key(1), (batch_size, num_tokens(model), model.width))
    Z = Z.astype(model.dtype)
    params = jax.jit(lambda key: block.init(key, Z, False))(jax.random.key(2))
    apply = lambda params, Z: block.apply(params, Z, False)[0]  # noqa: E731
    forward = jax.jit(apply)

    @jax.jit
    def both(params, Z):
        outputs, pull = jax.vjp(apply, params, Z)
        return pull(outputs)

    runs = {"forward": lambda: forward(params, Z), "both": lambda: both(params, Z)}
    jax.block_until_ready([run() for run in runs.values()])
    return runs


def attention_paths(backend: str, dtype: Any) -> dict[str, Callable[[Any], Any]]:
    """Ways to attend within groups of tokens (G, N, p), of equal result."""

    def library(W, implementation):
        tokens = W[:, :, None]  # (batch, tokens, heads, p): a head a group
        attend = jax.nn.dot_product_attention
        return attend(tokens, tokens, tokens, implementation=implementation)[:, :, 0]

    paths = {
        "derived": lambda W: ATTEND["derived"](W)[0],
        "autodiff": lambda W: ATTEND["autodiff"](W)[0],
        "jax.nn, xla": functools.partial(library, implementation="xla"),
    }
    if backend == "gpu" and dtype == jnp.bfloat16:
        paths["jax.nn, cudnn"] = functools.partial(library, implementation="cudnn")
    return paths


def race_attention(groups: int, N: int, p: int, dtype: Any, rounds: int) -> list[dict[str, Any]]:
    """Every path, forward and with its backward pass: ms, and bytes kept in between."""
    W = jax.random.normal(jax.random.key(3), (groups, N, p), dtype)
    paths, runs, kept, expected = attention_paths(jax.default_backend(), dtype), {}, {}, None
    for name, path in paths.items():
        forward = jax.jit(path)

        @jax.jit
        def both(W, path=path):
            outputs, pull = jax.vjp(path, W)
            return outputs, pull(outputs)[0]

        result = jax.tree.map(lambda x: x.astype(jnp.float32), both(W))
        expected = expected or result
        for got, wanted in zip(result, expected, strict=True):
            error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
            if not error <= (1e-4 if dtype == jnp.float32 else 5e-2):
                sys.exit(f"{name} must agree with the others; got {error:.1e} of the scale.")
        pull = jax.eval_shape(lambda W, path=path: jax.vjp(path, W)[1], W)
        kept[name] = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pull))
        runs[f"{name}, forward"] = functools.partial(forward, W)
        runs[f"{name}, both"] = functools.partial(both, W)
        jax.block_until_ready(forward(W))
    times = {name: 1e3 * statistics.median(of) for name, of in race(runs, rounds).items()}
    return [
        {"tokens": N, "path": name, "forward_ms": times[f"{name}, forward"],
         "both_ms": times[f"{name}, both"], "kept_bytes": kept[name]}
        for name in paths
    ]  # fmt: skip


def measure(model: Crate, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all tables, and the peaks behind the floors."""
    programs = programs_of(steps_of(model, args.batch_size))
    multiply, product_flops = large_product(args.dtype)
    runs = {name: of["run"] for name, of in programs.items()} | {"product": multiply}
    times = race(runs | whole_layer(model, args.batch_size), args.rounds)
    ms = {name: 1e3 * statistics.median(of) for name, of in times.items()}
    peak, copied = 1e3 * product_flops / ms["product"], copy_bytes_per_s()
    floor = lambda of, flops, moved: 1e3 * max(of["flops"] / flops, of["bytes"] / moved)  # noqa: E731
    rows = [
        {"step": name, "gflop": of["flops"] / 1e9, "mb": of["bytes"] / 1e6,
         "floor_ms": floor(of, peak, copied), "ms": ms[name]}
        | {f"floor_ms_{c}": floor(of, CHIPS[c].flops, CHIPS[c].memory_bandwidth) for c in SHOWN}
        for name, of in programs.items()
    ]  # fmt: skip
    attention = []
    for N in LENGTHS:
        groups = max(1, args.batch_size * model.num_heads * LENGTHS[0] // N)
        attention += race_attention(groups, N, model.subspace_dim, model.dtype, args.rounds)
    layer = {"forward_ms": ms["forward"], "both_ms": ms["both"]}
    return {"rows": rows, "layer": layer, "attention": attention,
            "peak_flops_per_s": peak, "copy_bytes_per_s": copied}  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    shown = SHOWN if found["dtype"] == "bfloat16" else ()  # what the chips' peaks are of
    heads = ["step", "GFLOP", "MB", "floor, ms", "reached, ms", "floor / reached"]
    heads += [f"floor on {chip}, ms" for chip in shown]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    keys = ["gflop", "mb", "floor_ms"]
    keys_of_chips = [f"floor_ms_{chip}" for chip in shown]
    total = {key: sum(row[key] for row in found["rows"]) for key in keys + keys_of_chips}
    whole = total | {"step": "the layer, one program", "ms": found["layer"]["both_ms"]}
    for row in [*found["rows"], whole]:
        cells = [f"{row[key]:.2f}" for key in (*keys, "ms")]
        cells.append(f"{row['floor_ms'] / row['ms']:.0%}")
        cells += [f"{row[key]:.4f}" for key in keys_of_chips]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    lines += ["", f"The layer's forward pass alone: {found['layer']['forward_ms']:.2f} ms.", ""]
    lines += ["| tokens | attention by | forward, ms | forward and backward, ms | kept, MB |",
              "| ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {row['tokens']} | {row['path']} | {row['forward_ms']:.2f} | {row['both_ms']:.2f} | "
        f"{row['kept_bytes'] / 1e6:.1f} |"
        for row in found["attention"]
    ]
    lines += [
        "",
        f"{found['model']}, batch {found['batch_size']}, {found['dtype']}; medians of "
        f"{found['rounds']} rounds. {found['hardware']['cpu']}, {found['hardware']['device']}, "
        f"load before {found['hardware']['load_average_before']}: "
        f"{found['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s in a large product, "
        f"{found['copy_bytes_per_s'] / 1e9:,.0f} GB/s in a copy. "
        + ", ".join(f"{name} {v}" for name, v in found["versions"].items()),
        "",
        f"`{found['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description="Where the time of a layer goes.")
    parser.add_argument("--model", choices=list_models(), default="crate_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a .json file; the tables go beside it as .md")
    args = parser.parse_args()
    if args.dtype == "float32":  # on a GPU JAX would round the operands to TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    model = create_model(args.model, dtype=jnp.dtype(args.dtype))
    found = measure(model, args) | {
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
        | {name: version(name) for name in ("jax", "flax")},
        "command": " ".join(["python", "benchmarks/layer.py", *sys.argv[1:]]),
    }
    markdown = report(found)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown)
    print(markdown)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
