"""One framework at a time: what a CRATE computes in JAX, and in PyTorch, under the same names.

`crate_jax.parity.compare` puts them side by side.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import Array

from crate_jax.config import OptimConfig
from crate_jax.interop import to_state_dict
from crate_jax.models.crate import TAPS, Crate, pair
from crate_jax.models.embedding import PatchEmbedding
from crate_jax.parity.torch_reference import Lion, TorchCrate

SMOOTHING = 0.1  # of the labels, in every loss

Loss = Callable[[Array, Array], Array]
Arrays = dict[str, np.ndarray]


def our_tensors(model: Crate, params: Any, x: Array) -> Arrays:
    """Every tensor of our forward pass by name, in the order of computation."""
    embedding = PatchEmbedding(pair(model.patch_size), model.width, model.dtype)

    @jax.jit
    def forward(params: Any) -> Any:
        tokens = embedding.apply({"params": params["embedding"]}, x)
        return tokens, model.apply({"params": params}, x, train=False, taps=TAPS)

    tokens, (logits, seen) = forward(params)
    return _named(tokens, seen, logits)


def torch_tensors(module: TorchCrate, images: torch.Tensor, dtype: torch.dtype) -> Arrays:
    """The same tensors of PyTorch's; in another dtype than float32 under autocast."""
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens, (logits, seen) = module.embed(images), module(images, taps=TAPS)
    return _named(*jax.tree.map(lambda x: x.float().numpy(), (tokens, seen, logits)))


def _named(tokens: Any, seen: Mapping[str, Any], logits: Any) -> Arrays:
    """One flat dict, in the order of computation."""
    named = {"embedding tokens": tokens}
    for layer in range(len(seen[TAPS[0]])):
        named |= {f"layer {layer} {tap}": seen[tap][layer] for tap in TAPS}
    named["logits"] = logits
    return {name: np.asarray(value, np.float32) for name, value in named.items()}


def our_gradients(
    model: Crate, params: Any, x: Array, y: Array, loss: Loss
) -> tuple[Arrays, np.ndarray]:
    """Loss and its gradients by official name, and where ISTA's output is positive."""

    @jax.jit
    def loss_and_gradients(params: Any) -> Any:
        def mean_loss(params: Any) -> tuple[Array, Array]:
            result: Any = model.apply({"params": params}, x, train=False, taps=("ista",))
            logits, seen = result
            return loss(logits, y).mean(), seen["ista"] > 0

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (value, support), grads = loss_and_gradients(params)
    named = {f"gradient {k}": v for k, v in to_state_dict(grads, model).items()}
    return {"loss": np.asarray(value)} | named, np.asarray(support)


def torch_gradients(
    module: TorchCrate, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[Arrays, np.ndarray]:
    """The same of PyTorch's."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, seen = module(images, taps=("ista",))
        loss = F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
    loss.backward()
    grads: Arrays = {"loss": loss.detach().numpy()}
    for name, parameter in module.named_parameters():
        grads[f"gradient {name}"] = parameter.grad.numpy()  # type: ignore[union-attr]
    return grads, (seen["ista"].detach() > 0).numpy()


def train_torch(
    module: TorchCrate,
    images: torch.Tensor,
    targets: torch.Tensor,
    optim: OptimConfig,
    steps: int,
) -> list[float]:
    """Full-batch steps in place, at a constant rate; the loss before each."""
    common: dict[str, Any] = dict(
        lr=optim.lr, betas=(optim.b1, optim.b2), weight_decay=optim.weight_decay
    )
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(module.parameters(), eps=optim.eps, **common),
        "lion": lambda: Lion(module.parameters(), **common),
    }[optim.optimizer]()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), targets, label_smoothing=optim.label_smoothing)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def images_per_s_of_both(
    model: Crate, params: Any, x: Array, module: TorchCrate, images: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Forward passes of both in turns, medians; the first of each, which compiles, left out."""
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x, train=False))
    dtype = getattr(torch, jnp.dtype(model.dtype).name)

    def run_torch() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            module(images)

    runs = {"ours": lambda: jax.block_until_ready(apply(params, x)), "torch": run_torch}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: len(images) / statistics.median(times[1:]) for name, times in seconds.items()}
