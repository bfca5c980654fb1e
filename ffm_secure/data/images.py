"""Pictures from files: decoded to uint8 [height, width, 3], bounded before they are unpacked."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ffm_secure.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64 * 2**20  # one picture; more is a damaged header or a decompression bomb
EAGER_BYTES = 512 * 2**20  # a decoded column above this stays encoded until rows are asked for
MIXED_SIDE = 224  # common side when pictures differ in size and none was asked for
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
)  # Pillow's other readers start programs or run long; they stay closed


def open_picture(encoded: bytes | Path, place: str) -> Image.Image:
    """Open one picture without unpacking it, or say which row is bad."""
    try:
        picture = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS)
    except Exception as error:  # whatever the decoder throws at damaged input becomes one error of ours
        raise DataError(
            f"{place}: not a readable picture ({_first_line(error)}); use PNG, JPEG, WebP or BMP"
        ) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        picture.close()
        raise DataError(
            f"{place}: the picture claims {width} x {height} pixels, more than the bound of {MAX_PIXELS}; "
            "shrink it first"
        )
    return picture


def decode(encoded: bytes | Path, place: str, *, side: int | None = None) -> Pixels:
    """Decode one picture to uint8 [height, width, 3]; with `side`, shrink or grow and centre-crop to a square."""
    try:
        with open_picture(encoded, place) as stored:
            picture = stored.convert("RGB")
        if side is not None and picture.size != (side, side):
            picture = _square(picture, side)
        return np.asarray(picture, dtype=np.uint8)
    except DataError:
        raise
    except Exception as error:  # as above: truncated pixel data surfaces only here
        raise DataError(
            f"{place}: the picture is damaged ({_first_line(error)}); write it again or remove it"
        ) from error


def _size(encoded: bytes | Path, place: str) -> tuple[int, int]:
    """Return width and height, and leave no file open."""
    with open_picture(encoded, place) as picture:
        return picture.size


def _square(picture: Image.Image, side: int) -> Image.Image:
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop(
        (left, top, left + side, top + side)
    )


class LazyImages(Sequence[Any]):
    """Hold encoded pictures of one common size and decode the rows that are asked for.

    `images[i]` is one picture uint8 [H, W, 3]; `images[indices]`, `images[a:b]` and `np.asarray(images)` are
    arrays uint8 [n, H, W, 3]; `take` stays lazy.
    """

    def __init__(
        self, encoded: Sequence[bytes | Path], places: Sequence[str], size: tuple[int, int], side: int | None
    ):
        self._encoded, self._places, self._size, self._side = encoded, places, size, side

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Give rows, height, width, 3."""
        return (len(self._encoded), *self._size, 3)

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """Give uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, np.integer)):
            row = int(index)
            return decode(self._encoded[row], self._places[row], side=self._side)
        chosen = np.arange(len(self))[index]
        pixels = np.empty((len(chosen), *self._size, 3), dtype=np.uint8)
        for row, source in enumerate(chosen):
            pixels[row] = decode(self._encoded[source], self._places[source], side=self._side)
        return pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        pixels: NDArray[Any] = self[:]
        return pixels if dtype is None else pixels.astype(dtype)

    def take(self, indices: NDArray[np.int64]) -> LazyImages:
        """Choose rows without decoding them."""
        return LazyImages(
            [self._encoded[i] for i in indices], [self._places[i] for i in indices], self._size, self._side
        )


def image_column(values: Any, *, place: Callable[[int], str], image_size: int | None) -> Pixels | LazyImages:
    """Turn a raw column into pictures of one size.

    Takes pixel arrays uint8 [n, H, W] or [n, H, W, 1 or 3], encoded bytes, {"bytes": ...} records or paths.
    Pictures of different sizes are brought to squares of `image_size`, or of 224 where none was given.
    """
    if isinstance(values, np.ndarray):
        return _pixel_array(values, place(0))
    encoded = [_encoded(value, place(row)) for row, value in enumerate(values)]
    places = [place(row) for row in range(len(encoded))]
    sizes = {_size(item, at) for item, at in zip(encoded, places, strict=True)}
    side = image_size if image_size is not None else (MIXED_SIDE if len(sizes) > 1 else None)
    width, height = (side, side) if side is not None else next(iter(sizes))
    images = LazyImages(encoded, places, (height, width), side)
    return images if int(np.prod(images.shape, dtype=np.int64)) > EAGER_BYTES else images[:]


def _pixel_array(values: NDArray[Any], place: str) -> Pixels:
    if (
        values.dtype != np.uint8
        or values.ndim not in (3, 4)
        or (values.ndim == 4 and values.shape[3] not in (1, 3))
    ):
        raise DataError(
            f"{place}: pictures are {values.dtype} {list(values.shape)}; they must be uint8 [rows, height, width] or "
            "[rows, height, width, 1 or 3]"
        )
    pixels = values[..., None] if values.ndim == 3 else values
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


def _encoded(value: Any, place: str) -> bytes | Path:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, (bytes, Path)):
        return value
    raise DataError(
        f"{place}: holds no picture (found {type(value).__name__}); store the encoded bytes in the column"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
