"""What `plan` says of CRATE-B, CRATE-L and a CRATE of 1B parameters on 1 to 1,024 devices.

    python benchmarks/scaling.py --output benchmarks/results/scaling_plan.json

Nothing is run on any of these devices: see docs/scaling.md, which holds the table that this prints.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

WHOLE = ["data:1", "data:8", "data:64", "data:256", "data:1024"]
# 48 layers of 40 subspaces of dimension 64, recomputed in the backward pass.
LARGE = [
    "--config.model.width=2560",
    "--config.model.depth=48",
    "--config.model.num_heads=40",
    "--config.model.remat=full",
]
SPLIT = ["data:1", "fsdp:8", "data:8,fsdp:8", "data:32,fsdp:8", "data:128,fsdp:8"]
CASES = [
    ("CRATE-B", "base", WHOLE, []),
    ("CRATE-L", "large", WHOLE, []),
    ("1B", "large", SPLIT, LARGE),
]
SHOWN = ("v5e", "v5p", "h100")


def main() -> None:
    """Plan every case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    rows = [
        {"case": name, "spec": spec} | plan(size, spec, flags)
        for name, size, specs, flags in CASES
        for spec in specs
    ]
    print("| | mesh | images a device | GiB a device | MB all-reduced, gathered | "
          + " | ".join(f"ms on {chip}" for chip in SHOWN) + " |")  # fmt: skip
    print("|---" * (5 + len(SHOWN)) + "|")
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    found = {"rows": rows, "versions": {n: version(n) for n in ("jax", "flax", "optax")}}
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"rows": len(rows)}))


def plan(size: str, spec: str, flags: list[str]) -> dict[str, Any]:
    """The result of the command."""
    command = [sys.executable, "-m", "crate_jax", "plan", f"--mesh={spec}", *flags]
    command.append(f"--config=configs/imagenet1k.py:{size}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    devices = row["mesh"]["data"] * row["mesh"]["fsdp"]
    sent = f"{row['gradient_bytes'] / 1e6:,.0f}, {row['gathered_bytes'] / 1e6:,.0f}"
    times = []
    for chip in SHOWN:
        seconds = row["chips"][chip]
        low, high = (1e3 * s for s in seconds["step_s"])
        time = f"{low:,.1f} to {high:,.1f}"
        times.append(time if seconds["fits"] else "does not fit")
    return [row["case"], row["spec"], str(row["batch_size"] // devices),
            f"{row['memory']['total'] / 2**30:.1f}", sent, *times]  # fmt: skip


if __name__ == "__main__":
    main()
