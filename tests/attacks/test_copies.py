"""A copy that shares its numbers: as good as one of its own to whoever replaces and never writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.copies import sharing_copy
from attacks.inversion.channels import capture_inputs
from tests.attacks import models


def stored(model: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in model.named_parameters()}


def answer(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def test_a_copy_answers_like_its_model_and_holds_no_numbers_of_its_own() -> None:
    model, ids = models.bert(), models.sentences(2, 5, 1000)
    copy = sharing_copy(model)
    assert not {id(module) for module in model.modules()} & {id(module) for module in copy.modules()}
    assert stored(copy) == stored(model)
    assert torch.equal(answer(copy, ids), answer(model, ids))
    assert type(copy) is type(model)


def test_what_is_done_to_a_copy_stays_with_it() -> None:
    model, ids = models.bert(), models.sentences(2, 5, 1000)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = sharing_copy(model).double().train().requires_grad_(False)
    next(copy.buffers()).add_(1)
    copy.register_forward_hook(lambda module, inputs, output: None)
    capture_inputs({"head": copy.get_submodule("classifier")}, lambda: answer(copy, ids))
    copy.config.num_labels = 99
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not model.training
    assert all(value.requires_grad for value in model.parameters())
    assert not model._forward_hooks
    assert model.config.num_labels == 2


def test_named_parameters_may_be_written() -> None:
    model, name = models.bert(), "classifier.weight"
    copy = sharing_copy(model, own={name})
    with torch.no_grad():
        copy.get_parameter(name).add_(1.0)
    assert torch.allclose(copy.get_parameter(name), model.get_parameter(name) + 1.0)
    assert {one for one, place in stored(copy).items() if place != stored(model)[one]} == {name}


def test_tied_weights_stay_tied() -> None:
    copy = sharing_copy(models.gpt2(classes=None))
    assert copy.lm_head.weight is copy.transformer.wte.weight


class Guarded(nn.Linear):
    """A layer that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> Guarded:
        copy = Guarded(self.in_features, self.out_features)
        copy.copied = True
        return copy


def test_a_module_that_says_how_it_is_copied_is_asked() -> None:
    copy = sharing_copy(nn.Sequential(Guarded(2, 2), nn.Linear(2, 2)))
    assert copy[0].copied
