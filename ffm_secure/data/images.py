"""Pictures from files: decoded to uint8 [height, width, 3], bounded before they are unpacked."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ffm_secure.errors import DataError
from ffm_secure.foreign import Cells, JsonValue
from ffm_secure.record_codec import require_regular

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64 * 2**20  # one picture; more is a damaged header or a decompression bomb
EAGER_BYTES = 512 * 2**20  # a decoded column above this stays encoded until rows are asked for
MIXED_SIDE = 224  # common side when pictures differ in size and none was asked for
MOST_NAMED = 5  # bad pictures an error names; the others are counted
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# Pillow's other readers start programs or run long; they stay closed.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_PAPER = (255, 255, 255, 255)  # what shows through a transparent picture, as in a browser
_QUARTER_TURNS = (5, 6, 7, 8)  # orientations under which width and height change places
_LONGEST_NAME = 60  # letters of a name without a known suffix
_DARK = 65_535 // 8  # what a camera of 13 bits or fewer stores in 16
_MEASURED = 100  # pictures whose range is looked at
_LONGEST_SHAPE = 16  # times as long as wide
_FULL_RANGE = 65_535 // 255  # 257: takes 0 to 0 and the largest 16-bit value to 255


def open_picture(encoded: bytes | Path, place: str) -> Image.Image:
    """Open one picture without unpacking it, or say which row is bad."""
    if not (len(encoded) if isinstance(encoded, bytes) else _size(encoded)):
        raise DataError(f"{place}: the picture is empty (0 bytes); write it again or remove it")
    try:
        if isinstance(encoded, Path):
            require_regular(encoded)
        picture = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS)
    except Exception as error:  # whatever the decoder throws at damaged input becomes one error of ours
        raise DataError(
            f"{place}: not a readable picture ({_first_line(error)}); use PNG, JPEG, WebP, BMP, TIFF or GIF"
        ) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{place}: the picture claims {width} x {height} pixels, more than the bound of {MAX_PIXELS}; "
            "shrink it first"
        )
    return picture


def _size(file: Path) -> int:
    """Return the bytes of a file, 1 where that cannot be told: opening it then says why."""
    try:
        return file.stat().st_size
    except OSError:
        return 1


def decode(encoded: bytes | Path, place: str, *, side: int | None = None) -> Pixels:
    """Decode one picture to uint8 [height, width, 3]; with `side`, shrink or grow and centre-crop to a
    square.
    """
    try:
        with open_picture(encoded, place) as stored:
            picture = _eight_bits(stored, place)
        if side is not None and picture.size != (side, side):
            picture = _square(picture, side)
        return np.asarray(picture, dtype=np.uint8)
    except DataError:
        raise
    except Exception as error:  # as above: truncated pixel data surfaces only here
        raise DataError(
            f"{place}: the picture is damaged ({_first_line(error)}); write it again or remove it"
        ) from error


def _eight_bits(stored: Image.Image, place: str) -> Image.Image:
    """Bring a picture to upright RGB on white paper; 16-bit grey is scaled by its full range, numbers without
    a known range are refused.

    Guarantee: no value is cut off, and colours hidden under full transparency are never seen. Pillow's own
    conversions make every 16-bit value above 255 white, and show what lies under transparent places.
    """
    frames = int(getattr(stored, "n_frames", 1))
    if frames > 1 and stored.format != "MPO":  # a camera's file: the picture, then previews of it
        raise DataError(
            f"{place}: holds {frames} frames or pages; save the one that counts as a picture of its own"
        )
    picture = ImageOps.exif_transpose(stored) if _orientation(stored) != 1 else stored
    if picture.mode in _SIXTEEN_BITS or (picture.mode == "I" and stored.format == "PNG"):
        return Image.fromarray((np.asarray(picture) // _FULL_RANGE).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        kind = "floating-point numbers"
        if picture.mode == "I":
            kind = "whole numbers of 32 bits"
        raise DataError(
            f"{place}: its pixels are {kind}, whose range nobody states; save it "
            "with 8 bits (0 to 255) or 16 bits"
        )
    if picture.mode not in _COLOURS:
        raise DataError(f"{place}: its colours are {picture.mode}, which is not read; save it as RGB or grey")
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, _PAPER)
        return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """Return how a camera was held, 1 where upright or unknown; the reader of TIFF turns pictures itself."""
    if picture.format == "TIFF" or "exif" not in picture.info:
        return 1
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged notes beside a sound picture
        return 1


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """Return width and height as a viewer shows them: cameras store how they were held beside the pixels."""
    width, height = picture.size
    if _orientation(picture) in _QUARTER_TURNS:
        return height, width
    return width, height


def _square(picture: Image.Image, side: int) -> Image.Image:
    if max(picture.size) > _LONGEST_SHAPE * min(picture.size):  # scaling first would unpack far more pixels
        shorter = min(picture.size)
        left, top = ((length - shorter) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + shorter, top + shorter))
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

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> Cells:
        if isinstance(index, (int, np.integer)):
            row = int(index)
            return decode(self._encoded[row], self._places[row], side=self._side)
        chosen = np.arange(len(self))[index]
        pixels = np.empty((len(chosen), *self._size, 3), dtype=np.uint8)
        for row, source in enumerate(chosen):
            pixels[row] = decode(self._encoded[source], self._places[source], side=self._side)
        return pixels

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        pixels: NDArray[Any] = self[:]
        if dtype is None:
            return pixels
        return pixels.astype(dtype)

    def take(self, indices: NDArray[np.int64]) -> LazyImages:
        """Choose rows without decoding them."""
        return LazyImages(
            [self._encoded[i] for i in indices], [self._places[i] for i in indices], self._size, self._side
        )


class StoredPictures(Sequence[Pixels]):
    """Hold the pictures of a column as they were before they were brought to one size: by that a ledger knows
    them again, whatever the others measure.
    """

    def __init__(self, encoded: Sequence[bytes | Path], places: Sequence[str], *, resized: bool) -> None:
        self._encoded, self._places, self.resized = encoded, places, resized

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Pixels:  # type: ignore[override]
        """Decode one picture uint8 [height, width, 3] as it was stored."""
        return decode(self._encoded[index], self._places[index])

    def as_read_before(self, index: int) -> Pixels | None:
        """Decode a picture as earlier versions did, lying as the camera was held and without paper behind it;
        None where that shows the same.
        """
        with open_picture(self._encoded[index], self._places[index]) as stored:
            if _orientation(stored) == 1 and not stored.has_transparency_data:
                return None
            return np.asarray(stored.convert("RGB"), dtype=np.uint8)

    def highest_of_sixteen_bits(self) -> int:
        """Return the highest value among the first pictures of 16-bit grey, -1 where there is none."""
        highest = -1
        for encoded, place in zip(self._encoded[:_MEASURED], self._places[:_MEASURED], strict=True):
            with open_picture(encoded, place) as stored:
                if stored.mode in _SIXTEEN_BITS or (stored.mode == "I" and stored.format == "PNG"):
                    highest = max(highest, int(np.asarray(stored).max(initial=0)))
        return highest

    def take(self, indices: NDArray[np.int64]) -> StoredPictures:
        """Choose rows without decoding them."""
        return StoredPictures(
            [self._encoded[i] for i in indices], [self._places[i] for i in indices], resized=self.resized
        )


def image_column(
    values: Cells, *, place: Callable[[int], str], image_size: int | None, folder: Path | None = None
) -> tuple[Pixels | LazyImages, StoredPictures | None]:
    """Turn a raw column into pictures of one size; beside them return the pictures as they were stored, where
    they come from files.

    Takes pixel arrays uint8 or uint16 [n, H, W] or [n, H, W, 1 or 3], encoded bytes, {"bytes": ...} records,
    paths, or names of files that count from `folder`. Pictures of different sizes are brought to squares of
    `image_size`, or of 224 where none was given.

    Raises:
      DataError: a picture is missing, damaged or of a kind that is not read; its file or row is named, the
        others counted.
    """
    if isinstance(values, np.ndarray):
        return _pixel_array(values, place(0)), None
    encoded, places = _located(values, place, folder)
    sizes = _sizes(encoded, places)
    if image_size is not None:
        side = image_size
    else:
        side = None
        if len(sizes) > 1:
            side = MIXED_SIDE
    if side is not None:
        width, height = (side, side)
    else:
        width, height = next(iter(sizes))
    images = LazyImages(encoded, places, (height, width), side)
    pixels = None
    if _fits(images):
        pixels = np.empty(images.shape, dtype=np.uint8)
    with _Problems() as problems:
        for row in range(len(images)):
            with problems.noted(places[row]):
                picture = images[row]  # a damaged file must show now, not in the round that draws it
                if pixels is not None:
                    pixels[row] = picture
    stored = StoredPictures(encoded, places, resized=side is not None)
    if pixels is None:
        return images, stored
    return pixels, stored


def range_note(values: Cells, stored: StoredPictures | None) -> str:
    """Say that pictures of 16 bits use the darkest part of their range alone, as those of scanners and
    cameras of 12 bits do; an empty text where they do not.
    """
    highest = -1
    if stored is not None:
        highest = stored.highest_of_sixteen_bits()
    elif isinstance(values, np.ndarray) and values.dtype == np.uint16:
        highest = int(values[:_MEASURED].max(initial=0))
    if not 0 <= highest <= _DARK:
        return ""
    return (
        f"pictures of 16 bits whose brightest value is {highest:,} of 65,535 become nearly black "
        f"(divided by {_FULL_RANGE}); stretch them to the whole range, or save them with 8 bits"
    )


def _fits(images: LazyImages) -> bool:
    return int(np.prod(images.shape, dtype=np.int64)) <= EAGER_BYTES


def _located(
    values: Sequence[Any], place: Callable[[int], str], folder: Path | None
) -> tuple[list[bytes | Path], list[str]]:
    """Give the encoded pictures, and what each is called: its file where it has one, else its row."""
    encoded: list[bytes | Path] = []
    with _Problems() as problems:
        for row, value in enumerate(values):
            with problems.noted(place(row)):
                encoded.append(_encoded(value, place(row), folder))
    places = []
    for row, item in enumerate(encoded):
        places.append(str(item) if isinstance(item, Path) else place(row))
    return encoded, places


def _sizes(encoded: Sequence[bytes | Path], places: Sequence[str]) -> set[tuple[int, int]]:
    sizes = set()
    with _Problems() as problems:
        for item, at in zip(encoded, places, strict=True):
            with problems.noted(at), open_picture(item, at) as picture:
                sizes.add(_upright_size(picture))
    return sizes


class _Problems:
    """Collect what is wrong with the pictures of a column, and raise one error that names the first and
    counts the rest.
    """

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}  # by place

    def __enter__(self) -> _Problems:
        return self

    @contextmanager
    def noted(self, place: str) -> Iterator[None]:
        """Note the problem of one picture and go on."""
        try:
            yield
        except DataError as error:
            self._messages[place] = str(error)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None or not self._messages:
            return
        first, *others = self._messages
        message = self._messages[first]
        if not others:
            raise DataError(message)
        named = ", ".join(others[: MOST_NAMED - 1])
        rest = len(others) - (MOST_NAMED - 1)
        more = ""
        if rest > 0:
            more = f" and {rest} more"
        raise DataError(f"{message} ({len(self._messages)} pictures in all; also {named}{more})")


def _pixel_array(values: NDArray[Any], place: str) -> Pixels:
    if values.dtype == np.uint16 and values.ndim in (3, 4):
        values = (values // _FULL_RANGE).astype(np.uint8)
    if (
        values.dtype != np.uint8
        or values.ndim not in (3, 4)
        or (values.ndim == 4 and values.shape[3] not in (1, 3))
    ):
        raise DataError(
            f"{place}: pictures are {values.dtype} {list(values.shape)}; they must be uint8 or uint16 "
            "[rows, height, width] or [rows, height, width, 1 or 3]"
        )
    if values.ndim == 3:
        pixels = values[..., None]
    else:
        pixels = values
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


def _encoded(value: JsonValue, place: str, folder: Path | None) -> bytes | Path:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, Path)):
        return value
    if isinstance(value, str) and value.strip():
        return _named_file(value, place, folder)
    raise DataError(
        f"{place}: holds no picture (found {type(value).__name__}); store the "
        "encoded bytes, or the name of a file"
    )


def _named_file(name: str, place: str, folder: Path | None) -> Path:
    """Find the file that a table names, counted from the table's own folder."""
    if re.match(r"[a-z]{2,8}://", name, re.IGNORECASE):
        raise DataError(
            f"{place}: names an address of the network, and nothing is fetched; name a file of yours"
        )
    if name.startswith("data:") or (len(name) > _LONGEST_NAME and Path(name).suffix.lower() not in SUFFIXES):
        raise DataError(
            f"{place}: holds {len(name):,} letters and no name of a file; write pictures that are text "
            "(base64) into files, or as bytes into parquet"
        )
    file = (folder or Path()) / Path(name).expanduser()
    if not _is_file(file) and "\\" in name:  # written on Windows
        file = (folder or Path()) / name.replace("\\", "/")
    if folder is None or not _is_file(file):
        raise DataError(
            f"{place}: holds no picture: there is no file {str(file)[-120:]!r}; names count from the table"
        )
    return file


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
