"""Honest sessions: exact sums over the survivors, whoever is lost and whenever, at the stated cost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import (
    MODULUS_BITS,
    NotEnoughClients,
    Quantizer,
    SessionParameters,
    Stage,
    drive,
    frame,
    unframe,
)
from defenses.secagg.graph import Mode
from tests.secagg.parties import (
    assert_exact,
    bring,
    gather,
    mask,
    run,
)

STAGES: dict[Mode, list[Stage]] = {
    "active": [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.CONFIRM, Stage.UNMASK],
    "semi_honest": [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.UNMASK],
}
MODES: list[Mode] = ["active", "semi_honest"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
def test_every_modulus_sums_exactly(mode: Mode, modulus_bits: int):
    outcome, vectors = run(gather(4, mode=mode, modulus_bits=modulus_bits, length=70))
    assert len(outcome.sum.survivors) == 4
    assert_exact(outcome, vectors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", range(7))
def test_a_client_can_be_lost_at_every_stage(mode: Mode, place: int):
    for stage in STAGES[mode]:
        parties = gather(7, mode=mode, minimum_survivors=4)
        gone = list(parties.people)[place]
        outcome, vectors = run(parties, {gone: stage})
        assert_exact(outcome, vectors)
        assert dict(outcome.lost) == {gone: stage}
        assert (gone in outcome.sum.survivors) == (stage >= Stage.CONFIRM)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_pattern_of_losses_gives_the_exact_sum_or_a_clean_abort(data: st.DataObject):
    """Within the bounds the sum is exact; beyond them the session aborts and hands out nothing."""
    mode = data.draw(st.sampled_from(MODES))
    count = data.draw(st.integers(3, 9))
    neighbours = data.draw(st.sampled_from([None, 4])) if count > 6 else None
    fewest = data.draw(st.integers(3 if neighbours is None else count - 2, count))
    parties = gather(
        count,
        mode=mode,
        minimum_survivors=fewest,
        length=3,
        neighbours=neighbours,
        seed=data.draw(st.integers(0, 9)),
        security_bits=1,
    )
    drop = data.draw(st.dictionaries(st.sampled_from(list(parties.people)), st.sampled_from(STAGES[mode])))
    uploads = sum(drop.get(owner, Stage.DONE) > Stage.MASK for owner in parties.people)
    answers = sum(owner not in drop for owner in parties.people)
    threshold = parties.parameters.threshold
    try:
        outcome, vectors = run(parties, drop)
    except ProtocolError:
        assert uploads < fewest or answers < threshold + 1 or neighbours is not None
        return
    assert_exact(outcome, vectors)
    assert len(outcome.sum.survivors) == uploads >= fewest


def expect_losses(count: int, fraction: float, mode: Mode, seed: int) -> dict[int, Stage]:
    """Draw who is lost at which stage."""
    source = RandomSource.seeded(seed)
    lost = source.permutation(count)[: int(fraction * count)]
    return {int(place): STAGES[mode][source.below(len(STAGES[mode]))] for place in lost}


def check_losses(
    count: int, *, mode: Mode, neighbours: int | None, threshold: int | None, length: int
) -> None:
    survivors = count - int(0.2 * count)
    parties = gather(
        count, mode=mode, minimum_survivors=max(3, survivors), length=length, neighbours=neighbours,
        threshold=threshold, security_bits=20,
    )  # fmt: skip
    ids = list(parties.people)
    for attempt in range(2 if count <= 20 else 1):
        drop = {ids[place]: stage for place, stage in expect_losses(count, 0.2, mode, attempt).items()}
        outcome, vectors = run(parties.next_round(round=attempt + 2), drop)
        assert_exact(outcome, vectors)
        assert len(outcome.sum.survivors) >= survivors


@pytest.mark.parametrize("mode", MODES)
def test_three_parties(mode: Mode):
    check_losses(3, mode=mode, neighbours=None, threshold=None, length=1000)


@pytest.mark.parametrize("mode", MODES)
def test_twenty_parties_with_a_fifth_lost_at_random_stages(mode: Mode):
    check_losses(20, mode=mode, neighbours=None, threshold=None, length=1000)


@pytest.mark.parametrize("parties", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_many_parties_with_sixty_neighbours_and_a_fifth_lost_at_random_stages(parties):
    check_losses(parties, mode="semi_honest", neighbours=60, threshold=20, length=200)


@pytest.mark.slow
def test_two_hundred_parties_on_the_complete_graph_in_active_mode():
    check_losses(200, mode="active", neighbours=None, threshold=None, length=1000)


def test_three_parties_cannot_spare_one():
    parties = gather(3)
    for stage in STAGES["active"]:
        with pytest.raises(NotEnoughClients):
            run(parties.next_round(round=2 + stage), {next(iter(parties.people)): stage})


def test_nobody_at_all():
    parties = gather(4)
    for stage in STAGES["active"]:
        with pytest.raises(NotEnoughClients):
            run(parties.next_round(round=2 + stage), dict.fromkeys(parties.people, stage))


def test_a_quantised_weighted_sum_from_end_to_end():
    """Reals in, weighted mean out, counts and weights masked like everything else."""
    source, grid = RandomSource.seeded(11), Quantizer(value_bits=16, coordinate_bound=2.0, modulus_bits=32)
    parties = gather(5, length=50 + 2)
    reals = {owner: source.uniform(50) * 4 - 2 for owner in parties.people}
    weights = {owner: 3 + place for place, owner in enumerate(parties.people)}

    def ring_vector(owner: bytes) -> np.ndarray:
        payload = grid.encode(reals[owner], source=source, weight=weights[owner])
        return frame(payload, weight=weights[owner], modulus_bits=32)

    outcome = drive(parties.clients(), parties.server(), bring(parties, ring_vector))
    opened = unframe(outcome.sum.vector, survivors=5, modulus_bits=32, max_weight=7, value_bits=16)
    assert opened.total_weight == sum(weights.values())
    mean = grid.decode_sum(opened.payload) / opened.total_weight
    expected = sum(weights[owner] * reals[owner] for owner in reals) / sum(weights.values())
    assert np.abs(mean - expected).max() <= 5 / grid.scale / opened.total_weight


# The driver


def test_the_driver_asks_for_vectors_lazily_and_never_for_a_lost_client():
    parties = gather(7)
    ids, asked = list(parties.people), []
    vectors = parties.vectors()

    def train(owner: bytes) -> np.ndarray:
        asked.append(owner)
        return vectors[owner]

    outcome = drive(
        parties.clients(),
        parties.server(),
        bring(parties, train),
        {ids[1]: Stage.SHARE, ids[2]: Stage.CONFIRM},
    )
    assert asked == [ids[0], *ids[2:]]
    assert_exact(outcome, vectors)


def test_a_client_whose_training_fails_counts_as_lost():
    parties = gather(5)
    vectors = parties.vectors()
    failing = list(parties.people)[3]
    outcome = drive(
        parties.clients(),
        parties.server(),
        bring(parties, lambda owner: None if owner == failing else vectors[owner]),
    )
    assert_exact(outcome, vectors)
    assert dict(outcome.lost) == {failing: Stage.MASK}


@pytest.mark.parametrize(
    "bad", [np.zeros(11, dtype=np.uint64), np.zeros(10, dtype=np.uint32), np.zeros((11, 1), dtype=np.uint32)]
)
def test_a_vector_of_the_wrong_kind_is_the_callers_mistake(bad: np.ndarray):
    parties = gather(3)
    with pytest.raises(ParameterError, match="this session sums uint32 of shape"):
        drive(parties.clients(), parties.server(), bring(parties, lambda owner: bad))


def test_the_callers_vector_is_not_changed_and_may_be_a_view():
    parties = gather(3)
    backing = {owner: np.repeat(vector, 2) for owner, vector in parties.vectors().items()}
    copies = {owner: vector.copy() for owner, vector in backing.items()}
    outcome = drive(parties.clients(), parties.server(), bring(parties, lambda owner: backing[owner][::2]))
    assert_exact(outcome, {owner: vector[::2] for owner, vector in copies.items()})
    assert all((backing[owner] == copies[owner]).all() for owner in copies)


# Cost


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
def test_an_upload_has_exactly_the_stated_bytes(modulus_bits: int):
    outcome, _ = run(gather(4, modulus_bits=modulus_bits, length=1000))
    for traffic in outcome.traffic.values():
        assert traffic.up[Stage.MASK] == 1000 * modulus_bits // 8 + 98


def test_control_traffic_is_as_in_the_table():
    """Per client: 192, 86k + 128 and 38k bytes up at most; 192n, 86k, n/8 and 64k down;
    headers of two bytes.
    """
    count, k = 12, 11
    outcome, _ = run(gather(count))
    threshold = gather(count).parameters.threshold
    for traffic in outcome.traffic.values():
        assert traffic.up == {
            Stage.ADVERTISE: 2 + 192, Stage.SHARE: 2 + 128 + 86 * k, Stage.MASK: 98 + 44, Stage.CONFIRM: 98,
            Stage.UNMASK: 98 + 33 * k,
        }  # fmt: skip
        assert traffic.down == {
            Stage.SHARE: 2 + 192 * count, Stage.MASK: 2 + 2 + 86 * k, Stage.CONFIRM: 2 + 2,
            Stage.UNMASK: 2 + 2 + 64 * threshold,
        }  # fmt: skip
        assert traffic.total == (sum(traffic.up.values()), sum(traffic.down.values()))


def peak_of_server(count: int, length: int) -> int:
    """Return the peak bytes the server allocates while it receives all uploads and opens the sum."""
    parties = gather(count, length=length, mode="semi_honest")
    clients, server = parties.clients(), parties.server()
    for session in clients.values():
        server.receive_advertisement(session.advertise())
    for session in clients.values():
        server.receive_shares(session.share(server.roster_message()))
    vector, peak = np.ones(length, dtype=np.uint32), 0
    for owner, session in list(clients.items())[1:]:
        message = mask(session, server.delivery_for(owner), vector)
        tracemalloc.start()
        server.receive_masked_input(message)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del message
    for owner, session in list(clients.items())[1:]:
        server.receive_response(session.unmask(server.request_for(owner)))
    tracemalloc.start()
    result = server.finish()
    peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert (result.vector == count - 1).all()
    return peak


def test_server_memory_does_not_grow_with_clients():
    """Beside the accumulator and the message at hand, the server needs a fraction of one vector."""
    length = 500_000
    for count in (4, 12):
        assert peak_of_server(count, length) < length * 4 * 0.3


def test_sessions_of_one_identity_are_independent():
    parties = gather(4)
    for round_number in (2, 5, 9):
        outcome, vectors = run(parties.next_round(round=round_number))
        assert_exact(outcome, vectors)


def test_proposals_travel_as_bytes():
    parameters = gather(4).parameters
    read = SessionParameters.from_bytes(parameters.to_bytes(), roster=parameters.roster)
    assert read == parameters
    assert read.session_id == parameters.session_id
    proposal = parameters.to_bytes()
    for damaged in (
        b"",
        b"\x01" + proposal[1:],
        proposal + b"\0",
        proposal[:-1],
        proposal[:-32],
        proposal + proposal[-32:],
        proposal[:-64] + proposal[-32:] + proposal[-64:-32],
        proposal[:-1] + bytes([proposal[-1] ^ 1]),
        proposal + bytes(1 << 20),
    ):
        with pytest.raises(ProtocolError):
            SessionParameters.from_bytes(damaged, roster=parameters.roster)


def describe(changes: Mapping[str, object]) -> str:
    return ",".join(f"{name}={value!r}"[:30] for name, value in changes.items())


CHANGES: list[dict[str, object]] = [
    {"run_id": b"x" * 15},
    {"round": -1},
    {"round": 1 << 64},
    {"clients": 2, "neighbours": 1},
    {"threshold": 1},
    {"threshold": 2, "neighbours": 4},
    {"threshold": 5},
    {"minimum_survivors": 2},
    {"minimum_survivors": 6},
    {"modulus_bits": 20},
    {"length": 0},
    {"model_hash": b""},
    {"layout_hash": b"x" * 31},
    {"quantization_hash": b"x"},
    {"graph": "star"},
    {"mode": "trusting"},
    {"neighbours": 3},
    {"graph": "harary", "neighbours": 3},
    {"graph": "harary", "neighbours": 4},
    {"clients": 6, "neighbours": 5},
    {"attempt": -1},
    {"attempt": 1 << 32},
    {"backbone_hash": b"x"},
    {"mechanism_hash": b""},
    {"cohort": (b"x" * 32,) * 5},
    {"clients": 4, "neighbours": 3},
]


@pytest.mark.parametrize("changes", CHANGES, ids=describe)
def test_parameters_that_cannot_be_are_refused(changes: dict[str, object]):
    parties = gather(5)
    with pytest.raises(ParameterError):
        parties.next_round(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": b"x" * 16},
        {"round": 9},
        {"length": 12},
        {"model_hash": b"M" * 32},
        {"layout_hash": b"L" * 32},
        {"quantization_hash": b"Q" * 32},
        {"backbone_hash": b"B" * 32},
        {"mechanism_hash": b"D" * 32},
        {"attempt": 1},
        {"modulus_bits": 64},
        {"threshold": 4},
        {"minimum_survivors": 4},
    ],
    ids=describe,
)
def test_every_parameter_is_in_the_session_id(changes: dict[str, object]):
    parties = gather(5)
    assert parties.next_round(**changes).parameters.session_id != parties.next_round().parameters.session_id
