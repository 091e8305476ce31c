"""A run that is looked into: its model, its weights, and examples for it."""

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crate_jax.cli.examples import Batch, as_floats, enlarged, first_examples, folder_images
from crate_jax.config import TrainConfig
from crate_jax.errors import is_mistake
from crate_jax.files import Json, located
from crate_jax.models.classifier import pair

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.analysis.figures import Picture
    from crate_jax.tasks.task import Inside
    from crate_jax.training.run import Run

SHOWN = 6  # images of a picture
_AT_ONCE = 8  # images whose attention is in memory


class NotThere(ValueError):
    """The run or its model lacks what a picture shows; a page says so in its place."""


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A run, opened to be looked at.

    Attributes:
        name: what pictures call it.
        workdir: the workdir of the run.
        step: of the checkpoint.
        run: with "eval" rows.
        params: the parameters of its task.
        extra: the extra of its task.
        examples: how many examples measures take.
        folder: of images for pictures; None: the first of the evaluation split.
        side: the side of the images for pictures, in pixels; None: as the model was trained.
    """

    name: str
    workdir: str
    step: int
    run: "Run"
    params: Any
    extra: Any
    examples: int
    folder: str | None = None
    side: int | None = None

    @property
    def config(self) -> TrainConfig:
        """The config of the run."""
        return self.run.config

    @functools.cached_property
    def _one(self) -> "Inside":
        """The layers with one example."""
        return self.inside(_rows(self.batch, slice(1)))

    @property
    def model(self) -> Any:
        """The model whose layers are measured, computing in float32."""
        return self._one.model

    @property
    def variables(self) -> Any:
        """The variables of the model."""
        return self._one.variables

    @functools.cached_property
    def beginning(self) -> tuple[Any, Any] | str:
        """Parameters and extra before training; or a line that says why they cannot be had."""
        from crate_jax.checkpoint.reading import read_facts
        from crate_jax.training.beginning import before_training

        try:
            return before_training(self.run, read_facts(self.workdir))
        except ValueError as error:
            if not is_mistake(error):
                raise
            return str(error)

    def inside(self, batch: Batch, *, first: bool = False) -> "Inside":
        """The layers with a batch, trained or before training.

        Raises:
            NotThere: the model has no layers of the family, or what it began with is gone.
        """
        import jax.numpy as jnp

        params, extra = self.params, self.extra
        if first:
            if isinstance(self.beginning, str):
                raise NotThere(self.beginning)
            params, extra = self.beginning
        try:
            inside = self.run.task.inside(params, extra, batch)
        except ValueError as error:
            raise NotThere(str(error)) from error
        return inside._replace(model=inside.model.clone(dtype=jnp.float32))

    @functools.cached_property
    def batch(self) -> Batch:
        """Examples of the evaluation split, on the host."""
        return first_examples(self.run, self.examples)

    @functools.cached_property
    def train_batch(self) -> Batch:
        """Examples of the training split, prepared as those of the evaluation split."""
        from crate_jax.checkpoint.reading import read_facts
        from crate_jax.training.run import set_up

        config = copy.deepcopy(self.config)
        config.data.eval_split = config.data.train_split
        return first_examples(set_up(config, "eval", facts=read_facts(self.workdir)), self.examples)

    @property
    def of_images(self) -> bool:
        """True if examples are images."""
        return "image" in self.batch

    @functools.cached_property
    def shown(self) -> tuple[np.ndarray, list[str]]:
        """Images for pictures (B, H, W, c), as stored, and of each its class or folder.

        Raises:
            NotThere: examples are no images.
            ValueError: the folder holds none.
        """
        if not self.of_images:
            raise NotThere(
                f"pictures of images must have a run of images; {self.workdir} has none."
            )
        if self.folder:
            shape = self.model.input_shape
            if self.side is not None:
                shape = (self.side, self.side, shape[-1])
            resized = self.side is not None
            return folder_images(self.folder, self.config, shape, resized=resized)
        labels = self.batch.get("label", np.zeros(len(self.batch["image"]), int))
        names = self.class_names
        kinds = [names[int(i)] if names else str(int(i)) for i in labels]
        images = np.asarray(self.batch["image"])
        return images if self.side is None else enlarged(images, self.side), kinds

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across) of an image for pictures."""
        (h, w), (H, W) = pair(self.model.patch_size), self.shown[0].shape[1:3]
        return H // h, W // w

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes of the outputs; () if they have none."""
        from crate_jax.tasks.task import CLASSES

        return self.run.task.facts(self.run.rows["eval"]).get(CLASSES) or ()

    @property
    def shows(self) -> str:
        """The source of the images for pictures."""
        data = self.config.data
        return self.folder or f"{data.data_dir or data.dataset}/{data.eval_split}"

    def rows_shown(self, count: int | None = None, *, images: bool = False) -> Batch:
        """The first examples for pictures, as `look` takes them; images alone if asked for.

        Raises:
            NotThere: images are asked for, and examples are none.
        """
        if not (images or self.of_images):
            return _rows(self.batch, slice(count))
        pixels = self.shown[0][:count]
        return {"image": pixels, "label": np.zeros(len(pixels), np.int32)}

    def block_parameter(self, part: str, name: str) -> np.ndarray:
        """A parameter of a part of the blocks, layers on axis 0.

        Raises:
            NotThere: the model's blocks have no such part or parameter.
        """
        blocks = self.variables["params"].get("blocks", {})
        if name not in blocks.get(part, {}):
            there = sorted(f"{p}/{n}" for p, of in blocks.items() for n in of if n in ("U", "D"))
            has = f"they have {', '.join(there)}" if there else "they have neither bases nor atoms"
            raise NotThere(
                f"the blocks of {self.workdir} must have {name} for this figure; {has}. Choose "
                "another figure."
            )
        return np.asarray(blocks[part][name])

    @functools.cached_property
    def confusion(self) -> tuple[np.ndarray, list[str]]:
        """Counts (Y, Y) of the examples by class and by what they were taken for; their names.

        Raises:
            NotThere: the run does not classify.
        """
        import jax

        from crate_jax.evaluation.confusion import confusion_matrix

        model: Any = self.run.task.model
        Y = getattr(model, "num_classes", 0)
        if self.config.task != "classify" or not Y:
            raise NotThere(f"confusion must get a run that classifies; {self.workdir} does not.")
        run = jax.jit(lambda v, x: model.apply(v, x, train=False).argmax(axis=-1))
        inside = self.inside(self.batch)
        guesses = np.asarray(run(inside.variables, inside.inputs))
        counts = confusion_matrix(np.asarray(self.batch["label"]), guesses, Y)
        return counts, list(self.class_names or map(str, range(Y)))

    def facts(self) -> list[tuple[str, str]]:
        """The facts about the run that a reader needs, by name."""
        import jax

        config = self.config
        parameters = sum(x.size for x in jax.tree.leaves(self.params))
        found = [
            ("run", self.workdir),
            ("model", config.model.name),
            ("task", config.task),
            ("parameters", f"{parameters:,}"),
        ]
        model: Any = self.run.task.model
        words = {
            "depth": "layers",
            "width": "entries of a token",
            "num_tokens": "tokens",
            "num_heads": "heads",
            "subspace_dim": "dimensions of a head",
        }
        found += [(word, str(getattr(model, x))) for x, word in words.items() if hasattr(model, x)]
        found.append(("data", f"{config.data.dataset}, {config.data.train_split}"))
        found.append(("batch size", str(config.batch_size)))
        found.append(("seed", str(config.seed)))
        return found

    def inspected(self) -> Iterator[tuple[str, "Picture"]]:
        """The pictures that the task shows of the evaluation split, by name."""
        from crate_jax.analysis.figures import picture_rows
        from crate_jax.training.run import inspect_split

        _, images = inspect_split(self.run, self.params, self.extra)
        for name, pictures in images.items():
            yield name, picture_rows(as_floats(np.asarray(pictures)), name)

    def look(self, names: Sequence[str], rows: Batch) -> dict[str, np.ndarray]:
        """Taps of some examples; of the attention the class token's row alone.

        Raises:
            NotThere: the model lacks a tap; those that it has are named.
        """
        import jax

        from crate_jax.analysis import taps

        model = self.model
        for name in names:
            if name not in model.tap_names:
                raise NotThere(
                    f"tap must be one of {', '.join(model.tap_names)} for the model of "
                    f"{self.workdir}; got {name}."
                )

        @jax.jit
        def run(variables: Any, x: Any) -> dict[str, Any]:
            seen = taps(model, variables, x, names)[1]
            return seen | {k: v[:, :, :, :1] for k, v in seen.items() if k == "attention"}

        found = []
        for start in range(0, len(next(iter(rows.values()))), _AT_ONCE):
            inside = self.inside(_rows(rows, slice(start, start + _AT_ONCE)))
            found.append(jax.device_get(run(inside.variables, inside.inputs)))
        return {name: np.concatenate([f[name] for f in found], axis=1) for name in found[0]}

    @functools.cached_property
    def metrics(self) -> list[Json]:
        """The lines of ``metrics.jsonl``; a line that is being written is left out."""
        log = located(self.workdir, "--workdir") / "metrics.jsonl"
        lines = []
        for line in log.read_text().splitlines() if log.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines


def _rows(batch: Batch, which: slice) -> Batch:
    """Some rows of a batch."""
    return {name: values[which] for name, values in batch.items()}
