"""What a client never does twice:
across sessions, runs, restarts, threads, processes and failures of the disk.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError, ProtocolError, TamperedError
from defenses.secagg import ClientSession, Identity, ReplayGuard, ServerSession, Stage
from tests.secagg.parties import NOW, Parties, bring, gather, issue, mask, play, refused, run

OWNER = b"o" * 32
RUN, OTHER_RUN = b"r" * 16, b"R" * 16
UPDATE, MODEL = b"u" * 32, b"m" * 32


def opened(parties: Parties, *, skip: frozenset[bytes] = frozenset()) -> np.ndarray:
    """Open the sum of everybody but some, over vectors that are the same in every session."""
    from defenses.secagg import drive

    vectors = parties.vectors()
    clients = {owner: session for owner, session in parties.clients().items() if owner not in skip}
    return drive(clients, parties.server(), bring(parties, vectors.__getitem__)).sum.vector


# The differences that gave one client's vector


def forgetful(parties: Parties) -> Parties:
    """Return the same people in processes that remember nothing."""
    people = {
        owner: Identity(person.seed(), guard=ReplayGuard.in_memory())
        for owner, person in parties.people.items()
    }
    return replace(parties, people=people)


def second_session(parties: Parties, how: str) -> Parties:
    if how == "another round":
        return parties.next_round(model_hash=parties.parameters.model_hash)
    if how == "another attempt":
        return parties.next_round(round=1, attempt=1, model_hash=parties.parameters.model_hash)
    other = replace(parties, policy=replace(parties.policy, run_id=OTHER_RUN))
    return other.next_round(round=1, run_id=OTHER_RUN, model_hash=parties.parameters.model_hash)


@pytest.mark.parametrize("how", ["another round", "another attempt", "another run"])
def test_two_sums_of_one_model_give_a_client_away_and_the_second_is_refused(how: str):
    parties = gather(6)
    victim = list(parties.people)[2]
    first = opened(forgetful(parties))
    second = opened(second_session(forgetful(parties), how), skip=frozenset({victim}))
    np.testing.assert_array_equal(
        first - second, parties.vectors()[victim]
    )  # the attack, where nothing is remembered

    opened(parties)
    with pytest.raises(ProtocolError):
        opened(second_session(parties, how), skip=frozenset({victim}))
    opened(parties.next_round(round=3))  # another model is another matter


def test_a_client_with_repeat_models_may_answer_again_but_never_send_an_update_twice():
    parties = gather(6, repeat_models=True)
    opened(parties)
    opened(second_session(parties, "another attempt"))
    table = play(second_session(parties, "another round"), Stage.MASK)
    owner, name = table.ids[0], hashlib.sha256(b"once").digest()
    mask(table.clients[owner], table.server.delivery_for(owner), table.vectors[owner], update=name)
    again = play(second_session(parties, "another run"), Stage.MASK)
    refused(
        lambda: mask(
            again.clients[owner], again.server.delivery_for(owner), again.vectors[owner], update=name
        )
    )


def test_a_failed_round_is_tried_again_under_the_next_attempt_with_the_guard_kept():
    """All masked, nobody was asked: the round and the attempt are used up, the next attempt is not."""
    parties = gather(6)
    play(parties, Stage.CONFIRM)
    with pytest.raises(ProtocolError):
        parties.clients()  # the same attempt
    assert opened(second_session(parties, "another attempt")).size


def test_two_sessions_of_one_model_side_by_side_are_answered_once():
    parties = gather(6)
    first = play(parties, Stage.UNMASK)
    second = play(second_session(parties, "another attempt"), Stage.UNMASK)
    owner = first.ids[0]
    first.clients[owner].unmask(first.server.request_for(owner))
    refused(lambda: second.clients[owner].unmask(second.server.request_for(owner)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_combination_of_sums_of_one_model_singles_out_a_client(data: st.DataObject):
    """The argument by linear algebra: any sequence of sums in which who answered never comes back, at least
    two each time.

    Coefficients that leave exactly one client with a factor would put a unit vector into the span of the
    sums.
    """
    count = data.draw(st.integers(4, 9))
    left, rows = set(range(count)), []
    while len(left) >= 2:
        members = data.draw(st.sets(st.sampled_from(sorted(left)), min_size=2))
        answered = data.draw(st.sets(st.sampled_from(sorted(members)), min_size=2))
        rows.append([float(member in members) for member in range(count)])
        left -= answered
    sums = np.array(rows)
    rank = np.linalg.matrix_rank(sums)
    for client in range(count):
        unit = np.eye(count)[client]
        assert np.linalg.matrix_rank(np.vstack([sums, unit])) == rank + 1


def test_with_one_answer_each_the_same_combinations_do_single_out():
    """Why two: with one honest answer per sum, the difference of the sums is that client's vector."""
    sums = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    assert np.linalg.matrix_rank(np.vstack([sums, [1.0, 0.0, 0.0]])) == np.linalg.matrix_rank(sums)


