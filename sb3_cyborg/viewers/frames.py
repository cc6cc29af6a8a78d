"""Pictures of an environment as small image files, for pages that embed them."""

import io

import numpy as np

LARGEST_SIDE = 480
"""Pixels of the longer side of a frame at most; a larger picture is made smaller."""
JPEG_QUALITY = 85


def encode_frame(picture: np.ndarray) -> bytes:
    """
    :param picture: (height, width, 3) uint8.
    :return: The picture as a PNG of 256 colours or as a JPEG, whichever is smaller: flat drawings are smaller as PNG,
        photographs as JPEG.
    """
    from PIL import Image

    image = Image.fromarray(picture)
    if max(image.size) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    files = io.BytesIO(), io.BytesIO()
    image.quantize().save(files[0], "PNG", optimize=True)
    image.save(files[1], "JPEG", quality=JPEG_QUALITY)
    return min((file.getvalue() for file in files), key=len)


def picture_of_observation(observation: object) -> np.ndarray | None:
    """
    :param observation: An observation.
    :return: An image as (height, width, 3) uint8, also if it is grey or has its channels first; ``None`` for anything else.
    """
    image = np.asarray(observation)
    if image.ndim != 3 or image.dtype != np.uint8:
        return None
    if image.shape[2] not in (1, 3) and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.shape[2] not in (1, 3):
        return None
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
