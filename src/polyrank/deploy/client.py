"""The Flower app of a client: hands a message's bytes to its site, and the answer back.

A node is started with a configuration that never leaves it: ``site``, the path of its file; ``data``, its training data
where that is not as the file says; and ``keep``, whether a keeper answers (`polyrank.deploy.keeper`).
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from polyrank.deploy.keeper import ask
from polyrank.engines.flower import answer, blob_of
from polyrank.engines.post import Kind

app = ClientApp()


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """What this client is."""
    return _answer("profile", message, context)


@app.query("measure")
def measure(message: Message, context: Context) -> Message:
    """Which layers matter on its data."""
    return _answer("measure", message, context)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """A round's training."""
    return _answer("fit", message, context)


def _answer(kind: Kind, message: Message, context: Context) -> Message:
    own = context.node_config
    if "site" not in own:
        raise ValueError("the node's configuration has no site; start it with `polyrank deploy join`")
    site, data = Path(str(own["site"])), Path(str(own["data"])) if "data" in own else None
    return answer(message, ask(site, kind, blob_of(message), data=data, keeper=bool(own.get("keep"))))
