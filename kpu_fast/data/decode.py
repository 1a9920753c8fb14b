"""From an opened image to the pixels that training and evaluation both see."""

import contextlib

import numpy as np
from PIL import Image, ImageOps

# What broken files and `to_rgb` raise; RuntimeError is Pillow's for AVIF.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANES = 258, 262, 274, 284  # tags of a TIFF
_MIN_IS_WHITE, _SEPARATE = 0, 2


def to_rgb(image: Image.Image, *, upright: bool = True) -> np.ndarray:
    """`image`, as Pillow opened it, as uint8 RGB (H, W, 3): what DALI makes of a file that it reads rightly.

    Turned as its EXIF says, without alpha, the upper 8 of 16 bits. upright=False leaves it as it is stored, for boxes
    that refer to the stored pixels. Raises ValueError for 32-bit pixels and for planar TIFF of 16-bit samples, and what
    Pillow raises for broken data.
    """
    # Pillow spreads a PGM of more than 8 bits over 16, whatever its maxval; of a TIFF it gives what is stored.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError("32-bit pixels, whose range is unknown")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags.get(_BITS, (16,))[0]
    if bits > 8 and tags.get(_PLANES) == _SEPARATE and len(image.getbands()) > 1:
        raise ValueError(f"planar TIFF with {bits} bits per sample, which Pillow misreads")
    if upright:
        image.load()  # broken pixels are to raise here, outside the suppression below
        with contextlib.suppress(Exception):  # damaged EXIF (SyntaxError, struct.error, TypeError, …) turns nothing
            image = ImageOps.exif_transpose(image)
    elif _ORIENTATION in tags:  # Pillow turns a TIFF when it loads it
        turned = tags[_ORIENTATION]
        image.load()
        image.getexif()[_ORIENTATION] = {6: 8, 8: 6}.get(turned, turned)  # the other six are their own inverse
        image = ImageOps.exif_transpose(image)
    if sixteen:  # Pillow's own conversion clips to 8 bits
        upper = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - upper if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else upper)
    return np.asarray(image.convert("RGB"))


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of what `to_rgb(image, upright=False)` gives, from the header alone."""
    # Of a TIFF that lies on its side Pillow states the size as it will be turned.
    aside = image.format == "TIFF" and image.tag_v2.get(_ORIENTATION, 1) >= 5
    return image.size if aside else image.size[::-1]
