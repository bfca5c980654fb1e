"""What a site has ready for one allowed run: rows, model, ledger and its half of the protection."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from defenses.dp import Ledger
from defenses.secagg import Identity
from ffm_secure import tasks, trainable
from ffm_secure.agreed.agreement import RunTerms, public_facts, terms_of
from ffm_secure.config.groups import root_examples
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.candidates import read_candidates
from ffm_secure.data.dataset import Dataset, for_evaluation
from ffm_secure.errors import DataError, PlanRefused
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.privacy.accounts import dataset_fingerprint
from ffm_secure.protection.base import ClientSide
from ffm_secure.protection.halves import Terms, site_half
from ffm_secure.protection.masked import SessionBinding
from ffm_secure.site.bound_probe import PROBED, probe_bound
from ffm_secure.site.broadcast import reader_of
from ffm_secure.site.client_state import ClientStateStore
from ffm_secure.site.folder import HOME
from ffm_secure.site.lifetime import grant
from ffm_secure.site.own_record import open_record, record_folder
from ffm_secure.site.noise_memory import noise_of
from ffm_secure.site.own_rows import load_rows
from ffm_secure.site.policy import objections
from ffm_secure.site.published import note_public, refuse_private
from ffm_secure.site.site import Site
from ffm_secure.site.site_file import SiteFile
from ffm_secure.site.site_ledger import SiteLedger
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.tasks.base import Task
from ffm_secure.transport.roster import FederationRoster


LoadModel = Callable[[RunConfig, Path, PublicFacts], LoadedModel]
"""How a site gets the model of a run: as it is at the start, and to be changed by nobody else."""


@dataclass(slots=True, kw_only=True)
class Workplace:
    """Hold a run file as one site sees it: rows and model are loaded once, whatever the number of runs."""

    make_site: Callable[[], Site]
    terms: RunTerms
    digest: str  # of the run file
    rows: int  # of this site; private
    largest_message: int  # bytes the coordinator can have reason to send


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """What a site brings to every run: all of it is its own."""

    file: SiteFile
    base: Path
    identity: Identity
    roster: FederationRoster
    ledger: Ledger
    clock: Callable[[], float]
    load: LoadModel = load_model

    @property
    def index(self) -> int:
        """Return this site's number."""
        return self.roster.names.index(self.file.name)


def require_no_objection(config: RunConfig, file: SiteFile, roster: FederationRoster) -> None:
    """Refuse a run that this site's policy does not admit.

    Raises:
      PlanRefused: with every objection.
    """
    refused = objections(config, file, sites=len(roster.names))
    if refused:
        raise PlanRefused(refused)


def open_workplace(config: RunConfig, own: Belongings) -> Workplace:
    """Load rows and model for an allowed run; nothing is charged.

    Raises:
      PlanRefused, DataError, ModelError: every objection of the policy, or what is wrong and what to do.
    """
    require_no_objection(config, own.file, own.roster)
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    if config.privacy.unit != "none":
        grant(own.ledger, own.file)
    dataset = load_rows(own.file, config, own.base, own.ledger.record_key())
    if config.privacy.unit != "none":
        refuse_private(own.ledger, own.base / own.file.ledger, dataset, own.ledger.record_key())
    facts = replace(public_facts(config, own.roster.names), candidates=read_candidates(config, own.base))
    loaded = own.load(config, own.base, facts)
    terms = terms_of(loaded, own.roster.digest)
    backbones = own.file.policy.backbones
    if backbones and terms.backbone not in backbones:
        raise PlanRefused([f"the backbone {terms.backbone} is not among policy.backbones"])
    if loaded.mechanism.clips_records:
        trainable.rehearse_per_sample(
            loaded.trainable, loaded.strategy.trains(0), clipping=config.privacy.clipping
        )
    codecs = (loaded.codec, *(question.codec for question in loaded.spec.questions.values()))
    longest = max(codec.length for codec in codecs)
    largest = (1 << 20) + 64 * 8 * longest + 4 * loaded.trainable.size
    return Workplace(
        make_site=_sites(config, own, dataset, loaded, terms),
        terms=terms,
        digest=terms.run_file,
        rows=len(dataset.train),
        largest_message=largest,
    )


