"""An operator, a coordinator and four sites with folders of their own, made as people make them."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from defenses.secagg import Identity
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.clinic_notes.notes import SPECIALTIES
from ffm_secure.engines import coordinator_folder, headquarters, simulated_data
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.engines.headquarters import ReadyRun
from ffm_secure.federation import TrainingResult
from ffm_secure.coordinator.coordinator_file import CoordinatorFile
from ffm_secure.server.timetable import Timetable
from ffm_secure.site import folder as site_folder
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.service import open_session
from ffm_secure.site.session import SiteSession
from ffm_secure.site.site_file import LifetimeBudget, Policy, SelfAudit, SiteFile
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.roster import FederationRoster, Member, key_words
from tests.federation.helpers import make

NAMES = ("north", "south", "east", "west")
NOTES = "builtin:clinic_notes?size=160&validation=40&hospitals=4"
STEPS = {"local_steps": 2, "batch_size": 8, "learning_rate": 0.1}
NO_RECORD = SelfAudit()
QUICK = Timetable(join=60.0, rejoin=5.0, train=60.0, other=30.0, gather=20.0, patience=20.0)
PLAIN = {"unit": "none", "reason": "test data"}
RECORD = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "ledger": "run"}
SEEDED = {**RECORD, "noise": "seeded"}


def notes_run(**sections: Any) -> RunConfig:
    """Return a run of two rounds over four hospitals that declares all that nobody may count."""
    task = {
        "kind": "text_classification",
        "data": NOTES,
        "clients": 4,
        "split": {"kind": "natural", "column": "hospital"},
        "text_column": "text",
        "label_column": "label",
        "class_names": sorted(SPECIALTIES),
        "max_length": 16,
        "nominal_examples": 40,
        "evaluation_examples": 20,
    }
    whole: dict[str, Any] = {
        "task": task,
        "model": {"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        "federation": {"rounds": 2, "cohort": 4, "lifecycle": {"kind": "finetune", **STEPS}},
        "protection": {"kind": "none", "threshold": 3},
        "privacy": PLAIN,
    }
    for section, values in sections.items():
        merged = isinstance(whole.get(section), dict) and "kind" not in values and "unit" not in values
        whole[section] = {**whole[section], **values} if merged else values
    return make(**whole)


@dataclass(kw_only=True)
class Federation:
    """Where everybody's folder lies."""

    place: Path
    config: RunConfig
    operator: Identity
    members: list[Member] = field(default_factory=list)
    serial: int = 1

    @property
    def run_file(self) -> Path:
        return self.place / "coordinator" / "run.toml"

    def site(self, name: str) -> Path:
        return self.place / name

    def roster(self, members: list[Member] | None = None, **changes: Any) -> FederationRoster:
        """Sign a roster; what is not said is as it was."""
        settings: dict[str, Any] = {
            "federation": "clinics",
            "serial": self.serial,
            "expires": int(time.time()) + 86_400,
            "coordinator": Headquarters(place=self.place / "coordinator").key().public_key,
        }
        return FederationRoster.issue(
            self.operator, sites=self.members if members is None else members, **{**settings, **changes}
        )

    def hand_out(self, roster: FederationRoster | None = None) -> None:
        """Give everybody the roster, as the operator does."""
        content = (roster or self.roster()).to_bytes()
        for name in ("coordinator", *(member.name for member in self.members)):
            (self.place / name / "roster.json").write_bytes(content)

    def allow(self, config: RunConfig | None = None) -> None:
        """Let every site's person allow a run."""
        for member in self.members:
            SiteFolder(place=self.site(member.name)).allow(config or self.config)

    def coordinator(self, **settings: Any) -> ReadyRun:
        return headquarters.prepare_run(self.place / "coordinator", self.run_file, **settings)


def rows_to_csv(path: Path, examples: Any) -> None:
    """Write rows as a hospital has them: a table with a header, labels by name."""
    names, classes = list(examples.columns), sorted(SPECIALTIES)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in range(len(examples)):
            cells = {name: examples.columns[name][row] for name in names}
            cells["label"] = classes[int(cells["label"])]
            writer.writerow([cells[name] for name in names])


def found(
    place: Path,
    config: RunConfig,
    *,
    policy: Mapping[str, Any] | None = None,
    timetable: Timetable = QUICK,
    names: Sequence[str] = NAMES,
    record: SelfAudit = NO_RECORD,
) -> Federation:
    """Make everybody's folder, sign the roster, allow the run."""
    source = RandomSource.system()
    operator = Identity(source.random_bytes(32), guard=ReplayGuard.in_memory())
    federation = Federation(place=place, config=config, operator=operator)
    coordinator_folder.create(
        place / "coordinator",
        CoordinatorFile(format=1, operator=key_words(operator.public_key), deadlines=timetable),
        source,
    )
    federation.run_file.write_text(run_file.dump(config))
    parts = simulated_data.load(config, Path.cwd())
    settings: dict[str, Any] = {
        "largest_epsilon": 8.0,
        "protections": ("secagg", "none", "bfv", "ckks"),
        "without_guarantee": True,
    }
    for index, name in enumerate(names):
        site = SiteFile(
            format=1,
            name=name,
            data="rows.csv",
            operator=key_words(operator.public_key),
            budget=LifetimeBudget(epsilon=8.0),
            policy=Policy(**{**settings, **(policy or {})}),
            record=record,
        )
        made = site_folder.create(federation.site(name), site, source)
        rows_to_csv(made.place / "rows.csv", parts.rows(index))
        federation.members.append(Member(name=name, key=made.identity().public_key))
    federation.hand_out()
    federation.allow()
    return federation


def change_site(place: Path, **changes: Any) -> None:
    """Change what a site's file says, as an editor would."""
    folder = SiteFolder(place=place)
    folder.file.write_text(site_folder.site_file.dump(dataclasses.replace(folder.read(), **changes)))


class Direct:
    """Carry bytes by calling sessions in this process."""

    def __init__(self, sessions: Mapping[int, SiteSession]) -> None:
        self.sessions = dict(sessions)
        self.carried: list[tuple[str, int, bytes]] = []
        self.before: Callable[[str, int], None] = lambda stage, site: None

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        for site in messages:
            message = messages[site]
            self.carried.append((stage, site, message))
            self.before(stage, site)
            if site in self.sessions:
                yield Reply(site=site, content=self.sessions[site].handle(stage, message))
            else:
                yield Reply(site=site, content=Lost(stage=stage))

    def seconds_at_sites(self) -> float:
        return 0.0

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


def open_all(federation: Federation) -> Direct:
    """Open every site in this process."""
    opened = [open_session(federation.site(member.name)) for member in federation.members]
    return Direct({session.number: session for session in opened})


def run(federation: Federation, courier: Courier, **settings: Any) -> TrainingResult:
    """Run a coordinator to its end."""
    ready = federation.coordinator(**settings)
    try:
        return ready.coordinator.run(courier)
    finally:
        ready.close()


def log_of(federation: Federation, name: str) -> str:
    return (federation.site(name) / "site.log").read_text()
