"""Which lattice parameters carry an exact sum, and why every other set is refused. Pure arithmetic; needs no
TenSEAL.

One integer pipeline serves both schemes: a value is cut into `digits`, `lanes` of them share one plaintext
slot, and a slot must survive the sum of all parties without overflow and without a rounding error.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from defenses.errors import ParameterError

Scheme = Literal["bfv", "ckks"]

SECURITY_BITS: Final = 128
# Largest modulus, in bits, for 128-bit classical security with ternary secrets.
# Source: Homomorphic Encryption Security Standard (2018), table 1; the same numbers SEAL enforces.
LARGEST_MODULUS_BITS: Final = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
LARGEST_PRIME_BITS: Final = 60
# The tags of `defenses.he.tags` need sums below half the product of two of their primes.
LARGEST_SUM: Final = 2**60
DIGIT_LIMIT: Final = 4
# SEAL draws errors from a centred binomial with 21 coin pairs: |e| <= 21 always, variance 10.5.
ERROR_MAXIMUM: Final = 21.0
ERROR_VARIANCE: Final = 10.5
# Rounded slots must be this close to an integer: half of what rounding could bear.
CKKS_TOLERANCE: Final = 0.25
# A CKKS noise bound is passed with probability below 2^-128 for any of up to 2^40 coordinates.
_CKKS_TAIL_BITS: Final = 170


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Describe one encryption parameter set completely.

    `coefficient_bits` are the sizes of the primes of the ciphertext modulus; with more than one, the last is
    SEAL's special prime, which ciphertexts do not carry. `plain_bits` is 0 for CKKS, `scale_bits` is 0 for
    BFV. `lanes` digits of `lane_bits` share a slot; a value is cut into `digits` of `digit_bits` (one digit:
    not cut). `seeded` ciphertexts send a 64-byte seed in place of their uniform half.
    """

    scheme: Scheme
    poly_modulus_degree: int
    coefficient_bits: tuple[int, ...]
    plain_bits: int = 0
    scale_bits: int = 0
    lanes: int = 1
    lane_bits: int
    digits: int = 1
    digit_bits: int = 0
    seeded: bool = True

    @property
    def slots(self) -> int:
        """Count the plaintext slots of one ciphertext."""
        if self.scheme == "bfv":
            return self.poly_modulus_degree
        return self.poly_modulus_degree // 2

    @property
    def values_per_chunk(self) -> int:
        """Count the values one ciphertext carries."""
        return self.slots * self.lanes // self.digits

    @property
    def data_bits(self) -> tuple[int, ...]:
        """List the primes a ciphertext carries: all but the special one."""
        if len(self.coefficient_bits) > 1:
            return self.coefficient_bits[:-1]
        return self.coefficient_bits

    @property
    def packed_limit(self) -> int:
        """Bound the magnitude of a packed slot of a sum, exclusively."""
        return 1 << max(self.lanes * self.lane_bits - 1, 0)

    @property
    def ideal_bytes_per_value(self) -> float:
        """Give the upload of one value before framing and entropy coding, in bytes."""
        halves = 1 if self.seeded else 2
        polynomial = sum(self.data_bits) * self.poly_modulus_degree / 8
        return halves * polynomial / self.values_per_chunk


@cache
def ntt_prime(bits: int, poly_modulus_degree: int) -> int:
    """Return the largest prime of exactly `bits` bits that is 1 modulo 2 N, or 0 where there is none.

    Source: the choice of SEAL's CoeffModulus.Create and PlainModulus.Batching for the first prime of a size.
    """
    step = 2 * poly_modulus_degree
    candidate = ((1 << bits) - 1) // step * step + 1
    while candidate >= 1 << (bits - 1):
        if candidate.bit_length() == bits and _is_prime(candidate):
            return candidate
        candidate -= step
    return 0


