"""What differential privacy asks of an experiment, and what a run has spent of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from polyrank.core.method import Method
from polyrank.core.privacy import Privacy
from polyrank.core.types import Client, ClientProfile, LocalTraining
from polyrank.experiment.components import describe
from polyrank.experiment.tables import SLOTS
from polyrank.local.dp import Part, epsilon
from polyrank.local.poisson import rate, steps

LINEAR = {"fedit": ("size", "uniform"), "hetlora": ("size", "uniform"), "rbla": ("size",)}
"""Rules that are linear in the factors, and under which weights; clients that are protected are all of one size."""

_TAIL = "its tail penalty prunes ranks by what a client has trained, which no noise covers"
_REASONS = {
    "checkpointing": "gradients of examples are kept",
    "group_by_length": "batches are drawn at random",
    "pack": "each example has a row and a gradient of its own",
}


def check_privacy(privacy: Privacy, method: Method, local: LocalTraining) -> None:
    """Refuses methods under which what is promised would not hold.

    Raises:
        ValueError: naming the answer of the method, and what would be valid.
    """
    if not privacy:
        return
    if method.penalty is not None:
        raise ValueError(f"privacy: method.name: hetlora: {_TAIL}. Valid: hetlora_uniform, hetlora_weighted")
    score = describe(SLOTS["score"], method.score)
    if score.get("on") == "clients":
        what = f"privacy: method.score: {score['name']}, on: clients: sends importance that no noise covers"
        raise ValueError(f"{what}. Valid: on: holdout, or a scorer without data: alike, weight_norm")
    if privacy.on_server is not None:
        _check_sum(method)
    for key, why in _REASONS.items():
        if privacy.examples is not None and getattr(local, key):
            raise ValueError(f"privacy.examples: local.{key}: true: {why}. Valid: false")


def _check_sum(method: Method) -> None:
    """Noise on the sum of changes is noise on the next state only where the rule is linear in the factors."""
    rule, dispatch = (describe(SLOTS[slot], getattr(method, slot)) for slot in ("aggregate", "dispatch"))
    name, weights = rule["name"], rule.get("weights")
    if weights not in LINEAR.get(name, ()):
        shown = f"{name} with weights: {weights}" if name in LINEAR else name
        valid = "fedit (the rule of ffa_lora and rolora, too), rbla, hetlora with weights: uniform"
        raise ValueError(
            f"privacy.clients.where: central: the rule must be linear in the factors and weigh all clients alike, but "
            f"method.aggregate is {shown}. Valid: {valid}; or where: client, after which any rule may follow"
        )
    if dispatch["scaling"] != "constant":
        scaling = dispatch["scaling"]
        what = f"privacy.clients.where: central: changes must be on one scale, but dispatch.scaling is {scaling}"
        raise ValueError(f"{what}. Valid: constant; or where: client")


class Spent:
    """Epsilon of the rounds that are done, worst over clients: each is counted in every round in which it was asked.

    Args:
        privacy: what is protected.
        local: how clients train.
        profiles: tells how many examples each client has; who is not there counts with what its update said.
        records: of the rounds before this sitting.
    """

    def __init__(
        self,
        privacy: Privacy,
        local: LocalTraining,
        profiles: Callable[[], Mapping[Client, ClientProfile]],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.privacy, self.local, self.profiles = privacy, local, profiles
        self.asked: Counter[Client] = Counter()
        self.sizes: dict[Client, int] = {}
        for record in records:
            self.add(record["bytes_down"], record["examples"])

    def add(self, asked: Iterable[Client], examples: Mapping[Client, float]) -> None:
        """One more round, of these clients, with the examples behind their updates."""
        self.asked.update(iter(asked))  # a mapping's keys: its values would be counts
        self.sizes |= {client: int(count) for client, count in examples.items()}

    def metrics(self) -> dict[str, float]:
        """Epsilon so far, by the names it has in records."""
        found, clients, examples = {}, self.privacy.clients, self.privacy.examples
        if clients is not None:
            most = max(self.asked.values(), default=0)
            found["privacy/clients"] = epsilon([Part(clients.multiplier, 1.0, most)], clients.delta)
        if examples is not None:
            parts = {self._part(examples.noise, count, rounds) for count, rounds in self._trained()}
            found["privacy/examples"] = max((epsilon([part], examples.delta) for part in parts), default=0.0)
        return found

    def _trained(self) -> Iterator[tuple[int, int]]:
        """For each client that was asked: its examples, and its rounds."""
        profiles = self.profiles()
        for client, rounds in self.asked.items():
            if client in profiles or client in self.sizes:  # others have sent nothing
                yield profiles[client].examples if client in profiles else self.sizes[client], rounds

    def _part(self, noise: float, count: int, rounds: int) -> Part:
        """A client's DP-SGD steps so far."""
        return Part(noise, rate(self.local, count) if count else 1.0, rounds * steps(self.local, count))
