"""For how long does a save block the training, and how long until it is on disk?

    python benchmarks/checkpoint.py --model crate_large_patch16_224

The state is that of AdamW: parameters and two moments. ``blocked_s`` is what `Checkpointer.save`
takes, with nothing else being saved: the digest of the state and its copy to the host; Orbax writes
the rest in the background. ``digest_s`` is the digest alone, ``written_s`` the whole until the step
is on disk, and ``restore_s`` reading it back, digest compared. Medians, lowest and highest of the
rounds, after one round that compiles. The last line is JSON.
"""

import os
import tempfile
import time
from typing import Any

import jax
import optax
from frame import command_line, publish
from timing import spread

import crate_jax
from crate_jax.checkpoint.digest import digest
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.parallel import make_mesh
from crate_jax.tasks import Classify
from crate_jax.training.state import abstract_state, init_sharded


def measure(checkpointer: Checkpointer, step: int, state: Any, abstract: Any) -> dict[str, float]:
    """Seconds of each part, for one step."""
    marks = [time.perf_counter()]
    digest(state)
    marks.append(time.perf_counter())
    checkpointer.save(step, state, {})
    marks.append(time.perf_counter())
    checkpointer.wait()
    marks.append(time.perf_counter())
    jax.block_until_ready(checkpointer.restore(step, abstract))
    marks.append(time.perf_counter())
    return {
        "digest_s": marks[1] - marks[0],
        "blocked_s": marks[2] - marks[1],
        "written_s": marks[3] - marks[1],
        "restore_s": marks[4] - marks[3],
    }


def main() -> None:
    """Save and restore in turns, print."""
    parser = command_line(__doc__, model="crate_large_patch16_224", rounds=5)
    parser.add_argument(
        "--folder",
        type=os.path.expanduser,
        help="where to write; default: the folder of temporary files",
    )
    args = parser.parse_args()
    task = Classify(crate_jax.create_model(args.model))
    mesh, tx, key = make_mesh(), optax.adamw(1e-3), jax.random.key(0)
    state, _ = init_sharded(task, tx, key, mesh)
    abstract, _ = abstract_state(task, tx, key, mesh)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpointer = Checkpointer(folder)
        rounds = [measure(checkpointer, step, state, abstract) for step in range(args.rounds + 1)]
        checkpointer.close()
    found: dict[str, Any] = {"bytes": sum(x.nbytes for x in jax.tree.leaves(state))}
    for name in rounds[0]:
        found |= spread(name, [measured[name] for measured in rounds[1:]])
    publish(args, found, "orbax-checkpoint")


if __name__ == "__main__":
    main()
