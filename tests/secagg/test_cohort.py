"""Who takes part follows from a public seed that every client checks, and nobody else gets in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError
from defenses.secagg import (
    ClientSession,
    ServerSession,
    choose_cohort,
    drive,
    layout_digest,
    messages,
    rule_digest,
    seeded_cohorts,
)
from defenses.secagg.graph import threshold_above
from tests.secagg.parties import NOW, Parties, assert_exact, bring, gather, refused

SEED, RUN = b"s" * 32, b"r" * 16


def chosen(parties: Parties, size: int, *, seed: bytes = SEED) -> Parties:
    """Let `size` of the roster take part, by the rule of a seed that clients know."""
    parameters = parties.parameters
    cohort = choose_cohort(
        parameters.roster.members,
        seed=seed,
        run_id=parameters.run_id,
        round_number=parameters.round,
        size=size,
    )
    parties = replace(parties, policy=replace(parties.policy, cohort_rule=seeded_cohorts(SEED)))
    return parties.next_round(
        round=parameters.round,
        cohort=cohort,
        clients=size,
        neighbours=size - 1,
        threshold=threshold_above(neighbours=size - 1, corrupted=0, mode="active"),
        model_hash=parameters.model_hash,
    )


def members_only(parties: Parties) -> Parties:
    cohort = parties.parameters.cohort
    return replace(parties, people={owner: parties.people[owner] for owner in cohort})


def test_a_chosen_cohort_opens_its_sum():
    parties = members_only(chosen(gather(9), 5))
    vectors = parties.vectors()
    outcome = drive(parties.clients(), parties.server(), bring(parties, vectors.__getitem__))
    assert_exact(outcome, vectors)
    assert outcome.sum.survivors == parties.parameters.cohort


def test_a_cohort_the_server_picked_is_refused():
    """The attack: the same round with the cohort the server likes, minus one. The rule says otherwise."""
    parties = gather(9)
    right = chosen(parties, 5)
    swapped = (set(right.parameters.roster.members) - set(right.parameters.cohort)).pop()
    wrong = tuple(sorted([*right.parameters.cohort[1:], swapped]))
    person = parties.people[right.parameters.cohort[2]]
    for bad in (right.next_round(cohort=wrong), chosen(parties, 5, seed=b"S" * 32)):
        with pytest.raises(ParameterError, match="cohort: not who takes part"):
            ClientSession(person, bad.parameters, bad.policy, parties.source, now=NOW)


def test_without_a_rule_only_the_whole_roster_is_accepted():
    parties = gather(9)
    some = chosen(parties, 5)
    person = parties.people[some.parameters.cohort[0]]
    with pytest.raises(ParameterError, match="cohort: not who takes part"):
        ClientSession(person, some.parameters, parties.policy, parties.source, now=NOW)


def test_members_of_the_roster_outside_the_cohort_are_refused_at_both_ends():
    everybody = gather(9)
    parties = chosen(everybody, 5)
    inside = members_only(parties)
    outsider = next(owner for owner in everybody.people if owner not in parties.parameters.cohort)
    with pytest.raises(ParameterError, match="not in the cohort"):
        ClientSession(everybody.people[outsider], parties.parameters, parties.policy, parties.source, now=NOW)
    clients, server = inside.clients(), ServerSession(parties.parameters)
    adverts = [messages.read_advert(session.advertise()) for session in clients.values()]
    fresh = replace(adverts[0], id=outsider, nonce=b"n" * 32)
    statement = fresh.statement(parties.parameters.session_id)
    intruder = replace(fresh, signature=everybody.people[outsider].sign(statement))
    refused(lambda: server.receive_advertisement(messages.write_advert(intruder)))
    mixed = sorted([*adverts[1:], intruder], key=lambda advert: advert.id)
    refused(lambda: list(clients.values())[1].share(messages.write_roster(mixed)))


@given(st.integers(1, 12), st.integers(0, 50), st.data())
@settings(max_examples=80, deadline=None)
def test_the_rule_is_a_function_of_what_is_public(size: int, round_number: int, data: st.DataObject):
    ids = [bytes([number]) * 32 for number in range(12)]
    shuffled = data.draw(st.permutations(ids))
    one = choose_cohort(ids, seed=SEED, run_id=RUN, round_number=round_number, size=size)
    other = choose_cohort(shuffled, seed=SEED, run_id=RUN, round_number=round_number, size=size)
    assert one == other == tuple(sorted(set(one)))
    assert len(one) == size
    assert set(one) <= set(ids)


def test_cohorts_are_spread_evenly_and_follow_seed_run_and_round():
    ids = [bytes([number]) * 32 for number in range(10)]
    counts: Counter[bytes] = Counter()
    for round_number in range(3000):
        counts.update(choose_cohort(ids, seed=SEED, run_id=RUN, round_number=round_number, size=3))
    spread = sum((counts[member] - 900) ** 2 / 900 for member in ids)
    assert spread < 30  # sampled without replacement: below chi-square with nine degrees of freedom
    base = [choose_cohort(ids, seed=SEED, run_id=RUN, round_number=n, size=3) for n in range(20)]
    for seed, run in ((b"S" * 32, RUN), (SEED, b"R" * 16)):
        assert base != [choose_cohort(ids, seed=seed, run_id=run, round_number=n, size=3) for n in range(20)]


@pytest.mark.parametrize("size, seed", [(0, SEED), (13, SEED), (3, b"short")])
def test_impossible_choices_are_refused(size: int, seed: bytes):
    with pytest.raises(ParameterError):
        choose_cohort([bytes([n]) * 32 for n in range(12)], seed=seed, run_id=RUN, round_number=1, size=size)


# Digests of what clients compute


LAYOUTS = [
    [("a", (2, 3)), ("b", (4,))],
    [("b", (4,)), ("a", (2, 3))],
    [("a", (3, 2)), ("b", (4,))],
    [("a", (2, 3))],
    [],
    [("a", (2, 3, 1)), ("b", (4,))],
    [("ab", (2, 3)), ("", (4,))],
    [("a", ()), ("b", (4,))],
]


def test_layouts_that_differ_have_different_digests():
    assert len({layout_digest(layout) for layout in LAYOUTS}) == len(LAYOUTS)
    assert layout_digest(iter(LAYOUTS[0])) == layout_digest(LAYOUTS[0])


RULES = [
    ("clip", {"bound": 1.0}),
    ("clip", {"bound": 1}),
    ("clip", {"bound": True}),
    ("clip", {"bound": "1.0"}),
    ("clip", {"bound": b"1"}),
    ("clip", {"bound": 1.0000000000000002}),
    ("clip", {"bound": None}),
    ("clip", {}),
    ("clip", {"boun": "d1.0"}),
    ("clipb", {"ound": 1.0}),
    ("clip", {"bound": 1.0, "noise": 2.0}),
]


def test_rules_that_differ_have_different_digests():
    assert len({rule_digest(kind, rule) for kind, rule in RULES}) == len(RULES)
    assert rule_digest("x", {"a": 1, "b": 2}) == rule_digest("x", {"b": 2, "a": 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), [1], object()])
def test_settings_without_one_meaning_are_refused(bad: object):
    with pytest.raises(ParameterError, match="noise"):
        rule_digest("x", {"noise": bad})
