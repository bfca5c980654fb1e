"""How LoRA factors are averaged: the average of B and of A is not the average of BA, and each rule here
answers that.

Every rule is linear: the server needs only the sum of what clients send, so all of them run under masks and
  encryption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.errors import ModelError
from ffm_secure.strategies.base import ServerState, Strategy
from ffm_secure.trainable.base import Adapter, TrainableModel


class LoraRule(Strategy):
    """What the rules share: a vector seen as named tensors.

    Changes are compared as the model feels them: the change of every adapted weight with its product, and of
    the head. Factors say nothing there, because rules turn them, draw them anew, or train another half of
    them in the next step.
    Guarantee: `message` and `step` are functions of vectors alone; nothing of a client but its message
    reaches `step`.
    """

    merges_into_base: ClassVar[bool] = (
        False  # the weights of the adapted modules are part of the global vector
    )
    exact: ClassVar[bool] = True  # the new product is the mean of the clients' products

    @classmethod
    def build(cls, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int) -> Strategy:
        """Make the rule for what is trained."""
        return cls(config, trainable, seed=seed)

    def __init__(self, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int = 0) -> None:
        self.adapters: tuple[Adapter, ...] = getattr(trainable, "adapters", ())
        if not self.adapters:
            raise ModelError(
                f"federation.strategy.kind = {config.kind!r} needs model.trainable.kind = 'lora'"
            )
        self.learning_rate, self.seed = config.learning_rate, seed
        self.places: dict[str, slice] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        start = 0
        assert trainable is not None, "a model without factors was refused above"
        for name, shape in trainable.layout:
            stop = start + int(torch.Size(shape).numel())
            self.places[name], self.shapes[name] = slice(start, stop), tuple(shape)
            start = stop
        self.a = tuple(item.a for item in self.adapters)
        self.b = tuple(item.b for item in self.adapters)
        inside = {*self.a, *self.b, *(item.weight for item in self.adapters)}
        self.head = tuple(name for name in self.places if name not in inside)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """Return one named tensor as a view into the vector."""
        return vector[self.places[name]].view(self.shapes[name])

    def count(self, names: Sequence[str]) -> int:
        """Count the numbers of some tensors."""
        return sum(self.places[name].stop - self.places[name].start for name in names)

    def pick(self, vector: Tensor, names: Sequence[str]) -> Tensor:
        """Return some tensors end to end."""
        if names:
            return torch.cat([vector[self.places[name]] for name in names])
        return vector[:0]

    def put(self, vector: Tensor, names: Sequence[str], values: Tensor) -> None:
        """Add values laid end to end to the named tensors of a vector, in place."""
        start = 0
        for name in names:
            place = self.places[name]
            stop = start + place.stop - place.start
            vector[place] += values[start:stop]
            start = stop

    def product(self, vector: Tensor, item: Adapter) -> Tensor:
        """Return what one adapter adds to its weight, in the weight's own layout."""
        dense = item.scaling * (self.view(vector, item.b) @ self.view(vector, item.a))
        if item.transposed:
            return dense.t()
        return dense

    def products(self, vector: Tensor) -> Tensor:
        """Return the products of all adapters end to end."""
        return torch.cat([self.product(vector, item).reshape(-1) for item in self.adapters])

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Return both vectors where only factors are kept, so that nothing dense is; otherwise the dense
        change.
        """
        if not self.merges_into_base:
            return torch.cat((before, after))
        weights = []
        for item in self.adapters:
            weights.append(item.weight)
        old = before.double()
        new = after.double()
        grown = self.pick(new - old, weights) + self.products(new) - self.products(old)
        return torch.cat((grown, self.pick(new - old, self.head))).to(before.dtype)

    def cosine(self, first: Tensor, second: Tensor) -> float | None:
        """Return the cosine between two changes; where only factors are kept, from products of factors."""
        if self.merges_into_base:
            return super().cosine(first, second)
        one, two = first.double(), second.double()
        size = float((self._inner(one, one) * self._inner(two, two)) ** 0.5)
        if size:
            return self._inner(one, two) / size
        return 0.0

    def _inner(self, first: Tensor, second: Tensor) -> float:
        """Return the inner product of two changes: <B A, D C> is the sum over B^T D times A C^T, entry by
        entry.
        """
        heads = []
        for old, new in (first.chunk(2), second.chunk(2)):
            heads.append(self.pick(new - old, self.head))
        total = float(heads[0] @ heads[1])
        for item in self.adapters:
            (b, a), (d, c) = self._difference(first, item), self._difference(second, item)
            total += item.scaling**2 * float(((b.t() @ d) * (a @ c.t())).sum())
        return total

    def _difference(self, moved: Tensor, item: Adapter) -> tuple[Tensor, Tensor]:
        """Return factors [m, 2r] and [2r, n] of the change of one product."""
        old, new = moved.chunk(2)
        b = torch.cat((self.view(new, item.b), -self.view(old, item.b)), dim=1)
        return b, torch.cat((self.view(new, item.a), self.view(old, item.a)))


class RoLoRA(LoraRule):
    """Rules under which a round trains only some of the tensors; only those travel up, padded to the largest
    round.
    """

    def trains(self, step: int) -> tuple[str, ...]:
        """Name what this step trains."""
        return (*self.b, *self.head)

    def size(self, trained: int) -> int:
        """Count what is sent in the largest round."""
        return max(self.count(self.trains(step)) for step in (0, 1))

    def message(self, old: Tensor, change: Tensor, step: int) -> Tensor:
        """Send the change of what was trained."""
        sent = self.pick(change, self.trains(step))
        return torch.cat((sent, sent.new_zeros(self.size(0) - len(sent))))

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Add the mean change of what was trained."""
        vector = state.vector.double()
        self.put(vector, self.trains(state.round), self.learning_rate * mean_message)
        return ServerState(round=state.round + 1, vector=self.settle(vector).to(torch.float32))

    def settle(self, vector: Tensor) -> Tensor:
        """Rewrite the factors without changing their products."""
        return vector


