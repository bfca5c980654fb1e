"""A second mind against the certificate: it knows the page on evidence, and holds every key it needs."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Charge, Ledger, from_json
from defenses.dp.accountant import composed
from defenses.dp.records import RecordKey, name_records
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.certificate.envelope import LARGEST, Envelope
from ffm_secure.certificate.evidence import write_evidence
from ffm_secure.certificate.make import certify, countersign
from ffm_secure.certificate.statement import (
    TENSORS,
    CountedEvent,
    Predicate,
    RoundEvidence,
    Signer,
    Statement,
    Subject,
)
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.errors import PlanRefused, RecordError
from ffm_secure.transport.roster import key_words
from tests.certificate.helpers import broken, certificate, everything, forged, resigned, statement_of
from tests.federation.helpers import call

Change = Callable[[Predicate], dict[str, Any]]


def _statements(**changes: Any) -> Change:
    return lambda held: {"statements": tuple(replace(one, **changes) for one in held.statements)}


def _event(text: str, count: int = 3) -> Change:
    """Put another event text in the place of the first owner's."""

    def change(held: Predicate) -> dict[str, object]:
        first = replace(held.owners[0], events=(CountedEvent(event=text, count=count),))
        return {"owners": (first, *held.owners[1:])}

    return change


def _all_events(**fields: object) -> Change:
    """Let every owner have paid for other events, with the epsilon that follows from them."""

    def change(held: Predicate) -> dict[str, object]:
        values = {**json.loads(held.owners[0].events[0].event), **fields}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        epsilon = composed([(from_json(text), 3)], held.delta)
        events = (CountedEvent(event=text, count=3),)
        owners = tuple(replace(owner, events=events, epsilon=epsilon) for owner in held.owners)
        words = (f"3 x {text}",)
        said = tuple(replace(one, epsilon=epsilon, mechanism=words) for one in held.statements)
        return {"owners": owners, "statements": said}

    return change


def _count(count: int) -> Change:
    return lambda held: _event(held.owners[0].events[0].event, count)(held)


def _doubled(held: Predicate) -> dict[str, object]:
    """Give one owner twice in place of another: the number of owners stays."""
    owners = (*held.owners[:3], held.owners[0])
    return {"owners": owners, "signers": (*held.signers[:4], replace(held.signers[4], name="client-1"))}


def _cut_to(count: int) -> Change:
    return lambda held: {"owners": held.owners[:count], "signers": held.signers[: count + 1]}


def _run_file(old: str, new: str) -> Change:
    def change(held: Predicate) -> dict[str, object]:
        assert old in held.run_file
        return {"run_file": held.run_file.replace(old, new)}

    return change


