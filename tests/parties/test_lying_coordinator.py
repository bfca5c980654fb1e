"""Every attack of the protocol's catalogue, by a coordinator that signs it: refused, and nobody is opened."""

from __future__ import annotations


import pytest

from defenses.dp import Ledger
from defenses.errors import ProtocolError
from defenses.secagg import messages
from defenses.secagg.messages import Kind
from ffm_secure.config.run_file import RunConfig
from ffm_secure.federation import TrainingResult
from tests.parties.helpers import SEEDED, Federation, found, log_of, notes_run, open_all
from tests.parties.lying import QUICK, VICTIM, Lie, Lying, run_with_lies

MASKS = {"kind": "secagg", "threshold": 3, "colluding": 0}
QUICK_STEPS = {"kind": "finetune", "local_steps": 1, "batch_size": 2, "learning_rate": 0.1}
Told = tuple[Federation, Lying, TrainingResult]


def rounds_of_lies(count: int) -> RunConfig:
    return notes_run(
        task={"max_length": 8},
        privacy=SEEDED,
        protection=MASKS,
        federation={"rounds": count, "evaluate_every": count, "lifecycle": QUICK_STEPS},
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    config = rounds_of_lies(len(QUICK))
    federation = found(tmp_path_factory.mktemp("lies"), config, policy={"colluders": 0})
    sessions = open_all(federation)
    try:
        return federation, *run_with_lies(federation, sessions, QUICK)
    finally:
        sessions.close()


def check_lie(lie: Lie, lying: Lying, there: TrainingResult) -> None:
    """Look at what the victim answered to a lie, and at what came of its round."""
    record = there.records[lying.lies.index(lie)]
    assert not record.aborted
    assert record.dropped == ({VICTIM: lie.lost_at} if lie.lost_at else {})
    late = (lie.lost_at or "unmask") in ("confirm", "unmask")  # the vector was in by then, and is one of four
    assert record.survivors == ((0, 1, 2, 3) if late else (1, 2, 3))
    answer = lying.answered[lie.name]
    if lie.stage == "upload" and answer is not None:  # a signed complaint, and no vector
        with pytest.raises(ProtocolError):
            messages.SignedBody.from_bytes(answer, Kind.MASKED)
    else:
        assert answer is None, "it was answered"


@pytest.mark.parametrize("lie", QUICK, ids=[lie.name for lie in QUICK])
def test_a_lie_opens_nobody_and_costs_the_liar_a_site(lie: Lie, told: Told) -> None:
    _, lying, there = told
    check_lie(lie, lying, there)


def test_why_is_in_the_sites_own_log_alone(told: Told) -> None:
    federation, _, _ = told
    for stage in ("share", "upload", "confirm", "unmask"):
        assert f"refused '{stage}': the message is improper or out of turn" in log_of(federation, "north")
    for name in ("south", "east", "west"):
        assert "refused" not in log_of(federation, name)


def test_a_round_is_charged_once_however_the_coordinator_lies(told: Told) -> None:
    """What a site reserved before it read a row stays reserved; no lie makes it pay twice."""
    federation, _, there = told
    for name in ("north", "south", "east", "west"):
        with Ledger.open(federation.site(name) / "ledger.sqlite", create=False) as ledger:
            ledger.verify()
            charged = [entry.round for entry in ledger.entries() if entry.kind == "reserve"]
        assert charged == [record.round for record in there.records]
