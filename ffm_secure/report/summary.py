"""Put a plan or a finished run into the records that people and reports read."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from defenses.dp import Accountant, EpsilonBound, Event, RecordMechanism
from defenses.he.collusion import Kind, collusion
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import OBSERVERS, RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.engines.setup import Prepared, Setup
from ffm_secure.federation import TrainingResult
from ffm_secure.privacy import mechanism as mechanisms
from ffm_secure.privacy.mechanism import ClientNoise
from ffm_secure.protection.protections import sharing_graph
from ffm_secure.records import (
    AuditSummary,
    ClientOutcome,
    Observer,
    PlanSummary,
    PrivacyStatement,
    RunSummary,
)

SEEDED = "NOT PRIVATE: the privacy noise of this run came from a seed, which is for tests only"
_BACKENDS: Mapping[str, Kind] = {"none": "plain", "secagg": "masking", "bfv": "bfv", "ckks": "ckks"}
_PACKAGES = (
    "ffm-secure",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "cryptography",
    "opacus",
    "tenseal",
    "numpy",
)


def describe(prepared: Prepared) -> PlanSummary:
    """Say what the run would train, send, spend and reveal."""
    config = prepared.config
    federation, trained = config.federation, prepared.trainable
    share = trained.size / max(1, prepared.backbone.total_parameters)
    up = prepared.code.length * prepared.code.modulus_bits // 8
    sealed = {
        "none": "in the clear",
        "secagg": "masked",
        "bfv": "encrypted (BFV)",
        "ckks": "encrypted (CKKS)",
    }[config.protection.kind]
    return PlanSummary(
        headline=f"{config.name}: {federation.rounds} rounds, {config.task.clients} clients, {federation.cohort} a round, "
        f"each at most {compatibility.participation_cap(config)} times",
        trains=f"{'; '.join(trained.description)}: {trained.size:,} of {prepared.backbone.total_parameters:,} numbers ({share:.2%})",
        trainable_parameters=trained.size,
        total_parameters=prepared.backbone.total_parameters,
        sends=f"{compatibility.describe_bytes(up)} per client and round, {sealed}, {prepared.code.modulus_bits}-bit ring; "
        f"{compatibility.describe_bytes(4 * trained.size)} down",
        bytes_up_per_client_round=up,
        bytes_down_per_client_round=4 * trained.size,
        spends=_spends(prepared),
        noise_multiplier=mechanisms.multiplier(prepared.mechanism),
        statements=statements(prepared),
        reveals={observer: _reveals(config, observer) for observer in OBSERVERS},
        breaks=_breaks(config),
        warnings=tuple(_warnings(prepared)),
    )


_ACCOUNTANTS = {
    "pld": "PLD, tilted FFT, rounded up",
    "gaussian": "Gaussian, closed form",
    "rdp": "Renyi, rounded up",
    "none": "none",
}


def statements(prepared: Prepared, events: Sequence[Event] | None = None) -> tuple[PrivacyStatement, ...]:
    """State epsilon once for every observer, with its five fields.

    `events` is what one owner has spent; without it the statement is the plan's: every round a client may take part in.
    """
    config = prepared.config
    privacy = config.privacy
    unit = (
        f"person with up to {privacy.records_per_person} records"
        if privacy.unit == "person"
        else privacy.unit
    )
    bound = _bound(prepared, events)
    common = PrivacyStatement(
        observer="public",
        epsilon=privacy.epsilon if events is None else bound.epsilon,
        delta=privacy.delta,
        unit=unit,
        adjacency=_adjacency(prepared),
        mechanism=_mechanism_words(prepared, events),
        slack=bound.slack,
        accountant=_ACCOUNTANTS[bound.accountant],
    )
    if privacy.unit == "none":
        common = replace(
            common, epsilon=math.inf, delta=0.0, accountant="none", note=f"no privacy unit: {privacy.reason}"
        )
    elif privacy.noise == "seeded":
        common = replace(common, epsilon=math.inf, note=SEEDED)
    return tuple(_for_observer(common, config, observer) for observer in OBSERVERS)


def _bound(prepared: Prepared, events: Sequence[Event] | None) -> EpsilonBound:
    accountant = Accountant()
    if prepared.mechanism is not None and events is None:
        accountant.compose(
            prepared.mechanism.event("plan"), count=max(1, compatibility.participation_cap(prepared.config))
        )
    for event, count in Counter(events or ()).items():
        accountant.compose(event, count=count)
    return accountant.epsilon(prepared.config.privacy.delta or 1e-5)


def _for_observer(common: PrivacyStatement, config: RunConfig, observer: Observer) -> PrivacyStatement:
    common = replace(common, observer=observer)
    colluding = observer == "colluding_server"
    if config.privacy.unit != "client" or not colluding or not common.finite:
        return common
    if config.protection.kind == "bfv":
        return replace(
            common,
            epsilon=math.inf,
            note="a server that holds one client's key reads every upload, and one client's share of the noise protects nobody",
        )
    return replace(
        common, note=f"noise of up to {config.protection.colluding} colluding clients is not counted"
    )


def summarise(
    setup: Setup,
    trained: TrainingResult,
    *,
    zero_metric: float,
    outcomes: tuple[ClientOutcome, ...],
    seconds: float,
    audit: AuditSummary | None = None,
) -> RunSummary:
    """Collect a run into what its report shows."""
    prepared, config = setup.prepared, setup.config
    spent = setup.charges.largest_history() if config.privacy.unit != "none" else ()
    public = prepared.dataset.validation  # the commonest private label would be a release
    majority = prepared.task.majority(public, public)
    last = trained.records[-1].metric if trained.records else zero_metric
    head = setup.charges.ledger.head()
    return RunSummary(
        name=config.name,
        status=trained.status,
        stamps=(SEEDED,) if config.privacy.noise == "seeded" else (),
        config=to_table(config),
        plan=describe(prepared),
        rounds=trained.records,
        statements=statements(prepared, spent),
        budget_epsilon=config.privacy.epsilon if config.privacy.unit != "none" else math.inf,
        metric_name=setup.task.metric_name,
        metric_final=last,
        metric_zero_round=zero_metric,
        metric_majority=majority,
        higher_is_better=setup.task.higher_is_better,
        clients=outcomes,
        clients_source="simulation's own view, never released",
        audit=audit,
        ledger_entries=head.sequence,
        ledger_head=head.hash,
        software=software(),
        seconds=seconds,
    )


def software() -> Mapping[str, str]:
    """Return the versions a figure depends on."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _adjacency(prepared: Prepared) -> str:
    if prepared.mechanism is None:
        return "none"
    return (
        "zero out one client"
        if isinstance(prepared.mechanism, ClientNoise)
        else "add or remove one " + ("person" if prepared.config.privacy.unit == "person" else "record")
    )


