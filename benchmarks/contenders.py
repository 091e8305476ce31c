"""What `step.py` times: a forward pass and a training step, ours and PyTorch's, on one device."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from crate_jax.interop import to_state_dict
from crate_jax.models.classifier import ImageClassifier
from crate_jax.parity.torch_reference import Twin, from_flax_model
from crate_jax.tasks import Classify
from crate_jax.training.state import TrainState, init_state
from crate_jax.training.step import make_train_step

SMOOTHING = 0.1
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY = 4e-4, 0.9, 0.999, 1e-8, 0.1

TX = optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY)


class Contender(NamedTuple):
    """One way to do the work.

    Attributes:
        run: does it once (asynchronously, maybe) and returns logits or the loss; whatever is
            compiled is compiled by the first call.
        memory: after that, the bytes held at the height of a call; None where nobody counts them.
    """

    run: Callable[[], Any]
    memory: Callable[[], int | None]


class Program:
    """A jitted function that is compiled at its first call, and can be asked about its memory."""

    def __init__(self, function: Callable, **options: Any):
        self.jitted = jax.jit(function, **options)
        self.compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        """Run it, the first time after tracing and compiling it."""
        if self.compiled is None:
            self.compiled = self.jitted.lower(*args).compile()
        return self.compiled(*args)

    def memory(self) -> int:
        """Bytes of its arguments, which its results replace if donated, and of what it works in."""
        set_aside = self.compiled.memory_analysis()
        return set_aside.argument_size_in_bytes + set_aside.temp_size_in_bytes


def make_contenders(
    model: ImageClassifier, batch_size: int, device: str
) -> dict[str, dict[str, Contender]]:
    """Mode (forward, train) to name (ours, eager, compile) to contender; same weights and batch."""
    state = jax.jit(lambda key: init_state(Classify(model), TX, key))(jax.random.key(0))
    weights = {k: torch.from_numpy(v) for k, v in to_state_dict(state.params, model).items()}

    def make_model() -> Twin:
        reference = from_flax_model(model)
        reference.load_state_dict(weights)
        return reference.to(device)

    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, *model.input_shape)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, batch_size)
    ours_batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    theirs_batch = (torch.from_numpy(nchw).to(device), torch.from_numpy(labels).to(device))

    half = model.dtype == jnp.bfloat16
    found = {
        "ours": jax_contenders(model, state, ours_batch),
        "eager": torch_contenders(make_model, theirs_batch, half, compiled=False),
        "compile": torch_contenders(make_model, theirs_batch, half, compiled=True),
    }
    return {mode: {name: of[mode] for name, of in found.items()} for mode in ("forward", "train")}


def jax_contenders(model: ImageClassifier, state: TrainState, batch: dict) -> dict[str, Contender]:
    """Ours: mode to contender."""
    apply = Program(lambda params, images: model.apply({"params": params}, images, train=False))
    step = Program(
        make_train_step(Classify(model, label_smoothing=SMOOTHING), TX), donate_argnums=0
    )
    key, params = jax.random.key(1), state.params
    held = jax.tree.map(jnp.copy, state)  # donated at each step; params stay for the forward pass

    def train():
        nonlocal held
        held, metrics = step(held, batch, key)
        return metrics["loss"]

    forward = Contender(lambda: apply(params, batch["image"]), apply.memory)
    return {"forward": forward, "train": Contender(train, step.memory)}


def torch_contenders(
    make_model: Callable[[], Twin], batch: tuple, half: bool, compiled: bool
) -> dict[str, Contender]:
    """Theirs: mode to contender."""
    images, labels = batch
    wrap = torch.compile if compiled else lambda function: function

    def autocast():
        return torch.autocast(images.device.type, torch.bfloat16, enabled=half)

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

    def forward_holds():
        return [images, *evaluated.parameters()]

    def train_holds():
        parameters = list(trained.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [value for of in optimizer.state.values() for value in of.values()]
        return [images, labels, *parameters, *gradients, *moments]

    return {
        "forward": Contender(forward, lambda: torch_peak_bytes(forward, forward_holds())),
        "train": Contender(train, lambda: torch_peak_bytes(train, train_holds())),
    }


def torch_peak_bytes(run: Callable[[], Any], held: Iterable[torch.Tensor]) -> int | None:
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


def finish(result: Any) -> np.ndarray:
    """Wait for the work behind a result, and bring it to the host."""
    if isinstance(result, torch.Tensor):
        if result.is_cuda:
            torch.cuda.synchronize()
        return result.float().cpu().numpy()
    return np.asarray(jax.block_until_ready(result), np.float32)
