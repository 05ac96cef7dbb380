"""A ServerApp that plays rounds on a run's folder; files in the folder say what it is to do beside that.

``nodes`` (a number): how many nodes to wait for; ``fail``: rounds after which it raises, one a line, each once;
``slow``: seconds a round takes at least; ``quiet``: it ends without a summary.
"""

import json
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["folder"]))
    wanted = int((lines(folder / "nodes") or ["1"])[0])
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        time.sleep(0.5)
    rounds = int((lines(folder / "rounds") or ["3"])[0])
    for number in range(len(lines(folder / "rounds.jsonl")), rounds):
        if str(number) in (left := lines(folder / "fail")):
            left.remove(str(number))
            (folder / "fail").write_text("\n".join(left))
            raise RuntimeError(f"the server stumbles in round {number}")
        sites = ask(grid, nodes)
        time.sleep(float((lines(folder / "slow") or ["0"])[0]))
        record(folder, number, sites)
    if not (folder / "quiet").exists():
        (folder / "summary.json").write_text(json.dumps({"rounds": rounds}))


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


def record(folder: Path, number: int, sites: list[str]) -> None:
    line = {
        "round": number,
        "losses": {site: 1.0 for site in sites},
        "metrics": {},
        "bytes_up": dict.fromkeys(sites, 10),
        "bytes_down": dict.fromkeys(sites, 20),
    }
    for name, value in (("rounds.jsonl", line), ("timings.jsonl", {"round": number, "wall_seconds": 1.0})):
        with open(folder / name, "a") as file:
            file.write(json.dumps(value) + "\n")
