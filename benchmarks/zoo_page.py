"""Write docs/zoo.md: every named model, what it costs, what its authors got, where its weights are.

And what each family has in each command, which `family_commands.py` states.

    python benchmarks/zoo_page.py

Parameters and multiply-adds are computed here. Published results and weights are those of
`crate_jax.models.sources`, and the digits those that `benchmarks/zoo.py` measured. A test holds the
page against this program.
"""

import json

from frame import ROOT, Result, measured_on, table

PAGE = ROOT / "docs" / "zoo.md"
DIGITS = ROOT / "benchmarks" / "results" / "zoo_cpu_2core.json"
HEAD = """# The zoo

Made by `python benchmarks/zoo_page.py`; do not edit.

This page has every model that `crate_jax.list_models()` names, by its source. Parameters and
multiply-adds are computed, at the sizes that the name stands for. Multiply-adds (GMACs) are those
of the matrix products of one image, or of one text as long as the context. Published results are
their authors', and were not measured here. A loss is a cross-entropy in nats a token.
"""
WEIGHTS = """## Released weights

The table lists the files that the authors released, with the licence that they state.
`crate_jax.load_pretrained(NAME)` downloads the files that lie on the Hugging Face hub (`hf://`).
Download the others by hand, and read them with `load_weights`. A digest is given by its first
digits. The page [weights.md](weights.md) says more.
"""
MATRIX = """## Commands

The table says which commands each family has. If a cell gives a reason against, the command ends
with one line that says so.
`tests/cli/test_family_commands.py` runs the command of every cell.

`taps` and `layerwise` are functions of `crate_jax.analysis`. `layerwise` gives R, the coding rate
of the tokens, for every family. Rᶜ needs the subspaces of MSSA, TSSA or CBSA. The share of zeros
needs ISTA, or the code of a wide dictionary. `convert` takes any family from one kind of file to
another. The official names are those that `--layout` takes.
"""
LIBRARY = """DEPICT's decoder, the white-box diffusion transformer and ReduNet have no name in
`list_models()`, so no command takes them. They are modules of the library: see
[docs/one_block.md](one_block.md). The diffusion transformer has taps, and ReduNet returns the rates
of every layer."""


def models(names: list[str]) -> list[str]:
    """The table of a group."""
    from crate_jax import create_model
    from crate_jax.models import cost
    from crate_jax.models.sources import RESULTS

    rows = []
    built = {name: create_model(name) for name in names}
    sizes = {name: cost.count_parameters(model) for name, model in built.items()}
    for name in sorted(names, key=lambda name: sizes[name]):
        model = built[name]
        known = cost.has_formula(model)
        gmacs = f"{cost.multiply_adds(model) / 1e9:.2f}" if known else "no formula"
        results = "; ".join(
            f"{what} {value:.{2 if 'loss' in what else 1}f}"
            for what, value in RESULTS.get(name, {}).items()
        )
        cells = [f"`{name}`", f"{sizes[name]:,}", gmacs, results or "none"]
        rows.append(" | ".join(cells))
    lines = table("model | parameters | GMACs | published", rows)
    lines[1] = "| --- | ---: | ---: | --- |"
    return lines


def groups() -> list[str]:
    """Every source with its models."""
    from crate_jax import list_models
    from crate_jax.models.sources import SOURCES, source_of

    lines = []
    for source in SOURCES:
        names = [name for name in list_models() if source_of(name) is source]
        told = [f"Paper: [arXiv {source.paper}](https://arxiv.org/abs/{source.paper})."]
        told += [f"Official code: {source.code}." if source.code else "No code was released."]
        told += [source.note] if source.note else []
        lines += [f"## {source.title}", "", " ".join(told), "", *models(names), ""]
    return lines


def commands() -> list[str]:
    """The matrix of families and commands, and why a cell is empty."""
    from family_commands import COMMANDS, FAMILIES, REFUSALS

    rows = [
        " | ".join([family, *(row.cells[command] for command in COMMANDS)])
        for family, row in FAMILIES.items()
    ]
    reasons = [f"- {cell}: {refusal.why}" for cell, refusal in REFUSALS.items()]
    heads = " | ".join(["family", *COMMANDS])
    matrix = table(heads, rows, words=len(COMMANDS) + 1)
    return [MATRIX, *matrix, "", *reasons, "", LIBRARY, ""]


def weights() -> list[str]:
    """The released files."""
    from crate_jax.models.released import RELEASED

    rows = []
    for file in RELEASED:
        size = f"{file.bytes:,}" if file.bytes else "not known"
        where = f"`{file.file}`" + (f", {file.note}" if file.note else "")
        where += "; the link is dead" if file.dead else ""
        outputs = f"{file.classes:,}" if file.classes else "none"
        cells = [f"`{file.name}`", where, file.licence, outputs, size]
        rows.append(" | ".join([*cells, f"{file.sha256}…" if file.sha256 else "not known"]))
    heads = "name | file | licence | classes | bytes | SHA-256"
    return [WEIGHTS, *table(heads, rows, words=3), ""]


def digits() -> list[str]:
    """What the forms of the digits recipe reach."""
    import zoo

    if not DIGITS.exists():
        return []
    result: Result = json.loads(DIGITS.read_text())
    told = (
        "Small models (width 96, 4 layers), trained here by `configs/digits.py`, each with the "
        "same tuning budget: three learning rates. Where the largest was the best, a larger one "
        "might be better still. The times were taken on an idle machine, before the runs."
    )
    return ["## On digits", "", told, "", *zoo.report(result), "", *measured_on(result), ""]


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *digits(), *groups(), *commands(), *weights()]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
