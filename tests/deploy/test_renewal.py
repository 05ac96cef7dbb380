"""Certificates that end: another of the same authority, another authority with an overlap, and what is said before."""

import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from polyrank.deploy import certificates, expiry, identity, join, operate, registry, renewal
from polyrank.deploy.enrolment import read_answer
from polyrank.deploy.layout import DeployError, Deployment, Node
from polyrank.deploy.provision import init


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return init(tmp_path / "fed", ["a"], ["localhost"])


def trusts(authority: Path, made: Deployment) -> bool:
    """Whether who trusts an authority gets through a TLS handshake with the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.certificate.with_suffix(".key"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = certificates.trust(authority).wrap_bio(to_client, to_server, server_hostname="localhost")
    try:
        for _ in range(4):
            for end in (client, server):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError:
        return False
    return client.version() is not None


def test_a_certificate_is_renewed_by_the_same_authority(made: Deployment) -> None:
    old, ca = made.certificate.read_bytes(), made.authority.read_bytes()
    for _ in range(2):
        renewal.renew(made, days=40)
    assert certificates.expires(made.certificate.read_bytes()) < certificates.expires(old)
    assert made.authority.read_bytes() == ca
    assert stat.S_IMODE(made.certificate.with_suffix(".key").stat().st_mode) == 0o600
    assert trusts(made.node("a").authority, made)
    (made.folder / "ca" / "ca.key").write_bytes(certificates.authority()[0])
    with pytest.raises(DeployError, match=r"ca\.key: is not the key of"):
        renewal.renew(made)
    (made.folder / "ca" / "ca.key").unlink()
    with pytest.raises(DeployError, match=r"ca\.key: is not there"):
        renewal.renew(made)


def test_the_authority_changes_with_an_overlap(made: Deployment, tmp_path: Path) -> None:
    """A site that accepts the answers in time is never without a server that it trusts; one that does not, later is."""
    site, late = made.node("a"), tmp_path / "late.crt"
    late.write_bytes(site.authority.read_bytes())
    with pytest.raises(DeployError, match="`--authority new` makes a new authority first"):
        renewal.use_authority(made)
    with pytest.raises(DeployError, match="one authority is trusted"):
        renewal.drop_authority(made)
    assert renewal.new_authority(made) == [made.answer("a")]
    assert trusts(late, made)
    with pytest.raises(DeployError, match="two authorities are trusted already"):
        renewal.new_authority(made)
    with pytest.raises(DeployError, match="the new authority is not in use"):
        renewal.drop_authority(made)
    renewal.renew(made)  # goes on with the present one
    assert trusts(late, made)
    answer = read_answer(made.answer("a"))
    assert len(identity.strangers(site.folder, answer)) == 1
    identity.accept(site.folder, answer)
    assert trusts(site.authority, made)
    renewal.use_authority(made)
    assert trusts(site.authority, made)
    assert not trusts(late, made)
    assert {d.what for d in expiry.of_node(site)} == {"key of a", "authority 1", "authority 2"}
    renewal.drop_authority(made)
    assert trusts(site.authority, made)
    identity.accept(site.folder, read_answer(made.answer("a")))
    assert site.authority.read_bytes() == made.authority.read_bytes()
    assert made.authority.read_bytes() != late.read_bytes()
    assert trusts(site.authority, made)
    renewal.new_authority(made)  # and once more


def test_deadlines_warn_and_then_are_errors(made: Deployment) -> None:
    now = datetime.now(UTC)
    for days, level in ((0, "ok"), (334, "ok"), (336, "warning"), (364, "warning"), (366, "error")):
        for deadlines in (
            expiry.of_server(made, now + timedelta(days=days)),
            expiry.of_node(made.node("a"), now + timedelta(days=days)),
        ):
            (key,) = [deadline for deadline in deadlines if deadline.what == "key of a"]
            assert key.level == level
            assert key.plain()["days"] == 364 - days
    assert "29 days left" in str(expiry.of_server(made, now + timedelta(days=335))[0])
    assert "ended on" in str(expiry.of_server(made, now + timedelta(days=366))[0])
    assert "--rotate" in str(expiry.of_node(made.node("a"), now + timedelta(days=366))[0])


def test_an_expired_key_stays_an_error_until_the_node_is_removed(made: Deployment) -> None:
    with registry.changing(made) as book:
        registry.expire(book, datetime.now(UTC) + timedelta(days=366))
    assert [d.what for d in expiry.of_server(made, datetime.now(UTC) + timedelta(days=367)) if d.level == "error"] == [
        *("server certificate", "key of a")
    ]
    assert operate.remove(made, "a") is False
    assert "key of a" not in {d.what for d in expiry.of_server(made)}


def test_nothing_starts_with_what_has_ended(made: Deployment) -> None:
    node: Node = made.node("a")
    text = node.about.read_text()
    year = datetime.now(UTC).year
    node.about.write_text(text.replace(f'"{year + 1}-', f'"{year - 1}-'))
    assert node.about.read_text() != text
    with pytest.raises(DeployError, match="key of a: ended on"):
        join.join(node.folder)
    key, authority = (made.folder / "ca" / "ca.key").read_bytes(), made.authority.read_bytes()
    past = datetime.now(UTC) - timedelta(days=400)
    made.certificate.write_bytes(certificates.server_certificate(key, authority, ["localhost"], past)[1])
    with pytest.raises(DeployError, match=r"server certificate: ended on .* `polyrank deploy renew"):
        operate.up(made)
    assert operate.processes(made) == operate.processes(node) == {}
