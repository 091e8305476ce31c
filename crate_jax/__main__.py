"""`python -m crate_jax`."""

import sys

from crate_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
