"""What `step.py` times of PyTorch: the model, weights and batch of ours, eager and compiled."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from contenders import ADAMW, BETAS, LEARNING_RATE, SMOOTHING, Contender
from timing import finish

from crate_jax.interop import to_state_dict
from crate_jax.models.classifier import ImageClassifier
from crate_jax.parity.torch_reference import from_flax_model


def theirs(
    model: ImageClassifier, variables: Any, batch: dict[str, np.ndarray], device: str
) -> dict[str, dict[str, Contender]]:
    """Name (eager, compile) to mode (forward, train) to contender."""
    weights = {k: torch.from_numpy(v) for k, v in to_state_dict(variables, model).items()}

    def make_model() -> torch.nn.Module:
        reference = from_flax_model(model)
        reference.load_state_dict(weights)
        return reference.to(device)

    images = torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(batch["label"].astype(np.int64))
    on_device, half = (images.to(device), labels.to(device)), model.dtype == jnp.bfloat16
    return {
        "eager": contenders(make_model, on_device, half, lambda function: function),
        "compile": contenders(make_model, on_device, half, torch.compile),
    }


def contenders(
    make_model: Callable[[], torch.nn.Module],
    batch: tuple[torch.Tensor, torch.Tensor],
    half: bool,
    wrap: Callable[[Any], Any],
) -> dict[str, Contender]:
    """Mode to contender; `half` multiplies in bfloat16, `wrap` compiles what it is given or not."""
    images, labels = batch

    def autocast():
        return torch.autocast(images.device.type, torch.bfloat16, enabled=half)

    evaluated, trained = make_model().eval(), make_model().train()
    forward_fn = wrap(evaluated)
    loss_fn = wrap(lambda x, y: F.cross_entropy(trained(x), y, label_smoothing=SMOOTHING))
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, BETAS, **ADAMW, fused=True)

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

    def forward_holds():
        return [images, *evaluated.parameters()]

    def train_holds():
        parameters = list(trained.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [value for of in optimizer.state.values() for value in of.values()]
        return [images, labels, *parameters, *gradients, *moments]

    return {
        "forward": Contender(forward, lambda: peak_bytes(forward, forward_holds())),
        "train": Contender(train, lambda: peak_bytes(train, train_holds())),
    }


def peak_bytes(run: Callable[[], Any], held: Iterable[torch.Tensor]) -> int | None:
    """What one contender holds, and what a call of it adds; on a CPU PyTorch counts neither.

    The allocator's peak would include what the other contenders hold meanwhile.
    """
    held = [tensor for tensor in held if tensor.is_cuda]
    if not held:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finish(run())
    own = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return own + torch.cuda.max_memory_allocated() - before
