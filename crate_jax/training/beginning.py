"""The start of a run: parameters of its seed, or the weights of a file or of another run."""

import dataclasses
from typing import Any

import jax
import optax

from crate_jax.errors import is_mistake
from crate_jax.files import Json
from crate_jax.interop import load_fitted
from crate_jax.parallel import Shardings
from crate_jax.tasks.task import Extra, Params
from crate_jax.training.run import Run
from crate_jax.training.state import TrainState, init_sharded, replace_params


def first_state(run: Run, facts: Json) -> tuple[TrainState, Shardings, list[str]]:
    """The state of step 0, its shardings, and the changes that fitted ``init_weights``.

    Args:
        run: the run of `set_up`.
        facts: the facts of the data that it trains on, see `crate_jax.tasks.task.Task.facts`.

    Raises:
        ValueError, KeyError, OSError: ``init_weights`` cannot be read, or does not fit.
    """
    config = run.config
    state, shardings = init_sharded(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    if not config.init_weights:
        return state, shardings, []
    model: Any = run.task.model  # who loads weights knows what it is
    fit, method = config.init_fit, config.init_method
    loaded = load_fitted(
        config.init_weights, model, fit=fit, method=method, key=run.key, facts=facts
    )
    state = replace_params(state, loaded.params, run.task.begun, loaded.extra)
    return state, shardings, [f"{config.init_weights} fitted: {x}" for x in loaded.report]


def before_training(run: Run, facts: Json) -> tuple[Params, Extra]:
    """Parameters and extra of step 0, on the host, without an optimizer's state.

    ``init_weights`` is read again: a file that has changed since gives what it holds now, and so
    does another run that has gone on.

    Args:
        run: the run of `set_up`.
        facts: see `first_state`.

    Raises:
        ValueError: ``init_weights`` cannot be had any more.
    """
    try:
        state, _, _ = first_state(dataclasses.replace(run, tx=optax.identity()), facts)
    except (ValueError, KeyError, OSError) as error:
        if not (run.config.init_weights and is_mistake(error)):
            raise
        raise ValueError(
            f"init_weights must still be there to restore the start of the run; got "
            f"{run.config.init_weights} ({error}). Put it back, or do without."
        ) from error
    return jax.device_get((state.params, state.extra))
