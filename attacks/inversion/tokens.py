"""Token presence: which tokens a client's text held, read off the rows of the embedding's gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.optimisers import without_untouched
from attacks.observation import Observation


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the embedding modules, the one with most rows (the vocabulary) first."""
    sizes = {
        name: module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))


def token_embedding(model: nn.Module) -> str:
    """Return the name of the token embedding.

    Raises: NotApplicable when the model has none.
    """
    getter = getattr(model, "get_input_embeddings", None)
    if getter is not None:
        try:
            wanted = getter()
        except NotImplementedError:  # two towers: what is private are pictures, and the texts are public
            raise NotApplicable("the model has no token embedding for what is private") from None
        for name, module in model.named_modules():
            if module is wanted and isinstance(module, nn.Embedding):
                return str(name)
    names = embedding_names(model)
    if not names:
        raise NotApplicable("the model has no token embedding")
    return names[0]


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many token ids the model can embed, None where it embeds no tokens."""
    try:
        table = model.get_submodule(token_embedding(model))
    except NotApplicable:
        return None
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def vocabulary_size(observation: Observation, model: nn.Module) -> int:
    """Return the number of token ids the model can embed, or fewer when the tokenizer's size is known."""
    rows = vocabulary_of(model)
    if rows is None:
        raise NotApplicable("the model has no token embedding")
    known = observation.known("vocabulary_size")
    if known:
        return min(int(known), rows)
    return rows


def is_tied(model: nn.Module, name: str) -> bool:
    """Say whether the embedding matrix is also the weight of an output layer,
    which makes its gradient dense.
    """
    weight = model.get_submodule(name).weight
    return any(isinstance(module, nn.Linear) and module.weight is weight for module in model.modules())


def embedding_rows(observation: Observation, model: nn.Module) -> Tensor:
    """Return each token's row of the embedding's gradient, less what its optimiser does to every row:
    (vocabulary, width).

    Raises: NotApplicable when the token embedding was not trained.
    """
    name = f"{token_embedding(model)}.weight"
    if name not in observation.tensors:
        raise NotApplicable("the token embedding was not trained, so its rows say nothing")
    view = observation.gradient()
    if observation.content == "gradient":
        return view.tensors[name].double()
    weight = model.get_submodule(token_embedding(model)).weight
    assert isinstance(weight, Tensor)
    dense = is_tied(model, token_embedding(model)) or noise_per_entry(observation) > 0.0
    return view.factor * without_untouched(observation, name, weight.detach(), dense=dense)


def beside_a_head(rows: Tensor, *, noise: float = 0.0, linear: bool = True) -> Tensor | None:
    """Return which rows of an embedding tied to the output layer stand out (boolean), or None when none can
    be told.

    The output layer adds sum_t (p_tv - [v is the target at t]) h_t to row v. An absent token's row is a
    positive mix of the hidden states h_t, and these point one way, away from which the rows of targets lie:
    that needs no low rank, so it holds for any batch, sum and optimiser. What was read but never a target,
    such as a first token, adds a direction of its own, which shows where the update is linear in the gradient
    and there are fewer tokens than dimensions.
    """
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    units = rows / lengths.clamp_min(1e-300)[:, None]
    weights = lengths.sqrt()  # neither the many quiet rows nor the few loud ones should choose the direction
    common = weights @ units
    if noise > 0.0:
        edge = noise * math.sqrt(
            2 * math.log(1_000 * len(rows))
        )  # the Gaussian's tail, once in a thousand runs
        return _some(rows @ (common / common.norm()) < -edge)
    moved = lengths > 0
    evidence = [(units @ common < weights)[moved]]  # each row against all the others
    if linear and bool(moved.any()):
        evidence += [_above_gap(_alone(units[moved])), _above_gap(_beyond_the_head(rows[moved]))]
    chosen = torch.zeros_like(moved)
    # Rows of noise point anywhere, half of them against the rest, and quiet rows may be too few to span the
    # others.
    chosen[moved] = torch.stack([one & bool(one.double().mean() < 0.25) for one in evidence]).any(dim=0)
    return _some(chosen)


def _alone(units: Tensor) -> Tensor:
    """Return how far each row lies outside what all other rows span, on a scale from 0 to about 1e6."""
    spread = units.T @ units
    ridge = 1e-13 * float(spread.trace())  # the square of single precision
    factor = torch.linalg.cholesky(spread + ridge * torch.eye(len(spread), dtype=units.dtype))
    leverage: Tensor = torch.linalg.solve_triangular(factor, units.T, upper=False).square().sum(dim=0)
    return (leverage / (1.0 - leverage).clamp_min(1e-12)).sqrt()


