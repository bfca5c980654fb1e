"""Parameter sets: the chosen ones are exact, the weak and unusable ones are refused with every reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError
from defenses.he import Parameters, choose, error_bound, lint, noise_margin_bits
from defenses.he.parameters import CKKS_TOLERANCE, LARGEST_MODULUS_BITS, ntt_prime, replace
from tests.he.common import agreement, encrypted_sum, holder

REFERENCE = Parameters(
    scheme="ckks",
    poly_modulus_degree=8192,
    coefficient_bits=(60, 40, 40),
    scale_bits=40,
    lane_bits=19,
    seeded=False,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bfv", "ckks"]), st.integers(1, 5000), st.integers(1, 2**45), st.booleans())
def test_chosen_parameters_pass_the_linter(scheme, parties, bound, seeded):
    parameters = choose(scheme, parties=parties, value_bound=bound, seeded=seeded)
    assert lint(parameters, parties=parties, value_bound=bound, length=10**9) == []
    assert parameters.seeded is seeded
    assert error_bound(parameters, parties) <= CKKS_TOLERANCE


def test_the_choice_is_within_four_bytes_for_common_rounds():
    for parties, bound in [(3, 2**15 - 1), (10, 2**15 - 1), (20, 2**15 - 1), (50, 2**15 - 1)]:
        assert choose("bfv", parties=parties, value_bound=bound).ideal_bytes_per_value <= 3.6


def test_primes_and_security_table_are_those_of_seal():
    sealapi = pytest.importorskip("tenseal.sealapi")
    for degree, bits in LARGEST_MODULUS_BITS.items():
        assert sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128) == bits
    for degree in (2048, 4096, 8192):
        for bits in range(20, 61):
            assert sealapi.CoeffModulus.Create(degree, [bits])[0].value() == ntt_prime(bits, degree)
            assert sealapi.PlainModulus.Batching(degree, bits).value() == ntt_prime(bits, degree)


def test_reference_parameters_pass_the_linter():
    assert lint(REFERENCE, parties=5, value_bound=2**15, length=10) == []


GOOD = choose("bfv", parties=8, value_bound=2**15 - 1)
GOOD_CKKS = choose("ckks", parties=8, value_bound=2**15 - 1)


@pytest.mark.parametrize(
    "parameters, reason",
    [
        (replace(GOOD, poly_modulus_degree=2048, coefficient_bits=(60,)), "128-bit security allows 54"),
        (replace(GOOD, coefficient_bits=(55, 55)), "128-bit security allows 109"),
        (replace(GOOD, poly_modulus_degree=3000), "poly_modulus_degree = 3000"),
        (replace(GOOD, coefficient_bits=()), "every prime must have"),
        (replace(GOOD, coefficient_bits=(61,)), "every prime must have"),
        (replace(GOOD, scheme="bgv"), "only 'bfv' and 'ckks'"),
        (replace(GOOD, seeded=False), "special prime"),
        (replace(GOOD, lanes=0), "at least one lane"),
        (replace(GOOD, lanes=4), "at most 62"),
        (replace(GOOD, lane_bits=18), "overflow: 8 parties sum up to"),
        (replace(GOOD, lanes=1, digits=2, digit_bits=3), "cannot hold value_bound"),
        (replace(GOOD, digits=2), "1 digit has 0 bits"),
        (replace(GOOD, plain_bits=38), "overflow: 2 lanes of 19 bits"),
        (replace(GOOD, plain_bits=61), "no batching prime"),
        (replace(GOOD, scale_bits=20), "BFV has no scale"),
        (replace(GOOD, coefficient_bits=(44,)), "noise:"),
        (replace(GOOD_CKKS, plain_bits=20), "CKKS has no plain modulus"),
        (replace(GOOD_CKKS, scale_bits=0), "scale_bits = 0"),
        (replace(GOOD_CKKS, scale_bits=12), "unusable scale"),
        (replace(GOOD_CKKS, scale_bits=30), "exceed a data modulus"),
        (replace(REFERENCE, scale_bits=14), "unusable scale"),
    ],
)
def test_unusable_parameters_are_refused_with_the_reason(parameters, reason):
    assert any(
        reason in problem for problem in lint(parameters, parties=8, value_bound=2**15 - 1, length=100)
    )


def test_all_problems_are_reported_at_once():
    bad = replace(GOOD, scheme="bgv", coefficient_bits=(60, 60))
    problems = lint(bad, parties=0, value_bound=0, length=0)
    assert len(problems) == 5
    with pytest.raises(ParameterError, match="sums must stay below"):
        choose("bfv", parties=4, value_bound=2**61)


def test_the_largest_accepted_count_of_parties_is_exact_and_one_more_is_refused():
    # At the largest accepted count of parties the sum is exact, one more party is refused.
    parameters = Parameters(
        scheme="bfv", poly_modulus_degree=4096, coefficient_bits=(42,), plain_bits=31, lanes=1, lane_bits=30
    )
    most = max(count for count in range(1, 100) if noise_margin_bits(parameters, count) >= 0)
    assert most == 47
    assert lint(parameters, parties=most + 1, value_bound=2**20, length=1) != []
    vectors = np.random.default_rng(0).integers(-(2**20), 2**20 + 1, (most, 300))
    key = holder(parameters)
    terms = agreement(key.run, parties=most, bound=2**20, length=300)
    np.testing.assert_array_equal(encrypted_sum(key, terms, vectors), vectors.sum(0))


def test_the_noise_model_bounds_what_seal_measures():
    sealapi = pytest.importorskip("tenseal.sealapi")
    settings_ = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    settings_.set_poly_modulus_degree(4096)
    settings_.set_coeff_modulus(sealapi.CoeffModulus.Create(4096, [54]))
    settings_.set_plain_modulus(sealapi.PlainModulus.Batching(4096, 20))
    context = sealapi.SEALContext(settings_, True, sealapi.SEC_LEVEL_TYPE.TC128)
    secret = sealapi.KeyGenerator(context).secret_key()
    encryptor, evaluator = sealapi.Encryptor(context, secret), sealapi.Evaluator(context)
    decryptor, encoder = sealapi.Decryptor(context, secret), sealapi.BatchEncoder(context)
    plain, total, other = sealapi.Plaintext(), sealapi.Ciphertext(context), sealapi.Ciphertext(context)
    encoder.encode(list(range(4096)), plain)
    encryptor.encrypt_symmetric(plain, total)
    parameters = Parameters(
        scheme="bfv", poly_modulus_degree=4096, coefficient_bits=(54,), plain_bits=20, lane_bits=19
    )
    for count in range(2, 41):
        encryptor.encrypt_symmetric(plain, other)
        evaluator.add_inplace(total, other)
        measured = decryptor.invariant_noise_budget(total)
        # SEAL rounds the budget down; the worst case never promises more, and is not absurdly far off.
        assert (
            noise_margin_bits(parameters, count) - 1 <= measured <= noise_margin_bits(parameters, count) + 6
        )
