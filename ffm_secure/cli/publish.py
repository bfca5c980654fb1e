"""The command `publish`: push the exported model of a finished run to a hub, when somebody asks for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ffm_secure.display.console import say
from ffm_secure.errors import ConfigError, StoreError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What an export consists of; anything else in its folder was put there by somebody, and stays.
_NAMES = re.compile(r"(README\.md|LICENSE|[\w.-]+\.(json|safetensors|txt|model|jinja))", re.ASCII)
_FOLDERS = (".", "base", "model")


class Hub(Protocol):
    """What is asked of a hub: the two calls of `huggingface_hub.HfApi` that make a repository and fill it."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Make a repository, or find it there."""

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> object:
        """Put some files of a folder into a repository."""


def publish(
    folder: Path, *, repo: str, public: bool, dry_run: bool, json: bool, hub: Hub | None = None
) -> None:
    """Push what a run exported, or only list it with `dry_run`.

    Guarantee: nothing outside the run's `adapter/` is read, and no file of it that an export does not write
    is sent. A repository is made private unless `public`.
    Raises:
      ConfigError: the name is none of a repository.
      StoreError: the run has no export, or the hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError("publish", [f"--repo = {repo!r}: must be OWNER/NAME, as the hub has it"])
    exported = folder / "adapter"
    if not (exported / "export.json").is_file():
        raise StoreError(f"{folder}: has no exported model yet; finish the run first (ffm-secure run)")
    names = files_of(exported)
    if not dry_run:
        _push(hub or _real_hub(), exported, names, repo=repo, public=public)
    size = sum((exported / name).stat().st_size for name in names)
    what, seen_by = "sent", "private"
    if dry_run:
        what = "would send"
    if public:
        seen_by = "public"
    line = f"{what} {len(names)} files, {size:,} bytes, to {repo} ({seen_by})"
    say({"repo": repo, "files": names, "bytes": size, "sent": not dry_run}, [line, *names], json=json)


def files_of(exported: Path) -> list[str]:
    """List what an export consists of, in order; links are left out."""
    names = []
    for path in sorted(exported.rglob("*")):
        inside = path.relative_to(exported)
        parent = inside.parent.as_posix()
        plain = path.is_file() and not path.is_symlink() and not path.parent.is_symlink()
        if plain and parent in _FOLDERS and _NAMES.fullmatch(path.name):
            names.append(inside.as_posix())
    return names


def _push(hub: Hub, exported: Path, names: Sequence[str], *, repo: str, public: bool) -> None:
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=repo,
            folder_path=str(exported),
            allow_patterns=list(names),
            commit_message="Publish an exported model of ffm-secure",
        )
    except Exception as error:  # whatever a network or a hub answers is one error of ours
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise StoreError(
            f"{repo}: the hub did not take it ({type(error).__name__}: {reason}); log in with `hf auth "
            "login`, and check name and network; --dry-run lists what would be sent"
        ) from None


def _real_hub() -> Hub:
    import huggingface_hub

    return huggingface_hub.HfApi()
