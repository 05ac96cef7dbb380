"""Deployments: a server and clients on machines of their own."""
