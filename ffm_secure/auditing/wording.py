"""Say what an audit found: one line a manager understands, tokens a reader understands, and where a run lies on a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ffm_secure.records import AuditFinding, Observer

Decode = Callable[[str], str]

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
}


def sentence(findings: Sequence[AuditFinding]) -> str:
    """Say the outcome in one line a manager understands; an attack tried for several observers counts once."""
    worst: dict[str, int] = {}
    for item in findings:
        rank = _WORST_FIRST.index("not tried" if item.measure == "not run" else item.verdict)
        worst[item.attack] = min(rank, worst.get(item.attack, rank))
    leaked, passed, open_, untried, _ = (
        list(worst.values()).count(rank) for rank in range(len(_WORST_FIRST))
    )
    if leaked:
        shown = _exposed([item for item in findings if item.verdict == "leaked"])
        return (
            f"Private data leaked: {shown} ({leaked} of {_attacks(leaked + passed)} with a passed control)."
        )
    if not passed:
        return "Nothing was proven: no attack worked even on the undefended update."
    rest = f", {untried} {'was' if untried == 1 else 'were'} not tried under this budget" if untried else ""
    return (
        f"No leak found: {_attacks(passed)} that read the undefended update failed on what observers see; "
        f"{open_} {'was' if open_ == 1 else 'were'} inconclusive{rest}."
    )


def _attacks(count: int) -> str:
    return f"{count} attack" if count == 1 else f"{count} attacks"


def _exposed(leaks: Sequence[AuditFinding]) -> str:
    """Name who can learn what, observers who learn the same together."""
    learned: dict[tuple[str, ...], list[str]] = {}
    for observer, who in _WHO.items():
        seen = {_WHAT.get(item.measure, item.attack) for item in leaks if item.observer == observer}
        if seen:
            learned.setdefault(tuple(sorted(seen)), []).append(who)
    return "; ".join(f"{_listed(who)} can learn {_listed(what)}" for what, who in learned.items())


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def decoder(tokenizer: Any) -> Decode:
    """Return a function from token ids, separated by blanks, to readable tokens, separated by blanks."""

    def decode(ids: str) -> str:
        try:
            return " ".join(str(tokenizer.decode([int(one)])).strip() or one for one in ids.split())
        except (ValueError, TypeError, IndexError, OverflowError):
            return ids

    return (lambda ids: ids) if tokenizer is None else decode
