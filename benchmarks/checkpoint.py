"""For how long does a save block the training, and how long until it is on disk?

    python benchmarks/checkpoint.py --model crate_large_patch16_224

The state is that of AdamW: parameters and two moments. ``blocked_s`` is what `Checkpointer.save`
takes, with nothing else being saved: the digest of the state and its copy to the host; Orbax writes
the rest in the background. ``digest_s`` is the digest alone, ``written_s`` the whole until the step
is on disk, and ``restore_s`` reading it back, digest compared. Medians, lowest and highest of the
rounds, after one round that compiles. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
from hardware import describe_cpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crate_large_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the folder of temporary files")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
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
    print(f"{args.model}: {found['bytes'] / 1e6:.0f} MB")
    for name in rounds[0]:
        values = [measured[name] for measured in rounds[1:]]
        spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        found[name] = {k: round(v, 3) for k, v in spread.items()}
        print(f"{name:10}  {found[name]['median']:7.3f}  ({min(values):.3f} … {max(values):.3f})")
    found |= {
        "model": args.model,
        "rounds": args.rounds,
        "hardware": describe_cpu() if jax.default_backend() == "cpu" else str(jax.devices()[0]),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
        "command": f"python benchmarks/checkpoint.py --model {args.model} --rounds {args.rounds}",
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
