"""One suite that every registered attack joins."""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import attacks
from attacks import Budget, Knowledge, Observation, Prior, not_applicable
from attacks.command import attack_table, description, main, run_one, taxonomy_table
from attacks.contract import Attack, Finding, Item, PlainAttack, Reconstruction
from attacks.inversion import active
from attacks.registry import ATTACKS, TAXONOMY, build
from tests.attacks import models

SMALL = Budget(steps=10_000, iterations=2, restarts=1)
ROOT = Path(attacks.__file__).parent


def text_case() -> tuple[Observation, torch.nn.Module, Prior, dict[str, torch.Tensor]]:
    model = models.bert(vocabulary=120, width=32, length=16)
    batch = {"input_ids": models.sentences(2, 5, 120), "labels": torch.tensor([0, 1])}
    knowledge = Knowledge(batch_size=2, labels=(0, 1), lengths=(5, 5), sequence_length=5, dropout=0.0)
    observation = models.observe(model, batch, models.text_loss, knowledge=knowledge)
    candidates = {"token_ids": models.sentences(4, 5, 120, seed=3), "labels": torch.tensor([0, 1, 0, 1])}
    prior = Prior(
        candidates=candidates,
        examples=candidates,
        reference_models=(models.bert(vocabulary=120, width=32, seed=5),),
        language_model=lambda tokens: torch.full((*tokens.shape, 120), 1 / 120).log(),
    )
    return observation, model, prior, batch


def image_case() -> tuple[Observation, torch.nn.Module, Prior, dict[str, torch.Tensor]]:
    model = models.vit(size=16, patch=8, width=32, layers=1)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"images": images[:1].clone(), "labels": torch.tensor([3])}
    knowledge = Knowledge(batch_size=1, labels=(3,), image_shape=(3, 16, 16), dropout=0.0)
    observation = models.observe(model, batch, models.image_loss, knowledge=knowledge)
    public = {"images": images, "labels": torch.tensor([3, 4])}
    return observation, model, Prior(candidates=public, examples=public, reference_models=(model,)), batch


def digits_case() -> tuple[Observation, torch.nn.Module, Prior, dict[str, torch.Tensor]]:
    model = models.mlp(width=32)
    images, labels = models.digits()
    batch = {"images": images[:4].clone(), "labels": labels[:4].clone()}
    observation = models.observe_delta(
        model,
        [batch],
        models.image_loss,
        learning_rate=0.1,
        knowledge=Knowledge(batch_size=4, image_shape=(1, 8, 8)),
    )
    public = {"images": images[4:12], "labels": labels[4:12]}
    prior = Prior(
        candidates=public,
        examples=public,
        reference_models=(models.mlp(width=32, seed=2),),
        client=lambda examples, seed: models.gradient(model, examples, models.image_loss),
    )
    return observation, model, prior, batch


def crafted_case() -> tuple[Observation, torch.nn.Module, Prior, dict[str, torch.Tensor]]:
    images, labels = models.digits()
    model = active.craft_imprint(models.mlp(width=32), images[100:200], bins=16)
    batch = {"images": images[:4].clone(), "labels": labels[:4].clone()}
    facts = {"batch_size": 4, "knowledge": Knowledge(image_shape=(1, 8, 8))}
    return models.observe(model, batch, models.image_loss, **facts), model, Prior(), batch


def sum_case() -> tuple[Observation, torch.nn.Module, Prior, dict[str, torch.Tensor]]:
    model = models.gpt2(vocabulary=120, width=32, length=16)
    ids = models.sentences(3, 5, 120)
    batches = [{"input_ids": row[None], "labels": torch.tensor([1])} for row in ids]
    return models.observe_sum(model, batches, models.text_loss), model, Prior(), {"input_ids": ids}


def bare_case() -> tuple[Observation, None, Prior, dict[str, torch.Tensor]]:
    return Observation(kind="gradient", tensors={"mystery": torch.randn(3, 3)}), None, Prior(), {}


CASES = {
    "text": text_case,
    "image": image_case,
    "digits": digits_case,
    "crafted": crafted_case,
    "sum": sum_case,
    "bare": bare_case,
}