def _is_prime(number: int) -> bool:
    """Decide primality below 3.3e24:
    Miller-Rabin with the first thirteen primes (Sorenson and Webster 2015).
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, power = number - 1, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    for base in bases:
        witness = pow(base, odd, number)
        if witness in (1, number - 1):
            continue
        for _ in range(power - 1):
            witness = witness * witness % number
            if witness == number - 1:
                break
        else:
            return False
    return True


def noise_margin_bits(parameters: Parameters, parties: int) -> float:
    """Return how many bits separate the worst error of a BFV sum from a wrong decryption; negative: not
    exact.

    Guarantee: at 0 or more, the sum of `parties` honest ciphertexts decrypts exactly with certainty, because
    each adds at most 21 (error) + 1/2 (scaling) to a coefficient and SEAL rounds right below q / 2t.
    """
    plain = ntt_prime(parameters.plain_bits, parameters.poly_modulus_degree)
    worst = 2 * max(plain, 1) * parties * (ERROR_MAXIMUM + 0.5) * (1 + 2**-8)
    return _log2_data_modulus(parameters) - math.log2(worst)


def error_bound(parameters: Parameters, parties: int) -> float:
    """Bound the error of one slot of a sum before rounding; 0 for BFV.

    Guarantee (CKKS): passed with probability below 2^-128 over the encryption errors, for up to 2^40
    coordinates. The terms: encoding rounds each coefficient by 1/2, at worst aligned (sum of |cos| below 2 N
    / pi); the errors are subgaussian with variance 10.5; the transforms work in float64.
    Source: Hoeffding's inequality for centred binomial errors under the canonical embedding.
    """
    if parameters.scheme == "bfv":
        return 0.0
    degree = parameters.poly_modulus_degree
    rounding = parties * degree / math.pi
    variance = ERROR_VARIANCE * parties * degree / 2
    noise = math.sqrt(2 * variance * math.log(2) * _CKKS_TAIL_BITS)
    floats = 2.0**-52 * parameters.packed_limit * math.sqrt(degree) * 4 * math.log2(degree)
    return float((rounding + noise) / 2.0**parameters.scale_bits + floats)


def lint(parameters: Parameters, *, parties: int, value_bound: int, length: int) -> list[str]:
    """List every reason why this set cannot carry an exact, 128-bit-secure sum;
    an empty list means it can.
    """
    problems = _lint_request(parties, value_bound, length) + _lint_ring(parameters) + _lint_layout(parameters)
    if problems:
        return problems
    problems += _lint_packing(parameters, parties, value_bound)
    return problems + (_lint_bfv if parameters.scheme == "bfv" else _lint_ckks)(parameters, parties)


def require(parameters: Parameters, *, parties: int, value_bound: int, length: int) -> None:
    """Refuse a parameter set with all its problems at once.

    Raises:
        ParameterError: lists what `lint` found.
    """
    problems = lint(parameters, parties=parties, value_bound=value_bound, length=length)
    if problems:
        raise ParameterError("unusable encryption parameters:\n- " + "\n- ".join(problems))


def choose(scheme: Scheme, *, parties: int, value_bound: int, seeded: bool = True) -> Parameters:
    """Return the smallest set that `lint` accepts: the fewest uploaded bits for one value, exact for
    `parties`.

    Raises:
        ParameterError: when no set carries such sums.
    """
    problems = _lint_request(parties, value_bound, 1)
    if problems:
        raise ParameterError("; ".join(problems))
    fitting = []
    for digits in range(1, DIGIT_LIMIT + 1):
        for candidate in _candidates(scheme, parties, value_bound, digits, seeded):
            if not lint(candidate, parties=parties, value_bound=value_bound, length=1):
                fitting.append(candidate)
    if not fitting:
        raise ParameterError(
            f"no {scheme} parameters carry sums of {parties} parties with values up to {value_bound}: "
            "lower the bound (fewer quantisation bits) or the number of parties"
        )
    return min(fitting, key=lambda each: (each.ideal_bytes_per_value, each.digits, each.lanes))


def _candidates(
    scheme: Scheme, parties: int, value_bound: int, digits: int, seeded: bool
) -> list[Parameters]:
    digit_bits = 0 if digits == 1 else -(-value_bound.bit_length() // digits)
    lane_bits = (parties * _digit_bound(value_bound, digits, digit_bits)).bit_length() + 1
    candidates = []
    for lanes in range(1, 8):
        packed = lanes * lane_bits
        for bits in range(24, LARGEST_PRIME_BITS + 1):
            sizes: dict[str, int] = {"plain_bits": max(packed + 1, 17)}
            if scheme == "ckks":
                sizes = {"scale_bits": bits - packed - 1}
            candidate = Parameters(
                scheme=scheme,
                poly_modulus_degree=4096,
                # The high-level interface insists on a special prime; the total stays within 109 bits.
                coefficient_bits=(bits,) if seeded else (bits, min(bits + 1, 109 - bits)),
                lanes=lanes,
                lane_bits=lane_bits,
                digits=digits,
                digit_bits=digit_bits,
                seeded=seeded,
                **sizes,
            )
            if _fits(candidate, parties):
                candidates.append(candidate)
                break
    return candidates


def _fits(parameters: Parameters, parties: int) -> bool:
    """Ask the two quick questions before the full lint: is the noise small enough, is there headroom?"""
    if parameters.scheme == "bfv":
        return parameters.plain_bits <= LARGEST_PRIME_BITS and noise_margin_bits(parameters, parties) >= 0
    return (
        parameters.scale_bits >= 1
        and error_bound(parameters, parties) <= CKKS_TOLERANCE
        and _headroom(parameters)
    )


def _digit_bound(value_bound: int, digits: int, digit_bits: int) -> int:
    return value_bound if digits == 1 else 1 << digit_bits


def _log2_data_modulus(parameters: Parameters) -> float:
    primes = (ntt_prime(bits, parameters.poly_modulus_degree) for bits in parameters.data_bits)
    # Repeated sizes take the next smaller prime: below by far less than the last term grants.
    slack = 2**-8 if len(set(parameters.data_bits)) < len(parameters.data_bits) else 0.0
    return sum(math.log2(max(prime, 1)) for prime in primes) - slack


def _headroom(parameters: Parameters) -> bool:
    return math.log2(parameters.packed_limit) + parameters.scale_bits + 1 < _log2_data_modulus(parameters)


def _lint_request(parties: int, value_bound: int, length: int) -> list[str]:
    problems = []
    if parties < 1:
        problems.append(f"parties = {parties}: must be at least 1")
    if value_bound < 1:
        problems.append(f"value_bound = {value_bound}: must be at least 1")
    if length < 1:
        problems.append(f"length = {length}: must be at least 1")
    if parties * value_bound >= LARGEST_SUM:
        problems.append(f"parties * value_bound = {parties * value_bound}: sums must stay below 2^60")
    return problems


def _lint_ring(parameters: Parameters) -> list[str]:
    degree, sizes = parameters.poly_modulus_degree, parameters.coefficient_bits
    problems = []
    if parameters.scheme not in ("bfv", "ckks"):
        problems.append(f"scheme = {parameters.scheme!r}: only 'bfv' and 'ckks' are known")
    if degree not in LARGEST_MODULUS_BITS:
        return [*problems, f"poly_modulus_degree = {degree}: must be one of {sorted(LARGEST_MODULUS_BITS)}"]
    if not sizes or any(not 16 <= bits <= LARGEST_PRIME_BITS for bits in sizes):
        return [
            *problems,
            f"coefficient_bits = {sizes}: every prime must have 16 to {LARGEST_PRIME_BITS} bits",
        ]
    if sum(sizes) > LARGEST_MODULUS_BITS[degree]:
        problems.append(
            f"coefficient modulus of {sum(sizes)} bits at poly_modulus_degree {degree}: "
            f"{SECURITY_BITS}-bit security allows {LARGEST_MODULUS_BITS[degree]}; "
            "drop primes or double the degree"
        )
    for bits in sorted(set(sizes)):
        if not ntt_prime(bits, degree):
            problems.append(
                f"coefficient_bits = {sizes}: no {bits}-bit prime fits degree {degree}; use more bits"
            )
    if not parameters.seeded and len(sizes) < 2:
        problems.append("coefficient_bits: the high-level interface needs a special prime; append one")
    return problems


def _lint_layout(parameters: Parameters) -> list[str]:
    lanes, digits = parameters.lanes, parameters.digits
    problems = []
    if lanes < 1 or parameters.lane_bits < 2 or lanes * parameters.lane_bits > 62:
        problems.append(
            f"{lanes} lanes of {parameters.lane_bits} bits: must be at least one lane "
            "of 2 bits, together at most 62"
        )
    if (
        not 1 <= digits <= DIGIT_LIMIT
        or (digits > 1) != (parameters.digit_bits > 0)
        or parameters.digit_bits > 62
    ):
        problems.append(
            f"digits = {digits} of {parameters.digit_bits} bits: 1 digit has 0 bits, "
            f"2 to {DIGIT_LIMIT} digits have 1 to 62"
        )
    return problems


def _lint_packing(parameters: Parameters, parties: int, value_bound: int) -> list[str]:
    problems = []
    if parameters.digits > 1 and value_bound >> (parameters.digits * parameters.digit_bits):
        problems.append(
            f"{parameters.digits} digits of {parameters.digit_bits} bits cannot "
            f"hold value_bound = {value_bound}"
        )
    largest = parties * _digit_bound(value_bound, parameters.digits, parameters.digit_bits)
    if largest >= 1 << (parameters.lane_bits - 1):
        problems.append(
            f"overflow: {parties} parties sum up to {largest} in a lane of {parameters.lane_bits} bits, "
            f"which holds {(1 << (parameters.lane_bits - 1)) - 1}"
        )
    return problems


def _lint_bfv(parameters: Parameters, parties: int) -> list[str]:
    degree, bits = parameters.poly_modulus_degree, parameters.plain_bits
    if parameters.scale_bits:
        return [f"scale_bits = {parameters.scale_bits}: BFV has no scale; set 0"]
    if not 2 <= bits <= LARGEST_PRIME_BITS or not ntt_prime(bits, degree):
        return [f"plain_bits = {bits}: no batching prime of that size at degree {degree} (at most 60 bits)"]
    problems = []
    if ntt_prime(bits, degree) // 2 < parameters.packed_limit:
        problems.append(
            f"overflow: {parameters.lanes} lanes of {parameters.lane_bits} bits need plain_bits of at least "
            f"{parameters.lanes * parameters.lane_bits + 1}, not {bits}"
        )
    margin = noise_margin_bits(parameters, parties)
    if margin < 0:
        problems.append(
            f"noise: {-margin:.1f} bits short of an exact sum of {parties} ciphertexts; "
            "raise coefficient_bits or lower plain_bits"
        )
    return problems


def _lint_ckks(parameters: Parameters, parties: int) -> list[str]:
    if parameters.plain_bits:
        return [f"plain_bits = {parameters.plain_bits}: CKKS has no plain modulus; set 0"]
    if not 1 <= parameters.scale_bits <= LARGEST_PRIME_BITS:
        return [f"scale_bits = {parameters.scale_bits}: must be between 1 and {LARGEST_PRIME_BITS}"]
    problems = []
    bound = error_bound(parameters, parties)
    if bound > CKKS_TOLERANCE:
        problems.append(
            f"unusable scale: at scale_bits = {parameters.scale_bits} the error of a sum of {parties} "
            f"reaches {bound:.3g}, rounding to integers bears {CKKS_TOLERANCE}; raise "
            "scale_bits or pack fewer lanes"
        )
    if not _headroom(parameters):
        problems.append(
            f"overflow: {parameters.lanes * parameters.lane_bits} packed bits and {parameters.scale_bits} "
            f"scale bits exceed a data modulus of {sum(parameters.data_bits)} bits"
        )
    return problems


def describe(parameters: Parameters, *, parties: int) -> dict[str, str]:
    """Say in words what the set sends and how exact it is, for the plan and the report."""
    if parameters.scheme == "bfv":
        exact = f"exact with certainty; {noise_margin_bits(parameters, parties):.1f} bits of margin"
    else:
        exact = (
            f"error at most {error_bound(parameters, parties):.3g} before rounding "
            "to integers (2^-128), so exact"
        )
    form = "seeded symmetric" if parameters.seeded else "symmetric"
    return {
        "scheme": f"{parameters.scheme.upper()}, {form}, N = {parameters.poly_modulus_degree}, "
        f"q = {'+'.join(map(str, parameters.coefficient_bits))} bits",
        "security": f"at least {SECURITY_BITS} bits (classical)",
        "packing": (
            f"{parameters.lanes} lanes of {parameters.lane_bits} bits, {parameters.digits} digits a value"
        ),
        "bytes_per_parameter": f"about {parameters.ideal_bytes_per_value:.2f} before framing",
        "exactness": exact,
    }


def replace(parameters: Parameters, **changes: object) -> Parameters:
    """Return a copy with some fields changed; `lint` decides whether it is usable."""
    return dataclasses.replace(parameters, **changes)  # type: ignore[arg-type]
