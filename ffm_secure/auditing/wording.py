"""Say what an audit found: one line a manager understands, tokens a reader understands, and where a run lies
on a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ffm_secure.foreign import ModelTokenizer
from ffm_secure.records import AuditFinding, Observer

Decode = Callable[[str], str]

ATTRIBUTION = "attribution"  # the measure of findings on whose it is

_WHO: dict[Observer, str] = {
    "public": "anyone with the model",
    "client": "the other clients",
    "server": "the server",
    "colluding_server": "a server with colluding clients",
}
_WORST_FIRST = ("leaked", "not leaked", "inconclusive", "not tried", "not applicable")
_WHAT = {
    "token F1": "words of the training texts",
    "PSNR dB": "training pictures",
    "label count accuracy": "how many records carry each label",
    "membership AUC": "whether a given record was used",
    ATTRIBUTION: "which client wrote which word",
}
_OF_A_SUM = {
    "token F1": "words of the cohort's texts",
    "PSNR dB": "the cohort's pictures",
    "label count accuracy": "how many records of the cohort carry each label",
}


def sentence(findings: Sequence[AuditFinding]) -> str:
    """Say the outcome in one line a manager understands;
    an attack tried for several observers counts once.
    """
    worst: dict[str, int] = {}
    for item in findings:
        rank = _WORST_FIRST.index("not tried" if item.measure == "not run" else item.verdict)
        worst[item.attack] = min(rank, worst.get(item.attack, rank))
    leaked, passed, open_, untried, _ = (
        list(worst.values()).count(rank) for rank in range(len(_WORST_FIRST))
    )
    if leaked:
        shown = _exposed(findings)
        return (
            f"Private data leaked: {shown} ({leaked} of {_attacks(leaked + passed)} with a passed control)."
        )
    if not passed and not open_ and not untried:
        return "Nothing was proven: no attack on updates applies here."
    if not passed:
        return "Nothing was proven: no attack worked even on the undefended update."
    rest = ""
    if untried:
        rest = f", {untried} {'was' if untried == 1 else 'were'} not tried under this budget"
    return (
        f"No leak found: {_attacks(passed)} that read the undefended update failed on what observers see; "
        f"{open_} {'was' if open_ == 1 else 'were'} inconclusive{rest}."
    )


def _attacks(count: int) -> str:
    if count == 1:
        return f"{count} attack"
    return f"{count} attacks"


def _exposed(findings: Sequence[AuditFinding]) -> str:
    """Name who can learn what, observers who learn the same together; of a sum also whether it is known whose
    it is.
    """
    learned: dict[tuple[str, ...], list[str]] = {}
    for observer, who in _WHO.items():
        own = []
        for item in findings:
            if item.observer == observer:
                own.append(item)
        parts = tuple(sorted({_learned(item) for item in own if item.verdict == "leaked"}))
        if parts:
            learned.setdefault((_listed(parts) + _whose(own),), []).append(who)
    return "; ".join(f"{_listed(who)} can learn {what}" for (what,), who in learned.items())


def _learned(item: AuditFinding) -> str:
    if item.point == "aggregated":
        words = _OF_A_SUM
    else:
        words = _WHAT
    return words.get(item.measure, _WHAT.get(item.measure, item.attack))


def _whose(findings: Sequence[AuditFinding]) -> str:
    """Say what an observer of sums knows of whose it is; nothing where it sees single updates or rounds gave
    it away.
    """
    held = []
    for item in findings:
        if item.verdict == "leaked" and item.measure in _OF_A_SUM:
            held.append(item)
    if not held or any(item.point != "aggregated" for item in held):
        return ""
    verdicts = set()
    for item in findings:
        if item.measure == ATTRIBUTION:
            verdicts.add(item.verdict)
    if "leaked" in verdicts:
        return ""
    if "inconclusive" in verdicts:
        return ", whose they are is open"
    return ", not whose they are"


def _listed(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def decoder(tokenizer: ModelTokenizer) -> Decode:
    """Return a function from token ids, separated by blanks, to readable tokens, separated by blanks."""

    def decode(ids: str) -> str:
        try:
            return " ".join(str(tokenizer.decode([int(one)])).strip() or one for one in ids.split())
        except (ValueError, TypeError, IndexError, OverflowError):
            return ids

    if tokenizer is None:
        return lambda ids: ids
    return decode
