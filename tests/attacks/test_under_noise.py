"""Every registered reconstruction reads the bare update, reads less under noise,
and is at its baseline at noise multiplier 1.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from attacks.registry import ATTACKS, build
from tests.attacks import cases

# of the way from guessing to what the bare update gives: what luck may move a score between two noises
SLACK = 0.15
BASELINE = 0.4  # of that way, averaged over the draws of noise
NOISE = (0.0, 1e-2, 1.0)
DRAWS = {"label_identity": 8, "idlg_label": 8, "llg": 8, "ilrg": 8}  # one of few labels is hit by chance
EXCEPTIONS = {
    "matched_filter": (
        "scores candidates; how far noise of any size hides them is theory, and canaries hold it to that"
    ),
    "projection_residual": "scores candidates; test_monotone holds it",
    "prompt_membership": "scores candidates; test_monotone holds it",
    "lira": "scores candidates on a released model, sees no update",
    "rmia": "scores candidates on a released model, sees no update",
    "batch_statistics": "reads means over a batch, no record of it; under noise in test_batch_norm",
}
SLOW = {
    "neuron_imprint",
    "somp",
    "grad_vit",
    "tag",
    "text_matching_whitened",
    "lamp",
    "grab",
    "fedavg_unrolled",
    "learned_inversion",
}
RECONSTRUCTIONS = sorted(set(ATTACKS) - set(EXCEPTIONS))


def test_no_attack_is_forgotten() -> None:
    assert set(RECONSTRUCTIONS) <= set(cases.CASES), "give every new attack a case in tests/attacks/cases.py"
    assert set(EXCEPTIONS) <= set(ATTACKS)
    assert not set(EXCEPTIONS) & set(cases.CASES)
    assert all(
        build(name).summary.startswith(("membership", "means")) for name in EXCEPTIONS
    )  # nothing is reconstructed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECONSTRUCTIONS]
)
def test_a_reconstruction_falls_with_noise_and_reaches_its_baseline_at_multiplier_one(name: str) -> None:
    case = cases.CASES[name]()
    bare = cases.scored(name, case)
    assert bare is not None
    assert bare.succeeded, "without a positive control the rest proves nothing"
    shares = []
    for noise in NOISE:
        draws = DRAWS.get(name, 1) if noise else 1
        found = [cases.scored(name, case.noised(noise, seed)) if noise else bare for seed in range(draws)]
        # What finds nothing to say is at its baseline.
        above = [0.0 if one is None else one.value - one.baseline for one in found]
        shares.append(sum(above) / draws / (bare.value - bare.baseline))
    assert all(later <= earlier + SLACK for earlier, later in pairwise(shares)), shares
    assert shares[-1] <= BASELINE, shares
    assert draws > 1 or found[0] is None or not found[0].succeeded
