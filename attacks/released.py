"""Who was in the training set of a model that was released: scores of every record, and tests that hold for
any scores.

Nothing is seen but the model. Its auditor holds records that were trained on and records of the same kind
that were not; a score that knows nothing of training puts them in the same order as chance. Scores: the loss
(Yeom et al., 2018), its lowest tokens (Shi et al., 2024), the loss against models that were not trained on
the records (Carlini et al., 2021), and LiRA where there are several of those. Members that differ from the
others by their words alone are found without the model: that is what guessing does here (Das et al., 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom, mannwhitneyu, norm
from torch import Tensor, nn

from attacks import luck, metrics
from attacks.canary import clopper_pearson
from attacks.scoring import auc_deviation
from attacks.truth import Truth

Floats = NDArray[np.float64]

RATES = (0.001, 0.01)  # of false positives at which true ones are stated
LEAST = 20  # records of each kind, below which nothing can be said
LEVEL = 0.01  # how often an audit of a model that never saw its members may call it leaking
EFFECT = 0.1  # of the way from guessing to perfect: below it nobody learned anything, however surely
NEAR = 0.3  # of the way from guessing to the control: up to here the model is near guessing
EXPOSED = 20  # records that are named to their owner
_LOWEST = 0.2  # of a text's tokens
_FOLDS = 5
_WORDS = 512  # hashed, for guessing without the model
_SIDE = 8  # of a picture, for the same
_RIDGE = 10.0
_TOGETHER = 32  # records of one length in one pass
_PLANTED, _RATE, _CLEAR = 24, 2e-3, 0.75  # records of the control, its rate, and the AUC it has to reach
_Z99 = 2.576


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """State how many members are found where so few others are taken for members.

    `true_positive` is None where there are too few others for a rate this low.
    """

    false_positive: float
    true_positive: float | None
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipTest:
    """Hold what one score says of all records, with its luck corrected for all tests of the audit.

    `luck` is that of the whole order, `tail_luck` that of the highest hundredth alone: a model may give away
    few records among many. `curve` holds (false positive, true positive) shares from the strictest threshold
    to the loosest.
    """

    score: str
    auc: float
    low: float
    high: float
    luck: float
    tail_luck: float
    tail_share: float
    rates: tuple[Rate, ...]
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Say what the same test finds in a copy that was trained on records nobody trained on, undefended."""

    auc: float
    passes: int
    proven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedAudit:
    """Say whether a released model gives its members away.

    `exposed` is for their owner alone: places among the members, the most exposed first, with the share of
    others that look as trained on.
    """

    verdict: str
    reason: str
    members: int
    others: int
    tests: tuple[MembershipTest, ...]
    blind: MembershipTest
    control: Control | None
    exposed: tuple[tuple[int, float], ...]

    @property
    def best(self) -> MembershipTest:
        """Return the test that says most."""
        return min(self.tests, key=lambda one: (min(one.luck, one.tail_luck), -one.auc))


# ---------------------------------------------------------------------------------------------------- scores


def token_scores(model: nn.Module, records: Truth) -> list[Tensor]:
    """Return the log-probabilities of what is right in each record: of its label, or of every next token.

    Raises: ValueError for records that hold neither texts nor labelled pictures.
    """
    parts: dict[int, Tensor] = {}
    for rows, batch in _batches(records):
        with torch.no_grad():
            logits = _logits(model, batch)
        if "labels" in batch and logits.ndim == 2:
            chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, batch["labels"][:, None])
        elif logits.ndim == 3:
            logged = torch.log_softmax(logits[:, :-1].double(), dim=-1)
            chosen = logged.gather(2, batch["token_ids"][:, 1:, None])[..., 0]
        else:
            raise ValueError("records of a classifier need labels")
        for row, value in zip(rows, chosen, strict=True):
            parts[row] = value
    return [parts[row] for row in range(len(parts))]


