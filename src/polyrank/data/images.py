"""Images as 8-bit pixels, grey or RGB, upright and on white; what cannot be read right is refused.

8-bit images are as they are. Deeper ones keep their absolute intensities: black and white are the same two values for
all images, whatever values occur in one of them, so that train, test and every client agree.
"""

from __future__ import annotations

import io
import re
import warnings
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from polyrank.data.source import DataError, ImageRange

_WHOLE: ImageRange = (0, 2**16 - 1)
_FRACTION: ImageRange = (0, 1)
_DEPTHS = (8, 10, 12, 14, 15)  # bits of what is stored in 16, usually
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_DEEP_COLOUR = re.compile(r"(LA|RGB[AXa]*);16[BLN]")
# Pillow spreads greys of 2 and 4 bits over 8, but not the one that is transparent.
_SPREAD = {"'L;2'": 85, "'L;4'": 17}

# EXIF's orientation, and what turns such an image upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow converts to some modes only.
_ON_THE_WAY = {"LAB": "RGB", "La": "LA"}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


class Scale:
    """Maps values of more than 8 bits to 0 (black) ... 255 (white).

    Without a range, white is 65535 of whole numbers and 1 of floating-point ones. A PNG's sBIT chunk changes nothing:
    it says how many bits had a meaning before the values were spread over all 16.

    Args:
        given: the values of black and of white, if the user says so.
    """

    def __init__(self, given: ImageRange | None = None) -> None:
        self._given = given
        self._largest = 0

    def __call__(self, values: np.ndarray, bits: int | None = None, inverted: bool = False) -> np.ndarray:
        """`values` as uint8.

        Args:
            values: whole or floating-point numbers.
            bits: how many each has, where the file says so.
            inverted: whether the file says that its lowest value is white.

        Raises:
            DataError: if one is not a number, or beyond black and white.
        """
        whole = values.dtype.kind != "f"
        default = ((0, 2**bits - 1) if bits else _WHOLE) if whole else _FRACTION
        black, white = self._given or default
        with np.errstate(invalid="ignore"):
            low, high = values.min(), values.max()
        if not min(black, white) <= low <= high <= max(black, white):  # NaN is not either
            raise DataError(
                f"its values are {low:g} to {high:g}, but black is {black:g} and white {white:g}; set data.image_range:"
                " [black, white] to two values that hold all images"
            )
        if whole and not bits:
            self._saw(int(high))
        if inverted:
            black, white = white, black
        return np.rint((values.astype(np.float64) - black) * 255 / (white - black)).astype(np.uint8)

    def colour(self, image: Image.Image) -> None:
        """Looks at a colour image of 16 bits, of which Pillow has kept the upper 8.

        Raises:
            DataError: if those are not what the range asks for.
        """
        if self._given not in (None, _WHOLE):
            raise DataError(
                "it has 16 bits a colour, of which Pillow reads the upper 8, so data.image_range cannot be applied;"
                " store it as grey, or with 8 bits"
            )
        self._saw(2**8 * int(np.asarray(image.getextrema())[:3, 1].max()) + 2**8 - 1)

    def check(self, where: str) -> None:
        """Refuses images that would all be dark because they do not use the bits they are stored in.

        Raises:
            DataError: if no range is given, and no value is in the upper half of 16 bits.
        """
        if self._given is None and 0 < self._largest < 2**15:
            bits = next(depth for depth in _DEPTHS if self._largest < 2**depth)
            raise DataError(
                f"{where}: no value of its images of 16 bits or more is above {self._largest}, where white is"
                f" {_WHOLE[1]}. If they hold {bits} bits, set data.image_range: [0, {2**bits - 1}], the same for all"
                f" clients; if they are that dark, set [0, {_WHOLE[1]}]"
            )

    def _saw(self, value: int) -> None:
        self._largest = max(self._largest, value)


