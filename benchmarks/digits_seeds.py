"""Test accuracy and time of the default recipe over several seeds, each a process from nothing.

    python benchmarks/digits_seeds.py --seeds 3

Each trains with an empty workdir and an empty cache of compiled programs. The last line is JSON.
"""

import statistics
import tempfile
import time

from frame import child, command_line, positive, publish


def train(seed: int) -> dict[str, float]:
    """Accuracy and seconds of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        summary = child(
            "train.py",
            f"--workdir={scratch}/run",
            f"--config.seed={seed}",
            JAX_COMPILATION_CACHE_DIR=f"{scratch}/compiled",
            TFDS_DATA_DIR=f"{scratch}/data",
        )
        seconds = time.perf_counter() - start
    return {"seed": seed, "top1": summary["test/top1"], "seconds": seconds}


def main() -> None:
    """One run a seed."""
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=positive, default=3)
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        runs.append(train(seed))
        print(runs[-1], flush=True)
    found = {
        "top1_mean": statistics.mean(run["top1"] for run in runs),
        "seconds_median": statistics.median(run["seconds"] for run in runs),
        "runs": runs,
    }
    publish(args, found)


if __name__ == "__main__":
    main()
