"""What a coordinator proposes and a site signs: the digests of everything both computed from the run file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from defenses.errors import ProtocolError
from defenses.signatures import verify_signature
from ffm_secure import record_codec
from ffm_secure.config.federated import release, run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts
from ffm_secure.models.backbone import vector_fingerprint

_ACCEPTS: Final = b"ffm-secure accepts 1"
_WORDS: Final = {
    "run_file": "the run file",
    "backbone": "the frozen backbone; one of the two has another copy of the model",
    "start": "the numbers that training starts from",
    "layout": "names, shapes or codec of what is sent",
    "mechanism": "what decides epsilon",
    "schedule": "who takes part in which round",
    "roster": "the roster; whoever has the older one needs the newest from the operator",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTerms:
    """Everything that all parties of a run compute alike, each from its own copy."""

    software: str
    run_file: str
    backbone: str
    start: str
    layout: str
    mechanism: str
    schedule: str
    roster: str

    def digest(self) -> bytes:
        """Return the hash that a site signs."""
        return hashlib.sha256(record_codec.canonical_bytes(self)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a coordinator asks a site to take part in."""

    name: str  # of the run, for people
    terms: RunTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedAcceptance:
    """One site's word that it takes part in a run under its terms."""

    site: str
    signature: bytes


def terms_of(loaded: LoadedModel, roster: str) -> RunTerms:
    """Compute a run's terms from this party's own model and roster."""
    spec = loaded.spec
    return RunTerms(
        software=release(),
        run_file=run_digest(loaded.config),
        backbone=loaded.backbone_digest(),
        start=vector_fingerprint(loaded.trainable.flatten().cpu()),
        layout=spec.layout_digest,
        mechanism=spec.mechanism_digest,
        schedule=hashlib.sha256(repr(spec.schedule).encode()).hexdigest(),
        roster=roster,
    )


def differences(own: RunTerms, proposed: RunTerms) -> tuple[str, ...]:
    """Return in words in what two parties' terms differ; empty when they agree."""
    words = [] if own.software == proposed.software else [other_release(proposed.software)]
    for name in _WORDS:
        if getattr(own, name) != getattr(proposed, name):
            words.append(_WORDS[name])
    return tuple(words)


def other_release(software: str) -> str:
    """Say that a coordinator has another release than this site, and who must do what."""
    return (
        f"ffm-secure is {release()} here and {software[:20]!r} at the coordinator; both must run the same "
        "minor version, and whoever is behind upgrades"
    )


def accept(run: bytes, terms: RunTerms, site: str, sign: Callable[[bytes], bytes]) -> SignedAcceptance:
    """Sign that a site takes part."""
    return SignedAcceptance(site=site, signature=sign(_statement(run, terms, site)))


def check_acceptance(
    acceptance: SignedAcceptance, run: bytes, terms: RunTerms, keys: Mapping[str, bytes]
) -> None:
    """Check that the site of a name signed.

    Raises:
      ProtocolError: it did not.
    """
    if acceptance.site not in keys:
        raise ProtocolError
    statement = _statement(run, terms, acceptance.site)
    verify_signature(keys[acceptance.site], acceptance.signature, statement)


def _statement(run: bytes, terms: RunTerms, site: str) -> bytes:
    return _ACCEPTS + len(run).to_bytes(1, "big") + run + terms.digest() + site.encode()


def public_facts(config: RunConfig, sites: Sequence[str]) -> PublicFacts:
    """Return what a run among machines takes to be public: what the run file declares, and nothing else."""
    return PublicFacts(
        public_client_size=config.task.nominal_examples,
        classes=len(config.task.class_names) or None,
        owners=tuple(sites),
    )
