"""`publish` sends the files of an export, to nobody unless asked, and nothing else of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ffm_secure.cli.app import app
from ffm_secure.cli.publish import files_of, publish
from ffm_secure.errors import ConfigError, StoreError

EXPORT = ("README.md", "export.json", "adapter_config.json", "adapter_model.safetensors", "base/config.json")
STRANGE = ("rows.csv", ".secret.json.swp", "notes/rows.json", ".base/rows.json", "base/rows.parquet")


class FolderHub:
    """A hub that is a folder of this disk."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.place / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.place / repo_id / "visible").write_text("to few" if private else "to all")

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> None:
        assert commit_message
        for name in allow_patterns:
            target = self.place / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder_path, name), target)


class ClosedHub(FolderHub):
    """A hub that knows nobody."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        raise PermissionError("401\nlog in")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in (*EXPORT, *STRANGE):
        path = tmp_path / "run" / "adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "run" / "run.toml").write_text("secret")
    (tmp_path / "run" / "adapter" / "link.json").symlink_to(tmp_path / "run" / "run.toml")
    return tmp_path / "run"


@pytest.mark.parametrize("public", [False, True])
def test_the_files_of_an_export_arrive_and_nothing_else(run: Path, tmp_path: Path, public: bool) -> None:
    publish(
        run, repo="clinic/notes", public=public, dry_run=False, json=True, hub=FolderHub(tmp_path / "hub")
    )
    arrived = tmp_path / "hub" / "clinic" / "notes"
    names = {path.relative_to(arrived).as_posix() for path in arrived.rglob("*") if path.is_file()}
    assert names == {*EXPORT, "visible"}
    assert (arrived / "visible").read_text() == ("to all" if public else "to few")


def test_a_dry_run_lists_and_sends_nothing(run: Path) -> None:
    done = CliRunner().invoke(app, ["publish", str(run), "--repo", "clinic/notes", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["files"] == sorted(EXPORT) == files_of(run / "adapter")
    assert told["sent"] is False


@pytest.mark.parametrize("repo", ["notes", "a/b/c", "../up/x", "https://hub/a/b", ""])
def test_what_is_no_repository_is_refused(run: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="must be OWNER/NAME"):
        publish(run, repo=repo, public=False, dry_run=False, json=True, hub=FolderHub(run))


def test_a_hub_that_refuses_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"did not take it \(PermissionError: 401\); log in"):
        publish(run, repo="a/b", public=False, dry_run=False, json=True, hub=ClosedHub(tmp_path))
    (run / "adapter" / "export.json").unlink()
    with pytest.raises(StoreError, match="finish the run first"):
        publish(run, repo="a/b", public=False, dry_run=False, json=True, hub=FolderHub(tmp_path))
