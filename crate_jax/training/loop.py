"""The training loop: the only place where order matters.

Invariants:
1. Restore, then for every step: step, log, evaluate, save. A checkpoint of step s holds the state after s
   optimizer steps, and the data stream goes on with example s · batch_size.
2. Everything random is a function of the seed and the step, so a run that was stopped and started again
   ends with the bits of one that was not.
3. The metrics of a step are fetched while the next one runs, and settled before anything is evaluated or
   saved: a non-finite value stops the run before it reaches a checkpoint.
4. Only process 0 writes metrics and the config; every process takes part in checkpoints.
5. Within the loop nothing moves between host and devices but what is moved explicitly.
"""

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from crate_jax.analysis import layerwise
from crate_jax.checkpoint import Checkpointer
from crate_jax.config import TrainConfig, to_dict, validate
from crate_jax.data.loader import eval_batches, make_prepare, to_device, train_batches
from crate_jax.data.pixels import normalize
from crate_jax.data.sources import Source
from crate_jax.evaluation.classify import evaluate, make_eval_step, open_model_and_source
from crate_jax.interop import load_weights
from crate_jax.models.crate import pair
from crate_jax.parallel import batch_sharding, check_batch_size, make_mesh, replicated
from crate_jax.training.metrics import MetricsWriter, Progress, Stopwatch
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.state import TrainState, init_sharded, replace_params
from crate_jax.training.step import make_train_step
from crate_jax.training.workdir import StopSignal, check_workdir, write_config

# Images of a batch on which the objective is measured: all layers' tokens of these are held at once.
OBJECTIVE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config says, made; see `set_up`."""

    config: TrainConfig
    mesh: Mesh
    model: nn.Module
    train_source: Source
    eval_source: Source
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    key: jax.Array

    @property
    def preprocess(self) -> Any:
        """Stored pixels to the model's, on the device."""
        return functools.partial(normalize, mean=self.config.data.mean, std=self.config.data.std)


