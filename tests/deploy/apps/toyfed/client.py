"""A ClientApp that says what its site is."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("site")
def site(message: Message, context: Context) -> Message:
    return Message(RecordDict({"site": ConfigRecord({"path": str(context.node_config["site"])})}), reply_to=message)
