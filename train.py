"""Train a CRATE: ``python train.py --config=configs/RECIPE.py[:VARIANT] --workdir=DIR``.

Any field of the recipe can be changed: ``--config.optim.lr=1e-4``. The same command again resumes.
It is ``python -m crate_jax train``, for those who have a clone.
"""

import sys

from crate_jax.interrupts import heed

if __name__ == "__main__":
    heed()
    from crate_jax.cli.train import train  # after that: it imports JAX

    train(sys.argv[1:])
