"""A courier that signs what goes out, checks what comes back, and lets every stage end at its deadline,
whatever carries it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Protocol

from defenses.errors import ProtocolError
from defenses.signatures import SIGNATURE_BYTES
from ffm_secure import record_codec
from ffm_secure.agreed.agreement import Proposal, RunTerms, SignedAcceptance, check_acceptance
from ffm_secure.config.federated import release
from ffm_secure.errors import RecordError, StoreError
from ffm_secure.records import RoundPlan
from ffm_secure.server.timetable import Timetable
from ffm_secure.transport import envelope
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.envelope import REFUSAL, Header, Sign
from ffm_secure.transport.receipts import SignedReceipt
from ffm_secure.transport.roster import FederationRoster, expired
from ffm_secure.transport.stages import FINISH, JOIN, PLAN, join_acceptances, split_plan

GRACE: Final = 1.0  # seconds after a deadline until an engine that keeps none is left behind
_AHEAD: Final = 4  # answers that may wait to be read
_PAUSE: Final = 0.5  # seconds between two proposals to sites that are not there


class Watch(Protocol):
    """See which stage is open and who has answered; nothing of a message passes through here."""

    def opened(self, stage: str, round: int, sites: Collection[str], deadline: float) -> None:
        """A stage is open until a time, in seconds since 1970."""

    def answered(self, site: str, outcome: str) -> None:
        """A site has answered, or will not: `answered`, `refused`, `improper` or `silent`."""


class NoWatch:
    """Look at nothing."""

    def opened(self, stage: str, round: int, sites: Collection[str], deadline: float) -> None:
        """Ignore."""

    def answered(self, site: str, outcome: str) -> None:
        """Ignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposer:
    """What a coordinator signs with and proposes, and to whom."""

    run: bytes
    name: str
    terms: RunTerms
    roster: FederationRoster
    sign: Sign
    fewest: int  # sites without which no sum can be opened
    timetable: Timetable
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


class _Sealed(Mapping[int, bytes]):
    """The messages of one stage, each signed when it is asked for: a broadcast is held once."""

    def __init__(self, messages: Mapping[int, bytes], headers: Mapping[int, Header], sign: Sign) -> None:
        self._messages, self._headers, self._sign = messages, headers, sign
        self.digests: dict[int, bytes] = {}

    def __getitem__(self, site: int) -> bytes:
        message = envelope.seal(self._headers[site], self._messages[site], self._sign)
        self.digests[site] = envelope.digest_of(message)
        return message

    def __iter__(self) -> Iterator[int]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)


