"""Put a simulation together: one server and its sites, which meet in this file and nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defenses.dp import Event, Ledger
from defenses.errors import BudgetExceeded
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure import tasks, trainable
from ffm_secure.config import compatibility
from ffm_secure.config.groups import root_examples
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.owners import numbered_names
from ffm_secure.data.dataset import Dataset, Examples, for_evaluation
from ffm_secure.data.memory import Memory
from ffm_secure.data.root_rows import root_rows
from ffm_secure.engines import simulated_data, simulated_stream, simulated_teachers
from ffm_secure.engines.extension import Extension, extension_of
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model, stored_noise, write_facts
from ffm_secure.engines.local import LocalEngine, TrainerPool
from ffm_secure.engines.simulated_data import (
    Contents,
    SimulatedData,
    contents,
    group_numbers,
    load_dataset,
    part_in_public,
)
from ffm_secure.errors import BudgetExhausted, DataError, PlanRefused, StoreError
from ffm_secure.privacy.mechanism import Mechanism, replay_events
from ffm_secure.protection.enrolment import enrol
from ffm_secure.queries.base import Rows
from ffm_secure.records import RoundRecord
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.server.context import ServerContext
from ffm_secure.server.evidence import evidence_of
from ffm_secure.server.transcript import Transcript, recorded_rounds
from ffm_secure.site import withdrawn
from ffm_secure.site.allowance import Outlook, grant_lifetime, look_ahead
from ffm_secure.site.bound_probe import PROBED, probe_bound
from ffm_secure.site.broadcast import reader_of
from ffm_secure.site.client_state import ClientStateStore, require_home
from ffm_secure.site.identity import open_identity
from ffm_secure.site.noise_memory import noise_of
from ffm_secure.site.ledger_place import IN_RUN, ledger_path, open_ledger
from ffm_secure.site.published import note_public
from ffm_secure.site.site import Site
from ffm_secure.site.site_ledger import SiteLedger
from ffm_secure.site.teaching import Architecture
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.site.truth import TruthKeeper
from ffm_secure.storage.durable import write_atomic
from ffm_secure.storage.observations import ObservationStore
from ffm_secure.storage.run_directory import Store
from ffm_secure.strategies import ServerState
from ffm_secure.tasks.base import Evaluation, Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable import TrainableModel, replicate

__all__ = [
    "Contents",
    "Prepared",
    "Simulation",
    "build",
    "contents",
    "load_dataset",
    "part_in_public",
    "prepare",
    "probe",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(LoadedModel):
    """Hold what can be known before a ledger is opened: rows dealt out, model loaded, noise calibrated."""

    data: SimulatedData
    task: Task
    extension: Extension | None = None  # what a run has behind it that is asked for more rounds
    outlook: Outlook | None = None  # none where no ledger that outlives the run is charged
    owned: tuple[Architecture, ...] = ()  # of every owner's own model, where owners have some

    @property
    def dataset(self) -> Dataset:
        """Return the private rows and the public validation rows."""
        return self.data.dataset

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """Return the row numbers of every owner."""
        return self.data.parts

    @property
    def account(self) -> str:
        """Return the ledger's name for these rows."""
        return self.data.account

    @property
    def contents(self) -> str:
        """Return the keyed digests of all rows the run reads."""
        return self.data.contents


def prepare(
    config: RunConfig, base: Path, folder: Path | None = None, rows: Memory | None = None
) -> Prepared:
    """Load data and model, deal out the data, calibrate the mechanism; a run that has begun in `folder` keeps
    its noise.

    Raises:
      PlanRefused, DataError, ModelError: each with what to do.
    """
    compatibility.check(config)
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    data = simulated_data.load(config, base, folder, rows)
    extension = extension_of(config, folder)
    begun = 0.0
    if extension is None:
        begun = stored_noise(folder)
    loaded = _load_model(config, base, _public_facts(config, data, folder), begun, extension)
    task = tasks.build_task(
        config.task.kind, backbone=loaded.backbone, dataset=data.dataset, max_length=config.task.max_length
    )
    trained, spec = loaded.trainable, loaded.spec
    notes = (spec.strategy.note, _described(spec, data))
    trained.description += tuple(note for note in notes if note)
    owned = simulated_teachers.load(config, base, data, loaded.facts)
    outlook = _outlook(config, data, spec, folder, begun=begun > 0, turns=extension.turns if extension else 0)
    if spec.mechanism.clips_records and not owned:
        trainable.rehearse_per_sample(trained, spec.strategy.trains(0), clipping=config.privacy.clipping)
    return Prepared(
        config=config,
        data=data,
        backbone=loaded.backbone,
        trainable=trained,
        task=task,
        spec=spec,
        facts=loaded.facts,
        outlook=outlook,
        extension=extension,
        owned=owned,
    )


