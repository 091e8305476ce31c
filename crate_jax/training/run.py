"""The one set-up: from a config to mesh, task, rows, optimizer and compiled programs.

Training, evaluation, report and plan all begin with `set_up`, and take of it what they need.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from crate_jax.config import TrainConfig, did_you_mean, validate
from crate_jax.data.loader import Batches, check_bad_share, eval_batches, train_batches
from crate_jax.data.rows import Rows
from crate_jax.evaluation.sums import add_up, watched
from crate_jax.files import Json
from crate_jax.machine import check_settings
from crate_jax.parallel import (
    Devices,
    PyTree,
    Shardings,
    batch_sharding,
    check_batch_size,
    make_mesh,
    on_mesh,
    place,
    replicated,
    start_processes,
)
from crate_jax.tasks import TASKS
from crate_jax.tasks.task import Batch, Extra, Images, Params, Scalars, Task, length_of
from crate_jax.training.optimizer import make_optimizer, make_schedule
from crate_jax.training.state import TrainState
from crate_jax.training.step import make_train_step
from crate_jax.training.workdir import check_workdir

TrainProgram = Callable[[TrainState, Batch, Array], tuple[TrainState, Scalars]]
SumsProgram = Callable[[Params, Extra, Batch], Scalars]
EvaluateProgram = Callable[[Params, Extra], dict[str, float]]
InspectProgram = Callable[[Params, Extra, Batch], tuple[Scalars, Images]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects that a config describes.

    Attributes:
        config: validated.
        mesh: the mesh of all devices, or of those that were asked for.
        task: fitted to the rows that were opened.
        rows: the rows of the splits that were asked for, by "train" and "eval".
        tx: the optimizer.
        schedule: its rate; a constant where no training rows say how long an epoch is.
        total_steps: the last step of the run; 0 without training rows.
        distributed: whether this process is one of several.
    """

    config: TrainConfig
    mesh: Mesh
    task: Task
    rows: Mapping[str, Rows]
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    distributed: bool

    @property
    def key(self) -> Array:
        """The key of all randomness."""
        return jax.random.key(self.config.seed)

    @property
    def ema(self) -> bool:
        """True if averaged parameters are kept."""
        return self.config.optim.ema_decay > 0


def set_up(
    config: TrainConfig,
    *splits: str,
    workdir: Path | None = None,
    devices: Devices | None = None,
    facts: Json | None = None,
) -> Run:
    """Open data and build task and optimizer. Mistakes fail here, before any computation.

    Args:
        config: checked here, once.
        *splits: which rows to open, "train" and "eval"; none for a plan, which opens no data.
        workdir: the workdir of a run that trains: it must be free or belong to the config, and the
            processes of the run join.
        devices: the devices to use; None: all.
        facts: of what was trained already, see `Task.reopen`; None: of nothing.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake that the user can correct, in one line.
    """
    validate(config)
    check_settings()
    if config.task not in TASKS:
        raise KeyError(
            f"task must be a known task; got {config.task}. " + did_you_mean(config.task, TASKS)
        )
    TASKS[config.task].check_unread(config)
    if workdir is not None:
        check_workdir(config, workdir)
    distributed = workdir is not None and start_processes(config.parallel)
    if "train" in splits and config.init_fit and not config.init_weights:
        raise ValueError(
            f"init_weights must be set if init_fit is; got none to fit {config.init_fit} to. "
            "Set --config.init_weights=FILE_OR_RUN, or --config.init_fit=()."
        )
    mesh = make_mesh(config.parallel.mesh, devices)
    if splits != ("eval",):
        shards = mesh.devices.size * config.optim.accumulate_steps
        check_batch_size("batch_size", config.batch_size, shards)
    if "eval" in splits:
        check_batch_size("eval_batch_size", config.eval_batch_size, mesh.devices.size)
    task, rows = _open(config, splits, facts)
    schedule, total_steps = optax.constant_schedule(config.optim.lr), 0
    if "train" in rows:
        steps_per_epoch, total_steps = length_of(config, rows["train"])
        schedule = make_schedule(
            config.optim, total_steps=total_steps, steps_per_epoch=steps_per_epoch
        )
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        rows=rows,
        tx=make_optimizer(config.optim, schedule, total_steps=total_steps),
        schedule=schedule,
        total_steps=total_steps,
        distributed=distributed,
    )


def _open(
    config: TrainConfig, splits: Sequence[str], facts: Json | None
) -> tuple[Task, dict[str, Rows]]:
    """The task, and the rows of some splits."""
    kind = TASKS[config.task]
    if not splits:
        return kind.from_config(config), {}
    names = {"train": config.data.train_split, "eval": config.data.eval_split}
    asked = [(names[split], split == "train") for split in splits]
    make = kind.open if facts is None else functools.partial(kind.reopen, facts=facts)
    task, rows = make(config, *asked)
    return task, dict(zip(splits, rows, strict=True))


