"""What is timed of ours: a forward pass and a training step, on one device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import frame  # noqa: F401, it makes crate_jax importable
import jax
import jax.numpy as jnp
import numpy as np
import optax

from crate_jax.models.classifier import ImageClassifier
from crate_jax.tasks import Classify
from crate_jax.training.state import TrainState, init_state
from crate_jax.training.step import make_train_step

SMOOTHING = 0.1
LEARNING_RATE, BETAS, ADAMW = 4e-4, (0.9, 0.999), {"eps": 1e-8, "weight_decay": 0.1}

TX = optax.adamw(LEARNING_RATE, *BETAS, **ADAMW)


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


def random_batch(model: ImageClassifier, batch_size: int) -> dict[str, np.ndarray]:
    """Images (B, H, W, c), float32, and labels (B,), int32."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, *model.input_shape)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, model.num_classes, batch_size, np.int32)}


def start(model: ImageClassifier) -> TrainState:
    """The state before the first step."""
    return jax.jit(lambda key: init_state(Classify(model), TX, key))(jax.random.key(0))


def variables_of(state: TrainState) -> dict[str, Any]:
    """Its parameters, and running statistics where the model has them."""
    return {"params": state.params, **dict(state.extra)}


def ours(
    model: ImageClassifier, state: TrainState, batch: dict[str, np.ndarray]
) -> dict[str, Contender]:
    """Mode (forward, train) to contender; the batch is put on the device."""
    apply = Program(lambda variables, images: model.apply(variables, images, train=False))
    step = Program(
        make_train_step(Classify(model, label_smoothing=SMOOTHING), TX), donate_argnums=0
    )
    on_device = jax.tree.map(jnp.asarray, batch)
    key, variables = jax.random.key(1), variables_of(state)
    held = jax.tree.map(jnp.copy, state)  # donated at each step; the forward pass has its own

    def train():
        nonlocal held
        held, metrics = step(held, on_device, key)
        return metrics["loss"]

    forward = Contender(lambda: apply(variables, on_device["image"]), apply.memory)
    return {"forward": forward, "train": Contender(train, step.memory)}


def training_step(model: ImageClassifier, batch_size: int) -> Contender:
    """Ours alone, on a random batch."""
    return ours(model, start(model), random_batch(model, batch_size))["train"]
