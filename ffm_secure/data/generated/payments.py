"""`builtin:payments`: card payments of several banks, each one line of text, genuine or fraudulent.

Everything is drawn from a seed. Shops, towns and customers are invented. Fraud follows a few recipes, and
each bank meets its own mixture of them: what one bank knows of a recipe helps another that has rarely met it.
A share of the labels is wrong, as complaints and late discoveries make them, so no model can be perfect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.generated.options import SEED, Bounds, checked_options

OPTIONS: Mapping[str, Bounds] = {
    "banks": (6, 1, 64),
    "size": (6_000, 20, 500_000),
    "validation": (600, 1, 100_000),
    "fraud": (30, 1, 99),  # fraudulent payments, percent: far more than in life, so that few rows suffice
    "mistakes": (4, 0, 49),  # labels that are wrong, percent
    "seed": SEED,
}
LABELS = ("genuine", "fraud")

_SHOPS = ("market", "bakery", "pharmacy", "petrol station", "restaurant", "book shop", "school", "cinema")
_ONLINE = ("streaming", "clothes online", "train tickets", "games online", "news online")
_HOME_ENTRIES = ("chip and code at the till", "phone at the till", "card on file")
_DEVICES = ("known phone", "known computer", "known card")
_TOWNS = ("Aldermere", "Brackwater", "Corvale", "Dunhollow", "Eastmarch", "Fernwick")
_ABROAD = ("Quillon", "Ostravia", "Marenta", "Selvarra")

# goods, entry, device, place, hours, least and most units of money
_Recipe = tuple[Sequence[str], Sequence[str], Sequence[str], Sequence[str], tuple[int, int], tuple[int, int]]
_HABITS: tuple[_Recipe, ...] = (
    (_SHOPS, _HOME_ENTRIES[:2], _DEVICES[2:], _TOWNS, (7, 21), (2, 120)),
    (_ONLINE, _HOME_ENTRIES[2:], _DEVICES[:2], _TOWNS, (6, 23), (3, 200)),
    (("cash machine",), _HOME_ENTRIES[:1], _DEVICES[2:], _TOWNS, (8, 22), (20, 200)),
    (("hotel", "restaurant", "museum"), _HOME_ENTRIES[:1], _DEVICES[2:], _ABROAD, (8, 23), (10, 400)),
)
_TYPED_IN = ("number typed in",)
_FRAUDS: tuple[_Recipe, ...] = (
    (("gift cards", "game credit"), _TYPED_IN, ("new phone", "new computer"), _TOWNS, (0, 6), (50, 500)),
    (("cash machine",), ("stripe read",), ("copied card",), _ABROAD, (0, 5), (200, 900)),
    (("jewellery online", "phones online"), _TYPED_IN, ("new computer",), _ABROAD, (1, 23), (300, 2000)),
    (("donation", "streaming"), _TYPED_IN, ("new phone",), _ABROAD, (0, 23), (1, 3)),
    (("money transfer",), ("password changed",), ("new phone",), _TOWNS, (9, 20), (700, 4000)),
)


def payments(options: Mapping[str, int]) -> tuple[dict[str, object], dict[str, object], tuple[str, ...]]:
    """Write the train and the validation payments: columns text, label, bank, customer; and the label names.

    Guarantee: the same options give the same payments; no customer is in both parts. Banks differ in size, in
    their mixture of frauds and in how they write a line.
    """
    chosen = checked_options("payments", options, OPTIONS)
    rng = np.random.Generator(np.random.PCG64([chosen["seed"], 0xCA2D]))
    banks = chosen["banks"]
    shares = 1.0 / np.arange(2, banks + 2) ** 0.5
    mixtures = 0.8 * rng.dirichlet(np.full(len(_FRAUDS), 0.5), size=banks) + 0.2 / len(_FRAUDS)
    parts = []
    for rows, prefix in ((chosen["size"], "c"), (chosen["validation"], "v")):
        homes = rng.choice(banks, size=rows, p=shares / shares.sum())
        parts.append(_part(homes, mixtures, prefix, chosen, rng))
    return parts[0], parts[1], LABELS


def _part(
    homes: NDArray[np.int64],
    mixtures: NDArray[np.float64],
    prefix: str,
    chosen: Mapping[str, int],
    rng: np.random.Generator,
) -> dict[str, object]:
    fraudulent = rng.random(len(homes)) < chosen["fraud"] / 100
    texts, owners, customers = [], [], []
    for bank, fraud in zip(homes.tolist(), fraudulent.tolist(), strict=True):
        recipe = _HABITS[rng.integers(len(_HABITS))]
        if fraud:
            recipe = _FRAUDS[rng.choice(len(_FRAUDS), p=mixtures[bank])]
        texts.append(_line(recipe, bank, rng))
        owners.append(f"bank-{bank}")
        customers.append(f"{prefix}{bank}-{rng.integers(max(1, len(homes) // 8))}")
    mistaken = rng.random(len(homes)) < chosen["mistakes"] / 100
    labels = (fraudulent ^ mistaken).astype(np.int64)
    return {"text": texts, "label": labels, "bank": owners, "customer": customers}


def _line(recipe: _Recipe, bank: int, rng: np.random.Generator) -> str:
    goods, entries, devices, places, (first, last), (least, most) = recipe
    amount = float(np.exp(rng.uniform(np.log(least), np.log(most))))
    words = [
        _one_of(goods, rng),
        _one_of(entries, rng),
        _one_of(devices, rng),
        f"in {_one_of(places, rng)}",
        f"at {rng.integers(first, last + 1)} hours",
        f"{amount:.2f}",
    ]
    if bank % 2:  # every other bank begins with the sum
        words = words[::-1]
    return ", ".join(words)


def _one_of(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