def set_up(config: TrainConfig) -> Run:
    """Open data and build model and optimizer: all that can fail before anything is computed.

    Raises:
        ValueError, KeyError, FileNotFoundError: what the user can mend, in one line.
    """
    validate(config)
    mesh = make_mesh(config.parallel.mesh)
    devices = mesh.devices.size
    check_batch_size("batch_size", config.batch_size, devices * config.optim.accumulate_steps)
    check_batch_size("eval_batch_size", config.eval_batch_size, devices)
    model, train_source = open_model_and_source(config, config.data.train_split)
    _, eval_source = open_model_and_source(config, config.data.eval_split)
    steps_per_epoch = max(1, len(train_source) // config.batch_size)
    total_steps = config.total_steps or math.ceil(config.total_epochs * steps_per_epoch)
    schedule = make_schedule(config.optim, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return Run(
        config,
        mesh,
        model,
        train_source,
        eval_source,
        make_optimizer(config.optim, schedule),
        schedule,
        total_steps,
        jax.random.key(config.seed),
    )


def train(config: TrainConfig, workdir: str | Path) -> dict[str, Any]:
    """Train, or go on training, until the run is complete.

    Args:
        config: of a recipe in configs/; checked here.
        workdir: the run's directory, made if need be: config.json, metrics.jsonl, TensorBoard events,
            checkpoints/. What it holds already is resumed.

    Returns:
        ``step``, the last ``train/loss``, ``test/loss``, ``test/top1``, ``test/top5``,
        ``test/examples``: the same for every run of a config; and ``seconds``, ``workdir``.

    Raises:
        ValueError, KeyError, FileNotFoundError: the config, the data or the workdir break a rule.
        FloatingPointError: a metric of a step is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM; the state is saved.
    """
    start = time.perf_counter()
    workdir = Path(workdir)
    check_workdir(config, workdir)
    run = set_up(config)
    lead = jax.process_index() == 0
    progress = Progress(run.total_steps, sys.stderr if lead else None)
    state, shardings = _first_state(run)
    write_config(config, workdir, enabled=lead)
    checkpointer = Checkpointer(workdir, keep_latest=config.keep_latest, keep_best=config.keep_best)
    try:
        state, record = _restore(state, shardings, checkpointer)
        first = record["step"]
        if first >= run.total_steps:
            progress.say(
                f"{workdir} is complete: step {first} of {run.total_steps}. Nothing to do."
            )
        else:
            if first:
                progress.say(f"resuming {workdir} after step {first} of {run.total_steps}")
            writer = MetricsWriter(workdir, start_step=first, enabled=lead)
            try:
                with StopSignal() as stop, jax.transfer_guard("disallow"):
                    record = _steps(
                        run, state, shardings, record, checkpointer, writer, progress, stop
                    )
            finally:
                writer.close()
    finally:
        checkpointer.close()
    seconds = round(time.perf_counter() - start, 1)
    return {
        "step": record["step"],
        **record["summary"],
        "seconds": seconds,
        "workdir": str(workdir),
    }


def _first_state(run: Run) -> tuple[TrainState, Any]:
    """A fresh state on the mesh, with the parameters of init_weights where the config names one."""
    config = run.config
    state, shardings = init_sharded(
        run.model, run.tx, run.key, run.mesh, ema=config.optim.ema_decay > 0
    )
    if config.init_weights:
        skip = ("head",) if config.init_new_head else ()
        loaded = load_weights(config.init_weights, run.model, skip=skip)  # type: ignore
        state = replace_params(state, {**state.params, **loaded})
    return state, shardings


def _restore(
    state: TrainState, shardings: Any, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The latest checkpoint's state and record, or the fresh ones."""
    step = checkpointer.latest_step
    if step is None:
        return state, {"step": 0, "summary": {}}
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )
    return checkpointer.restore(step, abstract)


def _steps(
    run: Run,
    state: TrainState,
    shardings: Any,
    record: dict[str, Any],
    checkpointer: Checkpointer,
    writer: MetricsWriter,
    progress: Progress,
    stop: StopSignal,
) -> dict[str, Any]:
    """All steps after the restored one; returns the record of the last."""
    config, total = run.config, run.total_steps
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    sharding = batch_sharding(run.mesh)
    shape = (*pair(run.model.image_size), run.model.in_channels)  # type: ignore
    prepare = make_prepare(config.data, shape, train=True)
    eval_prepare = make_prepare(config.data, shape, train=False)
    for source, example in ((run.train_source, prepare), (run.eval_source, eval_prepare)):
        example.random_map(
            source.examples[0], np.random.default_rng(0)
        )  # a bad pipeline fails here

    train_step = jax.jit(
        make_train_step(
            run.model,
            run.tx,
            schedule=run.schedule,
            preprocess=run.preprocess,
            label_smoothing=config.optim.label_smoothing,
            accumulate_steps=config.optim.accumulate_steps,
            ema_decay=config.optim.ema_decay,
        ),
        in_shardings=(shardings, sharding, replicated(run.mesh)),
        out_shardings=(shardings, replicated(run.mesh)),
        donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(run.model, preprocess=run.preprocess))
    objective = jax.jit(
        lambda params, images: layerwise(
            run.model, params, run.preprocess(images[:OBJECTIVE_IMAGES])
        )
    )

    first, summary = record["step"], dict(record["summary"])
    key = jax.device_put(run.key, replicated(run.mesh))
    batches = train_batches(
        run.train_source,
        config.data,
        prepare,
        batch_size=config.batch_size,
        seed=config.seed,
        examples_seen=first * config.batch_size,
        **share,
    )
    watch = Stopwatch()

    def due(step: int, every: int) -> bool:
        return step == total or (every > 0 and step % every == 0)

    def settle(step: int, metrics: dict[str, jax.Array]) -> None:
        values = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                good = checkpointer.latest_step
                kept = (
                    "there is no checkpoint yet" if good is None else f"checkpoint {good} is intact"
                )
                raise FloatingPointError(
                    f"{name} must be finite; got {value} at step {step}; {kept}. "
                    "Lower optim.lr or set optim.clip_norm."
                )
        summary["train/loss"] = values["train/loss"]
        if due(step, config.log_every_steps):
            rate = watch.lap()
            values["images_per_s"] = rate * config.batch_size
            writer.write(step, values)
            progress.update(step, values, rate)

    def save(step: int, metrics: dict[str, float] | None = None) -> dict[str, Any]:
        record = {
            "step": step,
            "examples_seen": step * config.batch_size,
            "summary": summary,
            "ema": state.ema_params is not None,
            "config": to_dict(config),
        }
        with jax.transfer_guard("allow"):  # Orbax copies to the host in its own way
            checkpointer.save(step, state, record, metrics)
        return record

    pending = None
    for step in range(first + 1, total + 1):
        batch = to_device(next(batches), sharding)
        state, metrics = train_step(state, batch, key)
        watch.step()
        if pending:
            settle(*pending)
        pending = (step, metrics)

        evaluation = None
        measure = config.log_objective_every_steps and due(step, config.log_objective_every_steps)
        evaluates = due(step, config.eval_every_steps)
        saves = (
            evaluates
            if not config.checkpoint_every_steps
            else due(step, config.checkpoint_every_steps)
        )
        if measure or evaluates or saves or stop.name:
            settle(*pending)
            pending = None
            watch.pause()
        if measure:
            layers = jax.device_get(objective(state.params, batch["image"]))
            writer.write(step, _per_layer(layers))
        if evaluates:
            params = state.params if state.ema_params is None else state.ema_params
            stream = eval_batches(
                run.eval_source,
                config.data,
                eval_prepare,
                batch_size=config.eval_batch_size,
                **share,
            )
            evaluation = evaluate(eval_step, params, (to_device(b, sharding) for b in stream))
            evaluation = {f"test/{k}": v for k, v in evaluation.items()}
            summary |= evaluation
            writer.write(step, evaluation)
            progress.say(
                f"step {step}/{total}  test loss {evaluation['test/loss']:.4f}  "
                f"test top1 {evaluation['test/top1']:.4f}"
            )
        if saves or stop.name:
            record = save(step, evaluation)
        if stop.name and step < total:
            checkpointer.wait()
            raise KeyboardInterrupt(
                f"{stop.name} at step {step} of {total}, which is saved. "
                "Run the same command again to resume."
            )
        watch.resume()
    return record


def _per_layer(layers: dict[str, np.ndarray]) -> dict[str, float]:
    """{"objective/<name>/<layer>": value} of arrays with one value a layer."""
    return {
        f"objective/{name}/{i:02d}": float(value)
        for name, values in layers.items()
        for i, value in enumerate(values)
    }
