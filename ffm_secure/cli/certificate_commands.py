"""Make, sign and verify certificates: what a command is given, and how what comes out is said."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from defenses.secagg import Identity
from ffm_secure.certificate.envelope import read_file
from ffm_secure.certificate.files import has_certified_files
from ffm_secure.certificate.known_keys import read_known_keys
from ffm_secure.certificate.verify import Materials, Verification, verify as check_certificate
from ffm_secure.display.console import clear_errors, say
from ffm_secure.errors import ConfigError, FfmError, PlanRefused, RecordError, StoreError
from ffm_secure.foreign import LazyName, LibraryObject
from ffm_secure.record_codec import to_plain
from ffm_secure.storage.durable import write_atomic
from ffm_secure.storage.key_file import read_key_file
from ffm_secure.transport.roster import read_key

FILE = "certificate.json"


def certify(
    folder: Path,
    *,
    out: Path | None,
    identity: Path | None,
    owners: Path | None,
    attested: Sequence[Path],
    json: bool,
) -> None:
    """Write the certificate of a finished run."""
    place = out or folder / FILE
    making, operator = _making(), read_key_file(identity) if identity is not None else None
    with clear_errors():
        if making.is_federation(folder):
            certified = _of_coordinator(folder, operator, owners, attested)
        elif attested:
            raise ConfigError("certify", ["--attested: for a coordinator's run; this one has no receipts"])
        else:
            keys = {name: key for key, name in read_known_keys(owners).items()} if owners is not None else {}
            certified = making.certify(folder, operator=operator, owners=keys)
    write_atomic(place, certified.content)
    lines = [f"{place}: written"]
    if certified.waiting:
        lines.append(f"to be signed by {', '.join(certified.waiting)}: {_how_to_sign(certified.kind, place)}")
    else:
        lines.append(
            "owners' keys are simulated: this certificate shows what one looks like, and binds nobody"
        )
    answer = {"certificate": str(place), "waiting": list(certified.waiting), "kind": certified.kind}
    say(answer, lines, json=json)


def _how_to_sign(kind: str, place: Path) -> str:
    if kind == "federation":
        return (
            f"ffm-secure site sign FOLDER {place.name}; the operator: ffm-secure sign {place.name} --identity"
        )
    return f"ffm-secure sign {place} --identity KEY"


def _of_coordinator(
    folder: Path, operator: Identity | None, owners: Path | None, attested: Sequence[Path]
) -> LibraryObject:
    """Certify a coordinator's run, with operator and roster as its folder has them."""
    module = importlib.import_module("ffm_secure.engines.coordinator_folder")
    if owners is not None:
        raise ConfigError("certify", ["--owners: the keys of a coordinator's run stand on its roster"])
    quarters = module.Headquarters(place=folder.resolve().parent.parent)
    file = quarters.read()
    return _making().certify_federation(
        folder,
        attestations=[read_file(path) for path in attested],
        roster=quarters.roster(file, now=0.0),  # of the run; it may have expired since
        operator_key=read_key(file.operator),
        operator=operator,
    )


def sign(certificate: Path, *, identity: Path, ledger: Path | None, json: bool) -> None:
    """Add one party's signature to a certificate."""
    making, key = _making(), read_key_file(identity)
    with clear_errors():
        content, name = making.countersign(read_file(certificate), key, ledger=ledger)
    write_atomic(certificate, content)
    lines = [f"{certificate}: signed by {name}"]
    if ledger is None and name != "operator":
        lines.append("its own ledger was not compared; with --ledger it is")
    say({"certificate": str(certificate), "signed_by": name}, lines, json=json)


def verify(certificate: Path, materials: Materials, *, json: bool) -> None:
    """Check a certificate and say every check; what does not hold ends the command with exit code 1.

    Raises:
      FfmError: something does not hold.
    """
    try:
        result = check_certificate(read_file(certificate), materials)
    except RecordError as error:
        raise PlanRefused([f"{certificate}: {error}"]) from None
    answer = {"holds": result.holds, **_plain(result)}
    say(answer, _lines(result), json=json)
    if not result.holds:
        broken = [check for check in result.checks if not check.holds]
        raise FfmError(f"{certificate}: does not hold: {broken[0].claim}: {broken[0].detail}")


def evidence(folder: Path, *, out: Path | None, certificate: Path | None, json: bool) -> None:
    """Write the evidence folder of a certified run."""
    run, source = folder.resolve(), certificate or folder / FILE
    place = out or run.with_name(f"{run.name}-evidence")
    if not source.is_file():
        raise StoreError(f"{source}: is not there; first: ffm-secure certify {folder}")
    module = importlib.import_module("ffm_secure.certificate.evidence")
    with clear_errors():
        written = module.write_evidence(run, read_file(source), place)
    files = [str(path.relative_to(place)) for path in written]
    say({"folder": str(place), "files": files}, [f"{place}: {len(files)} files", *files], json=json)


def materials_for(
    certificate: Path,
    *,
    files: Path | None,
    model: Path | None,
    ledger: Path | None,
    owner: str,
    trust: Path | None,
    cross_check: bool,
) -> Materials:
    """Collect what a verifier has; files lie beside the certificate where nothing else is said.

    Raises:
      ConfigError: a named folder or file is not there.
    """
    problems = []
    for name, path in (("--files", files), ("--model", model), ("--ledger", ledger), ("--trust", trust)):
        if path is not None and not path.exists():
            problems.append(f"{name} = {path}: is not there")
    if owner and ledger is None:
        problems.append(f"--owner = {owner!r}: says whose ledger it is; give the ledger, too (--ledger)")
    if problems:
        raise ConfigError("verify", problems)
    beside = certificate.parent if has_certified_files(certificate.parent) else None
    folder = files if files is not None or model is not None else beside
    known = read_known_keys(trust) if trust is not None else {}
    return Materials(
        folder=folder, model=model, ledger=ledger, owner=owner, trust=known, cross_check=cross_check
    )


def _making() -> LazyName:
    """Load what reads runs only where a run or a ledger is read: a verifier needs no model library."""
    return importlib.import_module("ffm_secure.certificate.make")


def _plain(result: Verification) -> dict[str, object]:
    plain = to_plain(result)
    assert isinstance(plain, dict)
    return dict(plain)


def _lines(result: Verification) -> list[str]:
    kind = "a simulation: one machine held every party" if result.kind == "simulation" else "a federation"
    width = max(len(check.claim) for check in result.checks)
    lines = [f"certificate of {result.run}, {kind}, of {result.certified}"]
    for check in result.checks:
        mark = "holds " if check.holds else "BROKEN"
        lines.append(f"  {mark}  {check.claim.ljust(width)}  {check.detail}")
    lines += [f"  not checked  {text}" for text in result.not_given]
    lines += [f"  note         {text}" for text in result.notes]
    lines.append("everything that was checked holds" if result.holds else "NOT VERIFIED")
    return lines
