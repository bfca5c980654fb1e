"""Encoder-decoder classifiers find the end of a text by a token:
probes and rehearsals must not trip over it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification, T5Config, T5ForSequenceClassification

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion.channels import end_token, ended
from attacks.inversion.embeddings import logits_of, text_frame
from attacks.registry import build
from attacks.rehearsal import invented_batch, rehearse
from tests.attacks.models import bert, gradient, sentences, text_loss

END = 5
SMALL = Budget(steps=5_000, iterations=5, restarts=1)


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        num_labels=2,
        pad_token_id=1,
        eos_token_id=END,
        decoder_start_token_id=1,
    )
    return T5ForSequenceClassification(config).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        dropout=0.0,
        max_position_embeddings=32,
        num_labels=2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=END,
        attn_implementation="eager",
    )
    return BartForSequenceClassification(config).eval()


def batch():
    ids = sentences(2, 6, 300)
    ids[ids == END] = 17
    ids[:, -1] = END
    return {"input_ids": ids, "labels": torch.tensor([0, 1])}


def seen_of(model) -> Observation:
    tensors = gradient(model, batch(), text_loss)
    return Observation(kind="gradient", tensors=tensors, knowledge=Knowledge(batch_size=2, sequence_length=6))


@pytest.mark.parametrize("make", [t5, bart])
def test_invented_texts_close_with_the_end_token_and_hold_it_nowhere_else(make) -> None:
    model = make()
    for seed in range(20):
        invented, truth = invented_batch(model, lengths=(8,) * 4, seed=seed)
        ids = invented["input_ids"]
        assert ids[:, -1].tolist() == [END] * 4
        assert not bool((ids[:, :-1] == END).any())
        assert truth.sequences == tuple(map(tuple, ids.tolist()))
        model(**invented)  # its head takes them
    rehearsed = rehearse(seen_of(model), model, seed=0)
    assert rehearsed is not None
    assert all(text[-1] == END for text in rehearsed[1].sequences)


def test_other_models_keep_their_texts() -> None:
    ids = torch.tensor([[4, END, 6]])
    assert end_token(bert()) is None
    assert torch.equal(ended(bert(), ids), ids)


@pytest.mark.parametrize("name", ["span", "span_exact", "label_identity", "adapter_readout", "tag", "tiger"])
@pytest.mark.parametrize("make", [t5, bart])
def test_no_attack_trips_over_a_missing_end(name: str, make) -> None:
    model = make()
    result = build(name).run(seen_of(model), model, Prior(), SMALL, 0)
    assert "eos" not in result.reason
    assert result.applicable or result.reason


def test_the_words_of_an_encoder_decoder_are_read_exactly() -> None:
    model, true = t5(), set(batch()["input_ids"].flatten().tolist())
    result = build("span").run(seen_of(model), model, Prior(), Budget.quick(), 0)
    assert set(result.of("token_set")[0].tolist()) == true


@pytest.mark.parametrize("make", [t5, bart])
def test_dummies_stand_for_the_text_in_encoder_and_decoder(make) -> None:
    model = make()
    frame = text_frame(seen_of(model), model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        dummies = model.get_input_embeddings()(ids)
        assert torch.allclose(logits_of(model, frame, dummies), model(input_ids=ids).logits, atol=1e-5)
