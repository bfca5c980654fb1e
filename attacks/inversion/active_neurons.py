"""Malicious server on bottleneck adapters: one neuron for each text, so that Adam and many steps mix nothing.

The adapter of an encoder's first layer sees, at the first place of a text, what the first attention makes of
all its words. Every row of its down-projection is made to fire there alone, and for about one text of all
that a client learns from. The up-projection is so small that gradients stay far below Adam's epsilon, where
its steps are as linear as those of SGD and a row keeps the direction of the one state that moved it: its
change over that of its bias is the state, exactly. Frozen weights are not touched.

The state is read as a text by the model's own first attention, which is public: for a text it is a ratio of
sums over its words, so that one word after another is exchanged until the state is met.

Source: 2606.20553 (one neuron for each sample, fired once); thresholds, the quiet up-projection and the
reading are own derivations.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.active_text import _encoder_parts
from attacks.inversion.channels import capture_inputs
from attacks.observation import Observation

# Largest entry of a crafted down-projection: what moves it is a thousandth of that, rounding far less.
_SMALL = 3e-4
_QUIET = 6e-12  # slope of one text along what a neuron adds: far below Adam's epsilon of 1e-8
_TOLD = 0.03  # of the largest variance of public first places: what varies less is not known well enough
_STILL = 10.0  # how much more it matters that first places do not vary along what tells them from others
_UNHEARD = 1e-5  # an up-projection below it is neither at its honest start, which is zero, nor trained
_APART = 4.0  # how many deviations of its threshold keep the other places of a text silent
_ROUNDING = 3e-6  # of a bias: below it its change is rounding, above it a neuron fired
_LOUD = 0.01  # of the learning rate
_MET = 0.15  # of how far the answers depart from usual words: a text that leaves less explains them
_SAME = 0.02  # of a state's length: nearer ones are of one text
_KNOWN = 0.1  # of the largest variance of terms: what varies less is not trusted more
_LENGTHS, _CLOSE = 3, 1.1  # of a text that are tried: those that explain next to as much as the best
_LIKELY = 32  # words of a place that are exchanged
_DESCENTS, _SWEEPS = 120, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """Name a bottleneck: its down-projection with a bias, and the up-projection behind it."""

    down: str
    up: str


def _adapters(model: nn.Module) -> Iterator[_Adapter]:
    before: tuple[str, nn.Linear] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if before is not None:
            down = before[1]
            narrow = down.bias is not None and down.out_features < down.in_features
            if narrow and (module.in_features, module.out_features) == (down.out_features, down.in_features):
                yield _Adapter(down=before[0], up=name)
        before = (name, module)


def _first_adapter(model: nn.Module) -> _Adapter:
    for adapter in _adapters(model):
        return adapter
    raise NotApplicable("the model has no bottleneck adapter: a biased projection down and one up")


# --------------------------------------------------------------------------------------------------- crafting


def craft_neuron_imprint(
    model: nn.Module, public: Tensor, labels: Tensor, *, texts: int, seed: int = 0
) -> nn.Module:
    """Return a copy of an encoder whose first adapter keeps single texts, of `texts` that a client holds.

    `public` are token ids (n, t) and `labels` (n,) on which thresholds and gradients are set.

    Assumes: a ReLU in the adapter, Adam or AdamW at the client; the adapter sees what the first attention
    adds to the stream.
    """
    crafted = copy.deepcopy(model)
    names = _first_adapter(crafted)
    down, up = crafted.get_submodule(names.down), crafted.get_submodule(names.up)
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    generator = torch.Generator().manual_seed(seed)
    states = capture_inputs({"states": down}, lambda: crafted(input_ids=public))["states"].double()
    rows, thresholds = _gates(states, down.out_features, texts, generator)
    with torch.no_grad():
        size = _SMALL / float(rows.abs().max())
        down.weight.copy_(size * rows)
        down.bias.copy_(-size * thresholds)
        up.weight.zero_()
        if up.bias is not None:
            up.bias.zero_()
    slopes = _slopes(crafted, up, public, labels)
    directions = torch.randn(up.weight.shape, generator=generator)
    loud = (slopes @ directions).abs().median(0).values.clamp_min(1e-30)
    with torch.no_grad():
        up.weight.copy_(_QUIET / loud * directions)
    return crafted


def _gates(states: Tensor, count: int, texts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows (count, d) and thresholds (count,) that about one first place of `texts` texts passes.

    Rows are random directions among the first places' states (n, t, d)[:, 0], in which those vary alike, and
    along what tells first places from all others, so far that those stay below.
    """
    first, rest = states[:, 0], states[:, 1:].flatten(0, 1)
    centre = first.mean(0)
    values, vectors = torch.linalg.eigh((first - centre).T @ (first - centre) / len(first))
    varying = values > _TOLD * values[-1]
    shape = vectors[:, varying] / values[varying].sqrt()
    varied = torch.randn(count, shape.shape[1], generator=generator, dtype=torch.float64) @ shape.T
    varied = varied / ((first - centre) @ varied.T).std(0)[:, None]
    spread = torch.cat([_STILL * (first - centre), rest - rest.mean(0)])
    within = spread.T @ spread / len(spread)
    ridge = 1e-2 * float(within.diagonal().mean()) * torch.eye(len(within), dtype=torch.float64)
    along = torch.linalg.solve(within + ridge, centre - rest.mean(0))
    along = along / (along @ (centre - rest.mean(0)))
    share = 1 - 1 / texts
    needed = ((rest - centre) @ varied.T).quantile(0.999, dim=0) + _APART
    rows = varied + needed[:, None].clamp_min(0.0) * along
    return rows, ((first - centre) @ rows.T).quantile(share, dim=0) + rows @ centre


