"""The command line: every command and its options; each body hands over to a function."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from ffm_secure.cli import calculator, certificate_app, federation_app
from ffm_secure.display.printable import printable
from ffm_secure.config import compatibility, locate, run_file
from ffm_secure.errors import FfmError, StoreError
from ffm_secure.foreign import LazyName

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapt foundation models together, and prove what the result reveals.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ffm-secure {importlib.metadata.version('ffm-secure')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt foundation models together, and prove what the result reveals."""


RunFile = Annotated[Path, typer.Argument(help="Run file (TOML).", show_default=False)]


def _is_run(folder: Path | None) -> Path | None:
    """Say that a folder is none of a run before anything heavy is imported."""
    if folder is not None and not (folder / "run.toml").is_file():
        raise StoreError(f"{folder}: is not a run directory (no run.toml)")
    return folder


RunFolder = Annotated[
    Path,
    typer.Argument(help="Run directory, for instance runs/demo.", show_default=False, callback=_is_run),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value; checked like the file."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds run directories.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


def _commands() -> LazyName:
    """Load the commands on runs, and with them the model libraries, only when one is called."""
    return importlib.import_module("ffm_secure.cli.commands")


def _checked(file: Path, overrides: tuple[str, ...]) -> LazyName:
    """Check a run file, then load the commands: a typo is said before anything heavy is imported."""
    config = run_file.load(file, overrides)
    compatibility.check(config)
    locate.require_data(config.task, beside=file.resolve().parent)
    return _commands()


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Data: a file or a folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run file to write.")] = Path("run.toml"),
    kind: Annotated[str, typer.Option(help="Task, where the rows do not say it.")] = "",
    text: Annotated[str, typer.Option(help="Column of the text.")] = "",
    label: Annotated[str, typer.Option(help="Column of the label.")] = "",
    owner: Annotated[str, typer.Option(help="Column that names the data owners.")] = "",
    encoding: Annotated[str, typer.Option(help="Encoding of text files that are no UTF-8.")] = "",
) -> None:
    """Look at some data and write a commented run file for it."""
    module = importlib.import_module("ffm_secure.cli.init")
    asked = module.Asked(kind=kind, text=text, label=label, owner=owner, encoding=encoding)
    for line in module.init(data, out, asked):
        typer.echo(printable(line))


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run directories to compare.", show_default=False)
    ] = None,
    under: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs of a folder, or compare some of them and the settings they differ in."""
    importlib.import_module("ffm_secure.cli.runs").runs(tuple(folders or ()), under=under, json=json)


@app.command()
def plan(file: RunFile, set_: Overrides = None, json: Json = False) -> None:
    """Show what a run would send, spend and reveal. Trains nothing."""
    overrides = tuple(set_ or ())
    _checked(file, overrides).plan(file, overrides, json=json)


@app.command()
def run(
    file: RunFile,
    set_: Overrides = None,
    runs: Runs = Path("runs"),
    track: Annotated[
        list[str] | None,
        typer.Option(help="Show rounds in csv, tensorboard, mlflow or wandb too, on this disk; may repeat."),
    ] = None,
    track_to: Annotated[
        Path | None, typer.Option(help="Folder of the trackers; without it, tracking/ in the run directory.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, or continue a stopped run. Writes everything to runs/<name>/."""
    overrides = tuple(set_ or ())
    _checked(file, overrides).run(
        file,
        overrides,
        runs=runs,
        json=json,
        quiet=quiet,
        track=tuple(track or ()),
        track_to=track_to,
    )


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="Grid of run files (TOML).", show_default=False)],
    quick: Annotated[bool, typer.Option(help="Run the small form of the grid.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for runs, results.json and report.html.")] = Path(
        "runs/experiments"
    ),
    jobs: Annotated[
        int, typer.Option(help="Runs at once, each in its own process with its share of the cores.")
    ] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of run files; what is finished is not run again. Writes a table and curves."""
    _commands().experiment(file, out=out, quick=quick, jobs=jobs, json=json, quiet=quiet)


@app.command()
def audit(
    folder: Annotated[
        Path | None, typer.Argument(help="Run directory.", show_default=False, callback=_is_run)
    ] = None,
    observation: Annotated[
        Path | None, typer.Option(help="Audit a stored observation of any system instead of a run.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder the observation belongs to.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder as PEFT writes it, on top of the model.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="What its client trained on (safetensors), to score what attacks find."),
    ] = None,
    unused: Annotated[
        Path | None,
        typer.Option(
            help="Records of the same kind that nobody trained on (safetensors): what guessing goes by."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for what --observation or --members finds; files named internal* must not leave."
        ),
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(help="Records the released --model was trained on: a table or safetensors."),
    ] = None,
    non_members: Annotated[
        Path | None, typer.Option(help="Records of the same kind it was not trained on.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a model trained on none of these records; may repeat."),
    ] = None,
    secrets: Annotated[
        Path | None, typer.Option(help="Secrets that were planted in the training texts (JSON).")
    ] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or exhaustive.")] = "quick",
    fail_on_leak: Annotated[bool, typer.Option(help="Exit with 6 if anything leaked.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack what each observer of a finished run saw, an update of any system, or a released model."""
    released_commands = importlib.import_module("ffm_secure.cli.released_commands")
    files = released_commands.ReleasedFiles(
        run=folder,
        model=model,
        adapter=adapter,
        members=members,
        others=non_members,
        references=tuple(reference or ()),
        secrets=secrets,
        out=out,
    )
    if files.asked:
        named = bool(observation or truth or unused)
        released_commands.audit(files, other=named, fail_on_leak=fail_on_leak, json=json, quiet=quiet)
        return
    commands = _commands()
    observed = commands.Seen(
        observation=observation, model=model, adapter=adapter, truth=truth, unused=unused, out=out
    )
    commands.audit(folder, observed, budget=budget, fail_on_leak=fail_on_leak, json=json, quiet=quiet)


