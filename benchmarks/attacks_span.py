"""Find tokens by the published span check and by ours, on the same gradients: the same tokens, and the time
of each.

The published check (DAGER, 2405.15586, section 4 and appendix B) decomposes the gradient of a query
projection by a randomised SVD at its numerical rank, forms the layer input of every vocabulary entry at every
position, and accepts those near the span. `restated` says it in our own words, in single precision; with a
folder that holds the published repository, its own two functions are called instead, unchanged. Both get the
threshold that suits these small models.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks import Budget, Knowledge, Observation
from attacks.contract import working_copy
from attacks.inversion.subspace import find_candidates, study, token_pool
from attacks.inversion.tokens import present_tokens
from tests.attacks import models

VOCABULARY, WIDTH, LENGTH, THRESHOLD = 10_000, 256, 16, 1e-3
SPARE = 20  # directions the published rank cut always leaves free
Pairs = frozenset[tuple[int, int]]  # (position, token)


@dataclass(frozen=True, kw_only=True)
class Published:
    """The two steps of the published check."""

    decompose: Callable[[Tensor, int], Tensor]
    inside: Callable[[Tensor, Tensor], Tensor]


def restated() -> Published:
    """Return the check in our own words."""

    def decompose(gradient: Tensor, rank: int) -> Tensor:
        return torch.svd_lowrank(gradient, q=rank, niter=10)[2].T

    def inside(basis: Tensor, vectors: Tensor) -> Tensor:
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        distance = ((unit @ basis.T) @ basis - unit).norm(dim=-1)
        return (distance < THRESHOLD).nonzero().flatten()

    return Published(decompose=decompose, inside=inside)


def from_folder(folder: Path) -> Published:
    """Return the functions of the published repository in `folder`."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("published_span", folder / "utils" / "functional.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{folder} holds no utils/functional.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)

    def decompose(gradient: Tensor, rank: int) -> Tensor:
        return module.get_layer_decomp(gradient, B=rank)[1]

    def inside(basis: Tensor, vectors: Tensor) -> Tensor:
        return module.get_top_B_in_span(basis, vectors, len(basis), THRESHOLD, "l2")[0]

    return Published(decompose=decompose, inside=inside)


def published_tokens(how: Published, model: nn.Module, observation: Observation) -> tuple[Pairs, float]:
    """Return the tokens the published check accepts at each position, and its CPU seconds."""
    began = time.process_time()
    block, pairs = model.transformer.h[0], set()
    with torch.no_grad():
        gradient = observation.tensors["transformer.h.0.attn.c_attn.weight"].T
        rank = min(int(np.linalg.matrix_rank(gradient.numpy())), gradient.shape[1] - SPARE)
        basis = how.decompose(gradient, rank)
        for place in range(LENGTH):
            vectors = block.ln_1(model.transformer.wte.weight + model.transformer.wpe.weight[place])
            chosen = how.inside(basis, vectors).tolist()
            if not chosen:
                break
            pairs |= {(place, token) for token in chosen}
    return frozenset(pairs), time.process_time() - began


def our_tokens(model: nn.Module, observation: Observation) -> tuple[Pairs, float]:
    """Return the tokens our span attack accepts at each position, and its CPU seconds."""
    began = time.process_time()
    budget = Budget(steps=600_000, iterations=1, restarts=1)
    structure = study(observation, working_copy(model, observation).double(), context=False)
    present = present_tokens(observation, structure.model)
    candidates = find_candidates(
        structure, token_pool(structure.vocabulary, present), deadline=budget.start(), allowed=present
    )
    pairs = (
        () if candidates is None else ((p, t) for p, options in enumerate(candidates[1].ids) for t in options)
    )
    return frozenset(pairs), time.process_time() - began


def side_by_side(folder: Path | None, *, quick: bool) -> dict[str, Any]:
    """Run both on batches of random sentences, interleaved, with and without the embedding rows in the
    update.
    """
    how = restated() if folder is None else from_folder(folder)
    rows: list[dict[str, Any]] = []
    print(
        f"{'update':22} {'batch':>5} {'seed':>4} {'true':>5} {'published':>9} {'s':>7} {'ours':>5} {'s':>7}"
    )
    for update in ("all parameters", "first block only"):
        for batch in (1, 4) if quick else (1, 2, 4, 8):
            for seed in range(1 if quick else 5):
                rows.append(_case(how, update, batch, seed))
    faster = sum(row["ours"]["seconds"] < row["published"]["seconds"] for row in rows)
    same = sum(row["ours"]["right"] and row["published"]["right"] for row in rows)
    source = "restated" if folder is None else "the published functions"
    return {"reference": source, "cases": rows, "same_tokens": same, "faster": faster, "of": len(rows)}


def _case(how: Published, update: str, batch: int, seed: int) -> dict[str, Any]:
    model = models.gpt2(vocabulary=VOCABULARY, width=WIDTH, length=LENGTH)
    ids = models.sentences(batch, LENGTH, VOCABULARY, seed=seed)
    labels = torch.arange(batch) % 2
    observation = models.observe(model, {"input_ids": ids, "labels": labels}, models.text_loss)
    tensors = {
        name: tensor
        for name, tensor in observation.tensors.items()
        if update == "all parameters" or name.startswith("transformer.h.0.")
    }
    observation = Observation(kind="gradient", tensors=tensors, knowledge=Knowledge(sequence_length=LENGTH))
    true = {(place, token) for row in ids.tolist() for place, token in enumerate(row)}
    order = [
        ("published", lambda: published_tokens(how, model, observation)),
        ("ours", lambda: our_tokens(model, observation)),
    ]
    row: dict[str, Any] = {"update": update, "batch": batch, "seed": seed, "true": len(true)}
    for name, run in order if seed % 2 else reversed(order):
        pairs, seconds = run()
        row[name] = {"tokens": len(pairs), "right": pairs == true, "seconds": seconds}
    shown = " ".join(f"{row[name]['tokens']:9} {row[name]['seconds']:7.3f}" for name in ("published", "ours"))
    print(f"{update:22} {batch:5} {seed:4} {len(true):5} {shown}", flush=True)
    return row
