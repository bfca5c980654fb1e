"""Certificates for mutual TLS: every participant makes its key itself; the operator signs names, offline."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ffm_secure.errors import FfmError
from ffm_secure.storage.durable import create_folder, write_atomic, write_synced

KEY, REQUEST, CERTIFICATE, ROOT = "key.pem", "request.pem", "certificate.pem", "root.pem"
KEY_BITS: Final = 2048  # as the engine's own tool; the certificates live for a year
SITE, SERVER, SUBMITTER = "client", "server", "lead"  # as the engine names kinds of participants
KINDS = (SITE, SERVER, SUBMITTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What the operator hands back for a request: public, and tied to the key that asked."""

    certificate: bytes  # PEM
    root: bytes  # PEM

    def joined(self) -> bytes:
        """Return one file: the certificate, then the root."""
        return self.certificate + self.root


def create_authority(folder: Path, federation: str, *, now: datetime.datetime, days: int = 3650) -> str:
    """Make the operator's root key and certificate; return the digest that everybody compares.

    Raises:
      FileExistsError: there is one.
    """
    create_folder(folder)
    key = _new_key()
    write_synced(folder / KEY, _private(key))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, federation)])
    certificate = (
        _builder(name, name, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_atomic(folder / ROOT, _pem(certificate))
    return digest(_pem(certificate))


def request(folder: Path, name: str, *, anew: bool = False) -> bytes:
    """Make a participant's key in its own folder and return what it sends to the operator.

    Guarantee: the key stays in the folder, for its owner alone; asking again asks for the same key, unless
    it is to be made `anew`.
    """
    create_folder(folder)
    if anew or not (folder / KEY).exists():
        write_atomic(folder / KEY, _private(_new_key()))
    key = _load_key(folder / KEY)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    asked = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    content = asked.public_bytes(serialization.Encoding.PEM)
    write_atomic(folder / REQUEST, content)
    return content


def approve(
    authority: Path,
    asked: bytes,
    *,
    name: str,
    kind: str,
    now: datetime.datetime,
    hosts: tuple[str, ...] = (),
    days: int = 365,
) -> Approval:
    """Sign a participant's key under the name the operator knows it by.

    Assumes: the operator was handed the request by the participant itself.

    Raises:
      FfmError: the request is damaged, or asks for another name.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: one of {', '.join(KINDS)}")
    wanted = _load_request(asked, name)
    root = x509.load_pem_x509_certificate((authority / ROOT).read_bytes())
    federation = federation_of(authority)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, kind),
        ]
    )
    certificate = (
        _builder(subject, root.subject, wanted.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_purposes(kind)), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(name, hosts)), critical=False)
        .sign(_load_key(authority / KEY), hashes.SHA256())
    )
    return Approval(certificate=_pem(certificate), root=_pem(root))


def accept(folder: Path, approved: bytes, root_digest: str) -> Approval:
    """Keep what came back from the operator beside the key, after looking at it.

    Raises:
      FfmError: it is of another operator, for another key, or damaged.
    """
    try:
        certificate, root = x509.load_pem_x509_certificates(approved)
    except ValueError:
        raise FfmError("this is no approval of an operator; ask for the file again") from None
    approval = Approval(certificate=_pem(certificate), root=_pem(root))
    if digest(approval.root) != root_digest:
        raise FfmError("this approval is of another operator than the one whose digest you were told")
    if not _signed_by(certificate, root):
        raise FfmError("this approval was not signed by the operator; ask for the file again")
    if certificate.public_key() != _load_key(folder / KEY).public_key():
        raise FfmError("this approval is for another key than the one in this folder")
    write_atomic(folder / CERTIFICATE, approval.certificate)
    write_atomic(folder / ROOT, approval.root)
    return approval


def federation_of(authority: Path) -> str:
    """Return the name of the federation that an operator's root certificate is for."""
    root = x509.load_pem_x509_certificate((authority / ROOT).read_bytes())
    return str(root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def digest(root: bytes) -> str:
    """Return the SHA-256 digest of a root certificate (PEM), as people compare it."""
    certificate = x509.load_pem_x509_certificate(root)
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)


def _private(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _load_key(path: Path) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def _load_request(asked: bytes, name: str) -> x509.CertificateSigningRequest:
    try:
        wanted = x509.load_pem_x509_csr(asked)
    except ValueError:
        raise FfmError(f"{name}: this is no request for a certificate; ask for the file again") from None
    names = [str(item.value) for item in wanted.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name] or not wanted.is_signature_valid:
        raise FfmError(f"{name}: the request asks for another name, or was changed on its way")
    return wanted


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: x509.CertificatePublicKeyTypes,  # type: ignore[name-defined]
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=10))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _purposes(kind: str) -> list[x509.ObjectIdentifier]:
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    return [*purposes, ExtendedKeyUsageOID.SERVER_AUTH] if kind != SUBMITTER else purposes


def _names(name: str, hosts: tuple[str, ...]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((name, *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _signed_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    key = root.public_key()
    algorithm = certificate.signature_hash_algorithm
    if not isinstance(key, rsa.RSAPublicKey) or algorithm is None:
        return False
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