QUIET = '{"noise_multiplier":40.0,'
CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "no statement": (lambda held: {"statements": ()}, "statements"),
    "one observer only": (lambda held: {"statements": held.statements[:1]}, "statements"),
    "minus infinity": (_statements(epsilon=-math.inf), "statement towards public"),
    "not a number": (_statements(epsilon=math.nan), "statement towards public"),
    "another unit": (_statements(unit="client"), "statement towards public"),
    "other neighbours": (_statements(adjacency="zero out one client"), "statement towards public"),
    "a quieter mechanism": (_statements(mechanism=("noise multiplier 40",)), "statement towards public"),
    "another slack": (_statements(slack=-5.0), "statement towards public"),
    "another delta": (_statements(delta=0.1), "statement towards public"),
    "an owner without events": (
        lambda held: {"owners": (replace(held.owners[0], events=(), epsilon=0.0), *held.owners[1:])},
        "epsilon of client-1",
    ),
    "events of a client": (_all_events(unit="client"), "epsilon of client-1"),
    "events of other neighbours": (_all_events(adjacency="zero_out"), "epsilon of client-1"),
    "a name twice in an event": (
        lambda held: _event(QUIET + held.owners[0].events[0].event[1:])(held),
        "epsilon of client-1",
    ),
    "no event": (_event("nonsense"), "epsilon of client-1"),
    "a deep event": (_event("[" * 100_000), "epsilon of client-1"),
    "an event of no kind": (_event('{"version":1,"kind":"x"}'), "epsilon of client-1"),
    "a huge number in an event": (
        _event(json.dumps({"version": 1, "kind": "gaussian", "noise_multiplier": 10**400})),
        "epsilon of client-1",
    ),
    "a negative count": (_count(-3), "epsilon of client-1"),
    "a count of none": (_count(0), "epsilon of client-1"),
    "a count beyond numbers": (_count(10**400), "epsilon of client-1"),
    "no rounds": (lambda held: {"rounds": ()}, "rounds"),
    "rounds below nothing": (
        lambda held: {"rounds": (RoundEvidence(round=-1, cohort=-4, survivors=999),)},
        "rounds",
    ),
    "a round left out": (lambda held: {"rounds": held.rounds[::2]}, "rounds"),
    "owners left out with their signers": (_cut_to(3), "rounds"),
    "an owner twice": (_doubled, "every owner signs"),
    "an audit above its bound": (lambda held: {"epsilon_lower": 50.0}, "audit"),
    "a comment in the run file": (lambda held: {"run_file": "# by the DPA\n" + held.run_file}, "run file"),
    "a deep run file": (lambda held: {"run_file": "a = " + "[" * 20_000}, "run file"),
    "half a pair in the run file": (lambda held: {"run_file": "\ud800"}, "run file"),
    "a seed in the run file": (_run_file('noise = "system"', 'noise = "seeded"'), "run file"),
    "another name": (lambda held: {"run": "other"}, "run file"),
    "no transcript": (lambda held: {"transcript": ""}, "rounds"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_whoever_signs(name: str, finished: Path) -> None:
    change, claim = CONTRADICTIONS[name]
    content = certificate(finished)
    wrong = broken(forged(content, **change(statement_of(content).predicate)), Materials())
    assert claim in wrong


REPORT = "report.json and the certificate"
BESIDE_A_REPORT: dict[str, tuple[Change, str]] = {
    "another status": (lambda held: {"status": "interrupted"}, REPORT),
    "another transcript": (lambda held: {"transcript": "0" * 64}, REPORT),
    "nothing unprotected": (lambda held: {"not_protected": ()}, REPORT),
    "nothing public": (lambda held: {"declared_public": ()}, REPORT),
    "no protection": (_run_file('kind = "secagg"', 'kind = "none"'), REPORT),
    "a smaller budget": (_run_file("epsilon = 8.0", "epsilon = 1.0"), REPORT),
    "less noise in the run file": (
        _run_file("clip_norm = 1.0", "clip_norm = 0.01"),
        REPORT,
    ),
    "more noise in the events": (_all_events(noise_multiplier=40.0), REPORT),
    "fewer steps in the events": (_all_events(steps=1), REPORT),
}


@pytest.mark.parametrize("name", BESIDE_A_REPORT)
def test_a_certificate_agrees_with_its_report(name: str, finished: Path) -> None:
    change, claim = BESIDE_A_REPORT[name]
    content = certificate(finished)
    wrong = broken(forged(content, **change(statement_of(content).predicate)), Materials(folder=finished))
    assert claim in wrong


def _subjects(finished: Path, *changed: Subject, without: str = "") -> bytes:
    statement = statement_of(certificate(finished))
    rest = tuple(subject for subject in statement.subjects if subject.name != without)
    return resigned(replace(statement, subjects=(*rest, *changed)))


def test_names_of_files_lead_nowhere_else(finished: Path) -> None:
    for name in (
        "a\0b",
        "",
        "x" * 5000,
        "../test/report.json",
        "adapter//etc/hostname",
        "/etc/hostname",
        "a/./b",
    ):
        content = _subjects(finished, Subject(name=name, digest={"sha256": "0" * 64}))
        assert broken(content, Materials(folder=finished, model=finished / "adapter")), name
    twice = Subject(name="report.json", digest={"sha256": "0" * 64})
    assert "subjects" in broken(_subjects(finished, twice), Materials())
    assert "subjects" in broken(_subjects(finished, Subject(name="x", digest={})), Materials())


def test_a_device_or_a_pipe_in_the_place_of_a_file_ends_at_once(run: Path) -> None:
    endless = Subject(name="adapter//dev/zero", digest={"sha256": "0" * 64})
    assert "subjects" in broken(_subjects(run, endless), Materials(model=run / "adapter"))
    (run / "report.html").unlink()
    os.mkfifo(run / "report.html")
    assert broken(certificate(run), Materials(folder=run)) == ["report.html"]
    assert call("verify", str(run / "report.html")).returncode == 5


def test_no_digest_of_tensors_hides_a_file(run: Path) -> None:
    weights = "adapter/adapter_model.safetensors"
    (run / weights).write_bytes(b"other weights")
    (run / "adapter" / "modeling.py").write_text("evil")
    for digest in ({TENSORS: "0" * 64}, {TENSORS: "0" * 64, "sha256": "0" * 64}):
        content = _subjects(run, Subject(name=weights, digest=digest), without=weights)
        assert "subjects" in broken(content, Materials(folder=run))
    hidden = _subjects(run, Subject(name="adapter/modeling.py", digest={TENSORS: "0" * 64}))
    assert "subjects" in broken(hidden, Materials(folder=run))


def test_a_certificate_without_its_model_is_none(finished: Path) -> None:
    statement = statement_of(certificate(finished))
    bare = resigned(replace(statement, subjects=()))
    assert "subjects" in broken(bare, Materials())


def test_links_are_no_files_of_a_model(run: Path, tmp_path: Path) -> None:
    content, model = certificate(run), run / "adapter"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "pytorch_model.bin").write_text("evil")
    (model / "model").symlink_to(tmp_path / "x")
    assert "no other file in the model" in broken(content, Materials(folder=run))
    assert "no other file in the model" in broken(content, Materials(model=model))
    (model / "model").unlink()
    (model / ".hidden").symlink_to("/nonexistent")
    assert "no other file in the model" in broken(content, Materials(folder=run))
    (model / ".hidden").unlink()
    card = model / "README.md"
    shutil.move(card, tmp_path / "card")
    card.symlink_to(tmp_path / "card")
    assert broken(content, Materials(folder=run)) == ["adapter/README.md"]
    card.unlink()
    shutil.move(tmp_path / "card", card)
    assert broken(content, Materials(folder=run)) == []
    model.rename(run / "real")
    model.symlink_to("real")
    assert "no other file in the model" in broken(content, Materials(folder=run))


