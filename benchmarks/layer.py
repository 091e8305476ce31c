"""Where the time of a layer goes: operations, bytes, the floor, and what is reached, step by step.

    python benchmarks/layer.py --model crate_base_patch16_224 --batch-size 8

Every step of one layer runs as two programs of its own, forward, and forward with its backward
pass, and all take turns; the time of the backward pass is the difference. A floor is the longer of
two times: operations at the rate of a large matrix product, and bytes at the rate of a copy, both
measured on the same machine. The bytes: forward the inputs and the output; backward the inputs
again, the gradient of the output and those of the inputs. What is kept in between is not among
them. The floor on a chip, in bfloat16, is the same from its published peaks
(`crate_jax.planning.chips`).
The whole layer is one program, and has the floor of one. Then attention alone, by every path there
is, at 197 and 785 tokens; what the library refuses is left out, and listed under "omitted". On a
GPU choose a batch so large that each step takes longer than a call of any program. The last line is
JSON; --output writes it, and the tables beside it as Markdown.
"""

import argparse
import functools
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
from publish import publish
from timing import race

from crate_jax import create_model, list_models
from crate_jax.models.cost import num_tokens
from crate_jax.models.crate import Crate, CrateBlock
from crate_jax.models.derivatives import ATTEND, NORMALISE
from crate_jax.models.layers import ista_step, product, subspace_tokens
from crate_jax.planning.chips import CHIPS

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

    def to_heads(W):
        return W.transpose(0, 2, 1, 3).reshape(B * K, N, p)

    def out(Z, O_MxKp, W):
        return Z + product(O_MxKp, W).reshape(B, N, d)

    ista = functools.partial(ista_step, eta=model.eta, lmbda=model.lmbda)
    dense = 2 * B * N * d * K * p
    return {
        "LayerNorm of MSSA": (norm, (draw(B, N, d), ones, zeros), 0, 2),
        "Uᵀ Z": (subspace_tokens, (draw(B, N, d), weight(d, K, p)), dense, 2),
        "one of two transposes": (to_heads, (draw(B, N, K, p),), 0, 2),
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


def measure_steps(steps: Steps, rounds: int, others: dict[str, Any]) -> tuple[list, dict]:
    """Rows "step, forward" and "step, backward"; and ms of what else takes turns with them."""
    runs, rows = dict(others), []
    for name, (function, inputs, flops, back) in steps.items():
        forward, both = jax.jit(function), jax.jit(functools.partial(with_gradients, function))
        output = forward(*inputs)
        runs[f"{name}, forward"] = functools.partial(forward, *inputs)
        runs[f"{name}, both"] = functools.partial(both, *inputs)
        gradients = both(*inputs)[1]
        moved = size(inputs) + size(output)
        rows.append({"step": f"{name}, forward", "flops": flops, "bytes": moved})
        moved += size(gradients)
        rows.append({"step": f"{name}, backward", "flops": int(back * flops), "bytes": moved})
    jax.block_until_ready([run() for run in runs.values()])
    times = race(runs, rounds)
    median = {name: 1e3 * statistics.median(of) for name, of in times.items()}
    for row in rows:
        name, _, way = row["step"].rpartition(", ")
        pairs = zip(times[f"{name}, both"], times[f"{name}, forward"], strict=True)
        backward = 1e3 * statistics.median(both - forward for both, forward in pairs)
        row["ms"] = median[f"{name}, forward"] if way == "forward" else backward
    return rows, {name: median[name] for name in others}


def with_gradients(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """A step's output, and the gradients of its inputs for a gradient of the output."""
    output, pull = jax.vjp(function, *inputs)
    return output, pull(output)


def whole_layer(model: Crate, batch_size: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """One layer as a program, forward alone and with its backward pass; and bytes of its floor."""
    block = CrateBlock(
        model.num_heads, model.subspace_dim, model.eta, model.lmbda, 0.0,
        model.dtype, model.backward, (),
    )  # fmt: skip
    Z = jax.random.normal(jax.random.key(1), (batch_size, num_tokens(model), model.width))
    Z = Z.astype(model.dtype)
    params = jax.jit(lambda key: block.init(key, Z, False))(jax.random.key(2))
    apply = lambda params, Z: block.apply(params, Z, False)[0]  # noqa: E731
    forward, both = jax.jit(apply), jax.jit(functools.partial(with_gradients, apply))
    runs = {"forward": lambda: forward(params, Z), "both": lambda: both(params, Z)}
    # Weights twice, their gradients; tokens in, out, their gradients in and out, tokens again.
    return runs, 3 * size(params) + 5 * size(Z)


def attention_paths(backend: str, dtype: Any) -> dict[str, Callable[[Any], Any]]:
    """Ways to attend within groups of tokens (G, N, p), of equal result."""

    def library(W, implementation):
        tokens = W[:, :, None]  # (batch, tokens, heads, p): a head a group
        attend = jax.nn.dot_product_attention
        return attend(tokens, tokens, tokens, implementation=implementation)[:, :, 0]

    def padded(W):
        """By cuDNN with an even number of tokens: of an odd one JAX 0.11 refuses the gradient."""
        G, N, _ = W.shape
        tokens = jnp.pad(W, ((0, 0), (0, N % 2), (0, 0)))[:, :, None]
        lengths = jnp.full(G, N, jnp.int32)
        attended = jax.nn.dot_product_attention(
            tokens, tokens, tokens, implementation="cudnn",
            query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        )  # fmt: skip
        return attended[:, :N, 0]

    paths = {
        "derived": lambda W: ATTEND["derived"](W)[0],
        "autodiff": lambda W: ATTEND["autodiff"](W)[0],
        "jax.nn, xla": functools.partial(library, implementation="xla"),
    }
    if backend == "gpu" and dtype == jnp.bfloat16:
        paths["jax.nn, cudnn"] = functools.partial(library, implementation="cudnn")
        paths["jax.nn, cudnn, padded"] = padded
    return paths


def race_attention(
    groups: int, N: int, p: int, dtype: Any, rounds: int, omitted: dict[str, str]
) -> list[dict[str, Any]]:
    """Every path, forward and with its backward pass: ms, and bytes kept in between.

    What the library refuses is left out, and the reason noted.
    """
    W = jax.random.normal(jax.random.key(3), (groups, N, p), dtype)
    runs, kept, expected = {}, {}, None
    for name, path in attention_paths(jax.default_backend(), dtype).items():
        forward = jax.jit(path)

        @jax.jit
        def both(W, path=path):
            outputs, pull = jax.vjp(path, W)
            return outputs, pull(outputs)[0]

        try:
            result = jax.tree.map(lambda x: x.astype(jnp.float32), both(W))
        except Exception as error:  # cuDNN does not take every shape on every GPU
            if not name.startswith("jax.nn"):
                raise
            omitted[f"{N} tokens, {name}"] = (str(error).strip().splitlines() or [""])[0]
            continue
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
        for name in kept
    ]  # fmt: skip


def measure(model: Crate, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all tables, and the peaks behind the floors."""
    multiply, product_flops = large_product(args.dtype)
    layer, layer_bytes = whole_layer(model, args.batch_size)
    steps = steps_of(model, args.batch_size)
    nothing = functools.partial(jax.jit(jnp.negative), jnp.zeros(()))
    nothing()
    others = {"product": multiply, "nothing": nothing} | layer
    rows, ms = measure_steps(steps, args.rounds, others)
    layer_flops = sum(row["flops"] for row in rows)
    rows.append({"step": "the layer, one program", "flops": layer_flops, "bytes": layer_bytes,
                 "ms": ms["both"]})  # fmt: skip
    peak, copied = 1e3 * product_flops / ms["product"], copy_bytes_per_s()

    def floor_ms(row, flops_per_s, bytes_per_s):
        return 1e3 * max(row["flops"] / flops_per_s, row["bytes"] / bytes_per_s)

    for row in rows:
        row["floor_ms"] = floor_ms(row, peak, copied)
        for chip in SHOWN if args.dtype == "bfloat16" else ():  # what the chips' peaks are of
            peaks = CHIPS[chip]
            row[f"floor_ms_{chip}"] = floor_ms(row, peaks.flops, peaks.memory_bandwidth)
    attention, omitted = [], {}
    for N in LENGTHS:
        groups = max(1, args.batch_size * model.num_heads * LENGTHS[0] // N)
        attention += race_attention(
            groups, N, model.subspace_dim, model.dtype, args.rounds, omitted
        )
    return {"rows": rows, "layer_forward_ms": ms["forward"], "call_ms": ms["nothing"],
            "attention": attention, "omitted": omitted,
            "peak_flops_per_s": peak, "copy_bytes_per_s": copied}  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    shown = SHOWN if found["dtype"] == "bfloat16" else ()
    heads = ["step", "GFLOP", "MB", "floor, ms", "reached, ms", "floor / reached"]
    heads += [f"floor on {chip}, ms" for chip in shown]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in found["rows"]:
        cells = [f"{row['flops'] / 1e9:.2f}", f"{row['bytes'] / 1e6:.2f}"]
        cells += [
            f"{row['floor_ms']:.3g}",
            f"{row['ms']:.3g}",
            f"{row['floor_ms'] / row['ms']:.0%}",
        ]
        cells += [f"{row[f'floor_ms_{chip}']:.4f}" for chip in shown]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The layer's forward pass alone: {found['layer_forward_ms']:.3g} ms. A call of a program "
        f"that does next to nothing: {found['call_ms']:.2g} ms; a step as short is not told apart.",
        "",
    ]
    lines += ["| tokens | attention by | forward, ms | forward and backward, ms | kept, MB |",
              "| ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {row['tokens']} | {row['path']} | {row['forward_ms']:.3g} | {row['both_ms']:.3g} | "
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
        *(f"\nLeft out: {what}: {why}" for what, why in found["omitted"].items()),
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
    if min(args.batch_size, args.rounds) < 1:
        parser.error("--batch-size and --rounds must be at least 1.")
    if args.output and args.output.suffix != ".json":
        parser.error(f"--output must end in .json; got {args.output}.")
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
    publish(found, markdown, args.output)


if __name__ == "__main__":
    main()
