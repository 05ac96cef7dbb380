"""A process that keeps a site's model and data loaded, for the short-lived ones that Flower starts for every message.

It listens on a Unix socket beside the site's file, which only its owner can open. Without one, a message is answered in
the process that has it, which then loads everything first. This module imports nothing heavy.

    request:  kind (1 byte), length (8 bytes), message          reply:  0 or 1 (1 byte), length, message or error
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyrank.engines.post import Kind

_HEAD = struct.Struct(">BQ")
_KINDS: tuple[Kind, ...] = ("profile", "fit", "measure")
_BUSY = 64  # requests that may wait

PATIENCE = 600.0
"""Seconds in which a keeper must have loaded its model."""


class SiteError(RuntimeError):
    """What a site could not do, in its words."""


def socket_of(site: Path) -> Path:
    """Where the keeper of a site listens."""
    return site.with_suffix(".sock")


def ask(site: Path, kind: Kind, blob: bytes, *, data: Path | None = None, keeper: bool = False) -> bytes:
    """A site's answer: from its keeper where one runs, or else made here.

    Args:
        site: its file.
        kind: of the message.
        blob: the message.
        data: its training data, where that is not as the file says.
        keeper: whether there must be one, which is waited for while it loads.

    Raises:
        SiteError: if the keeper could not answer, or there is none where there must be.
    """
    line = _connected(socket_of(site), PATIENCE if keeper else 0.0)
    if line is None and keeper:
        raise SiteError(f"{site}: no keeper has answered for {PATIENCE:.0f} s; see its log")
    if line is None:
        from polyrank.deploy.site import Site  # heavy, and not needed where a keeper runs

        return Site(site, data).answer(kind, blob)
    with line:
        _send(line, _KINDS.index(kind), blob)
        failed, reply = _receive(line)
    if failed:
        raise SiteError(reply.decode(errors="replace"))
    return reply


def _connected(path: Path, patience: float) -> socket.socket | None:
    ends = time.monotonic() + patience
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(path))
            return line
        except (FileNotFoundError, ConnectionRefusedError):
            line.close()
        if time.monotonic() >= ends:
            return None
        time.sleep(0.2)


def keep(site: Path, answer: Callable[[Kind, bytes], bytes]) -> None:
    """Answers requests, one after another, until the process ends."""
    path = socket_of(site)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(_BUSY)
        try:
            while True:
                line, _ = listening.accept()
                with line:
                    _serve(line, answer)
        finally:
            path.unlink(missing_ok=True)


def _serve(line: socket.socket, answer: Callable[[Kind, bytes], bytes]) -> None:
    try:
        kind, blob = _receive(line)
        try:
            _send(line, 0, answer(_KINDS[kind], blob))
        except Exception as error:  # the server is told, and the keeper lives on
            _send(line, 1, f"{type(error).__name__}: {error}".encode())
    except OSError:
        pass  # who asked is gone


def _send(line: socket.socket, word: int, blob: bytes) -> None:
    line.sendall(_HEAD.pack(word, len(blob)))
    line.sendall(blob)


def _receive(line: socket.socket) -> tuple[int, bytes]:
    word, length = _HEAD.unpack(_exactly(line, _HEAD.size))
    return word, _exactly(line, length)


def _exactly(line: socket.socket, length: int) -> bytes:
    held = bytearray()
    while len(held) < length:
        part = line.recv(min(length - len(held), 1 << 20))
        if not part:
            raise ConnectionResetError("the other side is gone")
        held += part
    return bytes(held)
