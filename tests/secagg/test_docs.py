"""The documented example runs as written."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_example_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "secagg.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "docs/secagg.md", "exec"), {})  # noqa: S102
