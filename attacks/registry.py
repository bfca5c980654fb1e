"""Every attack by name, and the taxonomy of published attacks with what is implemented here and why the rest
is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attacks import membership
from attacks.contract import Attack
from attacks.inversion import (
    active,
    active_adapters,
    active_neurons,
    active_text,
    adapters,
    aggregate,
    batch_norm,
    embeddings,
    fedavg,
    labels,
    learned,
    linear,
    matching,
    position,
    somp,
    span,
    text,
    tiger,
    tokens,
)

ATTACKS: dict[str, Callable[[], Attack]] = {
    "token_presence": tokens.token_presence,
    "label_identity": labels.label_identity,
    "idlg_label": labels.idlg_label,
    "llg": labels.llg,
    "ilrg": labels.ilrg,
    "linear_readout": linear.linear_readout,
    "batch_statistics": batch_norm.batch_statistics,
    "spear": linear.spear,
    "adapter_readout": adapters.adapter_readout,
    "position_text": position.position_text,
    "position_vision": position.position_vision,
    "april": position.april,
    "span": span.span,
    "span_exact": span.span_exact,
    "somp": somp.somp,
    "tiger": tiger.tiger,
    "matched_filter": membership.matched_filter,
    "projection_residual": membership.projection_residual,
    "lira": membership.lira,
    "rmia": membership.rmia,
    "cocktail_party": aggregate.cocktail_party,
    "dlg": matching.dlg,
    "idlg": matching.idlg,
    "inverting_gradients": matching.inverting_gradients,
    "modern_inversion": matching.modern_inversion,
    "grad_inversion": matching.grad_inversion,
    "grad_vit": matching.grad_vit,
    "tag": embeddings.tag,
    "text_matching": embeddings.text_matching,
    "text_matching_whitened": embeddings.text_matching_whitened,
    "lamp": text.lamp,
    "film": text.film,
    "grab": text.grab,
    "fedavg_unrolled": fedavg.unrolled,
    "fedavg_surrogate": fedavg.surrogate,
    "learned_inversion": learned.learned_inversion,
    "imprint": active.imprint,
    "trap_weights": active.trap_weights,
    "fishing": active.fishing,
    "model_inconsistency": active.model_inconsistency,
    "adapter_leak": active_adapters.adapter_leak,
    "lora_leak": active_adapters.lora_leak,
    "prompt_membership": active_adapters.prompt_membership,
    "decepticon": active_text.decepticon,
    "encoder_bins": active_text.encoder_bins,
    "neuron_imprint": active_neurons.neuron_imprint,
}


def build(name: str) -> Attack:
    """Return a registered attack.

    Raises: KeyError naming the known attacks.
    """
    if name not in ATTACKS:
        raise KeyError(f"no attack named {name!r}; known: {', '.join(sorted(ATTACKS))}")
    return ATTACKS[name]()


Status = Literal["implemented", "partly", "not"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published attack: its number in the taxonomy, its source, and where it stands here."""

    number: int
    name: str
    source: str
    group: str
    status: Status
    where: str = ""
    reason: str = ""


def _entry(
    number: int, group: str, name: str, source: str, status: Status, where: str, reason: str
) -> Published:
    return Published(
        number=number, group=group, name=name, source=source, status=status, where=where, reason=reason
    )


_IMAGES, _PRIORS, _ANALYTIC = (
    "images, by optimisation",
    "images, with a learned prior",
    "closed form, passive",
)
_ACTIVE, _TEXT, _PEFT, _OTHER = (
    "malicious server",
    "text",
    "parameter-efficient tuning",
    "labels and inference",
)

