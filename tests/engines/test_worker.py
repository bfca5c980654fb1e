"""Several sites in one process behind one relay reach the very numbers of the local engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from ffm_secure.agreed.agreement import run_digest
from ffm_secure.cli.coordinator_commands import hosts_of
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.engines.worker import Worker, open_worker
from ffm_secure.errors import ConfigError
from ffm_secure.federation import TrainingResult
from ffm_secure.transport.courier import Reply
from ffm_secure.transport.envelope import REFUSAL, header_of
from tests.engines.nvflare_federation import NAMES, Machines
from tests.engines.test_nvflare_runs import PATIENT
from tests.federation.helpers import train
from tests.parties.helpers import SEEDED, Federation, found, log_of, notes_run, run
from tests.parties.test_parity import SECAGG

WORKERS = (("north", "south", "east"), ("west",))
CONFIG = notes_run(privacy=SEEDED, protection=SECAGG)


class Behind:
    """Carry bytes to sites by calling the worker that serves them."""

    def __init__(self, handles: Mapping[int, Callable[[str, bytes], bytes]]) -> None:
        self._handles = dict(handles)
        self.last = b""

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        for site in messages:
            self.last = messages[site]
            yield Reply(site=site, content=self._handles[site](stage, self.last))

    def seconds_at_sites(self) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def opened(federation: Federation) -> Iterator[tuple[Worker, ...]]:
    with contextlib.ExitStack() as stack:
        workers = []
        for names in WORKERS:
            worker = open_worker([federation.site(name) for name in names])
            stack.callback(worker.close)
            workers.append(worker)
        yield tuple(workers)


def same_as_local(there: TrainingResult, place: Path) -> None:
    local = train(CONFIG, place / "local")[1]
    assert torch.equal(there.state.vector, local.state.vector)
    assert [(item.survivors, item.loss) for item in there.records] == [
        (item.survivors, item.loss) for item in local.records
    ]
    assert float((there.state.vector != 0).sum()) > 0


def test_sites_that_share_a_process_equal_the_local_engine(tmp_path: Path) -> None:
    federation = found(tmp_path, CONFIG)
    with opened(federation) as workers:
        handles = {}
        for worker, names in zip(workers, WORKERS, strict=True):
            assert worker.names == names
            handles.update({NAMES.index(name): worker.handle for name in names})
        courier = Behind(handles)
        same_as_local(run(federation, courier), tmp_path)
        assert header_of(courier.last).site == "west"
        assert workers[0].handle("finish", courier.last) == REFUSAL, "another process serves that site"
        assert workers[0].handle("finish", b"no message") == REFUSAL
    assert "joined the run" in log_of(federation, "south")


@pytest.mark.slow
def test_two_workers_over_nvflare_equal_the_local_engine(machines: Machines, tmp_path: Path) -> None:
    federation = found(tmp_path, CONFIG, timetable=PATIENT)
    hosts = hosts_of([",".join(names) for names in WORKERS], NAMES, "nvflare")
    with opened(federation) as workers, contextlib.ExitStack() as stack:
        for worker in workers:
            worker.prepare()
            door = serve(machines.engine_folder(worker.names[0]), worker.handle, worker.allows)
            stack.callback(door.close)
        digest = run_digest(CONFIG)
        courier = machines.courier(digest, None, lambda message: header_of(message).deadline, hosts)
        stack.callback(courier.close)
        courier.open(smallest=len(NAMES), seconds=240.0)
        same_as_local(run(federation, courier), tmp_path)


def test_a_worker_that_cannot_be_is_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError) as refused:
        hosts_of(["north,nowhere", "south,north"], NAMES, "flower")
    words = str(refused.value)
    assert "'nowhere' is not on the roster" in words
    assert "'north' is named twice" in words
    assert "only nvflare" in words


def test_a_folder_is_served_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        open_worker([tmp_path / "north", tmp_path / "north"])