class FrozenA(RoLoRA):
    """FFA-LoRA: A stays as it was drawn, B is averaged, and the mean of B A is the mean of B times A.

    Source: Sun et al. 2024, arXiv:2403.12313, section 3.
    """

    note = "FFA-LoRA: A stays as drawn, B is trained and sent"


class Alternating(RoLoRA):
    """RoLoRA: B in one step, A in the next; the factor at rest is the same for all, so the mean is exact in
    each.

    Source: Chen et al. 2024, arXiv:2409.02346, Algorithm 1.
    """

    note = "RoLoRA: B and A are trained and sent in turn"

    def trains(self, step: int) -> tuple[str, ...]:
        """Name what this step trains."""
        return (*(self.a if step % 2 else self.b), *self.head)

    def cosine(self, first: Tensor, second: Tensor) -> float | None:
        """Return None for changes of different halves: B moves what A reads, A what B writes, whatever the
        data say.
        """
        if self._trained_a(first) == self._trained_a(second):
            return super().cosine(first, second)
        return None

    def _trained_a(self, moved: Tensor) -> bool:
        old, new = moved.chunk(2)
        return not torch.equal(self.pick(old, self.a), self.pick(new, self.a))


class FedSVD(RoLoRA):
    """FedSVD: B is trained; then the server writes B A anew as U S times V^T, so that A follows what was
    learned.

    The rewriting sees released numbers only, and V^T has orthonormal rows, so noise on B is not made larger
    by A.
    Source: Lee et al. 2025, arXiv:2505.12805, section 3.
    """

    note = "FedSVD: B is trained and sent; the server turns the factors by a singular value decomposition"

    def __init__(self, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int = 0) -> None:
        super().__init__(config, trainable, seed=seed)
        for item in self.adapters:
            (rank, columns), rows = self.shapes[item.a], self.shapes[item.b][0]
            if rank > min(rows, columns):
                raise ModelError(
                    f"model.trainable.rank = {rank} with federation.strategy.kind = 'fedsvd': {item.a} "
                    f"belongs to a module of {rows} x {columns}, whose product has {min(rows, columns)} "
                    f"singular values; lower the rank to {min(rows, columns)}, or use ffa"
                )

    def settle(self, vector: Tensor) -> Tensor:
        """Turn the factors: A^T = Q R, B R^T = U S V^T, then A becomes V^T Q^T and B becomes U S."""
        turned = vector.clone()
        for item in self.adapters:
            a, b = self.view(vector, item.a), self.view(vector, item.b)
            q, r = torch.linalg.qr(a.t())
            u, s, vt = torch.linalg.svd(b @ r.t(), full_matrices=False)
            self.view(turned, item.a).copy_(vt @ q.t())
            self.view(turned, item.b).copy_(u * s)
        return turned


