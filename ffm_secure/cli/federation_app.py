"""The commands of a federation of machines: the operator's, a site's, the coordinator's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

operator_app = typer.Typer(no_args_is_help=True, help="Say who is in a federation; kept offline.")
roster_app = typer.Typer(no_args_is_help=True, help="The list of who is in the federation.")
site_app = typer.Typer(no_args_is_help=True, help="Take part with your own rows, under your own rules.")
coordinator_app = typer.Typer(no_args_is_help=True, help="Propose runs to sites that decide for themselves.")
operator_app.add_typer(roster_app, name="roster")

Folder = Annotated[Path, typer.Argument(help="Your own folder.", show_default=False)]
RunFile = Annotated[Path, typer.Argument(help="Run file (TOML).", show_default=False)]
Engine = Annotated[str, typer.Option(help="What carries bytes between machines.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


def _operator() -> ModuleType:
    return importlib.import_module("ffm_secure.cli.operator_commands")


def _site() -> ModuleType:
    return importlib.import_module("ffm_secure.cli.site_commands")


def _site_evidence() -> ModuleType:
    return importlib.import_module("ffm_secure.cli.site_evidence")


def _coordinator() -> ModuleType:
    return importlib.import_module("ffm_secure.cli.coordinator_commands")


@operator_app.command(name="init")
def operator_init(
    folder: Folder, federation: Annotated[str, typer.Option(help="Name of the federation.")]
) -> None:
    """Make the operator's key; print what everybody needs to know of it."""
    _operator().init(folder, federation)


@roster_app.command(name="add")
def roster_add(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Name of a site, or: coordinator.", show_default=False)],
    key: Annotated[str, typer.Argument(help="Its key, ed25519:...", show_default=False)],
) -> None:
    """Put a site or the coordinator on the list, by the line it sent you."""
    _operator().add(folder, name, key)


@roster_app.command(name="revoke")
def roster_revoke(
    folder: Folder, name: Annotated[str, typer.Argument(help="Name of a site.", show_default=False)]
) -> None:
    """Take a site off the list."""
    _operator().revoke(folder, name)


@roster_app.command(name="sign")
def roster_sign(
    folder: Folder, days: Annotated[float, typer.Option(help="How long the roster is good for.")] = 90.0
) -> None:
    """Sign the list; hand the roster to everybody on it."""
    _operator().sign(folder, days)


@operator_app.command(name="approve")
def operator_approve(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="tls-request.json of a participant.", show_default=False)],
) -> None:
    """Sign the certificates a participant asked for; hand the file back to it."""
    _operator().approve(folder, request)


@site_app.command(name="init")
def site_init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of this site.")],
    data: Annotated[str, typer.Option(help="This site's own rows.")],
    operator: Annotated[str, typer.Option(help="The operator's key, ed25519:...")],
    epsilon: Annotated[float, typer.Option(help="What every row may spend in its whole life.")],
    delta: Annotated[float, typer.Option(help="Delta of that budget.")] = 1e-5,
    public: Annotated[str, typer.Option(help="Public rows, from the coordinator.")] = "",
) -> None:
    """Make a site's key and folder; print the line for the operator."""
    _site().init(folder, name=name, data=data, operator=operator, epsilon=epsilon, delta=delta, public=public)


@site_app.command(name="enrol")
def site_enrol(
    folder: Folder,
    approval: Annotated[Path, typer.Argument(help="What the operator sent back.", show_default=False)],
) -> None:
    """Keep the certificate that the operator signed."""
    _site().enrol(folder, approval)


@site_app.command(name="rotate-key")
def site_rotate_key(folder: Folder) -> None:
    """Give the site a new key, and its memories to the new key; print the line for the operator."""
    _site().rotate_key(folder)


@site_app.command(name="check")
def site_check(
    folder: Folder,
    run: Annotated[Path | None, typer.Argument(help="A run file to look at, too.")] = None,
) -> None:
    """Look at everything a site needs, offline; nothing is charged."""
    _site().check(folder, run)


@site_app.command(name="allow")
def site_allow(folder: Folder, run: RunFile) -> None:
    """Allow a run whose file you have read: once."""
    _site().allow(folder, run)


