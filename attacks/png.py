"""Pictures as PNG files, without a picture library."""

from __future__ import annotations

import struct
import zlib

from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_bytes(image: Tensor) -> bytes:
    """Return a picture (1 or 3 channels, height, width) with values in [0, 1] as a PNG file; values outside
    are cut off.

    Raises: ValueError for another shape.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a picture has the shape {tuple(image.shape)}, must be (1 or 3, height, width)")
    levels = (image.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte()
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits, red green blue, no interlace
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND", b""))
    return _SIGNATURE + b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
