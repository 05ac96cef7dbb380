"""A real deployment on loopback: who is let in, what is reachable from outside, and that nothing leaves."""

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from polyrank.deploy import certificates, join, operate
from polyrank.deploy.control import plain
from polyrank.deploy.layout import DeployError, Deployment, Node, environment, free_port, program, write_private

pytestmark = pytest.mark.deploy

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def processes(deployment: Deployment) -> list[psutil.Process]:
    """Every process of the server and the nodes, with all that they have started."""
    places = (deployment, *(deployment.node(name) for name in ("alpha", "beta")))
    roots = [psutil.Process(pid) for place in places for pid in operate.processes(place).values() if pid]
    found = {each.pid: each for root in roots for each in (root, *root.children(recursive=True))}
    return [each for each in found.values() if each.status() != psutil.STATUS_ZOMBIE]


def attempt(deployment: Deployment, folder: Path, *arguments: object, address: str = "") -> str:
    """What a SuperNode says that is refused."""
    command = [program("flower-supernode"), "--superlink", address or deployment.settings.public]
    command += ["--isolation", "process", "--port", str(free_port()), "--max-retries", "0", *map(str, arguments)]
    done = subprocess.run(command, env=environment(folder / "home"), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    said = plain(done.stdout + done.stderr)
    assert "Exit Code: 305" in said
    assert "SuperNode ID" not in said
    return said


def test_nodes_are_online_under_their_names(deployment: Deployment) -> None:
    assert operate.online(deployment) == {"alpha": "online", "beta": "online", "gamma": "registered"}


def test_a_second_up_keeps_what_runs_and_who_is_registered(deployment: Deployment) -> None:
    ids, pids = operate.node_ids(deployment), operate.processes(deployment)
    assert operate.up(deployment, gateway=True) == ids
    assert operate.processes(deployment) == pids
    assert operate.online(deployment)["alpha"] == "online"


def test_every_process_is_told_to_be_quiet(deployment: Deployment) -> None:
    found = processes(deployment)
    names = " ".join(" ".join(each.cmdline()) for each in found)
    assert all(name in names for name in ("flower-superlink", "flower-superexec", "flower-supernode", "nginx"))
    for each in found:
        if each.name() == "nginx":  # which clears its environment, and knows none of these
            continue
        assert QUIET.items() <= each.environ().items(), each
        assert Path(each.environ()["FLWR_HOME"]).is_relative_to(deployment.folder), each


def test_nothing_is_connected_or_listens_beyond_loopback(deployment: Deployment) -> None:
    connections = [connection for each in processes(deployment) for connection in each.net_connections("inet")]
    assert len(connections) > 4
    for connection in connections:
        for end in (connection.laddr, connection.raddr):
            assert not end or end.ip in ("127.0.0.1", "::1"), connection


def test_no_secret_is_on_a_command_line(deployment: Deployment) -> None:
    # The gateway's own processes and Flower's are given paths; a secret itself would be seen by everybody in `ps`.
    secret = (deployment.folder / "server" / "superexec.secret").read_bytes()
    assert not any(secret in " ".join(each.cmdline()).encode() for each in processes(deployment))


def test_without_the_authority_a_node_trusts_no_server(deployment: Deployment, tmp_path: Path) -> None:
    key = deployment.node("gamma").key
    said = attempt(deployment, tmp_path, "--auth-supernode-private-key", key)
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_with_another_authority_a_node_trusts_no_server(deployment: Deployment, tmp_path: Path) -> None:
    write_private(tmp_path / "other.crt", certificates.authority()[1])
    key = deployment.node("gamma").key
    said = attempt(
        deployment, tmp_path, "--auth-supernode-private-key", key, "--root-certificates", tmp_path / "other.crt"
    )
    assert "CERTIFICATE_VERIFY_FAILED" in said
    impostor = tmp_path / "impostor"
    shutil.copytree(deployment.node("gamma").folder, impostor)
    shutil.copy(tmp_path / "other.crt", impostor / "ca.crt")
    with pytest.raises(DeployError, match="not the server that"):
        join.join(impostor, check=False)


@pytest.mark.parametrize("key", ["unregistered", "none"])
def test_who_is_not_registered_is_refused(deployment: Deployment, tmp_path: Path, key: str) -> None:
    write_private(tmp_path / "node.key", certificates.node_keys("stranger")[0])
    own = ("--auth-supernode-private-key", tmp_path / "node.key") if key == "unregistered" else ()
    said = attempt(deployment, tmp_path, "--root-certificates", deployment.authority, *own)
    assert "Failed to activate SuperNode" in said or "SuperNodes must be registered" in said


def test_a_second_process_with_the_same_key_is_refused_while_the_first_lives(
    deployment: Deployment, tmp_path: Path
) -> None:
    said = attempt(
        *(deployment, tmp_path, "--root-certificates", deployment.authority),
        *("--auth-supernode-private-key", deployment.node("alpha").key),
    )
    assert "[code: 2004]" in said
    assert operate.online(deployment)["alpha"] == "online"
    with pytest.raises(DeployError, match="runs already"):
        join.join(deployment.node("alpha").folder)


@pytest.mark.parametrize("door", ["gateway", "superlink"])
def test_without_tls_nobody_is_served(deployment: Deployment, tmp_path: Path, door: str) -> None:
    address = deployment.settings.public if door == "gateway" else deployment.superlink
    attempt(deployment, tmp_path, "--insecure", address=address)
    try:
        assert httpx.get(f"http://{address}/health", trust_env=False).status_code == 400
    except httpx.RemoteProtocolError:
        assert door == "superlink"  # which hangs up


@pytest.fixture
def gamma(deployment: Deployment) -> Iterator[FleetHttpClient]:
    """A connection that signs with the key of ``gamma``."""
    key = load_ssh_private_key(deployment.node("gamma").key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    with FleetHttpClient.from_server_address(
        deployment.settings.public, False, str(deployment.authority), interceptors=[signed]
    ) as client:
        yield client


@pytest.mark.filterwarnings("ignore:`verify=<str>`:DeprecationWarning")  # which Flower gives
def test_a_key_opens_its_own_node_s_mail_alone(deployment: Deployment, gamma: FleetHttpClient) -> None:
    ids = {name: FlowerNode(node_id=int(node_id)) for name, node_id in operate.node_ids(deployment).items()}
    assert list(gamma.PullMessages(PullMessagesRequest(node=ids["gamma"])).messages_list) == []
    for name in ("alpha", "beta"):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            gamma.PullMessages(PullMessagesRequest(node=ids[name]))
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            gamma.DeactivateNode(DeactivateNodeRequest(node_id=ids[name].node_id))
    assert operate.online(deployment)["alpha"] == "online"


@pytest.fixture
def outside(deployment: Deployment) -> Iterator[httpx.Client]:
    """Somebody who has the authority's certificate, and no key."""
    trusted = ssl.create_default_context(cafile=str(deployment.authority))
    with httpx.Client(verify=trusted, trust_env=False) as client:
        yield client


PATHS = [
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/runtime/acquire-task"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("POST", "/v1/fleet/../control/list-runs"),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs"),
    ("POST", "/v1/fleet/..%2fcontrol/list-runs"),
    ("POST", "//v1//control/list-runs"),
    ("POST", "/V1/FLEET/activate-node"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_the_gateway_lets_nobody_control(deployment: Deployment, outside: httpx.Client, method: str, path: str) -> None:
    answer = outside.request(method, f"https://{deployment.settings.public}{path}", content=b"")
    assert answer.status_code == 403
    if method == "POST" and path == "/v1/control/list-runs":  # which is served on loopback, so the gateway is why
        within = outside.post(f"https://{deployment.superlink}{path}", content=b"")
        assert within.status_code not in (403, 404)


def test_the_gateway_lets_nodes_through(deployment: Deployment, outside: httpx.Client) -> None:
    base = f"https://{deployment.settings.public}"
    assert outside.get(f"{base}/health").status_code == 200
    headers = {"content-type": "application/x-protobuf"}
    for size in (0, 12_000_000):  # the second is more than what nginx keeps in memory by default
        answer = outside.post(f"{base}/v1/fleet/pull-messages", content=b"\0" * size, headers=headers)
        assert answer.status_code in (400, 401, 415, 422), answer.text
        assert "nginx" not in answer.text
    assert outside.post(f"{base}/v1/fleet/..;/control/list-runs").status_code == 404


def test_a_node_that_is_killed_comes_back(deployment: Deployment) -> None:
    node: Node = deployment.node("beta")
    before = operate.processes(node)["superexec"]
    assert before is not None
    psutil.Process(before).kill()
    deadline = time.monotonic() + 20
    while operate.processes(node)["superexec"] in (None, before):
        assert time.monotonic() < deadline, operate.tail(node.logs / "superexec.log")
        time.sleep(0.1)
    assert operate.online(deployment)["beta"] == "online"