def _beyond_the_head(rows: Tensor) -> Tensor:
    """Return what is left of each row without the directions that hold 99.99 % of the energy of the quieter
    half.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    quiet = rows[norms <= norms.median()]
    _, singular, right = torch.linalg.svd(quiet, full_matrices=False)
    share = singular.square().cumsum(0) / singular.square().sum().clamp_min(1e-300)
    rank = min(int((share < 0.9999).sum()) + 1, rows.shape[1] // 2)
    basis = right[:rank]
    left: Tensor = torch.linalg.vector_norm(rows - (rows @ basis.T) @ basis, dim=1)
    return left


def _some(chosen: Tensor) -> Tensor | None:
    if bool(chosen.any()):
        return chosen
    return None


def split_scores(scores: Tensor, *, noise: float = 0.0, width: int = 1) -> Tensor | None:
    """Return which scores stand out (boolean), or None when none do.

    Exact zeros beside others: whatever is not zero. With noise of known deviation: above the largest norm
    that noise alone would show once in a thousand runs. Otherwise the widest gap of the logarithm in the
    upper half, of at least a factor of ten.
    """
    if noise > 0.0:
        # Laurent and Massart, 2000: a chi-square of `width` degrees exceeds width + 2 sqrt(width x) + 2 x
        # with chance exp(-x).
        depth = math.log(1_000 * len(scores))
        edge = noise * math.sqrt(width + 2 * math.sqrt(width * depth) + 2 * depth)
        chosen = scores > edge
    else:
        floor = float(scores.max()) * 1e-12
        zeros = scores <= floor
        if bool(zeros.any()) and bool((~zeros).any()):
            chosen = ~zeros
            if (
                float(zeros.double().mean()) < 0.1
            ):  # a padding row alone: absent rows may hold rounding of a decay
                gap = _above_gap(scores)
                # One row at zero is padding; of the others nothing is known when a decay moved them all.
                if bool(gap.any()) or int(zeros.sum()) <= 1:
                    chosen = gap
        else:
            chosen = _above_gap(scores)
    return _some(chosen)


def _above_gap(scores: Tensor) -> Tensor:
    ordered = scores.clamp_min(1e-300).log().sort().values
    half = len(ordered) // 2
    steps = ordered[half + 1 :] - ordered[half:-1]
    if len(steps) == 0 or float(steps.max()) < math.log(10.0):
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores.log() > ordered[half + int(steps.argmax())] + 0.5 * float(steps.max())


def noise_per_entry(observation: Observation) -> float:
    """Return the standard deviation of the noise on each entry of the gradient view as far as it is known,
    else 0.

    Noise is stated as it crossed the wire: a delta that is divided by rate and steps has its noise divided,
      too.
    """
    deviation = observation.known("noise_deviation")
    if not deviation:
        multiplier, bound = observation.known("noise_multiplier"), observation.known("clip_norm")
        deviation = 0.0
        if multiplier and bound:
            deviation = float(multiplier) * float(bound)
    return float(deviation) * abs(observation.gradient().factor)


def _width(model: nn.Module) -> int:
    embedding = model.get_submodule(token_embedding(model))
    assert isinstance(embedding, nn.Embedding)
    return embedding.embedding_dim


def _standing_out(observation: Observation, model: nn.Module) -> tuple[Tensor | None, float]:
    """Return which tokens stand out (boolean), or None, and how sure that is."""
    rows, noise = embedding_rows(observation, model), noise_per_entry(observation)
    if is_tied(model, token_embedding(model)):
        linear = (
            observation.content == "gradient" or "adam" not in str(observation.known("optimiser")).lower()
        )
        chosen = beside_a_head(rows, noise=noise, linear=linear)
        if chosen is None:
            return None, 0.0
        absent = nn.functional.normalize(rows[~chosen & rows.any(dim=1)])
        return chosen, float(
            absent.mean(dim=0).norm()
        )  # near 1 when they agree on a direction, as noise does not
    scores: Tensor = torch.linalg.vector_norm(rows, dim=1)
    chosen = split_scores(scores, noise=noise, width=rows.shape[1])
    if chosen is None:
        return None, 0.0
    weakest = scores[chosen].min()
    strongest = scores.new_zeros(())
    if (~chosen).any():
        strongest = scores[~chosen].max()
    return chosen, float(weakest / (weakest + strongest))


def present_tokens(observation: Observation, model: nn.Module) -> Tensor | None:
    """Return the ids of the tokens that stand out, or None when the embedding does not tell."""
    try:
        chosen, _ = _standing_out(observation, model)
    except NotApplicable:
        return None
    if chosen is None:
        return None
    return chosen.nonzero().flatten()


def likely_tokens(observation: Observation, model: nn.Module) -> Tensor | None:
    """Return the ids to search among, or None when the embedding does not narrow them down.

    With a tied output layer some present tokens do not stand out, so every row as long as one that does is
    kept.
    """
    present = present_tokens(observation, model)
    if present is None or not is_tied(model, token_embedding(model)):
        return present
    lengths: Tensor = torch.linalg.vector_norm(embedding_rows(observation, model), dim=1)
    return (lengths >= lengths[present].min()).nonzero().flatten()


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    chosen, sure = _standing_out(observation, working_copy(model, observation))
    if chosen is None:
        return Finding(reason="no row of the embedding stands out")
    ids = chosen.nonzero().flatten()
    item = Item(kind="token_set", value=ids, confidence=sure)
    return Finding(items=(item,), confidence=sure, details={"tokens": len(ids), "vocabulary": len(chosen)})


def token_presence() -> Attack:
    """Return the attack that reads the set of tokens off the embedding's rows."""
    return PlainAttack(
        name="token_presence",
        family="presence",
        attempt=_attempt,
        requires=("model",),
        summary="the set of tokens a client used, from the rows of the embedding's update",
    )
