"""What a compression needs of a run file, and with which other choices it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ffm_secure.config.groups import group_size
from ffm_secure.config.schema import Problems

if TYPE_CHECKING:
    from ffm_secure.config.run_file import RunConfig

FEWEST_BITS = 4  # of one value; with fewer, rounding is all that is left of an update


def check_compression(config: RunConfig, problems: Problems) -> None:
    """Check that a kind says what it needs, and nothing is said that it does not read."""
    compression = config.compression
    if compression.kind == "bits" and not compression.field_bits:
        problems.add(
            "compression.field_bits",
            compression.field_bits,
            "missing; say how many bits one number takes on the wire: 16, 24 or 32",
        )
    if compression.kind == "none" and compression.field_bits:
        problems.add(
            "compression.field_bits",
            compression.field_bits,
            "is not read with kind = 'none'; say kind = 'bits'",
        )


def compression_reasons(config: RunConfig) -> Iterator[str]:
    """Yield why numbers of a compression do not hold with the rest of the run file."""
    compression, privacy = config.compression, config.privacy
    if compression.residual and privacy.noise_shares == "sum":
        yield (
            "compression.residual = true with privacy.noise_shares = 'sum': what stays at home has no noise "
            "yet, and a record in it would be sent again in rounds it did not join, beyond the bound that "
            "its round is charged for; set residual to false, or use noise_shares = 'site'"
        )
    if compression.residual and privacy.correlation == "banded":
        yield (
            "compression.residual = true with privacy.correlation = 'banded': a client would send what it "
            "learned in a round that is not its turn and is not charged; set residual to false"
        )
    if compression.kind == "projection" and compression.basis == "fresh" and privacy.correlation == "banded":
        yield (
            "compression.basis = 'fresh' with privacy.correlation = 'banded': noise that is taken back in a "
            "later round must stand along the same directions there; use basis = 'fixed'"
        )
    if compression.field_bits and _has_real_values(config) and value_bits(config) < FEWEST_BITS:
        yield (
            f"compression.field_bits = {compression.field_bits} with {group_size(config)} clients in a sum: "
            f"leaves {value_bits(config)} bits for one client's number, and at least {FEWEST_BITS} are "
            "needed; take more bits, or smaller groups"
        )


def _has_real_values(config: RunConfig) -> bool:
    """Tell whether updates are put on the grid by the codec: noise on integers has a grid of its own."""
    return config.privacy.unit != "client" and config.privacy.noise_shares != "sum"


def value_bits(config: RunConfig, *, largest_weight: int = 1) -> int:
    """Return the signed bits of one client's number: the run file's, or as many as a sum leaves in its field.

    1 where not even two fit.
    """
    wanted, field_bits = config.protection.value_bits, config.compression.field_bits
    if not field_bits:
        return wanted
    clients = group_size(config)
    for bits in range(min(wanted, field_bits), 1, -1):
        if clients * ((1 << (bits - 1)) - 1) * largest_weight < 1 << (field_bits - 1):
            return bits
    return 1
