"""A run that goes on beyond its last round: what it has behind it, and what is left of its budget for the
rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from defenses.dp import Event, Ledger
from ffm_secure.config.run_file import RunConfig
from ffm_secure.agreed.loaded_model import schedule_of, stored_noise
from ffm_secure.site.allowance import composed
from ffm_secure.site.ledger_place import ledger_path
from ffm_secure.storage.run_directory import Store, extends


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Hold what a run has done that is asked for more rounds than it was made for."""

    rounds: int  # done
    noise_multiplier: float  # of the rounds done
    charged: tuple[tuple[Event, int], ...]  # of the owner who has spent most in this run
    turns: int  # most often any one owner takes part in what is left
    spent: float  # epsilon

    @property
    def history(self) -> tuple[Event, ...]:
        """Return what that owner went through in this run, one event a round."""
        return tuple(event for event, count in self.charged for _ in range(count))

    def words(self, epsilon: float, noise_multiplier: float) -> str:
        """Say what was spent, and what is left at which noise."""
        left = max(0.0, epsilon - self.spent)
        return (
            f"goes on after round {self.rounds}: {self.spent:.4g} of {epsilon:g} spent at noise "
            f"{self.noise_multiplier:.3f} x clip, {left:.4g} left for the rest at noise "
            f"{noise_multiplier:.3f} x clip"
        )


def extension_of(config: RunConfig, folder: Path | None) -> Extension | None:
    """Return what the run in a folder has behind it, if the run file asks for more rounds; None otherwise."""
    if folder is None or not (folder / "run.toml").is_file():
        return None
    store = Store.read(folder)
    if not extends(store.config(), config):
        return None
    resumed = store.resume()
    if resumed is None:
        return None
    _, records, run_id = resumed
    finished = sum(record.phase == "private" for record in records)
    turns = Counter(client for cohort in schedule_of(config)[finished:] for client in cohort)
    charged = _charged(config, folder, run_id.hex())
    delta = config.privacy.delta or 1e-5
    return Extension(
        rounds=len(records),
        noise_multiplier=stored_noise(folder),
        charged=charged,
        turns=max(turns.values(), default=0),
        spent=composed(charged, delta) if config.privacy.unit != "none" else 0.0,
    )


def _charged(config: RunConfig, folder: Path, run: str) -> tuple[tuple[Event, int], ...]:
    """Return what the owner who has spent most in one run was charged for."""
    path = ledger_path(config.privacy, folder)
    if config.privacy.unit == "none" or path is None or not path.is_file():
        return ()
    with Ledger.open(path, create=False) as ledger:
        entries = ledger.entries()
        owners = set()
        for entry in entries:
            if entry.kind == "reserve" and entry.run == run:
                owners.add(entry.owner)
        charged = []
        for owner in sorted(owners):
            charged.append(ledger.charged(owner, run))
    return max(charged, key=lambda events: composed(events, config.privacy.delta), default=())
