"""Read a run's checkpoints from outside: its parameters, and a list of the checkpoints."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from crate_jax.buckets import sizes
from crate_jax.checkpoint.faults import DamagedStepError
from crate_jax.checkpoint.folder import FOLDER
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.record import FACTS, newest
from crate_jax.files import Json, located
from crate_jax.parallel import PyTree


def restore_params(
    workdir: str | Path, abstract_params: PyTree, step: str | int = "latest"
) -> tuple[PyTree, int]:
    """`restore_trained` for a run that has only parameters."""
    params, _, number = restore_trained(workdir, abstract_params, (), step)
    return params, number


def restore_trained(
    workdir: str | Path, abstract_params: PyTree, abstract_extra: PyTree, step: str | int = "latest"
) -> tuple[PyTree, PyTree, int]:
    """Restore trained parameters, without the optimizer state: the averaged ones if there are any.

    Args:
        workdir: the run's directory.
        abstract_params: tree of `jax.ShapeDtypeStruct`, with shardings to restore onto those,
            without to restore to the default device.
        abstract_extra: likewise, of what the state holds besides, such as running statistics; ()
            for nothing.
        step: "latest", "best" or a number.

    Returns:
        The parameters, the extra and the number of their step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there is no such step, or it cannot be read, or it holds another tree.
    """
    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        params = "ema_params" if reader.restore_record(number).get("ema", False) else "params"
        wanted = {params: jax.tree.map(_on_a_device, abstract_params)}
        if jax.tree.leaves(abstract_extra):
            wanted["extra"] = jax.tree.map(_on_a_device, abstract_extra)
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        found, _ = reader.restore_part(number, wanted, arguments)
        return found[params], found.get("extra", abstract_extra), number
    finally:
        reader.close()


def _on_a_device(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf with its sharding, or else on the first local device."""
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or single)


def read_params(workdir: str | Path, step: str | int) -> tuple[PyTree, Json]:
    """`read_trained` without the other variables of the state."""
    params, _, record = read_trained(workdir, step)
    return params, record


def read_trained(workdir: str | Path, step: str | int) -> tuple[PyTree, PyTree, Json]:
    """Read the trained parameters, whatever their shapes are: the averaged ones if there are any.

    Args:
        workdir: the run's directory.
        step: "latest", "best" or a number.

    Returns:
        The parameters as NumPy arrays; likewise what the state holds besides, such as running
        statistics, () for nothing; and the JSON record of that step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there is no such step, or it cannot be read.
    """
    reader = Checkpointer(workdir, read_only=True)
    try:
        number = reader.resolve(step)
        record = reader.restore_record(number)
        name = "ema_params" if record.get("ema", False) else "params"
        saved = reader.saved_shapes(number)
        wanted = {branch: saved[branch] for branch in (name, "extra") if branch in saved}
        found, _ = reader.restore_part(number, wanted, _as_numpy(wanted))
        return found[name], found.get("extra", ()), record
    finally:
        reader.close()


def read_facts(workdir: str | Path) -> Json:
    """Read a run's facts about its outputs and its data; {} if an older version wrote all of it.

    A run goes on with the same data alone, so what one of its records says holds for all.
    """
    directory = located(workdir, "workdir") / FOLDER
    return (newest(directory, FACTS) if directory.is_dir() else None) or {}


def inspect(workdir: str | Path) -> list[Json]:
    """Every checkpoint of a run, read whole and compared with its digest.

    Args:
        workdir: the run's directory.

    Returns:
        For each step, ascending: ``step``, ``mib`` on disk, ``metrics``, ``best`` (whether
        ``--step=best`` means it), ``intact`` and, if it is not, ``problem``. ``intact`` is None for
        a step that was saved without a digest and can be read.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    reader = Checkpointer(workdir, read_only=True)
    try:
        return [_inspect(reader, step) for step in reader.steps]
    finally:
        reader.close()


def _inspect(reader: Checkpointer, step: int) -> Json:
    found: Json = {
        "step": step,
        "mib": round(sizes(reader.directory / str(step)) / 2**20, 2),
        "metrics": {},
        "best": step == reader.best_step,
    }
    try:
        found["metrics"] = reader.metrics(step)
        shapes = reader.saved_shapes(step)
        reader.restore_part(step, shapes, _as_numpy(shapes))
    except DamagedStepError as error:
        return found | {"intact": False, "problem": str(error)}
    return found | {"intact": True if reader.has_digest(step) else None}


def _as_numpy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