def _mechanism_words(prepared: Prepared, events: Sequence[Event] | None) -> tuple[str, ...]:
    made, config = prepared.mechanism, prepared.config
    if events is not None and len(set(events)) > 1:
        return tuple(f"{count} x {event.to_json()}" for event, count in Counter(events).items())
    if made is None:
        return ("no mechanism",)
    cap = compatibility.participation_cap(config)
    if isinstance(made, RecordMechanism):
        return (
            f"up to {cap} rounds x {made.steps} steps of Poisson({made.sampling_rate:.6g}) sampled Gaussian, noise multiplier "
            f"{made.noise_multiplier:.4f}, clip {made.clip_norm:g}, {made.clipping} clipping",
        )
    return (
        f"up to {cap} rounds of Skellam noise over the honest survivors, noise multiplier {made.noise_multiplier:.4f}, "
        f"clip {made.clip_norm:g}, every client of a cohort counted as taking part",
    )


def _spends(prepared: Prepared) -> str:
    privacy = prepared.config.privacy
    if prepared.mechanism is None:
        return f"nothing is guaranteed, epsilon infinite; reason given: {privacy.reason}"
    if privacy.noise == "seeded":
        return f"nothing is guaranteed, epsilon infinite: {SEEDED}"
    unit = f"person ({privacy.records_per_person} records)" if privacy.unit == "person" else privacy.unit
    return (
        f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} per {unit} and data owner; clip {privacy.clip_norm:g}, "
        f"noise {prepared.mechanism.noise_multiplier:.3f} x clip"
    )


