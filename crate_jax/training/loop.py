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
from pathlib import Path

import jax

from crate_jax.checkpoint.best import Best
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import FACTS, read_facts
from crate_jax.config import TrainConfig, to_dict, validate
from crate_jax.data.loader import Batches
from crate_jax.errors import first_line
from crate_jax.files import Json, located
from crate_jax.machine import lacks_memory
from crate_jax.parallel import LostProcess, Shardings, replicated
from crate_jax.planning.chips import share_of_peak
from crate_jax.tasks.task import Scalars
from crate_jax.training.beginning import first_state
from crate_jax.training.loggers import check_loggers
from crate_jax.training.profile import Profile
from crate_jax.training.progress import Reporter
from crate_jax.training.run import (
    EvaluateProgram,
    InspectProgram,
    Run,
    TrainProgram,
    batches_after,
    jit_sums,
    jit_train_step,
    make_evaluate,
    make_inspect,
    set_up,
)
from crate_jax.training.state import (
    TrainState,
    abstract_state,
    from_stored,
    to_stored,
)
from crate_jax.training.workdir import (
    Stopped,
    StopSignal,
    check_facts,
    check_workdir,
    write_config,
)

# XLA's names of errors that are the program's own: another try would end the same.
_OURS = ("INVALID_ARGUMENT", "UNIMPLEMENTED")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled parts of the loop; see `crate_jax.training.run`."""

    train_step: TrainProgram
    evaluate: EvaluateProgram
    inspect: InspectProgram


def train(config: TrainConfig, workdir: str | Path) -> Json:
    """Train, or go on training, until the run is complete.

    Args:
        config: the config of a recipe in configs/; checked here.
        workdir: the run's directory, made if need be, or ``gs://…`` or ``s3://…``: config.json,
            metrics.jsonl, TensorBoard events, checkpoints/. What it holds already is resumed.

    Returns:
        ``step``, the last ``train/loss``, and of the last evaluation the metrics of the task and
        ``test/examples``: the same for every run of a config; and ``seconds``, ``workdir``.

    Raises:
        ValueError, KeyError, FileNotFoundError: the config, the data or the workdir break a rule.
        FloatingPointError: a metric of a step is not finite.
        OSError: a checkpoint could not be written, and config.on_failed_save is "stop" or it is the
            last one; or another process owns the workdir.
        Stopped: SIGINT or SIGTERM; the state is saved.
        LostProcess: another process of the run has ended.
    """
    start = time.perf_counter()
    workdir, profile = located(workdir, "workdir"), Profile(config.profile_steps)
    check_loggers(validate(config).loggers)
    run = set_up(config, "train", "eval", workdir=workdir)
    checkpointer = open_checkpoints(run, workdir)
    try:
        check_workdir(config, workdir)  # again: another start may have come before the lock
        record = _run(run, checkpointer, workdir, profile)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if (explained := _explained(error, run, checkpointer)) is error:
            raise
        raise explained from error
    finally:
        # After an error of this process alone it would wait for the others, and they for it.
        failed = sys.exc_info()[1]
        if failed is None or isinstance(failed, Stopped) or not run.distributed:
            checkpointer.close()
    summary = {"step": record["step"], **record["summary"]}
    return summary | {"seconds": round(time.perf_counter() - start, 1), "workdir": str(workdir)}


def open_checkpoints(run: Run, workdir: Path) -> Checkpointer:
    """The checkpoints of a run, of which the best by the task's headline are kept."""
    best = Best(f"test/{run.task.headline}", run.task.higher_is_better)
    config = run.config
    return Checkpointer(
        workdir, best=best, keep_latest=config.keep_latest, keep_best=config.keep_best
    )


def _run(run: Run, checkpointer: Checkpointer, workdir: Path, profile: Profile) -> Json:
    """Restore, compile, and take all steps; returns the record of the last."""
    lead, total, headline = jax.process_index() == 0, run.total_steps, run.task.headline
    state, shardings, record = restore_or_init(run, checkpointer)
    write_config(run.config, workdir, enabled=lead)
    share = share_of_peak(run.task.step_flops(), run.mesh.devices.flat)
    with Reporter(
        workdir, run.config, total, record, headline=headline, peak_share=share, enabled=lead
    ) as reporter:
        if record["step"] >= total:
            return record
        programs = compile_programs(run, shardings)
        with (
            StopSignal(run.distributed, checkpointer.reached_preemption) as stop,
            contextlib.closing(batches_after(run, record["step"])) as batches,
            profile.into(reporter.folder),
            jax.transfer_guard("disallow"),
        ):
            return _steps(
                run, programs, batches, state, record, checkpointer, reporter, stop, profile
            )


