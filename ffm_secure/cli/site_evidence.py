"""What a site's people do for a certificate: attest what their ledger holds, and sign what agrees with it."""

from __future__ import annotations

from pathlib import Path

from defenses.dp import Ledger
from ffm_secure.certificate.attested import attest as attest_run
from ffm_secure.certificate.collect import shaping
from ffm_secure.certificate.contents import WITHOUT_UNIT, read_run_file
from ffm_secure.certificate.envelope import Envelope, read_file
from ffm_secure.certificate.make import countersign
from ffm_secure.certificate.statement import Statement
from ffm_secure.config import run_file
from ffm_secure.config.federated import run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.display.console import clear_errors, say
from ffm_secure.errors import ConfigError, PlanRefused, StoreError
from ffm_secure.site.folder import ROSTER, SiteFolder
from ffm_secure.site.site_file import SiteFile
from ffm_secure.storage.durable import write_atomic
from ffm_secure.transport.roster import key_words, read_roster


def attest(folder: Path, run: Path, *, out: Path | None, json: bool) -> None:
    """Write what this site's ledger holds of a run it has allowed."""
    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file, config = place.read(), run_file.load(run)
        number = place.run_of(run_digest(config))
        if number is None:
            raise StoreError(f"{run}: no run of this file was ever begun here")
        privacy = config.privacy
        delta = WITHOUT_UNIT if privacy.unit == "none" else privacy.delta
        with Ledger.open(place.ledger_path(file), create=False) as ledger:
            content = attest_run(
                ledger,
                file.name,
                number.hex(),
                unit=privacy.unit,
                delta=delta,
                sign=place.identity().sign,
            )
    target = out or folder / f"{config.name}.attested.json"
    write_atomic(target, content)
    lines = [
        f"{target}: signed by {file.name}",
        "it tells what the rows of this run have spent in every run so far; hand it to the coordinator",
    ]
    say({"attestation": str(target), "site": file.name}, lines, json=json)


def sign(folder: Path, certificate: Path, *, json: bool) -> None:
    """Sign a certificate that agrees with everything this site has."""
    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file = place.read()
        content = read_file(certificate)
        statement = Statement.from_bytes(Envelope.from_bytes(content).payload)
        problems = _problems(place, file, statement)
        if problems:
            raise PlanRefused(problems)
        signed, name = countersign(content, place.identity(), ledger=place.ledger_path(file))
        if name != file.name:
            raise ConfigError("site sign", [f"this site's key stands under {name}, not {file.name}"])
    write_atomic(certificate, signed)
    lines = [f"{certificate}: signed by {name}, over row {_entries(statement, name):,} of its own ledger"]
    say({"certificate": str(certificate), "signed_by": name}, lines, json=json)


def _entries(statement: Statement, name: str) -> int:
    return next(owner.ledger_entries for owner in statement.predicate.owners if owner.owner == name)


def _problems(place: SiteFolder, file: SiteFile, statement: Statement) -> list[str]:
    """Hold a certificate to the run this site allowed, its roster, and its operator."""
    predicate, problems = statement.predicate, []
    if statement.kind != "federation":
        problems.append("it is of a simulation, and this site is a machine of its own")
    config = _begun(place, predicate.run_id)
    stated = read_run_file(predicate)
    if config is None or stated is None:
        problems.append("it is of a run that this site never began")
    elif shaping(config) != shaping(stated):
        problems.append("its run file is not the one that a person here allowed")
    roster = read_roster(place.place / ROSTER, operator=file.operator, now=0.0)
    known = dict(zip(roster.names, map(key_words, roster.keys), strict=True))
    for signer in predicate.signers:
        expected = file.operator if signer.role == "operator" else known.get(signer.name, "")
        if signer.public_key != expected:
            problems.append(f"{signer.name}: its key is not the one that the operator told this site")
    return problems


def _begun(place: SiteFolder, run_id: str) -> RunConfig | None:
    for digest, path in place.allowed().items():
        number = place.run_of(digest)
        if number is not None and number.hex() == run_id:
            return place.load_allowed(path)
    return None