def batches_after(run: Run, step: int) -> Batches:
    """The training batches after a step, on the devices."""
    return train_batches(
        run.rows["train"],
        run.config.data,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        examples_seen=step * run.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=batch_sharding(run.mesh),
    )


def evaluation_batches(run: Run) -> Batches:
    """The batches of the evaluation split, on the devices."""
    return eval_batches(
        run.rows["eval"],
        run.config.data,
        batch_size=run.config.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=batch_sharding(run.mesh),
    )


def jit_train_step(run: Run, shardings: Shardings) -> TrainProgram:
    """The training step: (state, batch, key) to (state, metrics).

    Args:
        run: the run of `set_up`; the rows of a batch are spread over its whole mesh.
        shardings: the shardings of the state, which is used up; of
            `crate_jax.training.state.abstract_state`.
    """
    step = make_train_step(
        run.task,
        run.tx,
        schedule=run.schedule,
        accumulate_steps=run.config.optim.accumulate_steps,
        ema_decay=run.config.optim.ema_decay,
    )
    everywhere = replicated(run.mesh)
    return jax.jit(
        on_mesh(run.mesh, step),
        in_shardings=(shardings, batch_sharding(run.mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def jit_sums(run: Run) -> SumsProgram:
    """The evaluation step: (parameters, extra, batch) to the task's sums, on every device."""
    return jax.jit(on_mesh(run.mesh, run.task.sums), out_shardings=replicated(run.mesh))


def make_evaluate(run: Run, step: SumsProgram) -> EvaluateProgram:
    """(Parameters, extra), on the devices, to the metrics of the whole evaluation split.

    Args:
        run: with "eval" rows.
        step: of `jit_sums`.

    Returns:
        The function; beside the task's metrics it gives ``examples``, how many there were.
    """
    rows = run.rows["eval"]

    def evaluate(params: Params, extra: Extra) -> dict[str, float]:
        with contextlib.closing(evaluation_batches(run)) as batches:
            totals = add_up(functools.partial(step, params, extra), watched(batches, len(rows)))
        examples = int(totals["examples"])
        check_bad_share(rows, run.config.data, len(rows) - examples)
        return run.task.metrics(totals) | {"examples": examples}

    return evaluate


def make_inspect(run: Run) -> InspectProgram:
    """(Parameters, extra, batch), on the devices, to scalars and images.

    One device inspects: the factorisations that measure the objective can wait for each other for
    ever on several CPU devices (jaxlib 0.10: each blocks a thread of the pool that all of them
    need).
    """

    def first_rows(params: Params, extra: Extra, batch: Batch) -> tuple[Params, Extra, Batch]:
        rows = {name: values[: run.task.inspected_rows] for name, values in batch.items()}
        return params, extra, rows

    gather = jax.jit(first_rows, out_shardings=replicated(run.mesh))
    measure = jax.jit(run.task.inspect)

    def inspect(params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        gathered = gather(params, extra, batch)
        return measure(*jax.tree.map(lambda x: x.addressable_data(0), gathered))

    return inspect


def place_on_mesh(run: Run, tree: PyTree) -> PyTree:
    """A tree that every process has whole, on every device."""
    return jax.tree.map(functools.partial(place, sharding=replicated(run.mesh)), tree)


def evaluate_split(run: Run, params: Params, extra: Extra) -> dict[str, float]:
    """Exact metrics of the evaluation split, and the speed of the evaluation.

    Args:
        run: with "eval" rows.
        params: on the host or one device.
        extra: likewise.

    Returns:
        The task's metrics, and ``examples_per_s`` without the compilation.

    Raises:
        ValueError: there is no example, or too many are bad.
    """
    params, extra = place_on_mesh(run, (params, extra))
    step = jit_sums(run)
    evaluate = make_evaluate(run, step)
    with contextlib.closing(evaluation_batches(run)) as first:
        jax.block_until_ready(step(params, extra, next(first)))  # compiles
    start = time.perf_counter()
    metrics = evaluate(params, extra)
    rate = metrics["examples"] / (time.perf_counter() - start)
    return metrics | {"examples_per_s": round(rate, 1)}


def inspect_split(run: Run, params: Params, extra: Extra) -> tuple[Scalars, Images]:
    """`Task.inspect` on the first batch of the evaluation split, on the host; one device works.

    Args:
        run: with "eval" rows.
        params: on the host.
        extra: likewise.
    """
    with contextlib.closing(evaluation_batches(run)) as batches:
        batch = multihost_utils.process_allgather(next(batches), tiled=True)
    real = batch.pop("mask") > 0
    rows = {name: values[real] for name, values in batch.items()}
    return jax.device_get(jax.jit(run.task.inspect)(*jax.device_get((params, extra)), rows))
