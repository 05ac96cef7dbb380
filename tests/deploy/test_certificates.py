"""The authority, server certificates and node keys: what they say, who signed them, until when."""

import ipaddress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from polyrank.deploy.certificates import authority, expires, node_keys, server_certificate

NOW = datetime(2026, 1, 2, tzinfo=UTC)
CA_KEY, CA = authority(NOW)


def verified(host: x509.GeneralName, certificate: bytes, ca: bytes, at: datetime) -> list[x509.Certificate]:
    """The chain, as a client that dials a host checks it."""
    builder = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(ca)])).time(at)
    return builder.build_server_verifier(host).verify(x509.load_pem_x509_certificate(certificate), [])


@pytest.mark.parametrize("host", ["fed.example.org", "localhost", "127.0.0.1", "::1", "10.0.0.7"])
def test_the_server_is_known_under_each_of_its_names(host: str) -> None:
    _, certificate = server_certificate(CA_KEY, CA, ["fed.example.org", "10.0.0.7"], NOW)
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    assert len(verified(name, certificate, CA, NOW)) == 2


def test_no_other_name_no_other_authority_no_other_time() -> None:
    _, certificate = server_certificate(CA_KEY, CA, ["fed.example.org"], NOW, days=30)
    host = x509.DNSName("fed.example.org")
    assert verified(host, certificate, CA, NOW + timedelta(days=29))
    for name, ca, at in (
        (x509.DNSName("other.example.org"), CA, NOW),
        (host, authority(NOW)[1], NOW),
        (host, CA, NOW + timedelta(days=31)),
        (host, CA, NOW - timedelta(days=1)),
    ):
        with pytest.raises(VerificationError):
            verified(name, certificate, ca, at)
    assert expires(certificate) == NOW + timedelta(days=30)


def test_keys_belong_to_their_certificates_and_are_p384() -> None:
    key, certificate = server_certificate(CA_KEY, CA, ["a"], NOW)
    for private, public in ((CA_KEY, CA), (key, certificate)):
        loaded = load_pem_private_key(private, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        assert loaded.curve.name == "secp384r1"
        assert loaded.public_key() == x509.load_pem_x509_certificate(public).public_key()


def test_a_server_certificate_signs_nothing() -> None:
    key, certificate = server_certificate(CA_KEY, CA, ["a"], NOW)
    _, below = server_certificate(key, certificate, ["evil.example.org"], NOW)
    intermediate = x509.load_pem_x509_certificate(certificate)
    verifier = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(CA)])).time(NOW)
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("evil.example.org")).verify(
            x509.load_pem_x509_certificate(below), [intermediate]
        )


def test_node_keys_are_as_flower_takes_them() -> None:
    private, public = node_keys("site-1")
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert public.endswith(b" site-1\n")
    loaded = load_ssh_public_key(public)
    assert isinstance(loaded, ec.EllipticCurvePublicKey)
    assert loaded.curve.name == "secp384r1"
    assert loaded == key.public_key()
    signature = key.sign(b"text", ec.ECDSA(SHA256()))
    other = load_ssh_public_key(node_keys("site-2")[1])
    assert isinstance(other, ec.EllipticCurvePublicKey)
    with pytest.raises(InvalidSignature):
        other.verify(signature, b"text", ec.ECDSA(SHA256()))
    assert public.split()[:2] == key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()
