"""Outputs of independent implementations, reproduced by the functions the product uses; compared by product.

Each case of the manifest names a method, an input and the keys to compare. What released code leaves out is left out
here by an option: it ignores scales (``scaled=False``: every scale is 1) and does not renormalise for layers that some
clients lack (``layers="zero"``). A method that the manifest names and nobody handles here fails.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from polyrank.core.federate import absorb
from polyrank.core.lowrank import Adapter, LowRank, delta, mean, norm, overlay, rescale, stack, truncate
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ServerState, Update
from polyrank.methods import AGGREGATORS, DISPATCHERS, METHODS
from polyrank.methods.aggregate.rb_lora import rarity
from polyrank.methods.named import fedit

GOLD = Path(__file__).parents[2] / "shared" / "gold"
MANIFEST = GOLD / "manifest.json"
LOSSLESS = 1 << 20  # a rank above every layer's
CASES = [c for c in json.loads(MANIFEST.read_text())["cases"] if c["method"] != "inputs"] if MANIFEST.exists() else []

Arrays = Mapping[str, npt.NDArray[Any]]


def load(method: str, case: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLD / method / f"{case}.npz") as file:
        return {key: file[key] for key in file.files}


def adapter_in(arrays: Arrays, prefix: str, scale: float) -> Adapter:
    """The layers ``{prefix}/{layer}/A|B`` and the head ``{prefix}/head/...``."""
    own = {
        key.removeprefix(f"{prefix}/"): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith(f"{prefix}/")
    }
    names = sorted(key.removesuffix("/A") for key in own if key.endswith("/A"))
    dense = {key: tensor for key, tensor in own.items() if key.startswith("head/")}
    return Adapter({name: LowRank(own[f"{name}/A"], own[f"{name}/B"], scale) for name in names}, dense)


@dataclass(frozen=True)
class Round:
    """The inputs of a case, and the server state before the round where the method's file has one."""

    inputs: Arrays
    outputs: Arrays

    @property
    def ranks(self) -> list[int]:
        return self.inputs["ranks"].tolist()

    @property
    def sizes(self) -> list[int]:
        return self.inputs["n"].tolist()

    def scale(self, rank: int) -> float:
        return float(self.inputs["alpha"]) / rank

    def updates(self, scaled: bool = False, factors: Any = "AB") -> list[Update]:
        """What the clients send; their scale is alpha / r, or 1 for code that ignores it."""
        return [
            Update(f"c{i}", adapter_in(self.inputs, f"c{i}", self.scale(r) if scaled else 1.0), n, factors)
            for i, (r, n) in enumerate(zip(self.ranks, self.sizes, strict=True))
        ]

    def empty(self, rank: int = 0) -> ServerState:
        """A server that holds nothing yet, at the largest rank of each layer's holders, or at a larger one given."""
        held: dict[str, LowRank] = {}
        dense: dict[str, Tensor] = {}
        for update in self.updates():
            for name, x in update.adapter.layers.items():
                rows = max(x.rank, min(rank, *x.shape), held[name].rank if name in held else 0)
                held[name] = LowRank(x.A.new_zeros(rows, x.shape[1]), x.B.new_zeros(x.shape[0], rows), 1.0)
            dense |= {name: torch.zeros_like(t) for name, t in update.adapter.dense.items()}
        return ServerState(0, Adapter(held, dense))

    @cached_property
    def before(self) -> ServerState:
        """The stated server state before the round; homogeneous ranks."""
        layers = adapter_in(self.outputs, "pre", self.scale(self.ranks[0])).layers
        return ServerState(0, Adapter(layers, self.empty().adapter.dense))


def after(rule: str, state: ServerState, updates: list[Update], dense: Any = "size", **options: Any) -> ServerState:
    method = replace(fedit(), aggregate=partial(AGGREGATORS[rule], **options), dense=dense)
    return absorb(method, state, updates, 0)


