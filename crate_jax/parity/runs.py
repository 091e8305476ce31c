"""Run one framework at a time: a model in JAX, and in PyTorch, with the same names.

`crate_jax.parity.compare` puts them side by side. Parameters may be given as variables, with the
running statistics beside them. Tensors and times are of evaluation mode, by the running statistics.
Gradients and training steps are of training mode, by the statistics of the batch.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from jax import Array

from crate_jax.analysis import taps as analysed
from crate_jax.config import OptimConfig
from crate_jax.interop import to_state_dict
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel
from crate_jax.parity.twin import Lion, Twin

Loss = Callable[[Array, Array], Array]
Arrays = dict[str, np.ndarray]


def without_chance(model: BlockModel) -> BlockModel:
    """The model without dropout and stochastic depth: no two frameworks draw them alike."""
    rates: dict[str, Any] = {n: 0.0 for n in ("dropout", "drop_path") if hasattr(model, n)}
    return model.clone(**rates)


def our_tensors(model: BlockModel, params: Params, x: Array, taps: Sequence[str]) -> Arrays:
    """Every tensor of our forward pass by name, in the order of computation."""

    @jax.jit
    def forward(params: Params) -> tuple[Array, Array, dict[str, Array]]:
        _, seen = model.apply(
            variables_of(params), x, train=False, capture_intermediates=_is_embedding
        )
        # Of an embedding that extends another one the last is what it returns itself.
        tokens: Any = seen["intermediates"]["embedding"]["__call__"][-1]  # type: ignore[index]
        logits, named = analysed(model, params, x, taps)
        return tokens, logits, named

    return _named(*forward(params))


def _is_embedding(module: nn.Module, method: str) -> bool:
    return module.name == "embedding"


def torch_tensors(module: Twin, images: torch.Tensor, dtype: torch.dtype) -> Arrays:
    """The same tensors of PyTorch's; in another dtype than float32 under autocast."""
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens, (logits, seen) = module.embed(images), module.trace(images, module.TAPS)
    arrays = {name: tensor.float().numpy() for name, tensor in seen.items()}
    return _named(tokens.float().numpy(), logits.float().numpy(), arrays)


def _named(
    tokens: Array | np.ndarray, logits: Array | np.ndarray, seen: Mapping[str, Array | np.ndarray]
) -> Arrays:
    """One flat dict, in the order of computation."""
    named = {"embedding tokens": tokens}
    for layer in range(len(next(iter(seen.values())))):
        named |= {f"layer {layer} {tap}": stacked[layer] for tap, stacked in seen.items()}
    named["logits"] = logits
    return {name: np.asarray(value, np.float32) for name, value in named.items()}


def our_gradients(
    model: BlockModel, params: Params, x: Array, y: Array, loss: Loss, thresholded: str | None
) -> tuple[Arrays, np.ndarray]:
    """Loss and its gradients by official name, and where the thresholded tap is positive.

    Without such a tap the second is true everywhere, (1, B, 1, 1).
    """
    others = dict(variables_of(params))
    start = others.pop("params")
    taps = () if thresholded is None else (thresholded,)

    @jax.jit
    def loss_and_gradients(params: Params) -> tuple[tuple[Array, Array], Params]:
        def mean_loss(params: Params) -> tuple[Array, Array]:
            found: Any = model.apply(
                {"params": params, **others},
                x,
                train=True,
                taps=taps,
                method="forward",
                mutable=list(others),
            )
            (logits, seen), _ = found
            everywhere = jnp.ones((1, len(x), 1, 1), bool)
            support = everywhere if thresholded is None else seen[thresholded] > 0
            return loss(logits, y).mean(), support

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (value, support), grads = loss_and_gradients(start)
    named = {f"gradient {k}": v for k, v in to_state_dict(grads, model).items()}
    return {"loss": np.asarray(value)} | named, np.asarray(support)


def torch_gradients(
    module: Twin, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[Arrays, np.ndarray]:
    """The same of PyTorch's."""
    module.train()
    name = module.THRESHOLDED
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, seen = module.trace(images, () if name is None else (name,))
        loss = module.loss(logits, targets)
    loss.backward()
    grads: Arrays = {"loss": loss.detach().numpy()}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            grads[f"gradient {key}"] = parameter.grad.numpy()  # type: ignore[union-attr]
    if name is None:
        return grads, np.ones((1, len(images), 1, 1), bool)
    return grads, (seen[name].detach() > 0).numpy()


def train_torch(
    module: Twin, images: torch.Tensor, targets: torch.Tensor, optim: OptimConfig, steps: int
) -> list[float]:
    """Full-batch steps in place, at a constant rate; the loss before each."""
    parameters, betas = module.parameters(), (optim.b1, optim.b2)
    if optim.optimizer == "lion":
        optimizer = Lion(parameters, optim.lr, betas, optim.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            parameters, optim.lr, betas, optim.eps, weight_decay=optim.weight_decay
        )
    losses = []
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module.loss(module(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def images_per_s_of_both(
    model: BlockModel,
    params: Params,
    x: Array,
    module: Twin,
    images: torch.Tensor,
    rounds: int,
) -> dict[str, float]:
    """Forward passes of both in turns, medians; the first of each, which compiles, left out."""
    dtype = getattr(torch, jnp.dtype(model.dtype).name)
    module.eval()

    @jax.jit
    def apply(params: Params, x: Array) -> Array:
        return model.apply(variables_of(params), x, train=False)  # type: ignore[return-value]

    def run_ours() -> None:
        jax.block_until_ready(apply(params, x))

    def run_torch() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            module(images)

    runs = {"ours": run_ours, "torch": run_torch}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: len(images) / statistics.median(times[1:]) for name, times in seconds.items()}
