"""Learned inversion: simulate the client on public data, train a network from updates back to inputs, apply
it.

The only attack that needs no model of the defence: `prior.client` is the exact pipeline, clipping, noise and
masking included, and the network learns whatever still shows through. Source: Wu et al., "Learning to
Invert", 2023, with a permutation-invariant loss for batches; features are principal components of the
simulated updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Deadline, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.metrics import match_one_to_one
from attacks.observation import Observation

Client = Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]

_PAIRS = 512
_FEATURES = 96
_HIDDEN = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulated:
    """Simulated pairs: flat updates (n, parameters) and the inputs behind them (n, batch, features)."""

    updates: Tensor
    inputs: Tensor


def simulate_pairs(
    client: Client,
    examples: Mapping[str, Tensor],
    *,
    names: tuple[str, ...],
    batch: int,
    pairs: int,
    seed: int,
) -> Simulated:
    """Run the client's pipeline on `pairs` random public batches; return updates over `names` and inputs.

    Raises: NotApplicable when the pipeline does not send one of the names.
    """
    generator = torch.Generator().manual_seed(seed)
    total = len(examples["images"])
    updates, inputs = [], []
    for index in range(pairs):
        chosen = torch.randint(total, (batch,), generator=generator)
        sent = client({key: value[chosen] for key, value in examples.items()}, seed * 1_000_003 + index)
        missing = []
        for name in names:
            if name not in sent:
                missing.append(name)
        if missing:
            raise NotApplicable(f"the simulated client does not send {missing[:3]}")
        updates.append(flat(sent, names))
        inputs.append(examples["images"][chosen].flatten(1))
    return Simulated(updates=torch.stack(updates), inputs=torch.stack(inputs))


def flat(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the named tensors as one vector."""
    return torch.cat([tensors[name].detach().flatten().float() for name in names])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Components:
    """The affine map from updates to features: the leading principal components, scaled to unit variance."""

    mean: Tensor
    basis: Tensor
    spread: Tensor

    def __call__(self, updates: Tensor) -> Tensor:
        """Return features (n, k) of updates (n, parameters)."""
        return ((updates - self.mean) @ self.basis.T) / self.spread


def principal_components(updates: Tensor, most: int) -> Components:
    """Return at most `most` principal components of updates (n, parameters), n below the parameters."""
    mean = updates.mean(0)
    _, singular, right = torch.linalg.svd(updates - mean, full_matrices=False)
    rank = int((singular > 1e-6 * singular[0].clamp_min(1e-30)).sum())
    rank = max(1, min(most, rank))
    return Components(mean=mean, basis=right[:rank], spread=singular[:rank] / len(updates) ** 0.5)


def permuted_loss(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of (n, batch, features) under the best one-to-one matching inside each
    batch.
    """
    if truth.shape[1] == 1:
        return (guess - truth).square().mean()
    far = torch.cdist(guess.detach(), truth).square()
    orders = []
    for table in far:
        pairs = match_one_to_one(-table.double().numpy())
        orders.append(torch.tensor([column for _, column in pairs]))
    order = torch.stack(orders)
    matched = truth.gather(1, order[:, :, None].expand_as(truth))
    return (guess - matched).square().mean()


def fit_inverter(
    simulated: Simulated,
    components: Components,
    *,
    iterations: int,
    seed: int,
    deadline: Deadline,
    held_out: float = 0.15,
) -> tuple[nn.Module, float, float]:
    """Train the inverter; return it with its error and that of the mean input, both on held-out simulated
    pairs.

    Guarantee: the weights returned are those with the lowest held-out error.
    """
    features, (_, batch, size) = components(simulated.updates), simulated.inputs.shape
    cut = max(1, int(held_out * len(features)))
    first, second = nn.Linear(features.shape[1], _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
    last = nn.Linear(_HIDDEN, batch * size)
    network = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
    middle = simulated.inputs[cut:].mean((0, 1))
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(middle.repeat(batch))
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    generator = torch.Generator().manual_seed(seed)
    best = float("inf")
    best_state = {}
    for name, value in network.state_dict().items():
        best_state[name] = value.clone()
    for step in range(iterations):
        rows = cut + torch.randint(len(features) - cut, (64,), generator=generator)
        loss = permuted_loss(network(features[rows]).reshape(-1, batch, size), simulated.inputs[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 25 == 24 or step == iterations - 1:
            with torch.no_grad():
                error = float(
                    permuted_loss(network(features[:cut]).reshape(-1, batch, size), simulated.inputs[:cut])
                )
            if error < best:
                best = error
                best_state = {}
                for name, value in network.state_dict().items():
                    best_state[name] = value.clone()
            if deadline.expired:
                break
    network.load_state_dict(best_state)
    naive = float((simulated.inputs[:cut] - middle).square().mean())
    return network.eval(), best, naive


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    if prior.client is None or prior.examples is None or "images" not in prior.examples:
        raise NotApplicable(
            "the client's pipeline and public images are needed: set prior.client and prior.examples"
        )
    batch = int(observation.known("batch_size")) * observation.contributors
    names = tuple(sorted(observation.tensors))
    pairs = min(_PAIRS, 8 * budget.iterations)
    simulated = simulate_pairs(prior.client, prior.examples, names=names, batch=batch, pairs=pairs, seed=seed)
    components = principal_components(simulated.updates, _FEATURES)
    with torch.enable_grad():
        network, error, naive = fit_inverter(
            simulated, components, iterations=budget.iterations, seed=seed, deadline=deadline
        )
    observed = flat(observation.tensors, names)
    with torch.no_grad():
        guess = network(components(observed[None])).reshape(batch, *prior.examples["images"].shape[1:])
    confidence = max(0.0, 1.0 - error / max(naive, 1e-30))
    items = tuple(Item(kind="image", value=image, confidence=confidence) for image in guess)
    details = {
        "pairs": pairs,
        "features": len(components.basis),
        "held_out_error": error,
        "mean_image_error": naive,
    }
    return Finding(
        items=items,
        confidence=confidence,
        reason="stopped by its budget of steps" if deadline.expired else "",
        details=details,
    )


def learned_inversion() -> Attack:
    """Return learned inversion through a given client pipeline."""
    return PlainAttack(
        name="learned_inversion",
        family="learned",
        attempt=_attempt,
        requires=("prior.client", "prior.examples", "batch_size"),
        summary="images by a network trained on simulated updates of the exact client, defences included",
    )
