"""Everything a run needs before its first round: data dealt out, model loaded, mechanism calibrated, ledgers open."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defenses.dp import Event, Ledger, PerSampleEngine, RecordMechanism, balanced_schedule, probe_sensitivity
from defenses.random_source import RandomSource
from ffm_secure import tasks, trainable
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.data import dataset as data
from ffm_secure.data import partition
from ffm_secure.errors import DataError, StoreError
from ffm_secure.models import backbone as models
from ffm_secure.privacy import mechanism as mechanisms
from ffm_secure.privacy.accounts import contents_fingerprint, dataset_fingerprint, refuse_repartition
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.protections import Protection, build_protection
from ffm_secure.records import RoundPlan, RoundRecord
from ffm_secure.site.charges import Charges
from ffm_secure.site.client_state import ClientStateStore
from ffm_secure.site.trainer import Client
from ffm_secure.storage.run_directory import write_atomic
from ffm_secure.strategies import ServerState, Strategy, folds
from ffm_secure.strategies import build as build_strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Hold what can be known without opening a ledger or touching a private example's content."""

    config: RunConfig
    dataset: Any
    parts: tuple[np.ndarray, ...]
    backbone: Any
    trainable: Any
    task: Any
    nominal: int  # public size of one client's data
    strategy: Strategy
    mechanism: mechanisms.Mechanism
    code: VectorCodec
    device: str
    public: Any = None  # examples a public phase learns from
    account: str = ""  # the ledger's name for these rows, dealt in this way
    contents: str = ""  # digests of all rows the run reads

    @property
    def owners(self) -> tuple[str, ...]:
        """Return the ledger name of every client."""
        width = len(str(len(self.parts)))
        return tuple(f"client-{index + 1:0{width}d}" for index in range(len(self.parts)))


@dataclass(slots=True, kw_only=True)
class Setup:
    """Hold a run that is ready to start."""

    prepared: Prepared
    clients: tuple[Client, ...]
    evaluation: Any
    public: Any  # encoded rows of public phases; None where there are none
    charges: Charges
    protection: Protection
    schedule: tuple[tuple[int, ...], ...]
    run_id: bytes
    mechanism_digest: str
    ledger_path: Path
    home: ClientStateStore
    examples: tuple[int, ...] = field(default=())

    @property
    def config(self) -> RunConfig:
        """Return the run file."""
        return self.prepared.config

    @property
    def has_dp_guarantee(self) -> bool:
        """Tell whether this run guarantees anything: a privacy unit, and noise that nobody can replay."""
        return self.config.privacy.unit != "none" and self.config.privacy.noise == "system"

    @property
    def task(self) -> Any:
        """Return the task."""
        return self.prepared.task

    @property
    def trainable(self) -> Any:
        """Return what is trained."""
        return self.prepared.trainable

    @property
    def mechanism(self) -> mechanisms.Mechanism:
        """Return the object that owns sampler, bound, noise and event."""
        return self.prepared.mechanism

    @property
    def code(self) -> VectorCodec:
        """Return how changes travel."""
        return self.prepared.code

    @property
    def device(self) -> str:
        """Return where tensors live."""
        return self.prepared.device

    def adopt(self, state: ServerState, records: Sequence[RoundRecord], run_id: bytes) -> None:
        """Continue a stored run: its id, a state that must fit this model, and a ledger that must hold its past."""
        if state.vector.numel() != self.trainable.size:
            raise StoreError(
                f"the checkpoint holds {state.vector.numel()} numbers, this run trains {self.trainable.size}"
            )
        self.run_id = run_id
        self.charges.require(records, run_id)
        self.home.require(records, run_id)

    def client_source(self, round_plan: RoundPlan, client: int) -> RandomSource:
        """Return the randomness of one client in one round: the system's, or a replayable stream where nothing is claimed."""
        if self.config.privacy.unit == "none" or self.config.privacy.noise == "seeded":
            return RandomSource.seeded(self.config.seed).derive("client", round_plan.round, client)
        return RandomSource.system()

    def own(self, client: int, vector: torch.Tensor, *, before: int) -> torch.Tensor:
        """Return a client's own model: the global vector, with what it keeps at home from the rounds before one."""
        return self.home.enter(client, vector, run_id=self.run_id, before=before)

    def evaluate_all(self, vector: torch.Tensor, *, before: int) -> Any:
        """Evaluate the global vector in public; where clients keep numbers at home, the mean over all clients' own models."""
        if not self.home.places:
            return self.evaluate(vector)
        found = [self.evaluate(self.own(client.index, vector, before=before)) for client in self.clients]
        return replace(
            found[0],
            loss=sum(item.loss for item in found) / len(found),
            metric=sum(item.metric for item in found) / len(found),
        )

    def evaluate(self, vector: torch.Tensor, examples: Any = None) -> Any:
        """Evaluate a global vector on the public validation rows, or on given encoded examples."""
        self.trainable.load_vector(vector)
        return self.task.evaluate(
            self.trainable.model, self.evaluation if examples is None else examples, device=self.device
        )


