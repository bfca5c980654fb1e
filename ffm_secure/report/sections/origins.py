"""The data as far as anyone may know them, who answers for the run, when, with which versions; digests."""

from __future__ import annotations

from collections.abc import Mapping

from ffm_secure.quantities import count, duration
from ffm_secure.records import DataRelease, RunSummary
from ffm_secure.report.plain_words import held_out_words
from ffm_secure.report.markup import Child, Html, facts, listed, number, tag
from ffm_secure.report.sections.promise import owner_count, setting

_MOST_CLASSES = 24
_NAMED_BY = {
    "declared": "declared in the run file",
    "stored": "stored with the data",
    "numbers": "numbers",
    "column": "read from public rows",
}
_PEOPLE = (
    ("Controller", "controller"),
    ("Purpose", "purpose"),
    ("Contact", "contact"),
    ("Legal basis", "legal_basis"),
)
_PACKAGES = ("ffm-secure", "python", "torch", "transformers", "peft", "system")


def data_body(summary: RunSummary) -> Html:
    """Show the data check in the form that may leave: no private row is counted."""
    data = summary.data
    if data is None:
        return tag("p", "Nothing was noted of the data.", class_="empty")
    return tag(
        "div",
        facts(_data_rows(summary, data)),
        tag(
            "p",
            "Before a run begins every row has an owner and a label that is one of the classes, or the "
            "run is refused. How many private rows there are, and of whom, is no release: it stands in no "
            "report that leaves.",
            class_="under",
        ),
    )


def _data_rows(summary: RunSummary, data: DataRelease) -> list[tuple[str, Child]]:
    held_out = held_out_words(data)
    rows: list[tuple[str, Child]] = [
        ("Data set", data.source),
        ("Data owners", count(owner_count(summary))),
        (
            "Public rows",
            tag("span", number(data.public_rows, count(data.public_rows), "data.public_rows"), held_out),
        ),
    ]
    if data.classes:
        more = (
            f" and {count(len(data.classes) - _MOST_CLASSES)} more"
            if len(data.classes) > _MOST_CLASSES
            else ""
        )
        named = _NAMED_BY.get(data.classes_from, data.classes_from)
        classes = f"{count(len(data.classes))}, {named}: {', '.join(data.classes[:_MOST_CLASSES])}{more}"
        rows.append(("Classes", classes))
    if data.max_length:
        cut = (
            ""
            if data.cut is None
            else f"; {100 * data.cut:.0f}\N{NO-BREAK SPACE}% of the public texts evaluated on are longer"
        )
        rows.append(("Texts", f"the first {count(data.max_length)} tokens are read{cut}"))
    cleaners = setting(summary, "task", "clean")
    if cleaners:
        rows.append(("Cleaned", ", ".join(map(str, cleaners))))
    return rows


def people_body(summary: RunSummary) -> Html:
    """Say who answers for the run, when it was, what it ran with, and what tells it from any other."""
    document = summary.config.get("document")
    stated: Mapping[str, object] = document if isinstance(document, Mapping) else {}
    who: list[tuple[str, Child]] = [
        (heading, str(stated[key])) for heading, key in _PEOPLE if stated.get(key)
    ]
    silent = [heading.lower() for heading, key in _PEOPLE if not stated.get(key)]
    if silent:
        who.append(("Not stated", f"{listed(silent)}; [document] in the run file says it"))
    when = summary.ended.replace("T", " ").replace("+00:00", " UTC") or "not recorded"
    took = tag("span", "it took ", number(summary.seconds, duration(summary.seconds), "seconds"))
    versions = ", ".join(f"{name} {summary.software[name]}" for name in _PACKAGES if name in summary.software)
    digests: list[tuple[str, Child]] = [
        (f"SHA-256, {name}", tag("code", summary.digests[name])) for name in sorted(summary.digests)
    ]
    entries = number(summary.ledger_entries, count(summary.ledger_entries), "ledger_entries")
    head = tag("span", tag("code", summary.ledger_head or "none"), " after ", entries, " entries")
    rows = [
        *who,
        ("Ended", tag("span", when, "; ", took)),
        ("Versions", versions or "not recorded"),
        *digests,
        ("Ledger head", head),
    ]
    return facts(rows)
