"""Train a CRATE: ``python train.py --config=configs/RECIPE.py[:VARIANT] --workdir=DIR``.

Any field of the recipe can be changed: ``--config.optim.lr=1e-4``. The same command again resumes.
"""

import sys
from pathlib import Path

from absl import app, flags

from crate_jax.cli.flags import define_config_flag, parse_flags
from crate_jax.cli.running import enable_compilation_cache, run_command

DEFAULT_CONFIG = str(Path(__file__).parent / "configs" / "digits.py")

_CONFIG = define_config_flag(DEFAULT_CONFIG)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; default runs/<config name>.")


def main(argv: list[str]) -> None:
    """Train what the flags say and end with one JSON line."""
    del argv

    def command():
        from crate_jax.training.loop import train  # after the flags: --help needs no libraries

        enable_compilation_cache()
        return train(_CONFIG.value, _WORKDIR.value or f"runs/{_CONFIG.value.name}")

    sys.exit(run_command(command, kept=True))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
