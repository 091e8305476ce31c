"""`python -m crate_jax`."""

import sys

from crate_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
