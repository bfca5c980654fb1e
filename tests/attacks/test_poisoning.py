"""Poisoned updates and rows are what their papers say, and what a backdoor is measured by counts right."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from attacks.poisoning import backdoor, rows, updates

OWN = torch.tensor([1.0, -2.0, 0.5])
KNOWN = torch.stack([OWN, torch.tensor([3.0, 0.0, -0.5]), torch.tensor([2.0, 2.0, 0.0])])


def test_updates_are_those_of_their_papers() -> None:
    assert torch.equal(updates.sign_flip(OWN, KNOWN, factor=10.0), -10.0 * OWN)
    assert torch.equal(updates.scaling(OWN, KNOWN, factor=3.0), 3.0 * OWN)
    assert torch.equal(updates.inner_product(OWN, KNOWN, factor=0.5), -0.5 * KNOWN.mean(dim=0))
    hidden = updates.little_is_enough(OWN, KNOWN, deviations=1.5)
    expected = KNOWN.numpy().mean(axis=0) - 1.5 * KNOWN.numpy().std(axis=0, ddof=1)
    assert hidden.numpy() == pytest.approx(expected)
    alone = updates.little_is_enough(OWN, OWN.unsqueeze(0), deviations=1.0)
    assert torch.isfinite(alone).all()


def test_what_is_hidden_needs_only_a_few_supporters() -> None:
    """Of 50 clients 24 attack: two honest supporters make a majority, so 24 of 26 may lie nearer."""
    assert updates.hidden_deviations(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26))
    assert updates.hidden_deviations(24, 2) == pytest.approx(0.0, abs=0.2), "few attackers hide little"


def test_an_unknown_attack_names_the_known() -> None:
    with pytest.raises(KeyError, match="little_is_enough"):
        updates.update_attack("cleverness", clients=4, attackers=1)
    assert torch.equal(updates.update_attack("sign_flip", clients=4, attackers=1)(OWN, KNOWN), -10 * OWN)


def test_rows_bear_other_labels_or_a_trigger() -> None:
    assert rows.flip_labels(np.array([0, 1, 3]), classes=4).tolist() == [3, 2, 0]
    assert rows.poisoned_half(10, share=0.5, seed=1).sum() == 5
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    stamped = rows.stamp_pixels(pixels, side=2)
    assert int(stamped[0, 0, :2, :2].sum()) == 4 * 255
    assert int(stamped.sum()) == 2 * 3 * 4 * 255
    assert int(pixels.sum()) == 0, "the honest rows stay as they are"
    assert rows.plant_tokens([1, 5, 6, 2], [9, 9], room=10) == [1, 9, 9, 5, 6, 2]
    assert rows.plant_tokens([1, 5, 6, 2], [9, 9], room=5) == [1, 9, 9, 5, 2]


def test_a_backdoor_is_counted_on_rows_of_other_classes() -> None:
    answers, truth = np.array([0, 0, 1, 0]), np.array([0, 1, 1, 2])
    assert backdoor.success(answers, truth, target=0) == pytest.approx(2 / 3)
    assert backdoor.success(answers[:1], truth[:1], target=0) == 0.0
    assert backdoor.lifespan([0.1, 0.9, 0.8, 0.7, 0.2, 0.9], last=2, above=0.5) == 2
    assert 3 in backdoor.Active(first=2, last=3)
    assert 4 not in backdoor.Active(first=2, last=3)
