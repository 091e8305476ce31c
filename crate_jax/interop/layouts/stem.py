"""The convolutional stem, which has the same names in more than one program, as it is XCiT's."""

from crate_jax.interop.layouts.forms import Kernel, Same
from crate_jax.interop.layouts.layout import Table

STAGES = 4  # that the official code has at most, for patches of 16 pixels

# Behind the name of the stem: PyTorch's BatchNorm counts its batches, which says nothing where the
# share of a batch is fixed.
COUNTERS = r"\.\d+\.1\.num_batches_tracked"


def stem(before: str) -> Table:
    """The stages of the stem, running statistics among them; ``before`` stands before each name."""
    table = {}
    for i in range(STAGES):
        ours, theirs = f"embedding/stem/stage_{i}", f"{before}.{2 * i}"  # a GELU between each two
        table |= {
            f"{ours}/kernel": (f"{theirs}.0.weight", Kernel()),
            f"{ours}/norm/scale": (f"{theirs}.1.weight", Same()),
            f"{ours}/norm/bias": (f"{theirs}.1.bias", Same()),
            f"batch_stats/{ours}/norm/mean": (f"{theirs}.1.running_mean", Same()),
            f"batch_stats/{ours}/norm/var": (f"{theirs}.1.running_var", Same()),
        }
    return table