def read_image(item: bytes | np.ndarray, size: int, channels: int, scale: Scale) -> np.ndarray:
    """An image as uint8 (size, size, channels), resized bilinearly whatever its shape.

    EXIF's orientation is applied, unless it cannot be read. What is transparent shows white. Of several frames or pages
    the first is read.

    Args:
        item: an encoded image, or a raw one, uint8 (H, W, C).
        size: height and width.
        channels: 3 or 1.
        scale: for images of more than 8 bits.

    Raises:
        DataError: saying why it cannot be read, but not where it is from.
    """
    mode = "RGB" if channels == 3 else "L"
    if not len(item):
        raise DataError("it is empty")
    try:
        # They are of metadata that is not needed, and of images that are large, but not too large.
        with warnings.catch_warnings(action="ignore"):
            image = _raw(item) if isinstance(item, np.ndarray) else _decoded(item, scale)
            image = _opaque(image, mode)
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(size, size, channels)
    except DataError:
        raise
    except UnidentifiedImageError:
        start = bytes(item[:16])
        raise DataError(f"Pillow knows no such format, or its head is damaged; it starts with {start!r}") from None
    except MemoryError:
        raise DataError("there is not enough memory for it") from None
    except Exception as error:  # readers of broken files raise anything: SyntaxError, struct.error, zlib.error, ...
        raise DataError(str(error) or type(error).__name__) from error


def raw_images(values: np.ndarray, given: ImageRange | None, name: str, where: str) -> np.ndarray:
    """An array of images as uint8 (N, H, W, C).

    Args:
        values: numbers (N, H, W), or (N, H, W, C) with 1 to 4 channels: grey or RGB, with or without alpha.
        given: the values of black and white of more than 8 bits, if the user says so.
        name: of the array.
        where: its file.

    Raises:
        DataError: for another shape or type, and for values beyond black and white.
    """
    images = values[..., None] if values.ndim == 3 else values
    channels = (1, 2, 3, 4) if values.dtype == np.uint8 else (1, 3)
    if values.dtype.kind not in "iuf" or images.ndim != 4 or images.shape[3] not in channels or 0 in images.shape[1:]:
        raise DataError(
            f"{where}: array {name!r} is {values.dtype} {values.shape}; an .npz file holds images: numbers (N, H, W) or"
            " (N, H, W, C) with 1 or 3 channels, or uint8 ones with 2 or 4, of which the last is alpha"
        )
    if values.dtype == np.uint8:
        return images
    scale, pixels = Scale(given), np.empty(images.shape, np.uint8)
    for index, image in enumerate(images):
        try:
            pixels[index] = scale(image)
        except DataError as error:
            raise DataError(
                f"{where}: the image in row {index + 1} of array {name!r} cannot be read: {error}"
            ) from None
    scale.check(where)
    return pixels


def _raw(item: np.ndarray) -> Image.Image:
    return Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)


@cache
def _formats() -> list[str]:
    """All that Pillow reads but PostScript, which it would hand to another program to run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _decoded(item: bytes, scale: Scale) -> Image.Image:
    """Upright, and with 8 bits a channel."""
    image: Image.Image = Image.open(io.BytesIO(item), formats=_formats())
    stored, tags = str(image.tile), getattr(image, "tag_v2", {})  # type: ignore[attr-defined]
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode in _DEEP:
        image = Image.fromarray(_grey(image, tags, scale))
    elif _DEEP_COLOUR.search(stored):
        scale.colour(image)
        if "transparency" in image.info:
            raise DataError("it has 16 bits a colour, and one colour that is transparent; store it with 8 bits")
    elif image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= next((by for few, by in _SPREAD.items() if few in stored), 1)
    return image if turn is None else image.transpose(turn)


def _grey(image: Image.Image, tags: Any, scale: Scale) -> np.ndarray:
    values = np.asarray(image)
    bits = 12 if tags.get(_TIFF_BITS) == (12,) else None
    pixels = scale(values, bits, inverted=tags.get(_TIFF_PHOTOMETRIC) == 0)
    if (through := image.info.get("transparency")) is not None:
        pixels[values == through] = 255
    return pixels


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # as broken as the rest of its metadata may be: the pixels are there
        return None


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _ON_THE_WAY:
        image = image.convert(_ON_THE_WAY[image.mode])
    if not image.has_transparency_data:
        return image.convert(mode)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").convert(mode)
