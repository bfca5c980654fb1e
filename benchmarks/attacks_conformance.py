"""Repeat the figures known for each attack, published or measured by an earlier independent rendering, and
compare.

A line states the reference, the range a repetition must fall into, what was measured here and over how many
runs. Ranges are exact where theory is exact; where the reference is a count, 99 % of the sampling of both;
where it is an AUC, 99 % of its sampling law around the Gaussian prediction; where it is a PSNR under noise, 4
dB either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks import Budget, Knowledge, Observation, Prior, Reconstruction
from attacks.canary import clopper_pearson
from attacks.inversion import active
from attacks.metrics import (
    auc,
    exact_sequence_rate,
    gaussian_auc,
    match_one_to_one,
    positional_accuracy,
    psnr,
    similarity_matrix,
)
from attacks.registry import build
from attacks.scoring import auc_deviation
from benchmarks.attacks_peer import crops
from tests.attacks import models

BUDGET = Budget(steps=120_000, iterations=400, restarts=1)
EXACT_DB, Z99 = 60.0, 2.576
ROWS = ("wte", "embed")  # token rows, hidden from the span so that it searches the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure held against its reference."""

    attack: str
    setting: str
    unit: str
    reference: str
    low: float
    high: float
    measured: float
    runs: int
    seconds: float

    @property
    def within(self) -> bool:
        """Say whether the repetition falls into the range."""
        return bool(self.low <= self.measured <= self.high)  # a comparison of NumPy's numbers is not JSON


def run(
    name: str, observation: Observation, model: nn.Module, prior: Prior | None = None, *, iterations: int = 0
) -> Reconstruction:
    """Run one attack with seed 0."""
    budget = Budget(steps=120_000, iterations=iterations, restarts=1) if iterations else BUDGET
    return build(name).run(observation, model, prior or Prior(), budget, 0)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def labelled(ids: Tensor) -> dict[str, Tensor]:
    """Return sentences with alternating labels."""
    return {"input_ids": ids, "labels": torch.arange(len(ids)) % 2}


def without_rows(observation: Observation) -> Observation:
    """Return the observation without token and position rows."""
    return observation.replace_tensors(
        {n: t for n, t in observation.tensors.items() if not any(part in n for part in (*ROWS, "wpe"))}
    )


def share(reconstruction: Reconstruction, truth: Tensor, floor: float) -> float:
    """Return the share of true images that a one-to-one matching finds above a PSNR."""
    kind = "inputs" if reconstruction.of("inputs") and not reconstruction.of("image") else "image"
    if not reconstruction.items:
        return 0.0
    flat = [value.flatten().double() for value in reconstruction.of(kind)]
    table = similarity_matrix(flat, [image.flatten().double() for image in truth], psnr)
    return sum(table[row, column] > floor for row, column in match_one_to_one(table)) / len(truth)


def counted(successes: int, trials: int, repeated: int) -> tuple[float, float]:
    """Return the 99 % range of a repetition over `repeated` trials of a reference that is a count."""
    rate, (low, high) = successes / trials, clopper_pearson(successes, trials, 0.005)
    own = Z99 * (rate * (1 - rate) / repeated) ** 0.5
    return max(0.0, rate - ((rate - low) ** 2 + own**2) ** 0.5), min(
        1.0, rate + ((high - rate) ** 2 + own**2) ** 0.5
    )


# ------------------------------------------------------------------------------------------------------- text


def spans(seeds: int) -> Iterator[Line]:
    """Sentences by the span, below the width and at it, from one client and from a sum."""
    settings = [(count, 1) for count in (1, 2, 4, 8, 15, 16)] + [(1, 15), (1, 16)]
    for batch, clients in settings:
        began, rates = time.process_time(), []
        for seed in range(seeds):
            model = models.gpt2(vocabulary=600, seed=seed).double()
            ids = models.sentences(batch * clients, 8, 600, seed=seed)
            parts = [labelled(rows) for rows in ids.split(batch)]
            observation = (
                models.observe(model, parts[0], models.text_loss)
                if clients == 1
                else models.observe_sum(model, parts, models.text_loss)
            )
            reconstruction = run("span_exact", without_rows(observation), model)
            rates.append(
                exact_sequence_rate([value.tolist() for value in reconstruction.of("sequence")], ids.tolist())
            )
        below = batch * clients * 8 < 128
        who = f"batch of {batch}" if clients == 1 else f"sum of {clients} clients"
        yield Line(
            attack="span_exact",
            setting=f"GPT-2, width 128, {who}, {batch * clients * 8} tokens",
            unit="sentences exact",
            reference="1 below the width, 0 at it",
            low=float(below),
            high=float(below),
            measured=mean(rates),
            runs=seeds,
            seconds=time.process_time() - began,
        )


