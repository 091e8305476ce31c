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
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from frame import Result, command_line, publish, table
from timing import copy_bytes_per_s, large_product, race

from crate_jax import create_model
from crate_jax.models.attention import attend_by
from crate_jax.models.block import Block, Context
from crate_jax.models.crate import Crate
from crate_jax.models.derivatives import NORMALISE, attend
from crate_jax.models.layers import ista_step, times
from crate_jax.planning.chips import CHIPS

SHOWN = ("h100", "v5e")
LENGTHS = (197, 785)  # tokens at 224 pixels, patches of 16 and of 8

Steps = dict[str, tuple[Callable[..., Any], tuple[Any, ...], int, float]]


def steps_of(model: Crate, batch_size: int) -> Steps:
    """Every step of a layer: function, inputs, operations forward, and how many times that back.

    Weights are float32, and cast in the step that reads them.
    """
    B, N, d = batch_size, model.num_tokens, model.width
    K, p, dtype = model.num_heads, model.subspace_dim, model.dtype
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def tokens(*shape: int):
        return jax.random.normal(next(keys), (B, *shape), dtype)

    def weight(*shape: int):
        return jax.random.normal(next(keys), shape) * d**-0.5

    def norm(X, scale, bias):
        return NORMALISE["derived"](X, scale, bias, dtype, model.EPSILON)

    def to_subspaces(Y, U):
        return times(Y, U.astype(dtype))

    def out(Z, attended, W):
        return Z + times(attended, W.astype(dtype), axes=2)

    def ista(Y, D):
        return ista_step(Y, D.astype(dtype), eta=model.eta, lmbda=model.lmbda)

    ones, zeros, dense = jnp.ones(d), jnp.zeros(d), 2 * B * N * d * K * p
    attention = 4 * B * K * N * N * p
    return {
        "LayerNorm of MSSA": (norm, (tokens(N, d), ones, zeros), 0, 2),
        "Uᵀ Z": (to_subspaces, (tokens(N, d), weight(d, K, p)), dense, 2),
        "attention": (functools.partial(attend_by, "auto"), (tokens(N, K, p),), attention, 2),
        "W_out, residual": (out, (tokens(N, d), tokens(N, K, p), weight(K, p, d)), dense, 2),
        "LayerNorm of ISTA": (norm, (tokens(N, d), ones, zeros), 0, 2),
        "ISTA": (ista, (tokens(N, d), weight(d, d)), 4 * B * N * d * d, 2),
    }


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
    block = Block(
        model.attention_part,
        model.nonlinearity_part,
        model.dtype,
        model.backward,
        epsilon=model.EPSILON,
        **model.block_fields(),
    )
    shape = (batch_size, model.num_tokens, model.width)
    Z = jax.random.normal(jax.random.key(1), shape, model.dtype)
    params = jax.jit(lambda key: block.init(key, Z, None, Context()))(jax.random.key(2))

    def apply(params, Z):
        return block.apply(params, Z, None, Context())[0]

    forward, both = jax.jit(apply), jax.jit(functools.partial(with_gradients, apply))
    runs = {"forward": lambda: forward(params, Z), "both": lambda: both(params, Z)}
    # Weights twice, their gradients; tokens in, out, their gradients in and out, tokens again.
    return runs, 3 * size(params) + 5 * size(Z)


def attention_paths(backend: str, dtype: Any) -> dict[str, Callable[[Any], Any]]:
    """Ways to attend within the subspaces of tokens (B, N, K, p), of equal result."""

    def plain(V):
        return attend(V.swapaxes(1, 2))[0].swapaxes(1, 2)

    def library(V):
        return jax.nn.dot_product_attention(V, V, V, implementation="xla")

    paths = {
        "xla": functools.partial(attend_by, "xla"),
        "autodiff": plain,
        "jax.nn, xla": library,
    }
    if backend == "gpu" and dtype == jnp.bfloat16:
        paths |= {name: functools.partial(attend_by, name) for name in ("pallas", "cudnn")}
    return paths


