"""Models that need no download: tiny random ones built in code, and the mean-pooling head of sentence
encoders.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertModel, BertPreTrainedModel

from ffm_secure.foreign import Configuration

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = """
a about after again all also an and any are as at back be because been before being but by can care case chest
clinic come could day days did do doctor does down end even every fever few find first follow for found from
get give good great had has have he head health her here high him his history home hospital how i if in into
is it its just know last like little long look made make man many may me medical mild more most much must my
name new night no normal not note now of off old on one only or other our out over own pain part patient
people place plan present pressure reports right said same say see severe she should show since small so some
still such take than that the their them then there these they thing think this those three through time to
today too treatment two under up us use very was way we week well were what when where which while who will
with work would year years yes you your movie film bad best love never story ##s ##ed ##ing ##er ##ly ##ion
##es ##al ##en ##y ##ic ##ment ##ness ##able ##or ##ar ##an ##in ##on ##at ##it
"""


class MeanPoolClassifier(BertPreTrainedModel):  # type: ignore[no-untyped-call]
    """Classify from the mean of the token vectors: the natural head of a sentence encoder with BERT layout.

    The calling convention is that of transformers, so that PEFT, `save_pretrained` and `from_pretrained` work
    on it. Soft prompt tokens are part of the mean, as PEFT's own prompt tuning has it.
    """

    def __init__(self, config: Configuration) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: object,
    ) -> SequenceClassifierOutput:
        """Return logits [B, labels]; positions the attention mask hides do not count."""
        hidden = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        ).last_hidden_state
        logits = self.classifier(masked_mean(hidden, attention_mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average [B, T, d] over the positions whose mask is 1, giving [B, d]."""
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def tiny_tokenizer(*, segments: bool = False) -> PreTrainedTokenizerFast:
    """Build a lower-case word-piece tokenizer from a fixed vocabulary: common words, endings, single
    characters.

    With `segments` it tells the two texts of a pair apart, as BERT wants it.
    """
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*_SPECIAL, *characters, *("##" + c for c in characters), *_WORDS.split()]
    vocabulary = {}
    for index, piece in enumerate(dict.fromkeys(pieces)):
        vocabulary[piece] = index
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=_POSITIONS,
        model_input_names=["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


_POSITIONS = 256


def _bert(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
    )


def _gpt2(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _llama(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vit(_: PreTrainedTokenizerFast) -> PretrainedConfig:
    return ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_channels=3,
    )


def _t5(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
    )


def _clip(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    tower = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "projection_dim": 32,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": 32, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)


_CONFIGS: dict[str, Callable[[PreTrainedTokenizerFast], PretrainedConfig]] = {
    "tiny-bert": _bert,
    "tiny-gpt2": _gpt2,
    "tiny-llama": _llama,
    "tiny-vit": _vit,
    "tiny-t5": _t5,
    "tiny-clip": _clip,
}
_CLASSES: dict[tuple[str, str], type[PreTrainedModel]] = {
    ("tiny-bert", "text_classification"): BertForSequenceClassification,
    ("tiny-bert", "masked_lm"): BertForMaskedLM,
    ("tiny-gpt2", "text_classification"): GPT2ForSequenceClassification,
    ("tiny-gpt2", "causal_lm"): GPT2LMHeadModel,
    ("tiny-llama", "text_classification"): LlamaForSequenceClassification,
    ("tiny-llama", "causal_lm"): LlamaForCausalLM,
    ("tiny-vit", "image_classification"): ViTForImageClassification,
    ("tiny-t5", "sequence_to_sequence"): T5ForConditionalGeneration,
    ("tiny-clip", "image_text_classification"): CLIPModel,
    ("tiny-clip", "image_text_contrastive_classification"): CLIPModel,
}
TINY = tuple(_CONFIGS)


def tiny_kinds(name: str) -> tuple[str, ...]:
    """List the tasks a tiny model can do."""
    return tuple(kind for model, kind in _CLASSES if model == name)


def build_tiny(
    name: str, *, kind: str, labels: int | None, seed: int, prepare: Callable[[Any], Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """Build a tiny model with random weights that depend on the seed alone; `prepare` may edit its
    configuration.
    """
    tokenizer = tiny_tokenizer(segments=name == "tiny-bert")
    config = _CONFIGS[name](tokenizer)
    if labels is not None:
        config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CLASSES[name, kind](prepare(config))
    return model, None if kind == "image_classification" else tokenizer