def by(method: Method, state: ServerState, updates: list[Update]) -> ServerState:
    return absorb(method, state, updates, 0)


Results = Iterator[tuple[str, Tensor]]


def factors_of(state: ServerState) -> Results:
    for name, x in state.adapter.layers.items():
        yield f"g/{name}/A", x.A
        yield f"g/{name}/B", x.B
    for name, tensor in state.adapter.dense.items():
        yield f"g/{name}", tensor


def deltas_of(state: ServerState, prefix: str = "g", kind: str = "dW") -> Results:
    for name, x in state.adapter.layers.items():
        yield f"{prefix}/{name}/{kind}", delta(x)


def handed_out(state: ServerState, prefix: str, rank: int) -> ServerState:
    """The state as a client of this rank receives it."""
    ranks = {name: min(rank, x.rank) for name, x in state.adapter.layers.items()}
    layers, _ = DISPATCHERS["truncate"](state, ranks, stream(0, prefix))
    return replace(state, adapter=Adapter(layers))


def redistributed(state: ServerState, ranks: list[int]) -> Results:
    for i, rank in enumerate(ranks):
        yield from deltas_of(handed_out(state, f"c{i}", rank), f"c{i}")


def rows_of(state: ServerState, prefix: str, rank: int) -> Results:
    for name, x in handed_out(state, prefix, rank).adapter.layers.items():
        yield f"{prefix}/{name}/A", x.A


# --- one function per method of the manifest: the keys it can answer, with our values


def zero_padded(round_: Round, weights: str) -> ServerState:
    """Mean of zero-padded factors by released code: unscaled, and missing layers count as zeros."""
    dense = "uniform" if weights == "uniform" else "size"
    return after("hetlora", round_.empty(), round_.updates(), dense, weights=weights, layers="zero")


def rblora_repo_flora(round_: Round) -> Results:
    updates = round_.updates()
    for name in round_.empty().adapter.layers:
        x = stack([u.adapter.layers[name] for u in updates if name in u.adapter.layers])
        yield f"g/{name}/A", x.A
        yield f"g/{name}/B", x.B
    for name, tensor in by(METHODS["hetlora_uniform"](), round_.empty(), updates).adapter.dense.items():
        yield f"g/{name}", tensor


def column_weights(round_: Round) -> Results:
    yield "beta", torch.from_numpy(rarity(round_.ranks, round_.sizes))


def svd_redistribution(round_: Round) -> Results:
    """The size-weighted zero-padded mean, handed out by truncated SVD."""
    state = after("fedsvd", round_.empty(), round_.updates(), weights="size", rows="zero", layers="zero")
    targets = round_.outputs["targets"].tolist()
    yield from redistributed(state, targets)
    for i, rank in enumerate(targets):
        yield from rows_of(state, f"c{i}", rank)


def truncation_redistribution(round_: Round) -> Results:
    state = zero_padded(round_, "uniform")
    for i, rank in enumerate(round_.outputs["targets"].tolist()):
        for name, x in state.adapter.layers.items():
            part = rescale(truncate(x, rank), round_.scale(rank))
            yield f"c{i}/{name}/A", part.A
            yield f"c{i}/{name}/B", part.B


def flora_stack(round_: Round) -> Results:
    updates = round_.updates()
    folded = after("flora", round_.empty(), updates, layers="zero").folded.layers
    shares = np.asarray(round_.sizes) / sum(round_.sizes)
    for name, fold in folded.items():
        held = [(u.adapter.layers[name], w) for u, w in zip(updates, shares, strict=True) if name in u.adapter.layers]
        x = stack([x for x, _ in held], [w for _, w in held])
        yield f"g/{name}/A", x.A
        yield f"g/{name}/B", x.B
        yield f"g/{name}/BA", delta(fold)


def flexlora(round_: Round) -> Results:
    state = after("flexlora", round_.empty(LOSSLESS), round_.updates(scaled=True), layers="zero")
    yield from deltas_of(state)
    for rank in set(round_.ranks):
        yield from deltas_of(handed_out(state, f"r{rank}", rank), f"r{rank}")


