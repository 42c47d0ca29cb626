"""Files of pictures: not too large, and upright."""

import re
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from canon.core.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
EXAMPLES = {"emoji": "a red apple", "things": "a red apple", "shapes": "a large red star in the middle"}


def opened(path: Path, largest: int) -> Image.Image:
    """A picture's file, of which only the head is read.

    Args:
        path: of the file.
        largest: pixels that it may have.

    Raises:
        UserError: it has more.
    """
    try:
        with warnings.catch_warnings():  # of what is said below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path)
        if file.width * file.height <= largest:
            return file
        pixels = f"{file.width} x {file.height}"
        file.close()
    except Image.DecompressionBombError as error:  # which says "Image size (N pixels) exceeds ..."
        pixels = "".join(re.findall(r"\((\d+) pixels", str(error))) or "far too many"
    raise UserError(f"{path} has {pixels} pixels: reduce it to {largest >> 20} million")


def example_caption(source: str) -> str:
    """One of the captions that `canon.core.data.images.load_pictures` gives for this source; "" if there is none."""
    if source in EXAMPLES:
        return EXAMPLES[source]
    try:
        pictures = sorted(file for file in Path(source).expanduser().iterdir() if file.suffix.lower() in SUFFIXES)
        words = (file.with_suffix(".txt").read_text("utf-8", "replace") for file in pictures)
        return next((line.strip() for text in words for line in text.splitlines() if line.strip()), "")
    except OSError:  # the folder may be gone since
        return ""


def upright(file: Image.Image) -> Image.Image:
    """The picture turned as the camera says; as it is, where that is not readable."""
    file.load()
    try:
        return ImageOps.exif_transpose(file)
    except (SyntaxError, ValueError, KeyError, struct.error):
        return file