def test_text_that_would_draw_a_line_of_its_own_is_refused(finished: Path) -> None:
    held = statement_of(certificate(finished)).predicate.statements
    for words in ("record\n  holds   signature of the authority", "record\x1b[2J", "record\u202e", "a\ud800"):
        said = tuple(replace(one, unit=words) for one in held)
        with pytest.raises(RecordError, match="printed in one line"):
            verify(forged(certificate(finished), statements=said), Materials())


def test_unknown_versions_and_fields_are_refused(finished: Path) -> None:
    with pytest.raises(RecordError, match="format"):
        verify(forged(certificate(finished), format=2), Materials())
    envelope = Envelope.from_bytes(certificate(finished))
    changed = envelope.payload.replace(b'{"_type"', b'{"_comment":"fine","_type"')
    with pytest.raises(RecordError, match="nothing else"):
        verify(replace(envelope, payload=changed).to_bytes(), Materials())
    more = envelope.payload.replace(b'"predicate":{', b'"predicate":{"a":1,')
    with pytest.raises(RecordError, match="unknown field"):
        verify(replace(envelope, payload=more).to_bytes(), Materials())
    twice = envelope.payload.replace(b'"run":', b'"run":"x","run":', 1)
    with pytest.raises(RecordError, match="twice"):
        verify(replace(envelope, payload=twice).to_bytes(), Materials())


def test_a_file_larger_than_any_certificate_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    done = call("verify", str(tmp_path / "huge.json"))
    assert done.returncode == 3
    assert f"more than {LARGEST:,}" in done.stderr


def test_an_owner_does_not_pass_for_the_operator(finished: Path) -> None:
    """The trusted keys are an owner's and the operator's; the certificate lets the owner play both."""
    statement = statement_of(certificate(finished))
    keys = {name: Identity.generate(RandomSource.system()) for name in ("client-1", "client-4")}
    signers = (
        Signer(role="operator", name="client-4", public_key=key_words(keys["client-4"].public_key)),
        Signer(role="owner", name="client-1", public_key=key_words(keys["client-1"].public_key)),
    )
    predicate = replace(statement.predicate, signers=signers, owners=statement.predicate.owners[:1])
    envelope = Envelope(payload=replace(statement, predicate=predicate).to_bytes())
    for key in keys.values():
        envelope = envelope.signed_by(key)
    trust = {key_words(key.public_key): name for name, key in keys.items()}
    assert "every owner signs" in broken(envelope.to_bytes(), Materials(trust=trust))