class _ShowsByDefault(TyperGroup):
    """A group whose first word may be a ledger to show instead of a command."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put `show` before anything that is not a command of the group."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["show", *args]
        return super().parse_args(ctx, args)


ledger_app = typer.Typer(cls=_ShowsByDefault, no_args_is_help=True, help="Show, verify and open ledgers.")
budget_app = typer.Typer(no_args_is_help=True, help="Change the lifetime budget of the rows in a ledger.")
app.add_typer(ledger_app, name="ledger")
ledger_app.add_typer(budget_app, name="budget")
LedgerFile = Annotated[Path | None, typer.Argument(help="Ledger file; without one, this user's own.")]
Unit = Annotated[str, typer.Option(help="record, person or client.")]


def _ledger_commands() -> LazyName:
    return importlib.import_module("ffm_secure.cli.ledger_commands")


@ledger_app.command(name="show")
def ledger(
    folder: Annotated[Path, typer.Argument(help="Run directory or ledger file.", show_default=False)],
    owner: Annotated[str, typer.Option(help="Show one data owner only.")] = "",
    export: Annotated[str, typer.Option(help="Print every entry as csv or json.")] = "",
    json: Json = False,
) -> None:
    """Verify a ledger, then print every charge and the epsilon they add up to."""
    _commands().ledger(folder, owner=owner, export=export, json=json)


@ledger_app.command(name="init")
def ledger_init(
    epsilon: Annotated[float, typer.Option(help="What every row may spend in its whole life.")],
    path: LedgerFile = None,
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    unit: Unit = "record",
    json: Json = False,
) -> None:
    """Make a ledger and set the lifetime budget of its rows, once."""
    _ledger_commands().init(path, epsilon=epsilon, delta=delta, unit=unit, json=json)


@ledger_app.command(name="verify")
def ledger_verify(
    path: LedgerFile = None,
    anchor: Annotated[str, typer.Option(help="number:hash kept elsewhere, or a report.json.")] = "",
    json: Json = False,
) -> None:
    """Check every row of a ledger; with an anchor, also that nothing was taken back."""
    _ledger_commands().verify(path, anchor=anchor, json=json)


@ledger_app.command(name="withdraw")
def ledger_withdraw(
    path: Annotated[Path | None, typer.Argument(help="Ledger file or run directory.")] = None,
    owner: Annotated[str, typer.Option(help="An owner, with every row it was ever charged for.")] = "",
    block: Annotated[
        list[int] | None, typer.Option(help="A block of rows, as --export csv numbers it; may repeat.")
    ] = None,
    because: Annotated[str, typer.Option(help="Why; recorded for good.")] = "",
    json: Json = False,
) -> None:
    """Close an owner or rows for every later run, and say what released models may still reveal."""
    blocks = tuple(block or ())
    _ledger_commands().withdraw(path, owner=owner, blocks=blocks, because=because, json=json)


@budget_app.command(name="raise")
def ledger_budget_raise(
    epsilon: Annotated[float, typer.Option(help="The new lifetime budget.")],
    because: Annotated[str, typer.Option(help="Why; recorded for good.")] = "",
    path: LedgerFile = None,
    unit: Unit = "record",
    json: Json = False,
) -> None:
    """Set the lifetime budget of a ledger's rows anew."""
    _ledger_commands().raise_budget(path, epsilon=epsilon, because=because, unit=unit, json=json)


