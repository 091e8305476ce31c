"""A second task, far from classification: least squares of vectors, with a teacher."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from crate_jax.tasks.task import Task

TRUTH_4x2 = np.array([[1, 0], [0, -1], [0.5, 0.5], [2, 1]], np.float32)
FOLLOWS = 0.75  # how much of itself the teacher keeps at each step


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Rows of x (4,) and y (2,) = x TRUTH, functions of the index alone."""

    name: str
    length: int

    @property
    def shapes(self):
        return {
            "x": jax.ShapeDtypeStruct((4,), np.float32),
            "y": jax.ShapeDtypeStruct((2,), np.float32),
        }

    def __len__(self):
        return self.length

    def row(self, index, rng):
        x = np.random.default_rng((len(self.name), index)).normal(size=4).astype(np.float32)
        return {"x": x, "y": x @ TRUTH_4x2}


@dataclasses.dataclass(frozen=True)
class Regress(Task):
    """Squared error of a linear map; its extra is a teacher that follows it, and is evaluated."""

    model: Any
    split: str = ""

    headline: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    inspected_rows: ClassVar[int] = 3

    @classmethod
    def from_config(cls, config):
        return cls(nn.Dense(2))

    @classmethod
    def open(cls, config, *splits):
        rows = tuple(Vectors(name, 96 if train else 50) for name, train in splits)
        return cls.from_config(config), rows

    def blank(self):
        return {"x": np.zeros((1, 4), np.float32), "y": np.zeros((1, 2), np.float32)}

    def init(self, key):
        params = self.model.init(key, jnp.zeros((1, 4)))["params"]
        return params, {"teacher": jax.tree.map(jnp.copy, params), "count": jnp.int32(0)}

    def loss(self, params, extra, batch, key):
        error = self.model.apply({"params": params}, batch["x"]) - batch["y"]
        loss = jnp.mean(error**2)
        extra = extra | {"count": extra["count"] + 1}
        return loss, (extra, {"mse": loss, "noise": jax.random.uniform(key)})

    def after(self, params, extra, step):
        teacher = jax.tree.map(
            lambda old, new: FOLLOWS * old + (1 - FOLLOWS) * new, extra["teacher"], params
        )
        return extra | {"teacher": teacher}

    def sums(self, params, extra, batch):
        error = self.model.apply({"params": extra["teacher"]}, batch["x"]) - batch["y"]
        real = batch["mask"] > 0
        return {
            "squares": jnp.sum(jnp.mean(error**2, axis=1), where=real),
            "examples": jnp.sum(batch["mask"]),
        }

    def metrics(self, totals):
        return {"mse": totals["squares"] / totals["examples"]}

    def inspect(self, params, extra, batch):
        pictures = jax.nn.sigmoid(batch["x"]).reshape(-1, 2, 2, 1)
        return {"spread/x": batch["x"].std()}, {"pictures/x": pictures}


@dataclasses.dataclass(frozen=True)
class Together(Regress):
    """The same, but its loss is said to be no mean over rows."""

    by_row: ClassVar[bool] = False