def zero_padded_sqrt_scale(round_: Round) -> Results:
    updates = round_.updates(scaled=True)
    yield from factors_of(after("hetlora", round_.empty(max(round_.ranks)), updates, weights="size", layers="zero"))


def fedex(round_: Round) -> Results:
    state = by(METHODS["fedex_lora"](), round_.before, round_.updates(scaled=True))
    yield from factors_of(state)
    for name, fold in state.folded.layers.items():
        yield f"g/{name}/W", torch.from_numpy(round_.outputs[f"pre/{name}/W"]) + delta(fold)


def plain_mean(round_: Round) -> Results:
    yield from factors_of(after("fedit", round_.before, round_.updates(scaled=True), "uniform", weights="uniform"))


def frozen_down_factor(round_: Round) -> Results:
    method = METHODS["ffa_lora"]()
    updates = round_.updates(scaled=True, factors=method.factors(0))
    yield from factors_of(after("fedit", round_.before, updates, "uniform", weights="uniform", rows="zero"))


def refactored(round_: Round) -> Results:
    """FedSVD's re-factorisation alone: the server's own factors come back from one client; scale 1."""
    before = ServerState(0, adapter_in(round_.outputs, "pre", 1.0))
    state = by(METHODS["fedsvd"](), before, [Update("c0", before.adapter, 1, "B")])
    yield from deltas_of(state, kind="BA")
    yield from rows_of(state, "g", round_.ranks[0])


def rb_lora_product(round_: Round) -> Results:
    state = by(METHODS["rb_lora"](), round_.empty(LOSSLESS), round_.updates(scaled=True))
    yield from deltas_of(state)
    yield from redistributed(state, round_.ranks)


def rb_lora_factor(round_: Round) -> Results:
    yield from factors_of(by(METHODS["rbla"](), round_.empty(), round_.updates()))
    yield from redistributed(after("rb_lora", round_.empty(), round_.updates(), space="factor"), round_.ranks)


def exact(round_: Round) -> Results:
    updates = round_.updates(scaled=True)
    yield from deltas_of(after("flexlora", round_.empty(LOSSLESS), updates, layers="zero"))


def norm_weighted(round_: Round) -> Results:
    updates = round_.updates()
    yield from factors_of(by(METHODS["hetlora"](), round_.empty(), updates))
    for name in round_.empty().adapter.layers:
        norms = torch.tensor([norm(u.adapter.layers[name]) if name in u.adapter.layers else 0.0 for u in updates])
        yield f"g/{name}/weights", norms / norms.sum()


def hralora(round_: Round) -> Results:
    """Factor updates u_i of the first r_i rows; rows that a client lacks keep the server's value."""
    server = ServerState(0, adapter_in(round_.outputs, "in/g", 1.0))
    moves = [adapter_in(round_.outputs, f"in/u{i}", 1.0) for i in range(len(round_.outputs["n"]))]
    ranks, sizes = round_.outputs["ranks"].tolist(), round_.outputs["n"].tolist()
    updates = [
        Update(f"c{i}", Adapter({n: truncate(moved(g, u.layers[n]), r) for n, g in held(server, u)}), size)
        for i, (u, r, size) in enumerate(zip(moves, ranks, sizes, strict=True))
    ]
    plain = after("hralora", server, updates, weights="uniform", refactor=False)
    by_size = after("hralora", server, updates, refactor=False)
    whole = after("hralora", server, updates)
    norms = [sum(norm(x) ** 2 for x in u.layers.values()) ** 0.5 for u in moves]
    for name, g in server.adapter.layers.items():
        xs = [overlay(u.adapter.layers[name], g) if name in u.adapter.layers else g for u in updates]
        found = {
            "average": plain.adapter.layers[name],
            "product_average": plain.adapter.layers[name],
            "weighted_average": by_size.adapter.layers[name],
            "svd_average": mean(xs, norms),
        }
        for kind, x in found.items():
            yield f"out/{kind}/{name}/A", x.A
            yield f"out/{kind}/{name}/B", x.B
        yield f"out/hralora/{name}/BA", delta(whole.adapter.layers[name])


