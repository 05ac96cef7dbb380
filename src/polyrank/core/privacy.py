"""What a run promises about its clients' data: the settings of differential privacy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Where = Literal["central", "client"]


def _check(section: str, values: object) -> None:
    """Refuses numbers under which nothing would be promised."""
    for key, high in (("clip", math.inf), ("noise", math.inf), ("delta", 1.0)):
        value = getattr(values, key)
        if not (0 < value < high):
            raise ValueError(f"privacy.{section}.{key}: {value} must be more than 0 and less than {high:g}")


@dataclass(frozen=True)
class ClientPrivacy:
    """Differential privacy for whole clients: changes are clipped, and Gaussian noise is added to them.

    Attributes:
        clip: C, the largest norm of a client's change in a round, of its factors and of its product (`clipping`).
        noise: z, the noise multiplier: the noise has the standard deviation z C in every number that is trained.
        where: ``client``: on what each client sends; ``central``: once a round on the server, on the sum of changes.
        delta: of the (epsilon, delta) that is reported.
    """

    clip: float
    noise: float
    where: Where = "central"
    delta: float = 1e-5

    def __post_init__(self) -> None:
        _check("clients", self)

    @property
    def deviation(self) -> float:
        """The noise's standard deviation, z C."""
        return self.noise * self.clip

    @property
    def multiplier(self) -> float:
        """The noise's standard deviation over the sensitivity of what is released.

        On the server a client's change may be any of norm C, or none: the sum moves by C at most. What a client sends
        may be the result of any data: two changes of norm C are 2 C apart.
        """
        return self.noise if self.where == "central" else self.noise / 2


@dataclass(frozen=True)
class ExamplePrivacy:
    """Differential privacy for single examples, by DP-SGD on every client.

    Attributes:
        clip: C, the largest norm of an example's gradient.
        noise: z, the noise multiplier: a step's sum of gradients gets noise of standard deviation z C.
        delta: of the (epsilon, delta) that is reported.

    References:
        Abadi et al., Deep Learning with Differential Privacy. CCS 2016, arXiv 1607.00133.
    """

    clip: float
    noise: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        _check("examples", self)


@dataclass(frozen=True)
class Privacy:
    """Both kinds; None: not protected so."""

    clients: ClientPrivacy | None = None
    examples: ExamplePrivacy | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Mapping[str, Any] | None]) -> Privacy:
        """What `dataclasses.asdict` made of one, or a file says.

        >>> from dataclasses import asdict
        >>> privacy = Privacy(clients=ClientPrivacy(clip=1.0, noise=2.0))
        >>> Privacy.of(asdict(privacy)) == privacy
        True
        """
        clients, examples = plain.get("clients"), plain.get("examples")
        return cls(
            None if clients is None else ClientPrivacy(**clients),
            None if examples is None else ExamplePrivacy(**examples),
        )

    def __bool__(self) -> bool:
        return self.clients is not None or self.examples is not None

    @property
    def on_server(self) -> ClientPrivacy | None:
        """What the server does."""
        return self.clients if self.clients is not None and self.clients.where == "central" else None

    @property
    def on_client(self) -> ClientPrivacy | None:
        """What each client does to what it sends."""
        return self.clients if self.clients is not None and self.clients.where == "client" else None


UNPROTECTED = Privacy()
"""Nothing is promised."""