# The file


def guarded(path: Path) -> ReplayGuard:
    return ReplayGuard.open(path, owner=OWNER)


def test_the_file_remembers_across_restarts(tmp_path: Path):
    path = tmp_path / "guard"
    guard = ReplayGuard.create(path, owner=OWNER)
    guard.enter(RUN, 3, 1)
    guard.spend(UPDATE, model=MODEL)
    guard.answer(MODEL)
    guard.accept_roster("hospitals", 4)
    for again in (guard, guarded(path)):
        for call in (
            lambda g=again: g.enter(RUN, 3, 1),
            lambda g=again: g.enter(RUN, 3, 0),
            lambda g=again: g.enter(RUN, 2, 9),
            lambda g=again: g.spend(UPDATE, model=b"M" * 32),
            lambda g=again: g.spend(b"U" * 32, model=MODEL),
            lambda g=again: g.answer(MODEL),
            lambda g=again: g.accept_roster("hospitals", 3),
        ):
            with pytest.raises(ProtocolError):
                call()
    fresh = guarded(path)
    fresh.enter(RUN, 3, 2)
    fresh.enter(OTHER_RUN, 0, 0)
    fresh.spend(b"U" * 32, model=b"M" * 32)
    fresh.accept_roster("hospitals", 4)
    fresh.accept_roster("another", 0)
    assert dict(guarded(path).rounds) == {RUN: (3, 2), OTHER_RUN: (0, 0)}


def test_a_session_writes_before_each_message_leaves(tmp_path: Path):
    """Another process that opens the file sees the round before the advert, the update before the mask,
    the model before the answer.
    """
    parties = gather(4)
    owner = next(iter(parties.people))
    path = tmp_path / "guard"
    person = Identity(parties.people[owner].seed(), guard=ReplayGuard.create(path, owner=owner))
    parties = replace(parties, people={**parties.people, owner: person})
    table = play(parties, Stage.MASK)
    assert guarded_by(path, owner).rounds == {parties.parameters.run_id: (1, 0)}
    before = path.read_bytes()
    mask(table.clients[owner], table.server.delivery_for(owner), table.vectors[owner], update=UPDATE)
    assert UPDATE.hex().encode() not in before
    assert UPDATE.hex().encode() in path.read_bytes()
    following = play(parties.next_round(), Stage.UNMASK)
    model = following.parties.parameters.model_hash
    assert b'"answered":[]' in path.read_bytes()
    following.clients[owner].unmask(following.server.request_for(owner))
    assert model.hex().encode() in path.read_bytes()


def guarded_by(path: Path, owner: bytes) -> ReplayGuard:
    return ReplayGuard.open(path, owner=owner)