def held(server: ServerState, update: Adapter) -> Iterator[tuple[str, LowRank]]:
    return ((name, g) for name, g in server.adapter.layers.items() if name in update.layers)


def moved(x: LowRank, by: LowRank) -> LowRank:
    return LowRank(x.A + by.A, x.B + by.B, x.scale)


HANDLERS: dict[str, Callable[[Round], Results]] = {
    "fedex_official": fedex,
    "fedit_official": plain_mean,
    "fedsvd_reinit_official": refactored,
    "ffa_official": frozen_down_factor,
    "flexlora_official": flexlora,
    "flexlora_repo_hetlora_sqrtscale": zero_padded_sqrt_scale,
    "flora_official_stack": flora_stack,
    "flora_official_zeropad": lambda round_: factors_of(zero_padded(round_, "size")),
    "hralora_repo": hralora,
    "rblora_repo_column_weights": column_weights,
    "rblora_repo_flora": rblora_repo_flora,
    "rblora_repo_uniform_hetlora": lambda round_: factors_of(zero_padded(round_, "uniform")),
    "rblora_repo_uniform_truncate_dist": truncation_redistribution,
    "rblora_repo_weighted_hetlora": lambda round_: factors_of(zero_padded(round_, "size")),
    "rblora_repo_weighted_svd_dist": svd_redistribution,
    "rblora_repo_weighted_svd_dist_othertargets": svd_redistribution,
    "ref_exact_dW": exact,
    "ref_hetlora_sparsity": norm_weighted,
    "ref_rblora_factor": rb_lora_factor,
    "ref_rblora_product": rb_lora_product,
}


# --- the comparison

UP_TO_SIGN = re.compile(r"^(?P<keys>\S+/A) (?:rows )?up to (?:row )?sign\b")


def patterns(case: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The key patterns of a case, and whether rows are compared up to their sign."""
    for text in [*case["compare"], *case.get("subspace", [])]:
        signless = UP_TO_SIGN.match(text)
        yield (signless["keys"] if signless else text).replace("{rank}", "*"), signless is not None


def aligned(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows flipped where that brings them to the expected side."""
    return found * np.where((found * expected).sum(axis=1, keepdims=True) < 0, -1.0, 1.0)


@pytest.mark.skipif(not CASES, reason="../shared/gold is absent")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['case']}")
def test_gold(case: dict[str, Any]) -> None:
    assert case["method"] in HANDLERS, f"unhandled: {case['method']}"
    outputs = load(case["method"], case["case"])
    inputs = {} if "in/g/L0/A" in outputs else load("inputs", case["case"])
    ours = {key: tensor.double().numpy() for key, tensor in HANDLERS[case["method"]](Round(inputs, outputs))}
    for pattern, signless in patterns(case):
        keys = [key for key in outputs if fnmatchcase(key, pattern)]
        assert keys, f"{pattern} names nothing"
        for key in keys:
            assert key in ours, f"{key} is not answered"
            expected = outputs[key].astype(np.float64)
            found = aligned(ours[key], expected) if signless else ours[key]
            assert found.shape == expected.shape, key
            allowed = case["tol"]["atol_rel_to_max"] * np.abs(expected).max() + case["tol"]["rtol"] * np.abs(expected)
            excess = np.abs(found - expected) - allowed
            assert excess.max() <= 0, f"{key}: off by {np.abs(found - expected).max():.3g}"


@pytest.mark.skipif(not CASES, reason="../shared/gold is absent")
def test_every_handler_is_used() -> None:
    assert HANDLERS.keys() == {case["method"] for case in CASES}
