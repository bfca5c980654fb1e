"""Pictures inside a page: pixels to a PNG address, without files and without a picture library."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor, nn

LARGEST_SIDE = 96  # pixels; larger pictures are shrunk, a report is no archive


def png_address(image: Tensor) -> str:
    """Return a picture (1 or 3 channels, height, width) with values in [0, 1] as a `data:image/png;base64,` address.

    Values outside are cut off; a side above 96 pixels is shrunk by averaging.
    """
    pixels = image.detach().float().cpu()
    while max(pixels.shape[1:]) > LARGEST_SIDE:
        pixels = nn.functional.avg_pool2d(pixels, 2)
    levels = (pixels.nan_to_num().clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.contiguous().numpy().tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits, red green blue, no interlace
    content = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + content).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
