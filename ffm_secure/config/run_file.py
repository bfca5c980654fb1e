"""The run file: TOML in, frozen dataclasses out, every problem reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ffm_secure.config.lifecycle_checks import check_lifecycle, check_tables
from ffm_secure.config.models import Distillation, Model, OwnModel, TrainableSpec
from ffm_secure.config.schema import Problems, dump_toml, option, parse_toml, read_table, set_value
from ffm_secure.config.tables import Compression, Document, Evaluation, Personal, Speed, Stream, Votes
from ffm_secure.errors import ConfigError
from ffm_secure.records import Observer
from ffm_secure.registry import FINISHES, LIFECYCLES, STARTS, STRATEGIES, TASKS

ClippingKind = Literal["flat", "per_layer", "automatic"]
MaskingMode = Literal["semi_honest", "active"]
OBSERVERS: tuple[Observer, ...] = ("public", "client", "server", "colluding_server")
_PUBLIC_ROWS = LIFECYCLES.with_trait("public_rows")


ENCODINGS = (
    *("", "utf-8", "mixed", "cp1252", "iso-8859-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"),
    *("cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "iso-8859-2", "iso-8859-15", "koi8-r"),
    *("mac-roman", "cp850", "shift_jis", "cp932", "euc-jp", "gb18030", "big5", "euc-kr"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the training examples are dealt to the clients."""

    kind: str = option("iid", choices=("iid", "dirichlet", "quantity", "shards", "natural", "feature_shift"))
    alpha: float = option(
        0.5,
        above=0.0,
        maximum=1e6,
        help="concentration of dirichlet and quantity; smaller is more uneven",
        only_for=("dirichlet", "quantity"),
    )
    column: str = option("", help="column of a natural split, for instance hospital", only_for=("natural",))
    shards_per_client: int = option(2, minimum=1, maximum=1000, only_for=("shards",))
    transform: str = option(
        "noise",
        choices=("noise", "rotation", "brightness", "token_dropout"),
        help="what the last client's features have gone through in full, the first one's not at all",
        only_for=("feature_shift",),
    )
    strength: float = option(
        32.0,
        minimum=0.0,
        maximum=360.0,
        help="grey levels of 255, degrees, a factor of brightness, or the share of words left out",
        only_for=("feature_shift",),
    )
    min_size: int = option(1, minimum=0, help="fewest examples a client may get")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned, from which data, by how many clients."""

    kind: str = option(choices=TASKS)
    data: str = option(help="folder or file, Hugging Face name, or builtin:<name>")
    clients: int = option(minimum=1, maximum=100_000)
    split: Split = option(Split())
    stream: Stream = option(Stream())
    text_column: str = option("")
    label_column: str = option("")
    image_column: str = option("", help="column of pictures, or of their file names")
    encoding: str = option(
        "",
        choices=ENCODINGS,
        help="of text files; empty: UTF-8, or what a byte order mark says; "
        "mixed: UTF-8 or cp1252, line by line",
    )
    class_names: tuple[str, ...] = option(
        (), help="the classes in order, declared public; empty: numbers, or names that public rows carry"
    )
    class_text: str = option(
        "a photo of a {}.",
        help="the text of a class for models that score pictures against texts; {} is its name",
    )
    clean: tuple[str, ...] = option(
        (),
        choices=("blank_rows", "repeated_rows", "label_spelling"),
        help=(
            "leave out blank rows or repeats; "
            "match labels to class_names whatever their case and outer blanks"
        ),
    )
    loss_on: str = option(
        "answer",
        choices=("answer", "all"),
        help="what a causal model learns of a prompt with its answer, or of a chat",
    )
    max_length: int = option(64, minimum=4, maximum=8192, help="tokens kept of a text")
    validation: str = option(
        "",
        choices=("", "hold_out"),
        help="hold_out: a tenth of the rows becomes public where the data have no public "
        "part; which ones, the rows decide",
    )
    nominal_examples: int = option(0, minimum=0, help="public size of one client's data; 0: rows / clients")
    evaluation_examples: int = option(1000, minimum=1, help="public validation rows used after each round")


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """Which source a round of pre-training learns from: public data, or clients' private data."""

    kind: str = option("fixed", choices=("fixed", "plateau", "gain_per_cost"))
    public: int = option(1, minimum=0, maximum=10_000, help="public phases in a row", only_for=("fixed",))
    private: int = option(1, minimum=0, maximum=10_000, help="private phases in a row", only_for=("fixed",))
    patience: int = option(2, minimum=1, maximum=1000, help="fewest phases in a row", only_for=("plateau",))
    margin: float = option(
        0.01,
        minimum=0.0,
        below=1.0,
        help="relative fall of the loss that counts as progress",
        only_for=("plateau",),
    )
    cost: str = option(
        "bytes", choices=("epsilon", "bytes", "seconds", "phases"), only_for=("gain_per_cost",)
    )
    window: int = option(
        2, minimum=1, maximum=1000, help="phases a gain is taken over", only_for=("gain_per_cost",)
    )
    retry: int = option(
        4,
        minimum=1,
        maximum=1000,
        help="phases after which the other source is tried again",
        only_for=("gain_per_cost",),
    )
    least_gain: float = option(
        0.01,
        minimum=0.0,
        below=1.0,
        help="relative fall of the loss below which a phase that costs nothing counts as no gain",
        only_for=("gain_per_cost",),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """How a client learns at home, and in pre-training the server from public data."""

    kind: str = option(choices=LIFECYCLES)
    local_steps: int = option(0, minimum=0, maximum=1_000_000, help="steps a round; or give local_epochs")
    local_epochs: int = option(0, minimum=0, maximum=10_000)
    batch_size: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="expected size under Poisson sampling; required where steps are taken",
    )
    learning_rate: float = option(0.0, minimum=0.0, maximum=1e3, help="required where steps are taken")
    optimizer: str = option("sgd", choices=("sgd", "adam", "adamw"))
    momentum: float = option(0.0, minimum=0.0, maximum=0.999)
    weight_decay: float = option(0.0, minimum=0.0, maximum=1.0)
    proximal: float = option(0.0, minimum=0.0, help="FedProx mu")
    start: str = option(
        "none", choices=STARTS, help="make the head from these sums first, in one round a cohort"
    )
    start_epsilon: float = option(
        0.0,
        minimum=0.0,
        maximum=1e6,
        help="what the start may cost, of privacy.epsilon; 0: a quarter of it",
    )
    finish: str = option(
        "none", choices=FINISHES, help="correct the head by released counts after the last round"
    )
    finish_epsilon: float = option(
        0.0,
        minimum=0.0,
        maximum=1e6,
        help="what the finish may cost, of privacy.epsilon; 0: an eighth of it",
    )
    public_data: str = option(
        "", help="as task.data; empty: public_examples rows of task.data", only_for=_PUBLIC_ROWS
    )
    public_examples: int = option(
        0, minimum=0, help="rows taken out of the private data and declared public", only_for=_PUBLIC_ROWS
    )
    public_steps: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="steps of a public phase; 0: local_steps",
        only_for=("pretrain",),
    )
    public_batch_size: int = option(
        0, minimum=0, maximum=1_000_000, help="0: batch_size", only_for=("pretrain",)
    )
    public_learning_rate: float = option(
        0.0, minimum=0.0, maximum=1e3, help="0: learning_rate", only_for=("pretrain",)
    )
    private_rounds: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="most private phases, which the noise is calibrated for; 0: every round may be one",
        only_for=("pretrain",),
    )
    controller: Controller = option(Controller(), only_for=("pretrain",))
    votes: Votes = option(Votes(), only_for=("candidate_votes",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a sum becomes the next global model."""

    kind: str = option("average", choices=STRATEGIES)
    learning_rate: float = option(1.0, above=0.0, maximum=1e3)
    momentum: float = option(
        0.9, minimum=0.0, maximum=0.9999, only_for=("avgm", "adam", "yogi", "adam_debiased")
    )
    beta2: float = option(0.99, minimum=0.0, maximum=0.99999, only_for=("adam", "yogi", "adam_debiased"))
    tau: float = option(1e-3, above=0.0, only_for=("adam", "yogi", "adagrad", "adam_debiased"))
    attackers: int = option(
        1,
        minimum=1,
        maximum=100_000,
        help="most clients of a cohort that a rule over groups is to withstand; each may spoil one group",
        only_for=("geometric_median", "coordinate_median", "trimmed_mean", "krum", "multi_krum", "bulyan"),
    )
    root_examples: int = option(
        100,
        minimum=1,
        maximum=1_000_000,
        help="public rows the server learns from itself, to compare groups with; none is evaluated on",
        only_for=("root_trust",),
    )
    average_last: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="rounds at the end whose models are averaged into the last one: less noise for free; 0: none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Simulated losses: the share of a cohort lost in a round, and where."""

    rate: float = option(0.0, minimum=0.0, maximum=1.0)
    stages: tuple[str, ...] = option(
        ("train", "upload"),
        choices=("advertise", "share", "train", "upload", "confirm", "unmask"),
        help="where a client is lost; upload is a straggler, who learned, was charged and came too late",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Who takes part when."""

    rounds: int = option(minimum=0, maximum=1_000_000)
    cohort: int = option(minimum=1, maximum=100_000, help="clients a round")
    lifecycle: Lifecycle
    strategy: Strategy = option(Strategy())
    weighting: str = option(
        "uniform",
        choices=("uniform", "examples", "q_fair"),
        help="q_fair: a client counts by its mean loss to the power of `fairness`; two sums are opened, of "
        "weighted changes and of weights",
    )
    fairness: float = option(1.0, minimum=0.0, maximum=10.0, help="the power; 0 weighs all alike")
    largest_weight: int = option(
        0,
        minimum=0,
        help="most examples a client may count for; 0: 16 times the public size of one client's data",
    )
    dropout: Dropout = option(Dropout())
    evaluate_every: int = option(1, minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """What decides epsilon: this table, and only this one. There is no default."""

    unit: str = option(choices=("record", "person", "client", "none"))
    epsilon: float = option(0.0, minimum=0.0, maximum=1e6, help="the budget of each data owner")
    delta: float = option(0.0, minimum=0.0, below=1.0)
    clip_norm: float = option(0.0, minimum=0.0, maximum=1e9)
    records_per_person: int = option(1, minimum=1, maximum=1024)
    person_column: str = option("", help="column that names the person a row is about; for unit = 'person'")
    over_bound: str = option(
        "refuse",
        choices=("refuse", "sample"),
        help="what is done with rows of a person beyond records_per_person: sample keeps "
        "that many, always the same ones",
    )
    clipping: ClippingKind = option("flat", choices=("flat", "per_layer", "automatic"))
    spare_rounds: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="attempts an owner may lose to aborted or interrupted rounds; the "
        "noise is calibrated for them too",
    )
    ledger: str = option(
        "",
        help="SQLite file of the rows' owner; empty: this user's own, outside every run; 'run': inside the "
        "run directory, for rows that are fictitious or public",
    )
    noise_shares: str = option(
        "site",
        choices=("site", "sum"),
        help="sum: every site adds a share of the noise and the opened sum holds the whole; for records and "
        "persons, one local step a round, under masks or bfv",
    )
    correlation: str = option(
        "none",
        choices=("none", "banded"),
        help="banded: a site's noise takes back a part of its noise of earlier rounds (client unit); every "
        "client adds noise in every round and learns in one of `separation`",
    )
    separation: int = option(
        0, minimum=0, maximum=1000, help="rounds between two turns of a client; with correlation = 'banded'"
    )
    noise: str = option(
        "system", choices=("system", "seeded"), help="seeded is for tests and stamps the run not private"
    )
    reason: str = option("", help="why no privacy unit is needed; required with unit = 'none'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """What hides one client's update from the server."""

    kind: str = option(choices=("secagg", "bfv", "ckks", "none"))
    threshold: int = option(
        0, minimum=0, help="fewest clients whose sum may be opened; 0: a two-thirds majority"
    )
    groups: int = option(
        1,
        minimum=1,
        maximum=100_000,
        help="sums over this many random groups of equal size instead of one over the cohort, each with its "
        "own threshold; for strategies that compare groups",
    )
    mode: MaskingMode = option("active", choices=("semi_honest", "active"), only_for=("secagg",))
    colluding: int = option(
        1, minimum=0, help="clients that may side with the server; their noise is not counted"
    )
    value_bits: int = option(20, minimum=4, maximum=32, help="signed bits of one quantised coordinate")
    coordinate_bound: float = option(
        1.0, above=0.0, maximum=1e9, help="largest size of one coordinate of an update"
    )
    norm_bound: float = option(
        0.0,
        minimum=0.0,
        maximum=1e12,
        help="largest L2 norm of one client's update; 0: what follows from clip, noise and "
        "learning rate, if anything does",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Which observers are played against the run afterwards."""

    observers: tuple[str, ...] = option((), choices=OBSERVERS)
    attacks: tuple[str, ...] = option(("all",))
    budget: str = option("quick", choices=("quick", "standard", "exhaustive"))
    record_rounds: int = option(
        2,
        minimum=0,
        maximum=1000,
        help="rounds whose traffic is kept for the audit, the first and last among them",
    )
    record_mebibytes: int = option(
        256, minimum=1, help="most that is kept of them; what would exceed it is left out"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, complete: two equal values describe the same run."""

    format: int = option(choices=(1,))
    name: str = option(
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", help="letters, digits, dot, dash, underscore"
    )
    seed: int = option(minimum=0, maximum=2**63 - 1)
    task: Task
    model: Model
    federation: Federation
    privacy: Privacy
    protection: Protection
    audit: Audit = option(Audit())
    evaluation: Evaluation = option(Evaluation())
    personal: Personal = option(Personal())
    distillation: Distillation = option(Distillation())
    compression: Compression = option(Compression())
    speed: Speed = option(Speed())
    document: Document = option(Document())

    MUST_BE_EXPLICIT: ClassVar[tuple[str, ...]] = ("privacy", "protection")


def load(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run file, apply `section.key=value` overrides, and check the whole.

    Raises:
      ConfigError: with every problem of file and overrides at once.
    """
    table = parse_toml(path)
    problems = Problems()
    for override in overrides:
        set_value(table, override, problems)
    return from_table(table, where=str(path), problems=problems)


def from_table(table: dict[str, Any], *, where: str = "run", problems: Problems | None = None) -> RunConfig:
    """Turn a parsed table into a checked `RunConfig`."""
    problems = problems or Problems()
    config = read_table(RunConfig, table, "", problems)
    if config is not None and not problems:
        _check_across(config, problems)
    if problems or config is None:
        raise ConfigError(where, list(problems))
    return config


def dump(config: RunConfig) -> str:
    """Write a config as TOML that `load` reads back to an equal value."""
    return dump_toml(config)


def _check_across(config: RunConfig, problems: Problems) -> None:
    """Check what no single field can: bounds that depend on another field."""
    task, federation, privacy, protection = config.task, config.federation, config.privacy, config.protection
    if federation.cohort > task.clients:
        problems.add("federation.cohort", federation.cohort, f"must be at most task.clients = {task.clients}")
    check_lifecycle(config, problems)
    check_tables(config, problems)
    if federation.cohort % protection.groups:
        problems.add(
            "protection.groups",
            protection.groups,
            f"must divide federation.cohort = {federation.cohort}: groups have one size",
        )
    elif protection.threshold > federation.cohort // protection.groups:
        problems.add(
            "protection.threshold",
            protection.threshold,
            f"must be at most federation.cohort = {federation.cohort}, or no round could ever be opened"
            if protection.groups == 1
            else f"must be at most the size of a group, {federation.cohort // protection.groups}, or no sum "
            "could ever be opened",
        )
    if "label_spelling" in task.clean and not task.class_names:
        problems.add(
            "task.clean",
            task.clean,
            "'label_spelling' matches labels to task.class_names; declare them",
        )
    if config.model.trainable.ranks and federation.strategy.kind != "flora":
        problems.add(
            "model.trainable.ranks",
            config.model.trainable.ranks,
            "different ranks need federation.strategy.kind = 'flora'; other rules average factors "
            "of one shape",
        )
    if task.split.kind == "natural" and not task.split.column:
        problems.add(
            "task.split.column", "", "missing; a natural split needs the column that names the owner"
        )
    if privacy.unit == "none":
        if not privacy.reason.strip():
            problems.add(
                "privacy.reason",
                privacy.reason,
                "missing; say why this run needs no privacy unit (the report prints it)",
            )
        return
    if privacy.noise == "seeded" and privacy.ledger != "run":
        problems.add(
            "privacy.ledger",
            privacy.ledger,
            "seeded noise is for tests and must not be charged to a ledger that outlives the run: say 'run'",
        )
    for name in ("epsilon", "delta", "clip_norm"):
        if getattr(privacy, name) <= 0.0:
            problems.add(
                f"privacy.{name}",
                getattr(privacy, name),
                f"must be above 0 with privacy.unit = '{privacy.unit}'",
            )
    if privacy.unit == "person" and privacy.records_per_person < 2:
        problems.add(
            "privacy.records_per_person",
            privacy.records_per_person,
            "must be at least 2 with privacy.unit = 'person'",
        )
    if (privacy.unit == "person") != bool(privacy.person_column):
        problems.add(
            "privacy.person_column",
            privacy.person_column,
            "belongs to privacy.unit = 'person', which needs it: without it nobody can "
            "bound what one person contributes",
        )
    if privacy.unit != "person" and privacy.records_per_person != 1:
        problems.add(
            "privacy.records_per_person",
            privacy.records_per_person,
            "only privacy.unit = 'person' reads it; set that unit",
        )


__all__ = [
    "OBSERVERS",
    "TASKS",
    "Audit",
    "Compression",
    "Controller",
    "Distillation",
    "Document",
    "Dropout",
    "Evaluation",
    "Federation",
    "Lifecycle",
    "Model",
    "OwnModel",
    "Personal",
    "Privacy",
    "Protection",
    "RunConfig",
    "Speed",
    "Split",
    "Strategy",
    "Stream",
    "Task",
    "TrainableSpec",
    "Votes",
    "dump",
    "from_table",
    "load",
]
