"""The content of the page of `report`, section by section."""

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from crate_jax.analysis import Measured
from crate_jax.analysis.equations import OBJECTIVE, equations
from crate_jax.analysis.figures import Picture, by_layer, curves, inline_svg, write_csv
from crate_jax.analysis.figures.canvas import number
from crate_jax.analysis.verdict import verdict
from crate_jax.buckets import is_remote
from crate_jax.cli.drawings import FIGURES, Asked
from crate_jax.cli.measuring import (
    COMPRESSION,
    GEOMETRY,
    HALVES,
    Found,
    as_curves,
    measured,
    named,
    of_decoders,
)
from crate_jax.cli.page_sections import PICTURES, Of
from crate_jax.cli.specimen import NotThere, Specimen
from crate_jax.files import Json, written_aside
from crate_jax.pages import render
from crate_jax.waiting import counting

PAGE = "index.html"


class Page:
    """A page about one run or two.

    Args:
        runs: opened.
        output: the folder that it is written to.

    Attributes:
        runs: likewise.
        count: the number of figures.
        left_out: a sentence for each section that no run has.
        measures: the measures of the first run on its test split.
    """

    def __init__(self, runs: list[Specimen], output: Path):
        self.runs, self.output = runs, output
        self.count = 0
        self.left_out: list[str] = []
        self.measures: dict[str, Measured] = {}
        self._sections: list[Json] = []
        self._names = list(named(runs))

    def draw(self) -> None:
        """Measure and draw all sections; their data is written on the way."""
        if not is_remote(self._data):
            self._data.mkdir(parents=True, exist_ok=True)
        with counting("report", len(PICTURES) + 2, "sections") as add:
            self._training()
            self._objective()
            add(1)
            for of in PICTURES:
                self._pictures(of)
                add(1)
            self._inspected()
            add(1)
        if self.left_out:
            self._add("left-out", "What is left out", texts=self.left_out)

    def write(self, *, refresh: bool) -> None:
        """Write the page, whole or not at all; data goes that only an earlier page had."""
        text = render(
            "report.html",
            title=" and ".join(self._names),
            subtitle=self._subtitle(),
            numbers=self._numbers(),
            architectures=self._architectures(),
            sections=self._sections,
            refresh=10 if refresh else 0,
            command=shlex.join(["python", "-m", "crate_jax", *sys.argv[1:]]),
            version=_version(),
            time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        earlier = linked(self.output)
        with written_aside(self.output / PAGE) as aside:
            aside.write_text(text, encoding="utf-8")
        for name in earlier - linked(self.output):
            (self._data / name).unlink(missing_ok=True)

    @property
    def _data(self) -> Path:
        return self.output / "data"

    def _add(self, id: str, title: str, **parts: Any) -> None:
        """Add a section."""
        empty: Json = dict.fromkeys(
            ("texts", "equations", "verdicts", "panels", "columns", "tables"), ()
        )
        self._sections.append(empty | {"id": id, "title": title} | parts)

    def _plate(self, picture: Picture, name: str, label: str) -> Json:
        """A picture as the template takes it; its data is written."""
        self.count += 1
        inches = picture.figure.get_figwidth()
        write_csv(picture, self._data / f"{name}.csv")
        return {
            "svg": inline_svg(picture, name),
            "alt": picture.alt,
            "csv": f"{name}.csv",
            "label": label,
            "size": "few" if inches < 4.6 else "broad" if inches > 7.5 else "",
        }

    def _training(self) -> None:
        """Curves of what was logged."""
        logs = {name: run.metrics for name, run in zip(self._names, self.runs, strict=True)}
        known = {key for lines in logs.values() for line in lines for key in line}
        task = self.runs[0].run.task
        first = ["loss", task.headline, "lr", "grad_norm"]
        scalars = [
            key.partition("/")[2] for key in sorted(known) if key.startswith(("train/", "test/"))
        ]
        wanted = dict.fromkeys([*first, *scalars])
        names = [n for n in wanted if n in scalars and n not in ("examples", "param_norm")][:6]
        panels = [self._plate(curves(logs, n), f"curve_{n.replace('/', '_')}", n) for n in names]
        if panels:
            self._add("training", "Training", panels=panels)
        else:
            self.left_out.append("Training: the run has no metrics.jsonl with scalars.")

    def _objective(self) -> None:
        """The section on the measures of the layers."""
        try:
            found = measured(self.runs)
        except NotThere as error:
            self.left_out.append(f"The objective, layer by layer: {error}")
            return
        if len(self.runs) == 1 and isinstance(begun := self.runs[0].beginning, str):
            self.left_out.append(f"Before training: {begun}")
        label = next(iter(found))
        self.measures = dict(found[label])
        texts = [
            "MSSA is to lower the coding rate Rᶜ of the tokens in its subspaces, ISTA to make them "
            "sparse. Rᶜ and R are of the tokens after the attention; zeros are counted after ISTA "
            "or in the code of a wide dictionary. Bands are one deviation over the images.",
            f"Measured on {self._measured_on()}.",
        ]
        parts: Json = {"texts": texts, "equations": OBJECTIVE, "tables": self._tables(found)}
        parts["verdicts"] = self._verdicts(found)
        parts["panels"] = self._panels(found, COMPRESSION)
        self._add("objective", "The objective, layer by layer", **parts)
        if panels := self._panels(found, HALVES):
            text = (
                "Below zero the half descends its own objective: Rᶜ of the tokens by the "
                "attention with its skip, the LASSO by ISTA or the code."
            )
            self._add("halves", "What each half of a layer does", texts=[text], panels=panels)
        if panels := self._panels(found, GEOMETRY):
            self._add("geometry", "Geometry of the tokens", panels=panels)
        self._decoder()

    def _decoder(self) -> None:
        """The section on the measures of a decoder's layers, if there is one."""
        found = of_decoders(self.runs)
        if panels := self._panels(found, COMPRESSION + HALVES, "decoder"):
            text = (
                "A layer of the decoder undoes what one of the encoder does: its dictionary comes "
                "first, and its attention is subtracted. Nothing is hidden from the encoder here."
            )
            parts: Json = {"texts": [text], "verdicts": self._verdicts(found), "panels": panels}
            self._add("decoder", "The decoder, layer by layer", **parts)

    def _panels(self, found: Found, measures: Sequence[Any], name: str = "layers") -> list[Json]:
        """A figure for each measure that anything has."""
        drawn = as_curves(found)
        return [
            self._plate(by_layer(drawn, [m]), f"{name}_{m.name}", m.title)
            for m in measures
            if any(m.name in of for of in drawn.values())
        ]

    def _measured_on(self) -> str:
        counts = [len(next(iter(run.batch.values()))) for run in self.runs]
        data = self.runs[0].config.data
        splits = data.eval_split
        if len(self.runs) == 1:
            splits += f" and {data.train_split}"
        return (
            f"{' and '.join(map(str, dict.fromkeys(counts)))} examples of {data.dataset}, {splits}"
        )

    def _tables(self, found: Found) -> list[Json]:
        """Every measure in numbers, by layer."""
        tables = []
        for label, of in found.items():
            if of:
                L = len(next(iter(of.values())).mean)
                rows = [[name, *map(number, m.mean)] for name, m in of.items()]
                head = ["mean", *(f"ℓ = {i + 1}" for i in range(L))]
                tables.append({"title": f"All measures, {label}", "head": head, "rows": rows})
        return tables

    def _verdicts(self, found: Found) -> list[tuple[str, list[str]]]:
        """The verdicts on the trained layers, in words, on the test split."""
        labels = list(found) if len(self.runs) > 1 else ["test"]
        said = [(label, verdict(found[label])) for label in labels]
        return [(label, [x.replace("R^c", "Rᶜ") for x in lines]) for label, lines in said if lines]

    def _pictures(self, of: Of) -> None:
        """A section with a column for each run."""
        columns, reasons = [], []
        for place, (name, run) in enumerate(zip(self._names, self.runs, strict=True)):
            pictures, absent = [], []
            for figure in of.figures:
                try:
                    picture = FIGURES[figure]([run], Asked())
                except NotThere as error:
                    absent.append(str(error))
                    continue
                file = figure if len(self.runs) == 1 else f"{figure}_{place + 1}"
                pictures.append(self._plate(picture, file, of.title))
            absent = list(dict.fromkeys(absent))
            columns.append({"run": name, "pictures": pictures, "absent": absent})
            reasons += absent
        if any(column["pictures"] for column in columns):
            self._add(of.id, of.title, texts=[of.text], columns=columns)
        else:
            self.left_out.append(f"{of.title}: {reasons[0]}")

    def _inspected(self) -> None:
        """Pictures that the task itself shows."""
        columns = []
        for place, (name, run) in enumerate(zip(self._names, self.runs, strict=True)):
            pictures = [
                self._plate(picture, f"{kind}_{place + 1}", kind)
                for kind, picture in run.inspected()
            ]
            columns.append({"run": name, "pictures": pictures, "absent": []})
        if any(column["pictures"] for column in columns):
            self._add("task", "What the task shows", columns=columns)

    def _subtitle(self) -> str:
        run = self.runs[0]
        return f"{run.config.task} on {run.config.data.dataset}, checkpoint of step {run.step}"

    def _numbers(self) -> list[tuple[str, str]]:
        """Headline numbers of every run."""
        found = []
        for name, run in zip(self._names, self.runs, strict=True):
            whose = f"{name}: " if len(self.runs) > 1 else ""
            found.append((f"{whose}step", f"{run.step:,}"))
            key = f"test/{run.run.task.headline}"
            lines = [x for x in run.metrics if key in x and x["step"] <= run.step]
            if lines:
                found.append((f"{whose}{key}", number(lines[-1][key])))
        return found

    def _architectures(self) -> list[Json]:
        """Facts and equations of every run's model; runs of the same model share them."""
        all_of = []
        for name, run in zip(self._names, self.runs, strict=True):
            try:
                parts = equations(run.model)
            except (NotThere, KeyError):
                parts = []
            all_of.append({"run": name, "facts": run.facts(), "equations": parts})
        return all_of


def linked(output: Path) -> set[str]:
    """The data files of the page in a folder; none where there is no page yet.

    Raises:
        FileExistsError: the page there is none of `report`, which would take its place.
    """
    page = output / PAGE
    if not page.exists():
        return set()
    text = page.read_bytes().decode(errors="replace")  # a bucket's read_text takes no errors
    if "crate_jax" not in text:
        raise FileExistsError(
            f"--output must be a new folder, or one of a report; {page} is another page. Choose "
            "another folder."
        )
    return set(re.findall(r'href="data/([^"/]+)"', text))


def _version() -> str:
    """The version of this package."""
    try:
        return version("crate-jax")
    except PackageNotFoundError:
        return "from a folder"
