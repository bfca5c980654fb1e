"""A site's end of a federation of machines: bytes in, bytes out, whatever carries them."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from defenses.errors import DefenseError, ProtocolError
from defenses.replay_guard import ReplayGuard
from ffm_secure import record_codec
from ffm_secure.agreed.agreement import (
    Proposal,
    SignedAcceptance,
    accept,
    check_acceptance,
    differences,
    other_release,
)
from ffm_secure.config.federated import release
from ffm_secure.errors import FfmError, RecordError
from ffm_secure.records import RoundPlan
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.private_frames import without_locals
from ffm_secure.site.site_log import SiteLog, unforeseen
from ffm_secure.site.workplace import Belongings, Workplace, open_workplace, require_no_objection
from ffm_secure.site.site import Site
from ffm_secure.storage.status import StatusFile
from ffm_secure.transport import envelope
from ffm_secure.transport.envelope import REFUSAL, OtherVersion, Request
from ffm_secure.transport.roster import expired
from ffm_secure.transport.stages import BEGIN, EVALUATE, FINISH, JOIN, PLAN, split_acceptances

LARGEST_BEFORE_JOINING: Final = 1 << 20
_MEND: Final = "free space or mend it here, and nothing is lost"
CLOCKS_APART: Final = 300.0  # seconds that the clocks of coordinator and site may differ


class Refused(Exception):
    """This site refuses a message; the words are for its own log."""


@dataclass(slots=True, kw_only=True)
class _Joined:
    """What a session remembers of the run it takes part in."""

    run: bytes
    workplace: Workplace
    site: Site
    plan: RoundPlan | None = None


class SiteSession:
    """Answer a coordinator's messages for one data owner.

    Guarantee: safe to call from any thread. A message out of turn, past its deadline, of another coordinator
    or for another site is refused; the same bytes again are answered with the same bytes. A refusal is the
    constant `ffm_secure.transport.envelope.REFUSAL`, and its reason is in the site's own log; nothing that a
    message holds makes `handle` raise. No round is begun twice, in this process or a later one: the memory of
    it is on disk before the ledger is charged, and the ledger before a row is read.
    """

    def __init__(
        self,
        folder: SiteFolder,
        own: Belongings,
        rounds: ReplayGuard,
        log: SiteLog,
        *,
        clock: Callable[[], float] = time.time,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._own, self._rounds, self._log, self._clock = folder, own, rounds, log, clock
        self._release = release
        self._status = StatusFile(folder.place)
        self._lock = threading.Lock()
        self._joined: _Joined | None = None
        self._workplaces: dict[str, Workplace] = {}  # by run file: the newest alone
        self._last_sent = 0.0
        self._answers: dict[bytes, bytes] = {}  # of the current round, by request

    @property
    def name(self) -> str:
        """Return this site's name on the roster."""
        return self._own.file.name

    @property
    def number(self) -> int:
        """Return this site's number on the roster."""
        return self._own.index

    def allows(self, run: str) -> bool:
        """Tell whether a person here has allowed a run, by the digest of its file."""
        return run in self._folder.allowed()

    def __repr__(self) -> str:
        return f"SiteSession({self.name!r})"

    def prepare(self) -> None:
        """Load rows and model of every run that is allowed here, before anybody asks.

        Raises:
          FfmError: what is wrong with one, and what to do.
        """
        with self._lock, self._log.speaking():
            for path in self._folder.allowed().values():
                self._workplace(path.stem)
            self._status.write(state="waiting")

    @without_locals
    def handle(self, stage: str, message: bytes) -> bytes:
        """Answer one message of a stage."""
        with self._lock, self._log.speaking():
            try:
                return self._answer(stage, message)
            except OtherVersion as other:
                why = (
                    f"the coordinator speaks version {other.version} of the wire, this site version "
                    f"{envelope.WIRE}; whoever is behind must upgrade ffm-secure"
                )
            except Refused as refused:
                why = str(refused)
            except ProtocolError:
                why = "the message is improper or out of turn"
            except OSError as error:
                why = f"{error.strerror or 'the disk fails'}; {_MEND}"
            except sqlite3.OperationalError as error:
                why = f"the ledger cannot be written ({error}); {_MEND}"
            except (FfmError, DefenseError) as error:
                why = str(error)
            except Exception as error:
                why = unforeseen(error)
            self._log.refuse(f"refused {stage!r}: {why}")
            return REFUSAL

    def close(self) -> None:
        """Let go of the site's folder, its ledger and its log."""
        with self._lock:
            self._joined = None
            self._workplaces.clear()
            self._status.write(state="stopped")
            self._release()

    def _answer(self, stage: str, message: bytes) -> bytes:
        joined = self._joined
        largest = joined.workplace.largest_message if joined else LARGEST_BEFORE_JOINING
        if len(message) > largest:
            raise Refused(f"{len(message):,} bytes, and nothing of this run has more than {largest:,}")
        request = envelope.unseal(bytes(message), self._own.roster.statement.coordinator)
        known = self._answers.get(request.digest)
        if known is not None:
            return known
        self._check(stage, request)
        self._last_sent = request.header.sent
        content = self._join(request) if stage == JOIN else self._take_part(stage, request)
        answer = envelope.seal_answer(content, request.digest, self._own.identity.sign)
        self._answers[request.digest] = answer
        self._mention_delay(stage, request)
        return answer

    def _mention_delay(self, stage: str, request: Request) -> None:
        """Tell this site's people of an answer that comes too late to count."""
        late = self._clock() - request.header.deadline
        if late > 0:
            self._log.refuse(
                f"answered {stage!r} {late:.1f} s after its deadline, which counts as no answer: this site "
                "needs a faster machine, or the coordinator longer [deadlines]"
            )

    def _check(self, stage: str, request: Request) -> None:
        """Refuse what is not for this site, of this moment."""
        header, now = request.header, self._clock()
        if header.stage != stage or header.site != self.name:
            raise Refused("it was signed for another stage or another site")
        apart = now - header.sent
        if abs(apart) > CLOCKS_APART:
            way = "ahead of" if apart > 0 else "behind"
            raise Refused(
                f"this machine's clock is {abs(apart):.0f} s {way} the coordinator's, or the message is "
                "that old; "
                "set both by a time service"
            )
        if now > header.deadline:
            raise Refused(
                f"it came {now - header.deadline:.1f} s after its deadline, {apart:.0f} s after it was sent "
                "by this machine's clock: the way or this service was too slow, or the clocks differ"
            )
        if header.sent <= self._last_sent:
            raise Refused("a later message was answered before")
        if now >= self._own.roster.statement.expires:
            raise Refused(expired(self._own.roster.statement.expires))

    def _join(self, request: Request) -> bytes:
        """Take part in a run that a person here has allowed, under terms this site computed itself."""
        try:
            proposal = record_codec.from_bytes(Proposal, request.content, "the proposal")
        except RecordError:
            if request.header.software != release():
                raise Refused(other_release(request.header.software)) from None
            raise ProtocolError from None
        digest = proposal.terms.run_file
        if digest not in self._folder.allowed():
            raise Refused(
                f"nobody here has allowed the run {proposal.name[:80]!r} ({digest[:80]}); ask the "
                "coordinator for its "
                f"run file, read it, then: ffm-secure site allow {self._folder.place} RUN.toml"
            )
        bound = self._folder.run_of(digest)
        if bound not in (None, request.header.run):
            raise Refused(
                "the run file was allowed for one run, which has begun; to take part in a second run of it, "
                f"allow it again: ffm-secure site allow {self._folder.place} RUN.toml"
            )
        workplace = self._workplace(digest)
        different = differences(workplace.terms, proposal.terms)
        if different:
            raise Refused(f"the coordinator's run is not the one allowed here: {'; '.join(different)}")
        if self._joined is None or self._joined.run != request.header.run:
            self._joined = _Joined(run=request.header.run, workplace=workplace, site=workplace.make_site())
            self._log.note(f"joined the run {proposal.name!r}")
        self._joined.plan = None  # whatever round was under way is over: its coordinator has begun anew
        self._answers.clear()
        self._status.write(state="joined", run=proposal.name, round=request.header.round)
        signed = accept(request.header.run, workplace.terms, self.name, self._own.identity.sign)
        return record_codec.canonical_bytes(signed)

    def _workplace(self, digest: str) -> Workplace:
        config = self._folder.load_allowed(self._folder.allowed()[digest])
        require_no_objection(config, self._own.file, self._own.roster)
        if digest not in self._workplaces:
            self._status.write(state="loading", run=config.name)
            self._workplaces = {digest: open_workplace(config, self._own)}
        return self._workplaces[digest]

    def _take_part(self, stage: str, request: Request) -> bytes | memoryview:
        joined = self._joined
        if joined is None or joined.run != request.header.run:
            raise Refused(
                "this site has not joined that run since it was started; it can join the next round"
            )
        content, plan = request.content, joined.plan
        if stage == PLAN:
            content, plan = self._read_plan(joined, content)
        elif stage != EVALUATE and (plan is None or request.header.round != plan.round):
            raise Refused(f"this site takes no part in round {request.header.round} now")
        self._status.write(state="working", round=request.header.round, stage=stage)
        if stage == BEGIN:
            self._enter(joined)
        answer = joined.site.handle(stage, content)
        if stage == PLAN:
            joined.plan = plan if joined.site.takes_part else None
        if stage in (FINISH, EVALUATE):
            self._status.write(state="waiting", round=request.header.round)
        return answer

    def _read_plan(self, joined: _Joined, content: bytes) -> tuple[bytes, RoundPlan]:
        """Read a plan that comes with the word of everybody who takes part; nothing is charged."""
        acceptances, inner = split_acceptances(content)
        keys = dict(zip(self._own.roster.names, self._own.roster.keys, strict=True))
        names = set()
        for item in acceptances:
            try:
                signed = record_codec.from_bytes(SignedAcceptance, item, "an acceptance")
            except RecordError:
                raise ProtocolError from None
            check_acceptance(signed, joined.run, joined.workplace.terms, keys)
            names.add(signed.site)
        fewest = self._own.file.policy.smallest_cohort
        if len(names) < fewest:
            raise Refused(f"{len(names)} sites have accepted the run: policy.smallest_cohort = {fewest}")
        plan = joined.site.read_plan(inner)
        if (plan.round, plan.attempt) <= self._rounds.rounds.get(joined.run, (0, 0)):
            raise Refused(f"round {plan.round} was begun before, and no round is begun twice")
        self._answers.clear()
        joined.plan = None
        return inner, plan

    def _enter(self, joined: _Joined) -> None:
        """Note on disk that a round is begun, before anything is paid."""
        plan = joined.plan
        assert plan is not None
        if self._folder.run_of(joined.workplace.digest) is None:
            self._folder.bind_run(joined.workplace.digest, joined.run)
        try:
            self._rounds.enter(joined.run, plan.round, plan.attempt)
        except ProtocolError:
            raise Refused(f"round {plan.round} was begun before, and no round is begun twice") from None