def language(seeds: int) -> Iterator[Line]:
    """All but the last token of a causal language model."""
    for batch in (1, 4, 8):
        began, rates = time.process_time(), []
        for seed in range(seeds):
            model = models.gpt2(classes=None, vocabulary=600, seed=seed)
            ids = models.sentences(batch, 8, 600, seed=seed)
            observation = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
            reconstruction = run("span", without_rows(observation), model)
            rates.append(
                exact_sequence_rate(
                    [value.tolist() for value in reconstruction.of("sequence")], ids[:, :-1].tolist()
                )
            )
        yield Line(
            attack="span",
            setting=f"causal language model, batch of {batch}",
            unit="prefixes exact",
            reference="1",
            low=1.0,
            high=1.0,
            measured=mean(rates),
            runs=seeds,
            seconds=time.process_time() - began,
        )


def lora_laws(seeds: int) -> Iterator[Line]:
    """A shows tokens up to r when B is not zero, B fewer than r already at the first step."""
    for first_step in (False, True):
        began, right, cells = time.process_time(), 0, 0
        for seed in range(min(seeds, 2)):
            for rank in (4, 8, 16, 32):
                for tokens in (4, 8, 16):
                    modules = ("attn.c_attn", "mlp.c_fc")
                    model = models.add_lora(
                        models.gpt2(vocabulary=400, seed=seed), rank, modules, zero_b=first_step
                    )
                    count = max(1, tokens // 8)
                    ids = models.sentences(count, tokens // count, 400, seed=seed)
                    reconstruction = run(
                        "span_exact", models.observe(model, labelled(ids), models.text_loss), model
                    )
                    rate = exact_sequence_rate(
                        [value.tolist() for value in reconstruction.of("sequence")], ids.tolist()
                    )
                    right += rate == float(tokens < rank if first_step else tokens <= rank)
                    cells += 1
        law = "first step, B = 0: exact iff tokens < r" if first_step else "B not 0: exact iff tokens <= r"
        yield Line(
            attack="span_exact",
            setting=f"LoRA on GPT-2, {law}",
            unit="cells that obey",
            reference="1",
            low=1.0,
            high=1.0,
            measured=right / cells,
            runs=cells,
            seconds=time.process_time() - began,
        )


def placed(seeds: int) -> Iterator[Line]:
    """Tokens and their positions by least squares on embedding rows."""
    for name, make in (("BERT", models.bert), ("GPT-2", models.gpt2)):
        for batch, low in ((1, 1.0), (8, 1.0), (20, 0.8)):
            began, recalls = time.process_time(), []
            for seed in range(seeds):
                model = make(width=128, vocabulary=2000, seed=seed)
                ids = models.sentences(batch, 8, 2000, seed=seed, distinct=batch < 20)
                reconstruction = run(
                    "position_text", models.observe(model, labelled(ids), models.text_loss), model
                )
                true = {(place, token) for row in ids.tolist() for place, token in enumerate(row)}
                pairs = {
                    tuple(pair) for value in reconstruction.of("placed_tokens") for pair in value.tolist()
                }
                recalls.append(len(pairs & true) / len(true))
            yield Line(
                attack="position_text",
                setting=f"{name}, width 128, batch of {batch} x 8",
                unit="placed tokens found",
                reference="1" if batch < 20 else "0.88 to 1.00",
                low=low,
                high=1.0,
                measured=mean(recalls),
                runs=seeds,
                seconds=time.process_time() - began,
            )


def presence(seeds: int) -> Iterator[Line]:
    """Token rows after one AdamW step with weight decay."""
    began, rates = time.process_time(), []
    for seed in range(seeds):
        model, ids = models.gpt2(tied=False, seed=seed), models.sentences(4, 8, 2000, seed=seed)
        observation = models.observe_delta(
            model, [labelled(ids)], models.text_loss, learning_rate=1e-3, optimiser="adamw", weight_decay=0.01
        )
        reconstruction = run("token_presence", observation, model)
        rates.append(float(set(reconstruction.of("token_set")[0].tolist()) == set(ids.flatten().tolist())))
    yield Line(
        attack="token_presence",
        setting="GPT-2, one AdamW step with decay, 32 tokens of 2000",
        unit="sets exact",
        reference="1",
        low=1.0,
        high=1.0,
        measured=mean(rates),
        runs=seeds,
        seconds=time.process_time() - began,
    )


def matched_text(seeds: int) -> Iterator[Line]:
    """Tokens in place by gradient matching on whole, LoRA-only and prompt-only updates of a BERT."""
    rows = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
    settings: list[tuple[str, int, int, tuple[int, int], Callable[[int], nn.Module]]] = [
        ("all but embedding rows", 1, 120, (16, 16), lambda seed: models.bert(seed=seed)),
        ("LoRA of rank 8, B not 0", 1, 150, (16, 16), lambda seed: _adapted(seed, zero_b=False)),
        ("LoRA of rank 8, B = 0", 1, 150, (16, 16), lambda seed: _adapted(seed, zero_b=True)),
        ("8 soft prompts only", 1, 500, (15, 16), lambda seed: models.Prompted(models.bert(seed=seed), 8)),
    ]
    for name, batch, iterations, (right, of), make in settings:
        began, rates = time.process_time(), []
        for seed in range(min(seeds, 2)):
            model, ids = make(seed), models.sentences(batch, 8, 1000, seed=seed)
            known = Knowledge(labels=tuple(range(batch)), sequence_length=8)
            observation = models.observe(
                model, labelled(ids), models.text_loss, knowledge=known, batch_size=batch
            )
            observation = observation.replace_tensors(
                {n: t for n, t in observation.tensors.items() if not n.endswith(rows)}
            )
            reconstruction = run("text_matching", observation, model, iterations=iterations)
            table = similarity_matrix(
                [x.tolist() for x in reconstruction.of("sequence")], ids.tolist(), positional_accuracy
            )
            rates.append(sum(table[row, column] for row, column in match_one_to_one(table)) / batch)
        low, high = counted(right, of, 8 * batch * len(rates))
        yield Line(
            attack="text_matching", setting=f"BERT, width 64, {name}", unit="tokens in place",
            reference=f"{right}/{of} tokens", low=low, high=high, measured=mean(rates), runs=len(rates),
            seconds=time.process_time() - began,
        )  # fmt: skip


def _adapted(seed: int, *, zero_b: bool) -> nn.Module:
    return models.add_lora(models.bert(seed=seed), 8, ("query", "value"), zero_b=zero_b, seed=seed)


# ----------------------------------------------------------------------------------------------------- images


def vision(seeds: int) -> Iterator[Line]:
    """Patches of a standard vision transformer by least squares, exact and under noise relative to the
    gradient.

    The known figures are those of four heads with torch's own initial weights and of pictures with something
    in every patch. With two heads, transformers' smaller initial weights and small squares of a photograph,
    whose patches look alike, the gradients of the places are nearly the same and noise weighs more: these
    lines have no reference and show by how much.
    """
    for noise, batch, reference in ((0.0, 1, 200.0), (0.0, 2, 8.0)):
        yield _vision(
            seeds, noise, batch, str(reference), (140.0, 200.0) if batch == 1 else (0.0, 12.0), known=True
        )
    for noise, reference in ((1e-4, 54.8), (1e-3, 34.6), (1e-2, 20.5), (1e-1, 11.9)):
        yield _vision(seeds, noise, 1, f"{reference:g}", (reference - 4.0, reference + 4.0), known=True)
    for noise in (1e-4, 1e-3, 1e-2):
        yield _vision(seeds, noise, 1, "none", (0.0, 200.0), known=False)


def _vision(
    seeds: int, noise: float, batch: int, reference: str, bounds: tuple[float, float], *, known: bool
) -> Line:
    began, values = time.process_time(), []
    for seed in range(seeds):
        model = models.vit(heads=4 if known else 2, seed=seed).double()
        if known:
            _own_initial_weights(model, seed)
        # Squares of both photographs in turn; the first alone where patches are to look alike.
        pictures = crops(batch + 1, 32, seed, cut=(300, 427) if known else (96, 256)).double()
        images = pictures[seed % 2 if known else 0 :][:batch]
        data = {"images": images, "labels": torch.arange(batch)}
        observation = models.observe(
            model, data, models.image_loss, knowledge=Knowledge(image_shape=(3, 32, 32))
        )
        if noise:
            generator = torch.Generator().manual_seed(seed)
            observation = observation.replace_tensors(
                {n: _shaken(t, noise, generator) for n, t in observation.tensors.items()}
            )
        values.append(psnr(run("position_vision", observation, model).of("image")[0].clamp(0, 1), images[0]))
    how = (
        "4 heads, torch's initial weights, wide squares"
        if known
        else "2 heads, transformers' initial weights, small squares"
    )
    cap = " (cap); single-precision output gives 140 or more" if bounds[0] == 140.0 else ""
    return Line(
        attack="position_vision",
        setting=f"ViT, width 192, batch of {batch}, relative noise {noise:g}, {how}",
        unit="PSNR dB",
        reference=reference + cap,
        low=bounds[0],
        high=bounds[1],
        measured=mean(values),
        runs=seeds,
        seconds=time.process_time() - began,
    )


def _own_initial_weights(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()


def _shaken(tensor: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return tensor + relative * tensor.square().mean().sqrt() * noise


def dense(seeds: int) -> Iterator[Line]:
    """Inputs of a first dense layer by the bias trick and by SPEAR."""
    settings = [("linear_readout", batch, 256) for batch in (1, 2, 4, 8, 16)] + [
        ("spear", b, 200) for b in (2, 4, 6, 8, 10)
    ]
    counts = {8: (7, 8), 16: (7, 16)}
    for name, batch, width in settings:
        began, shares = time.process_time(), []
        runs = seeds if name == "linear_readout" or batch < 10 else min(seeds, 3)
        for seed in range(runs):
            torch.manual_seed(seed)
            model = (
                nn.Sequential(nn.Flatten(), nn.Linear(768, width), nn.ReLU(), nn.Linear(width, 10))
                .eval()
                .double()
            )
            images = (
                2 * torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double() - 1
            )
            images = images if name == "spear" else 0.5 * (images + 1)
            known = Knowledge(batch_size=batch, image_shape=(3, 16, 16))
            data = {"images": images, "labels": torch.arange(batch) % 10}
            reconstruction = run(name, models.observe(model, data, models.image_loss, knowledge=known), model)
            shares.append(share(reconstruction, images, EXACT_DB))
        right, of = counts.get(batch, (0, 0)) if name == "linear_readout" else (0, 0)
        low, high = counted(right, of, batch * runs) if of else (1.0, 1.0)
        yield Line(
            attack=name, setting=f"dense layer {width} x 768, batch of {batch}", unit="images exact",
            reference=f"{right}/{of}" if of else "1", low=low, high=high, measured=mean(shares), runs=runs,
            seconds=time.process_time() - began,
        )  # fmt: skip


def imprints(seeds: int) -> Iterator[Line]:
    """Inputs behind 512 bins, from one client and from sums."""
    images, labels = models.digits()
    counts = {
        (1, 8): (8, 8),
        (1, 32): (32, 32),
        (1, 64): (58, 64),
        (8, 8): (58, 64),
        (32, 8): (138, 256),
        (100, 8): (170, 800),
    }
    for (clients, batch), (right, of) in counts.items():
        began, shares = time.process_time(), []
        for seed in range(min(seeds, 3)):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            public, private = order[:900], order[900 : 900 + clients * batch]
            model = active.craft_imprint(
                models.mlp(), images[public], bins=512, direction=active.measurement(64, "random", seed=seed)
            )
            parts = [{"images": images[part], "labels": labels[part]} for part in private.split(batch)]
            observation = models.observe_sum(model, parts, models.image_loss)
            observation = Observation(
                kind="sum",
                tensors=observation.tensors,
                contributors=clients,
                metadata=dict(observation.metadata),
                knowledge=Knowledge(image_shape=(1, 8, 8)),
            )
            shares.append(share(run("imprint", observation, model), images[private], 40.0))
        low, high = counted(right, of, clients * batch * len(shares))
        yield Line(
            attack="imprint", setting=f"512 bins, {clients} clients x {batch}", unit="images exact",
            reference=f"{right}/{of}", low=low, high=high, measured=mean(shares), runs=len(shares),
            seconds=time.process_time() - began,
        )  # fmt: skip


def label_counts(seeds: int) -> Iterator[Line]:
    """Labels of an untrained network by the exact identity."""
    images, labels = models.digits()
    for batch in (1, 4, 16, 64):
        began, rates = time.process_time(), []
        for seed in range(seeds):
            chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:batch]
            model = models.mlp(seed=seed)
            data = {"images": images[chosen], "labels": labels[chosen]}
            observation = models.observe(
                model, data, models.image_loss, batch_size=batch, knowledge=Knowledge(image_shape=(1, 8, 8))
            )
            reconstruction = run(
                "label_identity",
                observation,
                model,
                Prior(examples={"images": images[1000:1200], "labels": labels[1000:1200]}),
            )
            counts = reconstruction.of("label_counts")[0].double()
            true = labels[chosen].bincount(minlength=10).double()
            rates.append(1.0 - float((counts - true).abs().sum()) / (2 * batch))
        yield Line(
            attack="label_identity",
            setting=f"untrained network, {batch} labels of 10 classes",
            unit="count accuracy",
            reference="1",
            low=1.0,
            high=1.0,
            measured=mean(rates),
            runs=seeds,
            seconds=time.process_time() - began,
        )


# ------------------------------------------------------------------------------------------------- membership


def canaries(seeds: int, *, trials: int = 300) -> Iterator[Line]:
    """A random direction of the clipping norm in a sum of eight clipped gradients, told from its absence by
    the noise law.
    """
    model = models.gpt2(width=64, vocabulary=500)
    rows = models.sentences(40, 8, 500)
    names = [name for name, _ in model.named_parameters()]
    singles = []
    for row in rows:
        grads = models.gradient(model, labelled(row[None]), models.text_loss)
        flat = torch.cat([grads[name].flatten() for name in names])
        singles.append(flat / max(1.0, float(flat.norm())))
    pool = torch.stack(singles)
    for multiplier in (0.5, 1.0, 2.0):
        began, scores = time.process_time(), ([], [])
        generator = torch.Generator().manual_seed(int(10 * multiplier))
        for trial in range(2 * trials):
            direction = torch.randn(pool.shape[1], generator=generator)
            direction /= direction.norm()
            chosen = torch.randperm(len(pool), generator=generator)[:8]
            update = pool[chosen].sum(0) + multiplier * torch.randn(pool.shape[1], generator=generator)
            inside = trial % 2
            scores[inside].append(float(direction @ (update + inside * direction)))
        expected = gaussian_auc(multiplier)
        spread = Z99 * auc_deviation(expected, trials, trials)
        yield Line(
            attack="canary",
            setting=f"random direction of norm C, {pool.shape[1]} parameters, noise {multiplier:g} C",
            unit="AUC",
            reference=f"{expected:.3f} (Gaussian prediction)",
            low=expected - spread,
            high=min(1.0, expected + spread),
            measured=auc(scores[1], scores[0]),
            runs=2 * trials,
            seconds=time.process_time() - began,
        )


def natural_members(seeds: int) -> Iterator[Line]:
    """Real examples by the matched filter:
    never better than the Gaussian prediction for the worst example.
    """
    images, labels = models.digits()
    for multiplier in (0.5, 1.0, 2.0):
        began, inside, outside = time.process_time(), [], []
        for seed in range(4 * seeds):
            model = models.mlp(width=32, seed=seed)
            order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
            data = {"images": images[order[:6]], "labels": labels[order[:6]]}
            observation = models.noised(models.observe(model, data, models.image_loss), multiplier, seed=seed)
            both = {"images": images[order[:12]], "labels": labels[order[:12]]}
            prior = Prior(
                candidates=both, examples={"images": images[1200:1250], "labels": labels[1200:1250]}
            )
            scores = run("matched_filter", observation, model, prior).of("scores")[0].tolist()
            inside += scores[:6]
            outside += scores[6:]
        expected = gaussian_auc(multiplier)
        yield Line(
            attack="matched_filter",
            setting=f"6 of 12 digits, noise {multiplier:g} C",
            unit="AUC",
            reference=f"at most {expected:.3f}",
            low=0.5 - Z99 * auc_deviation(0.5, len(inside), len(outside)),
            high=expected,
            measured=auc(inside, outside),
            runs=4 * seeds,
            seconds=time.process_time() - began,
        )


CHECKS: tuple[Callable[[int], Iterator[Line]], ...] = (
    spans,
    language,
    lora_laws,
    placed,
    presence,
    vision,
    dense,
    imprints,
    label_counts,
    canaries,
    natural_members,
    matched_text,
)


def lines(*, quick: bool) -> Iterator[Line]:
    """Run every check, printing as it goes; `quick` takes one seed and leaves gradient matching out."""
    print(
        f"{'attack':16} {'setting':62} {'unit':20} {'reference':>30} {'range':>15} "
        f"{'here':>8} {'ok':>3} {'s':>6}"
    )
    for check in CHECKS[:-1] if quick else CHECKS:
        for line in check(1 if quick else 5):
            between = f"{line.low:.3g} to {line.high:.3g}"
            print(
                f"{line.attack:16} {line.setting:62} {line.unit:20} {line.reference[:30]:>30} {between:>15}"
                f" {line.measured:8.3f} {'yes' if line.within else 'NO':>3} {line.seconds:6.1f}",
                flush=True,
            )
            yield line
