"""Tasks: the one room that knows batch, model and loss.

Loop, evaluation, checkpoints, progress line and plan speak to this protocol. A new objective is one
class that follows it, and one row in `crate_jax.tasks.TASKS`.
"""

import math
from collections.abc import Sized
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from flax import linen as nn
from jax import Array

from crate_jax.config import TrainConfig, get_field
from crate_jax.data.rows import Rows
from crate_jax.files import Json
from crate_jax.models.cost import has_formula, multiply_adds
from crate_jax.parallel import PyTree

Batch = dict[str, Array]  # rows on axis 0 of every array
Params = PyTree  # of float32 arrays
Extra = PyTree  # of arrays that no gradient reaches: (), running statistics, a teacher
Scalars = dict[str, Array]  # by the name under which they are logged
Images = dict[str, Array]  # likewise; (n, H, W, c), uint8, or floats in [0, 1]

PENALTIES = ("penalty.orthogonality", "penalty.srr")  # fields that a classifier alone reads
CLASSES = "classes"  # which of a task's facts names the outputs of a classifier, in their order


class Inside(NamedTuple):
    """A stack of layers to look into, and its input.

    Attributes:
        model: a `crate_jax.models.stacked.BlockModel`.
        variables: of it, in all collections.
        inputs: of a batch, as the model takes them: normalised images, or token ids.
    """

    model: Any
    variables: PyTree
    inputs: Array


