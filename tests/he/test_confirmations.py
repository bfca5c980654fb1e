"""Clients compare what they opened:
the same sum of the same parties is accepted, everything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from defenses.errors import ProtocolError
from defenses.he import EncryptedClient, KeyHolder, choose
from tests.he.common import PARTIES, agreement, client_of, holder

pytest.importorskip("tenseal", reason="the extra 'he' is not installed")

FIVE = PARTIES[:5]
SUM = np.array([3, -1, 7], dtype=np.int64)


def clients(parties: int = 5, fewest: int = 2, seed: int = 0) -> list[EncryptedClient]:
    key = run_key(parties, seed)
    terms = agreement(key.run, parties=parties, bound=100, length=3, fewest=fewest)
    return [client_of(key, terms, place) for place in range(parties)]


def run_key(parties: int, seed: int = 0) -> KeyHolder:
    return holder(choose("bfv", parties=parties, value_bound=100), seed)


def refused(
    client: EncryptedClient,
    messages: Sequence[bytes],
    total: np.ndarray = SUM,
    parties: Sequence[bytes] = FIVE,
) -> None:
    with pytest.raises(ProtocolError):
        client.check_confirmations(total, parties, messages)


def test_everybody_who_opened_the_same_sum_accepts_it():
    group = clients()
    messages = [client.confirm(SUM, FIVE) for client in group]
    for client in group:
        client.check_confirmations(SUM, FIVE, messages)
        client.check_confirmations(SUM, FIVE[::-1], messages)  # parties are a set
    assert len(set(messages)) == 5
    assert {len(message) for message in messages} == {89 + 64}


def test_two_groups_shown_different_honest_sums_find_out():
    """The attack: five upload, the server opens all five at three clients and
    the sum without the last at the others.
    """
    group = clients(fewest=4)
    whole = [client.confirm(SUM, FIVE) for client in group[:3]]
    without = [client.confirm(SUM - 1, FIVE[:4]) for client in group[3:4]]
    refused(group[0], [*whole, *without])  # forwarded honestly
    refused(group[3], without, SUM - 1, FIVE[:4])  # withheld: one of four is no majority of five
    refused(group[3], [*without, whole[0]], SUM - 1, FIVE[:4])
    group[0].check_confirmations(SUM, FIVE, whole)  # three of five are


@pytest.mark.parametrize("given, enough", [(1, False), (2, False), (3, True), (5, True)])
def test_a_majority_of_the_agreement_is_needed(given: int, enough: bool):
    group = clients()
    messages = [client.confirm(SUM, FIVE) for client in group[:given]]
    if enough:
        group[0].check_confirmations(SUM, FIVE, messages[1:])  # its own counts
    else:
        refused(group[0], messages)


def test_everybody_in_a_small_sum_is_enough():
    group, pair = clients(), FIVE[:2]
    messages = [client.confirm(SUM, pair) for client in group[:2]]
    group[0].check_confirmations(SUM, pair, messages)
    refused(group[0], messages[:1], SUM, pair)


def test_forged_foreign_and_repeated_messages_are_refused():
    group = clients()
    good = [client.confirm(SUM, FIVE) for client in group]
    in_anothers_name = good[1][:25] + FIVE[2] + good[1][57:]
    other_key = clients(seed=1)[2].confirm(SUM, FIVE)
    terms = group[0]._agreement
    other_round = replace(terms, round=1)
    late = client_of(group[0]._holder, other_round, 2).confirm(SUM, FIVE)
    flipped = good[2][:-1] + bytes([good[2][-1] ^ 1])
    stranger = good[2][:25] + PARTIES[9] + good[2][57:]
    for bad in (
        in_anothers_name,
        other_key,
        late,
        flipped,
        stranger,
        good[2][:-1],
        good[2] + b"\0",
        b"",
        good[1],
    ):
        refused(group[0], [good[1], bad, *good[3:]])


def test_a_burnt_key_confirms_nothing():
    group = clients()
    group[0]._holder.burn()
    with pytest.raises(ProtocolError):
        group[0].confirm(SUM, FIVE)
