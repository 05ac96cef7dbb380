"""Robust rules: their definitions on small dense matrices, what poison does, and what is never allocated."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyrank.core import blockwise
from polyrank.core.fake import FakeClients
from polyrank.core.federate import absorb, plan
from polyrank.core.lowrank import Adapter, LowRank, delta, tail, truncate
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState, Update
from polyrank.methods import AGGREGATORS, METHODS
from polyrank.methods.aggregate.robust import change_products
from polyrank.methods.aggregate.trimmed_mean import cut, middle_mean, robust_mean
from polyrank.methods.named import fedit

SHAPES = {"l0": (12, 10), "l1": (8, 14)}  # of either orientation
FULL = {"l0": 10, "l1": 8}
ROBUST = ["krum", "median", "norm_clipping", "trimmed_mean"]
robust = pytest.mark.parametrize("name", ROBUST)
Dense = Mapping[str, Tensor]


def noise(*shape: int, path: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch_generator(stream(0, path)), dtype=dtype)


def start(ranks: Mapping[str, int] = FULL, dtype: torch.dtype = torch.float64) -> ServerState:
    """A server that has learnt something, and a head."""

    def layer(name: str) -> LowRank:
        d_out, d_in = SHAPES[name]
        r = ranks[name]
        return LowRank(noise(r, d_in, path=f"A{name}", dtype=dtype), noise(d_out, r, path=f"B{name}", dtype=dtype), 2.0)

    return ServerState(0, Adapter({n: layer(n) for n in SHAPES}, {"head": noise(3, 4, path="head", dtype=dtype)}))


def answers(state: ServerState, ranks: list[int], size: float = 0.3) -> list[Update]:
    """Clients of these ranks, who move all that they were sent a little."""

    def update(i: int, rank: int) -> Update:
        def moved(name: str, x: LowRank) -> LowRank:
            A = x.A + size * noise(*x.A.shape, path=f"A{i}{name}", dtype=x.A.dtype)
            return LowRank(A, x.B + size * noise(*x.B.shape, path=f"B{i}{name}", dtype=x.B.dtype), x.scale)

        layers = {name: moved(name, truncate(x, rank)) for name, x in state.adapter.layers.items()}
        head = state.adapter.dense["head"]
        return Update(f"c{i:02}", Adapter(layers, {"head": head + size * noise(3, 4, path=f"h{i}")}), 10 * (i + 1))

    return [update(i, rank) for i, rank in enumerate(ranks)]


def lacking(update: Update, layer: str) -> Update:
    layers = {name: x for name, x in update.adapter.layers.items() if name != layer}
    return replace(update, adapter=replace(update.adapter, layers=layers))


def method(name: str, **options: Any) -> Method:
    return replace(METHODS["fedit"](), aggregate=partial(AGGREGATORS[name], **options))


def after(name: str, state: ServerState, updates: list[Update], **options: Any) -> dict[str, Tensor]:
    """The server's model after a round: products by layer, and the head."""
    return dense(absorb(method(name, **options), state, updates, 0).adapter)


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {**{name: delta(x) for name, x in adapter.layers.items()}, **adapter.dense}


def models(state: ServerState, updates: list[Update], rows: str = "keep") -> list[dict[str, Tensor]]:
    """What each client's model adds to the base: without the layers that it lacks."""

    def of(update: Update) -> dict[str, Tensor]:
        found = dense(update.adapter)
        for name, x in update.adapter.layers.items():
            if rows == "keep":
                found[name] = found[name] + delta(tail(state.adapter.layers[name], x.rank))
        return found

    return [of(update) for update in updates]


def close(found: Dense, expected: Dense) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


# --- trimmed mean and median


def trimmed(values: list[Tensor], b: int) -> Tensor:
    ordered = np.sort(torch.stack(values).numpy(), axis=0)
    return torch.from_numpy(ordered[b : len(values) - b].mean(axis=0))


