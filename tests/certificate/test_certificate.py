"""What a certificate holds and what it refuses: every byte, file, event, signature and ledger."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Event, Ledger, from_json
from defenses.dp.accountant import composed
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.api import Run
from ffm_secure.certificate.envelope import Envelope, Signature, key_id
from ffm_secure.certificate.make import certify, countersign
from ffm_secure.certificate.statement import OwnerEvidence
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.errors import PlanRefused, RecordError
from ffm_secure.transport.roster import key_words, read_key
from tests.certificate.conftest import PRIVATE
from tests.certificate.helpers import (
    broken,
    certificate,
    everything,
    resigned,
    statement_of,
    with_predicate,
)
from tests.federation.helpers import RECORD, SECAGG, call, make

ROOT = Path(__file__).resolve().parents[2]


def test_a_certificate_of_a_run_holds_in_every_part(finished: Path) -> None:
    result = verify(certificate(finished), everything(finished))
    assert result.holds
    claims = [check.claim for check in result.checks]
    for owner in (f"client-{number}" for number in range(1, 5)):
        assert {f"signature of owner {owner}", f"epsilon of {owner}", f"ledger of {owner}"} <= set(claims)
    assert {"adapter/adapter_model.safetensors", "report.html", "run file"} <= set(claims)
    assert result.kind == "simulation"
    assert all("simulated" in check.detail for check in result.checks if check.claim.startswith("signature"))


def test_epsilon_is_the_report_s_and_the_accountant_s(finished: Path) -> None:
    predicate = statement_of(certificate(finished)).predicate
    report = json.loads((finished / "report.json").read_text())
    assert predicate.statements[0].epsilon == pytest.approx(report["statements"][0]["epsilon"], abs=1e-6)
    with Ledger.open(finished / "ledger.sqlite", create=False) as ledger:
        for owner in predicate.owners:
            charged = ledger.charged(owner.owner, predicate.run_id)
            assert owner.epsilon == pytest.approx(composed(charged, predicate.delta), abs=1e-6)


def test_a_second_accountant_agrees(finished: Path) -> None:
    pytest.importorskip("dp_accounting")
    result = verify(certificate(finished), replace(everything(finished), cross_check=True))
    assert result.holds
    assert any(check.claim.startswith("second accountant") for check in result.checks)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_certificate_can_be_flipped(finished: Path, data: st.DataObject) -> None:
    content = bytearray(certificate(finished))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    assert broken(bytes(content), Materials())


def test_not_one_byte_parses_to_the_same_envelope_with_valid_signatures(finished: Path) -> None:
    """Every byte once: the form is canonical, so no change of spelling survives."""
    content = certificate(finished)
    keys = [read_key(signer.public_key) for signer in statement_of(content).predicate.signers]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        try:
            envelope = Envelope.from_bytes(bytes(changed))
        except RecordError:
            continue
        assert not all(envelope.verifies(key) for key in keys), place


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter/export.json", "report.json"])
def test_a_changed_file_is_named(run: Path, name: str) -> None:
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(bytes(content))
    assert broken(certificate(run), everything(run)) == [name]
    (run / name).unlink()
    assert broken(certificate(run), everything(run)) == [name]
    (run / name).mkdir()
    assert broken(certificate(run), everything(run)) == [name], "a folder is no file"


def test_a_file_nobody_certified_in_the_model_is_named(run: Path) -> None:
    (run / "adapter" / "modeling.py").write_text("raise SystemExit")
    assert broken(certificate(run), everything(run)) == ["no other file in the model"]


def test_dropped_and_forged_events_do_not_add_up(finished: Path) -> None:
    """Even where every party signs them: epsilon follows from the events, and the ledger holds them."""
    statement = statement_of(certificate(finished))
    predicate = statement.predicate
    first = predicate.owners[0]
    fewer = replace(first.events[0], count=first.events[0].count - 1)
    short = replace(first, events=(fewer,))
    dropped = replace(predicate, owners=(short, *predicate.owners[1:]))
    assert "epsilon of client-1" in broken(with_predicate(statement, dropped), Materials())
    priced = replace(short, epsilon=composed(_pairs(short), predicate.delta))
    cheaper = replace(predicate, owners=(priced, *predicate.owners[1:]))
    assert broken(with_predicate(statement, cheaper), everything(finished)) == ["ledger of client-1"]
    quieter = json.loads(first.events[0].event)
    quieter["noise_multiplier"] *= 2
    forged = replace(first, events=(replace(first.events[0], event=json.dumps(quieter)),))
    louder = replace(predicate, owners=(forged, *predicate.owners[1:]))
    assert "epsilon of client-1" in broken(with_predicate(statement, louder), Materials())


def _pairs(owner: OwnerEvidence) -> list[tuple[Event, int]]:
    return [(from_json(event.event), event.count) for event in owner.events]


def test_a_lower_statement_than_its_events_is_refused(finished: Path) -> None:
    statement = statement_of(certificate(finished))
    made = statement.predicate.statements
    lower = replace(made[0], epsilon=made[0].epsilon / 2)
    forged = replace(statement.predicate, statements=(lower, *made[1:]))
    assert broken(with_predicate(statement, forged), Materials()) == ["statement towards public"]


def test_signatures_belong_to_their_owners(finished: Path) -> None:
    envelope = Envelope.from_bytes(certificate(finished))
    first, second, *others = envelope.signatures
    swapped = (
        Signature(key_id=first.key_id, value=second.value),
        Signature(key_id=second.key_id, value=first.value),
        *others,
    )
    assert len(broken(replace(envelope, signatures=swapped).to_bytes(), Materials())) == 2
    assert len(broken(replace(envelope, signatures=envelope.signatures[1:]).to_bytes(), Materials())) == 1
    foreign = envelope.signed_by(Identity.generate(RandomSource.system()))
    assert broken(foreign.to_bytes(), Materials()) == ["signers"]


def test_a_key_under_which_anything_verifies_signs_nothing(finished: Path) -> None:
    """Under a key of small order one signature fits many messages; no such key is a party."""
    statement = statement_of(certificate(finished))
    first = replace(statement.predicate.signers[1], public_key="ed25519:01" + "00" * 31)
    signers = (statement.predicate.signers[0], first, *statement.predicate.signers[2:])
    weak = replace(statement, predicate=replace(statement.predicate, signers=signers))
    anything = Signature(key_id=key_id(bytes.fromhex("01" + "00" * 31)), value=bytes([1]) + bytes(63))
    envelope = Envelope(payload=weak.to_bytes(), signatures=(anything,))
    assert f"signature of owner {first.name}" in broken(envelope.to_bytes(), Materials())


def test_an_owner_left_out_is_missed(finished: Path) -> None:
    statement = statement_of(certificate(finished))
    predicate = statement.predicate
    silent = replace(predicate, signers=predicate.signers[:-1])
    assert "every owner signs" in broken(with_predicate(statement, silent), Materials())


def test_simulated_keys_never_pass_for_a_federation(finished: Path) -> None:
    statement = statement_of(certificate(finished))
    assert "every owner signs" in broken(resigned(replace(statement, kind="federation")), Materials())


def test_a_certificate_of_another_run_does_not_fit(finished: Path, tmp_path: Path) -> None:
    Run(make(privacy=PRIVATE, protection=SECAGG), runs=tmp_path).start()
    wrong = broken(certificate(finished), everything(tmp_path / "test"))
    assert "adapter/adapter_model.safetensors" in wrong
    assert "ledger" in wrong


def test_a_ledger_that_was_rolled_back_is_noticed(run: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for file in run.glob("ledger.sqlite*"):
        shutil.copy(file, older / file.name)
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        ledger.grant("record", 9.0, 1e-5, raise_because="a later row")
    content = certify(run, operator=None, owners={}).content
    assert broken(content, Materials(ledger=run / "ledger.sqlite")) == []
    assert broken(content, Materials(ledger=older / "ledger.sqlite")) == ["ledger"]


def test_noise_from_a_seed_is_never_certified(tmp_path: Path) -> None:
    Run(make(privacy=RECORD, protection=SECAGG), runs=tmp_path).start()
    with pytest.raises(PlanRefused, match="seed"):
        certify(tmp_path / "test", operator=None, owners={})


def test_without_its_ledger_nothing_is_certified(run: Path) -> None:
    content = bytearray((run / "ledger.sqlite").read_bytes())
    row = content.find(b'"reserve"'[1:-1])
    content[row] ^= 1
    (run / "ledger.sqlite").write_bytes(bytes(content))
    with pytest.raises(PlanRefused, match="not authentic"):
        certify(run, operator=None, owners={})
    (run / "ledger.sqlite").unlink()
    with pytest.raises(PlanRefused, match="not there"):
        certify(run, operator=None, owners={})


def test_every_owner_signs_by_itself(run: Path, tmp_path: Path) -> None:
    names = [f"client-{number}" for number in range(1, 5)]
    keys = {name: Identity.generate(RandomSource.system()) for name in [*names, "operator"]}
    public = {name: key_words(keys[name].public_key) for name in names}
    with pytest.raises(PlanRefused, match="client-4"):
        certify(run, operator=keys["operator"], owners=dict(list(public.items())[:3]))
    content = certify(run, operator=keys["operator"], owners=public).content
    assert len(broken(content, Materials())) == 4
    for name in names:
        content, signed = countersign(content, keys[name], ledger=run / "ledger.sqlite")
        assert signed == name
    assert broken(content, everything(run)) == []
    assert statement_of(content).kind == "simulation"  # whoever has the keys, one machine held every row
    trusted = {key_words(key.public_key): name for name, key in keys.items()}
    assert broken(content, Materials(trust=trusted)) == []
    trusted[public["client-2"]] = "client-3"
    assert broken(content, Materials(trust=trusted)) == ["signature of owner client-2"]
    with pytest.raises(PlanRefused, match="names no party"):
        countersign(content, Identity.generate(RandomSource.system()), ledger=None)


def test_an_owner_does_not_sign_over_a_head_its_ledger_never_had(run: Path, tmp_path: Path) -> None:
    keys = {
        name: Identity.generate(RandomSource.system())
        for name in ["operator", *(f"client-{i}" for i in range(1, 5))]
    }
    public = {name: key_words(key.public_key) for name, key in keys.items() if name != "operator"}
    content = certify(run, operator=keys["operator"], owners=public).content
    with Ledger.open(tmp_path / "other.sqlite") as ledger:
        ledger.grant("record", 1.0, 1e-5)
    with pytest.raises(PlanRefused, match="does not hold"):
        countersign(content, keys["client-1"], ledger=tmp_path / "other.sqlite")


def test_what_later_runs_took_from_the_rows_is_counted(tmp_path: Path) -> None:
    """The report states the run's end; a certificate made later states what the rows have spent by then."""
    ledger = tmp_path / "shared.sqlite"
    with Ledger.open(ledger) as opened:
        opened.grant("record", 40.0, 1e-5)
    shared = {**PRIVATE, "ledger": str(ledger)}
    Run(make(privacy=shared, protection=SECAGG), runs=tmp_path / "a").start()
    first = statement_of(certify(tmp_path / "a" / "test", operator=None, owners={}).content).predicate
    Run(make(privacy=shared, protection=SECAGG, seed=4), runs=tmp_path / "b").start()
    content = certify(tmp_path / "a" / "test", operator=None, owners={}).content
    later = statement_of(content).predicate
    assert later.statements[0].epsilon > first.statements[0].epsilon
    assert "later runs" in later.statements[0].note
    assert broken(content, Materials(ledger=ledger)) == []


def test_a_verifier_needs_no_model_library(finished: Path) -> None:
    """Run where the model libraries cannot be imported at all."""
    program = (
        "import sys\n"
        "class Closed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'peft', 'datasets', 'safetensors'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Closed())\n"
        "from ffm_secure.cli import main\n"
        "main()\n"
    )
    words = [
        "verify",
        str(finished / "certificate.json"),
        "--ledger",
        str(finished / "ledger.sqlite"),
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["holds"] is True


def test_the_commands_say_what_they_did(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.json"
    assert "binds nobody" in call("certify", str(run), "--out", str(place)).stdout
    good = call("verify", str(place), "--files", str(run))
    assert good.returncode == 0
    assert "everything that was checked holds" in good.stdout
    place.write_bytes(place.read_bytes().replace(b'"keyid":"', b'"keyid":"0', 1))
    bad = call("verify", str(place), "--files", str(run))
    assert bad.returncode != 0
    assert str(place) in bad.stderr
    assert call("verify", str(place), "--files", str(tmp_path / "none")).returncode == 2
