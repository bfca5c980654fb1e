"""Describe a data set that a run made, as Croissant JSON-LD: what it is, and what it cost whom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ffm_secure.quantities import bound, small
from ffm_secure.record_codec import Plain
from ffm_secure.records import PrivacyStatement, RunSummary
from ffm_secure.storage.durable import write_atomic

ROWS, DESCRIPTION = "data.jsonl", "croissant.json"
VERSION = "http://mlcommons.org/croissant/1.0"
# Source: https://docs.mlcommons.org/croissant/docs/croissant-spec.html, "Namespaces", as written there.
_CONTEXT: Mapping[str, Plain] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
Row: TypeAlias = Mapping[str, str | int | float]
_TYPES: Mapping[type, str] = {str: "sc:Text", int: "sc:Integer", float: "sc:Float"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSet:
    """Rows that a run made, and what must be said beside them."""

    name: str
    rows: Sequence[Row]  # all with the same columns
    columns: Mapping[str, str]  # what each column is, in words
    made_how: str
    released: Sequence[str]  # what was opened on the way, in words


def public_statement(summary: RunSummary) -> PrivacyStatement | None:
    """Return what holds towards the public, who sees what is released alone."""
    return next((statement for statement in summary.statements if statement.observer == "public"), None)


def write(folder: Path, synthetic: SyntheticSet, summary: RunSummary) -> None:
    """Write the rows that a run made, and their description, into an empty folder."""
    lines = []
    for row in synthetic.rows:
        lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
    content = "".join(lines).encode("utf-8", "surrogatepass")
    write_atomic(folder / ROWS, content)
    statement = public_statement(summary)
    described = describe(synthetic, content, statement=statement, ended=summary.ended)
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / DESCRIPTION, text.encode("utf-8", "surrogatepass"))


def describe(
    synthetic: SyntheticSet, content: bytes, *, statement: PrivacyStatement | None, ended: str
) -> dict[str, Plain]:
    """Return the description of rows whose file has this content."""
    fields: list[Plain] = []
    for name, words in synthetic.columns.items():
        fields.append(_field(name, words, synthetic.rows))
    promised = promise(statement)
    released: list[Plain] = list(synthetic.released)
    return {
        "@context": dict(_CONTEXT),
        "@type": "sc:Dataset",
        "name": synthetic.name,
        "description": f"{synthetic.made_how} {promised} Released on the way: "
        f"{'; '.join(synthetic.released)}.",
        "conformsTo": VERSION,
        "datePublished": ended,
        "version": "1.0.0",
        "license": "not stated",
        "rai:dataCollection": synthetic.made_how,
        "rai:personalSensitiveInformation": promised,
        "rai:dataAnnotationProtocol": released,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": ROWS,
                "name": ROWS,
                "contentUrl": ROWS,
                "encodingFormat": "application/jsonlines",
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "field": fields}],
    }


def _field(name: str, words: str, rows: Sequence[Row]) -> Plain:
    kind = type(rows[0][name]) if rows else str
    return {
        "@type": "cr:Field",
        "@id": f"rows/{name}",
        "name": name,
        "description": words,
        "dataType": _TYPES[kind],
        "source": {"fileObject": {"@id": ROWS}, "extract": {"column": name}},
    }


def promise(statement: PrivacyStatement | None) -> str:
    """Say what is guaranteed to the people whose rows had a say in a data set."""
    if statement is None or not statement.finite:
        return "Nothing is guaranteed about any single private row."
    return (
        f"Differentially private: epsilon {bound(statement.epsilon)} at delta {small(statement.delta)} for "
        f"each {statement.unit} ({statement.adjacency}); whatever is done with these rows costs nothing more."
    )
