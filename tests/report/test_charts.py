"""Charts: labels that never collide, ticks that span, and values that stay inside."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ffm_secure.report.charts import (
    HEIGHT,
    WIDTH,
    Bar,
    Level,
    Series,
    bars,
    histogram,
    line_chart,
    nice_ticks,
    spread,
)

FINITE = st.floats(-1e9, 1e9, allow_nan=False).map(lambda v: float(f"{v:.6g}"))


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
def test_labels_keep_their_order_their_gap_and_the_frame(places: list[float]) -> None:
    places.sort()
    moved = spread(places, gap=17.0, low=0.0, high=200.0)
    assert all(b - a >= 17.0 - 1e-6 for a, b in pairwise(moved))
    assert moved[0] >= -1e-6
    assert moved[-1] <= 200.0 + 1e-6


def test_labels_with_room_do_not_move() -> None:
    assert spread([10.0, 50.0, 90.0], gap=17.0, low=0.0, high=200.0) == [10.0, 50.0, 90.0]


@given(FINITE, FINITE)
@example(0.0, 5e-324)
@example(-1e-320, 1e-310)
def test_ticks_span_the_values_in_few_even_steps(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@given(st.integers(0, 5000))
def test_counts_get_whole_ticks(most: int) -> None:
    assert all(value.is_integer() for value in nice_ticks(0.0, float(most or 1), whole=True))


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.5, 0.5],
        [0.0, 0.0],
        [math.nan, 1.0, math.inf],
        [-3.0, 2.0],
        [1e-9, 2e-9],
        [1e8, 1.00001e8],
        list(range(1000)),
    ],
)
def test_every_point_lies_inside_the_chart(values: list[float]) -> None:
    chart = line_chart(
        [Series(label="v", x=list(range(1, len(values) + 1)), y=values)],
        description="d",
        levels=[Level(label="l", value=1.0)],
    )
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", chart):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT
    assert "nan" not in chart
    assert "inf" not in chart


def test_a_value_that_is_not_a_number_leaves_a_gap() -> None:
    chart = line_chart([Series(label="v", x=[1, 2, 3, 4], y=[1.0, math.nan, 2.0, 3.0])], description="d")
    line = re.search(r'<path d="([^"]*)" class="line first">', chart)
    assert line is not None
    assert line.group(1).count("M") == 2


def test_nothing_finite_is_said_in_words() -> None:
    assert "Nothing to draw" in line_chart([Series(label="v", x=[1], y=[math.nan])], description="d")
    assert "Nothing to draw" in histogram([math.nan], description="d", low=0, high=1, role="first", note="n")


def test_bars_share_one_scale() -> None:
    drawn = bars(
        [
            Bar(label="a", value=2.0, shown="2"),
            Bar(label="b", value=4.0, shown="4"),
            Bar(label="c", value=math.inf, shown="∞"),
        ]
    )
    assert re.findall(r"inline-size:([\d.]+)%", drawn) == ["50.00", "100.00", "100.00"]


def test_a_histogram_counts_every_client() -> None:
    drawn = histogram(
        [0.1] * 3 + [0.9] * 5 + [math.nan], description="d", low=0.0, high=1.0, role="first", note="n"
    )
    assert sum(int(found) for found in re.findall(r": (\d+)</title>", drawn)) == 8