def test_nothing_leaves_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parties = gather(4)
    owner = next(iter(parties.people))
    path = tmp_path / "guard"
    person = Identity(parties.people[owner].seed(), guard=ReplayGuard.create(path, owner=owner))
    table = play(replace(parties, people={**parties.people, owner: person}), Stage.MASK)
    delivery, before = table.server.delivery_for(owner), path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: mask(table.clients[owner], delivery, table.vectors[owner]))
    assert path.read_bytes() == before
    monkeypatch.undo()
    guarded_by(path, owner).enter(OTHER_RUN, 1)  # what was left behind does not stop the next


def test_the_file_is_private_whatever_the_umask(tmp_path: Path):
    old = os.umask(0)
    try:
        guard = ReplayGuard.create(tmp_path / "guard", owner=OWNER)
        guard.enter(RUN, 1)
    finally:
        os.umask(old)
    for name in tmp_path.iterdir():
        assert stat.S_IMODE(name.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_others_can_touch_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "guard"
    ReplayGuard.create(path, owner=OWNER)
    path.chmod(mode)
    with pytest.raises(ParameterError, match="0600"):
        guarded(path)


def test_a_lost_file_is_never_replaced(tmp_path: Path):
    path = tmp_path / "guard"
    with pytest.raises(ParameterError, match="make a new identity"):
        guarded(path)
    assert not path.exists()
    guard = ReplayGuard.create(path, owner=OWNER)
    with pytest.raises(ParameterError, match="exists"):
        ReplayGuard.create(path, owner=OWNER)
    path.unlink()
    with pytest.raises(ParameterError, match="make a new identity"):
        guard.enter(RUN, 1)
    assert not path.exists()


def test_a_damaged_foreign_or_older_file_is_refused(tmp_path: Path):
    path = tmp_path / "guard"
    guard = ReplayGuard.create(path, owner=OWNER)
    older = path.read_bytes()
    guard.enter(RUN, 1)
    good = path.read_bytes()
    with pytest.raises(TamperedError):
        ReplayGuard.open(path, owner=b"x" * 32)
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(TamperedError):
            guarded(path)
    for damaged in (
        b"",
        good[:-1],
        good + b"x",
        b"{}\n",
        b"\n\n",
        b"[]\n" + hashlib.sha256(b"[]").hexdigest().encode() + b"\n",
    ):
        path.write_bytes(damaged)
        with pytest.raises(TamperedError):
            guarded(path)
    path.write_bytes(older)
    with pytest.raises(TamperedError):
        guard.enter(RUN, 1)


def test_links_are_not_followed(tmp_path: Path):
    target = tmp_path / "elsewhere"
    target.write_bytes(b"precious")
    path = tmp_path / "guard"
    for beside in (path, tmp_path / "guard.lock"):
        beside.symlink_to(target)
        with pytest.raises((ParameterError, OSError)):
            ReplayGuard.create(path, owner=OWNER)
        beside.unlink()
        (tmp_path / "guard.lock").unlink(missing_ok=True)
    ReplayGuard.create(path, owner=OWNER)
    (tmp_path / "guard.new").symlink_to(target)
    guarded(path).enter(RUN, 1)
    assert target.read_bytes() == b"precious"


def test_threads_and_processes_share_one_memory(tmp_path: Path):
    path = tmp_path / "guard"
    ReplayGuard.create(path, owner=OWNER)
    passed: list[int] = []

    def spend(place: int) -> None:
        guard = guarded(path)
        start.wait()
        try:
            guard.spend(UPDATE, model=MODEL)
        except ProtocolError:
            return
        passed.append(place)

    start = threading.Barrier(6)
    threads = [threading.Thread(target=spend, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1
    script = (
        "import sys\nfrom pathlib import Path\nfrom defenses.secagg import ReplayGuard\n"
        f"guard = ReplayGuard.open(Path({str(path)!r}), owner={OWNER!r})\n"
        f"guard.spend({UPDATE!r}, model={MODEL!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ProtocolError: protocol aborted" in ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_goes_on_with_neither_session_nor_memory():
    parties = gather(4)
    table = play(parties, Stage.MASK)
    owner = table.ids[0]
    session, delivery = table.clients[owner], table.server.delivery_for(owner)
    elsewhere = play(gather(4, seed=1), Stage.CONFIRM)
    confirming, survivors = elsewhere.clients[elsewhere.ids[0]], elsewhere.server.survivors_message()
    child = os.fork()
    if child == 0:
        answers = 0
        for call in (
            lambda: mask(session, delivery, table.vectors[owner]),
            lambda: parties.people[owner].guard.enter(OTHER_RUN, 1),
            lambda: confirming.confirm(survivors),
        ):
            try:
                call()
            except ProtocolError:
                answers += 1
        os._exit(0 if answers == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mask(session, delivery, table.vectors[owner])


def test_a_step_is_taken_once_by_many_threads():
    table = play(gather(4), Stage.MASK)
    owner = table.ids[0]
    session, delivery = table.clients[owner], table.server.delivery_for(owner)
    uploads: list[bytes] = []

    def ask(place: int) -> None:
        start.wait()
        try:
            name = hashlib.sha256(bytes([place])).digest()
            uploads.append(bytes(mask(session, delivery, table.vectors[owner], update=name)))
        except ProtocolError:
            pass

    start = threading.Barrier(8)
    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(uploads) <= 1


def test_names_are_whole_digests():
    table = play(gather(4), Stage.MASK)
    owner = table.ids[0]
    session, delivery = table.clients[owner], table.server.delivery_for(owner)
    for update, model in ((b"u", MODEL), (None, MODEL), (UPDATE, b"m"), (UPDATE, None), ("u" * 32, MODEL)):
        with pytest.raises(ParameterError, match="name it by a digest of 32 bytes"):
            session.mask(delivery, table.vectors[owner], update=update, model_hash=model)
    with pytest.raises(TypeError):
        session.mask(delivery, table.vectors[owner])
    mask(session, delivery, table.vectors[owner])


def test_an_identity_restored_from_its_seed_needs_its_guard():
    with pytest.raises(TypeError):
        Identity(b"s" * 32)


# The roster


def test_an_older_roster_than_was_seen_and_one_past_its_time_are_refused():
    parties = gather(4)
    person = next(iter(parties.people.values()))
    later = issue(parties.operator, list(parties.people.values()), serial=9)
    newer = parties.next_round(roster=later)
    ClientSession(person, newer.parameters, parties.policy, parties.source, now=NOW)
    for call_round in (3, 4):
        older = parties.next_round(round=call_round).parameters
        refused(lambda older=older: ClientSession(person, older, parties.policy, parties.source, now=NOW))
    last = later.expires
    following = newer.next_round(round=5).parameters
    with pytest.raises(ParameterError, match="roster: expired"):
        ClientSession(person, following, parties.policy, parties.source, now=last)
    ClientSession(person, following, parties.policy, parties.source, now=last - 1)


@pytest.mark.parametrize("federation", ["", "x" * 256, "two\nlines", "esc\x1b[2J"])
def test_a_federation_has_a_printable_name(federation: str):
    parties = gather(3)
    with pytest.raises(ParameterError, match="federation"):
        issue(parties.operator, list(parties.people.values()), federation=federation)


def test_a_key_of_small_order_is_on_no_roster():
    from defenses.secagg import Roster

    parties = gather(3)
    keys = [person.public_key for person in parties.people.values()]
    for bad in ((1).to_bytes(32, "little"), bytes(32), (2**255 - 20).to_bytes(32, "little"), b"short"):
        with pytest.raises(ParameterError, match="small order"):
            Roster.issue(parties.operator, [*keys, bad], federation="f", serial=0, expires=NOW)


def test_the_whole_session_still_runs_with_guards_in_files(tmp_path: Path):
    parties = gather(4)
    people = {
        owner: Identity(person.seed(), guard=ReplayGuard.create(tmp_path / owner.hex(), owner=owner))
        for owner, person in parties.people.items()
    }
    outcome, _ = run(replace(parties, people=people))
    assert len(outcome.sum.survivors) == 4
    assert isinstance(ServerSession(parties.parameters), ServerSession)
