"""The mean-pooling head computed by the BERT classifier of transformers itself, for people who have nothing
of ours.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

from ffm_secure.models.builtin import MeanPoolClassifier

# Powers of two, so that scaling a float32 changes no bit of it.
_LOUD = 2.0**26  # what the mean is multiplied by, so that the vector it is added to vanishes beside it
_FIXED = 2.0**10  # how much larger than the mean the constant numbers are that decide the deviation
_SMALL = 2.0**-12  # keeps the tanh of the pooler on its straight part


def as_stock_classifier(model: MeanPoolClassifier) -> BertForSequenceClassification:
    """Write a mean-pooling classifier as a plain BERT classifier, one layer deeper and twice as wide.

    No class of transformers averages token vectors behind BERT, but attention does: a last layer whose
    queries and keys are zero gives every word the same weight, so the first place receives the masked mean.
    Two things stand between that mean and the linear head, and both are made harmless. Every vector is held
    twice, which changes no mean and no deviation and leaves half the places free; constants in that half fix
    the deviation the last normalisations divide by. And the pooler's tanh sees numbers so small that it is a
    straight line. A place that holds zero carries what the normalisations take off as the mean; the pooler
    takes it away again.

    Guarantee: in float32 the logits differ from the model's own by rounding (a test holds them to 1e-5),
    padded or not.
    """
    wide = _wider(model)
    with torch.no_grad():
        _copy_body(model, wide)
        _add_averaging_layer(wide, model.config.num_hidden_layers, model.config.hidden_size)
        _add_head(model, wide)
    return wide


def twice(vectors: Tensor) -> Tensor:
    """Hold vectors [..., d] twice, [..., 2 d], as every layer of the wider model does."""
    return torch.cat((vectors, vectors), dim=-1)


def _wider(model: MeanPoolClassifier) -> BertForSequenceClassification:
    config = copy.deepcopy(model.config)
    config.hidden_size *= 2
    config.num_attention_heads *= 2
    config.num_hidden_layers += 1
    config.architectures = None
    wide = BertForSequenceClassification(config)
    wide.train(False).requires_grad_(False)
    for parameter in wide.parameters():
        parameter.zero_()
    return wide


def _copy_body(model: MeanPoolClassifier, wide: BertForSequenceClassification) -> None:
    target = dict(wide.named_parameters())
    for name, parameter in model.bert.named_parameters():
        place = target[f"bert.{name}"]
        if "embeddings." in name or "LayerNorm" in name:
            place.copy_(twice(parameter))
        elif ".attention.self." in name or ".intermediate." in name:
            _fill(place, parameter)  # reads the first copy; the heads of the second one stay idle
        else:
            half = parameter.shape[0]
            _fill(place, parameter)
            _fill(place[half:], parameter)


def _fill(place: Tensor, values: Tensor) -> None:
    """Write values into the upper left corner of a larger tensor."""
    place[tuple(slice(0, size) for size in values.shape)].copy_(values)


def _add_averaging_layer(wide: BertForSequenceClassification, number: int, width: int) -> None:
    layer = cast(BertLayer, wide.bert.encoder.layer[number])
    same = torch.eye(width)
    _fill(layer.attention.self.value.weight, same)
    _fill(layer.attention.output.dense.weight, _LOUD * same)
    layer.attention.output.dense.bias[width:] = _LOUD * _FIXED * _signs(width)
    layer.attention.output.LayerNorm.weight.fill_(1.0)
    layer.output.LayerNorm.weight.fill_(1.0)


def _signs(width: int) -> Tensor:
    """Return constants that sum to nothing, behind two places of zero: the first of them is the one that is
    taken off.
    """
    signs = torch.ones(width)
    signs[1::2] = -1.0
    signs[:2] = 0.0
    if width % 2:
        signs[-1] = 0.0
    return signs


def _add_head(model: MeanPoolClassifier, wide: BertForSequenceClassification) -> None:
    width = int(model.config.hidden_size)
    pooler, classifier = wide.bert.pooler, wide.classifier
    assert pooler is not None, "a classifier has one"
    _fill(pooler.dense.weight, _SMALL * torch.eye(width))
    pooler.dense.weight[:width, width] = -_SMALL
    deviation = _FIXED * float(_signs(width).square().sum() / (2 * width)) ** 0.5
    _fill(classifier.weight, model.classifier.weight * (deviation / _SMALL))
    classifier.bias.copy_(model.classifier.bias)