def _slopes(model: nn.Module, up: nn.Linear, public: Tensor, labels: Tensor) -> Tensor:
    """Return the slope of each text's loss along what the adapter adds at its first place (n, d)."""
    answers: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        traced = output.detach().requires_grad_(True)
        traced.retain_grad()
        answers.append(traced)
        return traced

    handle = up.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            model(input_ids=public, labels=labels).loss.backward()
    finally:
        handle.remove()
        model.zero_grad()
    slopes = answers[0].grad
    assert slopes is not None
    return slopes[:, 0] * len(public)


# ---------------------------------------------------------------------------------------------------- reading


def _read(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation).double()
    names = _first_adapter(private)
    up = private.get_submodule(names.up)
    assert isinstance(up, nn.Linear)
    if not 0.0 < float(up.weight.detach().abs().max()) < _UNHEARD:
        raise NotApplicable("the first adapter's up-projection is not that quiet: it is not a crafted one")
    if f"{names.down}.weight" not in observation.tensors or f"{names.down}.bias" not in observation.tensors:
        raise NotApplicable("the first adapter's down-projection was not shared")
    states, precisions = _single_states(observation, private, names.down)
    if not len(states):
        return Finding(reason="no neuron fired")
    public = (prior.examples or {}).get("token_ids")
    if public is None:
        raise NotApplicable("public texts are needed: prior.examples has no token_ids")
    reader = _Reader.of(private, public)
    deadline, texts = budget.start(), set[tuple[int, ...]]()
    for state in _merged(states, precisions):
        if deadline.expired:
            break
        text, miss = reader.read(state)
        if miss < _MET:
            texts.add(text)
    if not texts:
        return Finding(reason="no neuron was moved by one text alone", details={"fired": len(states)})
    items = [Item(kind="token_set", value=torch.tensor(sorted({word for text in texts for word in text})))]
    for text in sorted(texts):
        items.append(Item(kind="sequence", value=torch.tensor(text), confidence=0.95))
    return Finding(items=tuple(items), confidence=0.95, details={"fired": len(states), "texts": len(texts)})


def _single_states(observation: Observation, model: nn.Module, down: str) -> tuple[Tensor, Tensor]:
    """Return what moved every neuron that fired (n, d), the change of its row over that of its bias, and how
    many roundings that change is long (n,); the best known come first.
    """
    weight, bias = (
        observation.tensors[f"{down}.weight"].double(),
        observation.tensors[f"{down}.bias"].double(),
    )
    layer = model.get_submodule(down)
    assert isinstance(layer, nn.Linear)
    if observation.content == "delta":
        rate = float(observation.known("learning_rate") or math.inf)
        decay = float(observation.known("weight_decay") or 0.0) * rate
        lost = (1 - decay) ** int(observation.known("local_steps") or 1) - 1
        weight = weight - lost * layer.weight.detach()
        bias = bias - lost * layer.bias.detach()
        rounding = _ROUNDING * layer.bias.detach().abs()
        # What moved as far as Adam's steps go was moved more than once: the second time it was loud.
        fired = (bias.abs() > rounding) & (bias.abs() < _LOUD * rate)
    else:
        fired, rounding = bias != 0, torch.ones_like(bias)
    states = weight[fired] / bias[fired, None]
    precisions = bias[fired].abs() / rounding[fired]
    order = precisions.argsort(descending=True)
    return states[order], precisions[order]


