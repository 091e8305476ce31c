"""Test accuracy and time of the default recipe over several seeds, each a process from nothing.

    python benchmarks/digits_seeds.py --seeds 3

The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import describe_cpu


def main() -> None:
    """Train once a seed with an empty workdir and an empty compile cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", help="write the JSON there too")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            environment = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
                "TFDS_DATA_DIR": f"{scratch}/data",
                "PYTHONPATH": str(root),
            }
            start = time.perf_counter()
            out = subprocess.run(
                [
                    sys.executable,
                    str(root / "train.py"),
                    f"--workdir={scratch}/run",
                    f"--config.seed={seed}",
                ],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            seconds = time.perf_counter() - start
        summary = json.loads(out.stdout.splitlines()[-1])
        runs.append({"seed": seed, "top1": summary["test/top1"], "seconds": round(seconds, 1)})
        print(runs[-1], flush=True)
    import jax

    result = {
        "top1_mean": round(statistics.mean(run["top1"] for run in runs), 4),
        "seconds_median": statistics.median(run["seconds"] for run in runs),
        "runs": runs,
        "hardware": f"{describe_cpu()}, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
