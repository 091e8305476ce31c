"""The metric that the best checkpoint is chosen by."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Best:
    """The metric by which checkpoints are compared.

    Attributes:
        metric: its full name, such as ``test/top1``.
        higher: whether a higher one is better.
    """

    metric: str
    higher: bool

    def score(self, metrics: Mapping[str, float]) -> float:
        """A number that is higher for a better checkpoint."""
        return metrics[self.metric] if self.higher else -metrics[self.metric]


# For runs whose records do not state it: they are older than the field.
UNSAID = Best("test/top1", higher=True)
