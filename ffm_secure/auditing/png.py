"""Pictures inside a page: pixels to a PNG address, without files and without a picture library."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from ffm_secure.records import RecoveredPicture

LARGEST_SIDE = 96  # pixels; larger pictures are shrunk, a report is no archive


class _Pair(Protocol):
    """A true image and the recovered one, both (channels, height, width) as the model takes them."""

    @property
    def truth(self) -> Tensor: ...
    @property
    def recovered(self) -> Tensor: ...
    @property
    def psnr(self) -> float: ...
    @property
    def ssim(self) -> float: ...


def png_address(image: Tensor) -> str:
    """Return a picture (1 or 3 channels, height, width) with values in [0, 1] as a `data:image/png;base64,`
    address.

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


def side_by_side(
    pairs: Iterable[_Pair], mean: Tensor | None = None, deviation: Tensor | None = None
) -> tuple[RecoveredPicture, ...]:
    """Turn true and recovered images as the model takes them into pictures as a person sees them."""
    shift = torch.zeros(())
    if mean is not None:
        shift = mean.view(-1, 1, 1)
    scale = torch.ones(())
    if deviation is not None:
        scale = deviation.view(-1, 1, 1)

    def address(image: Tensor) -> str:
        return png_address(image * scale + shift)

    return tuple(
        RecoveredPicture(
            truth=address(one.truth), recovered=address(one.recovered), psnr=one.psnr, ssim=one.ssim
        )
        for one in pairs
    )
