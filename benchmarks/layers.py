"""Which layers compress, and which sparsify? Trained digits models, and the same before training.

    python benchmarks/layers.py --output benchmarks/results/layers_digits_cpu_2core.json

Every contender trains by its form of configs/digits.py. Then every layer is measured, as
`python -m crate_jax layerwise` does, on 256 training digits and on 256 test digits, with the first
parameters and with the last. A ViT has neither subspaces nor a sparse code, and stands for
contrast: of it the rate of its tokens is measured. The table holds what each half does to its
objective. The JSON also has R^c by the official code's definition.
"""

import tempfile
from typing import Any

from frame import Result, command_line, publish, table

# By name: the form of configs/digits.py, and what differs from it.
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "crate": ("crate", ()),
    "alpha": ("alpha", ()),
    "vit": ("vit", ()),
    "MSSA + MLP": ("crate", ("--config.model.nonlinearity=mlp",)),
    "crate, minus sign": ("crate", ("--config.model.attention_sign=minus",)),
}
IMAGES = 256


def measured(name: str, *flags: str) -> Result:
    """Measures and verdicts of a contender: by moment, split and definition."""
    import jax

    from crate_jax.analysis.verdict import verdict
    from crate_jax.checkpoint.reading import restore_trained
    from crate_jax.cli.flags import parse_config
    from crate_jax.cli.layerwise import measure_split
    from crate_jax.training.beginning import before_training
    from crate_jax.training.loop import train
    from crate_jax.training.run import set_up

    form, own = CONTENDERS[name]
    config = parse_config(f"configs/digits.py:{form}", [*own, *flags])
    found: Result = {}
    with tempfile.TemporaryDirectory() as scratch:
        summary = train(config, scratch)
        found["top1"] = summary["test/top1"]
        for split in ("train", "test"):
            config.data.eval_split = split
            run = set_up(config, "eval")
            shapes = jax.eval_shape(run.task.init, run.key)
            moments: dict[str, Any] = {
                "initial": before_training(run, {}),
                "trained": restore_trained(scratch, *shapes, summary["step"])[:2],
            }
            for moment, (params, extra) in moments.items():
                values = measure_split(run, params, extra, images=IMAGES, geometry=True)
                here = {k: [float(x) for x in v.mean] for k, v in values.items()}
                here["verdict"] = verdict(values)
                if "subspace_rate" in values:
                    official = measure_split(
                        run, params, extra, images=IMAGES, definition="official_code"
                    )
                    rates = official["subspace_rate"].mean
                    here["official_subspace_rate"] = [float(x) for x in rates]
                found[f"{moment}, {split}"] = here
    jax.clear_caches()
    return found


def main() -> None:
    """One contender after the other."""
    args = command_line(__doc__).parse_args()
    found = {name: measured(name) for name in CONTENDERS}
    publish(args, {"images": IMAGES, "models": found}, report=report)


def report(result: Result) -> list[str]:
    """A table a model: of each layer what each half does, before and after training."""
    lines = []
    for name, found in result["models"].items():
        lines += ["", f"### {name}, test accuracy {found['top1']:.3f}", ""]
        heads = "layer | moment | split | R^c | change of R^c | change of LASSO | zeros | R"
        rows = []
        for moment in ("initial", "trained"):
            for split in ("train", "test"):
                here = found[f"{moment}, {split}"]
                keys = ("subspace_rate", "compression", "descent", "zeros", "rate")
                for layer in range(len(here["rate"])):
                    numbers = [f"{here[k][layer]:.3g}" if k in here else "–" for k in keys]
                    rows.append(" | ".join([str(layer + 1), moment, split, *numbers]))
        lines += table(heads, rows, words=3)
    return lines


if __name__ == "__main__":
    main()
