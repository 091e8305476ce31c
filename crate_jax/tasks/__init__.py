"""Training tasks: batch, model and loss."""

from crate_jax.tasks.classify import Classify
from crate_jax.tasks.masked_autoencoding import MaskedAutoencoding
from crate_jax.tasks.mcr2 import Mcr2
from crate_jax.tasks.next_token import NextToken
from crate_jax.tasks.simdino import SimDino
from crate_jax.tasks.task import Task

# By the name that ``--config.task`` takes.
TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "masked_autoencoding": MaskedAutoencoding,
    "mcr2": Mcr2,
    "next_token": NextToken,
    "simdino": SimDino,
}
