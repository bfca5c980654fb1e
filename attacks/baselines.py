"""What guessing reaches: the prior baselines every leak is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def unigram_tokens(frequencies: Tensor, count: int) -> Tensor:
    """Return the `count` most frequent tokens: the best guess at a token set without looking."""
    return frequencies.topk(min(count, len(frequencies))).indices


def random_tokens(vocabulary: int, count: int, *, seed: int) -> Tensor:
    """Return `count` tokens drawn uniformly with replacement."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def uniform_counts(classes: int, examples: int) -> Tensor:
    """Return the label counts of the uniform guess, as evenly as whole numbers allow."""
    counts = torch.full((classes,), examples // classes)
    counts[: examples % classes] += 1
    return counts


def expected_counts(frequencies: Tensor, examples: int) -> Tensor:
    """Return label counts in proportion to public class frequencies (not rounded)."""
    return frequencies.double() / frequencies.double().sum() * examples


def grey_image(shape: tuple[int, ...], level: float = 0.5) -> Tensor:
    """Return the constant image."""
    return torch.full(shape, level)


def mean_image(public: Tensor) -> Tensor:
    """Return the mean of public images (n, c, h, w): what an attack that learned nothing should not beat."""
    return public.double().mean(0).to(public.dtype)


def nearest_public(recovered: Tensor, public: Tensor) -> Tensor:
    """Return the public image nearest to a recovered one.

    An attack is worth something only if it beats this hallucination.
    """
    return public[int((public - recovered).flatten(1).square().sum(1).argmin())]


def language_model_text(step: Tensor, length: int) -> Tensor:
    """Return the greedy chain of a bigram table of log-probabilities (vocabulary, vocabulary), from its most
    likely start.
    """
    token = int(step.logsumexp(0).argmax())
    text = [token]
    while len(text) < length:
        text.append(int(step[text[-1]].argmax()))
    return torch.tensor(text)
