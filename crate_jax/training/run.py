"""The compiled programs of a config: its training and its evaluation step, laid out on a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from crate_jax.config import TrainConfig
from crate_jax.models.crate import Crate
from crate_jax.parallel import batch_sharding, on_mesh, replicated
from crate_jax.tasks.classify import make_eval_step
from crate_jax.tasks.mixing import make_mix
from crate_jax.tasks.pixels import normalize
from crate_jax.training.step import make_train_step


def jit_train_step(
    config: TrainConfig,
    model: Crate,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    shardings: Any,
) -> Any:
    """The training step of a config: (state, batch, key) to (state, metrics).

    Args:
        config: reads data and optim.
        model: of the config.
        tx: of `make_optimizer`.
        schedule: of `make_schedule`.
        mesh: of `crate_jax.parallel.make_mesh`; the rows of a batch are spread over all of it.
        shardings: of the state, which is used up; of `crate_jax.training.state.abstract_state`.
    """
    step = make_train_step(
        model,
        tx,
        schedule=schedule,
        preprocess=preprocess(config),
        mix=make_mix(
            num_classes=model.num_classes,
            mixup_alpha=config.data.mixup_alpha,
            cutmix_alpha=config.data.cutmix_alpha,
            switch=config.data.mix_switch,
        ),
        label_smoothing=config.optim.label_smoothing,
        accumulate_steps=config.optim.accumulate_steps,
        ema_decay=config.optim.ema_decay,
    )
    everywhere = replicated(mesh)
    return jax.jit(
        on_mesh(mesh, step),
        in_shardings=(shardings, batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def jit_eval_step(config: TrainConfig, model: Crate, mesh: Mesh) -> Any:
    """The evaluation step of a config: (parameters, batch) to the sums of `make_eval_step`."""
    return jax.jit(on_mesh(mesh, make_eval_step(model, preprocess=preprocess(config))))


def preprocess(config: TrainConfig) -> Callable[[jax.Array], jax.Array]:
    """From stored images to what the model takes."""
    return functools.partial(normalize, mean=config.data.mean, std=config.data.std)