def agree(config: RunConfig, base: Path) -> tuple[SimulatedData, RunSpec]:
    """Return the rows of a run and what its parties agree on; what any ledger holds does not matter.

    Raises:
      PlanRefused, DataError, ModelError: each with what to do.
    """
    compatibility.check(config)
    data = simulated_data.load(config, base)
    return data, load_model(config, base, _public_facts(config, data, None)).spec


def _load_model(
    config: RunConfig, base: Path, facts: PublicFacts, begun: float, extension: Extension | None
) -> LoadedModel:
    """Load the model with the noise a run has begun with, or with that for what is left of an extended run's
    budget.

    Raises:
      BudgetExhausted: nothing is left for more rounds.
    """
    if extension is None:
        return load_model(config, base, facts, multiplier=begun)
    try:
        return load_model(config, base, facts, history=extension.history, turns=extension.turns)
    except BudgetExceeded:
        raise BudgetExhausted(
            f"{extension.rounds} rounds have spent {extension.spent:.4g} of epsilon "
            f"{config.privacy.epsilon:g}, which leaves nothing for more; give the run more "
            "with --set privacy.epsilon=..."
        ) from None


def _public_facts(config: RunConfig, data: SimulatedData, folder: Path | None) -> PublicFacts:
    rows, label_names = len(data.dataset.train), data.dataset.label_names
    return PublicFacts(
        public_client_size=config.task.nominal_examples or max(1, rows // config.task.clients),
        classes=len(label_names) if label_names else None,
        owners=ledger_names(config, data, folder),
        candidates=data.candidates,
        **simulated_teachers.public_facts(config, data),
    )


def ledger_names(config: RunConfig, data: SimulatedData, folder: Path | None) -> tuple[str, ...]:
    """Return the name of every data owner: the one people know, or the one a ledger of these rows was opened
    under.

    Guarantee: an owner whom an older version wrote down by number keeps that account, and with it what was
    spent.
    """
    path = ledger_path(config.privacy, folder)
    if path is None or not path.is_file():
        return data.owners
    ledger = Ledger.open(path, create=False)
    held = set()
    for owner, dataset, _ in ledger.accounts():
        if dataset == data.account:
            held.add(owner)
    ledger.close()
    numbers = numbered_names(len(data.owners))
    if held and held <= set(numbers):
        return numbers
    return data.owners


def _described(spec: RunSpec, data: SimulatedData) -> str:
    return spec.algorithm.describe(spec.config, len(data.public) if data.public is not None else 0)


def _refuse_withdrawn(path: Path, data: SimulatedData, owners: Sequence[str]) -> None:
    """Refuse a plan over rows or owners that have left; a run that has begun goes on without them.

    Raises:
      PlanRefused: with every withdrawal it meets.
    """
    if not path.is_file():
        return
    with open_ledger(path) as ledger:
        problems = withdrawn.objections(ledger, path, data.names(), owners)
    if problems:
        raise PlanRefused(problems)


def _outlook(
    config: RunConfig, data: SimulatedData, spec: RunSpec, folder: Path | None, *, begun: bool, turns: int
) -> Outlook | None:
    """Return what the run's rows have spent and may spend; none where the ledger lies in the run and knows
    nothing else.

    Raises:
      PlanRefused: their lifetime budget does not pay for the whole run. A run that has begun ends where it
        must.
    """
    path = ledger_path(config.privacy, folder)
    if path is None or config.privacy.ledger == IN_RUN:
        return None
    if not begun:
        _refuse_withdrawn(path, data, ledger_names(config, data, folder))
    if not spec.has_dp_guarantee:
        return None
    with open_ledger(path) as ledger:
        event = spec.mechanism.event(release="update of one round")
        rounds = compatibility.paid_rounds(config, turns) if spec.learns else 0
        answers = (*spec.answers_planned(held_back=False), *replay_events(spec.mechanism, config))
        outlook = look_ahead(ledger, path, data.names(), config.privacy, event, rounds, answers)
    if not outlook.pays and not begun:
        raise PlanRefused([outlook.refusal(config.privacy.unit)])
    return outlook


@dataclass(slots=True, kw_only=True)
class Simulation:
    """Hold a run that is ready to start: both sides, and the courier between them. Only this engine may hold
    all three.
    """

    prepared: Prepared
    server: ServerContext
    sites: tuple[Site, ...]
    courier: LocalEngine
    states: ClientStateStore
    ledger: Ledger
    ledger_path: Path

    @property
    def config(self) -> RunConfig:
        """Return the run file."""
        return self.prepared.config

    @property
    def spec(self) -> RunSpec:
        """Return what all parties agree on."""
        return self.prepared.spec

    @property
    def task(self) -> Task:
        """Return the task."""
        return self.prepared.task

    @property
    def trainable(self) -> TrainableModel:
        """Return the server's replica of what is trained."""
        return self.server.trainable

    @property
    def mechanism(self) -> Mechanism:
        """Return what owns sampler, bound, noise and event."""
        return self.spec.mechanism

    @property
    def event(self) -> Event:
        """Return what one round of one owner is charged as."""
        return self.sites[0].ledger.event

    def begin(self, store: Store) -> tuple[ServerState, tuple[RoundRecord, ...]]:
        """Return where the run begins, or where a killed one stopped.

        Raises:
          StoreError: what is stored does not fit this model, or a ledger or a site's own numbers lack its
            past.
        """
        self._note_public_rows()
        resumed = store.resume()
        if resumed is None:
            self.server.run_id = store.run_begun() or self.server.run_id
            return self.spec.strategy.start(self.trainable.flatten().cpu()), ()
        state, records, run_id = resumed
        if state.vector.numel() != self.trainable.size:
            raise StoreError(
                f"the checkpoint holds {state.vector.numel()} numbers, this run trains {self.trainable.size}"
            )
        self.server.run_id = run_id
        self._require_charges(records, run_id)
        require_home(self.spec, self.states, records, run_id)
        return state, records

    def _note_public_rows(self) -> None:
        """Write what this run publishes into a ledger that outlives it: no later run makes it private."""
        if self.config.privacy.ledger != IN_RUN:
            data = self.prepared.data
            note_public(self.ledger, data.dataset, data.public, self.ledger.record_key())

    def _require_charges(self, records: Sequence[RoundRecord], run_id: bytes) -> None:
        missing = []
        for site in self.sites:
            for number in site.ledger.missing(records, run_id):
                missing.append((number, site.data.name))
        if missing:
            first, owner = min(missing)
            raise StoreError(
                f"the ledger lacks {len(missing)} charges of finished rounds (first: round {first} of "
                f"{owner}); restore it, or start a new run: what was spent cannot be forgotten"
            )

    def epsilon(self) -> float:
        """Return the largest epsilon any owner has spent on these rows."""
        return max(site.ledger.epsilon() for site in self.sites)

    def largest_history(self) -> tuple[Event, ...]:
        """Return the events of the owner who has spent most."""
        worst = max(self.sites, key=lambda site: (site.ledger.epsilon(), -site.data.index))
        return worst.ledger.events()

    def own_vector(self, client: int, vector: Tensor, *, before: int) -> Tensor:
        """Return a site's own model: the global vector, with what it keeps at home from the rounds before
        one.
        """
        return self.states.load(client, vector, run_id=self.server.run_id, before=before)

    def evaluate(self, vector: Tensor, examples: Encoded) -> Evaluation:
        """Evaluate a global vector on given rows: a simulation's own view, never released."""
        self.trainable.load_vector(vector)
        return self.task.evaluate(self.trainable.model, examples, device=self.spec.device)


def build(prepared: Prepared, folder: Path) -> Simulation:
    """Encode the owners' rows, open the ledger, enrol everybody; after this the run can start."""
    config, spec = prepared.config, prepared.spec
    evaluation = prepared.task.encode(evaluation_examples(prepared))
    probe(prepared, prepared.task.encode(_probe_rows(prepared)))
    simulated_teachers.probe(prepared.spec, prepared.owned, _probe_rows(prepared))
    path = ledger_path(config.privacy, folder)
    assert path is not None
    ledger = open_granted(prepared, path)
    if prepared.data.stages is None:
        names = (*prepared.data.names(), *prepared.data.held_back_names())
    else:
        names = prepared.data.stage_names()
    blocks = ledger.blocks_for(names)
    if spec.mechanism.noise_multiplier and folder.is_dir():
        content = json.dumps({"noise_multiplier": spec.mechanism.noise_multiplier}).encode()
        write_atomic(folder / "noise.json", content)
    if folder.is_dir():
        write_facts(folder, prepared.facts)
    states = ClientStateStore(folder=folder / "home", owners=spec.owners, places=spec.strategy.home)
    identities = _identities(prepared, states, folder)
    enrolment = enrol(config, spec.codec, spec.owners, prepared.binding(), identities)
    answering = {
        name: enrol(config, question.codec, spec.owners, prepared.binding(question), identities)
        for name, question in spec.questions.items()
    }
    recorded = recorded_rounds(config)
    truth = None
    if recorded:
        truth = TruthKeeper(folder=folder / "home", rounds=recorded, task=prepared.task)
    server = ServerContext(
        spec=spec,
        trainable=prepared.trainable,
        task=prepared.task,
        evaluation=evaluation,
        public=prepared.task.encode(prepared.data.public) if prepared.data.public is not None else None,
        root=_root(prepared),
        protection=enrolment.server,
        answers={name: halves.server for name, halves in answering.items()},
        run_id=os.urandom(16),
        transcript=_transcript(spec, folder, recorded) if recorded else None,
        evidence=evidence_of(spec, folder),
        stages=simulated_stream.public_stages(
            config, prepared.dataset, evaluation_examples(prepared), classes=prepared.facts.classes or 0
        ),
    )
    pool = TrainerPool([_trainer(prepared, states, number) for number in range(config.speed.workers)])
    broadcasts = reader_of(spec, prepared.trainable)
    sites = tuple(
        Site(
            spec=spec,
            data=_site_data(prepared, index, name),
            ledger=_site_ledger(prepared, ledger, index, blocks),
            protection=enrolment.sites[index],
            answers={name: halves.sites[index] for name, halves in answering.items()},
            broadcasts=broadcasts,
            borrow_trainer=pool.borrow,
            evaluation=evaluation,
            truth=truth,
            noise=noise_of(spec, index, states.place(index) if folder.is_dir() else None),
        )
        for index, name in enumerate(spec.owners)
    )
    server.note({site.data.index: site.ledger.receipt() for site in sites})
    return Simulation(
        prepared=prepared,
        server=server,
        sites=sites,
        courier=LocalEngine(config, sites, pool),
        states=states,
        ledger=ledger,
        ledger_path=path,
    )


def _identities(prepared: Prepared, states: ClientStateStore, folder: Path) -> tuple[Identity, ...] | None:
    """Return the sites' identities with their memories on disk; None where there is nothing to keep.

    A run that promises nothing plays a killed round again to the bit, on purpose: its sites forget with the
    process.
    """
    if prepared.config.protection.kind == "none" or not prepared.spec.has_dp_guarantee or not folder.is_dir():
        return None
    source = RandomSource.system()
    return tuple(open_identity(states.place(index), source) for index in range(len(prepared.spec.owners)))


def _transcript(spec: RunSpec, folder: Path, rounds: frozenset[int]) -> Transcript:
    audit = spec.config.audit
    store = ObservationStore(folder=folder / "observations", limit=audit.record_mebibytes << 20)
    return Transcript(spec=spec, store=store, rounds=rounds, observers=audit.observers)


def _trainer(prepared: Prepared, states: ClientStateStore, number: int) -> SiteTrainer:
    """Return one replica for the sites; the first shares the server's tensors, for they take turns in one
    process.
    """
    if number == 0:
        own = prepared.trainable
    else:
        own = replicate(prepared.trainable)
    return SiteTrainer(spec=prepared.spec, trainable=own, task=prepared.task, states=states)


def evaluation_examples(prepared: Prepared) -> Examples:
    """Return the public rows that every round is evaluated on, and every baseline beside it.

    Raises:
      DataError: there are none.
    """
    config, validation = prepared.config, prepared.dataset.validation
    if len(validation) == 0:
        raise DataError(
            f"{config.task.data}: has no validation rows; a run is evaluated on public rows after each round"
        )
    return for_evaluation(
        validation, config.task.evaluation_examples, seed=config.seed, apart=root_examples(config)
    )


def _root(prepared: Prepared) -> Encoded | None:
    """Return the public rows a server learns from to compare groups with; None where it compares none."""
    count = root_examples(prepared.config)
    if not count:
        return None
    return prepared.task.encode(root_rows(prepared.dataset.validation, count, seed=prepared.config.seed))


def open_granted(prepared: Prepared, path: Path) -> Ledger:
    """Open the ledger; where no owner has set a lifetime budget for this unit, the run's own is implied."""
    privacy = prepared.config.privacy
    ledger = open_ledger(path)
    lifetime = None
    if privacy.unit != "none":
        lifetime = ledger.lifetime(privacy.unit)
    if prepared.extension is not None and privacy.ledger == IN_RUN and lifetime is not None:
        reason = f"the run was given more rounds: {prepared.config.federation.rounds}"
        ledger.grant(
            privacy.unit, max(lifetime.epsilon, privacy.epsilon), lifetime.delta, raise_because=reason
        )
    if privacy.unit != "none":
        grant_lifetime(ledger, privacy)
    ledger.record_key()
    return ledger


def _charged_as(config: RunConfig) -> tuple[str, float]:
    """Return unit and delta of the account; a run without a unit is charged as infinite per record."""
    if config.privacy.unit == "none":
        return "record", 1e-5
    return config.privacy.unit, config.privacy.delta


def _site_data(prepared: Prepared, index: int, name: str) -> SiteData:
    """Encode one owner's rows: those learned from, and those that are only asked about."""
    config, task, data = prepared.config, prepared.task, prepared.data
    held_back = None
    if data.held_back:
        examples = data.held_back_rows(index)
        groups = group_numbers(examples, config.evaluation)
        held_back = Rows(encoded=task.encode(examples), groups=groups, owner=index)
    return SiteData(
        index=index,
        name=name,
        examples=task.encode(data.rows(index)),
        held_back=held_back,
        stages=data.arrivals(index),
        teacher=simulated_teachers.teacher(prepared.owned, config, data, index, prepared.device),
    )


def _site_ledger(
    prepared: Prepared, ledger: Ledger, index: int, all_blocks: Sequence[tuple[int, ...]]
) -> SiteLedger:
    config, owners = prepared.config, len(prepared.owners)
    stages = simulated_stream.stage_accounts(prepared.data, prepared.mechanism, index, all_blocks)
    blocks, apart = all_blocks[index], all_blocks[owners:]
    if stages is not None:
        blocks, apart = stages.blocks, ()
    questions = prepared.spec.questions
    held_back = {name: item.item.epsilon for name, item in questions.items() if item.item.held_back}
    unit, delta = _charged_as(config)
    replay = hashlib.sha256(repr((config, prepared.account)).encode()).digest()
    return SiteLedger(
        ledger=ledger,
        owner=prepared.owners[index],
        index=index,
        dataset=prepared.dataset.name[-120:],
        blocks=blocks,
        privacy=config.privacy,
        unit=unit,
        delta=delta,
        event=prepared.mechanism.event(release="update of one round"),
        guaranteed=prepared.spec.has_dp_guarantee,
        answers={
            name: question.mechanism.event(release=name) for name, question in prepared.spec.questions.items()
        },
        held_back=held_back,
        held_back_blocks=apart[index] if apart else (),
        stages=stages,
        learns=prepared.spec.learns_in(index),
        replay_key=replay if config.privacy.noise == "seeded" else b"",
    )


def _probe_rows(prepared: Prepared) -> Examples:
    """Return the public rows the bound is tried on, however few of them a run is evaluated on.

    Raises:
      DataError: there are too few to tell whether one of them moves the others.
    """
    validation = prepared.dataset.validation
    if prepared.mechanism.clips_records and len(validation) < PROBED:
        raise DataError(
            f"{prepared.config.task.data}: has {len(validation)} validation rows, and the bound on one "
            f"record is tried on {PROBED} before any private row is read; add public rows"
        )
    return validation.take(range(min(PROBED, len(validation))))


def probe(prepared: Prepared, public: Encoded, *, samples: int = PROBED) -> None:
    """Measure, on public rows, that no sample moves the clipped sum by more than the bound; before any
    private row is read.

    Raises:
      NotPrivateError: it does, or samples are coupled; the message names the module or the loss at fault.
    """
    if not prepared.owned:
        probe_bound(prepared.spec, prepared.trainable, prepared.task, public, samples=samples)
