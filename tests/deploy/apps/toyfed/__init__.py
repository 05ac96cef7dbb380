"""An installed app, as a deployment is given one: a server and clients that do next to nothing."""