class SealedCourier:
    """Carry the stages of a run over an engine that is trusted with nothing.

    Guarantee: an answer counts only under its site's signature for that very message; every stage ends by
    itself, also where the engine hangs. Before every plan all sites are asked to accept the run anew, so one
    that was started again takes part in the next round; the plan goes out with the signed word of everybody.
    """

    def __init__(self, carrier: Courier, proposer: Proposer, watch: Watch | None = None) -> None:
        self._carrier, self._proposer = carrier, proposer
        self._watch: Watch = watch or NoWatch()
        self._names, self._keys = proposer.roster.names, proposer.roster.keys
        self._accepted: dict[int, bytes] = {}
        self._present: frozenset[int] = frozenset()  # who accepted the newest proposal but one
        self._round = 0
        self._sent = 0.0
        self._gathered = False
        self.receipts: dict[str, SignedReceipt] = {}  # the newest of every site

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        """Send each site its message; yield each answer whose sender is sure."""
        if stage != PLAN:
            yield from self._exchange(stage, messages)
            return
        self._read_round(messages)
        self._gather(messages)
        going_out = self._with_acceptances(messages)
        for site in messages:
            if site not in going_out:
                yield Reply(site=site, content=Lost(stage=JOIN))
        yield from self._exchange(PLAN, going_out)

    def seconds_at_sites(self) -> float:
        """Return what the engine says of sites' own seconds."""
        return self._carrier.seconds_at_sites()

    def close(self) -> None:
        """Let go of the engine."""
        self._carrier.close()

    def _read_round(self, messages: Mapping[int, bytes]) -> None:
        message = next(iter(messages.values()), b"")
        if message:
            plan = record_codec.from_bytes(RoundPlan, split_plan(message)[0], "the plan of a round")
            self._round = plan.round

    def _with_acceptances(self, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return the plan for those who accepted, behind the word of all of them."""
        words = [self._accepted[site] for site in sorted(self._accepted)]
        joined: dict[bytes, bytes] = {}
        going_out = {}
        for site, message in messages.items():
            if site in self._accepted:
                going_out[site] = joined.setdefault(message, join_acceptances(words, message))
        return going_out

    def _gather(self, cohort: Collection[int]) -> None:
        """Propose the run until enough of a cohort have accepted it, or patience ends."""
        proposer = self._proposer
        began, self._accepted = proposer.clock(), {}
        while True:
            self._require_roster()
            self._propose()
            there = sum(site in self._accepted for site in cohort)
            waited = proposer.clock() - began
            if there == len(cohort) or (there >= proposer.fewest and self._has_waited(waited)):
                break
            if waited >= proposer.timetable.patience:
                break
            proposer.sleep(_PAUSE)
        self._present = frozenset(self._accepted)
        self._gathered = True

    def _require_roster(self) -> None:
        """Refuse to go on when no site may answer any more.

        Raises:
          StoreError: the roster has expired.
        """
        expires = self._proposer.roster.statement.expires
        if self._proposer.clock() >= expires:
            raise StoreError(
                f"{expired(expires)}, give it to everybody, then run the same command again: it goes on "
                "after the last finished round"
            )

    def _has_waited(self, waited: float) -> bool:
        return self._gathered or waited >= self._proposer.timetable.gather

    def _propose(self) -> None:
        """Ask those who have not accepted yet."""
        proposer = self._proposer
        proposal = Proposal(name=proposer.name, terms=proposer.terms)
        words = record_codec.canonical_bytes(proposal)
        asked = {site: words for site in range(len(self._names)) if site not in self._accepted}
        keys = dict(zip(self._names, self._keys, strict=True))
        expected = self._present if self._gathered else None
        for reply in self._exchange(JOIN, asked, expected=expected):
            if isinstance(reply.content, Lost):
                continue
            content = bytes(reply.content)
            try:
                signed = record_codec.from_bytes(SignedAcceptance, content, "an acceptance")
                if signed.site != self._names[reply.site]:
                    raise ProtocolError
                check_acceptance(signed, proposer.run, proposer.terms, keys)
            except (ProtocolError, RecordError):
                self._watch.answered(self._names[reply.site], "improper")
                continue
            self._accepted[reply.site] = content

    def _exchange(
        self, stage: str, messages: Mapping[int, bytes], *, expected: frozenset[int] | None = None
    ) -> Iterator[Reply]:
        """Carry one stage. Of `expected` sites the whole time is waited for, of others a short one; without
        it, everybody is expected.
        """
        if not messages:
            return
        clock, timetable = self._proposer.clock, self._proposer.timetable
        deadline = clock() + timetable.seconds(stage)
        brief = deadline if expected is None else min(deadline, clock() + timetable.rejoin)
        sealed = self._seal(stage, messages, deadline)
        self._watch.opened(stage, self._round, [self._names[site] for site in messages], deadline)
        waiting = set(messages)
        with closing(_Carrying(self._carrier, stage, sealed)) as carrying:
            while waiting:
                until = deadline if expected is None or waiting & expected else brief
                reply = carrying.next(until + GRACE - clock())
                if reply is None:
                    break
                if reply.site in waiting:  # an answer that comes twice counts once
                    waiting.discard(reply.site)
                    yield self._opened(stage, reply, sealed)
        for site in sorted(waiting):
            self._watch.answered(self._names[site], "silent")
            yield Reply(site=site, content=Lost(stage=stage))

    def _seal(self, stage: str, messages: Mapping[int, bytes], deadline: float) -> _Sealed:
        proposer = self._proposer
        self._sent = max(proposer.clock(), self._sent + 1e-6)
        headers = {
            site: Header(
                software=release(),
                run=proposer.run,
                round=self._round,
                stage=stage,
                site=self._names[site],
                sent=self._sent,
                deadline=deadline,
            )
            for site in messages
        }
        return _Sealed(messages, headers, proposer.sign)

    def _opened(self, stage: str, reply: Reply, sealed: _Sealed) -> Reply:
        """Check who an answer is from; what is not the site's own word is as if it had not come."""
        name, content = self._names[reply.site], reply.content
        if isinstance(content, Lost):
            self._watch.answered(name, "silent")
            return Reply(site=reply.site, content=Lost(stage=stage))
        try:
            digest = sealed.digests.get(reply.site, b"")
            inner = envelope.unseal_answer(content, digest, self._keys[reply.site])
        except ProtocolError:
            refused = len(content) <= SIGNATURE_BYTES and bytes(content) == REFUSAL
            self._watch.answered(name, "refused" if refused else "improper")
            return Reply(site=reply.site, content=Lost(stage=stage))
        self._watch.answered(name, "answered")
        if stage == FINISH:
            self.receipts[name] = SignedReceipt(
                round=self._round,
                request=digest,
                signature=bytes(content[1 : 1 + SIGNATURE_BYTES]),
                content=bytes(inner),
            )
        return Reply(site=reply.site, content=inner)


class _Carrying:
    """One call of an engine, in a thread of its own, so that it can be left behind."""

    def __init__(self, carrier: Courier, stage: str, messages: Mapping[int, bytes]) -> None:
        self._answers: queue.Queue[Reply | BaseException | None] = queue.Queue(_AHEAD)
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._carry, args=(carrier, stage, messages), name=f"stage {stage}", daemon=True
        )
        self._thread.start()

    def next(self, seconds: float) -> Reply | None:
        """Return the next answer; None when the time is over or no more will come."""
        try:
            answer = self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """Read no more."""
        self._over.set()

    def _carry(self, carrier: Courier, stage: str, messages: Mapping[int, bytes]) -> None:
        last: BaseException | None = None
        try:
            for reply in carrier.send(stage, messages):
                if not self._put(reply):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, answer: Reply | BaseException | None) -> bool:
        while not self._over.is_set():
            try:
                self._answers.put(answer, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
