"""How well does a trained run tell text, beside counts of letters? Bits per byte, held out.

    python benchmarks/text_baselines.py --recipe text
    python benchmarks/text_baselines.py --recipe text --workdir runs/text

Trains the recipe, or evaluates a run of it that is there, and counts single tokens and pairs of
tokens in the same training text. To each count k is added, which is chosen on every tenth context
of the training text, counted on the others. All three are asked for every token of the evaluation
split but the first. The last line is JSON; the exit status is 1 if the run is not below both.
"""

import os
import resource
import sys
import tempfile
import time

import numpy as np
from frame import Result, child, command_line, publish

from crate_jax.cli.recipes import load_recipe
from crate_jax.tasks import NextToken

SMOOTHING = [10.0**power for power in range(-4, 3)]
TENTH = 10  # of the contexts one in so many chooses k


def counts(pieces: list[np.ndarray], order: int, size: int) -> np.ndarray:
    """How often each token follows each, (V, V); of order 1 whatever stands before it, (1, V)."""
    found = np.zeros((size if order == 2 else 1, size))
    for piece in pieces:
        np.add.at(found, (piece[:-1] * (order == 2), piece[1:]), 1)
    return found


def bits(counted: np.ndarray, k: float, pieces: list[np.ndarray]) -> float:
    """What it costs to tell all tokens of some pieces but their first."""
    p = (counted + k) / (counted + k).sum(axis=1, keepdims=True)
    paired = len(counted) > 1
    return -sum(np.log2(p[piece[:-1] * paired, piece[1:]]).sum() for piece in pieces)


def baseline(train: np.ndarray, test: np.ndarray, order: int, size: int, context: int) -> Result:
    """Bits of the test, and the k that the training text chose."""
    pieces = [train[i : i + context + 1] for i in range(0, len(train) - 1, context)]
    chosen, others = pieces[::TENTH], [p for i, p in enumerate(pieces) if i % TENTH]
    held_out = counts(others, order, size)
    k = min(SMOOTHING, key=lambda k: bits(held_out, k, chosen))
    return {"bits": bits(counts([train], order, size), k, [test]), "k": k}


def main() -> None:
    """The run, then the counts."""
    parser = command_line(__doc__)
    parser.add_argument("--recipe", default="text")
    parser.add_argument("--workdir", help="a run of the recipe; default: one is trained")
    args = parser.parse_args()
    config = load_recipe(args.recipe)
    splits = ((config.data.train_split, True), (config.data.eval_split, False))
    task, (rows, held_out) = NextToken.open(config, *splits)
    train, test = rows.tokens.tokens, held_out.tokens.tokens
    size, length = rows.vocab_size, int(held_out.lengths[test[1:]].sum())
    found: Result = {"train_tokens": len(train), "test_tokens": len(test) - 1, "test_bytes": length}
    for name, order in (("unigram", 1), ("bigram", 2)):
        told = baseline(train, test, order, size, task.model.context_length)
        found[name] = {"bits_per_byte": told["bits"] / length, "k": told["k"]}
    found["run"] = of_run(args.recipe, args.workdir)
    ours = found["run"]["bits_per_byte"]
    both = [found[name]["bits_per_byte"] for name in ("unigram", "bigram")]
    found["below_both"] = bool(ours < min(both))
    publish(args, found)
    sys.exit(not found["below_both"])


def of_run(recipe: str, workdir: str | None) -> Result:
    """Loss and bits per byte of a run; of one that is trained here, its seconds."""
    if workdir:
        summary = child("-m", "crate_jax", "evaluate", f"--workdir={workdir}")
        return {name: summary[name] for name in ("step", "loss", "bits_per_byte")}
    load, start = os.getloadavg()[0], time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as scratch:
        cache = dict(JAX_COMPILATION_CACHE_DIR=f"{scratch}/compiled")
        summary = child("train.py", f"--config={recipe}", f"--workdir={scratch}/run", **cache)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {name: summary[f"test/{name}"] for name in ("loss", "bits_per_byte")}
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": spent}
    return {"step": summary["step"]} | found | seconds | {"load_before": load}


if __name__ == "__main__":
    main()
