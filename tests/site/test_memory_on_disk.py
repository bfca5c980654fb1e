"""What a site never does twice outlives its process:
rounds, attempts and updates, on disk before a mask leaves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defenses import secagg
from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import Identity, ring
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.errors import StoreError
from ffm_secure.federation import NullCallback
from ffm_secure.protection.base import UPLOAD, ClientRound, update_name
from ffm_secure.protection.codec import real_codec
from ffm_secure.protection.enrolment import Enrolment, enrol
from ffm_secure.records import RoundPlan
from ffm_secure.site.identity import KEY, MEMORY, open_identity
from ffm_secure.storage.run_directory import Store
from ffm_secure.transport.stages import BEGIN, PLAN
from tests.federation.helpers import RECORD, SECAGG, finish, make, prepared
from tests.site.test_replays import message

REAL = {**RECORD, "noise": "system", "spare_rounds": 2}
CODEC = real_codec(size=5, clients=4, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)
ROUND = RoundPlan(run_id=bytes(range(16)), round=1, cohort=(0, 1, 2, 3), fingerprint="aa" * 32, mechanism="")
VECTOR = ring.frame(np.full(5, 2, dtype=np.uint16), weight=1, modulus_bits=CODEC.modulus_bits)
KINDS = ["secagg", "bfv"]


class Attempts(NullCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def round_started(self, plan: RoundPlan, total: int) -> None:
        self.seen.append((plan.round, plan.attempt))


def protection(kind: str) -> dict[str, Any]:
    if kind == "bfv":
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    return {"kind": kind, "threshold": 3}


def killed_in_round_one(made: RunConfig, folder: Path) -> simulation.Simulation:
    """Return a run whose sites have begun their first round when its process ends."""
    built = simulation.build(prepared(made), folder)
    with Store.open(folder, made) as store:
        assert store.begin_attempt(1, built.server.run_id) == 0
    for site in built.sites:
        site.handle(PLAN, message(built))
        site.handle(BEGIN, b"")
    return built


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_round_goes_on_under_the_next_attempt(kind: str, tmp_path: Path) -> None:
    """Every honest site refused it, for the first attempt's number was all there was."""
    made = make(privacy=REAL, protection=protection(kind))
    first = killed_in_round_one(made, tmp_path)
    again, attempts = simulation.build(prepared(made), tmp_path), Attempts()
    trained = finish(again, tmp_path, callback=attempts)
    assert trained.status == "complete"
    assert again.server.run_id == first.server.run_id
    assert attempts.seen == [(1, 1), (2, 0), (3, 0)]
    assert all(len(record.survivors) == 4 for record in trained.records)


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_that_comes_back_refuses_the_attempt_it_was_in(kind: str, tmp_path: Path) -> None:
    made = make(privacy=REAL, protection=protection(kind))
    first = killed_in_round_one(made, tmp_path)
    again = simulation.build(prepared(made), tmp_path)
    again.server.run_id = first.server.run_id
    site = again.sites[0]
    site.handle(PLAN, message(again))
    with pytest.raises(ProtocolError):
        site.handle(BEGIN, b"")
    paid = sum(entry.kind == "reserve" for entry in again.ledger.entries(owner=site.data.name))
    assert paid == 1, "what it cannot join it does not pay"
    site.handle(PLAN, message(again, attempt=1))
    site.handle(BEGIN, b"")


def test_a_plan_without_a_sound_attempt_is_refused(tmp_path: Path) -> None:
    built = simulation.build(prepared(make(privacy=REAL, protection=SECAGG)), tmp_path)
    for attempt in (-1, 1 << 32):
        assert b'"accepted":false' in bytes(built.sites[0].handle(PLAN, message(built, attempt=attempt)))


def test_attempts_are_counted_by_run_and_round(tmp_path: Path) -> None:
    run, other = bytes(16), bytes([1]) * 16
    with Store.open(tmp_path, make()) as store:
        assert store.run_begun() is None
        counts = [store.begin_attempt(number, run) for number in (1, 1, 2, 2, 2, 3)]
        assert counts == [0, 1, 0, 1, 2, 0]
        assert store.run_begun() == run
        assert store.begin_attempt(3, other) == 0
        for damaged in (
            "{}",
            "[" * 100_000,
            '{"format": 1, "run": "00", "round": 3, "attempt": 0}',
            f'{{"format": 1, "run": "{"00" * 16}", "round": 3, "attempt": -5}}',
            f'{{"format": 1, "run": "{"00" * 16}", "round": {"9" * 6000}, "attempt": 0}}',
        ):
            (tmp_path / "attempt.json").write_text(damaged)
            with pytest.raises(StoreError, match="damaged"):
                store.begin_attempt(3, other)


