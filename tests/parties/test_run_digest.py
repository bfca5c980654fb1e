"""A run keeps its name when a release adds settings, and loses it with every choice that is another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ffm_secure.config import run_file
from ffm_secure.config.federated import run_digest
from ffm_secure.config.run_file import Audit, Speed
from ffm_secure.config.schema import chosen_table, dump_toml, load_file, option
from ffm_secure.site.folder import SiteFolder
from tests.parties.helpers import RECORD, notes_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = option(0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Old:
    name: str = option()
    part: Part = option(Part())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewPart:
    speed: int = option(3)
    rate: float = option(0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
    part: NewPart = option(NewPart())
    added: str = option("plain")
    name: str = option()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherDefault:
    name: str = option()
    part: Part = option(Part(rate=0.25))


@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_settings_that_a_release_adds_change_no_choice(rate: float) -> None:
    old, new = Old(name="a", part=Part(rate=rate)), New(name="a", part=NewPart(rate=rate))
    assert dump_toml(chosen_table(old)) == dump_toml(chosen_table(new))


def test_a_choice_that_is_another_is_another() -> None:
    tables = [chosen_table(Old(name=name, part=Part(rate=rate))) for name in "ab" for rate in (0.5, 0.75)]
    assert len({dump_toml(table) for table in tables}) == 4


def test_a_default_that_has_another_value_names_an_old_file_otherwise(tmp_path: Path) -> None:
    """The file that was allowed has every value in it: with another default, one of them is a choice now."""
    allowed = Old(name="a")
    (tmp_path / "a.toml").write_text(dump_toml(allowed))
    read_later = load_file(OtherDefault, tmp_path / "a.toml")
    assert read_later.part.rate == 0.5
    assert dump_toml(chosen_table(read_later)) != dump_toml(chosen_table(allowed))


def test_every_setting_that_shapes_a_result_is_in_the_name() -> None:
    config = notes_run(privacy=RECORD)
    names = {run_digest(config)}
    privacy = dataclasses.replace(config.privacy, epsilon=7.0)
    learning = dataclasses.replace(config.federation.lifecycle, learning_rate=0.2)
    others = [
        dataclasses.replace(config, privacy=privacy),
        dataclasses.replace(config, federation=dataclasses.replace(config.federation, lifecycle=learning)),
        dataclasses.replace(config, seed=config.seed + 1),
        dataclasses.replace(config, name="other"),
    ]
    names |= {run_digest(other) for other in others}
    assert len(names) == 5
    own = dataclasses.replace(config, speed=Speed(threads=3), audit=Audit(record_rounds=9))
    assert run_digest(own) == run_digest(config), "speed and audit are each party's own"


def test_a_run_that_an_earlier_release_allowed_stays_allowed(tmp_path: Path) -> None:
    """A file of a release that knew fewer settings has fewer lines."""
    folder = SiteFolder(place=tmp_path)
    digest = folder.allow(notes_run(privacy=RECORD))
    path = tmp_path / "allowed" / f"{digest}.toml"
    lines = path.read_text().splitlines()
    older = [line for line in lines if not line.startswith(("spare_rounds", "evaluate_every"))]
    assert len(older) == len(lines) - 2
    path.write_text("\n".join(older) + "\n")
    assert folder.allowed() == {digest: path}
    assert run_file.load(path) == notes_run(privacy=RECORD)
