"""What single rules do beyond the laws they share: their formulas on small dense matrices, and their options."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from polyrank.core.fake import FakeClients, echo
from polyrank.core.federate import absorb, plan
from polyrank.core.lowrank import Adapter, LowRank, delta, norm
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Budget, ClientProfile, LocalTraining, ModelSpec, ServerState, Task, Update
from polyrank.methods import AGGREGATORS, METHODS
from polyrank.methods.aggregate.rb_lora import rarity
from polyrank.methods.estimate import fixed
from polyrank.methods.factors import alternating, warm_up

D_OUT, D_IN, RANK = 12, 10, 6
SPEC = ModelSpec({"l": (D_OUT, D_IN)})
LOCAL = LocalTraining()
PROFILES = {name: ClientProfile(n, rank=r) for name, n, r in [("a", 10, 2), ("b", 20, 4), ("c", 30, 6)]}


def layer(seed: int, rank: int = RANK, scale: float = 2.0) -> LowRank:
    generator = torch_generator(stream(seed, "layer"))
    A = torch.randn(rank, D_IN, generator=generator, dtype=torch.float64)
    return LowRank(A, torch.randn(D_OUT, rank, generator=generator, dtype=torch.float64), scale)


def start() -> ServerState:
    return ServerState(0, Adapter({"l": layer(0)}))


def update(client: str, x: LowRank, examples: int = 1, **changes: Any) -> Update:
    return replace(Update(client, Adapter({"l": x}), examples), **changes)


def after(rule: str, updates: list[Update], state: ServerState | None = None, **options: Any) -> ServerState:
    return AGGREGATORS[rule](state or start(), iter(updates), stream(0, "rule"), **options)


def cohort() -> list[Update]:
    """Unequal ranks, sizes and scales."""
    return [update(c, layer(i, p.rank, 4.0 / (i + 1)), p.examples) for i, (c, p) in enumerate(PROFILES.items())]


def best(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def exact(updates: list[Update]) -> Tensor:
    weight = sum(u.examples for u in updates)
    return sum(delta(u.adapter.layers["l"]) * (u.examples / weight) for u in updates)


# --- RB-LoRA


def test_rarity_is_the_inverse_share_of_the_owners() -> None:
    assert rarity([2, 4], [1.0, 3.0]).tolist() == [1.0, 1.0, 4 / 3, 4 / 3]
    assert rarity([3, 3], [5.0, 5.0]).tolist() == [1.0, 1.0, 1.0]
    assert rarity([1, 2], [1.0, 0.0]).tolist() == [1.0, 0.0]
    assert rarity([], []).tolist() == []


def test_rb_lora_weights_rank_one_terms() -> None:
    updates = cohort()
    expected = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for u in updates:
        x = u.adapter.layers["l"]
        for j in range(x.rank):
            owners = sum(v.examples for v in updates if v.adapter.layers["l"].rank > j)
            expected += u.examples / owners * x.scale * torch.outer(x.B[:, j], x.A[j])
    x = after("rb_lora", updates).adapter.layers["l"]
    torch.testing.assert_close(delta(x), best(expected, RANK))


def test_rb_lora_keeps_levels_that_nobody_owns() -> None:
    state = start()
    held = state.adapter.layers["l"]
    sent = LowRank(held.A[:2], held.B[:, :2], held.scale)
    torch.testing.assert_close(delta(after("rb_lora", [update("a", sent)]).adapter.layers["l"]), delta(held))


def test_rb_lora_aligned_does_not_depend_on_how_factors_are_rotated() -> None:
    updates = cohort()
    turned = []
    for i, u in enumerate(updates):
        x = u.adapter.layers["l"]
        Q, _ = torch.linalg.qr(layer(i + 9, x.rank).A[:, : x.rank])
        turned.append(update(u.client, LowRank(Q.T @ x.A, x.B @ Q, x.scale), u.examples))
    for align in (True, False):
        left, right = (delta(after("rb_lora", us, align=align).adapter.layers["l"]) for us in (updates, turned))
        assert torch.allclose(left, right) == align


def test_rb_lora_in_factor_space_is_rbla_in_singular_order() -> None:
    updates = cohort()
    rows = after("rbla", updates).adapter.layers["l"]
    x = after("rb_lora", updates, space="factor").adapter.layers["l"]
    torch.testing.assert_close(delta(x), delta(rows))
    torch.testing.assert_close(x.A @ x.A.T, torch.eye(RANK, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["rb_lora", "flexlora"])
def test_the_rank_the_server_keeps_can_change(rule: str) -> None:
    for rank in (3, 9):
        x = after(rule, cohort(), rank=rank).adapter.layers["l"]
        assert (x.rank, x.scale) == (rank, 2.0)
    torch.testing.assert_close(delta(after("flexlora", cohort(), rank=3).adapter.layers["l"]), best(exact(cohort()), 3))


# --- HetLoRA


def test_hetlora_weights_by_the_norm_of_the_whole_update() -> None:
    updates = cohort()
    norms = {u.client: float(delta(u.adapter.layers["l"]).norm()) for u in updates}
    assert norm(updates[0].adapter.layers["l"]) == pytest.approx(norms["a"])
    expected = torch.zeros(RANK, D_IN, dtype=torch.float64)
    for u in updates:
        x = u.adapter.layers["l"]
        expected[: x.rank] += norms[u.client] / sum(norms.values()) * (x.scale / 2.0) ** 0.5 * x.A
    torch.testing.assert_close(after("hetlora", updates).adapter.layers["l"].A, expected)


def test_hetlora_weighs_updates_of_no_norm_alike() -> None:
    xs = [LowRank(layer(i).A, torch.zeros(D_OUT, RANK, dtype=torch.float64), 2.0) for i in range(2)]
    x = after("hetlora", [update("a", xs[0]), update("b", xs[1], 9)]).adapter.layers["l"]
    torch.testing.assert_close(x.A, (xs[0].A + xs[1].A) / 2)
    assert not x.B.any()


def test_hetlora_remembers_what_clients_pruned_to() -> None:
    state = ServerState(0, Adapter({"l": layer(0), "m": layer(1)}), memory={"ranks": {"a": {"m": 1}, "z": {"l": 3}}})
    memory = after("hetlora", cohort(), state, pruning=True).memory
    assert memory == {"ranks": {"a": {"l": 2, "m": 1}, "b": {"l": 4}, "c": {"l": 6}, "z": {"l": 3}}}
    assert after("hetlora", cohort(), state).memory == state.memory


# --- rules that fold


def test_flora_folds_the_exact_mean_and_starts_afresh() -> None:
    updates = cohort()
    first = after("flora", updates)
    torch.testing.assert_close(delta(first.folded.layers["l"]), exact(updates))
    x = first.adapter.layers["l"]
    assert (x.rank, x.scale) == (RANK, 2.0)
    assert not x.B.any()
    assert bool(x.A.any(dim=1).all())
    second = after("flora", updates, first)
    torch.testing.assert_close(delta(second.folded.layers["l"]), 2 * exact(updates))


@pytest.mark.parametrize("rule", ["flora", "fedex_lora"])
def test_folds_do_not_outgrow_the_layer(rule: str) -> None:
    state, folded = start(), torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for _ in range(4):
        before = delta(state.adapter.layers["l"])
        state = after(rule, cohort(), state)
        folded += exact(cohort()) if rule == "flora" else torch.zeros(())
        assert state.folded.layers["l"].rank <= min(D_OUT, D_IN)
        assert before.shape == folded.shape
    if rule == "flora":
        torch.testing.assert_close(delta(state.folded.layers["l"]), folded)


def mean_model(tasks: dict[str, Task], updates: list[Update], weights: dict[str, float]) -> Tensor:
    """The weighted mean of what the clients' models add to the base: what they train, and what they only run."""
    models = {
        u.client: delta(u.adapter.layers["l"])
        + sum(delta(x) for name, x in tasks[u.client].frozen.layers.items() if name == "l")
        for u in updates
    }
    return sum(models[c] * w for c, w in weights.items()) / sum(weights.values())


