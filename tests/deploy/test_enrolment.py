"""Requests and answers as files: what they prove, and that nothing else is taken for one."""

import json
import random
import subprocess
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from polyrank.deploy import certificates, enrolment, identity
from polyrank.deploy.layout import DeployError, Node
from polyrank.deploy.provision import add, init

FEDERATION = "0123456789abcdef"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
PRIVATE, PUBLIC = certificates.node_keys("north")
TEXT = enrolment.signed(PRIVATE, "north", FEDERATION, 90, NOW)


def refused(path: Path, value: Any) -> str:
    """The one message about a request."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(DeployError) as caught:
        enrolment.read_request(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_request_is_read_back_and_proves_possession(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(TEXT.replace("\n", "\r\n"))  # as some mail programs leave it
    request = enrolment.read_request(path)
    assert (request.name, request.federation) == ("north", FEDERATION)
    assert (request.since, request.until) == ("2026-01-02T00:00:00+00:00", "2026-04-02T00:00:00+00:00")
    assert request.key == PUBLIC.decode().rpartition(" ")[0]
    # Without any of polyrank's functions: the signature is over the other keys, sorted, as JSON.
    value = json.loads(TEXT)
    signature = b64decode(value.pop("signature"))
    key = load_ssh_public_key(value["key"].encode())
    assert isinstance(key, EllipticCurvePublicKey)
    key.verify(signature, json.dumps(value, sort_keys=True).encode(), ECDSA(SHA384()))
    assert enrolment.signed(PRIVATE, "north", FEDERATION, 90, NOW) != TEXT


def test_the_fingerprint_is_ssh_keygen_s(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(PUBLIC)
    try:
        shown = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "key.pub"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no ssh-keygen here")
    assert certificates.fingerprint(PUBLIC.decode().rpartition(" ")[0]) == shown.stdout.split()[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_mutated_request_is_refused_with_one_message(tmp_path: Path, seed: int) -> None:
    rng, original = random.Random(seed), json.loads(TEXT)
    letters = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=-: "{}\\é\0'
    tried = 0
    while tried < 60:
        at, how = rng.randrange(len(TEXT)), rng.choice(("change", "insert", "drop"))
        text = TEXT[:at] + ("" if how == "drop" else rng.choice(letters)) + TEXT[at + (how != "insert") :]
        try:
            if json.loads(text) == original:  # a space between two keys
                continue
        except ValueError:
            pass
        refused(tmp_path / "request.json", text)
        tried += 1


def test_every_key_is_signed_and_none_may_be_added(tmp_path: Path) -> None:
    value, path = json.loads(TEXT), tmp_path / "request.json"
    other = json.loads(enrolment.signed(certificates.node_keys("n")[0], "south", "f" * 16, 91, NOW + timedelta(days=1)))
    for key in value:
        if key != "format":
            assert "signature: does not fit" in refused(path, {**value, key: other[key]}), key
        assert f"'{key}': missing" in refused(path, {k: v for k, v in value.items() if k != key}) or key == "format"
        refused(path, {**value, key: 3})
        refused(path, {**value, key: None})
    assert "'more': is not a key of it" in refused(path, {**value, "more": ""})
    assert "format is not" in refused(path, {**value, "format": "polyrank node request 2"})
    assert "more than 100,000 bytes" in refused(path, TEXT + " " * 100_000)
    for wrong in ("", "[]", "null", "{" * 5000, "PNG\0"):
        refused(path, wrong)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = json.loads(TEXT)
    ed25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0cJbRRlVvNfJ2Wd4PRqXN2GcTjmHXyfQrOXyHJ6ABC"
    for key in (ed25519, value["key"] + " north", value["key"][:-8], ""):
        assert "key: not a public key of P-384" in refused(tmp_path / "request.json", {**value, "key": key})


def test_names_and_ids_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    for name, federation, message in (("a b", FEDERATION, "'a b'"), ("a", "x", "'x'"), ("", FEDERATION, "64 letters")):
        with pytest.raises(DeployError, match=message):
            identity.request(tmp_path / "site", name, federation)
    assert not (tmp_path / "site").exists()


def test_an_answer_is_for_one_node_one_federation_one_key(tmp_path: Path) -> None:
    made = init(tmp_path / "fed", [], ["h"])
    site = tmp_path / "north"
    identity.request(site, "north", made.settings.federation)
    with pytest.raises(DeployError, match="no answer of the server yet"):
        Node.open(site)
    add(made, site / "request.json")
    answer = enrolment.read_answer(made.answer("north"))
    assert len(identity.strangers(site, answer)) == 1
    for change, message in (
        ({"name": "south"}, "is of node 'north'"),
        ({"federation": FEDERATION}, "asked federation"),
        ({"fingerprint": "SHA256:x"}, "the answer is for SHA256:x"),
    ):
        with pytest.raises(DeployError, match=message):
            identity.accept(site, enrolment.Answer(**{**vars(answer), **change}))
    assert not (site / "node.json").exists()
    for _ in range(2):
        node = identity.accept(site, answer)
        assert (node.name, node.superlink, node.until) == ("north", "h:8443", answer.until)
    assert identity.strangers(site, answer) == []
    path = tmp_path / "answer.json"
    for change in ({"superlink": "https://h"}, {"until": "soon"}, {"authority": "none"}, {"authority": 1}):
        path.write_text(json.dumps({**json.loads(made.answer("north").read_text()), **change}))
        with pytest.raises(DeployError, match=r"answer\.json: "):
            enrolment.read_answer(path)
