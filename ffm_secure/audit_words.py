"""Say what an audit found: one line a manager understands, tokens a reader understands, and where a run lies on a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ffm_secure.types import AuditFinding, Observer

Decode = Callable[[str], str]

_WHO: dict[Observer, str] = {
    "public": "anyone with the model",
    "client": "the other clients",
    "server": "the server",
    "colluding_server": "a server with colluding clients",
}
_WHAT = {
    "token F1": "words of the training texts",
    "PSNR dB": "training pictures",
    "label count accuracy": "how many records carry each label",
    "membership AUC": "whether a given record was used",
}


def sentence(findings: Sequence[AuditFinding]) -> str:
    """Say the outcome in one line a manager understands."""
    leaks = [item for item in findings if item.verdict == "leaked"]
    passed = sum(item.verdict == "not leaked" for item in findings)
    untried = sum(item.measure == "not run" for item in findings)
    open_ = sum(item.verdict == "inconclusive" for item in findings) - untried
    if leaks:
        return f"Private data leaked: {_exposed(leaks)} ({len(leaks)} of {len(leaks) + passed} attacks with a passed control)."
    if not passed:
        return "Nothing was proven: no attack worked even on the undefended update."
    rest = f", {untried} were not tried under this budget" if untried else ""
    return (
        f"No leak found: {passed} attacks that read the undefended update failed on what observers see; "
        f"{open_} were inconclusive{rest}."
    )


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