def _reveals(config: RunConfig, observer: Observer) -> str:
    noised = "already noised" if config.privacy.unit in ("record", "person") else "not noised"
    least = compatibility.minimum_survivors(config)
    if observer == "public":
        return "the final model"
    if observer == "client":
        extra = " and, as a key holder, every sum" if config.protection.kind in ("bfv", "ckks") else ""
        return f"the global model of every round{extra}"
    if observer == "server":
        return {
            "none": f"every client's update, {noised}, and the global model of every round",
            "secagg": f"sums of at least {least} clients"
            + (", noised as a whole" if config.privacy.unit == "client" else f", {noised}"),
            "bfv": "ciphertexts, and the sum the key holders return",
            "ckks": "ciphertexts, and the rounded sum the key holders return",
        }[config.protection.kind]
    return {
        "none": f"every client's update, {noised}",
        "secagg": f"sums less the updates of {config.protection.colluding} colluding clients",
        "bfv": f"with one client's key: every client's update, {noised}",
        "ckks": f"with one client's key: every client's update, {noised}",
    }[config.protection.kind]


def _breaks(config: RunConfig) -> str:
    """State who can decrypt, and which collusion breaks it."""
    kind, cohort, fewest = (
        config.protection.kind,
        config.federation.cohort,
        compatibility.minimum_survivors(config),
    )
    tolerated, lies = 0, ""
    if kind == "secagg":
        graph, active = sharing_graph(config), config.protection.mode == "active"
        tolerated = (2 * graph.threshold - graph.neighbours if active else graph.threshold) - 1
        if graph.kind == "harary":  # beyond what was provided for it depends on where on the ring they sit
            tolerated = config.protection.colluding
        tolerated = max(0, min(tolerated, fewest - 2))  # so many leave two honest clients in every sum
        answer = "This holds even if" if active else "Not protected if"
        lies = f" {answer} the server lies about who dropped out."
    stated = collusion(_BACKENDS[kind], parties=cohort, fewest=min(fewest, cohort), tolerated=tolerated)
    return f"{stated.who_can_decrypt} {stated.broken_by}{lies}"


def _warnings(prepared: Prepared) -> list[str]:
    config, found = prepared.config, []
    if config.privacy.noise == "seeded":
        found.append(SEEDED)
    if config.privacy.unit != "none":
        declared = (
            "declared"
            if config.task.nominal_examples
            else "taken from the data; declare it with task.nominal_examples"
        )
        found.append(
            f"taken to be public: validation rows, class names, and {prepared.nominal} examples a client ({declared})"
        )
        if prepared.dataset.held_out:
            found.append(
                f"{config.task.data} has no validation part: {prepared.dataset.held_out:,} of its rows leave the clients, are "
                "taken to be public and are not protected by any epsilon; give validation rows that may be public"
            )
    if config.privacy.unit == "person":
        found.append(
            f"that no person has more than {config.privacy.records_per_person} records is assumed, not checked"
        )
    if config.privacy.unit in ("record", "person") and config.privacy.delta > 1 / prepared.nominal:
        found.append(
            f"privacy.delta = {config.privacy.delta:g} is above 1 / {prepared.nominal} examples of a client; choose a smaller one"
        )
    if isinstance(prepared.mechanism, RecordMechanism) and prepared.mechanism.sampling_rate == 1.0:
        found.append("batch_size reaches a client's whole data: sampling does not amplify privacy")
    if config.protection.kind != "none" and config.privacy.unit == "none":
        found.append("hiding single updates is not differential privacy: no epsilon is claimed")
    found += (
        [f"{config.task.data}: {prepared.dataset.license_note}"]
        if getattr(prepared.dataset, "license_note", "")
        else []
    )
    return found


def outcomes(
    setup: Setup, trained: TrainingResult, start: Any, *, rows: int = 2000
) -> tuple[ClientOutcome, ...]:
    """Evaluate the first and last model on every client's own data: a simulation's view, marked as such.

    At most `rows` examples are looked at over all clients (at least 8 of each), so that a long list of clients stays cheap.
    """
    taken = [0] * len(setup.clients)
    for record in trained.records:
        for client in record.cohort:
            taken[client] += 1
    shares = [
        client.examples.take(range(min(len(client.examples), max(8, rows // len(setup.clients)))))
        for client in setup.clients
    ]
    before = [setup.evaluate(start, share).metric for share in shares]
    last = len(trained.records) + 1
    after = [
        setup.evaluate(setup.own(client.index, trained.state.vector, before=last), share).metric
        for client, share in zip(setup.clients, shares, strict=True)
    ]
    private = setup.has_dp_guarantee
    return tuple(
        ClientOutcome(
            client=client.name,
            examples=len(client.examples),
            participations=taken[client.index],
            metric=after[client.index],
            metric_before=before[client.index],
            epsilon=setup.charges.epsilon_of(client.name) if private else math.inf,
            budget=setup.config.privacy.epsilon if private else math.inf,
        )
        for client in setup.clients
    )
