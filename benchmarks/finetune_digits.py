"""Does a converted checkpoint help? Fine-tuning on digits against the same run from scratch.

    python benchmarks/finetune_digits.py --seeds 3

Pre-trains the digits recipe on the first 1,200 training digits at 24 pixels (3 x 3 patches), writes
its weights as an official PyTorch state dict (`python -m crate_jax convert`), and trains on the
other 300 at 32 pixels (4 x 4 patches: positions resized, head new) for a few epochs, once from
these weights and once from scratch, all else equal; all through train.py. The last line is JSON.
"""

import statistics
import tempfile

from frame import child, command_line, positive, publish

FIT = "--config.init_fit=head,image_size"


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
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=40, help="of the runs on 300 digits")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        first = child(
            "train.py",
            f"--workdir={scratch}/pretrained",
            "--config.name=pretrained",
            "--config.data.train_split=train[:1200]",
            *pixels(24),
        )
        weights = f"{scratch}/pretrained.pth"
        child("-m", "crate_jax", "convert", "--from", f"{scratch}/pretrained", "--to", weights)
        for seed in range(args.seeds):
            tested = {}
            starts = {"finetuned": [f"--config.init_weights={weights}", FIT], "scratch": []}
            for name, start in starts.items():
                summary = child(
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
                tested[name] = summary["test/top1"]
            runs.append({"seed": seed} | tested)
            print(runs[-1], flush=True)
    ways = ("finetuned", "scratch")
    found = {way: statistics.mean(run[way] for run in runs) for way in ways}
    found |= {"pretrained_top1_at_24_pixels": first["test/top1"], "runs": runs}
    publish(args, found)


if __name__ == "__main__":
    main()