def length_of(config: TrainConfig, rows: Sized) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run.

    Args:
        config: reads batch_size, and total_steps or total_epochs.
        rows: of training.
    """
    steps_per_epoch = max(1, len(rows) // config.batch_size)
    return steps_per_epoch, config.total_steps or math.ceil(config.total_epochs * steps_per_epoch)


class Task(Protocol):
    """A frozen dataclass of static fields; all methods but `open` are pure and run inside jit.

    A class that derives from this one inherits what a simple objective has no use for: `reopen`,
    `facts`, `check_unread`, `on_device`, `after`, `features`, `inspect` and `step_flops`.

    Attributes:
        headline: the metric of evaluation by which checkpoints are compared, such as ``top1``.
        higher_is_better: whether a higher one is.
        by_row: whether the loss is a mean over rows, so that gradients of micro-batches may be
            averaged.
        unread: paths of fields for some tasks alone which this one does not read, 0 or "" where
            off.
        inspected_rows: the number of rows of a batch that `inspect` gets; it runs on one device.
        model: what is trained. Nobody but the task calls it.
    """

    model: nn.Module
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool]
    by_row: ClassVar[bool]
    unread: ClassVar[tuple[str, ...]] = (
        "optim.label_smoothing",
        "data.mixup_alpha",
        "data.cutmix_alpha",
        *PENALTIES,
    )
    inspected_rows: ClassVar[int] = 64

    @classmethod
    def check_unread(cls, config: TrainConfig) -> None:
        """Refuse a field of `unread` that is set: it would have no effect.

        Raises:
            ValueError: one is.
        """
        for field in cls.unread:
            if value := get_field(config, field):
                off = "''" if isinstance(value, str) else "0"
                raise ValueError(
                    f"{field} must be {off} for the task {config.task}, which does not read it; "
                    f"got {value}. Set --config.{field}={off}."
                )

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """The task of a config, without any data.

        Raises:
            ValueError, KeyError: the config breaks a rule.
        """
        ...

    @classmethod
    def open(cls, config: TrainConfig, *splits: tuple[str, bool]) -> tuple[Self, tuple[Rows, ...]]:
        """The task of a config, fitted to its data, and the rows of some splits.

        What can fail on the way to a batch fails here, and not in a worker.

        Args:
            config: the config of the run.
            *splits: the name of each, and whether its rows are for training.

        Raises:
            ValueError, KeyError, FileNotFoundError: config or data break a rule.
        """
        ...

    @classmethod
    def reopen(
        cls, config: TrainConfig, *splits: tuple[str, bool], facts: Json
    ) -> tuple[Self, tuple[Rows, ...]]:
        """`open` for a trained model: the outputs mean what its facts say, not the data.

        Args:
            config: the config of the run.
            *splits: see `open`.
            facts: the result of `facts` in a checkpoint or a file, in part or empty.

        Raises:
            ValueError, KeyError, FileNotFoundError: see `open`, or the rows do not go with the
                facts.
        """
        del facts
        return cls.open(config, *splits)

    def facts(self, rows: Rows) -> Json:
        """The meaning of the outputs, and the rows they are trained on, as JSON values by name.

        Every checkpoint records them. A run goes on only where those that it recorded are the same.
        All tasks state ``examples``, and the ``listing`` of stores that have one: it changes with
        what the files are called, and with their labels; for TFDS, with version and shards.

        Args:
            rows: of training.
        """
        listing: str = getattr(rows, "listing", "")
        return {"examples": len(rows)} | ({"listing": listing} if listing else {})

    def step_flops(self) -> float:
        """Operations of the model's matrix products in a training step, for one row; 0: not known.

        Three times those of a forward pass, of a model that has a formula. What is computed again,
        to save memory, does not count.
        """
        model: Any = self.model
        return 6.0 * multiply_adds(model) if has_formula(model) else 0.0

    def blank(self) -> Batch:
        """A batch of one row of zeros, as the loader hands it out: shapes and dtypes."""
        ...

    def init(self, key: Array) -> tuple[Params, Extra]:
        """Parameters and extra at step 0, a function of the key alone."""
        ...

    def begun(self, params: Params, extra: Extra, others: Params) -> Extra:
        """The extra at step 0 of a run that begins with parameters out of a file.

        Args:
            params: all of them.
            extra: the extra of `init`.
            others: the model's other collections in that file, such as running statistics.
        """
        del params
        return {**extra, **others} if others else extra

    def on_device(self, batch: Batch, key: Array) -> Batch:
        """Change a whole batch before it is cut into micro-batches: mixing, masks.

        Args:
            batch: as the loader hands it out.
            key: the key of this step.
        """
        del key
        return batch

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Extra, Scalars]]:
        """The loss in training mode.

        Args:
            params: they are differentiated by.
            extra: the extra of the state.
            batch: the batch of `on_device`, or some rows of it.
            key: for dropout and the like, another at each step and in each micro-batch.

        Returns:
            The loss, a float32 scalar; the extra after this pass, with the same structure, which is
            averaged over micro-batches; and scalars to log beside the loss.
        """
        ...

    def after(self, params: Params, extra: Extra, step: Array) -> Extra:
        """The extra once the parameters are updated; a teacher follows its student here.

        Args:
            params: updated.
            extra: the extra of `loss`.
            step: optimizer steps done, this one included, int32.
        """
        del params, step
        return extra

    def sums(self, params: Params, extra: Extra, batch: Batch) -> Scalars:
        """Sums over the rows whose mask is 1, in evaluation mode.

        Args:
            params: the averaged ones, if the state keeps any.
            extra: the extra of the state.
            batch: with ``mask`` (B,), float32 of 0 and 1.

        Returns:
            Float32 scalars or arrays, among them ``examples``, the number of rows that count.
        """
        ...

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """The metrics of a split, `headline` among them.

        Args:
            totals: the totals of `sums`, added up over the batches in double precision;
                ``examples`` > 0.
        """
        ...

    def features(self, params: Params, extra: Extra, batch: Batch) -> Array:
        """The features of each row for k-NN and probes, in evaluation mode.

        Args:
            params: the averaged ones, if the state keeps any.
            extra: the extra of the state.
            batch: of evaluation, as the loader hands it out.

        Returns:
            Features (B, F), float32. What a row of mask 0 gives reaches no other row.

        Raises:
            ValueError: the task, or its model, has none.
        """
        del params, extra, batch
        raise ValueError(
            "task must be one whose model gives features of images, to probe them; got "
            f"{type(self).__name__} of a {type(self.model).__name__}. Choose another run."
        )

    def inside(self, params: Params, extra: Extra, batch: Batch) -> Inside:
        """The layers that measures and figures look into, in evaluation mode.

        Args:
            params: the parameters of the state.
            extra: the extra of the state.
            batch: of evaluation, as the loader hands it out.

        Raises:
            ValueError: the task's model has no layers of the family.
        """
        del params, extra, batch
        raise ValueError(
            "task must be one whose model is a stack of blocks, to look into its layers; got "
            f"{type(self).__name__} of a {type(self.model).__name__}. Choose another run."
        )

    def inspect(self, params: Params, extra: Extra, batch: Batch) -> tuple[Scalars, Images]:
        """Measures and pictures for people during training: the layers, pictures, collapse.

        Args:
            params: the parameters of the state, not averaged.
            extra: the extra of the state.
            batch: the first `inspected_rows` of the training batch, as the loader hands it out.

        Returns:
            Scalars and images by the full name under which they are written.
        """
        del params, extra, batch
        return {}, {}
