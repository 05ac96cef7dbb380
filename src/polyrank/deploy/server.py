"""The Flower app of the server: a run, with its clients behind the grid.

It is given ``folder``, a run as `polyrank.experiment.store` keeps it, and goes on from its last checkpoint.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyrank.engines.audit import Audit
from polyrank.engines.flower import FlowerPost
from polyrank.experiment.build import build_server
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the remaining rounds."""
    run = Run.open(Path(str(context.run_config["folder"])))
    if run.summary() is None:
        audit = Audit(run.folder / "audit.jsonl")
        world = build_server(run.experiment(), FlowerPost(grid), audit, run.secret(), run.folder.name)
        session = Session(run, world)
        with session.logs:
            for _ in session.rounds():
                pass
            session.finish()
