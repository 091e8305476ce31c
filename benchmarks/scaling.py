"""What `plan` says of CRATE-B, CRATE-L and a CRATE of 1B parameters on 1 to 1,024 devices.

    python benchmarks/scaling.py --output benchmarks/results/scaling_plan.json

Nothing is run on any of these devices: see docs/scaling.md, which holds the table that this prints.
"""

from frame import Result, child, command_line, publish, table

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


def plan(size: str, spec: str, flags: list[str]) -> Result:
    """The result of the command."""
    config = f"--config=configs/imagenet1k.py:{size}"
    return child("-m", "crate_jax", "plan", f"--mesh={spec}", *flags, config)


def line(row: Result) -> str:
    """A line of the table."""
    images = row["batch_size"] // (row["mesh"]["data"] * row["mesh"]["fsdp"])
    memory = f"{row['memory']['total'] / 2**30:.1f}"
    sent = f"{row['gradient_bytes'] / 1e6:,.0f}, {row['gathered_bytes'] / 1e6:,.0f}"
    times = []
    for chip in SHOWN:
        low, high = (1e3 * s for s in row["chips"][chip]["step_s"])
        fits = row["chips"][chip]["fits"]
        times.append(f"{low:,.1f} to {high:,.1f}" if fits else "does not fit")
    return " | ".join([row["case"], row["spec"], str(images), memory, sent, *times])


def report(result: Result) -> list[str]:
    """The table."""
    heads = ["", "mesh", "images a device", "GiB a device", "MB all-reduced, gathered"]
    heads += [f"ms on {chip}" for chip in SHOWN]
    return table(" | ".join(heads), map(line, result["rows"]), words=2)


def main() -> None:
    """Plan every case, print the table."""
    args = command_line(__doc__).parse_args()
    rows = [
        {"case": name, "spec": spec} | plan(size, spec, flags)
        for name, size, specs, flags in CASES
        for spec in specs
    ]
    publish(args, {"rows": rows}, "optax", report=report)


if __name__ == "__main__":
    main()
