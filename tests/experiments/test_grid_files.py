"""Grid files: settings without an effect are refused, and every problem is told at once,
with the word that was meant.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ffm_secure.errors import ConfigError
from ffm_secure.experiments import grid as experiments
from tests.experiments.test_experiments import GRID, GRIDS

SIZE = """
[[axes]]
name = "steps"
values = [{ label = "few" }, { label = "many", set = ["federation.lifecycle.local_steps=2"] }]
"""


def changed(*pairs: tuple[str, str], more: str = "") -> str:
    """Change the words of a small sound grid."""
    text = GRID
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text.replace("[quick]", f"{more}\n[quick]", 1)


def problems(text: str, folder: Path, *, quick: bool = False) -> list[str]:
    """Return what is wrong with a grid, nothing if it can be run."""
    (folder / "grid.toml").write_text(text)
    try:
        experiments.load(folder / "grid.toml", quick=quick)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_the_sound_grid_has_no_problem(tmp_path: Path) -> None:
    assert problems(changed(), tmp_path) == []
    assert problems(changed(more=SIZE), tmp_path) == []


# --- settings without an effect -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '"model.trainable.rank=2"',
            '"model.trainable.rank=2", "seed=9"',
            "axes 'rank' 'two' = 'seed=9': is set",
        ),
        (
            '"model.trainable.rank=2"',
            '"model.trainable.rank=2", "name = zz"',
            "axes 'rank' 'two' = 'name = zz': is set",
        ),
        (
            '"model.trainable.rank=2"',
            '"model.trainable.rank=2", "format=1"',
            "'format=1': is set by the grid",
        ),
        ("[run]", "[run]\nseed = 4", "run.seed = 4: is set by the grid: give it in seeds"),
        ("[run]", '[run]\nname = "x"', "run.name = 'x': is set by the grid"),
        ("[run]", "[run]\nformat = 1", "run.format = 1: is set by the grid"),
        ("[quick]", '[quick]\nset = ["seed=7"]', "quick.set = 'seed=7': is set by the grid"),
        (
            '"model.trainable.rank=2"]',
            '"model.trainable.rank=2"], quick = ["seed=9"]',
            "'seed=9': is set by the grid",
        ),
    ],
)
def test_what_the_grid_decides_cannot_be_set(old: str, new: str, words: str, tmp_path: Path) -> None:
    found = problems(changed((old, new)), tmp_path)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    "override",
    ["model.trainable.rank=4", "model.trainable={kind='lora', rank=4}", "model.trainable.rank.x=4"],
)
def test_two_axes_cannot_set_one_key(override: str, tmp_path: Path) -> None:
    """The same key, its parent or its child:
    the axis that comes first would have rows of its own and no effect.
    """
    more = SIZE.replace("federation.lifecycle.local_steps=2", override)
    found = problems(changed(more=more), tmp_path)
    key = override.partition("=")[0]
    assert (
        f"axes 'rank' 'one' sets model.trainable.rank, and 'steps' 'many' sets {key} after it: one undoes "
        "the other in one_many_s1; let one of them set both"
    ) in found


def test_axes_that_never_meet_may_set_one_key(tmp_path: Path) -> None:
    more = SIZE.replace("federation.lifecycle.local_steps=2", "model.trainable.rank=4")
    text = changed(
        ('{ label = "one", set = ["model.trainable.rank=1"] }', '{ label = "one" }'),
        ("seeds = [1]", 'seeds = [1]\nskip = ["rank=two,steps=many"]'),
        more=more,
    )
    assert problems(text, tmp_path) == []


def test_a_label_cannot_undo_its_own_settings(tmp_path: Path) -> None:
    twice = '"model.trainable.rank=2", "model.trainable={kind=\'lora\'}"'
    assert (
        "one undoes the other in two_s1"
        in problems(changed(('"model.trainable.rank=2"', twice)), tmp_path)[0]
    )
    finer = '"model.trainable={kind=\'lora\'}", "model.trainable.rank=2"'
    assert problems(changed(('"model.trainable.rank=2"', finer)), tmp_path) == []


def test_labels_that_change_nothing_are_refused(tmp_path: Path) -> None:
    found = problems(changed(("model.trainable.rank=2", "model.trainable.rank=1"), more=SIZE), tmp_path)
    assert found == [
        "labels 'one' and 'two' of axis 'rank' give equal settings (one_few_s1 and two_few_s1 and 1 more); "
        "change one of them, or leave it out with skip"
    ]
    quick = changed(('only = ["rank=two"]', 'set = ["model.trainable.rank=5"]'))
    assert problems(quick, tmp_path)[0].startswith(
        "quick: labels 'one' and 'two' of axis 'rank' give equal settings"
    )


def test_a_label_can_have_settings_of_its_own_in_the_quick_form(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    late = ('"model.trainable.rank=2"]', '"model.trainable.rank=2"], quick = ["model.trainable.rank=3"]')
    file.write_text(changed(late, ('only = ["rank=two"]', 'set = ["model.trainable.rank=5"]')))
    assert [cell.config.model.trainable.rank for cell in experiments.load(file, quick=True)[1]] == [5, 3]
    assert [cell.config.model.trainable.rank for cell in experiments.load(file)[1]] == [1, 2]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_both_forms_of_every_grid_we_ship_are_sound(path: Path) -> None:
    for quick in (False, True):
        cells = experiments.load(path, quick=quick)[1]
        assert len({cell.config for cell in cells}) == len(cells)


# --- every problem at once ----------------------------------------------------------------------------------


def test_mistakes_of_every_kind_are_told_at_once(tmp_path: Path) -> None:
    """Schema, labels, references, skip, [quick] and the run files:
    one mistake in one of them hides no other.
    """
    text = changed(
        ("seeds = [1]", 'seeds = "1"\nskip = ["rnk=one"]\ncolour = "red"'),
        ('references = ["one"]', 'references = ["onne"]'),
        ("local_steps = 1", "local_stepz = 1"),
        ("seeds = [5]", 'seeds = [-5]\nset = ["federation.roundz=1"]'),
        ('only = ["rank=two"]', 'only = ["rank=twoo"]'),
        ('{ label = "two"', '{ label = "three", set = 3 }, { label = "two"'),
    )
    found = problems(text, tmp_path)
    for words in (
        "seeds = '1': must be a list",
        "colour: unknown key",
        "axes[0].values[1].set = 3: must be a list",
        "references = 'onne': must be a label of the axis 'rank'; did you mean 'one'?",
        "skip = 'rnk=one': names no axis with such a label; did you mean 'rank'?",
        "quick.only = 'rank=twoo': names no axis with such a label; did you mean 'two'?",
        "quick.seeds[0] = -5: must be at least 0",
        "local_stepz: unknown key; did you mean 'local_steps'?",
    ):
        assert any(words in problem for problem in found), (words, found)
    text = text.replace('only = ["rank=twoo"]', 'only = ["rank=two"]')
    assert any(
        "quick: two_s1: federation.roundz: unknown key" in problem for problem in problems(text, tmp_path)
    )


@pytest.mark.parametrize("quick", [False, True])
def test_the_quick_form_is_checked_with_and_without_its_flag(quick: bool, tmp_path: Path) -> None:
    found = problems(
        changed(("seeds = [5]", 'seeds = [5]\nset = ["federation.roundz=1"]')), tmp_path, quick=quick
    )
    assert found == ["quick: two_s5: federation.roundz: unknown key; did you mean 'rounds'?"]
    found = problems(changed(("seeds = [5]", "seeds = []")), tmp_path, quick=quick)
    assert found == ["quick.seeds = (): must not be empty"]


def test_a_form_without_a_cell_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    text = changed(("seeds = [1]", 'seeds = [1]\nskip = ["rank=two"]'))
    assert problems(text, tmp_path) == []
    assert problems(text, tmp_path, quick=True) == ["quick: axes: no cell is left"]


def test_the_word_that_was_meant_is_named(tmp_path: Path) -> None:
    found = problems(changed(('compare = "rank"', 'compare = "Ranks"')), tmp_path)
    assert found == ["compare = 'Ranks': must be the name of an axis: rank; did you mean 'rank'?"]
    found = problems(changed(('compare = "rank"', "")), tmp_path)
    assert found == ["references = ['one']: need compare, the axis whose labels they are"]


def test_unreadable_axes_are_one_problem(tmp_path: Path) -> None:
    """Both ways: what depends on a part that cannot be read is not held against the rest."""
    found = problems(changed(('name = "rank"', 'nmae = "rank"')), tmp_path)
    assert found == [
        "axes[0].nmae: unknown key; did you mean 'name'?",
        "axes[0].name: missing; 1 to 60 characters, no comma, no equals sign",
    ]
    assert problems("format = 1\n", tmp_path)[0].startswith("name: missing")


# --- two cells in one folder --------------------------------------------------------------------------------

LONG = "a label of twenty letters"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            [('label = "two"', 'label = "One"'), ("rank=two", "rank=One")],
            (
                "labels 'one' and 'One' of axis 'rank' differ only in case: the cells 'rank=one, seed 1' "
                "and 'rank=One, seed 1' would share the folder one_s1"
            ),
        ),
        (
            [
                ('"one"', '"öne"'),
                ('"one"', '"öne"'),
                ('label = "two"', 'label = "üne"'),
                ("rank=two", "rank=üne"),
            ],
            (
                "labels 'öne' and 'üne' of axis 'rank' differ only in characters that a folder name does "
                "not keep (it keeps a to z and 0 to 9): the cells 'rank=öne, seed 1' and 'rank=üne, seed "
                "1' would share the folder ne_s1"
            ),
        ),
        (
            [
                ('"one"', f'"{LONG} A"'),
                ('"one"', f'"{LONG} A"'),
                ('"two"', f'"{LONG} B"'),
                ("=two", f"={LONG} B"),
            ],
            (
                f"labels '{LONG} A' and '{LONG} B' of axis 'rank' are alike in their first 20 characters, "
                f"which name the folder: the cells 'rank={LONG} A, seed 1' and 'rank={LONG} B, seed 1' "
                "would share the folder a-label-of-twenty-le_s1"
            ),
        ),
        (
            [("seeds = [1]", "seeds = [1, 2, 1]")],
            (
                "seed 1 is given twice: the cells 'rank=one, seed 1' and 'rank=one, seed "
                "1' would share the folder one_s1"
            ),
        ),
        ([("seeds = [5]", "seeds = [5, 5]")], "quick: seed 5 is given twice: the cells 'rank=two, seed 5'"),
        ([('{ label = "two"', '{ label = "one"'), ("rank=two", "rank=one")], "labels of an axis must differ"),
    ],
    ids=["case", "letters", "length", "seed", "quick seed", "label"],
)
def test_two_cells_in_one_folder_are_named(pairs: list[tuple[str, str]], words: str, tmp_path: Path) -> None:
    found = problems(changed(*pairs), tmp_path)
    assert len(found) == 1
    assert words in found[0]


def test_names_that_are_cut_are_told(tmp_path: Path) -> None:
    """Four axes of long labels leave no place for the seed."""
    more = "".join(
        f'[[axes]]\nname = "{name}"\nvalues = [{{ label = "{LONG}" }}]\n'
        for name in ("second", "third", "fourth")
    )
    long = [('"one"', f'"{LONG}"'), ('"one"', f'"{LONG}"')]
    found = problems(changed(*long, ("seeds = [1]", "seeds = [1, 2]"), more=more), tmp_path)
    assert len(found) == 1
    assert found[0].startswith(
        "names of cells are longer than 80 characters and alike up to there; shorten labels: "
    )
    assert f"fourth={LONG}, seed 1' and" in found[0]
