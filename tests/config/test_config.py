"""The run file: everything it accepts, everything it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffm_secure.config import run_file as config
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import dump_toml, to_table
from ffm_secure.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def table() -> dict[str, Any]:
    return {
        "format": 1,
        "name": "t",
        "seed": 1,
        "task": {"kind": "text_classification", "data": "builtin:clinic_notes", "clients": 4},
        "model": {"name": "builtin:tiny-bert", "trainable": {"kind": "lora"}},
        "federation": {
            "rounds": 2,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1},
        },
        "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        "protection": {"kind": "none"},
    }


def refusal(changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.from_table(changed)
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    (tmp_path / "again.toml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "again.toml") == loaded


def test_all_problems_are_reported_at_once() -> None:
    changed = table()
    changed["privacy"] |= {"epsilon": -1.0, "clip": 0.5}
    changed["protection"] = {"kind": "secag"}
    changed["federation"]["cohort"] = "20"
    del changed["task"]["data"]
    text = refusal(changed)
    assert "5 problems" in text
    assert "privacy.clip: unknown key; did you mean 'clip" in text
    assert "privacy.epsilon = -1.0: must be at least 0" in text
    assert "protection.kind = 'secag'" in text
    assert "did you mean 'secagg'?" in text
    assert "federation.cohort = '20': must be a whole number, not a text" in text
    assert "task.data: missing" in text


@pytest.mark.parametrize("section", ["privacy", "protection"])
def test_what_protects_people_has_no_default(section: str) -> None:
    changed = table()
    del changed[section]
    assert f"{section}: missing" in refusal(changed)


def test_no_privacy_needs_a_reason() -> None:
    changed = table()
    changed["privacy"] = {"unit": "none"}
    assert "privacy.reason" in refusal(changed)
    changed["privacy"]["reason"] = "public data"
    assert config.from_table(changed).privacy.unit == "none"


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("federation", "cohort", 5, "must be at most task.clients = 4"),
        ("privacy", "delta", 0.0, "must be above 0"),
        ("privacy", "delta", 1.0, "must be below 1"),
        ("privacy", "clip_norm", float("nan"), "must be a finite number"),
        ("privacy", "records_per_person", 3, "only privacy.unit = 'person' reads it"),
        ("protection", "threshold", 9, "no round could ever be opened"),
        ("task", "clients", True, "must be a whole number, not true or false"),
        ("task", "split", {"kind": "natural"}, "needs the column"),
        ("task", "split", {"kind": "iid", "alpha": 0.1}, "is not read with kind = 'iid'"),
        ("model", "trainable", {"kind": "prompt", "rank": 4}, "is not read with kind = 'prompt'"),
    ],
)
def test_one_wrong_value(section: str, key: str, value: Any, words: str) -> None:
    changed = table()
    changed[section][key] = value
    assert words in refusal(changed)


def test_a_key_of_fixed_words_is_read_by_its_words() -> None:
    changed = table()
    changed["privacy"]["clipping"] = "per_layer"
    changed["protection"] = {"kind": "secagg", "threshold": 3, "mode": "semi_honest"}
    read = config.from_table(changed)
    assert (read.privacy.clipping, read.protection.mode) == ("per_layer", "semi_honest")
    changed["privacy"]["clipping"] = "per_layr"
    changed["protection"]["mode"] = 3
    text = refusal(changed)
    assert "did you mean 'per_layer'" in text
    assert "protection.mode = 3: must be a text, not a whole number" in text


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(config.from_table(table())))
    assert (
        config.load(
            path, ("privacy.epsilon=3", "task.data=some/where", "federation.lifecycle.batch_size=7")
        ).privacy.epsilon
        == 3.0
    )
    with pytest.raises(ConfigError, match="3 problems") as caught:
        config.load(path, ("privacy.epsilon=-3", "privacy.epsilom=3", "nonsense"))
    assert "did you mean 'epsilon'?" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", b"[" * 5000, b"", b"x = 1"])
def test_files_that_are_no_run_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        config.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("nowhere.toml")):
        config.load(tmp_path / "nowhere.toml")


def test_configs_are_frozen_and_keyword_only() -> None:
    made = config.from_table(table())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 2


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=40), reason=st.text(min_size=1, max_size=40).filter(str.strip))
def test_any_text_survives_the_round_trip(
    name: str, reason: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = table()
    changed["task"]["data"] = name
    changed["privacy"] = {"unit": "none", "reason": reason}
    try:
        made = config.from_table(changed)
    except ConfigError:
        return
    path = tmp_path_factory.mktemp("run") / "run.toml"
    try:
        path.write_bytes(config.dump(made).encode())
    except UnicodeEncodeError:
        return
    assert config.load(path) == made


def _nested(kind: type, where: str = "") -> typing.Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _nested(hints[field.name], f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}"


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "run_file.md").read_text()
    missing = [name for name in _nested(RunConfig) if f"`{name}`" not in page]
    assert not missing, f"docs/run_file.md lacks {missing}"


def test_to_table_holds_every_key() -> None:
    flat = to_table(config.from_table(table()))
    assert set(flat) == {field.name for field in dataclasses.fields(RunConfig)}


def test_the_page_is_made_from_the_schema() -> None:
    path = ROOT / "docs" / "make_run_file_page.py"
    space: dict[str, Any] = {"__name__": "page", "__file__": str(path)}
    exec(compile(path.read_text(), path.name, "exec"), space)  # noqa: S102
    assert (ROOT / "docs" / "run_file.md").read_text() == space["page"](), (
        "run: python docs/make_run_file_page.py"
    )


HUGE = {"decimal": "9" * 6000, "hexadecimal": "0x" + "f" * 6000}
NUMBERS = ["seed", "federation.rounds", "privacy.epsilon", "task.clients"]


@pytest.mark.parametrize("digits", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_thousands_of_digits_is_a_clear_error(name: str, digits: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    sound = dump_toml(table())
    path.write_text(sound)
    with pytest.raises(
        ConfigError, match=r"number of thousands of digits|cannot be read: Exceeds the limit"
    ) as caught:
        config.load(path, (f"{name}={digits}",))
    assert len(str(caught.value)) < 600
    section, _, key = name.rpartition(".")
    line = re.compile(rf"^{key} = .*$", re.MULTILINE)
    start = sound.index(f"[{section}]") if section else 0
    path.write_text(sound[:start] + line.sub(f"{key} = {digits}", sound[start:], count=1))
    with pytest.raises(
        ConfigError, match=r"number of thousands of digits|is not TOML: Exceeds the limit"
    ) as caught:
        config.load(path)
    assert len(str(caught.value)) < 600
