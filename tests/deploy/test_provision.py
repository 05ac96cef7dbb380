"""A deployment's folder: what is in it, who may read it, what is handed over, and what is refused before it is made."""

import stat
import subprocess
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from polyrank.deploy import registry
from polyrank.deploy.layout import DeployError, Deployment, Node, nginx
from polyrank.deploy.provision import init

NAMES = ("north", "south_2", "Site-3")
SECRETS = ("ca/ca.key", "server/server.key", "server/superexec.secret", *(f"nodes/{name}/node.key" for name in NAMES))


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return init(tmp_path / "server", NAMES, ["fed.example.org", "10.0.0.7"], port=8443, superlink_port=18000)


def test_only_its_owner_may_read_anything(made: Deployment) -> None:
    found = [made.folder, *made.folder.rglob("*")]
    assert len(found) > 30
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_rehearsal_s_site_holds_one_secret_and_no_answer_holds_any(made: Deployment) -> None:
    for name in NAMES:
        folder = made.node(name).folder
        others = [made.folder / path for path in SECRETS if path != f"nodes/{name}/node.key"]
        kept = [secret.read_bytes() for secret in others]
        assert len(kept) == len(SECRETS) - 1
        for path in folder.rglob("*"):
            assert not any(secret in path.read_bytes() for secret in kept), path
            assert not any(other in path.read_text() for other in NAMES if other != name), path
        node = Node.open(folder)
        assert (node.name, node.superlink) == (name, "fed.example.org:8443")
        assert {path.name for path in folder.iterdir()} == {
            *("node.key", "request.json", "ca.crt", "node.json", "site.yaml", "README.md", "polyrank-node@.service")
        }
        for text in (made.answer(name).read_text(), node.request.read_text()):
            assert "PRIVATE" not in text


def test_every_key_is_another(made: Deployment) -> None:
    contents = [(made.folder / path).read_bytes() for path in SECRETS]
    assert len(set(contents)) == len(contents)


def test_the_settings_are_read_back(made: Deployment) -> None:
    settings = Deployment.open(made.folder).settings
    assert tuple(registry.names(made)) == NAMES
    assert settings.hosts == ("fed.example.org", "10.0.0.7")
    assert settings.public == "fed.example.org:8443"
    assert (settings.serverapp, settings.clientapp) == ("polyrank.deploy.server:app", "polyrank.deploy.client:app")


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # which Flower uses
def test_the_app_bundle_is_valid_and_holds_no_code(tmp_path: Path, apps: None) -> None:
    made = init(tmp_path / "d", ["a"], ["h"], serverapp="toyfed.server:app", clientapp="toyfed.client:app")
    _, warnings = load_and_validate(made.folder / "app" / "pyproject.toml")
    assert warnings == []
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(made.folder / "app"))) as bundle:
        code = [name for name in bundle.namelist() if name.endswith(".py")]
        declared = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert code == []
    assert declared["components"] == {"serverapp": "toyfed.server:app", "clientapp": "toyfed.client:app"}
    assert declared["config"] == {"folder": ""}


def test_nginx_takes_the_gateway_s_configuration(made: Deployment) -> None:
    command = [nginx(), "-t", "-p", str(made.run), "-c", str(made.folder / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_readmes_have_the_commands(made: Deployment, name: str) -> None:
    text = (made.folder / "README.md").read_text()
    assert f"polyrank deploy request NAME --federation {made.settings.federation}" in text
    assert f"polyrank deploy add {made.folder} request.json" in text
    assert "$" not in text
    text = (made.node(name).folder / "README.md").read_text()
    assert f"polyrank deploy accept . {name}.json" in text
    assert "$" not in text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"names": ["a", "b c"]}, "'b c'"),
    ({"names": ["a", "../b"]}, "'../b'"),
    ({"names": ["é"]}, "'é'"),
    ({"names": ["a" * 65]}, "64"),
    ({"names": ["a", "A"]}, "twice"),
    ({"hosts": []}, "--host"),
    ({"hosts": ["https://x"]}, "'https://x'"),
    ({"hosts": ["a b"]}, "'a b'"),
    ({"hosts": ["-x"]}, "'-x'"),
    ({"port": 70000}, "--port: 70000"),
    ({"port": -1}, "--port: -1"),
    ({"port": 9000, "superlink_port": 9000}, "differ"),
    ({"listen": "everywhere"}, "--listen: 'everywhere'"),
    ({"serverapp": "polyrank.deploy.server"}, "module:attribute"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_mistakes_are_named_and_nothing_is_made(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"names": ["a"], "hosts": ["h"]} | wrong
    with pytest.raises(DeployError, match=said.replace("(", r"\(")):
        init(tmp_path / "d", given.pop("names"), given.pop("hosts"), **given)
    assert not (tmp_path / "d").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(DeployError, match="not an empty folder"):
        init(tmp_path, ["a"], ["h"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    spaced = tmp_path / "with space"
    with pytest.raises(DeployError, match="no spaces"):
        init(spaced, ["a"], ["h"])
    assert not spaced.exists()


def test_what_is_no_deployment_is_said_to_be_none(tmp_path: Path, made: Deployment) -> None:
    with pytest.raises(DeployError, match="no deployment here"):
        Deployment.open(tmp_path)
    with pytest.raises(DeployError, match=r"has no node\.json"):
        Node.open(tmp_path)
    (made.folder / "deploy.json").write_text("{}")
    with pytest.raises(DeployError, match=r"deploy\.json"):
        _ = Deployment.open(made.folder).settings
