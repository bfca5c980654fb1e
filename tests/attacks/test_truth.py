"""What a file of the private data may hold;
anything else is refused with the file and every problem named.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from attacks.truth import load_truth

IDS = torch.tensor([[5, 6, 0], [7, 8, 9]])


def test_what_a_client_trained_on_is_read(tmp_path):
    mask, images = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.rand(2, 3, 4, 4)
    for kept in (mask, mask.bool(), mask.float()):
        tensors = {"token_ids": IDS, "attention_mask": kept, "images": images, "labels": torch.tensor([3, 0])}
        save_file(tensors, tmp_path / "truth.safetensors")
        truth = load_truth(tmp_path / "truth.safetensors")
        assert truth.sequences == ((5, 6), (7, 8, 9))
        assert truth.labels == (3, 0)
        assert torch.equal(truth.images, images)
    save_file({"token_ids": IDS.to(torch.uint16)}, tmp_path / "truth.safetensors")
    assert load_truth(tmp_path / "truth.safetensors").sequences == ((5, 6, 0), (7, 8, 9))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_ids": IDS, "attention_mask": torch.ones(2, 2)}, r"attention_mask has the shape \(2, 2\)"),
        ({"token_ids": IDS, "attention_mask": torch.ones(3, 3)}, r"attention_mask has the shape \(3, 3\)"),
        ({"token_ids": IDS, "attention_mask": torch.ones(2)}, r"attention_mask has the shape \(2,\)"),
        ({"token_ids": IDS, "attention_mask": torch.full((2, 3), 0.5)}, "0 and 1 alone"),
        ({"attention_mask": torch.ones(2, 2)}, "there are none"),
        ({"token_ids": IDS.float()}, "token_ids is float32"),
        ({"token_ids": IDS.bool()}, "token_ids is bool"),
        ({"token_ids": IDS[0]}, r"token_ids is int64 of shape \(3,\)"),
        ({"token_ids": -IDS}, "token_ids holds -9"),
        ({"token_ids": IDS[:0]}, "must be one number from 1"),
        ({"images": torch.ones(2, 4, 4)}, "images is float32 of shape"),
        ({"images": torch.ones(2, 3, 4, 4, dtype=torch.uint8)}, "images is uint8"),
        ({"images": torch.full((1, 1, 2, 2), float("nan"))}, "finite"),
        ({"labels": torch.tensor([[1]])}, "labels is int64 of shape"),
        ({"labels": torch.tensor(1)}, "labels is int64 of shape"),
        ({"labels": torch.tensor([1.0])}, "labels is float32"),
        ({"labels": torch.tensor([-1])}, "labels holds -1"),
        ({"token_ids": IDS, "labels": torch.tensor([1])}, "'labels': 1"),
        ({"names": IDS}, "known tensors are"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    path = tmp_path / "truth.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        load_truth(path)


def test_all_problems_are_named_at_once(tmp_path):
    save_file({"token_ids": IDS.float(), "labels": torch.tensor([0.5])}, tmp_path / "truth.safetensors")
    with pytest.raises(ValueError, match=r"token_ids is float32.*labels is float32.*numbers of records"):
        load_truth(tmp_path / "truth.safetensors")


def test_a_folder_or_a_missing_or_broken_file_is_named(tmp_path):
    (tmp_path / "broken").write_bytes(b"no tensors")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "broken"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a safetensors file"):
            load_truth(path)