def people(folder: Path) -> list[Identity]:
    source = RandomSource.system()
    return [open_identity(folder / str(number), source) for number in range(4)]


def at_upload(enrolment: Enrolment, plan: RoundPlan) -> tuple[dict[int, ClientRound], dict[int, bytes]]:
    """Carry a round to the upload; return the sites' halves and what each is sent there."""
    halves = {site: enrolment.sites[site].join(plan) for site in plan.cohort}
    session = enrolment.server.open_round(plan)
    for stage in session.stages:
        messages = dict(session.messages(stage))
        if stage == UPLOAD:
            return halves, messages
        for site, content in messages.items():
            session.receive(stage, site, halves[site].respond(stage, content))
    raise AssertionError("no upload stage")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restarted", [False, True])
def test_one_update_enters_one_session(kind: str, restarted: bool, tmp_path: Path) -> None:
    """Two rounds about one model, whose cohorts differ by one, gave that one's vector."""
    made = make(protection=protection(kind))
    update = update_name(ROUND, b"what training gave", fresh_noise=False)
    enrolment = enrol(made, CODEC, list("abcd"), identities=people(tmp_path))
    halves, messages = at_upload(enrolment, ROUND)
    assert halves[0].seal(messages[0], VECTOR, update=update)
    if restarted:
        enrolment = enrol(made, CODEC, list("abcd"), identities=people(tmp_path))
    second = replace(ROUND, round=2)
    assert update_name(second, b"what training gave", fresh_noise=False) == update
    halves, messages = at_upload(enrolment, second)
    with pytest.raises(ProtocolError):
        halves[0].seal(messages[0], VECTOR, update=update)
    assert halves[1].seal(messages[1], VECTOR, update=update), "another site's memory is its own"


def test_fresh_noise_makes_another_update_of_each_attempt() -> None:
    plans = [ROUND, replace(ROUND, attempt=1), replace(ROUND, round=2), replace(ROUND, run_id=bytes(16))]
    assert len({update_name(plan, b"same", fresh_noise=True) for plan in plans}) == 4
    assert len({update_name(plan, b"same", fresh_noise=False) for plan in plans}) == 1


def test_the_update_is_on_the_disk_before_it_is_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(protection=SECAGG)
    enrolment = enrol(made, CODEC, list("abcd"), identities=people(tmp_path))
    halves, messages = at_upload(enrolment, ROUND)
    update, noted = bytes([7]) * 32, []
    real = secagg.ClientSession._upload

    def watched(session: secagg.ClientSession, *arguments: Any) -> Any:
        noted.append(json.loads((tmp_path / "0" / MEMORY).read_bytes().split(b"\n")[0])["updates"])
        return real(session, *arguments)

    monkeypatch.setattr(secagg.ClientSession, "_upload", watched)
    halves[0].seal(messages[0], VECTOR, update=update)
    assert noted == [[update.hex()]]


@pytest.mark.parametrize("gone", [MEMORY, KEY])
def test_an_identity_never_gets_a_new_memory(gone: str, tmp_path: Path) -> None:
    first = open_identity(tmp_path, RandomSource.system())
    first.guard.enter(bytes(16), 1)
    (tmp_path / gone).unlink()
    if gone == MEMORY:
        with pytest.raises(StoreError, match="memory of past rounds"):
            open_identity(tmp_path, RandomSource.system())
    else:
        assert open_identity(tmp_path, RandomSource.system()).id != first.id


def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    open_identity(tmp_path, RandomSource.system())
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o600
    (tmp_path / KEY).chmod(0o640)
    with pytest.raises(StoreError, match="0600"):
        open_identity(tmp_path, RandomSource.system())


def test_a_run_that_promises_nothing_keeps_no_identity(tmp_path: Path) -> None:
    """It plays a killed round again to the bit, on purpose."""
    simulation.build(prepared(make(privacy=RECORD, protection=SECAGG)), tmp_path)
    assert not list(tmp_path.rglob(KEY))


def test_no_identity_is_made_where_others_can_plant_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "home").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link"):
        open_identity(tmp_path / "home", RandomSource.system())
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StoreError, match="others may write"):
        open_identity(tmp_path / "open", RandomSource.system())
    assert not list(tmp_path.rglob(KEY))
