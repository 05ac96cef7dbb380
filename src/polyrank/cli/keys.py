"""Across machines: keys and certificates. A site asks, the server's operator adds it, the site accepts the answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.deploy import Server, deploy, flower, opened, say

Fingerprint = Annotated[
    str | None,
    typer.Option("--fingerprint", metavar="SHA256:...", help="What it must be; asked for at a terminal if left out."),
]
Days = Annotated[int, typer.Option(min=1, max=3_650, help="For how long the key is to be valid.")]


class Step(StrEnum):
    """Of a change of the authority."""

    NEW, USE, DROP = "new", "use", "drop"


@deploy.command()
def request(
    name: Annotated[str, typer.Argument(help="Of this node.")],
    federation: Annotated[
        str | None, typer.Option(metavar="ID", help="Of the deployment; `init` and `status` on the server show it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="NODE_DIR", help="The site's folder; NAME if left out.")
    ] = None,
    days: Days = 365,
    renew_: Annotated[
        bool, typer.Option("--renew", help="Ask for more time for the key that is in the folder.")
    ] = False,
    rotate_: Annotated[
        bool, typer.Option("--rotate", help="Ask for another key in place of the one in the folder.")
    ] = False,
) -> None:
    """At a site: make its key, which stays here, and a request for the server's operator, which holds no secret."""
    with flower():
        from polyrank.deploy import identity
        from polyrank.deploy.layout import DeployError

        place = folder or Path(name)
        if renew_ and rotate_:
            raise DeployError("give either --renew or --rotate")
        if renew_ or rotate_:
            if federation is not None:
                raise DeployError("--federation: is in the folder's request.json already; leave it out")
            application = (identity.renew if renew_ else identity.rotate)(place, name, days)
        elif federation is None:
            raise DeployError("--federation: missing: the id that `polyrank deploy status` on the server shows")
        else:
            application = identity.request(place, name, federation, days)
        say(f"{place / 'request.json'}: send it to the server's operator; it holds no secret")
        say(f"key {application.fingerprint}, until {application.until[:10]}: tell the operator over another channel")
        say(f"then: polyrank deploy accept {place} ANSWER.json")


@deploy.command()
def add(
    folder: Server,
    file: Annotated[Path, typer.Argument(metavar="REQUEST", help="What the site has sent.")],
    fingerprint: Fingerprint = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Refuse the key that a node of this name has, and take this one.")
    ] = False,
) -> None:
    """Let a site in: a new one, one whose key gets more time, or one with another key. May be repeated."""
    with flower():
        from polyrank.deploy import operate, provision
        from polyrank.deploy.enrolment import read_request

        deployment, application = opened(folder), read_request(file)
        say(f"{application.name}: key {application.fingerprint}, valid until {application.until[:10]}")
        _compare(file, application.fingerprint, [fingerprint] if fingerprint else [], "the site's operator")
        say(f"{application.name}: {provision.add(deployment, file, replace=replace)}")
        if not operate.settle(deployment):
            say(f"the server does not run; `polyrank deploy up {folder}` registers it")
        say(f"send back {deployment.answer(application.name)}; it holds no secret")
        for authority in _authorities(deployment.authority):
            say(f"authority {authority}: tell the site over another channel")


@deploy.command()
def accept(
    folder: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The site's folder.")],
    file: Annotated[Path, typer.Argument(metavar="ANSWER", help="What the server's operator has sent back.")],
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHA256:...", help="Of an authority to trust; asked for at a terminal if left out. Repeatable."
        ),
    ] = None,
) -> None:
    """At a site: put the server's answer in place: its address, and the authority to trust. May be repeated."""
    with flower():
        from polyrank.deploy import identity
        from polyrank.deploy.enrolment import read_answer

        answer = read_answer(file)
        for authority in identity.strangers(folder, answer):
            say(f"authority {authority}, which this site does not trust yet")
            _compare(file, authority, fingerprint or [], "the server's operator")
        node = identity.accept(folder, answer)
        say(f"{node.name}: dials {node.superlink}, key until {answer.until[:10]}")
        say(f"next: polyrank deploy join {folder}; if it runs and the authority has changed, `down` it before")


@deploy.command()
def remove(folder: Server, name: Annotated[str, typer.Argument(help="The node.")]) -> None:
    """Refuse a node's key for ever, because it is lost or the site has left. Another key may take the name."""
    with flower():
        from polyrank.deploy import operate

        immediate = operate.remove(opened(folder), name)
        when = " from now on" if immediate else f"; `polyrank deploy up {folder}` does it"
        say(f"{name}: its key is refused{when}")


@deploy.command()
def renew(
    folder: Server,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="For how long.")] = 365,
    authority: Annotated[
        Step | None, typer.Option(help="Change the authority: make it, use it once all sites trust it, drop the old.")
    ] = None,
) -> None:
    """Make a new key and certificate for the server; the nodes need nothing new. Or change the authority."""
    with flower():
        from polyrank.deploy import operate, renewal

        deployment = opened(folder)
        if authority in (Step.NEW, Step.DROP):
            steps = {Step.NEW: renewal.new_authority, Step.DROP: renewal.drop_authority}
            steps[authority](deployment)
            for trusted in _authorities(deployment.authority):
                say(f"trusted: authority {trusted}")
            say(f"hand {deployment.folder / 'answers'}/*.json to the sites: `polyrank deploy accept`, then restart")
            if authority is Step.NEW:
                say(f"once all have: polyrank deploy renew {folder} --authority use")
            return
        if authority is Step.USE:
            renewal.use_authority(deployment, days)
            say(f"valid for {days} days; `polyrank deploy down {folder}` and `up` make the server use it")
            return
        renewal.renew(deployment, days)
        say(f"valid for {days} days")
        if ended := operate.restart(deployment, (operate.SUPERLINK, operate.GATEWAY)):
            say(f"{' and '.join(ended)} started again with it; nodes and runs go on")
        else:
            say(f"the next `polyrank deploy up {folder}` uses it; with systemd, restart superlink and gateway")


def _compare(file: Path, shown: str, given: Sequence[str], who: str) -> None:
    """Goes on only if somebody has compared a fingerprint."""
    from polyrank.deploy.layout import DeployError

    if given:
        if shown not in given:
            raise DeployError(
                f"--fingerprint: {', '.join(given)}: {file} has {shown}; do not go on before you know why"
            )
    elif not sys.stdin.isatty():
        raise DeployError(f"--fingerprint: missing: what {who} has told you; {file} has {shown}")
    elif not typer.confirm(f"Is this what {who} has told you?"):
        raise typer.Exit(1)


def _authorities(path: Path) -> list[str]:
    from polyrank.deploy import certificates

    return [certificates.authority_fingerprint(pem) for pem in certificates.authorities(path.read_bytes())]