@pytest.mark.parametrize("rows", ["keep", "zero"])
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.25, 0.4])
def test_trimmed_mean_is_that_of_every_entry(trim: float, rows: str) -> None:
    state = start()
    updates = answers(state, [2, 4, 6, 8, 10, 3, 10])
    b = min(math.ceil(trim * 7), 3)
    expected = {n: trimmed([m[n] for m in models(state, updates, rows)], b) for n in (*SHAPES, "head")}
    close(after("trimmed_mean", state, updates, trim=trim, rows=rows), expected)


@pytest.mark.parametrize("clients", [1, 2, 3, 6, 7])
def test_median_is_that_of_every_entry(clients: int) -> None:
    state = start()
    updates = answers(state, [2, 4, 6, 8, 10, 3, 10][:clients])
    found = models(state, updates)
    expected = {n: torch.from_numpy(np.median(torch.stack([m[n] for m in found]), axis=0)) for n in (*SHAPES, "head")}
    close(after("median", state, updates), expected)


@pytest.mark.parametrize(
    ("layers", "stand_in"),
    [("renormalise", None), ("keep", lambda x: delta(x)), ("zero", lambda x: torch.zeros(x.shape, dtype=x.A.dtype))],
)
def test_a_layer_that_some_lack(layers: str, stand_in: Callable[[LowRank], Tensor] | None) -> None:
    state = start()
    updates = answers(state, [10] * 5)
    updates = [lacking(u, "l0") if i in (1, 3) else u for i, u in enumerate(updates)]
    values = [m["l0"] for m in models(state, updates) if "l0" in m]
    if stand_in is not None:
        values += [stand_in(state.adapter.layers["l0"])] * 2
    expected = {"l0": torch.from_numpy(np.median(torch.stack(values), axis=0))}
    close(after("median", state, updates, layers=layers), expected)


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_what_the_server_keeps_is_the_best_of_its_rank(name: str) -> None:
    state = start({"l0": 3, "l1": 4})
    updates = answers(state, [1, 2, 3, 4, 4])
    b = 2 if name == "median" else 1
    found = after(name, state, updates)
    for layer, rank in (("l0", 3), ("l1", 4)):
        U, S, Vt = torch.linalg.svd(trimmed([m[layer] for m in models(state, updates)], b), full_matrices=False)
        torch.testing.assert_close(found[layer], U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90)])
def test_many_blocks_and_a_random_space_come_close_to_the_best(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    d_out, d_in = shape
    xs = [LowRank(noise(r, d_in, path=f"a{r}"), noise(d_out, r, path=f"b{r}"), 1 / r) for r in range(1, 8)]
    S = torch.linalg.svdvals(trimmed([delta(x) for x in xs], 2))
    best = float(S[5:].norm() / S.norm())
    monkeypatch.setattr(blockwise, "BLOCK", {"cpu": 7 * 70 * 4})  # 4 rows of all seven
    for words in (70 * 70, 70 * 70 - 1):  # of a Gram matrix, and too few for one
        monkeypatch.setattr(blockwise, "EXACT", words)
        x, error = robust_mean(xs, 5, 0.2)
        assert x.shape == shape
        assert best * (1 - 1e-9) <= error <= best * 1.002
        distance = (trimmed([delta(x) for x in xs], 2) - delta(x)).norm() / S.norm()
        assert float(distance) == pytest.approx(error, rel=1e-6)


VALUES = st.one_of(st.floats(-10, 10), st.sampled_from([math.inf, -math.inf, math.nan]))


@given(rows=st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=9), trim=st.floats(0, 0.5))
def test_the_middle_of_any_values_is_that_of_their_sorted_rest(rows: list[list[float]], trim: float) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    b = cut(len(rows), trim)
    ordered = np.sort(torch.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf).numpy(), axis=0)
    with np.errstate(invalid="ignore"):
        expected = ordered[b : len(rows) - b].mean(axis=0)
    before = values.clone()
    np.testing.assert_allclose(middle_mean(list(values), trim).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.nan_to_num(values), torch.nan_to_num(before))


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation returns a tensor of."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@robust
def test_the_matrix_is_never_allocated(name: str) -> None:
    d_out, d_in = 2500, 3000
    xs = [LowRank(noise(r, d_in, path=f"a{r}").float(), noise(d_out, r, path=f"b{r}").float()) for r in (2, 3, 4)]
    state = ServerState(0, Adapter({"l": xs[-1]}))
    with Largest() as largest:
        AGGREGATORS[name](state, [Update(f"c{i}", Adapter({"l": x}), 1) for i, x in enumerate(xs)], stream(0, "x"))
    assert largest.numel < d_out * d_in / 8
    with Largest() as largest:
        delta(xs[0])
    assert largest.numel == d_out * d_in


