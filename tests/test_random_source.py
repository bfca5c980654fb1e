"""The source of every secret bit: AES-CTR as published, replayable only when asked, silent about its key."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import chisquare

from defenses.random_source import RandomSource


def test_the_stream_is_aes_256_ctr() -> None:
    key = bytes(range(32))
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(1_000_000))
    out = np.empty(1_000_000, dtype=np.uint8)
    RandomSource(key, private=False).fill(out)
    assert out.tobytes() == expected
    source = RandomSource(key, private=False)
    assert source.random_bytes(10) + source.random_bytes(90) == expected[:100]


def test_seeds_replay_and_labels_separate() -> None:
    draw = [RandomSource.seeded(3).derive("noise", 1).random_bytes(16) for _ in range(2)]
    assert draw[0] == draw[1]
    others = {
        RandomSource.seeded(3).derive(*labels).random_bytes(16)
        for labels in (
            ("noise", 2),
            ("noise",),
            ("noise1",),
            ("n", "oise1"),
            ("noise\x001",),
            ("noise", "1"),
            (),
        )
    }
    assert len(others | {draw[0]}) == 8
    assert not RandomSource.seeded(3).private
    assert not RandomSource.seeded(3).derive("x").private
    assert RandomSource.system().derive("x").private


def test_below_is_uniform_and_a_skewed_one_would_be_caught() -> None:
    source = RandomSource.seeded(1)
    counts = np.bincount([source.below(7) for _ in range(14_000)], minlength=7)
    assert chisquare(counts).pvalue > 1e-3
    skewed = np.bincount(
        [source.below(256) % 7 if source.below(10) else 0 for _ in range(14_000)], minlength=7
    )
    assert chisquare(skewed).pvalue < 1e-3


def test_a_permutation_holds_everyone_once() -> None:
    assert sorted(RandomSource.seeded(5).permutation(50).tolist()) == list(range(50))


def test_the_key_neither_prints_nor_pickles() -> None:
    source = RandomSource(b"0123456789abcdef0123456789abcdef", private=True)
    assert "0123" not in repr(source)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(source)


def _child(source: RandomSource, pipe: Connection) -> None:
    try:
        pipe.send(source.random_bytes(4))
    except RuntimeError as error:
        pipe.send(str(error))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_secret_stream_does_not_cross_a_fork() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(RandomSource.system(), there))
    process.start()
    assert "must not cross a fork" in str(here.recv())
    process.join()
