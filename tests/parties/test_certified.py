"""A coordinator's run becomes a certificate that its sites sign with the keys on the roster."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from defenses.dp import Charge, Ledger
from defenses.dp.records import RecordKey, name_records
from ffm_secure.certificate.attested import attest
from ffm_secure.certificate.check import Materials
from ffm_secure.certificate.collect import read_run
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.statement import Statement
from ffm_secure.certificate.verify import verify
from ffm_secure.config import run_file
from ffm_secure.engines import coordinated
from ffm_secure.site.folder import SiteFolder
from ffm_secure.storage.durable import write_synced
from ffm_secure.transport.roster import key_words
from tests.federation.helpers import Done, call
from tests.parties.helpers import NAMES, RECORD, Federation, found, notes_run, open_all

MASKS = {"kind": "secagg", "threshold": 3}


@dataclass(frozen=True, kw_only=True)
class Attested:
    """A finished run of four sites, and what each of them attests."""

    federation: Federation
    run: Path
    words: dict[str, Path]

    def certify(self, out: Path, *names: str, also: Path | None = None, **options: str) -> Done:
        files = [self.words[name] for name in names or NAMES] + ([also] if also else [])
        words = [item for file in files for item in ("--attested", str(file))]
        more = [item for name, value in options.items() for item in (f"--{name}", value)]
        return call("certify", str(self.run), "--out", str(out), *words, *more)


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory) -> Attested:
    place = tmp_path_factory.mktemp("certified-federation")
    federation = found(place, notes_run(privacy=RECORD, protection=MASKS))
    sessions = open_all(federation)
    ready = federation.coordinator()
    try:
        coordinated.finish(ready, ready.coordinator.run(sessions))
    finally:
        ready.close()
        sessions.close()
    words = {}
    for name in NAMES:
        words[name] = place / f"{name}.json"
        done = call(
            "site", "attest", str(federation.site(name)), str(federation.run_file), "--out", str(words[name])
        )
        assert done.returncode == 0, done.stderr
    return Attested(federation=federation, run=place / "coordinator" / "runs" / "test", words=words)


@pytest.fixture
def certificate(attested: Attested, tmp_path: Path) -> Path:
    """Return a certificate that nobody has signed yet."""
    out = tmp_path / "certificate.json"
    done = attested.certify(out)
    assert done.returncode == 0, done.stderr
    assert "to be signed by operator, east, north, south, west" in done.stdout
    return out


def statement_of(certificate: Path) -> Statement:
    return Statement.from_bytes(Envelope.from_bytes(certificate.read_bytes()).payload)


def test_sites_of_their_own_sign_what_their_ledgers_hold(
    attested: Attested, certificate: Path, tmp_path: Path
) -> None:
    federation = attested.federation
    for name in NAMES:
        done = call("site", "sign", str(federation.site(name)), str(certificate))
        assert done.returncode == 0, done.stderr
    unsigned = verify(certificate.read_bytes(), Materials())
    assert [check.claim for check in unsigned.checks if not check.holds] == ["signature of operator"]
    write_synced(tmp_path / "operator.key", federation.operator.seed())
    done = call("sign", str(certificate), "--identity", str(tmp_path / "operator.key"))
    assert done.returncode == 0, done.stderr
    trust = {key_words(member.key): member.name for member in federation.members}
    trust[key_words(federation.operator.public_key)] = "operator"
    for name in NAMES:
        ledger = federation.site(name) / "ledger.sqlite"
        result = verify(
            certificate.read_bytes(),
            Materials(folder=attested.run, ledger=ledger, owner=name, trust=trust),
        )
        assert result.holds, [check for check in result.checks if not check.holds]
        assert f"ledger of {name}" in [check.claim for check in result.checks]
    assert result.kind == "federation"
    assert not any(signer.simulated for signer in statement_of(certificate).predicate.signers)
    assert not any("simulat" in check.detail for check in result.checks)
    printed = call("verify", str(certificate), "--files", str(attested.run))
    assert printed.returncode == 0
    assert "a federation" in printed.stdout


def test_what_is_certified_is_what_the_sites_ledgers_say(attested: Attested, certificate: Path) -> None:
    predicate = statement_of(certificate).predicate
    assert [owner.owner for owner in predicate.owners] == sorted(NAMES)
    for owner in predicate.owners:
        with Ledger.open(attested.federation.site(owner.owner) / "ledger.sqlite", create=False) as ledger:
            assert owner.ledger_head == ledger.head().hash
            assert owner.epsilon == pytest.approx(
                ledger.epsilon_of(ledger.blocks(), "record", 1e-5), rel=1e-3
            )
    assert predicate.statements[0].epsilon == max(owner.epsilon for owner in predicate.owners)


def test_a_site_that_is_left_out_or_forged_is_named(attested: Attested, tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"
    missing = attested.certify(out, "north", "south", "west")
    assert missing.returncode == 3
    assert "east: has not attested" in missing.stderr
    twice = attested.certify(out, *NAMES, "east")
    assert "east: attests twice" in twice.stderr
    words, forged = attested.words["east"].read_bytes(), tmp_path / "east.json"
    for place in range(5, len(words), len(words) // 8):
        forged.write_bytes(words[:place] + bytes([words[place] ^ 1]) + words[place + 1 :])
        assert attested.certify(out, "north", "south", "west", also=forged).returncode == 3, place
    assert not out.exists()


def test_an_attestation_below_the_receipt_is_refused(attested: Attested, tmp_path: Path) -> None:
    """A site puts a ledger of one cheap charge in the place of its own, and attests what that one holds."""
    site = SiteFolder(place=attested.federation.site("east"))
    run_id = read_run(attested.run).run_id
    with Ledger.open(site.place / "ledger.sqlite", create=False) as ledger:
        entry = next(entry for entry in ledger.entries() if entry.kind == "reserve")
    assert entry.event is not None
    with Ledger.open(tmp_path / "older.sqlite") as older:
        older.grant("record", 8.0, 1e-5)
        ((block,),) = older.blocks_for([name_records(RecordKey.public().contents([b"a row"]))])
        charge = Charge(
            owner="east",
            dataset="rows",
            event=entry.event,
            run=run_id,
            round=1,
            release="update",
            commitment=b"",
            blocks=(block,),
        )
        older.reserve([charge])
        words = attest(older, "east", run_id, unit="record", delta=1e-5, sign=site.identity().sign)
    (tmp_path / "east.json").write_bytes(words)
    out, there = tmp_path / "out.json", ("north", "south", "west")
    done = attested.certify(out, *there, also=tmp_path / "east.json")
    assert done.returncode == 3
    assert "east: attests an older ledger than its receipt names" in done.stderr


def test_a_site_signs_nothing_else(attested: Attested, certificate: Path, tmp_path: Path) -> None:
    north = tmp_path / "north"
    shutil.copytree(attested.federation.site("north"), north)
    shutil.rmtree(north / "allowed")
    (north / "allowed").mkdir(mode=0o700)
    refused = call("site", "sign", str(north), str(certificate))
    assert refused.returncode == 3
    assert "a run that this site never began" in refused.stderr
    other = notes_run(privacy={**RECORD, "epsilon": 4.0}, protection=MASKS)
    (tmp_path / "other.toml").write_text(run_file.dump(other))
    never = call("site", "attest", str(attested.federation.site("north")), str(tmp_path / "other.toml"))
    assert "no run of this file was ever begun here" in never.stderr


def test_a_coordinators_run_has_no_simulated_owners(attested: Attested, tmp_path: Path) -> None:
    done = call("certify", str(attested.run), "--out", str(tmp_path / "x.json"))
    assert done.returncode == 3
    assert "has not attested" in done.stderr
    keys = tmp_path / "keys.txt"
    keys.write_text(
        "".join(f"{member.name} {key_words(member.key)}\n" for member in attested.federation.members)
    )
    with_keys = attested.certify(tmp_path / "x.json", owners=str(keys))
    assert with_keys.returncode == 2
    assert "stand on its roster" in with_keys.stderr
