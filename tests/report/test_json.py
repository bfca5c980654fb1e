"""report.json: described by its schema, read back without loss, refused when anything is off."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffm_secure.errors import StoreError
from ffm_secure.records import RunSummary
from ffm_secure.report.details import render_details_html, render_internal_html
from ffm_secure.report.document import from_json, read, render_html, render_json, write
from ffm_secure.report.release import released

from . import samples

SCHEMA = json.loads(files("ffm_secure.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
CHECK = jsonschema.Draft202012Validator(SCHEMA)
SMALL = [name for name in samples.ALL if name != "thousand"]


@pytest.mark.parametrize("name", samples.ALL)
def test_schema_accepts_every_summary(name: str) -> None:
    CHECK.validate(json.loads(render_json(samples.ALL[name]())))
    CHECK.validate(json.loads(render_json(released(samples.ALL[name]()))))


def test_schema_names_exactly_the_fields_of_every_record() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def walk(record: type, schema: dict[str, Any]) -> None:
        names = [f.name for f in dataclasses.fields(record)]
        assert list(schema["properties"]) == schema["required"] == names
        assert schema["additionalProperties"] is False

    walk(RunSummary, SCHEMA)
    from ffm_secure import records as types

    for name, schema in SCHEMA["$defs"].items():
        if name != "number":
            walk(getattr(types, name), schema)


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_gives_the_same_summary_and_the_same_bytes(name: str) -> None:
    summary = samples.ALL[name]()
    text = render_json(summary)
    again = from_json(text)
    assert render_json(again) == text
    for draw in (render_html, render_details_html, render_internal_html):
        assert draw(again) == draw(summary)
    if name != "diverged":  # not-a-number is unequal to itself
        assert dataclasses.replace(again, config={}) == dataclasses.replace(summary, config={})
    assert again.config == json.loads(text)["config"]


@pytest.mark.parametrize("name", SMALL)
def test_equal_summaries_give_equal_bytes_in_any_order_of_their_mappings(name: str) -> None:
    first, second = samples.ALL[name](), samples.ALL[name]()
    turned = dataclasses.replace(
        second,
        software=dict(reversed(second.software.items())),
        config=dict(reversed(second.config.items())),
        plan=dataclasses.replace(second.plan, reveals=dict(reversed(second.plan.reveals.items()))),
    )
    assert render_json(first) == render_json(turned)
    for draw in (render_html, render_details_html, render_internal_html):
        assert draw(first) == draw(turned)


def test_infinity_and_not_a_number_are_words() -> None:
    tree = json.loads(render_json(samples.non_private()))
    assert tree["statements"][0]["epsilon"] == tree["budget_epsilon"] == "infinity"
    assert json.loads(render_json(samples.diverged()))["metric_final"] == "nan"
    assert from_json(render_json(samples.non_private())).budget_epsilon == math.inf
    assert math.isnan(from_json(render_json(samples.diverged())).metric_final)


def test_numbers_of_other_libraries_are_written_as_plain_numbers() -> None:
    odd = samples.private(
        metric_final=np.float32(0.5), ledger_entries=np.int64(3), seconds=np.float64(2.0), metric_zero_round=0
    )
    plain = samples.private(metric_final=0.5, ledger_entries=3, seconds=2.0, metric_zero_round=0.0)
    assert render_json(odd) == render_json(plain)


@pytest.mark.parametrize(
    "field, value",
    [
        ("metric_final", "0.5"),
        ("metric_final", None),
        ("ledger_entries", 1.5),
        ("ledger_entries", True),
        ("status", "done"),
        ("name", 3),
    ],
)
def test_a_mistyped_summary_is_refused_with_its_path(field: str, value: object) -> None:
    with pytest.raises(StoreError, match=rf"report\.{field}"):
        render_json(samples.private(**{field: value}))


def damaged(change: Any) -> str:
    tree = copy.deepcopy(json.loads(render_json(samples.private())))
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    "change, path",
    [
        (lambda t: t.pop("seconds"), "report.seconds"),
        (lambda t: t.update(extra=1), "report.extra"),
        (lambda t: t.update(format=2), "report.format"),
        (lambda t: t.update(format=True), "report.format"),
        (lambda t: t.update(status="over"), "report.status"),
        (lambda t: t["rounds"][3].update(loss="low"), r"report.rounds\[3\].loss"),
        (lambda t: t["rounds"][3].update(loss=True), r"report.rounds\[3\].loss"),
        (lambda t: t["rounds"][0].update(cohort=[1.5]), r"report.rounds\[0\].cohort\[0\]"),
        (lambda t: t["rounds"][0].update(dropped={"x": "y"}), "report.rounds"),
        (lambda t: t["rounds"][0].update(dropped={"01": "y"}), "report.rounds"),
        (lambda t: t["statements"][0].update(epsilon=None), r"report.statements\[0\].epsilon"),
        (lambda t: t["statements"][0].update(epsilon="inf"), r"report.statements\[0\].epsilon"),
        (lambda t: t["audit"]["findings"][0].update(verdict="maybe"), r"report.audit.findings\[0\].verdict"),
        (lambda t: t["plan"]["reveals"].update(neighbour="all"), "report.plan.reveals"),
        (lambda t: t.update(clients={}), "report.clients"),
        (lambda t: t.update(plan=[]), "report.plan"),
    ],
)
def test_damage_is_refused_with_its_path_and_by_the_schema(change: Any, path: str) -> None:
    text = damaged(change)
    with pytest.raises(StoreError, match=path):
        from_json(text)
    assert not CHECK.is_valid(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1, "format": 1}',
        '{"format": NaN}',
        "[" * 100_000,
        '{"format": 1e999}',
    ],
)
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(StoreError):
        from_json(text)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    text = render_json(samples.private()).replace('"metric_final": 0.8312', '"metric_final": 1e999')
    with pytest.raises(StoreError, match=r"report\.metric_final"):
        from_json(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_corruption_never_escapes_as_anything_but_a_store_error(data: st.DataObject) -> None:
    text = render_json(samples.single())
    place = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(1, 40))
    corrupt = text[:place] + data.draw(st.text(max_size=6)) + text[place + length :]
    try:
        summary = from_json(corrupt)
    except StoreError:
        return
    assert "<script" not in render_html(summary).lower()


FILES = ["details.html", "internal.html", "internal.json", "report.html", "report.json"]


def test_write_leaves_whole_files_and_nothing_else(tmp_path: Any) -> None:
    folder = tmp_path / "runs" / "one"
    written = write(samples.private(), folder)
    assert written[0].name == "report.html"
    public = released(samples.private())
    assert (folder / "report.html").read_text(encoding="utf-8") == render_html(public)
    assert (folder / "details.html").read_text(encoding="utf-8") == render_details_html(public)
    assert (folder / "report.json").read_text(encoding="utf-8") == render_json(public)
    assert (folder / "internal.json").read_text(encoding="utf-8") == render_json(samples.private())
    assert (folder / "internal.html").read_text(encoding="utf-8") == render_internal_html(samples.private())
    write(samples.non_private(), folder)
    assert read(folder) == from_json(render_json(samples.non_private()))
    assert sorted(p.name for p in folder.iterdir()) == FILES == sorted(p.name for p in written)


def test_only_what_may_leave_is_written_where_that_is_asked_for(tmp_path: Any) -> None:
    public = ["details.html", "report.html", "report.json"]
    write(samples.private(), tmp_path / "asked", internal=False)
    assert sorted(p.name for p in (tmp_path / "asked").iterdir()) == public
    write(
        read(tmp_path / "asked"), tmp_path / "again"
    )  # of a folder that was sent on, there is nothing internal
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == public
    assert read(tmp_path / "again") == read(tmp_path / "asked")


def test_a_release_of_a_release_is_itself() -> None:
    for name in SMALL:
        once = released(samples.ALL[name]())
        assert render_json(released(once)) == render_json(once)


def test_a_folder_in_the_way_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(StoreError, match=r"report\.json: a folder lies"):
        write(samples.private(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_files(tmp_path: Any) -> None:
    write(samples.private(), tmp_path)
    with pytest.raises(StoreError):
        write(samples.private(metric_final="broken"), tmp_path)
    assert (tmp_path / "internal.json").read_text(encoding="utf-8") == render_json(samples.private())
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
