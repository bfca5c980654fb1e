"""The pages on one defence alone run from top to bottom and import nothing of the federation."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "alone").glob("*.md"))
BLOCK = re.compile(r"^```python\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return [match["body"] for match in BLOCK.finditer(page.read_text())]


def executed(page: Path) -> tuple[dict[str, object], list[str]]:
    """Run a page's blocks in order; return its names and the lines it printed."""
    names: dict[str, object] = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for body in blocks(page):
            exec(compile(body, page.name, "exec"), names)  # noqa: S102
    return names, shown.getvalue().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_needs_nothing_of_the_federation(page: Path, tmp_path: Path) -> None:
    script = "\n".join(blocks(page)) + "\nimport sys\nprint('ffm_secure' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "False"


def test_the_private_loop_learns_and_states_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its epsilon is that of 80 steps by another implementation, and the adapter tells the classes apart."""
    dp_accounting = pytest.importorskip("dp_accounting")
    monkeypatch.chdir(tmp_path)
    names, lines = executed(ROOT / "docs" / "alone" / "dp_sgd.md")
    accountant = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(step, 80)
    assert float(lines[-1]) == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
    model, words, labels = names["model"], names["words"], names["labels"]
    model.eval()  # type: ignore[attr-defined]
    right = model(words).logits.argmax(1) == labels  # type: ignore[operator]
    assert float(right.float().mean()) > 0.7  # chance is 0.5; the noise is real


def test_the_private_loop_is_ten_statements() -> None:
    body = blocks(ROOT / "docs" / "alone" / "dp_sgd.md")[1]
    statements = [node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.stmt)]
    assert len([node for node in statements if not isinstance(node, ast.ImportFrom)]) <= 10


def test_the_ledger_agrees_with_another_accountant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dp_accounting = pytest.importorskip("dp_accounting")
    monkeypatch.chdir(tmp_path)
    _, lines = executed(ROOT / "docs" / "alone" / "ledger.md")
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(0.8)), 500)
    assert float(lines[-1]) == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
