"""Tables of the run file that stand for themselves: stages, what is sent of an update, what stays at home,
what is evaluated on, how fast it goes, who answers for a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffm_secure.config.schema import option
from ffm_secure.registry import COMPRESSIONS, PERSONAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """When rows arrive: in stages, one after the other, each learned from while the earlier ones are gone."""

    column: str = option(
        "", help="column that says when a row arrives: a domain, a month, the class itself; it stays at home"
    )
    order: tuple[str, ...] = option(
        (),
        help="its values in the order of the stages, declared public; several of one stage with | between. "
        "A row of no declared value is never read",
    )
    replay: float = option(
        0.0,
        minimum=0.0,
        below=1.0,
        help="share of every stage's rows that stay in a reservoir at home and are learned from in all later "
        "stages; which ones, the rows decide",
    )
    replay_rate: float = option(
        1.0,
        above=0.0,
        maximum=100.0,
        help="how often a step draws a row of the reservoir, as a multiple of a new row",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """Which public texts private records vote on, and how many of them a run keeps."""

    candidates: str = option(
        "",
        help="public file of candidate texts (.csv, .tsv, .jsonl, .parquet), or builtin:<name>; nobody who "
        "made or chose them may have looked at a private row",
    )
    nearest: int = option(
        1, minimum=1, maximum=16, help="candidates that every record votes for; the bound is its square root"
    )
    keep: int = option(
        100,
        minimum=1,
        maximum=100_000,
        help="candidates kept in all, dealt to the classes by released counts",
    )
    asked: int = option(
        0,
        minimum=0,
        maximum=100_000,
        help="candidates asked about at once; 0: all. With fewer, every later question asks about those kept "
        "and their neighbours among the rest",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What is sent of an update, decided before it is bounded, noised and protected."""

    kind: str = option("none", choices=COMPRESSIONS)
    share: float = option(
        0.25, above=0.0, maximum=1.0, help="of its numbers that is sent", only_for=("support", "projection")
    )
    by_lot: float = option(
        0.2,
        minimum=0.0,
        maximum=1.0,
        help="of the support, how much is drawn anew every round; the rest are the numbers that opened sums "
        "moved furthest",
        only_for=("support",),
    )
    basis: str = option(
        "fixed",
        choices=("fixed", "fresh"),
        help="fixed: the model moves in one random subspace; fresh: another one every round",
        only_for=("projection",),
    )
    residual: bool = option(
        False,
        help="what was not sent stays at home and is added to the site's next update",
        only_for=("support", "projection"),
    )
    field_bits: int = option(
        0,
        choices=(0, 16, 24, 32),
        help="bits of one number on the wire: the grid is as fine as a sum of the cohort allows there; 0: as "
        "many as protection.value_bits needs",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """A model of each owner's own, made at home from the last shared one; nothing of it leaves."""

    kind: str = option("none", choices=PERSONAL)
    steps: int = option(
        0, minimum=0, maximum=1_000_000, help="at home, after the last round; a model without federation too"
    )
    batch_size: int = option(0, minimum=0, maximum=1_000_000)
    learning_rate: float = option(0.0, minimum=0.0, maximum=1e3)
    pull: float = option(
        0.0,
        minimum=0.0,
        maximum=1e6,
        help="how strongly the own model is drawn to the shared one",
        only_for=("mean_regularised",),
    )
    tested: float = option(
        0.2,
        above=0.0,
        below=1.0,
        help="share of the owner's rows that own models are compared on, not made from; unread where rows "
        "are held back",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the last model is evaluated on: public rows alone, or private rows that are never learned from."""

    rows: str = option(
        "public",
        choices=("public", "held_back"),
        help="held_back: counts of private rows are released once, with noise",
    )
    share: float = option(0.1, above=0.0, below=1.0, help="of each owner's rows that is held back")
    epsilon: float = option(
        0.0, minimum=0.0, maximum=1e6, help="of the rows held back, whose account is their own"
    )
    group_column: str = option("", help="column of the groups to compare; it stays with its owner")
    groups: tuple[str, ...] = option((), help="the groups, declared public")
    by_owner: bool = option(
        False, help="count by owner too, so that the worst one is known, with its interval"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What cannot change epsilon."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1, mps")
    workers: int = option(1, minimum=1, maximum=256)
    microbatch: int = option(64, minimum=1, help="examples whose gradients are held at once")
    threads: int = option(0, minimum=0, help="torch threads; 0: leave as is")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the report says of the people behind a run; nothing is computed from it."""

    controller: str = option("", help="who answers for the processing")
    purpose: str = option("", help="what the model is for")
    contact: str = option(
        "", help="whom a person may ask, for instance an address of the data protection officer"
    )
    legal_basis: str = option("", help="why the rows may be used, for instance the article of a law")
