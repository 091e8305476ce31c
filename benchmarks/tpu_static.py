"""What a training step costs on a TPU, without one: a static estimate from the real compiler.

    python benchmarks/tpu_static.py --size base --batch-size 64 --variants attention_kernel=xla auto

Needs ``pip install 'crate-jax[tpu-compiler]'``. The step is compiled for one v5e. Of each operation
of the optimised program it takes the bytes through HBM (`crate_jax.planning.program`) and the
bundles of the compiler's last schedule (`bundles`). The larger of their two times is the time of
the operation, and the sum is the estimate: nothing overlaps, and nothing waits. That is a model and
no measurement.
Beside it are two formulas. Arithmetic: `crate_jax.models.cost.step_flops` at the chip's peak.
Unavoidable bytes: each weight, gradient and moment read once and written once, and tokens in and
out of every layer in both directions. --before compiles the step of another checkout too, such as
a worktree of an earlier commit. --keep is for a second look: what the compiler wrote stays in that
folder, and what is there is not compiled again. The last line is JSON; --output writes it, the
tables beside it.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bundles import FLAGS, Schedule, schedules, shared, without_schedule
from frame import ROOT, Result, child, command_line, publish, table

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is, JAX would look for a TPU

CLOCK = 1.503e9  # Hz of a v5e: its peak over the multiply-adds of four units of 128 x 128
SHOWN = 25
SIZES = ("tiny", "small", "base", "large")


def main() -> None:
    """Compile each variant in a process of its own, print the tables."""
    parser = command_line(__doc__, batch_size=64)
    parser.add_argument("--size", choices=SIZES, default="base", help="of CRATE")
    parser.add_argument("--before", type=Path, help="a checkout whose step is compiled first")
    parser.add_argument(
        "--variants", nargs="+", default=["auto"], help="auto, and fields such as backward=autodiff"
    )
    parser.add_argument("--keep", type=Path, help="a folder for what the compiler writes")
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compile-into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile_into:
        compile_step(args)
        return
    rows = [row("before", args, args.before, "auto")] if args.before else []
    rows += [row(variant, args, ROOT, variant) for variant in args.variants]
    publish(args, {"rows": rows}, "optax", "libtpu", report=report)


def compile_step(args: argparse.Namespace) -> None:
    """In a process that libtpu is told to write its schedule: compile the step, write its text."""
    sys.path.insert(0, str(args.source))
    import jax
    from jax.experimental import topologies

    from crate_jax.config import ParallelConfig
    from crate_jax.parallel import batch_sharding
    from crate_jax.training.run import jit_train_step, set_up
    from crate_jax.training.state import abstract_state

    recipe = args.source / "configs" / "imagenet1k.py"
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    config = module.get_config(args.size)
    config.batch_size = args.batch_size
    for variant in args.variants:
        field, equals, value = variant.partition("=")
        if equals:
            setattr(config.model, field, value)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    config = dataclasses.replace(config, parallel=ParallelConfig(mesh="data:1"))
    run = set_up(config, devices=topology.devices)
    state, shardings = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    rows = batch_sharding(run.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((args.batch_size, *one.shape[1:]), one.dtype, sharding=rows)
        for name, one in run.task.blank().items()
    }
    key = jax.eval_shape(lambda: run.key)
    compiled = jit_train_step(run, shardings).lower(state, batch, key).compile()
    (args.compile_into / "program.txt").write_text(compiled.as_text())
    held = compiled.memory_analysis()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    print(
        json.dumps(
            {
                "memory": held.argument_size_in_bytes + held.temp_size_in_bytes,
                "temporary": held.temp_size_in_bytes,
                "parameters": size(state.params),
                "moments": size(state.opt_state),
            }
        )
    )


def row(name: str, args: argparse.Namespace, source: Path, variant: str) -> Result:
    """The account of one variant."""
    from crate_jax import create_model
    from crate_jax.models.cost import step_flops
    from crate_jax.planning.chips import CHIPS
    from crate_jax.planning.hlo import read
    from crate_jax.planning.program import account

    with kept(args, name) as folder:
        made = folder / "made.json"
        text = made.read_text() if made.exists() else ""
        made = (
            json.loads(text)
            if text
            else child(
                Path(__file__),
                f"--compile-into={folder}",
                f"--source={source.resolve()}",
                f"--size={args.size}",
                f"--batch-size={args.batch_size}",
                "--variants",
                variant,
                JAX_PLATFORMS="cpu",
                TPU_WORKER_HOSTNAMES="localhost",
                TPU_SKIP_MDS_QUERY="1",
                TPU_ACCELERATOR_TYPE="v5litepod-4",
                ALLOW_MULTIPLE_LIBTPU_LOAD="1",
                LIBTPU_INIT_ARGS=FLAGS.format(folder),
            )
        )
        text = (folder / "program.txt").read_text()
        (folder / "made.json").write_text(json.dumps(made))
        operations, program = account(text), read(text)
        scheduled = shared(schedules(folder), program)
    chip, model = CHIPS["v5e"], create_model(f"crate_{args.size}_patch16_224", dtype="bfloat16")
    tokens = args.batch_size * model.num_tokens * model.width
    lines = [
        line_of(x.name, x.opcode, x.source, x.trips, x.bytes, scheduled.get(x.name), chip)
        for x in operations
    ]
    arithmetic = step_flops(model) * args.batch_size / chip.flops
    bytes_at_least = 2 * (2 * made["parameters"] + made["moments"]) + 4 * model.depth * tokens * 2
    floor = max(arithmetic, bytes_at_least / chip.memory_bandwidth)
    in_layers = [x for x in lines if x["trips"] >= model.depth]
    estimate = sum(x["ms"] for x in lines)
    return {
        "variant": name,
        "hbm_gb": sum(x["gb"] for x in lines),
        "memory_gib": made["memory"] / 2**30,
        "temporary_gib": made["temporary"] / 2**30,
        "copies_a_layer": sum(
            x.trips for x in operations if x.is_copy and x.values >= tokens and x.trips > 1
        )
        / model.depth,
        "hbm_ms": sum(x["hbm_ms"] for x in lines),
        "bundles_ms": sum(x["bundles_ms"] for x in lines),
        "estimate_ms": estimate,
        "layers_ms": sum(x["ms"] for x in in_layers),
        "arithmetic_ms": 1e3 * arithmetic,
        "unavoidable_ms": 1e3 * bytes_at_least / chip.memory_bandwidth,
        "times_the_floor": estimate / (1e3 * floor),
        "loops_of_unknown_length": sum(
            scheduled[x.name].unknown for x in operations if x.name in scheduled
        ),
        "without_schedule": without_schedule([x.name for x in operations], scheduled, program),
        "operations": sorted(lines, key=lambda x: -x["ms"])[:SHOWN],
    }


@contextlib.contextmanager
def kept(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """The folder of what the compiler writes about a variant."""
    if not args.keep:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = args.keep.resolve() / f"{args.size}-{args.batch_size}-{name.rpartition('=')[2]}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def line_of(
    name: str, opcode: str, source: str, trips: int, size: int, of: Schedule | None, chip
) -> Result:
    """The account of one operation, in one step."""
    cycles, units = (trips * of.bundles, of.units) if of else (0, {})
    hbm, bundles = 1e3 * size / chip.memory_bandwidth, 1e3 * cycles / CLOCK
    busiest = max(units, key=units.get, default="")  # type: ignore[arg-type]
    return {
        "operation": name,
        "kind": opcode,
        "source": "/".join(source.split("/")[-2:]),
        "trips": trips,
        "gb": size / 1e9,
        "hbm_ms": hbm,
        "bundles_ms": bundles,
        "ms": max(hbm, bundles),
        "busiest": f"{busiest} {units[busiest] / of.bundles:.0%}" if of and busiest else "",
    }


def report(result: Result) -> list[str]:
    """What the variants come to, and the dearest operations of the last one."""
    heads = ["variant", "HBM, GB", "ms", "bundles, ms", "estimate, ms", "of it layers"]
    heads += ["arithmetic, ms", "unavoidable bytes, ms", "x the larger", "copies a layer"]
    heads += ["GiB", "of it temporary", "loops of unknown length", "products without a schedule"]
    lines = table(" | ".join(heads), map(_line, result["rows"]))
    lines += ["", "A loop of unknown length counts once. Without a schedule bytes alone count."]
    for row in result["rows"]:
        if names := row["without_schedule"]:
            lines += [f"In {row['variant']} these products have none: {', '.join(names)}."]
    heads = ["operation", "of", "times", "HBM, GB", "ms", "bundles, ms", "estimate, ms", "busiest"]
    dearest = result["rows"][-1]["operations"]
    lines += ["", f"The dearest operations of {result['rows'][-1]['variant']}:", ""]
    lines += table(" | ".join(heads), map(_operation, dearest), words=2)
    return ["Static estimates for one TPU v5e; nothing was run on one.", "", *lines]


def _line(row: Result) -> str:
    times = ["hbm_ms", "bundles_ms", "estimate_ms", "layers_ms", "arithmetic_ms", "unavoidable_ms"]
    cells = [row["variant"], f"{row['hbm_gb']:.1f}", *(f"{row[name]:.1f}" for name in times)]
    cells += [f"{row['times_the_floor']:.2f}", f"{row['copies_a_layer']:.0f}"]
    cells += [f"{row['memory_gib']:.2f}", f"{row['temporary_gib']:.2f}"]
    cells += [str(row["loops_of_unknown_length"]), str(len(row["without_schedule"]))]
    return " | ".join(cells)


def _operation(x: Result) -> str:
    cells = [x["operation"], x["source"], str(x["trips"]), f"{x['gb']:.3f}", f"{x['hbm_ms']:.3f}"]
    return " | ".join([*cells, f"{x['bundles_ms']:.3f}", f"{x['ms']:.3f}", x["busiest"]])


if __name__ == "__main__":
    main()
