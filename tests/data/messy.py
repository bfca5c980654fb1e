"""A table as three hospitals would hand it over:
everything that goes wrong in real files, at once and on purpose.
"""

from __future__ import annotations

import random
from pathlib import Path

SIGNS = {
    "Cardiology": (
        "chest pain on exertion|palpitations at night|swollen ankles|raised blood pressure|irregular pulse"
    ),
    "Dermatology": (
        "itching rash on the arms|dry skin on hands|a mole that changed colour|red patches|acne on the back"
    ),
    "Pulmonology": (
        "cough with phlegm|wheezing at night|asthma since childhood|inhaler used daily|smoker for years"
    ),
}
OWNERS = ("Mercy", "Northside", "")


def write_messy_csv(path: Path, *, rows: int = 600, seed: int = 5) -> None:
    """Write a table with semicolons, a byte order mark, two encodings, blanks, repeats,
    odd spellings and a blank owner.
    """
    dice = random.Random(seed)
    lines = ["Note;Specialty;Hospital".encode("utf-8-sig")]
    for row in range(rows):
        specialty = list(SIGNS)[row % 3]
        signs = ", ".join(dice.sample(SIGNS[specialty].split("|"), 3))
        note = f'"{signs}; visit {row} of Frau Müller"' if dice.random() > 0.02 else ""
        label = dice.choice((specialty,) * 8 + (specialty.lower(), specialty.upper() + " "))
        label = label if dice.random() > 0.02 else ""
        owner = dice.choices(OWNERS, weights=(50, 45, 5))[0]
        encoding = "cp1252" if owner == "Northside" else "utf-8"  # Northside exports from an old system
        lines.append(f"{note};{label};{owner}".encode(encoding))
    lines += lines[1:16]
    path.write_bytes(b"\r\n".join(lines) + b"\r\n")
