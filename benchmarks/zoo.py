"""The forms of the digits recipe side by side: test accuracy, at equal steps and at equal seconds.

    python benchmarks/zoo.py --output benchmarks/results/zoo_cpu_2core.json

First the training steps of all contenders take turns on one batch: so fast is each. Then every
contender has the same small tuning budget: each learning rate of --rates once, trained on the first
1,200 training digits and judged on the other 300. With the best one it trains on all 1,500, once a
seed: for as many steps as the others, and for as many as its own speed leaves it in the seconds
that the first contender's steps take. So what else the machine does meanwhile changes nothing.
--output is written after every contender, and what is in it already is not run again.
docs/zoo.md is made from this by `benchmarks/zoo_page.py`.
"""

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import timing
from frame import Result, command_line, positive, publish, table

# By name: the form of configs/digits.py, and what differs from it.
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "crate": ("crate", ()),
    "alpha": ("alpha", ()),
    "vit": ("vit", ()),
    "tost": ("tost", ()),
    "cbsa": ("cbsa", ()),
    "aot": ("aot", ()),
    "crate, minus sign": ("crate", ("--config.model.attention_sign=minus",)),
    "crate, tied output": ("crate", ("--config.model.tied_output=True",)),
    "crate, soft threshold": ("crate", ("--config.model.threshold=soft",)),
    "crate, three steps of ISTA": ("crate", ("--config.model.ista_steps=3",)),
    "crate, step sizes learned": ("crate", ("--config.model.step_sizes=shared",)),
    "crate, step sizes by layer": ("crate", ("--config.model.step_sizes=per_layer",)),
    "crate, U and D orthonormal": ("crate", ("--config.optim.orthonormal=U,D",)),
    "crate, penalty on skew U and D": ("crate", ("--config.penalty.orthogonality=0.001",)),
    "crate, penalty on SRR": ("crate", ("--config.penalty.srr=0.01",)),
    "hyper_set": ("hyper_set", ()),
    "cbsa's frame, TSSA": ("cbsa", ("--config.model.attention=tssa",)),
    "cbsa's frame, MSSA": ("cbsa", ("--config.model.attention=mssa",)),
    "crate, TSSA for MSSA": ("crate", ("--config.model.attention=tssa",)),
    "crate, CBSA for MSSA": (
        "crate",
        ("--config.model.attention=cbsa", "--config.model.representatives=2"),
    ),
    "crate, MHSA for MSSA": ("crate", ("--config.model.attention=mhsa",)),
    "crate, MLP for ISTA": ("crate", ("--config.model.nonlinearity=mlp",)),
}
FIRST = next(iter(CONTENDERS))
TEST = 297  # digits that nothing trains on and no rate is chosen by
STEPS_AN_EPOCH = 15  # 1,500 digits in batches of 100


def config_of(name: str, *flags: str) -> Any:
    """The recipe of a contender, with further flags."""
    from crate_jax.cli.flags import parse_config

    form, own = CONTENDERS[name]
    return parse_config(f"configs/digits.py:{form}", [*own, *flags])


def one_step(name: str) -> Callable[[], Any]:
    """A call that takes one training step more, on the first batch."""
    import jax

    from crate_jax.training.run import batches_after, jit_train_step, set_up
    from crate_jax.training.state import init_sharded

    run = set_up(config_of(name), "train")
    with contextlib.closing(batches_after(run, 0)) as batches:
        batch = next(batches)
    held, shardings = init_sharded(run.task, run.tx, run.key, run.mesh, ema=run.ema)
    step, key = jit_train_step(run, shardings), jax.random.key(0)

    def call() -> Any:
        nonlocal held
        held, metrics = step(held, batch, key)
        return metrics["loss"]

    call()  # compiles
    return call


def train(name: str, seed: int, rate: float, epochs: float, *more: str) -> Result:
    """What one run ends with: its accuracy and its steps."""
    import jax

    from crate_jax.training.loop import train

    config = config_of(
        name,
        f"--config.seed={seed}",
        f"--config.optim.lr={rate}",
        f"--config.total_epochs={epochs}",
        f"--config.optim.warmup_epochs={epochs / 16}",  # as much of it as in the recipe
        "--config.eval_every_steps=0",
        "--config.log_objective_every_steps=0",
        *more,
    )
    with tempfile.TemporaryDirectory() as scratch:
        summary = train(config, scratch)
    jax.clear_caches()
    return {"top1": summary["test/top1"], "steps": summary["step"]}


