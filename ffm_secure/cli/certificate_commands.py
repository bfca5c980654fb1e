"""Make, sign and verify certificates: what a command is given, and how what comes out is said."""

from __future__ import annotations

import importlib
from pathlib import Path

from ffm_secure.certificate.known_keys import read_known_keys
from ffm_secure.certificate.verify import Materials, Verification, verify as check_certificate
from ffm_secure.display.console import say
from ffm_secure.errors import ConfigError, FfmError, PlanRefused, RecordError, StoreError
from ffm_secure.foreign import LazyName
from ffm_secure.record_codec import to_plain
from ffm_secure.storage.durable import write_atomic
from ffm_secure.storage.key_file import read_key_file

FILE = "certificate.json"


def certify(
    folder: Path, *, out: Path | None, identity: Path | None, owners: Path | None, json: bool
) -> None:
    """Write the certificate of a finished run."""
    place = out or folder / FILE
    operator = read_key_file(identity) if identity is not None else None
    keys = {name: key for key, name in read_known_keys(owners).items()} if owners is not None else {}
    certified = _making().certify(folder, operator=operator, owners=keys)
    write_atomic(place, certified.content)
    lines = [f"{place}: written"]
    if certified.waiting:
        lines.append(
            f"to be signed by {', '.join(certified.waiting)}: ffm-secure sign {place} --identity KEY"
        )
    else:
        lines.append(
            "owners' keys are simulated: this certificate shows what one looks like, and binds nobody"
        )
    answer = {"certificate": str(place), "waiting": list(certified.waiting), "simulated": not keys}
    say(answer, lines, json=json)


def sign(certificate: Path, *, identity: Path, ledger: Path | None, json: bool) -> None:
    """Add one party's signature to a certificate."""
    content, name = _making().countersign(_read(certificate), read_key_file(identity), ledger=ledger)
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
        result = check_certificate(_read(certificate), materials)
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
    files = [str(path.relative_to(place)) for path in module.write_evidence(folder, source, place)]
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
    if problems:
        raise ConfigError("verify", problems)
    beside = certificate.parent if (certificate.parent / "report.json").is_file() else None
    folder = files if files is not None or model is not None else beside
    known = read_known_keys(trust) if trust is not None else {}
    return Materials(
        folder=folder, model=model, ledger=ledger, owner=owner, trust=known, cross_check=cross_check
    )


def _making() -> LazyName:
    """Load what reads runs only where a run or a ledger is read: a verifier needs no model library."""
    return importlib.import_module("ffm_secure.certificate.make")


def _read(certificate: Path) -> bytes:
    try:
        return certificate.read_bytes()
    except OSError as error:
        raise StoreError(f"{certificate}: cannot be read: {error.strerror}") from None


def _plain(result: Verification) -> dict[str, object]:
    plain = to_plain(result)
    assert isinstance(plain, dict)
    return dict(plain)


def _lines(result: Verification) -> list[str]:
    kind = "a simulation: keys of owners are simulated" if result.kind == "simulation" else "a federation"
    width = max(len(check.claim) for check in result.checks)
    lines = [f"certificate of {result.run}, {kind}"]
    for check in result.checks:
        mark = "holds " if check.holds else "BROKEN"
        lines.append(f"  {mark}  {check.claim.ljust(width)}  {check.detail}")
    lines += [f"  not checked  {text}" for text in result.not_given]
    lines.append("everything that was checked holds" if result.holds else "NOT VERIFIED")
    return lines
