"""Measures what every aggregation rule and every named method preserves, and writes docs/rules.md.

    python docs/rules.py

In float64, on one layer, with clients that answer by unit noise on what they were sent. Nothing is typed in: rules come
from the tables, a method trains the factors and dispatches what it says, and a cell is an error that was measured here.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from polyrank.core.fake import FakeClients, echo
from polyrank.core.federate import absorb, plan
from polyrank.core.lokr import lokr_parameters
from polyrank.core.lowrank import Adapter, LowRank, delta, norm
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState, Task, Update
from polyrank.local import lokr
from polyrank.methods import AGGREGATORS, METHODS
from polyrank.methods.named import fedit

PAGE = Path(__file__).with_name("rules.md")
SHAPE = (24, 20)
SPEC = ModelSpec({"layer": SHAPE})
FULL = min(SHAPE)  # the server's rank: whatever a rule computes fits, so cutting to it never enters
EQUAL = {"a": FULL, "b": FULL, "c": FULL, "d": FULL}
UNEQUAL = {"a": 5, "b": 10, "c": FULL, "d": FULL}
EXAMPLES = {"a": 10, "b": 20, "c": 30, "d": 5}
ROUNDING = 1e-9

HEAD = """\
# What the rules preserve

This page is written by `python docs/rules.py`, which measures every cell in float64; a test keeps it up to date.

- **exact**: the server's model after the round (its folded part and its adapter) is the weighted mean of the clients'
  models, with the rule's own weights. Measured at a server rank that holds whatever the rule computes: cutting the
  result to a smaller rank is a further loss, the same for all rules that cut by singular value decomposition.
- **gauge invariant**: the result does not change when a client writes the same update with other factors, B Q and
  Q^T A for an orthogonal Q. Where a round trains one factor, all clients share the other and nothing can be rotated.
  For LoKr: with 2 w1 and w2 / 2.
- **fixed point**: clients of unequal ranks that return what they were sent leave the server's model as it is.
  (At equal ranks every rule does; that is a law of the test suite.)
- **streams**: the rule folds updates in one by one and holds none: its memory does not grow with the cohort. Exact sums
  of products keep copies of the factors while those are smaller than the layer's d_out x d_in matrix, and from then on
  that matrix. Measured by weak references: no more than the update at hand and the one before are ever alive.
- **linear**: the rule knows what clients send through a weighted sum alone, with weights that follow from examples and
  ranks, so that a linear function of the tensors sent is all it needs; secure aggregation, under which the server sees
  no more than such a sum, could run it. What it does with the sum, such as putting it into singular order, is its own
  affair. Measured by moving what two clients train against each other, so that the weighted sum stays as it was.
  Products of factors that are both trained are not linear in them, nor is anything that looks at single clients in
  order to leave some out.

Where the answer is no, the number is the relative error (Frobenius norm) in this measurement: 4 clients, of ranks
5, 10, 20 and 20 where they are unequal, on a 24 x 20 layer. It orders rules for these inputs and is not a bound.
"""
COLUMNS = [
    "rule",
    "exact, equal ranks",
    "exact, unequal ranks",
    "gauge invariant",
    "fixed point, unequal ranks",
    "streams",
    "linear",
]


def start(method: Method, rank: int = FULL) -> ServerState:
    """A server whose adapter has learnt something already, in the form that the method trains."""
    generator = torch_generator(stream(0, "start"))
    if method.form == "lokr":
        shapes = lokr_parameters(SPEC.modules, method.rank)
        dense = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return ServerState(0, Adapter({}, dense))
    A = torch.randn(rank, SHAPE[1], generator=generator, dtype=torch.float64)
    B = torch.randn(SHAPE[0], rank, generator=generator, dtype=torch.float64)
    return ServerState(0, Adapter({"layer": LowRank(A, B, 2.0)}))


def tasks_of(method: Method, state: ServerState, ranks: Mapping[str, int]) -> dict[str, Task]:
    local = LocalTraining()
    budgets = method.estimate(profiles(ranks), SPEC, local)
    return plan(method, state, budgets, sorted(ranks), SPEC, local, 0)


def profiles(ranks: Mapping[str, int]) -> dict[str, ClientProfile]:
    return {client: ClientProfile(EXAMPLES.get(client, 1), rank=rank) for client, rank in ranks.items()}


def model(*adapters: Adapter) -> Tensor:
    """What these adapters add to the base, together."""
    low = sum((delta(a.layers["layer"]) for a in adapters if "layer" in a.layers), torch.zeros(SHAPE))
    eye = torch.eye(SHAPE[1], dtype=torch.float64)
    return low + sum(x(eye).T for a in adapters for x in lokr.grouped(a.dense).values())


def server_model(state: ServerState) -> Tensor:
    return model(state.adapter, state.folded)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def weight_of(method: Method) -> Callable[[Update], float]:
    """How the method's rule weighs a client: its option `weights`, as the composition sets it."""
    option = inspect.signature(method.aggregate).parameters.get("weights")
    return {
        "size": lambda update: float(update.examples),
        "uniform": lambda update: 1.0,
        "norm": lambda update: norm(update.adapter.layers["layer"]),
    }[option.default if option else "uniform"]


def inexact(method: Method, state: ServerState, ranks: Mapping[str, int]) -> float:
    """The distance of the server's model after a round from the mean of the clients' models."""
    tasks = tasks_of(method, state, ranks)
    updates = list(FakeClients(profiles(ranks)).fit(tasks))
    weights = [weight_of(method)(update) for update in updates]
    models = [model(update.adapter, tasks[update.client].frozen) for update in updates]
    mean = sum(m * w for m, w in zip(models, weights, strict=True)) / sum(weights)
    return error(server_model(absorb(method, state, updates, 0)), mean)


