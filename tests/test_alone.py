"""The pages on one defence alone run from top to bottom and import nothing of the federation."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from defenses.dp import PrivateSteps, RecordMechanism
from defenses.errors import BudgetExceeded, NotPrivateError, ParameterError
from defenses.random_source import RandomSource
from defenses.secagg import pack

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


COSTLY = {"trainer", "audit", "dp_sgd"}  # load most of a model library anew; pages are executed below, too


def marked(page: Path) -> object:
    return pytest.param(page, marks=pytest.mark.slow) if page.stem in COSTLY else page


@pytest.mark.parametrize("page", [marked(page) for page in PAGES], ids=[page.stem for page in PAGES])
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


def test_every_page_has_a_test_of_what_it_shows() -> None:
    assert {page.stem for page in PAGES} == {"dp_sgd", "ledger", "secagg", "audit", "trainer"}


def test_a_loop_of_somebody_elses_takes_private_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's epsilon is that of its steps, its adapter learns, and its log holds no private loss."""
    dp_accounting = pytest.importorskip("dp_accounting")
    monkeypatch.chdir(tmp_path)
    names, lines = executed(ROOT / "docs" / "alone" / "trainer.md")
    accountant = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(step, 80)
    assert float(lines[-1]) == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
    model, words, labels = names["model"], names["words"], names["labels"]
    model.eval()  # type: ignore[attr-defined]
    right = model(words).logits.argmax(1) == labels  # type: ignore[operator]
    assert float(right.float().mean()) > 0.7  # chance is 0.5; the noise is real
    trainer: Any = names["trainer"]
    assert all(entry.get("loss", 0.0) == 0.0 for entry in trainer.state.log_history)
    assert trainer.event.steps == 80
    with pytest.raises(NotPrivateError, match="resumed"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(BudgetExceeded, match="all 80 steps"):
        trainer.training_step(model)


def test_settings_that_would_run_other_steps_are_refused_together() -> None:
    settings = SimpleNamespace(max_steps=81, gradient_accumulation_steps=2, n_gpu=2, world_size=1)

    class Loop:
        def __init__(self) -> None:
            self.args, self.model = settings, torch.nn.Linear(2, 2)

    class Private(PrivateSteps, Loop):
        pass

    mechanism = RecordMechanism(
        sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=3, steps=80
    )
    with pytest.raises(ParameterError) as refusal:
        Private(mechanism=mechanism)
    for words in ("max_steps = 81", "gradient_accumulation_steps = 2", "n_gpu"):
        assert words in str(refusal.value)


def test_the_gradient_of_a_step_is_the_noisy_mean_of_its_batch() -> None:
    """The mixin beside the definition: the same seed draws the same rows and noise by hand."""

    class Loop:
        def __init__(self, rows: list[tuple[torch.Tensor, torch.Tensor]], model: torch.nn.Module) -> None:
            self.args = SimpleNamespace(max_steps=5, gradient_accumulation_steps=1, n_gpu=0, world_size=1)
            self.model, self.train_dataset = model, rows

        def data_collator(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
            x, y = zip(*rows, strict=True)
            return {"x": torch.stack(x), "y": torch.stack(y)}

        def _prepare_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return batch

    class Private(PrivateSteps, Loop):
        pass

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch["x"]).squeeze(1) - batch["y"]) ** 2

    torch.manual_seed(0)
    model, rows = torch.nn.Linear(3, 1), [(torch.randn(3), torch.randn(())) for _ in range(20)]
    mechanism = RecordMechanism(
        sampling_rate=0.05, noise_multiplier=0.5, clip_norm=1.0, expected_batch_size=1, steps=5
    )
    loop = Private(rows, model, mechanism=mechanism, losses=losses, source=RandomSource.seeded(7))
    source, sizes = RandomSource.seeded(7), []
    for _ in range(5):
        loop.training_step(model)
        places = mechanism.sample(20, source)
        sizes.append(len(places))
        total = {
            name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()
        }
        for place in places:
            x, y = rows[int(place)]
            gradients = torch.autograd.grad((model(x).squeeze() - y) ** 2, list(model.parameters()))
            norm = torch.cat([one.flatten() for one in gradients]).norm()
            for (name, _), one in zip(model.named_parameters(), gradients, strict=True):
                total[name] += (one * min(1.0, 1.0 / float(norm))).double()
        for name, expected in mechanism.privatise(total, source).items():
            gradient = dict(model.named_parameters())[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-4, atol=1e-5)
    assert 0 in sizes  # an empty batch is a step of noise alone
    assert max(sizes) > 0


def test_a_sum_is_opened_over_a_transport_of_somebody_elses() -> None:
    """Five clients, one silent: the mean of four, and no message that holds a vector in the clear."""
    names, lines = executed(ROOT / "docs" / "alone" / "secagg.md")
    assert float(lines[-1]) < 1e-4
    assert len(names["there"]) == 4  # type: ignore[arg-type]
    updates: Any = names["updates"]
    carried: Any = names["carried"]
    uploads = [message for message in carried if len(message) > 1000]
    assert len(uploads) == 4
    for update in updates.values():
        clear = names["grid"].encode(update, source=RandomSource.system())  # type: ignore[attr-defined]
        packed = pack(clear, names["bits"])  # type: ignore[arg-type]
        for message in uploads:
            same = sum(left == right for left, right in zip(message[-len(packed) :], packed, strict=False))
            assert same < len(packed) / 32  # chance is one in 256


def test_an_update_of_somebody_elses_is_read_until_noise_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, lines = executed(ROOT / "docs" / "alone" / "audit.md")
    read, noisy = lines
    assert float(re.search(r"read back to (\S+);", read)[1]) < 1e-3  # type: ignore[index]
    assert float(re.search(r"off by (\S+);", noisy)[1]) > 0.5  # type: ignore[index]