def _sites(
    config: RunConfig, own: Belongings, dataset: Dataset, loaded: LoadedModel, terms: RunTerms
) -> Callable[[], Site]:
    """Return what makes a site; its rows are encoded and its guard sees the start once, here."""
    task = tasks.build_task(
        config.task.kind, backbone=loaded.backbone, dataset=dataset, max_length=config.task.max_length
    )
    _probe(dataset, loaded, task)
    states = ClientStateStore(folder=own.base / HOME, owners=own.roster.names, places=loaded.strategy.home)
    trainer = SiteTrainer(spec=loaded.spec, trainable=loaded.trainable, task=task, states=states)

    @contextmanager
    def borrow() -> Iterator[SiteTrainer]:
        yield trainer

    chosen = for_evaluation(
        dataset.validation, config.task.evaluation_examples, seed=config.seed, apart=root_examples(config)
    )
    data = SiteData(index=own.index, name=own.file.name, examples=task.encode(dataset.train))
    ledger, evaluation = _site_ledger(config, own, dataset, loaded), task.encode(chosen)
    noise = noise_of(loaded.spec, own.index, states.place(own.index))
    broadcasts = reader_of(loaded.spec, loaded.trainable)
    record = open_record(config, loaded, task, own.file.record, record_folder(own.base, terms.run_file))

    def make() -> Site:
        note_public(own.ledger, dataset, None, own.ledger.record_key())
        return Site(
            spec=loaded.spec,
            data=data,
            ledger=ledger,
            protection=_half(config, own, loaded, terms),
            answers=_halves_of_questions(config, own, loaded, terms),
            broadcasts=broadcasts,
            borrow_trainer=borrow,
            evaluation=evaluation,
            record=record,
            noise=noise,
        )

    return make


def _probe(dataset: Dataset, loaded: LoadedModel, task: Task) -> None:
    public = dataset.validation
    if loaded.mechanism.clips_records and len(public) < PROBED:
        raise DataError(
            f"public: {len(public)} rows, and the bound on one record is tried on {PROBED} before any "
            "private row "
            "is read; ask the coordinator for more"
        )
    rows = task.encode(public.take(range(min(PROBED, len(public)))))
    probe_bound(loaded.spec, loaded.trainable, task, rows)


def _half(config: RunConfig, own: Belongings, loaded: LoadedModel, terms: RunTerms) -> ClientSide:
    binding = SessionBinding(
        backbone=terms.backbone, layout=loaded.spec.layout_digest, mechanism=loaded.spec.mechanism_digest
    )
    shared = Terms(config=config, codec=loaded.codec, roster=own.roster, binding=binding)
    return site_half(shared, own.identity, own.clock)


def _halves_of_questions(
    config: RunConfig, own: Belongings, loaded: LoadedModel, terms: RunTerms
) -> dict[str, ClientSide]:
    """Return this site's half of what each query travels by."""
    halves = {}
    for name, question in loaded.spec.questions.items():
        binding = SessionBinding(
            backbone=terms.backbone, layout=question.layout_digest, mechanism=question.mechanism.digest()
        )
        shared = Terms(config=config, codec=question.codec, roster=own.roster, binding=binding)
        halves[name] = site_half(shared, own.identity, own.clock)
    return halves


def _site_ledger(config: RunConfig, own: Belongings, dataset: Dataset, loaded: LoadedModel) -> SiteLedger:
    records, privacy = dataset.train.records, config.privacy
    assert records is not None
    promises = privacy.unit != "none"
    account = dataset_fingerprint(dataset.name, dataset.train, ())
    replay = hashlib.sha256(repr((config, account)).encode()).digest()
    return SiteLedger(
        ledger=own.ledger,
        owner=own.file.name,
        index=own.index,
        dataset=dataset.name[-120:],
        blocks=own.ledger.blocks_for([records])[0],
        privacy=privacy,
        unit=privacy.unit if promises else "record",
        delta=privacy.delta if promises else 1e-5,
        event=loaded.mechanism.event(release="update of one round"),
        guaranteed=loaded.spec.has_dp_guarantee,
        answers=loaded.spec.answer_events(),
        replay_key=replay if privacy.noise == "seeded" else b"",
        learns=loaded.spec.learns_in(own.index),
    )
