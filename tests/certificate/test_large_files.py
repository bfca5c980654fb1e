"""What claims to be larger than any certified file is refused by its size, and not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ffm_secure.certificate.files import _file
from ffm_secure.certificate.make import certify
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.errors import StoreError
from tests.certificate.helpers import certificate


def test_a_sparse_file_in_the_place_of_a_certified_one_is_not_read(run: Path) -> None:
    """It takes no place on a disk, and was read to its end: minutes for 100 GB, days for a petabyte."""
    content, weights = certificate(run), run / "adapter" / "adapter_model.safetensors"
    (run / "certificate.json").unlink()
    os.truncate(weights, 8 << 40)
    checks = {check.claim: check for check in verify(content, Materials(folder=run)).checks}
    check = checks["adapter/adapter_model.safetensors"]
    assert not check.holds
    assert check.detail.startswith("has 8,796,093,022,208 bytes, and no certified file more than")
    with pytest.raises(StoreError, match="it was not read"):
        certify(run, operator=None, owners={})


def test_many_large_files_are_read_no_longer_than_a_few(tmp_path: Path) -> None:
    """Each below the bound on one: together they would be read for hours."""
    for number in range(3):
        with (tmp_path / f"{number}").open("wb") as file:
            file.truncate(1 << 20)
    sizes, left = [], (2 << 20) + 5
    for number in range(3):
        check, size = _file(f"{number}", "", tmp_path, f"{number}", most=left)
        sizes.append(size)
        left -= size
    assert sizes == [1 << 20, 1 << 20, 0]
    assert check.detail.startswith("was not read: the files before it have")
