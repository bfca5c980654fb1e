"""What an operator does, on a machine that needs no network."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from defenses.random_source import RandomSource
from ffm_secure.cli import operator_desk
from ffm_secure.display.console import clear_errors, print_lines
from ffm_secure.cli.machine_engines import enrolment
from ffm_secure.errors import StoreError
from ffm_secure.cli.operator_desk import COORDINATOR, ROSTER, OperatorDesk
from ffm_secure.storage.durable import write_atomic
from ffm_secure.transport.roster import key_words
from ffm_secure.record_codec import read_regular


def init(folder: Path, federation: str) -> None:
    """Make the operator's key and root certificate."""
    with clear_errors():
        engine = enrolment()  # before anything is made: it may not be installed
        desk = operator_desk.create(folder, federation, RandomSource.system())
        engine.create_authority(folder, federation, now=datetime.datetime.now(datetime.UTC))
        key = key_words(desk.key().public_key)
    print_lines(
        [
            f"operator of {federation}: keep {folder} offline, and a copy of it in a safe",
            "tell every site and the coordinator this key, by telephone or on paper:",
            f"  {key}",
        ]
    )


def add(folder: Path, name: str, key: str) -> None:
    """Put somebody on the list."""
    with clear_errors():
        desk = OperatorDesk(place=folder)
        before = desk.keys().get(name)
        members = desk.add(name, key)
    known = ", ".join(member.name for member in members.sites) or "none"
    there = "with" if members.coordinator else "without"
    print_lines(
        [
            *_changed(name, before, key),
            f"sites: {known}; {there} a coordinator",
            f"when all are there: ffm-secure operator roster sign {folder}",
        ]
    )


def _changed(name: str, before: bytes | None, key: str) -> list[str]:
    """Say that somebody known has another key now."""
    if before is None or key_words(before) == key:
        return []
    return [
        f"{name}: its new key takes the place of {key_words(before)}; be sure that the line came from "
        f"{name}, by telephone or on paper. The old key is out once everybody has the next roster"
    ]


def revoke(folder: Path, name: str) -> None:
    """Take a site off the list."""
    with clear_errors():
        members = OperatorDesk(place=folder).remove(name)
    known = ", ".join(member.name for member in members.sites) or "none"
    print_lines(
        [
            f"sites: {known}; {name} is out once everybody has the next roster",
            f"now: ffm-secure operator roster sign {folder}, and hand {ROSTER} to everybody",
            "a run among the sites left needs a run file of its own, with task.clients changed",
        ]
    )


def sign(folder: Path, days: float) -> None:
    """Sign the list."""
    with clear_errors():
        roster = OperatorDesk(place=folder).sign(now=time.time(), days=days)
    ends = time.strftime("%Y-%m-%d", time.gmtime(roster.statement.expires))
    print_lines(
        [
            f"roster {roster.statement.serial} of {roster.statement.federation}, good until {ends}: "
            f"{', '.join(roster.names)}",
            f"hand {folder / ROSTER} to the coordinator and to every site: it goes into their folders",
        ]
    )


def approve(folder: Path, request: Path) -> None:
    """Sign the certificates somebody asked for."""
    with clear_errors():
        desk = OperatorDesk(place=folder)
        try:
            asked = read_regular(request)
        except OSError as error:
            raise StoreError(f"{request}: cannot be read: {error.strerror}") from None
        name, approved = enrolment().approve(
            folder,
            asked,
            keys=desk.keys(),
            sign=desk.key().sign,
            now=datetime.datetime.now(datetime.UTC),
        )
        path = folder / f"approval-{name}.json"
        write_atomic(path, approved)
    whose = "coordinator" if name == COORDINATOR else "site"
    print_lines([f"{path}: hand it to {name}, who runs: ffm-secure {whose} enrol FOLDER {path.name}"])