def _batches(records: Truth) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield records of one length together, with their places."""
    labels = None if records.labels is None else torch.tensor(records.labels)
    if records.images is not None:
        for start in range(0, len(records.images), _TOGETHER):
            rows = list(range(start, min(start + _TOGETHER, len(records.images))))
            if labels is None:
                raise ValueError("pictures need labels")
            yield rows, {"images": records.images[rows], "labels": labels[rows]}
        return
    if not records.sequences:
        raise ValueError("neither texts nor pictures")
    lengths: dict[int, list[int]] = {}
    for place, text in enumerate(records.sequences):
        lengths.setdefault(len(text), []).append(place)
    for places in lengths.values():
        for start in range(0, len(places), _TOGETHER):
            rows = places[start : start + _TOGETHER]
            batch = {"token_ids": torch.tensor([records.sequences[row] for row in rows])}
            if labels is not None:
                batch["labels"] = labels[rows]
            yield rows, batch


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    if "images" in batch:
        output = model(batch["images"].to(next(model.parameters()).dtype))
    else:
        output = model(input_ids=batch["token_ids"])
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def _loss(parts: Sequence[Tensor]) -> Floats:
    """Return how right a model is about each record: the log-odds of a label, the mean over tokens."""
    values = []
    for part in parts:
        if len(part) > 1:
            values.append(float(part.mean()))
            continue
        chance = min(1 - 1e-12, max(1e-12, math.exp(float(part[0])))) if len(part) else 0.5
        values.append(math.log(chance / (1 - chance)))
    return np.asarray(values)


def _lowest(parts: Sequence[Tensor]) -> Floats:
    values = []
    for part in parts:
        count = max(1, int(_LOWEST * len(part)))
        values.append(float(part.sort().values[:count].mean()) if len(part) else 0.0)
    return np.asarray(values)


def all_scores(model: nn.Module, records: Truth, references: Sequence[nn.Module]) -> dict[str, Floats]:
    """Return every score of every record, higher for members; `references` were trained on none of them."""
    parts = token_scores(model, records)
    scores = {"loss": _loss(parts)}
    if any(len(part) > 1 for part in parts):
        scores["lowest tokens"] = _lowest(parts)
    beside = []
    for other in references:
        beside.append(_loss(token_scores(other.eval(), records)))
    if beside:
        table = np.stack(beside)
        scores["reference"] = scores["loss"] - table.mean(axis=0)
        if len(beside) > 2:
            spread = table.std(axis=0, ddof=1)
            scores["lira"] = scores["reference"] / (0.5 * spread + 0.5 * spread.mean() + 1e-9)
    return scores


# ----------------------------------------------------------------------------------------------------- tests


def membership_test(name: str, inside: Floats, outside: Floats) -> MembershipTest:
    """Hold the scores of members against those of others.

    Guarantee: for scores that know nothing of who was a member, `luck` and `tail_luck` lie at or below x with
    probability at most about x, however the scores are distributed.
    Source: Mann and Whitney, 1947; Fisher's exact test of the highest scores.
    """
    area = metrics.auc(inside, outside)
    spread = _Z99 * auc_deviation(area, len(inside), len(outside))
    both = np.concatenate([inside, outside])
    count = max(10, len(both) // 100)
    order = np.random.default_rng(0).permutation(len(both))  # ties fall at random, not members first
    highest = order[np.argsort(-both[order], kind="stable")][:count]
    hits = int((highest < len(inside)).sum())
    return MembershipTest(
        score=name,
        auc=area,
        low=max(0.0, area - spread),
        high=min(1.0, area + spread),
        luck=float(mannwhitneyu(inside, outside, alternative="greater").pvalue),
        tail_luck=float(hypergeom.sf(hits - 1, len(both), len(inside), count)),
        tail_share=hits / count,
        rates=tuple(_rate(inside, outside, rate) for rate in RATES),
        curve=_curve(inside, outside),
    )


def _rate(inside: Floats, outside: Floats, rate: float) -> Rate:
    if len(outside) * rate < 1 - 1e-9:
        return Rate(false_positive=rate, true_positive=None)
    share = metrics.tpr_at_fpr(inside, outside, rate)
    low, high = clopper_pearson(round(share * len(inside)), len(inside), 0.005)
    return Rate(false_positive=rate, true_positive=share, low=low, high=high)


def _curve(inside: Floats, outside: Floats) -> tuple[tuple[float, float], ...]:
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    if len(thresholds) > 200:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, 200).astype(int)]
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        points.append((float((outside >= threshold).mean()), float((inside >= threshold).mean())))
    return tuple(points)


def blind_test(members: Truth, others: Truth) -> MembershipTest:
    """Tell members from others without any model: by their words, labels or colours, learned on other folds.

    What this finds is how the two files differ, and says nothing of what a model gives away.
    """
    inside, outside = _features(members), _features(others)
    table = np.concatenate([inside, outside])
    answers = np.concatenate([np.ones(len(inside)), -np.ones(len(outside))])
    fold = np.random.default_rng(0).permutation(len(table)) % _FOLDS
    scores = np.zeros(len(table))
    for number in range(_FOLDS):
        own, rest = fold == number, fold != number
        centre = table[rest].mean(axis=0)
        rows = table[rest] - centre
        weight = answers[rest] - answers[rest].mean()
        kernel = rows @ rows.T + _RIDGE * np.eye(len(rows))
        scores[own] = (table[own] - centre) @ (rows.T @ np.linalg.solve(kernel, weight))
    return membership_test("without the model", scores[: len(inside)], scores[len(inside) :])


def _features(records: Truth) -> Floats:
    if records.images is not None:
        small = nn.functional.adaptive_avg_pool2d(records.images.float(), _SIDE).flatten(1).numpy()
        return np.asarray(small - small.mean(), dtype=np.float64)
    sequences = records.sequences or ()
    table = np.zeros((len(sequences), _WORDS + 1))
    for row, text in enumerate(sequences):
        for token in text:
            table[row, token * 2_654_435_761 % 2**32 % _WORDS] += 1
        table[row, _WORDS] = len(text) / 10
    return np.sqrt(table)


# --------------------------------------------------------------------------------------------------- control


def taught(model: nn.Module, records: Truth, *, passes: int, rate: float = _RATE) -> nn.Module:
    """Return a copy that was trained on records, undefended, for so many passes of AdamW."""
    pupil = copy.deepcopy(model)
    trained = []
    for value in pupil.parameters():
        if value.requires_grad:
            trained.append(value)
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batches = []
    for _, batch in _batches(records):
        batches.append(batch)
    with torch.enable_grad():
        for _ in range(passes):
            for batch in batches:
                logits = _logits(pupil, batch)
                if logits.ndim == 3:
                    loss = nn.functional.cross_entropy(
                        logits[:, :-1].flatten(0, 1), batch["token_ids"][:, 1:].flatten()
                    )
                else:
                    loss = nn.functional.cross_entropy(logits, batch["labels"])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
    return pupil


def planted(model: nn.Module, others: Truth) -> Control:
    """Plant a memory: train a copy on records nobody trained on until the test by loss finds them.

    The rest of them is held against; `passes` says how many it took.
    """
    count = min(_PLANTED, _size(others) // 2)
    own, rest = _part(others, range(count)), _part(others, range(count, _size(others)))
    pupil, passes, area = model, 0, 0.5
    for more in (2, 4, 8, 16, 30):
        pupil = taught(pupil, own, passes=more)
        passes += more
        test = membership_test("loss", _loss(token_scores(pupil, own)), _loss(token_scores(pupil, rest)))
        area = test.auc
        if test.luck <= LEVEL and area >= _CLEAR:
            return Control(auc=area, passes=passes, proven=True)
    return Control(auc=area, passes=passes, proven=False)


def _size(records: Truth) -> int:
    if records.images is not None:
        return len(records.images)
    return len(records.sequences or ())


def _part(records: Truth, rows: Sequence[int]) -> Truth:
    return Truth(
        sequences=None if records.sequences is None else tuple(records.sequences[row] for row in rows),
        images=None if records.images is None else records.images[list(rows)],
        labels=None if records.labels is None else tuple(records.labels[row] for row in rows),
    )


# --------------------------------------------------------------------------------------------------- verdict


def audit_released(
    model: nn.Module, members: Truth, others: Truth, *, references: Sequence[nn.Module] = ()
) -> ReleasedAudit:
    """Say whether a released model gives away who was in its training set.

    `members` were trained on, `others` are of the same kind and were not; `references` are models trained on
    neither. *Leaked*: a test beats luck after the correction for all of them, and what is learned without the
    model. *Not leaked*: every test is near guessing and far below the control, a planted memory that the same
    test finds. Otherwise nothing is proven.

    Guarantee: of a model that never saw its members at most a share of `LEVEL` is called leaking.
    Raises: ValueError for fewer than `LEAST` records of a kind, or records the model cannot take.
    """
    counts = {"members": _size(members), "others": _size(others)}
    few = [f"{count} {name}" for name, count in counts.items() if count < LEAST]
    if few:
        raise ValueError(f"{' and '.join(few)}: at least {LEAST} of each are needed")
    model = model.eval()
    inside = all_scores(model, members, references)
    outside = all_scores(model, others, references)
    blind = blind_test(members, others)
    tests = []
    for name, values in inside.items():
        tests.append(_beyond(membership_test(name, values, outside[name]), blind))
    tests = _corrected(tests)
    control = planted(model, others)
    verdict, reason = _verdict(tests, blind, control)
    best = min(tests, key=lambda one: (min(one.luck, one.tail_luck), -one.auc)).score
    return ReleasedAudit(
        verdict=verdict,
        reason=reason,
        members=counts["members"],
        others=counts["others"],
        tests=tuple(tests),
        blind=blind,
        control=control,
        exposed=_exposed(inside[best], outside[best]),
    )


def _beyond(test: MembershipTest, blind: MembershipTest) -> MembershipTest:
    """Ask of a test that it beats what is told without the model, where that tells anything."""
    if blind.luck > LEVEL and blind.tail_luck > LEVEL:
        return test
    spread = (test.high - test.low + blind.high - blind.low) / (4 * _Z99)
    chance = float(norm.sf((test.auc - blind.auc) / max(2**0.5 * spread, 1e-9)))
    tail = test.tail_luck if test.tail_share > blind.tail_share + 0.2 else 1.0
    return replace(test, luck=max(test.luck, chance), tail_luck=max(test.tail_luck, tail))


def _corrected(tests: Sequence[MembershipTest]) -> list[MembershipTest]:
    lucks = luck.holm([value for test in tests for value in (test.luck, test.tail_luck)])
    corrected = []
    for place, test in enumerate(tests):
        corrected.append(replace(test, luck=lucks[2 * place], tail_luck=lucks[2 * place + 1]))
    return corrected


def _verdict(tests: Sequence[MembershipTest], blind: MembershipTest, control: Control) -> tuple[str, str]:
    by_order = [one for one in tests if one.luck <= LEVEL and one.auc >= 0.5 + EFFECT / 2]
    by_tail = [one for one in tests if one.tail_luck <= LEVEL]
    if by_order:
        best = max(by_order, key=lambda one: one.auc)
        return "leaked", f"{best.score}: members stand above the others (AUC {best.auc:.3f})"
    if by_tail:
        best = max(by_tail, key=lambda one: one.tail_share)
        return "leaked", f"{best.score}: of the highest hundredth {best.tail_share:.0%} are members"
    if blind.luck <= LEVEL:
        return "inconclusive", "members and others differ without the model: take others of the same kind"
    if not control.proven:
        return "inconclusive", f"a memory planted in {control.passes} passes is not found either"
    near = 0.5 + NEAR * (control.auc - 0.5)
    highest = max(tests, key=lambda one: one.auc)
    if highest.auc > near:
        return "inconclusive", f"{highest.score} lies between guessing and the control"
    if min(one.high for one in tests) > control.auc:
        return "inconclusive", "too few records to tell guessing from the control"
    return "not leaked", f"a memory planted in {control.passes} passes is found, the members are not"


def _exposed(inside: Floats, outside: Floats) -> tuple[tuple[int, float], ...]:
    """Return the members with the highest scores, and the share of others that score as high."""
    order = np.argsort(-inside, kind="stable")[:EXPOSED]
    return tuple((int(place), float((outside >= inside[place]).mean())) for place in order)
