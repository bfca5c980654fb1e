"""The commands on certificates and their options; each body hands over to a function."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from ffm_secure.foreign import LazyName

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Certificate = Annotated[Path, typer.Argument(help="Certificate file.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add certify, sign, verify and evidence to the command line."""
    app.command()(certify)
    app.command()(sign)
    app.command()(verify)
    app.command()(evidence)


def _commands() -> LazyName:
    return importlib.import_module("ffm_secure.cli.certificate_commands")


def certify(
    folder: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="File to write; RUN/certificate.json if not said.")] = None,
    identity: Annotated[Path | None, typer.Option(help="Key of the operator, who signs.")] = None,
    owners: Annotated[
        Path | None,
        typer.Option(help="Public keys of the owners, one a line: name and hexadecimal key."),
    ] = None,
    attested: Annotated[
        list[Path] | None,
        typer.Option(help="What a site attests, of a coordinator's run; once for every site."),
    ] = None,
    json: Json = False,
) -> None:
    """Bind a run's model, statements, events and audit into a file that others can verify."""
    _commands().certify(folder, out=out, identity=identity, owners=owners, attested=attested or [], json=json)


def sign(
    certificate: Certificate,
    identity: Annotated[Path, typer.Option(help="Key of the party that signs.")],
    ledger: Annotated[Path | None, typer.Option(help="The owner's own ledger, compared first.")] = None,
    json: Json = False,
) -> None:
    """Sign a certificate as one of the parties it names. Needs no network."""
    _commands().sign(certificate, identity=identity, ledger=ledger, json=json)


def verify(
    certificate: Certificate,
    files: Annotated[Path | None, typer.Option(help="Folder with the certified files.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the exported model alone.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="A ledger to compare.")] = None,
    owner: Annotated[str, typer.Option(help="Whose ledger it is, where it is one owner's.")] = "",
    trust: Annotated[
        Path | None, typer.Option(help="Keys you know from elsewhere, one a line: name and key.")
    ] = None,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Compute epsilon with dp-accounting, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Check a certificate: signatures, files, ledger, and every epsilon computed anew. Needs no network."""
    commands = _commands()
    materials = commands.materials_for(
        certificate,
        files=files,
        model=model,
        ledger=ledger,
        owner=owner,
        trust=trust,
        cross_check=cross_check,
    )
    commands.verify(certificate, materials, json=json)


def evidence(
    folder: Annotated[Path, typer.Argument(help="Run directory, certified before.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="New folder; RUN-evidence if not said.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="RUN/certificate.json if not said.")] = None,
    json: Json = False,
) -> None:
    """Write a folder for a data-protection officer: certificate, report, model, ledger, mapping of duties."""
    _commands().evidence(folder, out=out, certificate=certificate, json=json)