def _merged(states: Tensor, precisions: Tensor) -> Iterator[Tensor]:
    """Yield one state for each text, best known first: the mean of all neurons that it moved alone, each as
    far as rounding lets it be known.
    """
    left = torch.ones(len(states), dtype=torch.bool)
    for place, state in enumerate(states):
        if not left[place]:
            continue
        same = left & ((states - state).norm(dim=1) < _SAME * state.norm())
        left &= ~same
        weights = precisions[same].square()
        yield (weights[:, None] * states[same]).sum(0) / weights.sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Atoms:
    """Hold what candidates at one place or several (..., n) add to the heads' answers at the first place.

    weights: (..., n, heads), the attention before its normaliser. values: (..., n, heads, width / heads).
    """

    weights: Tensor
    values: Tensor

    def at(self, row: int) -> _Atoms:
        """Return those of one candidate at one place."""
        return _Atoms(weights=self.weights[row], values=self.values[row])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Read states of first places as texts, by the first attention of an encoder and public texts (n, t).

    A head's answer a at the first place is sum_p w(x_p) v(x_p) / sum_p w(x_p), with weights and values that a
    word and its place alone decide: the first word, and with it the query, is always the same. So the terms
    w(x_p) (v(x_p) - a) of a text add up to zero. Every place's word is a point of a simplex over all words,
    and the sum is brought to zero inside those; the likeliest words are then exchanged one by one.
    """

    words: Tensor  # of public texts behind their first place (n,)
    shares: Tensor  # how often each of them stands there
    first: int
    start: _Atoms
    atoms: _Atoms  # by place behind the first and word
    forth: Tensor  # from the heads' answers to what the attention adds to the stream
    back: Tensor
    shift: Tensor

    @staticmethod
    def of(model: nn.Module, public: Tensor) -> _Reader:
        """Return the reader of a model."""
        embeddings, layer = _encoder_parts(model)
        attention, dense = layer.attention.self, layer.attention.output.dense
        dense = getattr(dense, "base", getattr(dense, "base_layer", dense))
        words, counts = torch.unique(public[:, 1:], return_counts=True)
        first = public[:, 0].mode().values
        heads = int(attention.num_attention_heads)

        def atoms(ids: Tensor, place: int, query: Tensor | None = None) -> tuple[_Atoms, Tensor]:
            states = embeddings(input_ids=ids[:, None], position_ids=torch.tensor([[place]]))[:, 0]
            asked = attention.query(states).reshape(heads, -1) if query is None else query
            keys = attention.key(states).reshape(len(ids), heads, -1)
            values = attention.value(states).reshape(len(ids), heads, -1)
            return _Atoms(
                weights=((keys * asked).sum(2) / math.sqrt(keys.shape[2])).exp(), values=values
            ), asked

        with torch.no_grad():
            start, query = atoms(first[None], 0)
            others = []
            for place in range(1, public.shape[1]):
                others.append(atoms(words, place, query)[0])
        return _Reader(
            words=words,
            shares=counts.double() / counts.sum(),
            first=int(first),
            start=start.at(0),
            atoms=_Atoms(
                weights=torch.stack([one.weights for one in others]),
                values=torch.stack([one.values for one in others]),
            ),
            forth=dense.weight.detach(),
            back=torch.linalg.pinv(dense.weight.detach()),
            shift=dense.bias.detach(),
        )

    def read(self, state: Tensor) -> tuple[tuple[int, ...], float]:
        """Return the text whose first place has a state (d,), and how much of what departs from the usual it
        leaves unexplained.
        """
        best: tuple[tuple[int, ...], float] = ((), math.inf)
        answers = self._answers(state)
        for length in self._likely_lengths(answers):
            likely = self._relaxed(answers, length)
            rows, _ = self._exchanged(likely, answers)
            # The bias behind a state is rounded: its size is known less well than its direction.
            rows, miss = self._exchanged(likely, self._answers(self._sized(state, rows)))
            if miss < best[1]:
                best = (self.first, *self.words[rows].tolist()), miss
            if miss < _MET:
                break
        return best

    def _answers(self, state: Tensor) -> Tensor:
        """Return what the heads answered at the first place (heads, width / heads)."""
        return (self.back @ (state - self.shift)).reshape(self.start.values.shape)

    def _sized(self, state: Tensor, rows: Tensor) -> Tensor:
        """Return a state as long as that of a text, given as one row of the words for each place."""
        places = torch.arange(len(rows))
        weights = self.atoms.weights[places, rows]
        value = self.start.weights[:, None] * self.start.values
        value = value + (weights[:, :, None] * self.atoms.values[places, rows]).sum(0)
        wanted = self.forth @ (value / (self.start.weights + weights.sum(0))[:, None]).flatten() + self.shift
        return state * float(wanted @ state) / float(state @ state)

    def _likely_lengths(self, answers: Tensor) -> list[int]:
        """Return lengths of texts, those first that explain most with usual words."""
        misses, weight = {}, self.start.weights
        value = weight[:, None] * self.start.values
        for place in range(len(self.atoms.weights)):
            usual = self.shares[:, None] * self.atoms.weights[place]
            weight = weight + usual.sum(0)
            value = value + (usual[:, :, None] * self.atoms.values[place]).sum(0)
            misses[place + 1] = float((value / weight[:, None] - answers).norm())
        least = min(misses.values())
        close = [length for length in misses if misses[length] <= _CLOSE * least]
        return sorted(close, key=lambda length: misses[length])[:_LENGTHS]

    def _terms(self, answers: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return w (v - a) of every word at every place (places, n, d), and of the first word (d,).

        They are turned and stretched so that those of usual words vary alike in all directions.
        """
        weights = self.atoms.weights[:length]
        size = self.start.weights + (self.shares[:, None] * weights).sum((0, 1))
        terms = ((weights / size)[..., None] * (self.atoms.values[:length] - answers)).flatten(2)
        start = ((self.start.weights / size)[:, None] * (self.start.values - answers)).flatten()
        centred = (terms - (self.shares[:, None] * terms).sum(1, keepdim=True)) * self.shares[:, None].sqrt()
        centred = centred.flatten(0, 1)
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        turn = vectors / (values.clamp_min(0.0) + _KNOWN * values[-1]).sqrt()
        return terms @ turn, start @ turn

    def _relaxed(self, answers: Tensor, length: int) -> Tensor:
        """Return the likeliest words of every place (places, k), as rows of the words, likeliest first."""
        terms, start = self._terms(answers, length)
        flat, shape = terms.flatten(0, 1).float(), terms.shape[:2]
        base, point = start.float(), self.shares.float().repeat(len(terms), 1)
        largest = float(torch.linalg.eigvalsh((flat.T @ flat).double())[-1])
        ahead, pace = point, 1.0
        for _ in range(_DESCENTS):
            slope = flat @ (base + flat.T @ ahead.flatten())
            following = _simplex(ahead - slope.reshape(shape) / largest)
            faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2
            ahead = following + (pace - 1) / faster * (following - point)
            point, pace = following, faster
        return point.topk(min(_LIKELY, point.shape[1]), dim=1).indices

    def _exchanged(self, likely: Tensor, answers: Tensor) -> tuple[Tensor, float]:
        """Exchange words at two places at once, among the likeliest (places, k), until no pair brings the sum
        of all terms nearer to zero; return one row of the words for each place and what is left.
        """
        terms, start = self._terms(answers, len(likely))
        usual = start + (self.shares[:, None] * terms).sum((0, 1))
        near = terms[torch.arange(len(likely))[:, None], likely]
        products = torch.einsum("pid,qjd->pqij", near, near)
        alone, sizes = near @ start, products.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1)
        chosen = [0] * len(likely)
        for _ in range(_SWEEPS):
            before = list(chosen)
            for place, other in itertools.combinations(range(len(chosen)), 2):
                beside = [index for index in range(len(chosen)) if index not in (place, other)]
                held = sum((products[index, :, chosen[index]] for index in beside), alone)
                single = sizes + 2 * held
                both = single[place][:, None] + single[other] + 2 * products[place, other]
                chosen[place], chosen[other] = divmod(int(both.argmin()), both.shape[1])
            if chosen == before:
                break
        rows = likely[torch.arange(len(likely)), chosen]
        left = start + near[torch.arange(len(likely)), chosen].sum(0)
        return rows, float(left.norm() / usual.norm())


def _simplex(points: Tensor) -> Tensor:
    """Return the nearest points (n, k) that are shares of one.

    Source: Held, Wolfe and Crowder, 1974.
    """
    ordered, _ = points.sort(dim=1, descending=True)
    sums = ordered.cumsum(1) - 1
    places = torch.arange(1, points.shape[1] + 1)
    last = (ordered > sums / places).sum(1, keepdim=True)
    return (points - sums.gather(1, last - 1) / last).clamp_min(0.0)


def neuron_imprint() -> Attack:
    """Return the reader of crafted bottleneck adapters."""
    return PlainAttack(
        name="neuron_imprint",
        family="active",
        attempt=_read,
        requires=("model", "prior.examples"),
        summary="whole texts from an adapter of which a malicious server made one neuron fire for each",
    )
