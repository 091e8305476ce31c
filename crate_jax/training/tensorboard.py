"""TensorBoard's event files, written at once.

A file is TFRecords of protocol buffers (event.proto and summary.proto of TensorFlow); scalars and
images need few of their fields. The usual writers hand them to a thread through a queue: on a full
disk the thread ends, and the run waits for room in the queue for ever.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crate_jax.data.stores.tfrecord import masked_crc

_VERSION = b"brain.Event:2"
_START = b"\x08\x01"  # of a session: SessionLog.status = START


class EventWriter:
    """Writes scalars and images into one new event file.

    Args:
        workdir: existing directory.
        purge_step: TensorBoard forgets what older files hold from this step on; None: nothing.
    """

    def __init__(self, workdir: str | Path, *, purge_step: int | None = None):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (Path(workdir) / name).open("xb", buffering=0)
        self._event(0, _field(3, _VERSION))
        if purge_step is not None:
            self._event(purge_step, _field(7, _START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step.

        Raises:
            OSError: the disk does not take them.
        """
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            floats = np.array(list(values.values())).astype("<f4")
        scalars = (
            _field(1, _field(1, tag.encode()) + b"\x15" + x.tobytes())
            for tag, x in zip(values, floats, strict=True)
        )
        self._event(step, _field(5, b"".join(scalars)))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures of one step, as PNG.

        Args:
            step: the step.
            images: (n, H, W, c) by name, of 1 or 3 channels; uint8, or floats in [0, 1]. Picture i
                gets the name ``<name>/<i>``.

        Raises:
            OSError: the disk does not take them.
        """
        values = (
            _field(1, _field(1, f"{name}/{i}".encode()) + _field(4, _image(picture)))
            for name, pictures in images.items()
            for i, picture in enumerate(np.asarray(pictures))
        )
        self._event(step, _field(5, b"".join(values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _event(self, step: int, field: bytes) -> None:
        """One record: length, its checksum, event, its checksum."""
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + field
        length = struct.pack("<Q", len(event))
        checked = (part + struct.pack("<I", masked_crc(part)) for part in (length, event))
        self._file.write(b"".join(checked))


def as_bytes(picture: np.ndarray) -> np.ndarray:
    """A picture of uint8, or of floats in [0, 1], as uint8."""
    if picture.dtype == np.uint8:
        return picture
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _image(picture: np.ndarray) -> bytes:
    """Summary.Image: height, width, number of channels, and the picture as PNG."""
    import cv2  # here: runs without pictures do without it

    picture = as_bytes(picture)
    height, width, channels = picture.shape
    _, png = cv2.imencode(".png", picture[..., ::-1])  # OpenCV's order is BGR
    sizes = b"".join(
        bytes([number << 3]) + _varint(size)
        for number, size in enumerate((height, width, channels), start=1)
    )
    return sizes + _field(4, png.tobytes())


def _field(number: int, payload: bytes) -> bytes:
    """A field of protocol buffers that has a length."""
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the highest bit says that more follow."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