def _explained(error: Exception, run: Run, checkpointer: Checkpointer) -> Exception:
    """Explain an error of XLA to the person who started the run; a bug stays as it is."""
    reason = first_line(error)
    if lacks_memory(error):
        return ValueError(
            f"a step must fit into the memory of a device; it does not ({reason}). Raise "
            "optim.accumulate_steps, set model.remat=full, or split over more devices; lower "
            "eval_batch_size if it was evaluating."
        )
    if not run.distributed or reason.startswith(_OURS):
        return error
    return LostProcess(
        f"all processes must stay; one was lost, or failed here ({reason}). Start all "
        f"of them again: they go on after step {checkpointer.latest_step or 0}."
    )


def restore_or_init(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, Shardings, Json]:
    """State, shardings and record: of the latest checkpoint, or of step 0."""
    facts = run.task.facts(run.rows["train"])
    if checkpointer.latest_step is not None:
        workdir = checkpointer.directory.parent
        recorded = read_facts(workdir)
        check_facts(recorded, facts, workdir)
        abstract, shardings = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
        stored, record, problems = checkpointer.restore_newest(to_stored(abstract))
        notes = [f"set aside: {problem}" for problem in problems]
        unsaid = facts.keys() - recorded.keys()
        if unsaid and record["step"] < run.total_steps:
            notes.append(
                f"the checkpoints in {workdir} do not say what they were trained on "
                f"({', '.join(sorted(unsaid))}); from now on they will, and the data must stay so"
            )
        return from_stored(stored), shardings, record | {"notes": notes, FACTS: facts}
    state, shardings, notes = first_state(run, facts)
    return state, shardings, {"step": 0, "summary": {}, "notes": notes, FACTS: facts}


def compile_programs(run: Run, shardings: Shardings) -> Programs:
    """The three programs of a run, sharded over its mesh; each compiles when it is first used."""
    return Programs(
        train_step=jit_train_step(run, shardings),
        evaluate=make_evaluate(run, jit_sums(run)),
        inspect=make_inspect(run),
    )


def _steps(
    run: Run,
    programs: Programs,
    batches: Batches,
    state: TrainState,
    record: Json,
    checkpointer: Checkpointer,
    reporter: Reporter,
    stop: StopSignal,
    profile: Profile,
) -> Json:
    """All steps after the restored one; returns the record of the last."""
    config, total, strict = run.config, run.total_steps, run.config.on_failed_save == "stop"
    # Gloo, which joins processes on CPUs, mixes up the collectives of two steps under way together.
    lockstep = jax.process_count() > 1 and jax.default_backend() == "cpu"
    # Made where it is used: a key cannot be put onto devices of other processes.
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(run.mesh))()

    def due(step: int, every: int) -> bool:
        return step == total or (every > 0 and step % every == 0)

    def settle(step: int, metrics: Scalars) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(step, values, checkpointer)
        log = due(step, config.log_every_steps)
        reporter.trained(step, values, log=log, waited_s=batches.waited_s, skipped=batches.skipped)

    unsettled = None
    for step in range(record["step"] + 1, total + 1):
        profile.before(step)
        batch = next(batches)
        state, metrics = programs.train_step(state, batch, key)
        profile.after(step, metrics)
        if unsettled:
            settle(*unsettled)
        unsettled = (step, metrics)
        if lockstep:
            jax.block_until_ready(metrics)

        inspects = config.log_objective_every_steps and due(step, config.log_objective_every_steps)
        evaluates = due(step, config.eval_every_steps)
        saves = due(step, config.checkpoint_every_steps or config.eval_every_steps)
        stopping = stop.at(step)
        if not (inspects or evaluates or saves or stopping):
            continue

        settle(*unsettled)
        unsettled = None
        with reporter.paused():
            if inspects:
                seen = programs.inspect(state.params, state.extra, batch)
                reporter.inspected(step, *jax.device_get(seen))
            tested = None
            if evaluates:
                params = state.params if state.ema_params is None else state.ema_params
                tested = reporter.tested(step, programs.evaluate(params, state.extra))
            if saves or stopping:
                record = {
                    "step": step,
                    "examples_seen": step * config.batch_size,
                    "summary": dict(reporter.summary),
                    "ema": state.ema_params is not None,
                    "config": to_dict(config),
                    FACTS: record[FACTS],
                }
                with jax.transfer_guard("allow"):  # Orbax copies to the host in a way of its own
                    try:
                        reporter.flush()
                        checkpointer.save(step, to_stored(state), record, tested)
                    except OSError as error:
                        if strict:
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
