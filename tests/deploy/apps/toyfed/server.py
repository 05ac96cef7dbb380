"""A ServerApp that plays an experiment's rounds on a run's folder.

``orders.json`` beside the folder says what it is to do beside that: ``nodes``: how many to wait for; ``fail``: rounds
in which it raises, each once; ``slow``: seconds a round takes at least; ``quiet``: it ends without a summary.
"""

import json
import time
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["folder"]))
    rounds = int(yaml.safe_load((folder / "experiment.yaml").read_text())["rounds"])
    orders = folder.parent / "orders.json"
    told: dict[str, Any] = json.loads(orders.read_text()) if orders.is_file() else {}
    while len(nodes := sorted(grid.get_node_ids())) < told.get("nodes", 1):
        time.sleep(0.5)
    records = folder / "rounds.jsonl"
    for number in range(len(records.read_text().splitlines()) if records.is_file() else 0, rounds):
        if number in told.get("fail", ()):
            told["fail"].remove(number)
            orders.write_text(json.dumps(told))
            raise RuntimeError(f"the server stumbles in round {number}")
        sites = ask(grid, nodes)
        time.sleep(told.get("slow", 0))
        write(folder, number, sites)
    if not told.get("quiet"):
        (folder / "summary.json").write_text(json.dumps(summary(rounds)))


def ask(grid: Grid, nodes: list[int]) -> list[str]:
    """What each node says its site is."""
    messages = [Message(RecordDict(), node, "query.site", ttl=60) for node in nodes]
    waiting, sites = set(grid.push_messages(messages)), []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            sites.append(str(reply.content["site"]["path"]) if reply.has_content() else f"error {reply.error.code}")
        time.sleep(0.2)
    return sites


def write(folder: Path, number: int, sites: list[str]) -> None:
    record = {
        "round": number,
        "factors": "AB",
        "ranks": {},
        "losses": dict.fromkeys(sites, 1.0),
        "metrics": {},
        "bytes_up": dict.fromkeys(sites, 10),
        "bytes_down": dict.fromkeys(sites, 20),
    }
    for name, value in (("rounds.jsonl", record), ("timings.jsonl", {"round": number, "wall_seconds": 1.0})):
        with open(folder / name, "a") as file:
            file.write(json.dumps(value) + "\n")


def summary(rounds: int) -> dict[str, Any]:
    return {
        "method": "toy",
        "seed": 0,
        "rounds": rounds,
        "before": {"test": {"accuracy": 0.1}},
        "final": {"round": rounds - 1, "test": {"accuracy": 0.5}},
        "selected": None,
        "bytes_up": 10,
        "bytes_down": 20,
        "wall_seconds": 1.0,
    }
