"""Client-level differential privacy: how far an update may move, and the noise on it, against dense references."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.clipping import Change, change_of, clipped, privately, privately_summed
from polyrank.core.fake import FakeClients
from polyrank.core.federate import absorb, federate
from polyrank.core.lowrank import Adapter, Factors, LowRank, delta, truncate
from polyrank.core.noise import noise_of, secret, seeded
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState, Task, Update
from polyrank.methods import AGGREGATORS, METHODS

SHAPES = {"q": (7, 5), "v": (4, 6)}
Pair = tuple[Adapter, Adapter]


def adapter_of(seed: int, size: float = 1.0, rank: int = 3, scale: float = 2.0) -> Adapter:
    generator = torch_generator(stream(seed, "adapter"))

    def normal(*shape: int) -> Tensor:
        return size * torch.randn(*shape, generator=generator)

    layers = {n: LowRank(normal(rank, d_in), normal(d_out, rank), scale) for n, (d_out, d_in) in SHAPES.items()}
    return Adapter(layers, {"head": normal(3, 4)})


def moved(sent: Adapter, by: Adapter, factors: Factors = "AB") -> Adapter:
    layers = {
        name: LowRank(
            x.A + by.layers[name].A if "A" in factors else x.A,
            x.B + by.layers[name].B if "B" in factors else x.B,
            x.scale,
        )
        for name, x in sent.layers.items()
    }
    return Adapter(layers, {name: tensor + by.dense[name] for name, tensor in sent.dense.items()})


def distances(one: Adapter, other: Adapter) -> tuple[float, float]:
    """Of products and of factors, with dense parameters in both; products are formed whole."""

    def wide(x: LowRank) -> LowRank:
        return LowRank(x.A.double(), x.B.double(), x.scale)

    dense = sum(float((one.dense[n].double() - t.double()).square().sum()) for n, t in other.dense.items())
    product = sum(float((delta(wide(one.layers[n])) - delta(wide(x))).square().sum()) for n, x in other.layers.items())
    raw = sum(
        float((one.layers[n].A.double() - x.A.double()).square().sum())
        + float((one.layers[n].B.double() - x.B.double()).square().sum())
        for n, x in other.layers.items()
    )
    return math.sqrt(product + dense), math.sqrt(raw + dense)


def position(sent: Adapter, trained: Adapter, found: Adapter) -> float:
    """t, of the head: it is not frozen in any schedule."""
    step = trained.dense["head"].double() - sent.dense["head"].double()
    return float(((found.dense["head"].double() - sent.dense["head"].double()) * step).sum() / step.square().sum())


cases = st.tuples(
    st.integers(0, 10_000),
    st.floats(0.01, 30.0),
    st.floats(0.01, 30.0),
    st.sampled_from(["A", "B", "AB"]),
    st.floats(0.01, 100.0),
)


def pair(seed: int, held: float, change: float, factors: Factors) -> Pair:
    sent = adapter_of(seed, held)
    return sent, moved(sent, adapter_of(seed + 1, change), factors)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_both_bounds_hold_and_no_point_farther_on_the_line_keeps_them(case) -> None:  # type: ignore[no-untyped-def]
    seed, held, change, factors, clip = case
    sent, trained = pair(seed, held, change, factors)
    found = clipped(sent, Update("c", trained, 7, factors, {"loss": 1.0}), clip)
    product, raw = distances(sent, found.adapter)
    assert product <= clip * (1 + 1e-9)
    assert raw <= clip * (1 + 1e-9)
    t = position(sent, trained, found.adapter)
    assert 0 < t <= 1 + 1e-12
    for farther in np.linspace(t, 1.0, 40)[1:]:
        if farther > t * (1 + 1e-6):
            there = moved(sent, scaled(sent, trained, float(farther)), factors)
            assert max(distances(sent, there)) > clip
    assert (found.examples, found.metrics) == (1.0, {})


def scaled(sent: Adapter, trained: Adapter, t: float) -> Adapter:
    """t times the change, in float64."""
    layers = {
        n: LowRank(t * (x.A.double() - sent.layers[n].A), t * (x.B.double() - sent.layers[n].B), x.scale)
        for n, x in trained.layers.items()
    }
    return Adapter(layers, {n: t * (x.double() - sent.dense[n]) for n, x in trained.dense.items()})


@settings(max_examples=30, deadline=None)
@given(cases, st.floats(0.0, 1.0))
def test_norms_along_the_line_are_those_of_dense_matrices(case, t) -> None:  # type: ignore[no-untyped-def]
    seed, held, change, factors, _ = case
    sent, trained = pair(seed, held, change, factors)
    found = change_of(sent, trained, factors)
    product, raw = distances(sent, moved(sent, scaled(sent, trained, t), factors))
    scale = found.product(1.0) + found.factors(1.0)
    assert found.product(t) == pytest.approx(product, rel=1e-6, abs=1e-7 * scale)
    assert found.factors(t) == pytest.approx(raw, rel=1e-6, abs=1e-7 * scale)


def test_at_the_bound_nothing_is_shrunk_and_just_below_it_something_is() -> None:
    sent, trained = pair(3, 1.0, 0.5, "AB")
    change = change_of(sent, trained, "AB")
    bound = max(change.product(1.0), change.factors(1.0))
    assert change.reach(bound, bound) == 1.0
    less = bound * (1 - 1e-14)
    assert 1 - 1e-12 < change.reach(less, less) < 1.0
    whole = clipped(sent, Update("c", trained, 1), bound).adapter
    assert all(torch.equal(whole.layers[n].A, trained.layers[n].A.double()) for n in SHAPES)


def test_where_the_product_turns_back_the_last_point_within_the_bound_is_taken() -> None:
    # s (B + t b)(A + t a) - s B A = 4 t (t - 1): 1 at t = 1/2, and nothing is changed at t = 1.
    sent = Adapter({"q": LowRank(torch.full((1, 1), 0.1), torch.full((1, 1), 0.1), 100.0)})
    trained = Adapter({"q": LowRank(torch.full((1, 1), -0.1), torch.full((1, 1), -0.1), 100.0)})
    change = change_of(sent, trained, "AB")
    assert change.product(0.5) == pytest.approx(1.0, rel=1e-6)
    assert change.reach(0.5, 0.5) == 1.0
    # Up to the bound of the factors, the product rises, turns, and ends above its bound: only the rise is within it.
    assert Change(change.xx, change.xy, change.yy, (0.5 / 0.6) ** 2).reach(0.5, 0.5) == pytest.approx(
        (1 - math.sqrt(0.5)) / 2, rel=1e-6
    )


def test_a_client_that_changed_nothing_is_not_divided_by() -> None:
    sent = adapter_of(0)
    found = clipped(sent, Update("c", sent, 0), 1.0)
    assert distances(sent, found.adapter) == (0.0, 0.0)
    assert found.examples == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    sent = adapter_of(0)
    x = sent.layers["q"]
    bad = replace(sent, layers={**sent.layers, "q": LowRank(torch.full_like(x.A, value), x.B, x.scale)})
    with pytest.raises(ValueError, match=r"'mallory'.*not finite"):
        clipped(sent, Update("mallory", bad, 1), 1.0)


def test_an_update_of_another_shape_or_scale_is_refused() -> None:
    sent = adapter_of(0)
    x = sent.layers["q"]
    for layer in (truncate(x, 2), replace(x, scale=5.0)):
        with pytest.raises(ValueError, match="layer 'q'"):
            clipped(sent, Update("c", replace(sent, layers={**sent.layers, "q": layer}), 1), 1.0)
    with pytest.raises(ValueError, match="parameter 'head'"):
        clipped(sent, Update("c", replace(sent, dense={"head": torch.zeros(2, 2)}), 1), 1.0)


# --- noise


@pytest.mark.parametrize("noise", [seeded(stream(0, "test")), secret])
def test_noise_is_standard_normal(noise: Callable[..., Tensor]) -> None:
    drawn = noise((200, 1000)).numpy()
    assert drawn.dtype == np.float64
    assert abs(drawn.mean()) < 5 / math.sqrt(drawn.size)
    assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * drawn.size)
    assert np.mean(np.abs(drawn) < 1) == pytest.approx(0.6827, abs=5 * 0.466 / math.sqrt(drawn.size))
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 5 / math.sqrt(1000)
    assert noise((0, 3)).shape == (0, 3)
    assert noise(()).shape == ()


def test_streams_repeat_and_entropy_does_not() -> None:
    one, two = (noise_of(False, 5, "privacy", 1)((4,)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, noise_of(False, 5, "privacy", 2)((4,)))
    assert not torch.equal(noise_of(True, 5, "privacy", 1)((4,)), noise_of(True, 5, "privacy", 1)((4,)))


def big(seed: int, rank: int = 8) -> Adapter:
    generator = torch_generator(stream(seed, "big"))
    return Adapter(
        {"q": LowRank(torch.randn(8, 900, generator=generator), torch.randn(700, 8, generator=generator), 0.5)},
        {"head": torch.randn(40, 50, generator=generator)},
    )


def spread(values: list[Tensor]) -> tuple[float, int]:
    flat = torch.cat([value.flatten().double() for value in values])
    return float(flat.std()), len(flat)


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_what_a_client_sends_has_noise_on_all_it_trained_and_on_nothing_else(factors: Factors) -> None:
    sent, privacy = big(0), ClientPrivacy(clip=0.25, noise=1.5, where="client")
    trained = moved(sent, big(1), factors)
    update = Update("c", trained, 30, factors, {"loss": 0.1})
    found = privately(sent, update, privacy, seeded(stream(0, "noise")))
    bounded = clipped(sent, update, 0.25).adapter
    x, y = found.adapter.layers["q"], bounded.layers["q"]
    noisy = [found.adapter.dense["head"] - bounded.dense["head"]]
    for name, own, base in (("A", x.A, y.A), ("B", x.B, y.B)):
        if name in factors:
            noisy.append(own - base)
        else:
            assert torch.equal(own, getattr(sent.layers["q"], name))
    deviation, count = spread(noisy)
    assert deviation == pytest.approx(1.5 * 0.25, rel=5 / math.sqrt(2 * count))
    assert all(bool(tensor.abs().gt(0).float().mean() > 0.99) for tensor in noisy)
    assert x.A.dtype == x.B.dtype == found.adapter.dense["head"].dtype == torch.float32
    assert (found.examples, found.metrics, found.factors) == (1.0, {}, factors)


def task_of(adapter: Adapter, factors: Factors = "AB") -> Task:
    return Task(0, adapter, Adapter(), factors, LocalTraining(), None, 0)


def cut(adapter: Adapter, rank: int) -> Adapter:
    return Adapter({name: truncate(x, rank) for name, x in adapter.layers.items()}, adapter.dense)


def round_of(ranks: list[int], privacy: ClientPrivacy | None, rule: str = "fedit", **options: str) -> ServerState:
    """The state after clients of these ranks have moved far; clipped without noise where there is no `privacy`."""
    server = big(0)
    state = ServerState(0, server)
    tasks = {f"c{i}": task_of(cut(server, rank)) for i, rank in enumerate(ranks)}
    sent = {c: task.adapter for c, task in tasks.items()}
    far = [moved(a, cut(big(i), a.layers["q"].rank)) for i, a in enumerate(sent.values(), 1)]
    updates = [Update(c, a, 10 * i) for i, (c, a) in enumerate(zip(sent, far, strict=True))]
    if privacy is None:
        passed = [clipped(sent[u.client], u, 0.5) for u in updates]
    else:
        passed = list(privately_summed(updates, tasks, privacy, seeded(stream(0, "noise"))))
    method = replace(METHODS["fedit"](), aggregate=partial(AGGREGATORS[rule], **options))
    return absorb(method, state, passed, 0)


@pytest.mark.parametrize(
    ("rule", "options", "weights"),
    [
        ("fedit", {}, {3: 1 / 4, 5: 1 / 2, 8: 1.0}),
        ("fedit", {"rows": "zero"}, {3: 1 / 4, 5: 1 / 4, 8: 1 / 4}),
        ("fedit", {"rows": "keep", "weights": "uniform"}, {3: 1 / 4, 5: 1 / 4, 8: 1 / 4}),
        ("rbla", {}, {3: 1 / 4, 5: 1 / 2, 8: 1.0}),
        ("hetlora", {"weights": "uniform"}, {3: 1 / 4, 5: 1 / 4, 8: 1 / 4}),
    ],
)
def test_noise_on_the_sum_is_in_the_next_state_by_each_rows_weight(
    rule: str, options: dict[str, str], weights: dict[int, float]
) -> None:
    privacy = ClientPrivacy(clip=0.5, noise=2.0)
    loud, quiet = (round_of([3, 5, 3, 8], p, rule, **options) for p in (privacy, None))
    x, y = loud.adapter.layers["q"], quiet.adapter.layers["q"]
    first = 0
    for last, weight in weights.items():
        rows = [x.A[first:last] - y.A[first:last], x.B[:, first:last] - y.B[:, first:last]]
        deviation, count = spread(rows)
        assert deviation == pytest.approx(2.0 * 0.5 * weight, rel=5 / math.sqrt(2 * count))
        first = last
    deviation, count = spread([loud.adapter.dense["head"] - quiet.adapter.dense["head"]])
    assert deviation == pytest.approx(2.0 * 0.5 / 4, rel=5 / math.sqrt(2 * count))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.floats(0.1, 5.0))
def test_a_client_moves_the_sum_by_no_more_than_the_bound(seed: int, who: int, clip: float) -> None:
    server, ranks = adapter_of(seed), [1, 3, 2, 3]
    tasks = {f"c{i}": task_of(cut(server, rank)) for i, rank in enumerate(ranks)}
    updates = [
        Update(c, moved(task.adapter, cut(adapter_of(seed + i, 3.0), task.adapter.layers["q"].rank)), 1)
        for i, (c, task) in enumerate(tasks.items(), 1)
    ]
    idle = [replace(u, adapter=tasks[u.client].adapter) if i == who else u for i, u in enumerate(updates)]

    def total(sent: list[Update]) -> Tensor:
        noise = seeded(stream(seed, "noise"))
        parts = torch.zeros(0, dtype=torch.float64)
        for u in privately_summed(sent, tasks, ClientPrivacy(clip, 1.0), noise):
            flat = [torch.nn.functional.pad(x.A, (0, 0, 0, 3 - x.rank)).flatten() for x in u.adapter.layers.values()]
            flat += [torch.nn.functional.pad(x.B, (0, 3 - x.rank)).flatten() for x in u.adapter.layers.values()]
            found = torch.cat([*flat, u.adapter.dense["head"].flatten()])
            parts = found if not len(parts) else parts + found
        return parts

    assert float((total(updates) - total(idle)).norm()) <= clip * (1 + 1e-9)


def test_a_factor_that_the_task_froze_is_the_servers_whatever_a_client_sends() -> None:
    server = big(0)
    update = Update("c0", moved(server, big(1)), 1, "AB")
    privacy = ClientPrivacy(0.5, 1.0)
    (found,) = privately_summed([update], {"c0": task_of(server, "B")}, privacy, seeded(stream(0, "n")))
    assert torch.equal(found.adapter.layers["q"].A, server.layers["q"].A)
    assert found.factors == "B"


# --- rounds


def rounds(privacy: Privacy, secretly: bool = False) -> list[ServerState]:
    spec = ModelSpec(dict(SHAPES))
    state = ServerState(0, adapter_of(0))
    clients = FakeClients({f"c{i}": ClientProfile(i, rank=1 + i) for i in range(3)})
    steps = federate(
        METHODS["fedit"](), state, clients, spec, LocalTraining(), rounds=2, privacy=privacy, secret=secretly
    )
    return [state for state, _ in steps]


def same(one: ServerState, other: ServerState) -> bool:
    return all(torch.equal(x.A, other.adapter.layers[n].A) for n, x in one.adapter.layers.items())


def test_the_server_adds_noise_that_repeats_unless_it_is_secret() -> None:
    central = Privacy(clients=ClientPrivacy(1.0, 1.0))
    assert all(map(same, rounds(central), rounds(central)))
    assert not same(rounds(central)[0], rounds(central, secretly=True)[0])
    assert not same(rounds(central, secretly=True)[0], rounds(central, secretly=True)[0])
    assert not same(rounds(central)[0], rounds(Privacy())[0])


def test_what_clients_do_the_server_does_not_do_again() -> None:
    assert same(rounds(Privacy(clients=ClientPrivacy(1.0, 1.0, "client")))[1], rounds(Privacy())[1])


def test_tasks_say_what_clients_must_protect() -> None:
    asked: list[Task] = []
    privacy = Privacy(ClientPrivacy(1.0, 1.0, "client"), ExamplePrivacy(1.0, 1.0))

    class Clients(FakeClients):
        def fit(self, tasks):  # type: ignore[no-untyped-def]
            asked.extend(tasks.values())
            return super().fit(tasks)

    clients = Clients({"c": ClientProfile(1, rank=3)})
    spec, state = ModelSpec(dict(SHAPES)), ServerState(0, adapter_of(0))
    next(federate(METHODS["fedit"](), state, clients, spec, LocalTraining(), rounds=1, privacy=privacy))
    assert [task.privacy for task in asked] == [privacy]


@pytest.mark.parametrize("made", [ClientPrivacy, ExamplePrivacy])
@pytest.mark.parametrize(
    "options", [{"clip": 0.0}, {"noise": 0.0}, {"noise": math.inf}, {"delta": 1.0}, {"delta": 0.0}, {"clip": math.nan}]
)
def test_settings_that_promise_nothing_are_refused(made: type, options: dict[str, float]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"privacy\.(clients|examples)\.{key}"):
        made(**{"clip": 1.0, "noise": 1.0, **options})


def test_a_client_counts_twice_against_what_it_sends_itself() -> None:
    assert ClientPrivacy(0.1, 3.0).multiplier == 3.0
    assert ClientPrivacy(0.1, 3.0, "client").multiplier == 1.5
    assert not Privacy()
    assert Privacy(examples=ExamplePrivacy(1.0, 1.0))