def race_attention(
    tokens: tuple[int, int, int, int], dtype: Any, rounds: int, omitted: dict[str, str]
) -> list[dict[str, Any]]:
    """Every path, forward and with its backward pass: ms, errors, and bytes kept in between.

    An error is the norm of the difference to float32 by that of float32, of the same, rounded
    tokens. Kept is what JAX keeps of the path by itself; in a model `crate_jax.models.block.KEPT`
    decides. What the device or the library refuses is left out, and the reason noted.

    Args:
        tokens: B, N, K, p.
        dtype: of the tokens.
        rounds: as for `race`.
        omitted: takes what is left out.
    """
    V, dO = (jax.random.normal(jax.random.key(i), tokens, dtype) for i in (3, 4))
    runs, rows = {}, []
    few = slice(0, max(1, 16 * LENGTHS[0] // tokens[1]))  # images whose scores fit in float32
    paths = attention_paths(jax.default_backend(), dtype)
    with jax.default_matmul_precision("highest"):
        pull = jax.jit(functools.partial(with_gradient, paths["autodiff"]))
        exact = pull(V[few].astype(jnp.float32), dO[few].astype(jnp.float32))
    for name, path in paths.items():
        forward, both = jax.jit(path), jax.jit(functools.partial(with_gradient, path))
        try:
            errors = [off(*pair) for pair in zip(both(V[few], dO[few]), exact, strict=True)]
            jax.block_until_ready((forward(V), both(V, dO)))
        except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
            if name in ("xla", "autodiff", "pallas"):  # ours must run
                raise
            omitted[f"{tokens[1]} tokens, {name}"] = (str(error).strip().splitlines() or [""])[0]
            continue
        if not max(errors) <= (1e-4 if dtype == jnp.float32 else 1e-2):
            sys.exit(f"{name} must agree with float32; got {max(errors):.1e} of its norm.")
        pulled = jax.eval_shape(lambda V, path=path: jax.vjp(path, V)[1], V)
        kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pulled))
        rows.append({"tokens": tokens[1], "path": name, "kept_bytes": kept})
        rows[-1] |= dict(zip(("error", "gradient_error"), errors, strict=True))
        runs[f"{name}, forward"] = functools.partial(forward, V)
        runs[f"{name}, both"] = functools.partial(both, V, dO)
    times = {name: 1e3 * statistics.median(of) for name, of in race(runs, rounds).items()}
    for row in rows:
        row |= {f"{way}_ms": times[f"{row['path']}, {way}"] for way in ("forward", "both")}
    return rows


def with_gradient(path: Callable[..., Any], V: Any, dO: Any) -> tuple[Any, Any]:
    """A path's output, and the gradient of V for a gradient of the output."""
    output, pull = jax.vjp(path, V)
    return output, pull(dO)[0]


def off(got: Any, exact: Any) -> float:
    """The norm of the difference by the norm."""
    return float(jnp.linalg.norm((got - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def measure(model: Crate, args: argparse.Namespace) -> Result:
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
        images = max(1, args.batch_size * LENGTHS[0] // N)
        tokens = (images, N, model.num_heads, model.subspace_dim)
        attention += race_attention(tokens, model.dtype, args.rounds, omitted)
    return {"rows": rows, "layer_forward_ms": ms["forward"], "call_ms": ms["nothing"],
            "attention": attention, "omitted": omitted,
            "peak_flops_per_s": peak, "copy_bytes_per_s": copied}  # fmt: skip


def report(result: Result) -> list[str]:
    """The tables, and how they are read."""
    shown = SHOWN if result["dtype"] == "bfloat16" else ()
    heads = "step | GFLOP | MB | floor, ms | reached, ms | floor / reached"
    heads += "".join(f" | floor on {chip}, ms" for chip in shown)
    steps = (
        f"{row['step']} | {row['flops'] / 1e9:.2f} | {row['bytes'] / 1e6:.2f} | "
        f"{row['floor_ms']:.3g} | {row['ms']:.3g} | {row['floor_ms'] / row['ms']:.0%}"
        + "".join(f" | {row[f'floor_ms_{chip}']:.4f}" for chip in shown)
        for row in result["rows"]
    )
    paths = (
        f"{row['tokens']} | {row['path']} | {row['forward_ms']:.3g} | {row['both_ms']:.3g} | "
        f"{row['kept_bytes'] / 1e6:.1f} | {row['error']:.1e} | {row['gradient_error']:.1e}"
        for row in result["attention"]
    )
    of_paths = "tokens | attention by | forward, ms | forward and backward, ms | kept, MB"
    of_paths += " | error | error of the gradient"
    what = "{model}, batch {batch_size}, {dtype}; medians of {rounds} rounds".format_map(result)
    return [
        *table(heads, steps),
        "",
        f"The layer's forward pass alone: {result['layer_forward_ms']:.3g} ms. A call of a program "
        f"that does next to nothing: {result['call_ms']:.2g} ms; a step as short is not told "
        "apart.",
        "",
        *table(of_paths, paths, words=2),
        "",
        f"{what}; {result['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s in a large product, "
        f"{result['copy_bytes_per_s'] / 1e9:,.0f} GB/s in a copy.",
    ]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(
        __doc__, model="crate_base_patch16_224", batch_size=8, dtypes=True, rounds=7
    )
    args = parser.parse_args()
    if args.dtype == "float32":  # on a GPU JAX would round the operands to TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    model = create_model(args.model, dtype=jnp.dtype(args.dtype))
    if not isinstance(model, Crate) or (model.attention, model.nonlinearity) != ("mssa", "ista"):
        parser.error(f"--model must have layers of MSSA and ISTA; got {args.model}.")
    publish(args, measure(model, args), report=report)


if __name__ == "__main__":
    main()
