"""From stored examples to batches on the devices."""

import os

# OpenCV reads this once, when it is first imported: the limit of `decode.MAX_PIXELS`, for formats
# whose headers are OpenCV's to read.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))
