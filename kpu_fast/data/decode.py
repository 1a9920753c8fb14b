"""From an opened image to the pixels that training and evaluation both see."""

import contextlib

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what broken files and `to_rgb` raise


def to_rgb(image: Image.Image, *, upright: bool = True) -> np.ndarray:
    """`image`, as Pillow opened it, as uint8 RGB (H, W, 3): what DALI makes of a file that it reads rightly.

    Turned as its EXIF says, without alpha, the upper 8 of 16 bits. upright=False leaves it as it is stored, for boxes
    that refer to the stored pixels. Raises ValueError for 32-bit pixels, and what Pillow raises for broken data.
    """
    # Pillow spreads a PGM of more than 8 bits over 16, whatever its maxval. Other formats do not say what white is.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError("32-bit pixels, whose range is unknown")
    if upright:
        image.load()  # broken pixels are to raise here, outside the suppression below
        with contextlib.suppress(Exception):  # damaged EXIF (SyntaxError, struct.error, TypeError, …) turns nothing
            image = ImageOps.exif_transpose(image)
    if sixteen:  # Pillow's own conversion clips to 8 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))
