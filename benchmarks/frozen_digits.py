"""What the frozen features of a recipe on digits know, beside raw pixels and random weights.

    python benchmarks/frozen_digits.py --recipe digits:mae --seeds 3

A model is trained for each seed; then `probe` and `knn` read its features, and those of weights
that the same seed draws. The last line is JSON: means over the seeds, and what each found.
"""

import contextlib
import statistics
import tempfile
from pathlib import Path

from frame import Result, child, command_line, positive, publish

KINDS = ("linear/top1", "k20/top1")
SOURCES = ("", "pixels/", "random/")


def measure(recipe: str, seed: int, workdir: Path) -> Result:
    """The numbers of one seed, of the trained model and of both baselines."""
    config = Path("configs", recipe.replace(":", ".py:", 1))
    child("train.py", f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}")
    found: Result = {}
    for command in ("probe", "knn"):
        flags = ["--workdir", workdir, "--baselines", "pixels", "random", "--seeds", seed]
        found |= child("-m", "crate_jax", command, *flags)
    return {"seed": seed} | {f"{s}{kind}": found[f"{s}{kind}"] for s in SOURCES for kind in KINDS}


def summary(runs: list[Result]) -> Result:
    """Means over the seeds, and the error as a share of that of random weights."""
    found: Result = {}
    for kind in KINDS:
        means = {s: statistics.mean(run[f"{s}{kind}"] for run in runs) for s in SOURCES}
        found |= {f"{source}{kind}": mean for source, mean in means.items()}
        found[f"{kind}/error_of_random"] = (1 - means[""]) / (1 - means["random/"])
    return found


def main() -> None:
    """One run a seed."""
    parser = command_line(__doc__)
    parser.add_argument("--recipe", default="digits:mae")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--runs", type=Path, help="keeps the runs, and goes on with those there")
    args = parser.parse_args()
    runs: list[Result] = []
    with contextlib.ExitStack() as stack:
        folder = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in range(args.seeds):
            runs.append(measure(args.recipe, seed, folder / f"seed{seed}"))
            print(runs[-1], flush=True)
    publish(args, summary(runs) | {"runs": runs}, "scikit-learn")


if __name__ == "__main__":
    main()
