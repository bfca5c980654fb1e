"""Write the page of results from what the benchmark of attacks printed.

    python -m benchmarks.attacks_page OUTPUT [OUTPUT ...] > docs/results/attacks.md

Each file holds what one run printed; its last line is the JSON object. Parts of later files replace those of
earlier ones; the cells of several shares of the table are put together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDEST = 8  # the largest batch with a column of its own
PARTS = ("side_by_side", "span", "conformance", "cells")


def main() -> None:
    """Read the outputs and print the page."""
    measured: dict[str, Any] = {}
    for name in sys.argv[1:]:
        more = json.loads(Path(name).read_text(encoding="utf-8").strip().splitlines()[-1])
        measured |= more | {"cells": [*measured.get("cells", []), *more.get("cells", [])]}
    print("\n".join(page(measured)))


def page(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the page, one section for each part that was run."""
    yield "# What the attacks read: tables"
    yield ""
    yield (
        f"Measured with Python {measured['python']} and torch {measured['torch']} on one "
        f"{measured['machine']} core; seconds are CPU seconds of"
    )
    yield (
        "the process. Written by `python -m benchmarks.attacks_page` from what `python -m "
        "benchmarks.attacks` printed."
    )
    sections = {"side_by_side": _peer, "span": _span, "conformance": _conformance, "cells": _table}
    for part in PARTS:
        if measured.get(part):
            yield ""
            yield from sections[part](measured[part])


def _rows(head: str, rows: Iterator[str]) -> Iterator[str]:
    yield head
    yield "|" + "---|" * (head.count("|") - 1)
    yield from rows


def _peer(measured: dict[str, Any]) -> Iterator[str]:
    rows, lines = measured["cases"], measured["summary"]
    good = sum(row["ours"]["psnr"] >= row["peer"]["psnr"] for row in rows)
    quick = sum(row["ours"]["seconds"] <= row["peer"]["seconds"] for row in rows)
    ratio = sum(row["ours"]["seconds"] for row in rows) / sum(row["peer"]["seconds"] for row in rows)
    surplus = sum(row["ours"]["psnr"] - row["peer"]["psnr"] for row in rows) / len(rows)
    yield "## Inverting gradients beside breaching 0.1.2"
    yield ""
    yield (
        f"On {len(rows)} gradients of one ReLU network (three convolutions, batches "
        "of 1, 2 and 4 natural crops of"
    )
    yield (
        f"8 x 8 to 32 x 32) ours was at least as good in PSNR on {good} and took no more CPU time on "
        f"{quick}; on the mean it is {surplus:.1f} dB"
    )
    yield (
        f"better at {ratio:.2f} times the CPU seconds. Both know labels and shape. breaching runs "
        f"{measured['iterations']} iterations with its recommended"
    )
    yield f"settings for this attack, ours {measured['our_iterations']}; its recommended number is 24,000."
    yield ""
    head = "| batch | side | breaching dB | s | ours dB | s | as good | no slower |"
    yield from _rows(
        head,
        (
            (
                f"| {line['batch']} | {line['side']} | {line['peer_psnr']:.2f} | "
                f"{line['peer_seconds']:.2f} | {line['ours_psnr']:.2f} | {line['ours_seconds']:.2f} | "
                f"{line['as_good']}/{line['of']} | {line['no_slower']}/{line['of']} |"
            )
            for line in lines
        ),
    )
    yield ""
    yield (
        "`python -m benchmarks.attacks --only-peer --peer PYTHON`, PYTHON being the interpreter of an "
        "environment with torch 2.13 and"
    )
    yield (
        f"breaching 0.1.2; seeds 0 to {max(row['seed'] for row in rows)}. The settings of ours were "
        "chosen on other seeds,"
    )
    yield "its number of iterations after times seen on some of these."


def _span(measured: dict[str, Any]) -> Iterator[str]:
    cases = measured["cases"]
    yield "## Tokens by the span check, published and ours"
    yield ""
    same, faster, of = measured["same_tokens"], measured["faster"], measured["of"]
    yield (
        "Random sentences of 16 tokens, GPT-2 with a vocabulary of 10,000 and width 256 "
        f"({measured['reference']}). Every true token at its"
    )
    yield (
        f"place and no other was found by both in {same} of {of} runs; ours took "
        f"less CPU time in {faster} of {of}."
    )
    yield ""
    head = "| update | batch | true tokens | published: exact | s | ours: exact | s |"
    yield from _rows(head, _span_rows(cases))
    yield ""
    yield (
        "`python -m benchmarks.attacks --parts span [--span-peer FOLDER]`; seeds 0 to "
        f"{max(row['seed'] for row in cases)}, the order alternates."
    )