class FedEx(LoraRule):
    """FedEx-LoRA: factors are averaged, and what that misses of the mean product is folded into the frozen
    weight.

    Clients send their product beside the factors, so that the server needs the sum only; the price is a dense
    upload.
    Source: Singhal et al. 2024, arXiv:2410.09432, section 3.
    """

    merges_into_base = True
    note = "FedEx-LoRA: A, B and the product are sent; what averaging misses is folded into the weight"

    def trains(self, step: int) -> tuple[str, ...]:
        """Name what this step trains."""
        return (*self.a, *self.b, *self.head)

    def size(self, trained: int) -> int:
        """Count what is sent."""
        return self.count((*self.trains(0), *(item.weight for item in self.adapters)))

    def message(self, old: Tensor, change: Tensor, step: int) -> Tensor:
        """Send the change of the factors, and the change of the product."""
        grown = self.products(old + change) - self.products(old)
        return torch.cat((self.pick(change, self.trains(step)), grown))

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Average the factors; give the weight the rest of the mean product."""
        before, names = state.vector.double(), self.trains(state.round)
        split = self.count(names)
        mean = self.learning_rate * mean_message
        after = before.clone()
        self.put(after, names, mean[:split])
        missing = mean[split:] - (self.products(after) - self.products(before))
        self.put(after, [item.weight for item in self.adapters], missing)
        return ServerState(round=state.round + 1, vector=after.to(torch.float32))


class FLoRA(LoraRule):
    """FLoRA: every client's product is added to the weight, and the adapters start anew; ranks may differ.

    FLoRA the factors of all clients is their sum of products, so clients send the product itself: the server
    needs the sum only and learns no client's factors or rank; the price is a dense upload. A is drawn anew
    for every step, B starts at zero.
    Guarantee: B is zero in every broadcast, so that a client's product is its own change: what the server
    learned in public passes through no client's rank, bound or share.
    Source: Wang et al. 2024, arXiv:2409.05976, section 3.
    """

    merges_into_base = True
    note = "FLoRA: the product is sent and folded into the weight; adapters start anew each round"

    def __init__(self, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int = 0) -> None:
        super().__init__(config, trainable, seed=seed)
        self.ranks: tuple[int, ...] = tuple(getattr(trainable, "ranks", ()))

    def trains(self, step: int) -> tuple[str, ...]:
        """Name what this step trains."""
        return (*self.a, *self.b, *self.head)

    def size(self, trained: int) -> int:
        """Count what is sent."""
        return self.count((*self.head, *(item.weight for item in self.adapters)))

    def mask(self, client: int) -> Tensor | None:
        """Return which numbers a client of a smaller rank uses: the first rows of A and columns of B."""
        if not self.ranks:
            return None
        rank = self.ranks[client % len(self.ranks)]
        mask = torch.ones(max(place.stop for place in self.places.values()))
        for item in self.adapters:
            self.view(mask, item.a)[rank:] = 0.0
            self.view(mask, item.b)[:, rank:] = 0.0
        return mask

    def message(self, old: Tensor, change: Tensor, step: int) -> Tensor:
        """Send the change of the head, and the product."""
        return torch.cat((self.pick(change, self.head), self.products(old + change)))

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Fold the mean product into the weight and start the adapters anew."""
        vector, mean = state.vector.double(), self.learning_rate * mean_message
        split = self.count(self.head)
        self.put(vector, self.head, mean[:split])
        self.put(vector, [item.weight for item in self.adapters], mean[split:])
        self.restart(vector, state.round + 1)
        return ServerState(round=state.round + 1, vector=vector.to(torch.float32))

    def after_public(self, vector: Tensor, phase: int) -> Tensor:
        """Fold the server's own product into the weight and start the adapters anew."""
        folded = vector.double()
        self.put(folded, [item.weight for item in self.adapters], self.products(folded))
        self.restart(folded, -phase)  # steps count up from 1, so the two never share a draw
        return folded.to(torch.float32)

    def restart(self, vector: Tensor, number: int) -> None:
        """Draw every A anew and set every B to zero, in place."""
        stream = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        for item in self.adapters:
            a = self.view(vector, item.a)
            a.copy_((2 * torch.rand(a.shape, generator=stream, dtype=a.dtype) - 1) / a.shape[1] ** 0.5)
            self.view(vector, item.b).zero_()


class FedSA(LoraRule):
    """FedSA-LoRA: A and B are trained; A and the head are averaged, every client keeps its own B at home.

    There is no product of the server's: client i's model is B_i times the mean A, which is the mean over j of
    B_i A_j. B in the global vector stays as it began, where a newcomer begins too.
    Source: Guo et al. 2024, arXiv:2410.01463, section 3. The paper speaks of A and B; that the head is shared
    is decided here.
    """

    exact = False
    note = "FedSA-LoRA: A and the head are sent; each client keeps its own B at home"

    def __init__(self, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int = 0) -> None:
        super().__init__(config, trainable, seed=seed)
        self.home = tuple(self.places[name] for name in self.b)

    def trains(self, step: int) -> tuple[str, ...]:
        """Name what this step trains."""
        return (*self.a, *self.b, *self.head)

    def sends(self, step: int) -> tuple[str, ...]:
        """Name what leaves a client."""
        return (*self.a, *self.head)

    def size(self, trained: int) -> int:
        """Count what is sent."""
        return self.count(self.sends(0))

    def message(self, old: Tensor, change: Tensor, step: int) -> Tensor:
        """Send the change of A and of the head."""
        return self.pick(change, self.sends(step))

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Add the mean change of A and of the head."""
        vector = state.vector.double()
        self.put(vector, self.sends(state.round), self.learning_rate * mean_message)
        return ServerState(round=state.round + 1, vector=vector.to(torch.float32))