def prepare(config: RunConfig, base: Path, folder: Path | None = None) -> Prepared:
    """Load data and model, deal out the data, calibrate the mechanism; a run that has begun in `folder` keeps its noise.

    Raises:
      PlanRefused, DataError, ModelError: each with what to do.
    """
    compatibility.check(config)
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    whole = load_dataset(config, base)
    dataset, public = part_in_public(config, whole, base)
    parts = partition.partition(
        dataset.train, clients=config.task.clients, split=config.task.split, seed=config.seed
    )
    nominal = config.task.nominal_examples or max(1, len(dataset.train) // config.task.clients)
    labels = len(dataset.label_names) if dataset.label_names else None
    backbone = models.load_backbone(
        config.model.name,
        kind=config.task.kind,
        labels=labels,
        base=base,
        seed=config.seed,
        dtype=config.model.dtype,
        random_weights=config.model.weights == "random",
    )
    task = tasks.build_task(
        config.task.kind, backbone=backbone, dataset=dataset, max_length=config.task.max_length
    )
    spec = {**to_table(config.model.trainable), "folded": folds(config.federation.strategy)}
    trained = trainable.attach(backbone, spec, task_kind=config.task.kind, seed=config.seed)
    strategy = build_strategy(config.federation.strategy, trained, seed=config.seed)
    trained.description += (strategy.note,) if strategy.note else ()
    trained.description += (_describe_phases(config, public),) if public is not None else ()
    device = choose_device(config.speed.device)
    trained.model.to(device)
    account = dataset_fingerprint(
        dataset.name, whole.train, parts
    )  # of all rows: taking some out makes no new account
    contents = contents_fingerprint(
        account, whole, public if config.federation.lifecycle.public_data else None
    )
    begun = _stored_noise(folder)
    mechanism_, code = mechanisms.build(
        config,
        size=strategy.size(trained.size),
        nominal=nominal,
        largest_client=max((len(part) for part in parts), default=1),
        history=() if begun else spent_before(config, account),
        multiplier=begun,
    )
    if isinstance(mechanism_, RecordMechanism):
        trainable.rehearse_per_sample(trained, strategy.trains(0), clipping=config.privacy.clipping)
    return Prepared(
        config=config,
        dataset=dataset,
        parts=parts,
        backbone=backbone,
        trainable=trained,
        task=task,
        strategy=strategy,
        nominal=nominal,
        mechanism=mechanism_,
        code=code,
        device=device,
        public=public,
        account=account,
        contents=contents,
    )


def _stored_noise(folder: Path | None) -> float:
    """Return the noise multiplier a run began with, 0 if it has not begun."""
    path = folder / "noise.json" if folder is not None else None
    if path is None or not path.is_file():
        return 0.0
    try:
        value = float(json.loads(path.read_bytes())["noise_multiplier"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(f"{path}: is damaged; start the run under another name") from None
    if not 0.0 < value < 1e9:
        raise StoreError(f"{path}: is damaged; start the run under another name")
    return value


def spent_before(config: RunConfig, account: str) -> tuple[Event, ...]:
    """Return the longest history any owner has in a ledger that outlives runs; nothing for a ledger of this run alone."""
    path = Path(config.privacy.ledger).expanduser()
    if not config.privacy.ledger or config.privacy.unit == "none" or not path.is_file():
        return ()
    ledger = Ledger.open(path, create=False)
    histories = [
        ledger.events(owner, account, unit)
        for owner, held, unit in ledger.accounts()
        if (held, unit) == (account, config.privacy.unit)
    ]
    ledger.close()
    return max(histories, key=len, default=())


def part_in_public(config: RunConfig, dataset: Any, base: Path) -> tuple[Any, Any]:
    """Return the private data set and, for pre-training, the public examples: another set, or rows taken out of this one.

    Raises:
      DataError: the public set answers another question, or too many rows are taken out.
    """
    spec = config.federation.lifecycle
    if spec.kind != "pretrain":
        return dataset, None
    if spec.public_data:
        public = _other_set(config, base)
        if public.label_names != dataset.label_names:
            raise DataError(
                f"{spec.public_data}: its labels are not those of {config.task.data}; they must be the same"
            )
        return dataset, public.train
    left = len(dataset.train) - spec.public_examples
    if left < config.task.clients:
        raise DataError(
            f"federation.lifecycle.public_examples = {spec.public_examples}: leaves {left} private rows of {config.task.data}"
        )
    order = np.random.default_rng([config.seed, 1]).permutation(len(dataset.train))
    taken, kept = np.sort(order[: spec.public_examples]), np.sort(order[spec.public_examples :])
    return replace(dataset, train=dataset.train.take(kept)), dataset.train.take(taken)


def _other_set(config: RunConfig, base: Path) -> Any:
    named = replace(config, task=replace(config.task, data=config.federation.lifecycle.public_data))
    return load_dataset(named, base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Name the rows that a run file means now."""

    account: str  # of the training rows, not dealt to anybody
    digests: str  # of all rows, as the run itself notes them
    seeded: bool  # whether the seed has a say: it parts validation rows from a set that has none


def contents(config: RunConfig, base: Path) -> Contents:
    """Read the data of a run file and name its rows, without a model."""
    whole = load_dataset(config, base)
    other = _other_set(config, base) if config.federation.lifecycle.public_data else None
    account = dataset_fingerprint(whole.name, whole.train, ())
    seeded = bool(whole.held_out or (other is not None and other.held_out))
    digests = contents_fingerprint(account, whole, other.train if other is not None else None)
    return Contents(account=account, digests=digests, seeded=seeded)


def _describe_phases(config: RunConfig, public: Any) -> str:
    spec = config.federation.lifecycle
    return (
        f"pre-training by {spec.controller.kind} controller: public phases of {spec.public_steps or spec.local_steps} steps on "
        f"{len(public):,} public rows, at most {compatibility.private_rounds(config)} private rounds"
    )


def load_dataset(config: RunConfig, base: Path) -> Any:
    """Load the data set a run file names, its validation part cut to the public evaluation rows."""
    return data.load_task(config.task, base=base, seed=config.seed)


def build(prepared: Prepared, folder: Path) -> Setup:
    """Encode the clients' data and open the ledger; after this the run can start."""
    config = prepared.config
    shards = partition.client_examples(
        prepared.dataset.train, clients=config.task.clients, split=config.task.split, seed=config.seed
    )
    clients = tuple(
        Client(index=index, name=name, examples=prepared.task.encode(shard))
        for index, (name, shard) in enumerate(zip(prepared.owners, shards, strict=True))
    )
    rows = min(config.task.evaluation_examples, len(prepared.dataset.validation))
    if rows == 0:
        raise DataError(
            f"{config.task.data}: has no validation rows; a run is evaluated on public rows after each round"
        )
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(prepared.dataset.validation))[:rows])
    evaluation = prepared.task.encode(prepared.dataset.validation.take(chosen))
    probe(prepared, evaluation)
    ledger_path = (
        Path(config.privacy.ledger).expanduser() if config.privacy.ledger else folder / "ledger.sqlite"
    )
    charges = open_charges(prepared, ledger_path)
    if prepared.mechanism is not None and folder.is_dir():
        write_atomic(
            folder / "noise.json",
            json.dumps({"noise_multiplier": prepared.mechanism.noise_multiplier}).encode(),
        )
    federation = config.federation
    schedule = balanced_schedule(
        config.task.clients,
        rounds=compatibility.private_rounds(config),
        cohort=federation.cohort,
        source=RandomSource.seeded(config.seed).derive("schedule"),
    )
    run_id = os.urandom(16)
    return Setup(
        prepared=prepared,
        clients=clients,
        evaluation=evaluation,
        public=prepared.task.encode(prepared.public) if prepared.public is not None else None,
        charges=charges,
        protection=build_protection(config, code=prepared.code, owners=prepared.owners),
        schedule=tuple(tuple(int(client) for client in cohort) for cohort in schedule),
        run_id=run_id,
        mechanism_digest=mechanisms.digest(prepared.mechanism),
        ledger_path=ledger_path,
        home=ClientStateStore(folder=folder / "home", owners=prepared.owners, places=prepared.strategy.home),
        examples=tuple(len(part) for part in prepared.parts),
    )


def probe(prepared: Prepared, public: Any, *, samples: int = 3) -> None:
    """Measure, on public rows, that no sample moves the clipped sum by more than the bound; before any private row is read.

    Raises:
      NotPrivateError: it does, or samples are coupled; the message names the module or the loss at fault.
    """
    if not isinstance(prepared.mechanism, RecordMechanism) or len(public) < 2:
        return
    trained, task = prepared.trainable, prepared.task

    def losses_of(rows: Sequence[int]) -> Callable[[], torch.Tensor]:
        batch = task.evaluation_batch(
            public, np.asarray(rows), prepared.device
        )  # a row's masks do not depend on the others
        return partial(task.losses, trained.model, batch)

    exact = prepared.config.model.dtype == "float32"
    with (
        trained.training_only(prepared.strategy.trains(0)),
        PerSampleEngine(trained.model, parameters=trained.active) as engine,
    ):
        probe_sensitivity(
            engine,
            losses_of,
            samples=min(samples, len(public)),
            clip_norm=prepared.mechanism.clip_norm,
            clip=prepared.mechanism.bound,
            tolerance=1e-5 if exact else 1e-2,
            coupling_tolerance=1e-3 if exact else 0.1,
        )


def open_charges(prepared: Prepared, path: Path) -> Charges:
    """Open the ledger and make sure every owner has the budget the run file grants."""
    config = prepared.config
    path.parent.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.open(path, create=True)
    unit = config.privacy.unit
    event = mechanisms.event(prepared.mechanism, reason=config.privacy.reason)
    limit = math.inf if unit == "none" else config.privacy.epsilon
    charged, delta = ("record", 1e-5) if unit == "none" else (unit, config.privacy.delta)
    refuse_repartition(ledger, prepared.account, charged)
    ledger.set_budgets(prepared.owners, prepared.account, charged, limit, delta)
    replay = (
        hashlib.sha256(repr((config, prepared.account)).encode()).digest()
        if config.privacy.noise == "seeded"
        else b""
    )
    return Charges(
        ledger=ledger,
        owners=prepared.owners,
        dataset=prepared.account,
        unit=charged,
        delta=delta,
        event=event,
        replay_key=replay,
    )


def choose_device(wanted: str) -> str:
    """Return a torch device name; auto takes an accelerator if there is one."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