app.add_typer(federation_app.operator_app, name="operator")
app.add_typer(federation_app.site_app, name="site")
app.add_typer(federation_app.coordinator_app, name="coordinator")


@app.command()
def report(
    folder: RunFolder,
    internal: Annotated[
        bool,
        typer.Option(
            "--internal/--public",
            help="--public: what may leave. --internal: also figures of private rows and what was recovered.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Write the report of a run anew: report.html, details.html and report.json, no network."""
    _commands().report(folder, internal=internal, json=json)


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text to answer; may repeat. The two texts of a pair: a tab between."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Texts (.txt: one a line; .csv, .jsonl, .parquet: the run's "
            "columns), a picture, a folder of them."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Answer texts or pictures with the model of a finished run, one a line."""
    importlib.import_module("ffm_secure.cli.predict").predict(
        folder, texts=tuple(text or ()), file=file, json=json
    )


@app.command()
def generate(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="An empty or new folder for data.jsonl and croissant.json.")],
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Texts in all, dealt evenly to labels.")],
    labels: Annotated[
        str, typer.Option(help="Labels, with commas between: the prompts the model learned texts behind.")
    ] = "",
    longest: Annotated[int, typer.Option(min=1, max=100_000, help="Most tokens of a text.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.01, max=10.0, help="Below 1 texts are likelier and more alike.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same texts.")] = 0,
    json: Json = False,
) -> None:
    """Draw a data set from the language model of a finished run, described with what it cost."""
    importlib.import_module("ffm_secure.cli.generate").generate(
        folder,
        out,
        labels=labels,
        count=count,
        longest=longest,
        temperature=temperature,
        seed=seed,
        json=json,
    )


@app.command()
def publish(
    folder: RunFolder,
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the hub you are logged in to.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
    json: Json = False,
) -> None:
    """Push the exported model of a finished run to a model hub."""
    importlib.import_module("ffm_secure.cli.publish").publish(
        folder, repo=repo, public=public, dry_run=dry_run, json=json
    )


certificate_app.add_to(app)


@app.command()
def doctor(json: Json = False) -> None:
    """Check this machine: versions, accelerator, random source, TenSEAL, browser."""
    _commands().doctor(json=json)


@app.command()
def epsilon(
    q: Annotated[float | None, typer.Option(help="Poisson sampling rate.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise multiplier.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.")] = None,
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    segment: Annotated[
        list[str] | None,
        typer.Option(metavar="Q,SIGMA,STEPS", help="One more part of the history; may repeat."),
    ] = None,
    best_of: Annotated[
        str,
        typer.Option(
            metavar="LAW:NUMBER",
            help="Only the best of a random number of such runs is released: "
            "poisson:MEAN or geometric:STOPPING.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Compute the epsilon of a history of Poisson-sampled Gaussian steps."""
    segments = tuple(segment or ())
    calculator.epsilon(q, sigma, steps, delta=delta, segments=segments, best_of=best_of, json=json)


@app.command(name="sigma")
def sigma_command(
    epsilon: Annotated[float, typer.Option(help="Target epsilon.")],
    q: Annotated[float, typer.Option(help="Poisson sampling rate.")],
    steps: Annotated[int, typer.Option(help="Steps.")],
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    segment: Annotated[
        list[str] | None, typer.Option(metavar="Q,SIGMA,STEPS", help="Already spent; may repeat.")
    ] = None,
    json: Json = False,
) -> None:
    """Compute the smallest noise multiplier that keeps a target epsilon."""
    calculator.sigma(epsilon, q, steps, delta=delta, segments=tuple(segment or ()), json=json)


def main() -> None:
    """Run the command line; every expected failure is one clear message and a meaningful exit code."""
    rights = os.umask(0o077)  # whatever a library writes for us, its owner alone may read it
    try:
        app()
    except FfmError as error:
        typer.echo(printable(f"error: {error}"), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        typer.echo(_unexpected(error), err=True)
        sys.exit(1)
    finally:
        os.umask(rights)


def _unexpected(error: Exception) -> str:
    """Say where an unforeseen error arose; its message may be private and is not shown."""
    frames = traceback.extract_tb(error.__traceback__)
    places = []
    for frame in frames:
        places.append(f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}")
    advice = "its message may hold private data and is not shown; `python -X dev -m ffm_secure ...` shows it"
    return printable("\n".join([f"error: unexpected {type(error).__name__}; {advice}", *places]))
