"""How every attack ended, one row each with observers as columns; no score, nothing recovered."""

from __future__ import annotations

from collections.abc import Sequence

from ffm_secure.quantities import amount, bound, duration
from ffm_secure.records import AuditSummary, Observer
from ffm_secure.report.attack_rows import AttackRow, Outcome, attack_rows, count_outcomes, observers_of
from ffm_secure.report.markup import OBSERVERS, Html, number, tag

KIND: dict[Outcome, tuple[str, str]] = {
    "leaked": ("bad", "✕"),
    "not leaked": ("good", "✓"),
    "inconclusive": ("unsure", "?"),
    "not tried": ("quiet", "…"),
    "not applicable": ("quiet", "–"),
}
_LOOKS_FOR = {
    "token F1": "words of the texts",
    "PSNR dB": "pictures",
    "label count accuracy": "how many records carry each label",
    "label accuracy": "labels",
    "membership AUC": "whether a record was used",
    "TPR at 1 % FPR": "whether a record was used",
    "attribution": "which owner wrote which word",
    "exact match": "records, exactly",
    "epsilon lower bound": "planted canaries",
}
_ANYTHING = "what the records say"  # of attacks that never got as far as a measure
_MEANS = (
    "“Not leaked” stands only where the same attack succeeded with the defence off. “Inconclusive” proves "
    "nothing either way. Verdicts were reached on private rows; no epsilon counts them."
)


def no_attack() -> Html:
    """Say that nothing was attacked, and how it would be."""
    return tag(
        "p",
        "No attack was run. ",
        tag("code", "ffm-secure audit"),
        " attacks what each observer saw and adds the result here.",
        class_="empty",
    )


def attacks_body(audit: AuditSummary | None, *, whole: bool = False) -> Html:
    """Tell how the attacks ended: those with an answer, those without, and by name alone the rest.

    With `whole` the rest has rows, too, with why.
    """
    if audit is None:
        return no_attack()
    rows = attack_rows(audit.findings)
    attempted = [row for row in rows if row.outcome not in ("not tried", "not applicable")]
    shown = rows if whole else attempted
    return tag(
        "div",
        tag("p", audit.sentence, class_="lede") if audit.sentence and not whole else None,
        _table(shown, observers_of(rows), why=whole and any(row.telling.reason for row in rows))
        if shown
        else None,
        tag("p", _MEANS, class_="under"),
        None if whole else _rest(rows, "not tried", "were not tried under this budget"),
        None if whole else _rest(rows, "not applicable", "do not fit this task, model or protocol"),
        _lower(audit),
        tag("p", *_spent(audit), class_="under"),
    )


def tally(audit: AuditSummary) -> Html | None:
    """Count attacks by how they ended."""
    counts = count_outcomes(attack_rows(audit.findings))
    parts = [tag("span", badge(one), f" {total}", class_="tally") for one, total in counts.items()]
    return tag("p", *parts, class_="tallies") if parts else None


def _looks_for(row: AttackRow) -> str:
    """Say what an attack is after; one that read nothing, not even with the defence off, has no measure."""
    if row.outcome == "not tried":
        return _LOOKS_FOR.get(row.telling.measure, "")
    return _LOOKS_FOR.get(row.telling.measure, row.telling.measure) or _ANYTHING


def badge(outcome: Outcome) -> Html:
    """Draw an outcome as a word with a sign, so that colour alone says nothing."""
    kind, sign = KIND[outcome]
    return tag("span", tag("span", f"{sign} ", aria_hidden="true"), outcome, class_=f"badge {kind}")


def _table(rows: Sequence[AttackRow], observers: Sequence[Observer], *, why: bool) -> Html:
    headings = ["Attack", "Looks for", *(OBSERVERS[one] for one in observers), *(["Why"] if why else [])]
    head = tag("tr", *[tag("th", heading[:1].upper() + heading[1:], scope="col") for heading in headings])
    body = [tag("tr", *_cells(row, observers, why=why)) for row in rows]
    caption = tag("caption", "How each attack ended at worst, by who looked.")
    return tag("table", caption, tag("thead", head), tag("tbody", *body), class_="attacks")


def _cells(row: AttackRow, observers: Sequence[Observer], *, why: bool) -> list[Html]:
    cells = [
        tag("th", row.attack, scope="row"),
        tag(
            "td",
            _looks_for(row),
            data_label="looks for",
        ),
    ]
    for observer in observers:
        outcome = row.cells.get(observer)
        shown = badge(outcome) if outcome is not None else None
        cells.append(tag("td", shown, data_label=OBSERVERS[observer]))
    if why:
        cells.append(tag("td", row.telling.reason, data_label="why"))
    return cells


def _rest(rows: Sequence[AttackRow], outcome: Outcome, words: str) -> Html | None:
    names = [row.attack for row in rows if row.outcome == outcome]
    if not names:
        return None
    verb = words.replace("were", "was", 1).replace("do not", "does not") if len(names) == 1 else words
    return tag(
        "p", tag("strong", amount(len(names), "attack")), f" {verb}: {', '.join(names)}.", class_="rest"
    )


def _lower(audit: AuditSummary) -> Html | None:
    """Say what canaries proved; they are invented, so their figure is no release of anybody's row."""
    if audit.epsilon_lower is None:
        return None
    shown = number(audit.epsilon_lower, bound(audit.epsilon_lower, upper=False), "audit.epsilon_lower")
    return tag(
        "p",
        "Invented records, planted and looked for, proved an epsilon of at least ",
        shown,
        "; smaller proves less.",
    )


def _spent(audit: AuditSummary) -> list[Html | str]:
    used = number(audit.cpu_seconds, duration(audit.cpu_seconds), "audit.cpu_seconds")
    return ["Budget of the audit: ", audit.budget, "; used ", used, " of processor time."]
