"""What may leave holds releases alone: private figures and texts are planted, and looked for."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffm_secure.records import (
    AuditFinding,
    ClientOutcome,
    LeakCurve,
    RecoveredPair,
    RecoveredPicture,
    RunSummary,
)
from ffm_secure.report.document import read, write, write_audit
from ffm_secure.report.release import released
from tests.federation.helpers import call

from . import samples

PUBLIC = ("report.html", "details.html", "report.json")
INTERNAL = ("internal.html", "internal.json")
HOME = "/home/adalovelace/ward rows"
TEXTS = ("zebrafish quokka", "axolotl narwhal", "okapi wombat", "private reason of the capybara")
FIGURES = (0.4271935, 0.3918273, 0.6371944, 0.5519283, 0.7382911, 0.1928374, 0.8273645, 0.2938475, 57.318427)
SIZE = 7654321


def planted() -> RunSummary:
    """Build a summary with a mark in every place that private rows can reach."""
    after, before, score, low, high, guess, control, observed, psnr = FIGURES
    picture = RecoveredPicture(truth=samples.CHEQUERED, recovered=samples.GREY, psnr=psnr, ssim=before)
    finding = AuditFinding(
        observer="server",
        attack="position_text",
        point="raw",
        verdict="leaked",
        measure="token F1",
        score=score,
        low=low,
        high=high,
        baseline=guess,
        control=control,
        observed=observed,
        observed_reason=TEXTS[2],
        luck=low,
        seconds=12.5,
        knowledge=("task",),
        reason=TEXTS[3],
        pairs=(RecoveredPair(truth=TEXTS[0], recovered=TEXTS[1]),),
        pictures=(picture,),
    )
    curve = LeakCurve(
        attack="attribution", axis="rounds", measure="share", x=(1.0, 2.0), y=(after, before), here=2.0
    )
    owner = ClientOutcome(
        client="Mercy",
        examples=SIZE,
        participations=20,
        metric=after,
        metric_before=before,
        epsilon=7.8,
        budget=8.0,
    )
    base = samples.private()
    assert base.audit is not None
    audit = dataclasses.replace(base.audit, findings=(finding,), curves=(curve,), notes=(TEXTS[2],))
    task = {**base.config["task"], "data": f"{HOME}/notes.csv"}
    plan = dataclasses.replace(
        base.plan,
        spends=f"epsilon 8; left 4 of 8 (lifetime) in {Path(HOME).parent}/site/ledger.sqlite",
        warnings=(f"{HOME}/notes.csv: has no validation part",),
    )
    assert base.data is not None
    data = dataclasses.replace(base.data, source=f"{HOME}/notes.csv")
    config = {**base.config, "task": task}
    return dataclasses.replace(
        base, clients=(owner,), owners=("Mercy",), audit=audit, config=config, plan=plan, data=data
    )


def written_as(value: float) -> Iterator[str]:
    """Yield the ways a page or a file may write a figure."""
    yield repr(value)
    for digits in (3, 4):
        yield f"{value:.{digits}f}"
        yield f"{value:.{digits}g}"
    yield f"{100 * value:.1f} %"


def contents(folder: Path, names: tuple[str, ...]) -> str:
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def marks() -> list[str]:
    figures = [text for value in FIGURES for text in written_as(value)]
    pictures = [address.partition(",")[2] for address in (samples.CHEQUERED, samples.GREY)]
    return [*TEXTS, *figures, str(SIZE), f"{SIZE:,}", *pictures, HOME, "adalovelace"]


def test_no_private_figure_text_or_picture_stands_in_a_public_file(tmp_path: Path) -> None:
    write(planted(), tmp_path)
    public, internal = contents(tmp_path, PUBLIC), contents(tmp_path, INTERNAL)
    assert [mark for mark in marks() if mark in public] == []
    unseen = [mark for mark in (*TEXTS, *map(repr, FIGURES), str(SIZE)) if mark not in internal]
    assert unseen == []  # the marks are where they belong, so that looking for them means something


def test_a_public_file_still_says_who_attacked_and_how_it_ended(tmp_path: Path) -> None:
    write(planted(), tmp_path)
    finding = json.loads((tmp_path / "report.json").read_text())["audit"]["findings"][0]
    assert (finding["verdict"], finding["attack"], finding["score"]) == ("leaked", "position_text", None)
    for name in ("report.html", "details.html"):
        assert "position_text" in (tmp_path / name).read_text()
        assert "notes.csv" in contents(tmp_path, PUBLIC)


def test_internal_files_say_what_they_are(tmp_path: Path) -> None:
    write(planted(), tmp_path)
    assert "INTERNAL: " in (tmp_path / "internal.html").read_text()
    assert json.loads((tmp_path / "internal.json").read_text())["view"] == "internal"
    assert json.loads((tmp_path / "report.json").read_text())["view"] == "public"
    assert "INTERNAL: " not in contents(tmp_path, PUBLIC)


def test_owners_are_not_named_where_taking_part_is_protected() -> None:
    unit = dataclasses.replace(planted().statements[0], unit="client", adjacency="zero out one client")
    assert released(dataclasses.replace(planted(), statements=(unit,))).owners == ()
    assert released(planted()).owners == ("Mercy",)


def test_figures_that_the_ledger_paid_for_stay() -> None:
    assert released(samples.private()).clients == ()
    paid = samples.private(clients_source="charged release")
    assert released(paid).clients == paid.clients


def test_the_audit_of_one_update_is_split_the_same_way(tmp_path: Path) -> None:
    audit = planted().audit
    assert audit is not None
    page = write_audit(audit, tmp_path / "out", name="seen", notes=("'module.' was taken off",))
    assert page.name == "report.html"
    assert "module." in page.read_text()
    public = contents(tmp_path / "out", ("report.html", "report.json"))
    assert [mark for mark in marks() if mark in public] == []
    internal = contents(tmp_path / "out", INTERNAL)
    assert TEXTS[0].split()[0] in internal
    assert TEXTS[1].split()[0] in internal
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["internal_position_text_1_recovered.png", "internal_position_text_1_truth.png"]


LABELS = ("up", "down")
OWNERS = {"Alderby": 617, "Birkdale": 643, "Corfe": 659}
RUN_FILE = """
format = 1
name = "planted"
seed = 7
[task]
kind = "text_classification"
data = "notes.csv"
text_column = "text"
label_column = "label"
class_names = ["down", "up"]
clients = 3
split = { kind = "natural", column = "owner" }
max_length = 16
evaluation_examples = 50
validation = "hold_out"
[model]
name = "builtin:tiny-bert"
trainable = { kind = "full" }
[federation]
rounds = 1
cohort = 3
lifecycle = { kind = "finetune", local_steps = 1, batch_size = 4, learning_rate = 0.05 }
[privacy]
ledger = "run"
unit = "none"
reason = "to be read back"
[protection]
kind = "none"
[audit]
observers = ["public", "server"]
attacks = ["position_text", "llg"]
[document]
controller = "Three Wards"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on rows with marks in them, undefended and attacked."""
    place = tmp_path_factory.mktemp("planted")
    source = random.Random(1)
    words = [
        "patient",
        "doctor",
        "hospital",
        "night",
        "water",
        "heart",
        "blood",
        "pain",
        "cold",
        "long",
        "day",
        "home",
        "work",
    ]
    rows = [
        ",".join((f"{' '.join(source.choices(words, k=3))} {owner}{number}", source.choice(LABELS), owner))
        for owner, count in OWNERS.items()
        for number in range(count)
    ]
    (place / "notes.csv").write_text("text,label,owner\n" + "\n".join(rows) + "\n")
    (place / "run.toml").write_text(RUN_FILE)
    outcome = call("run", "run.toml", cwd=place)
    assert outcome.returncode == 0, outcome.stderr
    return place / "runs" / "planted"


def test_a_real_run_leaves_nothing_private_in_its_public_files(run: Path) -> None:
    summary = read(run)
    public = contents(run, (*PUBLIC, "adapter/README.md"))
    assert summary.view == "internal"
    assert summary.audit is not None
    pairs = [pair for finding in summary.audit.findings for pair in finding.pairs]
    assert pairs
    assert all(pair.truth not in public for pair in pairs)
    for owner in summary.clients:
        assert owner.client in OWNERS
        assert not re.search(rf"(?<![0-9a-f.,]){owner.examples}(?![0-9a-f.,])", public), owner
    scores = [item.score for item in summary.audit.findings if item.score is not None]
    fine = [repr(value) for value in scores if len(repr(value)) > 8]
    assert scores
    assert all(text not in public for text in fine)
    assert str(run.parent.parent) not in public


def test_a_real_run_names_its_owners_and_its_controller(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert all(owner in page for owner in OWNERS)
    assert "Three Wards" in page


def test_the_people_behind_a_finished_run_may_change(run: Path) -> None:
    place = run.parent.parent
    text = (place / "run.toml").read_text().replace("Three Wards", "Four Wards")
    (place / "run.toml").write_text(text)
    outcome = call("run", "run.toml", cwd=place)
    assert outcome.returncode == 0, outcome.stderr
    assert "Four Wards" in (run / "report.html").read_text()
    assert read(run).audit is not None


def test_report_writes_what_may_leave_and_internal_on_demand(run: Path) -> None:
    (run / "internal.html").unlink()
    (run / "report.html").unlink()
    outcome = call("report", str(run), "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert {Path(path).name for path in json.loads(outcome.stdout)["files"]} == set(PUBLIC)
    assert not (run / "internal.html").exists()
    outcome = call("report", str(run), "--internal")
    assert "INTERNAL" in outcome.stdout
    assert (run / "internal.html").exists()


def test_a_folder_without_its_internal_file_has_nothing_internal_to_show(run: Path, tmp_path: Path) -> None:
    for name in ("run.toml", "report.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert call("report", str(tmp_path)).returncode == 0
    outcome = call("report", str(tmp_path), "--internal")
    assert outcome.returncode == 5
    assert "only what was released" in outcome.stderr