def same(first: Reconstruction, second: Reconstruction) -> bool:
    return (
        (first.applicable, first.reason, first.confidence, first.knowledge_used, dict(first.details))
        == (second.applicable, second.reason, second.confidence, second.knowledge_used, dict(second.details))
        and len(first.items) == len(second.items)
        and all(
            a.kind == b.kind and torch.equal(a.value, b.value)
            for a, b in zip(first.items, second.items, strict=True)
        )
    )


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("case", sorted(CASES))
def test_contract(name: str, case: str) -> None:
    observation, model, prior, private = CASES[case]()
    attack = build(name)
    assert isinstance(attack, Attack)
    assert attack.name == name
    tensors = {key: value.clone() for key, value in observation.tensors.items()}
    weights = copy.deepcopy(model.state_dict()) if model is not None else {}
    state = torch.random.get_rng_state()
    first = attack.run(observation, model, prior, SMALL, 7)
    # The budget bounds the main loop; set-up and the last round of it may run over.
    assert first.steps < SMALL.steps + 10_000
    assert torch.equal(state, torch.random.get_rng_state()), "global random state was touched"
    assert all(torch.equal(tensors[key], observation.tensors[key]) for key in tensors), (
        "the observation was changed"
    )
    if model is not None:
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items()), (
            "the model was changed"
        )
        assert not model.training
        assert all(value.grad is None for value in model.parameters())
    assert 0.0 <= first.confidence <= 1.0
    assert all(0.0 <= item.confidence <= 1.0 for item in first.items)
    if not first.applicable or not first.items:
        assert first.reason, "nothing found, and no reason given"
    assert set(first.knowledge_used) <= set(observation.knowledge.granted()) | {
        f"prior.{k}" for k in Prior.__slots__
    }
    for value in private.values():  # poison the truth after capture: nothing may change
        value.fill_(1)
    assert same(first, attack.run(observation, model, prior, SMALL, 7)), (
        "not deterministic, or it read the truth"
    )


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_without_anything_it_says_not_applicable(name: str) -> None:
    observation, model, prior, _ = bare_case()
    result = build(name).run(observation, model, prior, SMALL, 0)
    assert not result.applicable
    assert result.reason
    assert not result.items


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_attack_can_reach_the_truth(path: Path) -> None:
    judging = ("truth.py", "scoring.py", "judge.py", "examine.py", "cohort.py", "rehearsal.py", "curves.py")
    if path.name in (*judging, "released.py", "result_folder.py"):
        pytest.skip(
            "the truth, what scores, judges and writes beside it, what invents its own, draws curves of it, "
            "and what tells rows apart that an auditor holds anyway"
        )
    assert not {
        name
        for name in _imports(path)
        if name.startswith(
            ("attacks.truth", "attacks.scoring", "attacks.rehearsal", "attacks.judge", "attacks.examine")
        )
    }


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_attacks_import_no_defence_and_no_federation(path: Path) -> None:
    assert not {name for name in _imports(path) if name.split(".")[0] in ("defenses", "ffm_secure")}


def test_the_contract_refuses_dishonest_results() -> None:
    assert not not_applicable("why").applicable
    facts = {"attack": "x", "items": (), "seconds": 0.0, "knowledge_used": ()}
    with pytest.raises(ValueError, match="confidence"):
        Reconstruction(**facts, confidence=1.5, applicable=True)
    with pytest.raises(ValueError, match="reason"):
        Reconstruction(**facts, confidence=0.0, applicable=False)
    with pytest.raises(ValueError, match="positive"):
        Budget(steps=0, iterations=1, restarts=1)


def test_the_taxonomy_is_whole_and_points_at_what_exists() -> None:
    assert [entry.number for entry in TAXONOMY] == list(range(1, 57))
    for entry in TAXONOMY:
        assert entry.reason
        assert (entry.status == "not") == (entry.where == "")
        assert not entry.where or entry.where in ATTACKS or (ROOT / f"{entry.where}.py").is_file()


def test_the_page_of_attacks_is_current() -> None:
    page = (ROOT.parent / "docs" / "attacks.md").read_text(encoding="utf-8")
    assert taxonomy_table() in page
    assert attack_table() in page
    done = [sum(entry.status == status for entry in TAXONOMY) for status in ("implemented", "partly")]
    assert done[0] >= 25
    assert f"{done[0]} of {len(TAXONOMY)} mechanisms are implemented, {done[1]} partly" in page


def test_the_command_runs_an_attack_on_folders(tmp_path, capsys) -> None:
    observation, model, _, _ = sum_case()
    observation.save(tmp_path / "seen")
    model.save_pretrained(tmp_path / "model")
    assert (
        main(
            [
                "run",
                "span",
                "--observation",
                str(tmp_path / "seen"),
                "--model",
                str(tmp_path / "model"),
                "--json",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r'"kind": "sequence"', out)
    with pytest.raises(SystemExit):
        main(["run", "span", "--observation", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_is_a_command_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = find_spec(f"attacks.{name}")
    assert spec is not None
    assert spec.origin == str(ROOT / "__main__.py")
    with pytest.raises(SystemExit) as left:
        run_one(name, ["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m attacks.{name}" in shown
    assert description(name).splitlines()[1] in shown


def test_a_command_runs_as_a_module_and_unknown_names_are_no_module(tmp_path, monkeypatch, capsys) -> None:
    observation, model, _, _ = sum_case()
    observation.save(tmp_path / "seen")
    model.save_pretrained(tmp_path / "model")
    folders = ["--observation", str(tmp_path / "seen"), "--model", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", ["attacks.span", *folders, "--json"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("attacks.span", run_name="__main__")
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["applicable"]
    assert find_spec("attacks.no_such_attack") is None


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("case", ["text", "image", "digits", "crafted", "sum"])
def test_tensors_no_attack_can_read_are_refused_with_the_reason(name: str, case: str) -> None:
    observation, model, prior, _ = CASES[case]()
    first = next(iter(observation.tensors))
    value = observation.tensors[first]
    holes = value.clone()
    holes.view(-1)[0] = float("inf")
    for odd in (holes, (1e6 * value).long(), value.repeat(*[2] * value.ndim)):
        seen = observation.replace_tensors({**observation.tensors, first: odd})
        found = build(name).run(seen, model, prior, Budget.quick(), 0)
        assert not found.applicable
        assert first in found.reason or "not known to this observer" in found.reason


def test_what_is_no_number_is_no_item_and_no_confidence() -> None:
    def broken(*_: object) -> Finding:
        good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
        items = (Item(kind="scores", value=good, confidence=float("nan")), Item(kind="scores", value=bad))
        return Finding(items=items, confidence=float("nan"))

    attack = PlainAttack(name="broken", family="labels", attempt=broken)
    found = attack.run(bare_case()[0], None, Prior(), Budget.quick(), 0)
    assert len(found.items) == 1
    assert found.confidence == found.items[0].confidence == 0.0
    assert "no numbers" in found.reason
