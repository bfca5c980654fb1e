"""Certified files: each under its name, with its digest, and none reached through a link."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

from ffm_secure.certificate.check import Check, Materials, refused
from ffm_secure.certificate.contents import is_base
from ffm_secure.certificate.statement import FILE, MODEL, TENSORS, Statement
from ffm_secure.storage.durable import LARGEST_DIGESTED, too_large

READABLE = "statement.json"  # beside a certificate: what is signed, for people
_MOST_TOGETHER = 4 * LARGEST_DIGESTED  # bytes of all files of one certificate
_ABSENT, _NO_FILE = "is missing", "is no file of its own: a link, a folder or a device"


def check_files(
    statement: Statement, payload: bytes, materials: Materials, not_given: list[str]
) -> list[Check]:
    """Hash every certified file that is at hand; name the others in `not_given`."""
    checks, absent, left = [], [], _MOST_TOGETHER
    for subject in statement.subjects:
        if is_base(subject):
            not_given.append(
                f"{subject.name}: no file of the run; whoever loads it compares its tensors with "
                f"{subject.digest[TENSORS][:16]}..."
            )
            continue
        place = _place(subject.name, materials)
        if place is None:
            absent.append(subject.name)
            continue
        check, size = _file(subject.name, subject.digest.get(FILE, ""), *place, most=left)
        checks.append(check)
        left -= size
    if absent:
        not_given.append(f"{len(absent)} certified files, {absent[0]} among them (--files or --model)")
    return [*checks, *_surplus(statement, materials), *_readable(payload, materials)]


def has_certified_files(folder: Path) -> bool:
    """Tell whether a folder looks like one of certified files: what lies beside a certificate is checked."""
    names = (MODEL, "report.json", "report.html", "ledger.csv", READABLE)
    return any(os.path.lexists(folder / name) for name in names)


def _place(name: str, materials: Materials) -> tuple[Path, str] | None:
    """Return the folder somebody named, and the path below it."""
    inside = name.removeprefix(f"{MODEL}/")
    if materials.model is not None and inside != name:
        return materials.model, inside
    return (materials.folder, name) if materials.folder is not None else None


def _file(
    name: str, stated: str, folder: Path, inside: str, *, most: int = LARGEST_DIGESTED
) -> tuple[Check, int]:
    """Return whether a file is the one stated, and how many bytes were read for that."""
    digest, problem, size = _digest(folder, inside, most)
    if not problem and digest != stated:
        problem = "was changed"
    return Check(claim=name, holds=not problem, detail=problem or "unchanged"), size


def _digest(folder: Path, inside: str, most: int) -> tuple[str, str, int]:
    """Return the SHA-256 of a regular file below a folder, or what is wrong with it, and how many bytes were
    read; no link is followed.

    Guarantee: returns for a pipe, a device or a folder, too, and reads none of a file larger than any that is
    certified: one of terabytes that holds nothing takes no place on a disk, and hours to read.
    """
    parts = Path(inside).parts
    if not parts or Path(inside).is_absolute() or ".." in parts or "\0" in inside:
        return "", _NO_FILE, 0
    place = folder
    for part in parts[:-1]:
        place = place / part
        if place.is_symlink():
            return "", _NO_FILE, 0
    try:
        descriptor = os.open(place / parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return "", _ABSENT, 0
    except (OSError, ValueError):
        return "", _NO_FILE, 0
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):  # of a folder there is no file object at all
        os.close(descriptor)
        return "", _NO_FILE, 0
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > LARGEST_DIGESTED:
            return "", too_large(status.st_size), 0
        if status.st_size > most:
            return "", f"was not read: the files before it have {_MOST_TOGETHER - most:,} bytes already", 0
        return hashlib.file_digest(file, "sha256").hexdigest(), "", status.st_size


def _surplus(statement: Statement, materials: Materials) -> list[Check]:
    """Refuse what nobody has certified in the model's folder: a library may load it."""
    claim = "no other file in the model"
    model = materials.model or (materials.folder / MODEL if materials.folder is not None else None)
    if model is None:
        return []
    if materials.model is None and model.is_symlink():
        return [refused(claim, f"{MODEL} is a link")]
    known = {subject.name for subject in statement.subjects}
    foreign = []
    for folder, folders, files in os.walk(model):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for entry in (*links, *files):
            name = f"{MODEL}/{(Path(folder) / entry).relative_to(model).as_posix()}"
            if name not in known:
                foreign.append(name)
    if not foreign:
        return []
    return [refused(claim, f"{min(foreign)} is not certified")]


def _readable(payload: bytes, materials: Materials) -> list[Check]:
    """Hold the readable statement beside a certificate to what is signed."""
    folder = materials.folder
    if folder is None or not os.path.lexists(folder / READABLE):
        return []
    expected = hashlib.sha256(readable(payload)).hexdigest()
    check, _ = _file(READABLE, expected, folder, READABLE)
    return [check]


def readable(payload: bytes) -> bytes:
    """Write what is signed for people."""
    return json.dumps(json.loads(payload), indent=1, sort_keys=True).encode() + b"\n"