# --- Krum


def distances(state: ServerState, updates: list[Update], rows: str = "keep") -> Tensor:
    """Squared distances between whole models, from the matrices; a layer that a client lacks it has not changed."""
    server = dense(state.adapter)
    found = [torch.cat([{**server, **m}[n].flatten() for n in sorted(server)]) for m in models(state, updates, rows)]
    return torch.stack([torch.stack([(x - y).square().sum() for y in found]) for x in found])


@pytest.mark.parametrize("rows", ["keep", "zero"])
def test_distances_are_those_of_whole_models(rows: str) -> None:
    state = start()
    updates = answers(state, [2, 4, 6, 10])
    updates[1], updates[2] = lacking(updates[1], "l0"), replace(updates[2], adapter=Adapter(updates[2].adapter.layers))
    G = change_products(state, updates, rows, "renormalise")
    size = G.diagonal()
    torch.testing.assert_close(size[:, None] + size - 2 * G, distances(state, updates, rows), rtol=1e-9, atol=1e-9)


def chosen(state: ServerState, updates: list[Update], f: int, keep: int) -> list[int]:
    """Krum's choice by its definition."""
    D = distances(state, updates)
    n = len(updates)
    scores = [sum(sorted(float(D[i, j]) for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]
    return sorted(sorted(range(n), key=lambda i: scores[i])[:keep])


@pytest.mark.parametrize(("f", "keep"), [(0, 1), (1, 1), (2, 1), (2, 3), (1, 6)])
def test_krum_averages_the_clients_closest_to_the_others(f: int, keep: int) -> None:
    state = start()
    updates = answers(state, [2, 10, 6, 8, 10, 3, 10])
    kept = [models(state, updates)[i] for i in chosen(state, updates, f, keep)]
    expected = {n: torch.stack([m[n] for m in kept]).mean(dim=0) for n in (*SHAPES, "head")}
    close(after("krum", state, updates, byzantine=f, keep=keep), expected)


def test_krum_looks_at_the_head_too() -> None:
    state = start()
    update = answers(state, [10])[0]
    heads = [torch.full((3, 4), value, dtype=torch.float64) for value in (0.0, 5.0, 5.1, 5.2, 9.0)]
    updates = [Update(f"c{i}", Adapter(update.adapter.layers, {"head": head}), 1) for i, head in enumerate(heads)]
    assert torch.equal(after("krum", state, updates, byzantine=1)["head"], heads[2])


def test_krum_averages_a_layer_over_those_kept_who_hold_it() -> None:
    state = start()
    updates = answers(state, [10] * 5, size=0.01)
    updates = [*(lacking(u, "l0") for u in updates[:4]), updates[4]]
    found = after("krum", state, updates, byzantine=0, keep=5)
    close(found, {"l0": models(state, updates)[4]["l0"]})
    nobody = after("krum", state, updates, byzantine=1, keep=1)
    assert torch.equal(nobody["l0"], delta(state.adapter.layers["l0"]))


@pytest.mark.parametrize(("replies", "f", "advice"), [(4, 1, "byzantine: 0 or less"), (2, 0, "do without byzantine")])
def test_krum_refuses_a_round_of_too_few(replies: int, f: int, advice: str) -> None:
    state = start()
    updates = answers(state, [10] * replies)
    need = f"krum: {replies} clients replied, and byzantine: {f} needs 2 \\* {f} \\+ 3 = {2 * f + 3} or more"
    with pytest.raises(ValueError, match=f"{need}.*{advice}.*few: skip"):
        after("krum", state, updates, byzantine=f)
    skipped = absorb(method("krum", byzantine=f, few="skip"), state, updates, 0)
    assert skipped.round == 1
    assert torch.equal(skipped.adapter.dense["head"], state.adapter.dense["head"])
    for name, x in state.adapter.layers.items():
        assert torch.equal(skipped.adapter.layers[name].A, x.A)
    assert after("krum", state, answers(state, [10] * (2 * f + 3)), byzantine=f)


@pytest.mark.parametrize("clients", range(1, 8))
def test_krum_without_a_number_takes_what_the_replies_allow(clients: int) -> None:
    state = start()
    updates = answers(state, [10] * clients)
    found = after("krum", state, updates)
    if clients >= 3:
        close(found, after("krum", state, updates, byzantine=(clients - 3) // 2))
    swapped = [replace(u, client=v.client) for u, v in zip(reversed(updates), updates, strict=True)]
    close(found, after("krum", state, swapped))  # nor do equal scores go by name


# --- norm clipping


@pytest.mark.parametrize("weights", ["uniform", "size"])
@pytest.mark.parametrize("options", [{}, {"multiple": 0.5}, {"multiple": 3.0}, {"bound": 4.0}])
def test_no_change_is_larger_than_the_bound(options: dict[str, float], weights: str) -> None:
    state = start()
    updates = [answers(state, [2, 10, 6, 8], size=0.1 * (i + 1))[i] for i in range(4)]
    server = dense(state.adapter)
    changes = [{n: m[n] - server[n] for n in server} for m in models(state, updates)]
    norms = [math.sqrt(sum(float(c.square().sum()) for c in change.values())) for change in changes]
    bound = options.get("bound", options.get("multiple", 1.0) * sorted(norms)[1])
    shares = np.array([float(u.examples) if weights == "size" else 1.0 for u in updates])
    shares /= shares.sum()
    parts = [share * min(1.0, bound / norm) for share, norm in zip(shares, norms, strict=True)]
    expected = {n: server[n] + sum(p * change[n] for p, change in zip(parts, changes, strict=True)) for n in server}
    close(after("norm_clipping", state, updates, weights=weights, **options), expected)


def test_norm_clipping_with_room_is_the_exact_mean() -> None:
    state = start()
    updates = answers(state, [10] * 4)
    found = after("norm_clipping", state, updates, bound=1e6, weights="size")
    exact = after("flexlora", state, updates)
    close(found, {name: exact[name] for name in (*SHAPES, "head")})


# --- poison


def poisoned(state: ServerState, update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    """Factors and head changed."""
    layers = {n: LowRank(change(x.A), change(x.B), x.scale) for n, x in update.adapter.layers.items()}
    return replace(update, adapter=Adapter(layers, {n: change(t) for n, t in update.adapter.dense.items()}))


def moved(found: Dense, expected: Dense) -> float:
    """How far apart, as a multiple of the size."""
    far = math.sqrt(sum(float((found[n] - expected[n]).double().square().sum()) for n in expected))
    return far / math.sqrt(sum(float(t.double().square().sum()) for t in expected.values()))


@pytest.mark.parametrize("ranks", [[10] * 10, [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]])
def test_one_of_ten_at_a_thousand_times_moves_little_and_ruins_fedit(ranks: list[int]) -> None:
    state = start()
    updates = answers(state, ranks, size=0.1)
    bad = [*updates[:4], poisoned(state, updates[4], lambda t: 1000 * t), *updates[5:]]
    assert moved(after("fedit", state, bad), after("fedit", state, updates)) > 100
    assert moved(after("flexlora", state, bad), after("flexlora", state, updates)) > 100
    for name in ROBUST:
        found, expected = after(name, state, bad), after(name, state, updates)
        for part in ({"head": expected["head"]}, {n: expected[n] for n in SHAPES}):
            assert moved(found, part) < (0.5 if name == "krum" else 0.2), name


JUNK = {
    "nan": lambda t: torch.full_like(t, math.nan),
    "inf": lambda t: torch.full_like(t, -math.inf),
    "1e30": lambda t: torch.full_like(t, 1e30),
    "-1e30": lambda t: t * -1e30,
    "one": lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 1, math.nan, t),
}


@robust
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_client_that_sends_junk_leaves_a_finite_model(name: str, junk: str, dtype: torch.dtype) -> None:
    state = start({"l0": 4, "l1": 4}, dtype)
    updates = answers(state, [2, 4, 4, 3, 4], size=0.1)
    bad = [*updates[:2], poisoned(state, updates[2], JUNK[junk]), *updates[3:]]
    found, honest = after(name, state, bad), after(name, state, updates)
    assert all(bool(t.isfinite().all()) for t in found.values())
    assert moved(found, honest) < 0.6


@robust
def test_junk_from_everybody_leaves_the_model_as_it_is(name: str) -> None:
    state = start()
    junk = [poisoned(state, u, JUNK["nan"]) for u in answers(state, [10] * 5)]
    close(after(name, state, junk), dense(state.adapter))


@pytest.mark.parametrize("name", ["krum", "norm_clipping"])
def test_what_float32_cannot_hold_counts_as_not_finite(name: str) -> None:
    state = start()
    updates = answers(state, [10] * 5)
    endless = {n: replace(x, scale=math.inf) for n, x in updates[2].adapter.layers.items()}
    for bad in (poisoned(state, updates[2], lambda t: t * 1e200), replace(updates[2], adapter=Adapter(endless))):
        found = after(name, state, [*updates[:2], bad, *updates[3:]])
        assert all(bool(t.isfinite().all()) for t in found.values())


# --- the head


def test_a_rule_answers_for_the_dense_parameters_that_it_returns_anew() -> None:
    def rule(state: ServerState, updates: Any, rng: np.random.Generator) -> ServerState:
        list(updates)
        return replace(state, adapter=replace(state.adapter, dense={**state.adapter.dense, "a": torch.full((1,), 7.0)}))

    state = ServerState(0, Adapter({}, {"a": torch.zeros(1), "b": torch.zeros(1)}))
    heads = [{"a": torch.ones(1), "b": torch.full((1,), b)} for b in (1.0, 3.0)]
    sent = [Update(client, Adapter({}, head), 1) for client, head in zip("xy", heads, strict=True)]
    after = absorb(replace(fedit(), aggregate=rule), state, sent, 0).adapter.dense
    assert {name: float(t) for name, t in after.items()} == {"a": 7.0, "b": 2.0}


@robust
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_head_goes_by_the_same_rule_under_any_method(name: str, device: str | None) -> None:
    state = start()
    updates = answers(state, [10] * 5, size=0.1)
    updates[3] = replace(updates[3], adapter=replace(updates[3].adapter, dense={"head": torch.full((3, 4), 1e30)}))
    for composed in (METHODS[name](), replace(METHODS["fedit"](), aggregate=AGGREGATORS[name])):
        head = absorb(composed, state, updates, 0, device).adapter.dense["head"]
        assert (head.dtype, bool((head.abs() < 10).all())) == (torch.float64, True)


@robust
def test_a_frozen_head_is_not_averaged(name: str) -> None:
    spec = ModelSpec(SHAPES, head={"head": 12})
    profiles = {c: ClientProfile(5, rank=3) for c in "abcde"}
    frozen, state = replace(METHODS[name](), dense="freeze"), start()
    budgets = frozen.estimate(profiles, spec, LocalTraining())
    tasks = plan(frozen, state, budgets, list(profiles), spec, LocalTraining(), 0)
    assert all("head" not in task.adapter.dense for task in tasks.values())
    after = absorb(frozen, state, FakeClients(profiles).fit(tasks), 0)
    assert torch.equal(after.adapter.dense["head"], state.adapter.dense["head"])


@robust
def test_rounds_of_clients_of_unequal_ranks_repeat_to_the_byte(name: str) -> None:
    state = start({"l0": 4, "l1": 4})
    for order in itertools.islice(itertools.permutations(range(5)), 3):
        updates = answers(state, [1, 2, 3, 4, 4])
        first, second = (absorb(METHODS[name](), state, updates, 0).adapter for _ in range(2))
        assert all(torch.equal(x.A, second.layers[n].A) for n, x in first.layers.items())
        renamed = [replace(updates[j], client=updates[i].client) for i, j in enumerate(order)]
        close(after(name, state, renamed), after(name, state, updates))
