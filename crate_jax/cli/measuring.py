"""The measures that figures and pages take of the layers of runs, and their names."""

from collections.abc import Mapping, Sequence

from crate_jax.analysis import Measured, measure, measured_of
from crate_jax.analysis.decoder import DecoderLayers
from crate_jax.analysis.figures import Curve, Measure
from crate_jax.cli.examples import parts
from crate_jax.cli.specimen import Specimen

COMPRESSION = (
    Measure("subspace_rate", "compression", "Rᶜ in nats"),
    Measure("zeros", "sparsification", "share of zeros"),
    Measure("rate", "coding rate", "R in nats"),
    Measure("rate_reduction", "rate reduction", "ΔR = R − Rᶜ in nats"),
)
HALVES = (
    Measure("compression", "what the attention does to Rᶜ", "change of Rᶜ in nats"),
    Measure("descent", "what the second half does to the LASSO", "change, per token"),
    Measure("subspace_rate_before", "compression before the layer", "Rᶜ in nats"),
    Measure("rate_before", "coding rate before the layer", "R in nats"),
    Measure("lasso_before", "LASSO before the step", "per token"),
    Measure("lasso_after", "LASSO after the step", "per token"),
)
GEOMETRY = (
    Measure("effective_rank", "effective rank of a subspace", "directions"),
    Measure("token_rank", "effective rank of the tokens", "directions"),
    Measure("mean_angle", "angle between two tokens", "degrees"),
    Measure("attention_entropy", "entropy of the attention", "nats"),
    Measure("coherence_within", "coherence of U, within a subspace", "mean |cosine|"),
    Measure("coherence_between", "coherence of U, between subspaces", "mean |cosine|"),
    Measure("dictionary_coherence", "coherence of D", "mean |cosine|"),
    Measure("l0", "entries that are not zero", "per token"),
    Measure("l1", "ℓ₁ norm of the code", "per token"),
)
ALL = COMPRESSION + HALVES + GEOMETRY

Found = dict[str, Mapping[str, Measured]]


def measured(runs: Sequence[Specimen], names: Sequence[str] = tuple(m.name for m in ALL)) -> Found:
    """The measures of every run by what they are of; of one run also before training.

    Args:
        runs: one, measured on test and train and before training, or several, measured on test.
        names: the names of the measures; those that a model does not have are left out.
    """
    if len(runs) > 1:
        return {name: _of(run, names) for name, run in named(runs).items()}
    (run,) = runs
    found = {"test": _of(run, names), "train": _of(run, names, train=True)}
    if not isinstance(run.beginning, str):
        found["before training"] = _of(run, names, first=True)
    return found


def named(runs: Sequence[Specimen]) -> dict[str, Specimen]:
    """The runs by names that tell them apart."""
    for names in ([run.name for run in runs], [run.workdir for run in runs]):
        if len(set(names)) == len(runs):
            return dict(zip(names, runs, strict=True))
    return {f"{run.workdir} ({i + 1})": run for i, run in enumerate(runs)}


def of_decoders(runs: Sequence[Specimen]) -> Found:
    """The measures of the decoders' layers on the test split; {} where no run has one."""
    names = tuple(m.name for m in COMPRESSION + HALVES)
    found: Found = {}
    for name, run in named(runs).items():
        if getattr(run.model, "decoder_depth", 0):
            found["test" if len(runs) == 1 else name] = _of(run, names, decoder=True)
            if len(runs) == 1 and not isinstance(run.beginning, str):
                found["before training"] = _of(run, names, first=True, decoder=True)
    return found


def as_curves(found: Found) -> dict[str, Mapping[str, Curve]]:
    """Measures as figures take them."""
    return {
        label: {name: Curve(value.mean, value.std) for name, value in values.items()}
        for label, values in found.items()
    }


def _of(
    run: Specimen,
    names: Sequence[str],
    *,
    train: bool = False,
    first: bool = False,
    decoder: bool = False,
) -> Mapping[str, Measured]:
    """The measures of one run's layers on one split, trained or before training."""
    inside = run.inside(run.train_batch if train else run.batch, first=first)
    model = DecoderLayers(inside.model) if decoder else inside.model
    there = [name for name in measured_of(model) if name in names]
    return measure(model, inside.variables, parts(inside), there) if there else {}
