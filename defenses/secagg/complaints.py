"""Who says what against whom when a session does not add up, and who is therefore left out of the next
attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reason = Literal["sealed share", "answered share", "dealt secret"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """Hold that two members of one session cannot both have been honest, with the signed message that shows
    it.

    reason: `sealed share`, the accuser could not open what the accused dealt to it; `answered share`, what
    the accused returned is off the polynomial the accuser dealt; `dealt secret`, the shares of the accused
    give no secret that fits what it signed, and nobody accuses it but the arithmetic: `accuser` is empty, and
    it is untrue only if `liars_needed` of its neighbours lied. statement, signature: what the accuser (for an
    answered share, the accused) signed.
    """

    reason: Reason
    accused: bytes
    accuser: bytes = b""
    liars_needed: int = 0
    statement: bytes = b""
    signature: bytes = b""


def left_out(complaints: Iterable[Complaint], *, colluders: int) -> frozenset[bytes]:
    """Return who takes no part in the next attempt: those accused, and those who must be lying.

    Of each complaint one side lies. With at most `colluders` liars, whoever stands against more than that
    many others (one, where no liar is expected at all) is one of them, and what it says counts for nothing.
    Give the complaints of all attempts of a run: a liar can have at most `colluders` others left out before
    it is left out itself and they return.
    """
    complaints, most = tuple(complaints), max(1, colluders)
    against: dict[bytes, set[bytes]] = {}
    for complaint in complaints:
        if complaint.accuser:
            against.setdefault(complaint.accuser, set()).add(complaint.accused)
            against.setdefault(complaint.accused, set()).add(complaint.accuser)
    liars = {member for member, others in against.items() if len(others) > most}
    standing = (
        complaint.accused
        for complaint in complaints
        if (complaint.accuser not in liars if complaint.accuser else complaint.liars_needed > most)
    )
    return frozenset(liars.union(standing))
