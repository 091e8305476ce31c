"""How long does it take to load weights, and how much memory? Each kind of file in its own process.

    python benchmarks/load_weights.py --model crate_large_patch16_224

Random weights are written as a training checkpoint of the official kind (``state_dict`` under
``module.`` names), a bare state dict, safetensors and npz, then loaded by `crate_jax.load_weights`.
Seconds are from the call to the finished tree, once with nothing but crate_jax imported (so that a
PyTorch file pays for PyTorch's import) and once with everything; memory is the growth of the
process's largest resident size over the load, PyTorch already imported, as a multiple of the file.
Files are in the page cache. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
from frame import child, command_line, publish

import crate_jax


def write_files(folder: Path, name: str) -> list[Path]:
    """The same random weights in every format."""
    import torch

    from crate_jax.parity.torch_reference import from_flax_model

    torch.manual_seed(0)
    model = crate_jax.create_model(name)
    state = from_flax_model(model).state_dict()
    wrapped = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, folder / "official.pth.tar")
    params = crate_jax.load_weights(folder / "official.pth.tar", model)
    paths = [folder / f"ours.{suffix}" for suffix in ("pth", "safetensors", "npz")]
    for path in paths:
        crate_jax.save_weights(path, params, model)
    return [folder / "official.pth.tar", *paths]


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def load(path: str, name: str, import_torch: bool) -> dict[str, float]:
    """In a process of its own: seconds and bytes of one load."""
    if import_torch:
        import torch  # noqa: F401
    jax.devices()
    model = crate_jax.create_model(name)
    before = resident("VmRSS")
    start = time.perf_counter()
    crate_jax.load_weights(path, model)
    seconds = time.perf_counter() - start
    grown = resident("VmHWM") - before
    return {"seconds": seconds, "memory_ratio": grown / os.path.getsize(path)}


def main() -> None:
    """Write, load in turns, print."""
    parser = command_line(__doc__, model="crate_large_patch16_224", rounds=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.child[0], args.model, args.child[1] == "warm")))
        return
    seen: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), args.model)
        megabytes = round(os.path.getsize(paths[0]) / 1e6)
        for _ in range(args.rounds):
            for path in paths:
                entry = seen.setdefault(path.name, {})
                for state in ("cold", "warm"):
                    numbers = child(__file__, f"--model={args.model}", "--child", path, state)
                    entry.setdefault(f"seconds_{state}", []).append(numbers["seconds"])
                entry.setdefault("memory_ratio", []).append(numbers["memory_ratio"])
    files = {
        name: {key: statistics.median(values) for key, values in entry.items()}
        for name, entry in seen.items()
    }
    publish(args, {"files": files, "megabytes": megabytes}, "torch", "safetensors")


if __name__ == "__main__":
    main()
