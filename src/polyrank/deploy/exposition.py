"""Metrics in Prometheus' text format, and a server of them on loopback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from polyrank.files import encoded

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


@dataclass
class Family:
    """A metric: one value for each set of labels.

    Attributes:
        name: without the ending that the text format adds to a summary's values.
        kind: as Prometheus knows it.
        help: one sentence.
        samples: the ending of the name, labels, value.
    """

    name: str
    kind: Literal["counter", "gauge", "summary"]
    help: str
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)

    def add(self, value: float, ending: str = "", /, **labels: str) -> None:
        """One more value."""
        self.samples.append((ending, labels, value))

    def lines(self) -> Iterator[str]:
        """As text."""
        yield f"# HELP {self.name} {_escaped(self.help)}"
        yield f"# TYPE {self.name} {self.kind}"
        for ending, labels, value in self.samples:
            inside = ",".join(f'{key}="{_quoted(text)}"' for key, text in labels.items())
            yield f"{self.name}{ending}{f'{{{inside}}}' if inside else ''} {_number(value)}"


def exposition(families: list[Family]) -> bytes:
    """All metrics, as Prometheus reads them."""
    return encoded("".join(f"{line}\n" for family in families for line in family.lines()))


def server(address: tuple[str, int], page: Callable[[], bytes]) -> ThreadingHTTPServer:
    """A web server whose ``/metrics`` is what `page` returns; port 0 is one that is free.

    Raises:
        OSError: if nobody can listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.partition("?")[0] == "/metrics"
            body = page() if known else b"polyrank: see /metrics\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape leaves no line in a log."""

    made = ThreadingHTTPServer(address, Handler)
    made.daemon_threads = True
    return made


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
