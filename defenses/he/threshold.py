"""Threshold encryption as a plug-in: a key nobody holds whole. An openfhe adapter where its wheel imports.

With a shared key the server and any one client break everyone (`defenses.he.collusion`). Threshold
encryption removes that; its price is an extra round in which every key-share owner answers. The interface is
what a federation needs; `open_threshold("openfhe", ...)` gives the n-of-n BFV scheme of OpenFHE, or refuses
with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, Protocol

import numpy as np

from defenses.errors import ParameterError, ProtocolError
from defenses.foreign import LibraryObject
from defenses.he.packing import Integers
from defenses.he.parameters import ntt_prime

_DEGREE_FOR_PLAIN: Final = 16384


class ThresholdParty(Protocol):
    """One owner of a key share.

    Guarantee: no proper subset of the owners opens a ciphertext of another owner; `partial` answers each sum
    once.
    Assumes: the joint public key was checked to be built by the roster's members (signed shares, as in key
    wrapping).
    """

    def share_key(self, previous: bytes | None) -> bytes:
        """Create this party's share on top of the chain so far and return the public key of the chain."""

    def encrypt(self, values: Integers, joint: bytes) -> list[bytes]:
        """Encrypt int64 values under the joint public key, in chunks."""

    def partial(self, chunks: Sequence[bytes], *, lead: bool) -> list[bytes]:
        """Give this party's share of a decryption, noise flooded; refused for a sum already answered."""


class ThresholdServer(Protocol):
    """The keyless side: adds ciphertexts and joins the parties' partial decryptions."""

    def add(self, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Add the chunks of several uploads."""

    def fuse(self, partials: Sequence[Sequence[bytes]], length: int) -> Integers:
        """Join one partial decryption of every owner into the int64 sum."""


def threshold_available() -> tuple[bool, str]:
    """Say whether openfhe can be used here, and why not."""
    try:
        module = importlib.import_module("openfhe")
        module.GenCryptoContext  # noqa: B018 - a wheel without its compiled half imports as an empty package
    except (ImportError, AttributeError, OSError) as error:
        return False, (
            "threshold encryption needs openfhe, whose wheel does not import here "
            f"({type(error).__name__}): it ships a compiled library for one Python version only. Use "
            "protection kind 'secagg' against collusion"
        )
    return True, "openfhe"


def open_threshold(name: str, *, plain_bits: int) -> OpenFHEThreshold:
    """Open a threshold scheme by name; 'openfhe' is the one shipped.

    Raises:
        ParameterError: an unknown name, or a library that does not import, with the reason.
    """
    if name != "openfhe":
        raise ParameterError(f"threshold scheme {name!r} is unknown; 'openfhe' is the one shipped")
    usable, reason = threshold_available()
    if not usable:
        raise ParameterError(reason)
    return OpenFHEThreshold(importlib.import_module("openfhe"), plain_bits=plain_bits)


class OpenFHEThreshold:
    """Run OpenFHE's n-of-n BFV with noise flooding; the same object serves a party and the server.

    Sums are exact while |sum| < t / 2 for the `plain_bits`-bit plain modulus t.
    Source: openfhe-python, multiparty example (MultipartyKeyGen, MultipartyDecryptLead / Main / Fusion).
    """

    def __init__(self, library: LibraryObject, *, plain_bits: int) -> None:
        self._library = library
        settings = library.CCParamsBFVRNS()
        plain = ntt_prime(plain_bits, _DEGREE_FOR_PLAIN)
        if not plain:
            raise ParameterError(f"plain_bits = {plain_bits}: no batching prime of that size; use 20 to 60")
        settings.SetPlaintextModulus(plain)
        settings.SetMultiplicativeDepth(1)
        settings.SetSecurityLevel(library.SecurityLevel.HEStd_128_classic)
        settings.SetMultipartyMode(library.MultipartyMode.NOISE_FLOODING_MULTIPARTY)
        self._context = library.GenCryptoContext(settings)
        for feature in ("PKE", "KEYSWITCH", "LEVELEDSHE", "ADVANCEDSHE", "MULTIPARTY"):
            self._context.Enable(getattr(library.PKESchemeFeature, feature))
        self._slots = int(self._context.GetRingDimension())
        self._secret: LibraryObject = None
        self._answered: set[bytes] = set()

    def share_key(self, previous: bytes | None) -> bytes:
        """Create this party's share and return the public key of the chain."""
        if self._secret is not None:
            raise ProtocolError
        if previous is None:
            pair = self._context.KeyGen()
        else:
            pair = self._context.MultipartyKeyGen(self._read("DeserializePublicKeyString", previous))
        self._secret = pair.secretKey
        return self._write(pair.publicKey)

    def encrypt(self, values: Integers, joint: bytes) -> list[bytes]:
        """Encrypt int64 values under the joint public key."""
        public = self._read("DeserializePublicKeyString", joint)
        parts = (values[start : start + self._slots] for start in range(0, len(values), self._slots))
        plains = (self._context.MakePackedPlaintext(part.tolist()) for part in parts)
        return [self._write(self._context.Encrypt(public, plain)) for plain in plains]

    def add(self, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Add the chunks of several uploads."""
        if len({len(upload) for upload in uploads}) != 1:
            raise ProtocolError
        totals = [self._ciphertext(chunk) for chunk in uploads[0]]
        for upload in uploads[1:]:
            totals = [
                self._context.EvalAdd(total, self._ciphertext(chunk)) for total, chunk in zip(totals, upload)
            ]
        return [self._write(total) for total in totals]

    def partial(self, chunks: Sequence[bytes], *, lead: bool) -> list[bytes]:
        """Give this party's share of a decryption, once for each ciphertext."""
        if self._secret is None or any(chunk in self._answered for chunk in chunks):
            raise ProtocolError
        self._answered.update(chunks)
        if lead:
            open_share = self._context.MultipartyDecryptLead
        else:
            open_share = self._context.MultipartyDecryptMain
        loaded = [self._ciphertext(chunk) for chunk in chunks]
        return [self._write(open_share([each], self._secret)[0]) for each in loaded]

    def fuse(self, partials: Sequence[Sequence[bytes]], length: int) -> Integers:
        """Join one partial decryption of every owner into the int64 sum."""
        total = np.empty(length, dtype=np.int64)
        for index, shares in enumerate(zip(*partials, strict=True)):
            plain = self._context.MultipartyDecryptFusion([self._ciphertext(share) for share in shares])
            target = total[index * self._slots : (index + 1) * self._slots]
            plain.SetLength(len(target))
            target[:] = plain.GetPackedValue()
        return total

    def _ciphertext(self, payload: bytes) -> LibraryObject:
        return self._read("DeserializeCiphertextString", payload)

    def _write(self, value: LibraryObject) -> bytes:
        return bytes(self._library.Serialize(value, self._library.BINARY))

    def _read(self, reader: str, payload: bytes) -> LibraryObject:
        read: Callable[[bytes, Any], Any] = getattr(self._library, reader)
        try:
            return read(payload, self._library.BINARY)
        except Exception:
            raise ProtocolError from None

    def __repr__(self) -> str:
        return "OpenFHEThreshold(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key share is a secret and cannot be pickled")
