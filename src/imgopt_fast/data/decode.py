"""One image file to pixels of a wanted size: upright, scaled so that it just covers the size, cropped at the centre.

Pillow reads every format, JPEG with draft scaling: a large photo is decoded at the smallest of its eight built-in
scales that still covers the size. Where simplejpeg is installed (the extra `turbo`), it decodes plain JPEG files: 10 µs
against 78 for one of 32x32 pixels, most of it Pillow's bookkeeping, and with the GIL released. Whatever it refuses
(CMYK, damaged, turned by EXIF) goes to Pillow, so that one library decides what is an image.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from imgopt_fast.data.dataset import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DECODER = "Pillow" if simplejpeg is None else "simplejpeg"
GREY = ("1", "L", "I;16", "I;16B")  # modes without colours
JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0"
_ORIENTATION, _HALF_TURNS = 0x0112, 4  # EXIF's tag; its values above that exchange width and height
EXIF_WITHIN = 4096  # bytes from the start of a file where cameras put EXIF
PLAIN_COLORS = ("Gray", "YCbCr", "RGB")  # JPEG's own, that become grey or RGB without a profile's help


class Header(NamedTuple):
    """What an image file says about itself: (width, height), and whether it has no colours."""

    size: tuple[int, int]
    grey: bool


class UnreadableError(Exception):
    """The image cannot be decoded; the message says why."""


def decode(file: Path, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """(height, width, channels) pixels of an image file, grey for one channel, RGB for three. Raises DataError."""
    pixels = np.empty((height, width, channels), np.uint8)
    try:
        with bombs_handled():
            decode_into(file.read_bytes(), pixels)
    except UnreadableError as error:
        raise DataError(f"{file}: cannot read this image: {error}") from error
    return pixels


def decode_into(data: bytes, pixels: NDArray[np.uint8]) -> Header:
    """Fill `pixels` (height, width, 1 or 3) from the content of an image file. Raises UnreadableError."""
    fast = _decode_jpeg(data, pixels) if simplejpeg is not None and data.startswith(JPEG) else None
    if fast is not None:
        return fast
    with _opened(data) as image:
        header = Header(image.size, image.mode in GREY)
        height, width, channels = pixels.shape
        mode = "L" if channels == 1 else "RGB"
        image.draft(mode, (width, height))
        upright = _eight_bits(image)
        if not data.startswith(JPEG) or _EXIF in data[:EXIF_WITHIN]:  # looking for it takes a third of the time
            upright = ImageOps.exif_transpose(upright)
        upright = upright if upright.mode == mode else upright.convert(mode)
        pixels[...] = np.asarray(_fitted(upright, (width, height))).reshape(pixels.shape)
    return header


def decode_whole(data: bytes, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """(height, width, 3) pixels of an image file at its own size, upright. Raises UnreadableError.

    They lie in `buffer`, a flat array, where it is large enough for them: one that is used again for every image stays
    in the processor's cache.
    """
    if simplejpeg is not None and _is_upright_jpeg(data):
        try:
            rows, columns, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in PLAIN_COLORS and rows * columns <= _most_pixels():
                fits = buffer is not None and 3 * rows * columns <= buffer.size
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer if fits else None)
                return pixels
        except ValueError:
            pass  # Pillow has the last word
    with _opened(data) as image:
        return np.array(ImageOps.exif_transpose(_eight_bits(image)).convert("RGB"))


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of what `decode_whole` returns: a crop can be drawn before. Raises UnreadableError."""
    if simplejpeg is not None and _is_upright_jpeg(data):
        try:
            rows, columns, _, _ = simplejpeg.decode_jpeg_header(data)
            return rows, columns
        except ValueError:
            pass
    with _opened(data) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) > _HALF_TURNS
    return (width, height) if turned else (height, width)


def read_header(data: bytes) -> Header:
    """Raises UnreadableError."""
    with _opened(data) as image:
        return Header(image.size, image.mode in GREY)


@contextmanager
def bombs_handled() -> Iterator[None]:
    """Images of 90 to 179 million pixels are decoded without a warning; Pillow refuses larger ones.

    Around the threads that decode, not in them: the warning filters belong to the whole process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # damaged EXIF and TIFF tags, beside which the pixels are whole
        yield


def _decode_jpeg(data: bytes, pixels: NDArray[np.uint8]) -> Header | None:
    """Fill `pixels` by simplejpeg; None where Pillow has to look."""
    if _EXIF in data[:EXIF_WITHIN]:
        return None
    height, width, channels = pixels.shape
    try:
        rows, columns, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in PLAIN_COLORS or rows * columns > _most_pixels():
            return None
        decoded = simplejpeg.decode_jpeg(
            data, "GRAY" if channels == 1 else "RGB", min_height=height, min_width=width, min_factor=1.0
        )
    except ValueError:
        return None
    if decoded.shape != pixels.shape:
        image = Image.fromarray(decoded.squeeze(2) if channels == 1 else decoded)
        decoded = np.asarray(_fitted(image, (width, height))).reshape(pixels.shape)
    pixels[...] = decoded
    return Header((columns, rows), colors == "Gray")


def _is_upright_jpeg(data: bytes) -> bool:
    return data.startswith(JPEG) and _EXIF not in data[:EXIF_WITHIN]


def _most_pixels() -> float:
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BILINEAR)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey values where it should scale them."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, of an animation the first frame; whatever is wrong with it becomes one line."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:  # its message names the memory that holds the file
        raise UnreadableError("not an image file, or damaged") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError("more pixels than any photo has: a decompression bomb?") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise UnreadableError(str(error) or type(error).__name__) from error
