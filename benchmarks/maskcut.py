"""Which solver finds MaskCut's eigenvector, how fast, and whether the cut is the same.

    python benchmarks/maskcut.py

The graph has 60 x 60 patches, as of an image of 480 pixels and patches of 8, or fewer (--side). The
solvers take turns in one process. Each time is from the weights W to the vector x: Lanczos of
`crate_jax.analysis`, ARPACK (`scipy.sparse.linalg.eigsh` on the same normalised matrix without its
trivial vector), and LAPACK (`scipy.linalg.eigh(D - W, D, subset_by_index=[1, 1])`), in float64.
Then for every feature and τ: the share of the patches that are on the same side as by LAPACK in
float64 (of the normalised matrix, which is the same problem), the least over three starts, and the
gap to the next eigenvalue as ARPACK finds it. The last line is JSON; --output writes it, and the
tables beside it as Markdown.
"""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from frame import Result, command_line, publish, table
from scipy.sparse.linalg import LinearOperator, eigsh
from timing import race

from crate_jax import create_model
from crate_jax.analysis import taps
from crate_jax.analysis.maskcut import affinity, second_eigenvector

PATCH = 8
STARTS = 3
TAUS = (0.15, 0.4)  # the second for the features whose graph it makes sparse


def lapack(W: np.ndarray) -> tuple[float, np.ndarray]:
    """λ and x of the generalised problem as it is written."""
    W = W.astype(np.float64)
    D = np.diag(W.sum(axis=1))
    values, vectors = scipy.linalg.eigh(D - W, D, subset_by_index=[1, 1])
    return float(values[0]), vectors[:, 0]


def arpack(W: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The smallest λ but 0, and the x of the first."""
    root = np.sqrt(W.sum(axis=1, dtype=np.float64))
    trivial = (root / np.linalg.norm(root)).astype(np.float32)
    inverse = (1 / root).astype(np.float32)

    def times(y: np.ndarray) -> np.ndarray:
        y = y.ravel() - trivial * (trivial @ y.ravel())
        made = inverse * (W @ (inverse * y))
        return made - trivial * (trivial @ made)

    operator = LinearOperator(W.shape, matvec=times, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(len(W)).astype(np.float32)
    values, vectors = eigsh(operator, k=count, which="LA", v0=start, tol=1e-5)
    order = np.argsort(-values)
    return 1 - values[order], inverse * vectors[:, order[0]]


def same_side(x: np.ndarray, y: np.ndarray) -> float:
    """The share of the patches that two cuts at the mean put on the same side."""
    share = float(((x > x.mean()) == (y > y.mean())).mean())
    return max(share, 1 - share)


def features(side: int) -> dict[str, np.ndarray]:
    """By name: (P, f)."""
    from sklearn.datasets import load_sample_images

    from crate_jax.data.images.resize import resize_pixels

    rng = np.random.default_rng(0)
    model = create_model("crate_small_384_patch8_224", depth=4)
    params = jax.jit(lambda k: model.init(k, model.sample_input(), train=False)["params"])(
        jax.random.key(0)
    )
    found = {}
    photographs = load_sample_images()
    for name, image in zip(("china", "flower"), photographs.images, strict=True):
        pixels = resize_pixels(image, (side * PATCH, side * PATCH)).astype(np.float32)[None] / 255
        _, seen = taps(model, params, jnp.asarray((pixels - 0.45) / 0.22), names="subspace_tokens")
        tokens = np.asarray(seen["subspace_tokens"])[-1, 0, 1:]
        found[f"CRATE, random weights, {name}"] = tokens.reshape(side**2, -1)
        colour = pixels[0].reshape(side, PATCH, side, PATCH, 3).mean(axis=(1, 3)).reshape(-1, 3)
        if name == "flower":
            found[f"colours of patches, {name}"] = colour - colour.mean(axis=0)
    y, x = np.indices((side, side)) / side
    of = (np.hypot(y - 0.3, x - 0.3) < 0.15) + 2 * (np.hypot(y - 0.7, x - 0.6) < 0.2)
    for noise in (1, 4):
        centres = rng.standard_normal((3, 32))[of.ravel()]
        found[f"two discs, noise {noise}"] = centres + noise * rng.standard_normal(centres.shape)
    found["noise alone"] = rng.standard_normal((side**2, 32))
    return found


def measure(rounds: int, side: int) -> Result:
    """Times of the first feature, and the agreement of all."""
    rows = []
    known = features(side)
    name, F = next(iter(known.items()))
    W = affinity(F)
    runs: dict[str, Callable[[], object]] = {
        "lanczos": lambda: second_eigenvector(W),
        "arpack": lambda: arpack(W),
        "lapack": lambda: lapack(W),
    }
    times = race(runs, rounds, finish=lambda result: result)
    medians = {solver: statistics.median(of) for solver, of in times.items()}
    for name, F in known.items():
        for tau in TAUS if "noise 4" in name else TAUS[:1]:
            W = affinity(F, tau=tau)
            exact, x = second_eigenvector(W, solver="dense")
            ours = [second_eigenvector(W, seed=seed) for seed in range(STARTS)]
            values, y = arpack(W, count=2)
            rows.append(
                {
                    "features": name,
                    "tau": tau,
                    "cost": exact,
                    "gap": float(values[1] - values[0]),
                    "lanczos_same_side": min(same_side(x, each) for _, each in ours),
                    "lanczos_cost_error": max(abs(cost - exact) for cost, _ in ours),
                    "arpack_same_side": same_side(x, y),
                }
            )
    return {
        "patches": side**2,
        "timed": next(iter(known)),
        "seconds": medians,
        "times_as_fast": {s: medians["lapack"] / t for s, t in medians.items()},
        "lowest": min(times["lapack"]) / max(times["lanczos"]),
        "rows": rows,
    }


def report(result: Result) -> list[str]:
    """The tables."""
    speeds = (
        f"{solver} | {seconds:.3g} | {result['times_as_fast'][solver]:.1f}"
        for solver, seconds in result["seconds"].items()
    )
    rows = (
        f"{row['features']} | {row['tau']} | {row['cost']:.2g} | {row['gap']:.1g} | "
        f"{row['lanczos_same_side']:.2%} | {row['arpack_same_side']:.2%} | "
        f"{row['lanczos_cost_error']:.0e}"
        for row in result["rows"]
    )
    heads = "features | τ | λ | gap to the next | same side, Lanczos | ARPACK | error of λ, Lanczos"
    return [
        *table("solver | seconds, median | times as fast as LAPACK", speeds),
        "",
        f"Of {result['patches']} patches ({result['timed']}), {result['rounds']} rounds. The "
        f"slowest round of Lanczos was {result['lowest']:.0f} times as fast as the fastest of "
        "LAPACK.",
        "",
        *table(heads, rows),
    ]


def main() -> None:
    """Parse, measure, print, write."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--side", type=int, default=60)
    args = parser.parse_args()
    publish(args, measure(args.rounds, args.side), "scipy", report=report)


if __name__ == "__main__":
    main()
