"""Means that a few wrong points cannot move far: each rule is about points [n, d], and says against how many
it holds.

A point is one client's update where updates are visible, or the mean of one group under masks. What a rule
withstands depends on the attack as much as on the rule: docs/results/robustness.md has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 2000
_TOLERANCE = 1e-10


def coordinate_median(points: Tensor) -> Tensor:
    """Return the median of every coordinate, float [d]; the mean of the middle two where n is even.

    Guarantee: with fewer than half of the points wrong, every coordinate lies between two right ones.
    Source: Yin et al. 2018, arXiv:1803.01498, Definition 1.
    """
    _require(points, least=1)
    ordered = points.sort(dim=0).values
    low, high = (len(points) - 1) // 2, len(points) // 2
    return (ordered[low] + ordered[high]) / 2


def trimmed_mean(points: Tensor, *, wrong: int) -> Tensor:
    """Return the mean of every coordinate without its `wrong` smallest and largest values, float [d].

    Guarantee: with at most `wrong` points wrong, every coordinate lies between two right ones.
    Source: Yin et al. 2018, arXiv:1803.01498, Definition 2.
    """
    _require(points, least=2 * wrong + 1)
    ordered = points.sort(dim=0).values
    return ordered[wrong : len(points) - wrong].mean(dim=0)


def geometric_median(points: Tensor) -> Tensor:
    """Return the point with the smallest sum of distances to all others, float [d].

    Guarantee: with fewer than half of the points wrong, its distance from the right ones is bounded by their
    own spread, wherever the wrong ones lie.
    Source: Weiszfeld's iteration as mended by Vardi and Zhang 2000; Pillutla et al. 2022, arXiv:1912.13445.
    """
    _require(points, least=1)
    exact = points.double()
    if len(exact) == 1:
        return exact[0].to(points.dtype)
    scale = float(exact.abs().max())
    if scale == 0.0:
        return exact[0].to(points.dtype)
    centre = coordinate_median(exact)
    for _ in range(_STEPS):
        after = _weiszfeld_step(exact, centre, floor=scale * 1e-15)
        moved = float((after - centre).norm())
        centre = after
        if moved <= _TOLERANCE * scale:
            break
    return centre.to(points.dtype)


def _weiszfeld_step(points: Tensor, centre: Tensor, *, floor: float) -> Tensor:
    """Return the next centre; a point the centre lies on pulls with the force of one, not with infinity."""
    distances = (points - centre).norm(dim=1)
    apart = distances > floor
    if not bool(apart.any()):
        return centre
    weights = 1.0 / distances[apart]
    mean: Tensor = (weights.unsqueeze(1) * points[apart]).sum(dim=0) / weights.sum()
    here = int((~apart).sum())
    if not here:
        return mean
    force = float((weights.unsqueeze(1) * (points[apart] - centre)).sum(dim=0).norm())
    share = 1.0 if force == 0.0 else min(1.0, here / force)
    between: Tensor = (1.0 - share) * mean + share * centre
    return between


def krum_scores(points: Tensor, *, wrong: int) -> Tensor:
    """Return for every point the sum of squared distances to its n - wrong - 2 nearest others, float64 [n].

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """
    _require(points, least=wrong + 3)
    squared = _squared_distances(points)
    squared.fill_diagonal_(float("inf"))
    nearest = squared.sort(dim=1).values[:, : len(points) - wrong - 2]
    return nearest.sum(dim=1)


def krum(points: Tensor, *, wrong: int) -> Tensor:
    """Return the one point that lies closest among its neighbours, float [d].

    Assumes: n >= 2 wrong + 3.
    Source: Blanchard et al. 2017, arXiv:1703.02757.
    """
    _require(points, least=2 * wrong + 3)
    return points[int(krum_scores(points, wrong=wrong).argmin())]


def multi_krum(points: Tensor, *, wrong: int) -> Tensor:
    """Return the mean of the n - wrong points with the smallest Krum scores, float [d].

    Assumes: n >= 2 wrong + 3.
    Source: Blanchard et al. 2017, arXiv:1703.02757, section 5, with m = n - wrong.
    """
    _require(points, least=2 * wrong + 3)
    chosen = krum_scores(points, wrong=wrong).argsort(stable=True)[: len(points) - wrong]
    return points[chosen].mean(dim=0)


def bulyan(points: Tensor, *, wrong: int) -> Tensor:
    """Choose n - 2 wrong points one by one by Krum, then average around their median, float [d].

    Of every coordinate the n - 4 wrong chosen values closest to the median of the chosen are averaged.

    Assumes: n >= 4 wrong + 3.
    Source: El Mhamdi et al. 2018, arXiv:1802.07927, section 4.
    """
    _require(points, least=4 * wrong + 3)
    left = list(range(len(points)))
    chosen = []
    for _ in range(len(points) - 2 * wrong):
        among = points[left]
        nearest = max(1, len(left) - wrong - 2)
        squared = _squared_distances(among)
        squared.fill_diagonal_(float("inf"))
        scores = squared.sort(dim=1).values[:, : min(nearest, max(1, len(left) - 1))].sum(dim=1)
        chosen.append(left.pop(int(scores.argmin())))
    picked = points[chosen]
    middle = coordinate_median(picked)
    order = (picked - middle).abs().argsort(dim=0, stable=True)[: len(points) - 4 * wrong]
    return picked.gather(0, order).mean(dim=0)


def trusted_mean(points: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Weigh every point by its cosine with a reference, 0 where it is negative, float [d].

    reference: [d], what somebody trusted has learned. lengths: [n], the length each point is brought to, so
    that no point counts by its size.
    Guarantee: the result is no longer than the largest of `lengths`; a point against the reference counts
    nothing. Zero where every point does.
    Source: Cao et al. 2021, arXiv:2012.13995 (FLTrust); there all lengths are the reference's own.
    """
    _require(points, least=1)
    exact, known = points.double(), reference.double()
    norms, length = exact.norm(dim=1), float(known.norm())
    if length == 0.0:
        return torch.zeros_like(known)
    cosines = (exact @ known) / (norms * length).clamp_min(1e-300)
    trust = cosines.clamp_min(0.0)
    if float(trust.sum()) == 0.0:
        return torch.zeros_like(known)
    scaled = exact * (lengths.double() / norms.clamp_min(1e-300)).unsqueeze(1)
    weighted: Tensor = (trust.unsqueeze(1) * scaled).sum(dim=0) / trust.sum()
    return weighted


def _squared_distances(points: Tensor) -> Tensor:
    """Return squared distances float64 [n, n], by differences: the shortcut by products loses small ones."""
    exact = points.double()
    rows = []
    for point in exact:
        rows.append((exact - point).square().sum(dim=1))
    return torch.stack(rows)


def _require(points: Tensor, *, least: int) -> None:
    if points.dim() != 2 or len(points) < least:
        raise ValueError(f"points of shape {list(points.shape)}: must be at least {least} rows [n, d]")