def contend(args: argparse.Namespace, name: str, pace: float) -> Result:
    """Tuning, then the runs at equal steps, then those at equal seconds.

    Args:
        args: the budget.
        name: of the contender.
        pace: its seconds a step, by those of the first contender.
    """
    held_out = ("--config.data.train_split=train[:1200]", "--config.data.eval_split=train[1200:]")
    tuned = {
        rate: train(name, args.seeds, rate, args.tuning_epochs, *held_out)["top1"]
        for rate in map(float, args.rates.split(","))
    }
    rate = max(tuned, key=lambda each: tuned[each])
    runs = functools.partial(runs_of, name, rate, args.seeds)
    by_steps, epochs = runs(args.epochs), max(1, round(args.epochs / pace))
    by_seconds = by_steps if epochs == args.epochs else runs(epochs)
    return {"tuned": tuned, "rate": rate, "by_steps": by_steps, "by_seconds": by_seconds}


def runs_of(name: str, rate: float, seeds: int, epochs: int) -> list[Result]:
    """A run a seed."""
    return [train(name, seed, rate, epochs) for seed in range(seeds)]


def spread(runs: list[Result]) -> str:
    """Mean and deviation of the accuracies, in percent."""
    found = [100 * run["top1"] for run in runs]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found) if found[1:] else 0.0:.1f}"


def line(name: str, of: Result, seconds: float) -> str:
    """A row of the table."""
    steps = [str(of[kind][0]["steps"]) for kind in ("by_steps", "by_seconds")]
    cells = [name, f"{of['rate']:g}", f"{1e3 * seconds:.1f}", steps[0], spread(of["by_steps"])]
    return " | ".join([*cells, steps[1], spread(of["by_seconds"])])


def leaders(result: Result, kind: str) -> str:
    """Who wins, and whose mean is too close to tell."""
    found = {name: [run["top1"] for run in of[kind]] for name, of in result["contenders"].items()}
    means = {name: statistics.mean(values) for name, values in found.items()}
    best = max(means, key=lambda name: means[name])
    # Two means of a few seeds differ where they are further apart than both deviations together,
    # and than the standard error of an accuracy on so few digits.
    noise = (means[best] * (1 - means[best]) / TEST) ** 0.5
    deviation = {n: statistics.stdev(v) if v[1:] else 0.0 for n, v in found.items()}
    close = [
        name
        for name in means
        if name != best
        and means[best] - means[name] <= max(noise, deviation[best] + deviation[name])
    ]
    tied = f"; too close to tell apart: {', '.join(close)}" if close else ""
    return f"{best} wins, {100 * means[best]:.1f} %{tied}."


def report(result: Result) -> list[str]:
    """The table, and who wins."""
    heads = ["model", "learning rate", "ms a step", "steps", "top-1, equal steps"]
    heads += ["steps", "top-1, equal seconds"]
    paces = result["seconds_a_step"]
    found = result["contenders"]
    rows = (line(name, found[name], paces[name]) for name in CONTENDERS if name in found)
    seconds = paces[FIRST] * result["epochs"] * STEPS_AN_EPOCH
    return [
        *table(" | ".join(heads), rows),
        "",
        f"Top-1 in percent on {TEST} digits, mean ± deviation over {result['seeds']} seeds. "
        f"Milliseconds are medians of {result['rounds']} rounds in which all take turns.",
        f"At equal steps: {leaders(result, 'by_steps')}",
        f"At equal seconds ({seconds:.1f} s of training steps, as many as {FIRST} takes): "
        f"{leaders(result, 'by_seconds')}",
    ]


def main() -> None:
    """Every contender that --output does not hold yet."""
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3", help="learning rates to choose from")
    parser.add_argument("--tuning-epochs", type=positive, default=20)
    parser.add_argument("--epochs", type=positive, default=40, help="of the runs at equal steps")
    parser.add_argument("--only", default="", help="contenders with this in their name")
    args = parser.parse_args()
    there = args.output and args.output.exists()
    found: Result = json.loads(args.output.read_text()) if there else {}
    contenders, paces = found.get("contenders", {}), found.get("seconds_a_step", {})
    if paces.keys() != CONTENDERS.keys():
        times = timing.race({name: one_step(name) for name in CONTENDERS}, args.rounds)
        paces = {name: statistics.median(each) for name, each in times.items()}
        publish(args, {"seconds_a_step": paces, "contenders": contenders}, quiet=True)
    names = [name for name in CONTENDERS if args.only in name]
    for name in names:
        if name in contenders:
            continue
        print(name, flush=True)
        contenders[name] = contend(args, name, paces[name] / paces[FIRST])
        found = {"seconds_a_step": paces, "contenders": contenders}
        publish(args, found, report=report, quiet=name != names[-1])


if __name__ == "__main__":
    main()