def _span_rows(cases: list[dict[str, Any]]) -> Iterator[str]:
    for update, batch in dict.fromkeys((row["update"], row["batch"]) for row in cases):
        own = [row for row in cases if (row["update"], row["batch"]) == (update, batch)]
        cells = [
            (
                f"{sum(row[who]['right'] for row in own)}/{len(own)} | "
                f"{sum(row[who]['seconds'] for row in own) / len(own):.3f}"
            )
            for who in ("published", "ours")
        ]
        yield f"| {update} | {batch} | {own[0]['true']} | {cells[0]} | {cells[1]} |"


def _conformance(lines: list[dict[str, Any]]) -> Iterator[str]:
    held = [line for line in lines if line["reference"] != "none"]
    inside = sum(line["within"] for line in held)
    yield "## Known figures, repeated"
    yield ""
    yield (
        f"{inside} of {len(held)} figures fall into their range; lines without a reference are no "
        "comparison. A range is exact where theory is,"
    )
    yield (
        "the 99 % interval of the reference where that is a count or an AUC, and 4 dB "
        "either way for a PSNR under noise."
    )
    yield ""
    head = "| attack | setting | unit | reference | range | here | within | runs | s |"
    yield from _rows(
        head,
        (
            (
                f"| `{line['attack']}` | {line['setting']} | {line['unit']} | {line['reference']} | "
                f"{line['low']:.3g} to {line['high']:.3g} | {line['measured']:.3f} | "
                f"{'' if line['reference'] == 'none' else 'yes' if line['within'] else '**no**'} | "
                f"{line['runs']} | {line['seconds']:.1f} |"
            )
            for line in lines
        ),
    )
    yield ""
    yield "`python -m benchmarks.attacks --parts conformance`."


def _table(cells: list[dict[str, Any]]) -> Iterator[str]:
    scored = [cell for cell in cells if cell["score"] is not None]
    noised = [cell for cell in scored if "noised" in cell["update"]]
    labels = [cell for cell in noised if cell["measure"].startswith("label")]
    won, runs = _won([cell for cell in noised if cell not in labels])
    lucky, undecided = _won(labels)
    yield "## Attack, update type, batch size"
    yield ""
    yield (
        f"{len(cells)} cells, {len(cells) - len(scored)} of them not applicable or without a result. "
        "Under noise of multiplier 1 on the clipped"
    )
    yield (
        f"update {won} of {runs} runs that read data or membership beat guessing clearly, and {lucky} "
        f"of {undecided} that count labels: guessing wins there"
    )
    yield (
        "often, too, with few records of few classes. A cell is the mean score with its 95 % bootstrap "
        "interval over seeds, (guessing),"
    )
    yield (
        "runs that beat guessing clearly, CPU seconds; a dash means that the attack does not apply or "
        "found nothing it would state."
    )
    batches = [batch for batch in sorted({cell["batch"] for cell in cells}) if batch <= WIDEST]
    cells = [cell if cell["batch"] in batches else _aside(cell) for cell in cells]
    yield ""
    head = "| attack | model and data | update | measure |" + "".join(
        f" batch {batch} |" for batch in (*batches, "as told")
    )
    yield from _rows(head, _table_rows(cells, batches))
    yield ""
    yield (
        "`python -m benchmarks.attacks --parts table --assets ../shared`; `--quick` for closed forms "
        "on models built in code."
    )


def _won(cells: list[dict[str, Any]]) -> tuple[int, int]:
    """Count the runs that succeeded, and all runs."""
    pairs = [tuple(map(int, cell["succeeded"].split("/"))) for cell in cells]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _aside(cell: dict[str, Any]) -> dict[str, Any]:
    """Tell a batch that has no column of its own in the update."""
    return cell | {"update": f"{cell['update']}, {cell['batch']}", "batch": 0}


def _table_rows(cells: list[dict[str, Any]], batches: list[int]) -> Iterator[str]:
    batches = [*batches, 0]
    ordered = sorted(cells, key=lambda cell: cell["attack"])
    keys = dict.fromkeys((cell["attack"], cell["model"], cell["update"]) for cell in ordered)
    for attack, model, update in keys:
        own = {
            cell["batch"]: cell
            for cell in cells
            if (cell["attack"], cell["model"], cell["update"]) == (attack, model, update)
        }
        measure = next((cell["measure"] for cell in own.values() if cell["measure"]), "")
        shown = "".join(f" {_cell(own.get(batch))} |" for batch in batches)
        yield f"| `{attack}` | {model} | {update} | {measure} |{shown}"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["score"] is None:
        return "-"
    digits = 1 if cell["measure"].startswith("PSNR") else 2
    numbers = [f"{cell[key]:.{digits}f}" for key in ("score", "low", "high", "guessing")]
    return (
        f"{numbers[0]} [{numbers[1]}, {numbers[2]}] ({numbers[3]}), {cell['succeeded']}, "
        f"{cell['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
