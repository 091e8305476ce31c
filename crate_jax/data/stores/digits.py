"""The handwritten digits that scikit-learn ships, as a TFDS data set: real images, no download.

1,797 grey scans of 8 x 8 pixels in ten classes (Alpaydin and Kaynak, UCI, 1998).
"""

import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

# The first 1,500 scans train and the last 297 test, in the order in which scikit-learn has them.
TRAIN_EXAMPLES = 1500


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder ``digits``: splits ``train`` (1,500) and ``test`` (297)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            description="Handwritten digits, 8 x 8 pixels, from scikit-learn.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {
            "train": self._generate_examples(slice(None, TRAIN_EXAMPLES)),
            "test": self._generate_examples(slice(TRAIN_EXAMPLES, None)),
        }

    def _generate_examples(self, rows: slice) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # seconds to import, needed once

        scans: Any = load_digits()
        pixels = np.round(scans.images[rows] * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
        for i, (image, label) in enumerate(zip(pixels, scans.target[rows], strict=True)):
            # Encoded here because TFDS encodes a bare array with TensorFlow.
            yield i, {"image": io.BytesIO(cv2.imencode(".png", image)[1].tobytes()), "label": label}
