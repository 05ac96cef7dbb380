"""The Flower app of a client: hands a message's bytes to its site, and the answer back.

A node is started with ``site="/path/to/site.yaml"`` in its configuration, which never leaves it.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from polyrank.deploy.keeper import ask
from polyrank.engines.flower import answer, blob_of

app = ClientApp()


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """What this client is."""
    return answer(message, ask(_site(context), "profile", blob_of(message)))


@app.query("measure")
def measure(message: Message, context: Context) -> Message:
    """Which layers matter on its data."""
    return answer(message, ask(_site(context), "measure", blob_of(message)))


@app.train()
def fit(message: Message, context: Context) -> Message:
    """A round's training."""
    return answer(message, ask(_site(context), "fit", blob_of(message)))


def _site(context: Context) -> Path:
    if "site" not in context.node_config:
        raise ValueError("the node's configuration has no site; start it with `polyrank deploy join`")
    return Path(str(context.node_config["site"]))
