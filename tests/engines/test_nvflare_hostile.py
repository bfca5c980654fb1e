"""A hostile coordinator over the engine: what it signs reaches sites that are processes of their own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ffm_secure.engines.nvflare.courier import NVFlareCourier
from ffm_secure.transport.courier import Lost
from ffm_secure.transport.envelope import REFUSAL
from ffm_secure.transport.stages import BEGIN, JOIN, PLAN
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from tests.engines.nvflare_federation import NAMES, Machines
from tests.engines.test_nvflare_runs import PATIENT, served
from tests.parties.helpers import SEEDED, found, log_of, notes_run
from tests.parties.lying import LIES, run_with_lies
from tests.parties.test_hostile_coordinator import MASKS, refused, wire_to
from tests.parties.test_lying_coordinator import check_lie, rounds_of_lies
from tests.parties.test_processes import rounds_charged

pytestmark = pytest.mark.slow


class Distant:
    """A site at the other end of the engine, as `SiteSession` is one in this process."""

    def __init__(self, courier: NVFlareCourier, number: int) -> None:
        self._courier, self._number = courier, number

    def handle(self, stage: str, message: bytes) -> bytes:
        (reply,) = self._courier.send(stage, {self._number: message}, deadline=time.time() + 60.0)
        assert not isinstance(reply.content, Lost), "the service is there, and says that it refuses"
        return bytes(reply.content)


def test_what_it_signs_is_refused_and_charges_nothing(machines: Machines, tmp_path: Path) -> None:
    federation = found(tmp_path, notes_run(privacy=SEEDED, protection=MASKS))
    with served(federation, machines) as (courier, _):
        sites = {number: Distant(courier, number) for number in range(len(NAMES))}
        wire = wire_to(federation, SimpleNamespace(sessions=sites))  # type: ignore[arg-type]
        honest = wire.sealed(PLAN, wire.plan_message(wire.plan))
        answer = wire.session.handle(PLAN, honest)
        assert wire.accepts(answer)
        assert wire.session.handle(PLAN, honest) == answer, "the same bytes again"

        another = dataclasses.replace(wire.plan, cohort=(0, 1, 2))
        assert not wire.accepts(wire.send(PLAN, wire.plan_message(another)))
        assert wire.send(BEGIN, b"") == REFUSAL
        assert "cohort of turn 0 is not the schedule's" in wire.log()
        crafted = wire.vector.clone()
        crafted[0] = float("inf")
        assert not wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan, crafted)))

        stranger = Identity.generate(RandomSource.system())
        assert wire.send(PLAN, wire.plan_message(wire.plan), key=stranger) == REFUSAL
        other = dataclasses.replace(wire.terms, run_file="f" * 64)
        refused(wire, wire.join(other), "nobody here has allowed the run 'test'")
        refused(wire, wire.session.handle(PLAN, bytes(1 << 26)), "nothing of this run has more than")
        earlier, later = (wire.sealed(JOIN, b"", round=0) for _ in range(2))
        wire.session.handle(JOIN, later)
        assert wire.session.handle(JOIN, earlier) == REFUSAL
        draw = np.random.default_rng(5)
        for _ in range(20):
            broken = bytearray(honest)
            broken[draw.integers(len(broken))] ^= int(draw.integers(1, 256))
            assert wire.session.handle(PLAN, bytes(broken)) == REFUSAL

        assert wire.join() != REFUSAL
        assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan))), "the service lives on"
        assert wire.charges() == 0


def test_every_lie_of_the_catalogue_costs_it_a_site(machines: Machines, tmp_path: Path) -> None:
    config = rounds_of_lies(len(LIES))
    federation = found(tmp_path, config, policy={"colluders": 0}, timetable=PATIENT)
    with served(federation, machines) as (courier, _):
        lying, there = run_with_lies(federation, courier, LIES)
    for lie in LIES:
        check_lie(lie, lying, there)
    for name in NAMES:
        assert rounds_charged(federation, name) == [record.round for record in there.records]
    assert "refused 'unmask'" in log_of(federation, "north")