def gauge_dependence(method: Method, state: ServerState) -> float | None:
    """How far the result moves when every client rotates its factors; None where one factor is shared."""
    if method.factors(state.round) != "AB":
        return None
    updates = list(FakeClients(profiles(UNEQUAL)).fit(tasks_of(method, state, UNEQUAL)))
    turned = [replace(u, adapter=rewritten(u.adapter, u.client)) for u in updates]
    plain, other = (server_model(absorb(method, state, us, 0)) for us in (updates, turned))
    return error(other, plain)


def rewritten(adapter: Adapter, client: str) -> Adapter:
    """The same update by other factors; one client's, where a common change would be shared by all."""
    layers = {name: rotated(x, client) for name, x in adapter.layers.items()}
    factor = 2.0 if client == "a" else 1.0
    return Adapter(layers, {n: t * factor if n.endswith("w1") else t / factor for n, t in adapter.dense.items()})


def rotated(x: LowRank, client: str) -> LowRank:
    noise = torch.randn(x.rank, x.rank, generator=torch_generator(stream(0, "gauge", client)), dtype=x.A.dtype)
    Q, _ = torch.linalg.qr(noise)
    return LowRank(Q.T @ x.A, x.B @ Q, x.scale)


def drift(method: Method, state: ServerState) -> float:
    """How far the server's model moves when everybody returns what they were sent."""
    updates = FakeClients(profiles(UNEQUAL), echo).fit(tasks_of(method, state, UNEQUAL))
    return error(server_model(absorb(method, state, updates, 0)), server_model(state))


def nonlinearity(method: Method, state: ServerState) -> float:
    """How far the result moves when two clients change what they train and the weighted sum of all stays as it was."""
    updates = list(FakeClients(profiles(UNEQUAL)).fit(tasks_of(method, state, UNEQUAL)))
    left, right = updates[0], updates[-1]  # of unequal ranks, if the method has any
    ratio = weight_of(method)(left) / weight_of(method)(right)
    moves = {name: noise(name, t) for name, t in sent(left).items()}
    moved = {0: shifted(left, moves, 1.0), len(updates) - 1: shifted(right, moves, -ratio)}
    plain, other = (
        server_model(absorb(method, state, us, 0))
        for us in (updates, [moved.get(i, update) for i, update in enumerate(updates)])
    )
    return error(other, plain)


def sent(update: Update) -> dict[str, Tensor]:
    """What travels: the factors that were trained, A and B both by rows of a rank, and dense parameters."""
    factors = {"A": lambda x: x.A, "B": lambda x: x.B.T}
    found = {f: factors[f](x) for x in update.adapter.layers.values() for f in update.factors}
    return found | dict(update.adapter.dense)


def noise(name: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch_generator(stream(0, "shift", name)), dtype=like.dtype)


def shifted(update: Update, moves: Mapping[str, Tensor], factor: float) -> Update:
    """The update with multiples of `moves` added to what was trained, to the first rows where it has more."""

    def of(name: str, tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        if name in moves:
            changed[: len(moves[name])] += factor * moves[name]
        return changed

    layers = {n: LowRank(of("A", x.A), of("B", x.B.T).T, x.scale) for n, x in update.adapter.layers.items()}
    return replace(update, adapter=Adapter(layers, {n: of(n, t) for n, t in update.adapter.dense.items()}))


def streams(method: Method, state: ServerState) -> bool:
    """Whether no more than the update at hand and the one before are ever alive, however large the cohort."""
    ranks = {f"c{i:02}": 4 for i in range(12)}
    tasks = tasks_of(method, state, ranks)
    sent: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched() -> Iterator[Update]:
        for client, task in tasks.items():
            update = next(FakeClients(profiles(ranks)).fit({client: task}))
            sent.append(weakref.ref(trained(update)))
            alive.append(sum(reference() is not None for reference in sent))
            yield update

    absorb(method, state, watched(), 0)
    return max(alive) <= 2


def trained(update: Update) -> Tensor:
    """A tensor that the client trained."""
    for x in update.adapter.layers.values():
        return x.A if "A" in update.factors else x.B
    return next(iter(update.adapter.dense.values()))


def row(name: str, method: Method) -> str:
    # Two rounds: both turns of a method that alternates. The larger error counts.
    states = [start(method), replace(start(method), round=1)]
    gauges = [gauge_dependence(method, state) for state in states]
    shared, ranks = None in gauges, method.form == "lora"
    cells = [
        verdict(max(inexact(method, state, EQUAL) for state in states)),
        verdict(max(inexact(method, state, UNEQUAL) for state in states)) if ranks else "has no ranks",
        "one factor is shared" if shared else verdict(max(g for g in gauges if g is not None)),
        verdict(max(drift(method, state) for state in states)) if ranks else "has no ranks",
        "yes" if streams(method, start(method)) else "no",
        verdict(max(nonlinearity(method, state) for state in states)),
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def verdict(size: float) -> str:
    return "yes" if size < ROUNDING else f"no, {size:.2g}"


def table(methods: Mapping[str, Method]) -> str:
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(row(name, method) for name, method in methods.items())]) + "\n"


def page() -> str:
    """The text of docs/rules.md."""
    rules = {name: replace(fedit(), aggregate=rule) for name, rule in AGGREGATORS.items()}
    methods = {name: build() for name, build in METHODS.items()}
    return "\n".join(
        [
            HEAD,
            "## Aggregation rules\n",
            "With their default options, both factors trained, and the server's adapter cut to each client's rank.\n",
            table(rules),
            "## Named methods\n",
            "As composed: with the factors they train, the options they set and what they dispatch.\n",
            table(methods),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