def test_who_is_trusted_and_has_no_part_is_named(finished: Path) -> None:
    stranger = key_words(Identity.generate(RandomSource.system()).public_key)
    held = statement_of(certificate(finished)).predicate.signers
    trust = {signer.public_key: signer.name for signer in held} | {stranger: "client-5"}
    result = verify(certificate(finished), Materials(trust=trust))
    assert result.holds
    assert [note for note in result.notes if note.startswith("client-5: trusted, and no party")]


def test_a_key_in_two_hands_is_refused_before_anything_is_signed(run: Path) -> None:
    names = [f"client-{number}" for number in range(1, 5)]
    key = Identity.generate(RandomSource.system())
    with pytest.raises(PlanRefused, match="another party's"):
        certify(run, operator=None, owners={name: key_words(key.public_key) for name in names})


def _edited(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    report = json.loads((run / "report.json").read_text())
    change(report)
    (run / "report.json").write_text(json.dumps(report))
    return run


def _lower(report: dict[str, Any]) -> None:
    for statement in report["statements"]:
        statement["epsilon"] = 0.5


def _one_observer(report: dict[str, Any]) -> None:
    report["statements"] = report["statements"][:1]


REPORTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "rounds cut": lambda report: report.update(rounds=report["rounds"][:1]),
    "other owners answered": lambda report: report["rounds"][1].update(survivors=[4, 5, 6, 7]),
    "less epsilon": _lower,
    "one observer": _one_observer,
    "another run file": lambda report: report["config"]["protection"].update(kind="none"),
    "a head that never was": lambda report: report.update(ledger_head="0" * 64),
    "another name": lambda report: report.update(name="other"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_its_run_does_not_bear_out_is_not_certified(name: str, run: Path) -> None:
    with pytest.raises(PlanRefused):
        certify(_edited(run, REPORTS[name]), operator=None, owners={})


def test_what_is_refused_leaves_nothing_behind(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    before[run / "ledger.csv"] = b"older"
    (run / "ledger.csv").write_bytes(b"older")
    edited = json.loads((run / "report.json").read_text())
    edited["rounds"][0]["survivors"] = [0, 0, 0, 0, 0]  # more answers than owners
    (run / "report.json").write_text(json.dumps(edited))
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    records[0]["survivors"] = [0, 0, 0, 0, 0]
    (run / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(PlanRefused, match="round 1"):
        certify(run, operator=None, owners={})
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert sorted(changed) == ["report.json", "rounds.jsonl"]


def _waiting(run: Path, **changes: Any) -> tuple[bytes, Identity]:
    """Return an unsigned certificate with changes, and the key of client-1."""
    statement, keys = statement_of(certificate(run)), {}
    signers = []
    for signer in statement.predicate.signers:
        keys[signer.name] = Identity.generate(RandomSource.system())
        public = key_words(keys[signer.name].public_key)
        signers.append(replace(signer, public_key=public, simulated=False))
    predicate = replace(statement.predicate, signers=tuple(signers), **changes)
    return Envelope(payload=replace(statement, predicate=predicate).to_bytes()).to_bytes(), keys["client-1"]


def test_an_owner_signs_nothing_that_its_ledger_does_not_say(finished: Path) -> None:
    held = statement_of(certificate(finished)).predicate
    ledger = finished / "ledger.sqlite"
    content, key = _waiting(finished)
    assert countersign(content, key, ledger=ledger)[1] == "client-1"
    first = held.owners[0]
    cheaper = replace(first, events=(replace(first.events[0], count=1),))
    pairs = [(from_json(event.event), event.count) for event in cheaper.events]
    cheaper = replace(cheaper, epsilon=composed(pairs, held.delta))
    for changes in (
        {"owners": (cheaper, *held.owners[1:])},
        {"owners": (replace(first, epsilon=0.1), *held.owners[1:])},
        {"statements": ()},
        {"run_id": "00" * 16},
    ):
        content, key = _waiting(finished, **changes)
        with pytest.raises(PlanRefused, match="does not hold"):
            countersign(content, key, ledger=ledger)


def _charge(
    ledger: Ledger, run_id: str, blocks: tuple[int, ...], owner: str = "client-1", **changes: Any
) -> None:
    entry = next(row for row in ledger.entries(owner="client-1") if row.event is not None)
    assert entry.event is not None
    event = from_json(json.dumps({**entry.event.to_dict(), **changes}))
    charge = Charge(
        owner=owner,
        dataset=entry.dataset,
        event=event,
        run=run_id,
        round=9,
        release="update",
        commitment=b"",
        blocks=blocks or entry.blocks,
    )
    ledger.reserve([charge])


def test_an_owner_that_the_ledger_charged_and_nobody_certifies_is_named(run: Path) -> None:
    content = certificate(run)
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        ledger.grant("record", 99.0, 1e-5, raise_because="test")
        _charge(ledger, statement_of(content).predicate.run_id, (), owner="ghost")
    assert broken(content, Materials(ledger=run / "ledger.sqlite")) == ["ledger"]


def test_what_other_runs_took_cannot_be_left_out(run: Path) -> None:
    """The newest head is stated, and of the events those of this run alone."""
    held = statement_of(certificate(run)).predicate
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        ledger.grant("record", 99.0, 1e-5, raise_because="test")
        _charge(ledger, "other", ())
        head = ledger.head()
    owners = tuple(
        replace(owner, ledger_entries=head.sequence, ledger_head=head.hash) for owner in held.owners
    )
    wrong = broken(forged(certificate(run), owners=owners), Materials(ledger=run / "ledger.sqlite"))
    assert wrong == ["ledger of client-1"]


def test_a_head_from_before_the_run_covers_nothing(finished: Path) -> None:
    held = statement_of(certificate(finished)).predicate
    with closing(sqlite3.connect(finished / "ledger.sqlite")) as file:
        first = file.execute("SELECT hash FROM entries WHERE sequence = 1").fetchone()[0].hex()
    owners = tuple(replace(owner, ledger_entries=1, ledger_head=first) for owner in held.owners)
    wrong = broken(forged(certificate(finished), owners=owners), Materials(ledger=finished / "ledger.sqlite"))
    assert "ledger of client-1" in wrong


def test_an_old_certificate_says_what_has_been_spent_since(run: Path) -> None:
    """It was true, and stays so; whoever checks it beside the ledger hears that there is more now."""
    content = certificate(run)
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        ledger.grant("record", 99.0, 1e-5, raise_because="test")
        _charge(ledger, "other", ())
    result = verify(content, Materials(ledger=run / "ledger.sqlite"))
    assert result.holds
    assert [note for note in result.notes if note.startswith("client-1: since the certificate")]


def test_rows_that_were_only_asked_once_are_certified_too(run: Path) -> None:
    """Held-back rows have an account of their own; the certificate of such a run holds beside its ledger."""
    run_id = statement_of(certificate(run)).predicate.run_id
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        contents = RecordKey.public().contents(b"held back %d" % number for number in range(50))
        ((block,),) = ledger.blocks_for([name_records(contents)])
        quiet = {"noise_multiplier": 5.0, "sampling": "full", "sampling_rate": 1.0}
        _charge(ledger, run_id, (block,), **quiet)
    content = certify(run, operator=None, owners={}).content
    assert broken(content, everything(run)) == []


def test_who_has_left_is_stated_with_the_bound(run: Path) -> None:
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        ledger.withdraw(because="asked", owner="client-1")
    content = certify(run, operator=None, owners={}).content
    owners = statement_of(content).predicate.owners
    assert [bool(owner.withdrawn) for owner in owners] == [True, False, False, False]
    assert broken(content, everything(run)) == []
    annex = (run / "dpia_annex.md").read_text()
    assert f"client-1: withdrawn on {owners[0].withdrawn}" in annex
    assert f"epsilon {owners[0].epsilon:.4g} at delta 1e-05" in annex
    stays = replace(owners[0], withdrawn="")
    silent = forged(content, owners=(stays, *owners[1:]))
    assert broken(silent, Materials(ledger=run / "ledger.sqlite")) == ["ledger of client-1"]


def test_a_verifier_writes_nothing(finished: Path) -> None:
    """Not beside the evidence either, so that it may lie where nobody can write."""
    before = {path: path.stat().st_mtime_ns for path in (*finished.iterdir(), finished)}
    assert verify(certificate(finished), everything(finished)).holds
    assert {path: path.stat().st_mtime_ns for path in (*finished.iterdir(), finished)} == before


def test_every_file_of_an_evidence_folder_is_held(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "evidence"
    files = write_evidence(finished, certificate(finished), out)
    for path in files:
        if path.name == "certificate.json":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        wrong = broken(certificate(out), Materials(folder=out))
        path.write_bytes(content)
        assert wrong == [path.relative_to(out).as_posix()]
    assert broken(certificate(out), Materials(folder=out)) == []


@pytest.fixture(scope="module")
def evidence(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bytes") / "evidence"
    write_evidence(finished, certificate(finished), out)
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_byte_of_model_ledger_or_report_can_be_flipped(evidence: Path, data: st.DataObject) -> None:
    """Any bit of any byte of any file that stands beside the certificate; the file is named."""
    files = sorted(path for path in evidence.rglob("*") if path.is_file() and path.name != "certificate.json")
    path = data.draw(st.sampled_from(files))
    stored = path.read_bytes()
    place = data.draw(st.integers(0, len(stored) - 1))
    changed = bytes([stored[place] ^ data.draw(st.integers(1, 255))])
    path.write_bytes(stored[:place] + changed + stored[place + 1 :])
    try:
        wrong = broken(certificate(evidence), Materials(folder=evidence))
    finally:
        path.write_bytes(stored)
    assert wrong == [path.relative_to(evidence).as_posix()]


def test_evidence_is_written_of_what_holds_alone(run: Path, tmp_path: Path) -> None:
    content = certificate(run)
    weights = run / "adapter" / "adapter_model.safetensors"
    stored = weights.read_bytes()
    weights.write_bytes(b"other")
    with pytest.raises(PlanRefused, match="adapter_model"):
        write_evidence(run, content, tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()
    weights.write_bytes(stored)
    unsigned, _ = _waiting(run)
    with pytest.raises(PlanRefused, match="no valid signature"):
        write_evidence(run, unsigned, tmp_path / "evidence")


def test_removing_the_report_does_not_switch_the_check_of_the_model_off(run: Path) -> None:
    (run / "report.json").unlink()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    done = call("verify", str(run / "certificate.json"))
    assert done.returncode == 1
    assert "BROKEN  adapter/adapter_model.safetensors" in done.stdout


def test_a_name_of_an_owner_without_a_ledger_is_a_mistake(finished: Path) -> None:
    done = call("verify", str(finished / "certificate.json"), "--owner", "nobody")
    assert done.returncode == 2
    assert "--ledger" in done.stderr


def test_a_flipped_byte_in_a_ledger_is_refused_or_changes_no_row(run: Path) -> None:
    """SQLite leaves bytes that belong to no row; whatever is not noticed says the same as before."""
    path, content = run / "ledger.sqlite", certificate(run)
    stored = path.read_bytes()
    with Ledger.open(path, create=False) as ledger:
        rows = ledger.export("json")
    for place in range(7, len(stored), max(1, len(stored) // 25)):
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 4]) + stored[place + 1 :])
        if broken(content, Materials(ledger=path)):
            continue
        with Ledger.open(path, create=False) as ledger:
            assert ledger.export("json") == rows, place


def test_another_kind_of_signed_thing_is_no_certificate(finished: Path) -> None:
    """The same statement under another type of payload, signed by the same keys, is refused."""
    content = certificate(finished)
    for old, new in ((b"in-toto+json", b"in-toto+jsom"), (b"payloadType", b"payloadtype")):
        with pytest.raises(RecordError):
            verify(content.replace(old, new), Materials())
    statement: Statement = statement_of(content)
    other = statement.to_bytes().replace(b"certificate:simulation:v1", b"certificate:simulation:v2")
    with pytest.raises(RecordError, match="does not know"):
        verify(Envelope(payload=other).to_bytes(), Materials())