@site_app.command(name="start")
def site_start(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Your own folder; of a simulation, those of several sites.",
            show_default=False,
        ),
    ],
    engine: Engine = "nvflare",
    relay: Annotated[
        bool, typer.Option(help="Run the engine's relay, too; without: another container does.")
    ] = True,
) -> None:
    """Serve a site until it is stopped; several in one process, behind the relay of the first."""
    _site().start(folders, engine, relay=relay)


@site_app.command(name="status")
def site_status(folder: Folder, json: Json = False) -> None:
    """Say what the site is doing, what it has spent, and what it has allowed."""
    _site().status(folder, json=json)


@site_app.command(name="attest")
def site_attest(
    folder: Folder,
    run: RunFile,
    out: Annotated[Path | None, typer.Option(help="File to write; by default in FOLDER.")] = None,
    json: Json = False,
) -> None:
    """Sign what this site's ledger holds of a run, for its certificate. Needs no network."""
    _site_evidence().attest(folder, run, out=out, json=json)


@site_app.command(name="sign")
def site_sign(
    folder: Folder,
    certificate: Annotated[Path, typer.Argument(help="Certificate file.", show_default=False)],
    json: Json = False,
) -> None:
    """Sign a certificate if it says what this site's ledger, run file and roster say. Needs no network."""
    _site_evidence().sign(folder, certificate, json=json)


@site_app.command(name="log")
def site_log(
    folder: Folder, lines: Annotated[int, typer.Option(help="How many of the newest lines.")] = 30
) -> None:
    """Print the newest lines of the site's own log: what it refused, and why."""
    _site().log(folder, lines)


@site_app.command(name="audit")
def site_audit(
    folder: Folder,
    run: Annotated[str, typer.Option(help="Name of a recorded run, where there are several.")] = "",
    budget: Annotated[str, typer.Option(help="quick, standard or exhaustive.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="A new folder for the report.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack what left the site in recorded rounds; everything stays in its folder."""
    module = importlib.import_module("ffm_secure.cli.site_audit")
    module.audit(folder, run=run, budget=budget, out=out, json=json, quiet=quiet)


@coordinator_app.command(name="init")
def coordinator_init(
    folder: Folder,
    operator: Annotated[str, typer.Option(help="The operator's key, ed25519:...")],
    host: Annotated[str, typer.Option(help="Name under which sites reach this machine.")] = "localhost",
    port: Annotated[int, typer.Option(help="The one port that is published.")] = 8002,
) -> None:
    """Make a coordinator's key and folder; print the line for the operator."""
    _coordinator().init(folder, operator=operator, host=host, port=port)


@coordinator_app.command(name="enrol")
def coordinator_enrol(
    folder: Folder,
    approval: Annotated[Path, typer.Argument(help="What the operator sent back.", show_default=False)],
) -> None:
    """Keep the certificates that the operator signed."""
    _coordinator().enrol(folder, approval)


@coordinator_app.command(name="rotate-key")
def coordinator_rotate_key(folder: Folder) -> None:
    """Give the coordinator a new key; print the line for the operator."""
    _coordinator().rotate_key(folder)


@coordinator_app.command(name="start")
def coordinator_start(
    folder: Folder,
    run: RunFile,
    engine: Engine = "nvflare",
    worker: Annotated[
        list[str] | None,
        typer.Option(help="Sites that one process serves, north,south: in its order; may repeat."),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Show rounds in csv, tensorboard, mlflow or wandb too, on this disk; may repeat."),
    ] = None,
    track_to: Annotated[
        Path | None, typer.Option(help="Folder of the trackers; without it, tracking/ beside the report.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a run file among the sites, or go on with one that was stopped."""
    commands = _coordinator()
    shown = commands.Shown(track=tuple(track or ()), track_to=track_to, json=json, quiet=quiet)
    commands.start(folder, run, engine, shown, workers=tuple(worker or ()))


@coordinator_app.command(name="status")
def coordinator_status(folder: Folder, json: Json = False) -> None:
    """Say which stage is open, who is waited for, and how long."""
    _coordinator().status(folder, json=json)
