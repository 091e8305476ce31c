"""`python -m crate_jax`, and the script `crate_jax`."""

import sys

from crate_jax.interrupts import heed


def main() -> int:
    """Heed Ctrl-C from the first moment; what a command needs is imported after that."""
    heed()
    from crate_jax.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
