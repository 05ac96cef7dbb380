"""Who is in a federation: add, remove, replace, rotate, expire and renew, in any order, and twice."""

import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from polyrank.deploy import certificates, identity, registry
from polyrank.deploy.enrolment import instant, read_answer, signed
from polyrank.deploy.layout import DeployError, Deployment
from polyrank.deploy.provision import add, init

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return init(tmp_path / "fed", [], ["h"])


def leave(made: Deployment, name: str, now: datetime = NOW) -> None:
    with registry.changing(made) as book:
        registry.leave(book, name, now)


def fingerprint(made: Deployment, name: str) -> str:
    return certificates.fingerprint(registry.read(made)["nodes"][name]["key"])


def test_a_site_comes_goes_and_comes_back(made: Deployment, tmp_path: Path) -> None:
    site = tmp_path / "north"
    first = identity.request(site, "north", made.settings.federation)
    assert add(made, site / "request.json") == "added"
    assert add(made, site / "request.json") == "is there with this key already"
    identity.accept(site, read_answer(made.answer("north")))
    leave(made, "north")
    with pytest.raises(DeployError, match="not one of the nodes: there are none"):
        leave(made, "north")
    with pytest.raises(
        DeployError, match=rf"key {re.escape(first.fingerprint)} of node north was removed on .*--rotate"
    ):
        add(made, site / "request.json")
    second = identity.rotate(site, "north")
    assert identity.rotate(site, "north").key == second.key != first.key
    assert certificates.public_key((site / "node.key").read_bytes()) == first.key  # in use until the answer is there
    assert add(made, site / "request.json") == "added"
    for _ in range(2):
        identity.accept(site, read_answer(made.answer("north")))
        assert certificates.public_key((site / "node.key").read_bytes()) == second.key
        assert not (site / "next.key").exists()


def test_a_key_is_replaced_only_if_that_is_meant(made: Deployment, tmp_path: Path) -> None:
    first = identity.request(tmp_path / "a", "north", made.settings.federation)
    second = identity.request(tmp_path / "b", "north", made.settings.federation)
    add(made, tmp_path / "a" / "request.json")
    with pytest.raises(
        DeployError, match=rf"is taken by key {re.escape(first.fingerprint)}; `polyrank deploy add --replace`"
    ):
        add(made, tmp_path / "b" / "request.json")
    assert add(made, tmp_path / "b" / "request.json", replace=True) == "its key is replaced"
    assert add(made, tmp_path / "b" / "request.json", replace=True) == "is there with this key already"
    assert fingerprint(made, "north") == second.fingerprint
    with pytest.raises(DeployError, match="was replaced on"):
        add(made, tmp_path / "a" / "request.json", replace=True)


def test_a_key_gets_more_time_until_it_has_ended(made: Deployment, tmp_path: Path) -> None:
    site, path = tmp_path / "north", tmp_path / "north" / "request.json"
    identity.request(site, "north", made.settings.federation, days=10)
    add(made, path)
    old = path.read_text()
    longer = identity.renew(site, "north", days=40)
    assert add(made, path) == f"its key is valid until {longer.until[:10]}"
    path.write_text(old)  # once more, in the wrong order: nothing is taken back
    assert add(made, path) == "is there with this key already"
    assert registry.read(made)["nodes"]["north"]["until"] == longer.until
    with registry.changing(made) as book:
        assert registry.expire(book, NOW + timedelta(days=39)) == []
        assert not any(member["until"] <= instant(NOW) for member in book["nodes"].values())
        assert registry.expire(book, NOW + timedelta(days=41)) == ["north"]
        assert registry.expire(book, NOW + timedelta(days=41)) == []
    identity.renew(site, "north", days=100)
    with pytest.raises(DeployError, match="of node north expired on"):
        add(made, path)
    identity.rotate(site, "north")
    assert add(made, path) == "added"


def test_what_cannot_be_is_refused(made: Deployment, tmp_path: Path) -> None:
    path, federation = tmp_path / "request.json", made.settings.federation
    private, _ = certificates.node_keys("north")
    for days, since, message in (
        (5, NOW - timedelta(days=6), "is over"),
        (90, NOW + timedelta(days=2), "still to come; set the clocks"),
    ):
        path.write_text(signed(private, "north", federation, days, since))
        with pytest.raises(DeployError, match=message):
            add(made, path)
    path.write_text(signed(private, "north", "f" * 16))
    with pytest.raises(DeployError, match=f"federation: ffffffffffffffff: this one is {federation}"):
        add(made, path)
    path.write_text(signed(private, "north", federation))
    add(made, path)
    path.write_text(signed(private, "south", federation))
    with pytest.raises(DeployError, match="its key is that of node north"):
        add(made, path)
    path.write_text(signed(certificates.node_keys("North")[0], "North", federation))
    with pytest.raises(DeployError, match="'North': there is 'north'"):
        add(made, path)
    assert registry.names(made) == ["north"]
    made.registry.unlink()
    with pytest.raises(DeployError, match=r"registry\.json: is not there"):
        registry.read(made)


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_events_lets_a_past_key_in(made: Deployment, tmp_path: Path, seed: int) -> None:
    rng, path, now = random.Random(seed), tmp_path / "request.json", NOW
    keys = [certificates.node_keys("x")[0] for _ in range(6)]
    gone: set[str] = set()
    for _ in range(60):
        now += timedelta(days=rng.randrange(12))
        private, name = rng.choice(keys), rng.choice(("a", "b"))
        before = {member["key"] for member in registry.read(made)["nodes"].values()}
        event = rng.choice(("add", "add", "replace", "remove", "expire"))
        try:
            if event == "remove":
                leave(made, name, now)
            elif event == "expire":
                with registry.changing(made) as book:
                    registry.expire(book, now)
            else:
                path.write_text(signed(private, name, made.settings.federation, rng.choice((20, 40)), now))
                add(made, path, replace=event == "replace", now=now)
        except DeployError:
            assert {member["key"] for member in registry.read(made)["nodes"].values()} == before
        book = registry.read(made)
        after = {member["key"] for member in book["nodes"].values()}
        gone |= before - after
        assert not after & gone
        assert len(after) == len(book["nodes"])
        assert {certificates.fingerprint(key) for key in gone} == {past["fingerprint"] for past in book["past"]}
    assert gone
