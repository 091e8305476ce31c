"""The training loop: the only place where order matters.

Invariants:
1. Restore, then for every step: step, log, evaluate, save. A checkpoint of step s holds the state
   after s optimizer steps, and the data stream goes on with example s · batch_size.
2. Everything random is a function of the seed and the step, so a run that was stopped and started
   again ends with the bits of one that was not.
3. The metrics of a step are fetched while the next one runs, and settled before anything is
   evaluated or saved: a non-finite value stops the run before it reaches a checkpoint.
4. Only process 0 writes metrics and the config; every process takes part in checkpoints.
5. Within the loop nothing moves between host and devices but what is moved explicitly.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from crate_jax.analysis import layerwise
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.config import TrainConfig, to_dict, validate
from crate_jax.data.images.labelled import LabelledImages
from crate_jax.data.images.pipeline import Pipeline as Prepare
from crate_jax.data.images.pipeline import make_pipeline as make_prepare
from crate_jax.data.loader import Batches, check_bad_share, eval_batches, train_batches
from crate_jax.data.rows import good_row
from crate_jax.data.stores.sources import Source, check_same_classes
from crate_jax.interop import load_fitted
from crate_jax.models.classifier import pair
from crate_jax.models.crate import Crate
from crate_jax.parallel import (
    LostProcess,
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
    start_processes,
)
from crate_jax.tasks.classify import evaluate, open_model_and_source
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.progress import Reporter
from crate_jax.training.run import jit_eval_step, jit_train_step, preprocess
from crate_jax.training.state import TrainState, abstract_state, init_sharded, replace_params
from crate_jax.training.workdir import Stopped, StopSignal, check_workdir, write_config

# What XLA calls errors that are the program's own: another try would end the same.
_OURS = ("INVALID_ARGUMENT", "UNIMPLEMENTED")

# Images of a batch on which the objective is measured: the tokens of all layers are held at once.
OBJECTIVE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config says, made; see `set_up`."""

    config: TrainConfig
    mesh: Mesh
    model: Crate
    train_source: Source
    eval_source: Source
    train_prepare: Prepare
    eval_prepare: Prepare
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled parts of the loop.

    Attributes:
        train_step: (state, batch, key) to (state, metrics); the state given in is used up.
        evaluate: parameters to the metrics of the whole evaluation split.
        objective: (parameters, stored images) to one value a layer of each measure.
    """

    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any], dict[str, float]]
    objective: Callable[[Any, jax.Array], dict[str, jax.Array]]


def set_up(config: TrainConfig) -> Run:
    """Open data and build model and optimizer: all that can fail before anything is computed.

    Raises:
        ValueError, KeyError, FileNotFoundError: what the user can mend, in one line.
    """
    validate(config)
    if config.init_fit and not config.init_weights:
        raise ValueError(
            f"init_weights must be set where init_fit is; got none to fit {config.init_fit} to. "
            "Set --config.init_weights=FILE_OR_RUN, or --config.init_fit=()."
        )
    mesh = make_mesh(config.parallel.mesh)
    devices = mesh.devices.size
    check_batch_size("batch_size", config.batch_size, devices * config.optim.accumulate_steps)
    check_batch_size("eval_batch_size", config.eval_batch_size, devices)
    model, train_source = open_model_and_source(config, config.data.train_split)
    _, eval_source = open_model_and_source(config, config.data.eval_split)
    check_same_classes(train_source, eval_source)
    shape = (*pair(model.image_size), model.in_channels)
    train_prepare = make_prepare(config.data, shape, train=True)
    eval_prepare = make_prepare(config.data, shape, train=False)
    for source, prepare in ((train_source, train_prepare), (eval_source, eval_prepare)):
        # A pipeline that does not fit the model fails here, on one example, and not in a worker.
        rows, skip = LabelledImages(source, prepare), config.data.on_bad_example == "skip"
        good_row(rows, 0, np.random.default_rng(0), skip=skip)
    steps_per_epoch = max(1, len(train_source) // config.batch_size)
    total_steps = config.total_steps or math.ceil(config.total_epochs * steps_per_epoch)
    schedule = make_schedule(config.optim, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        train_source=train_source,
        eval_source=eval_source,
        train_prepare=train_prepare,
        eval_prepare=eval_prepare,
        tx=make_optimizer(config.optim, schedule),
        schedule=schedule,
        total_steps=total_steps,
        key=jax.random.key(config.seed),
    )


def train(config: TrainConfig, workdir: str | Path) -> dict[str, Any]:
    """Train, or go on training, until the run is complete.

    Args:
        config: of a recipe in configs/; checked here.
        workdir: the run's directory, made if need be: config.json, metrics.jsonl, TensorBoard
            events, checkpoints/. What it holds already is resumed.

    Returns:
        ``step``, the last ``train/loss``, ``test/loss``, ``test/top1``, ``test/top5``,
        ``test/examples``: the same for every run of a config; and ``seconds``, ``workdir``.

    Raises:
        ValueError, KeyError, FileNotFoundError: the config, the data or the workdir break a rule.
        FloatingPointError: a metric of a step is not finite.
        OSError: a checkpoint could not be written, and config.on_failed_save is "stop" or it is the
            last one.
        Stopped: SIGINT or SIGTERM; the state is saved.
        LostProcess: another process of the run has ended.
    """
    start = time.perf_counter()
    workdir = Path(workdir)
    validate(config)
    check_workdir(config, workdir)
    distributed = start_processes(config.parallel)
    run = set_up(config)
    lead = jax.process_index() == 0
    checkpointer = Checkpointer(workdir, keep_latest=config.keep_latest, keep_best=config.keep_best)
    try:
        state, shardings, record = _restore_or_init(run, checkpointer)
        write_config(config, workdir, enabled=lead)
        with Reporter(workdir, config, run.total_steps, record, enabled=lead) as reporter:
            if record["step"] < run.total_steps:
                programs = _compile(run, shardings)
                with (
                    StopSignal(distributed, checkpointer.reached_preemption) as stop,
                    contextlib.closing(_batches_after(run, record["step"])) as batches,
                    jax.transfer_guard("disallow"),
                ):
                    record = _steps(
                        run, programs, batches, state, record, checkpointer, reporter, stop
                    )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            raise ValueError(
                f"a step must fit into the memory of a device; it does not ({reason[:200]}). Raise "
                "optim.accumulate_steps, set model.remat=full, or split over more devices."
            ) from error
        if not distributed or reason.startswith(_OURS):
            raise
        raise LostProcess(
            f"all processes must stay; one was lost, or failed here ({reason[:200]}). Start all "
            f"of them again: they go on after step {checkpointer.latest_step or 0}."
        ) from error
    finally:
        # After an error of this process alone it would wait for the others, and they for it.
        failed = sys.exc_info()[1]
        if failed is None or isinstance(failed, Stopped) or not distributed:
            checkpointer.close()
    seconds = round(time.perf_counter() - start, 1)
    summary = {"step": record["step"], **record["summary"]}
    return summary | {"seconds": seconds, "workdir": str(workdir)}


def _restore_or_init(
    run: Run, checkpointer: Checkpointer
) -> tuple[TrainState, Any, dict[str, Any]]:
    """State, shardings and record: of the latest checkpoint, or of step 0."""
    config, ema = run.config, run.config.optim.ema_decay > 0
    if checkpointer.latest_step is not None:
        abstract, shardings = abstract_state(run.model, run.tx, run.key, run.mesh, ema=ema)
        state, record, problems = checkpointer.restore_newest(abstract)
        return state, shardings, record | {"notes": [f"set aside: {p}" for p in problems]}
    notes: list[str] = []
    state, shardings = init_sharded(run.model, run.tx, run.key, run.mesh, ema=ema)
    if config.init_weights:
        loaded = load_fitted(config.init_weights, run.model, fit=config.init_fit, key=run.key)
        state = replace_params(state, loaded.params)
        notes = [f"{config.init_weights} fitted: {change}" for change in loaded.report]
    return state, shardings, {"step": 0, "summary": {}, "notes": notes}


def _compile(run: Run, shardings: Any) -> Programs:
    """The three programs of a run, sharded over its mesh."""
    config, sharding, everywhere = run.config, batch_sharding(run.mesh), replicated(run.mesh)
    eval_step = jit_eval_step(config, run.model, run.mesh)

    def evaluate_all(params: Any) -> dict[str, float]:
        stream = eval_batches(
            run.eval_source,
            config.data,
            run.eval_prepare,
            batch_size=config.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            sharding=sharding,
        )
        with contextlib.closing(stream):
            metrics = evaluate(eval_step, params, stream)
        source = run.eval_source
        check_bad_share(source, config.data, len(source) - int(metrics["examples"]))
        return metrics

    gather = jax.jit(
        lambda params, images: (params, images[:OBJECTIVE_IMAGES]), out_shardings=everywhere
    )
    normalized = preprocess(config)
    measure = jax.jit(lambda params, images: layerwise(run.model, params, normalized(images)))

    def objective(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        # On one device: factorisations of several CPU devices can wait for each other for ever.
        local = jax.tree.map(lambda x: x.addressable_data(0), gather(params, images))
        return measure(*local)

    return Programs(
        train_step=jit_train_step(config, run.model, run.tx, run.schedule, run.mesh, shardings),
        evaluate=evaluate_all,
        objective=objective,
    )


def _batches_after(run: Run, step: int) -> Batches:
    """The training batches after a step, on the devices."""
    return train_batches(
        run.train_source,
        run.config.data,
        run.train_prepare,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        examples_seen=step * run.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=batch_sharding(run.mesh),
    )


def _steps(
    run: Run,
    programs: Programs,
    batches: Batches,
    state: TrainState,
    record: dict[str, Any],
    checkpointer: Checkpointer,
    reporter: Reporter,
    stop: StopSignal,
) -> dict[str, Any]:
    """All steps after the restored one; returns the record of the last."""
    config, total = run.config, run.total_steps
    # Gloo, which joins processes on CPUs, mixes up the collectives of two steps under way together.
    lockstep = jax.process_count() > 1 and jax.default_backend() == "cpu"
    stop_on_failed_save = config.on_failed_save == "stop"
    # Made where it is used: a key cannot be put onto devices of other processes.
    make_key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(run.mesh))
    key = make_key()

    def due(step: int, every: int) -> bool:
        return step == total or (every > 0 and step % every == 0)

    def settle(step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(step, values, checkpointer)
        log = due(step, config.log_every_steps)
        reporter.trained(step, values, log=log, waited_s=batches.waited_s, skipped=batches.skipped)

    unsettled = None
    for step in range(record["step"] + 1, total + 1):
        batch = next(batches)
        state, metrics = programs.train_step(state, batch, key)
        if unsettled:
            settle(*unsettled)
        unsettled = (step, metrics)
        if lockstep:
            jax.block_until_ready(metrics)

        measures = config.log_objective_every_steps and due(step, config.log_objective_every_steps)
        evaluates = due(step, config.eval_every_steps)
        saves = due(step, config.checkpoint_every_steps or config.eval_every_steps)
        stopping = stop.at(step)
        if not (measures or evaluates or saves or stopping):
            continue

        settle(*unsettled)
        unsettled = None
        with reporter.paused():
            if measures:
                reporter.measured(
                    step, jax.device_get(programs.objective(state.params, batch["image"]))
                )
            tested = None
            if evaluates:
                params = state.params if state.ema_params is None else state.ema_params
                tested = reporter.tested(step, programs.evaluate(params))
            if saves or stopping:
                record = {
                    "step": step,
                    "examples_seen": step * config.batch_size,
                    "summary": dict(reporter.summary),
                    "ema": state.ema_params is not None,
                    "config": to_dict(config),
                }
                with jax.transfer_guard("allow"):  # Orbax copies to the host in a way of its own
                    try:
                        checkpointer.save(step, state, record, tested)
                    except OSError as error:
                        if stop_on_failed_save:
                            raise
                        reporter.say(f"not saved: {error}")
        if stopping and step < total:
            checkpointer.wait()
            raise Stopped(
                f"{stopping} at step {step} of {total}, which is saved. "
                "Run the same command again to resume."
            )
    checkpointer.wait()
    return record


def _check_finite(step: int, values: dict[str, float], checkpointer: Checkpointer) -> None:
    """Stop at the first value that is not finite; no checkpoint can hold what it has spoilt."""
    for name, value in values.items():
        if not math.isfinite(value):
            checkpointer.wait()
            good = checkpointer.latest_step
            kept = "There is no checkpoint yet" if good is None else f"Checkpoint {good} is intact"
            raise FloatingPointError(
                f"train/{name} must be finite; got {value} at step {step}. {kept}; "
                "lower optim.lr or set optim.clip_norm, and run again."
            )
