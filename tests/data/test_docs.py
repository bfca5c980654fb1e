"""The page about data runs."""

from __future__ import annotations

import re
from pathlib import Path

from ffm_secure.data.partition import SPLITS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_examples_of_the_page_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    exec("\n".join(blocks), {})  # noqa: S102 - our own page


def test_the_page_names_every_split_and_every_option():
    text = PAGE.read_text(encoding="utf-8")
    for kind, split in SPLITS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}`"))
        for option, default in split.defaults.items():
            assert f"`{option}`" in row
            assert not default or str(default).removesuffix(".0") in row
