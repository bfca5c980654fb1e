"""The only module that imports TenSEAL: slots to ciphertext bytes and back.

Received bytes are decoded and checked in `defenses.he.ciphertexts`; SEAL only ever parses streams written
here.

Two engines share one shape. `SealEngine` uses the SEAL bindings below TenSEAL: one prime, seeded symmetric
ciphertexts, secret key expanded from a seed. `VectorEngine` uses TenSEAL's high-level vectors, for builds
whose SEAL bindings do not work; its ciphertexts are about twice as large.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, TypeVar

import numpy as np

from defenses.errors import DefenseError, ParameterError, ProtocolError
from defenses.foreign import LibraryObject
from defenses.he.ciphertexts import Shape, from_wire, to_wire
from defenses.he.packing import Integers
from defenses.he.parameters import CKKS_TOLERANCE, Parameters, ntt_prime
from defenses.he.wire import Scratch

try:
    import pyarrow  # for its zstd decoder: SEAL compresses what it saves
    import tenseal
    from tenseal import sealapi
except ImportError as error:  # pragma: no cover - exercised in a process of its own
    pyarrow = tenseal = sealapi = None
    _REASON = f"TenSEAL is not usable ({type(error).__name__}); install it with: pip install 'ffm-secure[he]'"
else:
    _REASON = f"TenSEAL {tenseal.__version__}"

SEED_BYTES: Final = 64
_Result = TypeVar("_Result")


def available() -> tuple[bool, str]:
    """Say whether homomorphic encryption works here, and its version or what to install."""
    return tenseal is not None, _REASON


def require_tenseal() -> None:
    """Refuse to go on without TenSEAL.

    Raises:
        ParameterError: says what to install.
    """
    if tenseal is None:
        raise ParameterError(_REASON)


class Engine(Protocol):
    """Encrypt, add and open single chunks; without a secret key only load, add and save work."""

    @property
    def payload_limit(self) -> int:
        """Bound the bytes of one chunk."""

    def encrypt(self, slots: Integers) -> bytes:
        """Encrypt one packed vector of `slots` int64 values."""

    def load(self, payload: bytes) -> LibraryObject:
        """Load one ciphertext; raises ProtocolError for whatever is not one under these parameters."""

    def add(self, total: LibraryObject, other: LibraryObject) -> None:
        """Add `other` into `total`."""

    def save(self, ciphertext: LibraryObject) -> bytes:
        """Serialise one ciphertext."""

    def decrypt(self, ciphertext: LibraryObject) -> Integers:
        """Open one ciphertext to int64 slots; raises ProtocolError where it is not near integers."""


def server_engine(parameters: Parameters) -> Engine:
    """Open an engine without any key."""
    require_tenseal()
    if parameters.seeded:
        return SealEngine(parameters)
    return VectorEngine(parameters, _without_key(parameters))


def _guarded(action: Callable[[], _Result]) -> _Result:
    """Turn whatever a foreign library raises into the one constant failure."""
    try:
        return action()
    except DefenseError:
        raise
    except Exception:
        raise ProtocolError from None


def _round(decoded: LibraryObject) -> Integers:
    """Round CKKS slots to integers; a slot far from any integer betrays overflow or foreign noise."""
    floats = np.asarray(decoded, dtype=np.float64)
    if not np.isfinite(floats).all() or np.abs(floats).max() >= 2.0**53:
        raise ProtocolError
    nearest = np.rint(floats)
    if np.abs(floats - nearest).max() > CKKS_TOLERANCE:
        raise ProtocolError
    return nearest.astype(np.int64)


def _seal_context(parameters: Parameters, random: LibraryObject = None) -> LibraryObject:
    settings = sealapi.EncryptionParameters(getattr(sealapi.SCHEME_TYPE, parameters.scheme.upper()))
    degree = parameters.poly_modulus_degree
    settings.set_poly_modulus_degree(degree)
    settings.set_coeff_modulus(sealapi.CoeffModulus.Create(degree, list(parameters.coefficient_bits)))
    if parameters.scheme == "bfv":
        settings.set_plain_modulus(sealapi.PlainModulus.Batching(degree, parameters.plain_bits))
    if random is not None:
        settings.set_random_generator(random)
    context = sealapi.SEALContext(settings, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise ParameterError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
    return context


def _shape(context: LibraryObject, parameters: Parameters) -> Shape:
    """Collect what every ciphertext of these parameters has in common."""
    level = context.first_context_data().parms()
    with Scratch() as scratch:
        level.save(scratch.path)
        prefix = scratch.read()[:5]
    return Shape(
        prefix=prefix,
        parms_id=struct.pack("<4Q", *context.first_parms_id()),
        transformed=parameters.scheme == "ckks",
        degree=parameters.poly_modulus_degree,
        scale=2.0**parameters.scale_bits if parameters.scheme == "ckks" else 1.0,
        primes=tuple(int(prime.value()) for prime in level.coeff_modulus()),
        seeded=parameters.seeded,
    )


def _decompress(stream: bytes) -> bytes:
    """Return the content of a stream SEAL just wrote."""
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(stream[16:]), "zstd") as content:
        return bytes(content.read())


class SealEngine:
    """Use SEAL directly: seeded symmetric ciphertexts under one prime.

    `seed` (64 secret bytes) expands to the secret key; without it the engine can load, add and save only.

    Assumes: encryption randomness comes from SEAL, which draws a fresh seed from the operating system for
    every ciphertext. The generator seeded here expands the secret key and is used for nothing else.
    """

    __slots__ = ("_context", "_decryptor", "_encoder", "_encryptor", "_evaluator", "_shape", "parameters")

    def __init__(self, parameters: Parameters, seed: bytes | None = None) -> None:
        self.parameters = parameters
        self._context = context = _seal_context(parameters)
        self._shape = _shape(context, parameters)
        self._evaluator = sealapi.Evaluator(context)
        encoder = sealapi.BatchEncoder if parameters.scheme == "bfv" else sealapi.CKKSEncoder
        self._encoder = encoder(context)
        self._encryptor: LibraryObject = None
        self._decryptor: LibraryObject = None
        if seed is not None:
            if len(seed) != SEED_BYTES or not any(seed):
                raise ValueError(f"a key seed has {SEED_BYTES} random bytes")
            words = list(struct.unpack(">8Q", seed))
            # A context of its own: a fixed generator must never reach the encryptor.
            expanding = _seal_context(parameters, sealapi.Blake2xbPRNGFactory(words))
            secret = sealapi.KeyGenerator(expanding).secret_key()
            self._encryptor = sealapi.Encryptor(context, secret)
            self._decryptor = sealapi.Decryptor(context, secret)

    @property
    def payload_limit(self) -> int:
        """Bound the bytes of one chunk."""
        return 2 * self._shape.polynomial_bytes

    def encrypt(self, slots: Integers) -> bytes:
        """Encrypt one packed vector."""
        if self._encryptor is None:
            raise ProtocolError
        plain = sealapi.Plaintext()
        if self.parameters.scheme == "bfv":
            self._encoder.encode(slots.tolist(), plain)
        else:
            self._encoder.encode(slots.astype(np.float64).tolist(), 2.0**self.parameters.scale_bits, plain)
        with Scratch() as scratch:
            self._encryptor.encrypt_symmetric(plain).save(scratch.path)
            return to_wire(_decompress(scratch.read()), self._shape)

    def load(self, payload: bytes) -> LibraryObject:
        """Load one ciphertext."""
        stream = from_wire(payload, self._shape)

        def load() -> LibraryObject:
            ciphertext = sealapi.Ciphertext(self._context)
            with Scratch() as scratch:
                ciphertext.load(self._context, scratch.write(stream))
            return ciphertext

        return _guarded(load)

    def add(self, total: LibraryObject, other: LibraryObject) -> None:
        """Add `other` into `total`."""
        _guarded(lambda: self._evaluator.add_inplace(total, other))

    def save(self, ciphertext: LibraryObject) -> bytes:
        """Serialise one ciphertext."""
        with Scratch() as scratch:
            ciphertext.save(scratch.path)
            return to_wire(_decompress(scratch.read()), self._shape)

    def decrypt(self, ciphertext: LibraryObject) -> Integers:
        """Open one ciphertext."""
        decryptor = self._decryptor
        if decryptor is None:
            raise ProtocolError
        plain = sealapi.Plaintext()

        def decode() -> Integers:
            decryptor.decrypt(ciphertext, plain)
            if self.parameters.scheme == "bfv":
                return np.array(self._encoder.decode_int64(plain), dtype=np.int64)
            return _round(self._encoder.decode_double(plain))

        return _guarded(decode)

    def __repr__(self) -> str:
        return "SealEngine(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encryption engine holds a secret and cannot be pickled")


class VectorEngine:
    """Use TenSEAL's high-level vectors, one ciphertext each; `context` may or may not hold the secret key."""

    __slots__ = ("_context", "_shape", "parameters")

    def __init__(self, parameters: Parameters, context: bytes) -> None:
        self.parameters = parameters
        self._shape = _shape(_seal_context(parameters), parameters)
        self._context = _guarded(lambda: tenseal.context_from(context, n_threads=1))

    @staticmethod
    def generate(parameters: Parameters) -> bytes:
        """Generate a context with a fresh secret key, in TenSEAL's own format."""
        return bytes(_new_context(parameters).serialize(False, True, False, False))

    @property
    def payload_limit(self) -> int:
        """Bound the bytes of one chunk."""
        return 2 * self._shape.polynomial_bytes

    def encrypt(self, slots: Integers) -> bytes:
        """Encrypt one packed vector."""
        if self.parameters.scheme == "bfv":
            vector = tenseal.bfv_vector(self._context, slots.tolist())
        else:
            scale = 2.0**self.parameters.scale_bits
            vector = tenseal.ckks_vector(self._context, slots.astype(np.float64).tolist(), scale=scale)
        return self.save(vector)

    def load(self, payload: bytes) -> LibraryObject:
        """Load one ciphertext."""
        stream = from_wire(payload, self._shape)
        message = _vector_head(self.parameters) + b"\x12" + _varint(len(stream)) + stream
        if self.parameters.scheme == "ckks":
            message += b"\x19" + struct.pack("<d", self._shape.scale)
        if self.parameters.scheme == "bfv":
            reader = tenseal.bfv_vector_from
        else:
            reader = tenseal.ckks_vector_from
        return _guarded(lambda: reader(self._context, message))

    def add(self, total: LibraryObject, other: LibraryObject) -> None:
        """Add `other` into `total`."""
        _guarded(lambda: total.add_(other))

    def save(self, ciphertext: LibraryObject) -> bytes:
        """Serialise one ciphertext."""
        message = bytes(ciphertext.serialize())
        start = message.index(self._shape.prefix, len(_vector_head(self.parameters)))
        size = int.from_bytes(message[start + 8 : start + 16], "little")
        return to_wire(_decompress(message[start : start + size]), self._shape)

    def decrypt(self, ciphertext: LibraryObject) -> Integers:
        """Open one ciphertext."""
        if not self._context.has_secret_key():
            raise ProtocolError

        def decode() -> Integers:
            decoded = ciphertext.decrypt()
            if self.parameters.scheme == "bfv":
                return np.array(decoded, dtype=np.int64)
            return _round(decoded)

        return _guarded(decode)

    def __repr__(self) -> str:
        return "VectorEngine(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encryption engine holds a secret and cannot be pickled")


def _varint(number: int) -> bytes:
    """Encode one protocol-buffer integer."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _vector_head(parameters: Parameters) -> bytes:
    """Write the sizes field of TenSEAL's vector message: one ciphertext with all its slots."""
    sizes = _varint(parameters.slots)
    return b"\x0a" + _varint(len(sizes)) + sizes


def _new_context(parameters: Parameters) -> LibraryObject:
    bfv = parameters.scheme == "bfv"
    return tenseal.context(
        tenseal.SCHEME_TYPE.BFV if bfv else tenseal.SCHEME_TYPE.CKKS,
        parameters.poly_modulus_degree,
        plain_modulus=ntt_prime(parameters.plain_bits, parameters.poly_modulus_degree) if bfv else None,
        coeff_mod_bit_sizes=list(parameters.coefficient_bits),
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )


def _without_key(parameters: Parameters) -> bytes:
    """Build a context from public numbers alone; the key TenSEAL insists on generating is dropped at once."""
    return bytes(_new_context(parameters).serialize(False, False, False, False))
