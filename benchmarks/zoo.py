"""The forms of the digits recipe side by side: test accuracy, at equal steps and at equal seconds.

    python benchmarks/zoo.py --output benchmarks/results/zoo_cpu_2core.json

Every contender has the same small tuning budget: each learning rate of --rates once, trained on
the first 1,200 training digits and judged on the other 300. With the best one it trains on all
1,500, once a seed, for as many steps as the others, and once a seed for as many seconds: the steps
that its own speed, measured in the runs before, leaves in --seconds. Every run is a process of its
own; what it takes to start and to compile is left out of its seconds.
--output is written after every contender, and one that is in it already is not run again.
docs/zoo.md is made from this by `benchmarks/zoo_page.py`.
"""

import argparse
import json
import statistics
import tempfile

from frame import Result, child, command_line, positive, publish, table

# By name: the form of configs/digits.py, and what differs from it.
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "crate": ("crate", ()),
    "alpha": ("alpha", ()),
    "vit": ("vit", ()),
    "hyper_set": ("hyper_set", ()),
    "hyper-set": ("hyper_set", ()),
    "tost": ("tost", ()),
    "cbsa": ("cbsa", ()),
    "aot": ("aot", ()),
    "cbsa's frame, TSSA": ("cbsa", ("--config.model.attention=tssa",)),
    "cbsa's frame, MSSA": ("cbsa", ("--config.model.attention=mssa",)),
    "crate, TSSA for MSSA": ("crate", ("--config.model.attention=tssa",)),
    "crate, CBSA for MSSA": (
        "crate",
        ("--config.model.attention=cbsa", "--config.model.representatives=2"),
    ),
    "crate, MHSA for MSSA": ("crate", ("--config.model.attention=mhsa",)),
    "crate, MLP for ISTA": ("crate", ("--config.model.nonlinearity=mlp",)),
    "crate, minus sign": ("crate", ("--config.model.attention_sign=minus",)),
    "crate, tied output": ("crate", ("--config.model.tied_output=True",)),
    "crate, soft threshold": ("crate", ("--config.model.threshold=soft",)),
    "crate, three steps of ISTA": ("crate", ("--config.model.ista_steps=3",)),
    "crate, step sizes learned": ("crate", ("--config.model.step_sizes=shared",)),
    "crate, step sizes by layer": ("crate", ("--config.model.step_sizes=per_layer",)),
    "crate, U and D orthonormal": ("crate", ("--config.optim.orthonormal=U,D",)),
    "crate, penalty on skew U and D": ("crate", ("--config.penalty.orthogonality=0.001",)),
    "crate, penalty on SRR": ("crate", ("--config.penalty.srr=0.01",)),
}
TEST = 297  # digits that nothing trains on and no rate is chosen by


def train(
    form: str, flags: tuple[str, ...], seed: int, rate: float, epochs: float, *more: str
) -> Result:
    """What one run ends with: accuracy, its steps, and the seconds that a step took."""
    with tempfile.TemporaryDirectory() as scratch:
        summary = child(
            "train.py",
            f"--config=configs/digits.py:{form}",
            f"--workdir={scratch}/run",
            f"--config.seed={seed}",
            f"--config.optim.lr={rate}",
            f"--config.total_epochs={epochs}",
            f"--config.optim.warmup_epochs={epochs / 16}",  # as much of it as in the recipe
            "--config.eval_every_steps=0",
            "--config.log_objective_every_steps=0",
            "--config.log_every_steps=20",
            *flags,
            *more,
        )
        with open(f"{scratch}/run/metrics.jsonl") as lines:
            rows = [json.loads(line) for line in lines]
    speeds = [row["examples_per_s"] for row in rows if "examples_per_s" in row]
    return {
        "top1": summary["test/top1"],
        "steps": summary["step"],
        "seconds_per_step": 100 / statistics.median(speeds[1:] or speeds),
    }


def contend(args: argparse.Namespace, form: str, flags: tuple[str, ...]) -> Result:
    """Tuning, then the runs at equal steps, then those at equal seconds."""
    held_out = ("--config.data.train_split=train[:1200]", "--config.data.eval_split=train[1200:]")
    tuned = {
        rate: train(form, flags, args.seeds, rate, args.tuning_epochs, *held_out)["top1"]
        for rate in map(float, args.rates.split(","))
    }
    rate = max(tuned, key=lambda each: tuned[each])
    seeds = range(args.seeds)
    by_steps = [train(form, flags, seed, rate, args.epochs) for seed in seeds]
    pace = statistics.median(run["seconds_per_step"] for run in by_steps)
    epochs = max(1, round(args.seconds / pace / 15))  # an epoch is 15 batches of 100
    by_seconds = [train(form, flags, seed, rate, epochs) for seed in seeds]
    return {"tuned": tuned, "rate": rate, "by_steps": by_steps, "by_seconds": by_seconds}


def spread(runs: list[Result]) -> str:
    """Mean and deviation of the accuracies, in percent."""
    found = [100 * run["top1"] for run in runs]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found) if found[1:] else 0.0:.1f}"


def line(name: str, of: Result) -> str:
    """A row of the table."""
    pace = statistics.median(run["seconds_per_step"] for run in of["by_steps"])
    steps = [str(of[kind][0]["steps"]) for kind in ("by_steps", "by_seconds")]
    cells = [name, f"{of['rate']:g}", f"{1e3 * pace:.0f}", steps[0], spread(of["by_steps"])]
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
    rows = (line(name, of) for name, of in result["contenders"].items())
    return [
        *table(" | ".join(heads), rows),
        "",
        f"Top-1 in percent on {TEST} digits, mean ± deviation over {result['seeds']} seeds.",
        f"At equal steps: {leaders(result, 'by_steps')}",
        f"At equal seconds ({result['seconds']:g} s of training): {leaders(result, 'by_seconds')}",
    ]


def main() -> None:
    """Every contender that --output does not hold yet."""
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3", help="learning rates to choose from")
    parser.add_argument("--tuning-epochs", type=positive, default=20)
    parser.add_argument("--epochs", type=positive, default=40, help="of the runs at equal steps")
    parser.add_argument("--seconds", type=float, default=30.0, help="of those at equal seconds")
    parser.add_argument("--only", default="", help="contenders with this in their name")
    args = parser.parse_args()
    there = args.output and args.output.exists()
    found: Result = json.loads(args.output.read_text())["contenders"] if there else {}
    names = [name for name in CONTENDERS if args.only in name]
    for name in names:
        if name in found:
            continue
        print(name, flush=True)
        found[name] = contend(args, *CONTENDERS[name])
        publish(args, {"contenders": found}, report=report, quiet=name != names[-1])


if __name__ == "__main__":
    main()
