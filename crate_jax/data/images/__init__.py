"""Images on their way from bytes to the pixels of a row."""

import cv2

# The loader runs examples in parallel; OpenCV's own threads would only get in each other's way.
cv2.setNumThreads(0)
