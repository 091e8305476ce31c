"""Does a converted checkpoint help? Fine-tuning on digits against the same run from scratch.

    python benchmarks/finetune_digits.py --seeds 3

Pre-trains the digits recipe on the first 1,200 training digits at 24 pixels (3 x 3 patches), writes
its weights as an official PyTorch state dict (`python -m crate_jax convert`), and trains on the
other 300 at 32 pixels (4 x 4 patches: positions resized, head new) for a few epochs, once from
these weights and once from scratch, all else equal; all through train.py. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from hardware import describe_cpu

ROOT = Path(__file__).resolve().parent.parent
FIT = "--config.init_fit=head,image_size"


def command(*arguments: str) -> dict:
    """Run one of the project's commands: the JSON of its last line."""
    out = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def pixels(size: int) -> list[str]:
    """The digits recipe at another size."""
    augment = "random_affine(degrees=15, shift=0.15, scale=0.15, shear=10)"
    return [
        f"--config.model.image_size={size},{size}",
        f"--config.data.train_transforms=resize({size})|{augment}",
        f"--config.data.eval_transforms=resize({size})",
    ]


def main() -> None:
    """Pre-train, convert, then both runs for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="of the runs on 300 digits")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        first = command(
            "train.py",
            f"--workdir={scratch}/pretrained",
            "--config.name=pretrained",
            "--config.data.train_split=train[:1200]",
            *pixels(24),
        )
        weights = f"{scratch}/pretrained.pth"
        command("-m", "crate_jax", "convert", "--from", f"{scratch}/pretrained", "--to", weights)
        for seed in range(args.seeds):
            tested = {}
            starts = {"finetuned": [f"--config.init_weights={weights}", FIT], "scratch": []}
            for name, start in starts.items():
                summary = command(
                    "train.py",
                    f"--workdir={scratch}/{name}_{seed}",
                    f"--config.seed={seed}",
                    "--config.data.train_split=train[1200:]",
                    f"--config.total_epochs={args.epochs}",
                    "--config.log_objective_every_steps=0",
                    "--config.eval_every_steps=0",
                    *pixels(32),
                    *start,
                )
                tested[name] = round(summary["test/top1"], 4)
            runs.append({"seed": seed} | tested)
            print(runs[-1], flush=True)
    result = {
        name: round(statistics.mean(run[name] for run in runs), 4)
        for name in ("finetuned", "scratch")
    } | {
        "pretrained_top1_at_24_pixels": round(first["test/top1"], 4),
        "epochs": args.epochs,
        "runs": runs,
        "hardware": describe_cpu(),
        "jax": version("jax"),
        "command": " ".join(["python", "benchmarks/finetune_digits.py", *sys.argv[1:]]),
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
