"""`builtin:road_scenes`: small drawn pictures of a road, one kind of road user in each.

Everything is drawn from a seed: sky, verge and asphalt in changing light, and one figure at a random place.
Cameras of several cars see the same streets; `split = { kind = "feature_shift", ... }` gives each its own
light or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.generated.options import SEED, Bounds, checked_options

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

OPTIONS: Mapping[str, Bounds] = {
    "size": (3_000, 10, 100_000),
    "validation": (400, 1, 20_000),
    "seed": SEED,
}
SIDE = 32
LABELS = ("empty road", "car", "lorry", "cyclist", "pedestrian", "barrier")


def road_scenes(options: Mapping[str, int]) -> tuple[dict[str, object], dict[str, object], tuple[str, ...]]:
    """Draw the train and the validation pictures: columns image uint8 [n, 32, 32, 3] and label; and the label
    names.

    Guarantee: the same options give the same pictures; every kind is equally likely.
    """
    chosen = checked_options("road_scenes", options, OPTIONS)
    rng = np.random.Generator(np.random.PCG64([chosen["seed"], 0x20AD]))
    parts = []
    for rows in (chosen["size"], chosen["validation"]):
        labels = rng.integers(len(LABELS), size=rows)
        pictures = np.stack([_scene(int(label), rng) for label in labels])
        parts.append({"image": pictures, "label": labels.astype(np.int64)})
    return parts[0], parts[1], LABELS


def _scene(label: int, rng: np.random.Generator) -> Picture:
    horizon = int(rng.integers(8, 14))
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.float64)
    canvas[:horizon] = (135, 180, 225)
    canvas[horizon:] = (90, 140, 70)
    for row in range(horizon, SIDE):  # the road widens towards the viewer
        half = 3 + (row - horizon) * 13 // (SIDE - horizon)
        canvas[row, SIDE // 2 - half : SIDE // 2 + half] = (85, 85, 90)
    _FIGURES[label](canvas, horizon, rng)
    light = rng.uniform(0.7, 1.15)
    noisy = canvas * light + rng.normal(0.0, 6.0, canvas.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, horizon: int, tall: int, wide: int) -> tuple[int, int]:
    """Return the upper left corner of a figure that stands on the road."""
    bottom = int(rng.integers(max(horizon + 4, tall), SIDE - 1))
    left = int(rng.integers(6, SIDE - 6 - wide + 1))
    return bottom - tall, left


def _paint(canvas: NDArray[np.float64], top: int, left: int, tall: int, wide: int, colour: Colour) -> None:
    canvas[max(0, top) : top + tall, max(0, left) : left + wide] = colour


_BODY_COLOURS: tuple[Colour, ...] = ((200, 30, 30), (30, 60, 190), (230, 230, 230), (240, 200, 40))


def _body_colour(rng: np.random.Generator) -> Colour:
    return _BODY_COLOURS[rng.integers(len(_BODY_COLOURS))]


def _nothing(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    """Leave the road as it is."""


def _car(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    top, left = _place(rng, horizon, 6, 11)
    _paint(canvas, top + 2, left, 3, 11, _body_colour(rng))
    _paint(canvas, top, left + 3, 2, 5, (60, 70, 80))
    for wheel in (left + 1, left + 8):
        _paint(canvas, top + 5, wheel, 2, 2, (15, 15, 15))


def _lorry(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    top, left = _place(rng, horizon, 12, 13)
    _paint(canvas, top, left, 10, 9, _body_colour(rng))
    _paint(canvas, top + 4, left + 9, 6, 4, (60, 70, 80))
    for wheel in (left + 1, left + 5, left + 10):
        _paint(canvas, top + 10, wheel, 2, 2, (15, 15, 15))


def _cyclist(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    top, left = _place(rng, horizon, 9, 8)
    for wheel in (left, left + 5):
        _paint(canvas, top + 6, wheel, 3, 3, (15, 15, 15))
        _paint(canvas, top + 7, wheel + 1, 1, 1, (85, 85, 90))
    _paint(canvas, top + 1, left + 3, 5, 2, _body_colour(rng))
    _paint(canvas, top - 1, left + 3, 2, 2, (225, 180, 150))


def _pedestrian(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    top, left = _place(rng, horizon, 10, 3)
    _paint(canvas, top, left, 2, 3, (225, 180, 150))
    _paint(canvas, top + 2, left, 5, 3, _body_colour(rng))
    for leg in (left, left + 2):
        _paint(canvas, top + 7, leg, 3, 1, (25, 25, 60))


def _barrier(canvas: NDArray[np.float64], horizon: int, rng: np.random.Generator) -> None:
    top, _ = _place(rng, horizon, 4, 20)
    for stripe in range(5):
        colour = (220, 30, 30) if stripe % 2 else (245, 245, 245)
        _paint(canvas, top, 6 + 4 * stripe, 3, 4, colour)


_FIGURES: tuple[Callable[[NDArray[np.float64], int, np.random.Generator], None], ...] = (
    _nothing,
    _car,
    _lorry,
    _cyclist,
    _pedestrian,
    _barrier,
)
