"""The authority of a deployment, the server's certificate, and a key pair a node. All keys are of the curve P-384."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyrank.errors import InputError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 365
_CURVE = ec.SECP384R1()
_EARLIER = timedelta(hours=1)  # before now, from when a certificate is valid: clocks differ
_ALWAYS = ("localhost", "127.0.0.1", "::1")


def authority(now: datetime | None = None) -> tuple[bytes, bytes]:
    """A new certificate authority, which signs servers only: its private key and its certificate, PEM."""
    key = ec.generate_private_key(_CURVE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "polyrank deployment authority")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    signed = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return _private_pem(key), signed.public_bytes(Encoding.PEM)


def server_certificate(
    ca_key: bytes, ca_certificate: bytes, hosts: Sequence[str], now: datetime | None = None, days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """A server's private key and certificate, PEM.

    Args:
        ca_key: the authority's, PEM.
        ca_certificate: the authority's, PEM.
        hosts: names and addresses under which the server is dialled; loopback is always among them.
        now: from when it is valid; the present if left out.
        days: for how long.
    """
    issuer = x509.load_pem_x509_certificate(ca_certificate)
    authority_key = load_pem_private_key(ca_key, None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(_CURVE)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *_ALWAYS])]
    signed = (
        _builder(subject, issuer.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    return _private_pem(key), signed.public_bytes(Encoding.PEM)


def node_keys(name: str) -> tuple[bytes, bytes]:
    """A node's private and public key, in OpenSSH's formats."""
    key = ec.generate_private_key(_CURVE)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, f"{_public_text(key.public_key())} {name}\n".encode()


def public_key(private: bytes) -> str:
    """The public key of a node's private key, as OpenSSH writes it, without a comment.

    Raises:
        InputError: if it is not a key as `node_keys` makes it.
    """
    return _public_text(_node_key(private).public_key())


def fingerprint(public: str) -> str:
    """Of a public key as OpenSSH writes it: ``SHA256:`` and 43 letters, as ``ssh-keygen -l`` shows it.

    Raises:
        InputError: if it is not a public key of P-384.
    """
    _checked_public(public)
    return _sha256(base64.b64decode(public.split()[1]))


def signature(private: bytes, message: bytes) -> bytes:
    """A node's signature of a message."""
    return _node_key(private).sign(message, ec.ECDSA(hashes.SHA384()))


def signed_by(public: str, signature: bytes, message: bytes) -> bool:
    """Whether a signature of a message was made with the private key of a public one.

    Raises:
        InputError: if it is not a public key of P-384, as OpenSSH writes it.
    """
    key = _checked_public(public)
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def expires(pem: bytes) -> datetime:
    """When a certificate (PEM) ends."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def authorities(pem: bytes) -> list[bytes]:
    """The certificates of authorities in a text, PEM, one by one.

    Raises:
        InputError: if there is none, or one that is not an authority's.
    """
    try:
        held = x509.load_pem_x509_certificates(pem)
        for each in held:
            if not each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise ValueError("a certificate that is not an authority's")
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, UnsupportedAlgorithm) as error:
        raise InputError(f"not certificates of an authority in PEM: {error}") from None
    return [each.public_bytes(Encoding.PEM) for each in held]


def authority_fingerprint(pem: bytes) -> str:
    """Of a certificate: SHA-256 of all of it, written as that of a key."""
    return _sha256(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER))


def signs(ca_key: bytes, ca_certificate: bytes) -> bool:
    """Whether a private key (PEM) is that of a certificate."""
    certified = x509.load_pem_x509_certificate(ca_certificate).public_key()
    return load_pem_private_key(ca_key, None).public_key() == certified


def issued(ca_certificate: bytes, certificate: bytes) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(
            x509.load_pem_x509_certificate(ca_certificate)
        )
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def certificate(path: Path) -> bytes:
    """The certificate in a file, PEM.

    Raises:
        InputError: if it holds none.
    """
    pem = path.read_bytes()
    try:
        x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InputError(f"{path}: not a certificate in PEM: {error}") from None
    return pem


def trust(authority: Path) -> ssl.SSLContext:
    """What trusts the authority whose certificate is in a file, and nobody else."""
    certificate(authority)
    return ssl.create_default_context(cafile=str(authority))


def signer(key: Path) -> bytes:
    """An authority's private key, PEM, from a file.

    Raises:
        InputError: if it holds none.
    """
    pem = key.read_bytes()
    try:
        if isinstance(load_pem_private_key(pem, None), ec.EllipticCurvePrivateKey):
            return pem
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    raise InputError(f"{key}: not the private key that `polyrank deploy init` wrote; put it back")


def _node_key(private: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(private, None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == _CURVE.name:
            return key
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    raise InputError("not a private key that `polyrank deploy request` wrote")


def _checked_public(public: str) -> ec.EllipticCurvePublicKey:
    """A public key that is written in the one way."""
    try:
        key = load_ssh_public_key(public.encode())
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == _CURVE.name and _public_text(key) == public:
            return key
    except (ValueError, UnsupportedAlgorithm):
        pass
    raise InputError("not a public key of P-384 as OpenSSH writes it: ecdsa-sha2-nistp384 AAAA...")


def _public_text(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _sha256(data: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime | None, days: int
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _EARLIER)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