def test_fedex_is_the_exact_mean_of_the_clients_models_at_unequal_ranks() -> None:
    method, state = METHODS["fedex_lora"](), start()
    for _ in range(3):
        tasks = plan(method, state, fixed(PROFILES, SPEC, LOCAL), list(PROFILES), SPEC, LOCAL, 0)
        updates = list(FakeClients(PROFILES).fit(tasks))
        expected = mean_model(tasks, updates, dict.fromkeys(PROFILES, 1.0))
        state = absorb(method, state, updates, 0)
        torch.testing.assert_close(delta(state.adapter.layers["l"]) + delta(state.folded.layers["l"]), expected)


# --- LoRA-FAIR and FedSVD


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_lora_fair_solves_its_least_squares(ridge: float) -> None:
    updates = [update(c, layer(i), i + 1) for i, c in enumerate("abc", start=1)]
    plain = after("fedit", updates).adapter.layers["l"]
    x = after("lora_fair", updates, ridge=ridge).adapter.layers["l"]
    gram = plain.A @ plain.A.T
    level = ridge * float(gram.diagonal().mean())
    residual = exact(updates) / plain.scale - plain.B @ plain.A
    step = residual @ plain.A.T @ torch.linalg.inv(gram + level * torch.eye(RANK, dtype=torch.float64))
    torch.testing.assert_close(x.A, plain.A)
    torch.testing.assert_close(x.B, plain.B + step)
    assert (delta(x) - exact(updates)).norm() < (delta(plain) - exact(updates)).norm()