# fmt: off
TAXONOMY: tuple[Published, ...] = (
    _entry(1, _IMAGES, "Deep Leakage from Gradients", "1906.08935", "implemented", "dlg",
           "L-BFGS on images and label logits together"),
    _entry(2, _IMAGES, "iDLG", "2001.02610", "implemented", "idlg",
           "the label is read first; idlg_label is that step alone"),
    _entry(3, _IMAGES, "Inverting Gradients", "2003.14053", "implemented", "inverting_gradients",
           "total variation falls during the run"),
    _entry(4, _IMAGES, "GradInversion", "2104.07586", "partly", "grad_inversion",
           "statistics and consensus of restarts; images are not registered"),
    _entry(5, _IMAGES, "GradViT", "CVPR 2022", "partly", "grad_vit",
           "patch prior; no prior from a second, convolutional network"),
    _entry(6, _IMAGES, "HF-GradInv, GI-NAS, AFGI, MAGIA", "2509.18170", "not", "",
           "increments over Inverting Gradients"),
    _entry(7, _IMAGES, "FedLeak", "2506.08435", "partly", "modern_inversion",
           "any part of the gradient is matched; no gradient regularisation"),
    _entry(8, _IMAGES, "FedAvg inversion", "2206.12395", "implemented", "fedavg_unrolled",
           "simulated SGD clients, order-invariant priors"),
    _entry(9, _IMAGES, "SME", "ICML 2023", "implemented", "fedavg_surrogate",
           "one point between old and new weights, found with the images"),
    _entry(10, _IMAGES, "NL-SME, trajectory matching", "2509.22082", "not", "",
           "increment over SME: a curved path instead of a line"),
    _entry(11, _PRIORS, "GIAS, GGL, GIFD", "2110.14962", "not", "",
           "needs a trained image generator, none is shipped"),
    _entry(12, _PRIORS, "CI-Net, GRNN", "TIFS 2022", "not", "", "works on sigmoid networks only"),
    _entry(13, _PRIORS, "Learning to Invert", "2210.10880", "implemented", "learned_inversion",
           "trained on the exact client, defences included"),
    _entry(14, _PRIORS, "Bayes-optimal inversion", "2111.04706", "partly", "modern_inversion",
           "stops at known noise; no posterior over defences"),
    _entry(15, _PRIORS, "Diffusion priors", "2511.10423", "not", "", "needs a trained diffusion model"),
    _entry(16, _ANALYTIC, "First linear layer", "Phong 2017", "implemented", "linear_readout",
           "exact for an input alone on a neuron"),
    _entry(17, _ANALYTIC, "R-GAP", "2010.07733", "not", "",
           "batch of one through convolutions without pooling only"),
    _entry(18, _ANALYTIC, "APRIL", "2112.14087", "implemented", "april",
           "and position_vision, which needs no modified block"),
    _entry(19, _ANALYTIC, "Cocktail Party", "2209.05578", "implemented", "cocktail_party",
           "own objective: contrast, smoothness, unlikeness"),
    _entry(20, _ANALYTIC, "SPEAR", "2403.03945", "implemented", "spear",
           "the sampling variant; SPEAR++ is not built"),
    _entry(21, _ANALYTIC, "HSSP", "2409.14260", "not", "",
           "same setting as SPEAR, cost grows faster with the batch"),
    _entry(22, _ACTIVE, "Robbing the Fed", "2110.13057", "implemented", "imprint",
           "cumulative and sparse bins"),
    _entry(23, _ACTIVE, "Trap weights", "2112.02918", "implemented", "trap_weights",
           "first linear layer; convolutions in front are not crafted"),
    _entry(24, _ACTIVE, "Fishing", "2202.00580", "implemented", "fishing",
           "by class and by feature; the threshold is bisected by the caller"),
    _entry(25, _ACTIVE, "LOKI", "2303.12233", "implemented", "imprint",
           "own bins for each client, so that a sum keeps them apart"),
    _entry(26, _ACTIVE, "Scale-MIA", "2311.05808", "not", "",
           "needs a decoder trained on much auxiliary data"),
    _entry(27, _ACTIVE, "SEER", "2306.03013", "not", "",
           "needs joint training of a secret decoder on an accelerator"),
    _entry(28, _ACTIVE, "Model inconsistency", "2111.07380", "implemented", "model_inconsistency",
           "all clients but one are silenced"),
    _entry(29, _ACTIVE, "ARES, VGIA", "2603.17623", "not", "",
           "sparse recovery on tabular data, not in scope yet"),
    _entry(30, _ACTIVE, "Maui, head-only inversion", "2509.11451", "partly", "modern_inversion",
           "the head alone is matched; no feature inversion"),
    _entry(31, _TEXT, "Token presence", "FILM, stage 1", "implemented", "token_presence",
           "with AdamW decay removal and tied heads"),
    _entry(32, _TEXT, "TAG", "2103.06819", "implemented", "tag",
           "decoded by what the first layer sees, then exchanged token by token"),
    _entry(33, _TEXT, "LAMP", "2202.08827", "implemented", "lamp",
           "with any language model the caller gives, or none"),
    _entry(34, _TEXT, "FILM", "2205.08514", "implemented", "film",
           "the beam needs a language model and trained token rows"),
    _entry(35, _TEXT, "GRAB", "2507.21198", "implemented", "grab",
           "dropout masks as variables; orders are left to the matching"),
    _entry(36, _TEXT, "FET", "COLING 2025", "not", "", "discrete search close to LAMP"),
    _entry(37, _TEXT, "Partial gradients", "2406.00999", "implemented", "text_matching",
           "matches whatever tensors were shared"),
    _entry(38, _TEXT, "DAGER", "2405.15586", "implemented", "span_exact",
           "span adds LoRA's second factor and an outlier test"),
    _entry(39, _TEXT, "SOMP", "2603.16761", "implemented", "somp",
           "decoders; whitened gradients and exchanges of tokens are our own"),
    _entry(40, _TEXT, "TIGER", "2606.18312", "implemented", "tiger",
           "dummies stay in the hull of the vocabulary"),
    _entry(41, _TEXT, "FedSpy-LLM", "2604.06297", "partly", "span", "same subspace, adapters included"),
    _entry(42, _TEXT, "Decepticons, Panning for Gold", "2201.12675", "implemented", "decepticon",
           "decoders; encoder_bins for encoders; no targeted phrases"),
    _entry(43, _PEFT, "PEFTLeak", "2506.04453", "implemented", "adapter_leak",
           "one round; more rounds would move the bins"),
    _entry(44, _PEFT, "MineGrad", "2608.01521", "implemented", "lora_leak", "text encoders, one example"),
    _entry(45, _PEFT, "UTR", "2601.17533", "partly", "adapter_readout", "the readout of biased adapters"),
    _entry(46, _PEFT, "ReCIT", "2504.20570", "not", "", "needs malicious pre-training of a large model"),
    _entry(47, _PEFT, "LoRA gradient matching", "2503.11514", "partly", "grad_vit",
           "patch prior and parameter mask, without the generator"),
    _entry(48, _PEFT, "PromptMIA", "2601.06641", "implemented", "prompt_membership",
           "planted keys of a pool"),
    _entry(49, _OTHER, "iDLG, LLG, RLG, iLRG labels", "2105.09369", "implemented", "label_identity",
           "also llg, ilrg, idlg_label"),
    _entry(50, _OTHER, "ProjRes", "2604.21197", "implemented", "projection_residual",
           "membership from row spaces"),
    _entry(51, _OTHER, "SecAgg-as-LDP audit", "2403.17775", "partly", "matched_filter",
           "the likelihood test on sums"),
    _entry(52, _OTHER, "CANIFE and one-run canaries", "2210.02912", "implemented", "canary",
           "random and coordinate canaries, not crafted ones"),
    _entry(53, _OTHER, "SRATTA", "2306.07644", "not", "",
           "needs many rounds of sums over first dense layers"),
    _entry(54, _OTHER, "Property inference", "1805.04049", "not", "",
           "needs a classifier trained on simulated updates"),
    _entry(55, _OTHER, "I2F risk estimate", "2309.13016", "not", "",
           "a bound for images, not an attack on an update"),
    _entry(56, _PEFT, "NeuroImprint", "2606.20553", "implemented", "neuron_imprint",
           "text encoders; a text is read from the state of its first place"),
)
# fmt: on