def test_lora_fair_leaves_a_zero_adapter_finite() -> None:
    nothing = LowRank(torch.zeros(RANK, D_IN), torch.zeros(D_OUT, RANK), 2.0)
    state = ServerState(0, Adapter({"l": nothing}))
    assert not delta(after("lora_fair", [update("a", nothing)], state).adapter.layers["l"]).any()


def test_fedsvd_refactors_every_period_after_its_warmup() -> None:
    identity = torch.eye(RANK, dtype=torch.float64)
    refactored = []
    for round_ in range(8):
        state = replace(start(), round=round_)
        x = after("fedsvd", [update("a", layer(0), factors="B")], state, period=2, warmup=3).adapter.layers["l"]
        torch.testing.assert_close(delta(x), delta(layer(0)))
        refactored.append(torch.allclose(x.A @ x.A.T, identity))
    assert refactored == [False, False, False, False, True, False, True, False]


# --- the other slots


def test_alternating_takes_turns_after_its_warmup() -> None:
    assert [alternating(t) for t in range(4)] == ["B", "A", "B", "A"]
    assert [alternating(t, first="A", warmup=2) for t in range(5)] == ["AB", "AB", "A", "B", "A"]


def test_warm_up_trains_both_and_then_starts_another_schedule() -> None:
    assert [warm_up(t) for t in range(18, 23)] == ["AB", "AB", "B", "A", "B"]
    assert [warm_up(t, rounds=3) for t in range(6)] == ["AB", "AB", "AB", "B", "A", "B"]
    assert [warm_up(t, rounds=1, then="only_b") for t in range(3)] == ["AB", "B", "B"]
    assert [warm_up(t, rounds=1, then="only_a") for t in range(3)] == ["AB", "A", "A"]


def test_fixed_takes_each_clients_rank_or_one_for_all() -> None:
    assert fixed(PROFILES, SPEC, LOCAL) == {c: Budget(r, r, "stated") for c, r in {"a": 2, "b": 4, "c": 6}.items()}
    two = ModelSpec({"l": (1, 1), "m": (1, 1)})
    assert fixed(PROFILES, two, LOCAL, rank=3) == dict.fromkeys("abc", Budget(6, 3, "stated"))
    with pytest.raises(ValueError, match="client 'x' states no rank"):
        fixed({"x": ClientProfile(1)}, SPEC, LOCAL)


def test_hetlora_options_reach_the_task() -> None:
    method = METHODS["hetlora"](penalty=0.5, decay=0.9, prune=False)
    assert method.penalty is not None
    assert (method.penalty.weight, method.penalty.decay, method.penalty.prune) == (0.5, 0.9, False)
    assert method.aggregate.keywords["pruning"] is False


def test_an_ablation_replaces_one_answer() -> None:
    def final(method: Method) -> Tensor:
        tasks = plan(method, start(), fixed(PROFILES, SPEC, LOCAL), list(PROFILES), SPEC, LOCAL, 0)
        return delta(absorb(method, start(), FakeClients(PROFILES, echo).fit(tasks), 0).adapter.layers["l"])

    plain = METHODS["hetlora_weighted"]()
    kept = replace(plain, aggregate=partial(AGGREGATORS["hetlora"], weights="size", rows="keep"))
    torch.testing.assert_close(final(kept), delta(layer(0)))
    assert not torch.allclose(final(plain), delta(layer(0)))
