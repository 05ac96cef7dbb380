"""Texts that share rows: each is as if it were alone, in every family that takes positions of tokens."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from polyrank.core.federate import plan
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState
from polyrank.data import CausalSplit
from polyrank.data.causal import IGNORED
from polyrank.engines.simulator import Simulator
from polyrank.errors import InputError
from polyrank.local.base import Base
from polyrank.local.packing import check_packing, rows_of
from polyrank.methods import METHODS

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {**WIDE, "intermediate_size": 24},
    "llama": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 24},
    "mistral": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 24, "sliding_window": None},
    "qwen2": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 24},
}


def base_of(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **more: Any) -> Base:
    config = transformers.AutoConfig.for_model(family, **TEXT, **more or FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        return Base(made, "all-linear", name=family, tokens=10)


def texts(count: int = 12) -> CausalSplit:
    """Of 1 to 10 tokens, learnt from the first, second ... on."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 11, size=count)
    ids = rng.integers(3, 40, size=lengths.sum(), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return CausalSplit(ids, offsets, np.arange(count) % 4, np.zeros(count, np.int64), 0)


def trained(base: Base, clients: dict[str, np.ndarray], together: int = 0, **options: Any) -> dict[str, Adapter]:
    """The clients' adapters after a round of plain gradient descent over the texts."""
    rng, method = stream(0, "adapter"), METHODS["fedit"]()
    layers = {name: fresh(shape, 4, 1.0, rng) for name, shape in base.spec.modules.items()}
    local = LocalTraining(epochs=1, optimizer="sgd", lr=1.0, clip=None, **options)
    profiles = {name: ClientProfile(len(own), rank=2 + place) for place, (name, own) in enumerate(clients.items())}
    budgets = method.estimate(profiles, base.spec, local)
    tasks = plan(method, ServerState(0, Adapter(layers)), budgets, list(clients), base.spec, local, 0)
    simulator = Simulator(base, texts(), clients, profiles, together=together)
    return {update.client: update.adapter for update in simulator.fit(tasks)}


def close(one: Adapter, other: Adapter) -> None:
    for name, layer in one.layers.items():
        assert layer.B.any()
        torch.testing.assert_close(layer.A, other.layers[name].A, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer.B, other.layers[name].B, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"batch": 12}, {"batch": 4, "accumulate": 2, "checkpointing": True}], ids=str)
def test_a_round_of_packed_texts_is_that_of_texts_alone(family: str, attention: str, options: dict[str, Any]) -> None:
    base = base_of(family, attention)
    check_packing(base)
    clients = {"a": np.arange(12)}
    close(trained(base, clients, **options)["a"], trained(base, clients, **options, pack=True)["a"])


def test_clients_that_train_together_pack_their_own() -> None:
    base = base_of("llama")
    clients = {"a": np.arange(5), "b": np.arange(5, 12)}
    for options in ({}, {"dropout": 0.5}):  # masks are of a client's own rows and positions
        alone = trained(base, clients, batch=5, pack=True, **options)
        together = trained(base, clients, together=10_000, batch=5, pack=True, **options)
        for name in clients:
            close(alone[name], together[name])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_rows_hold_every_text_once_and_are_few(lengths: list[int]) -> None:
    sizes, part = np.array(lengths), np.arange(len(lengths))[::-1]
    rows = rows_of(part, sizes, pack=True)
    assert sorted(np.concatenate(rows).tolist()) == sorted(part.tolist())
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) == max(lengths)
    assert all(one + other > max(lengths) for place, one in enumerate(filled) for other in filled[:place])
    assert [row.tolist() for row in rows_of(part, sizes, pack=False)] == [[i] for i in part.tolist()]


def test_nothing_asks_for_the_first_token_of_a_text() -> None:
    """By hand: texts of 3, 1 and 2 tokens in a row, and one of 4 in another."""
    ids = np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], np.int32)
    split = CausalSplit(ids, np.array([0, 3, 4, 6, 10]), np.array([0, 0, 1, 2]), np.zeros(4, np.int64), 0)
    batch, x = split.packed([np.array([0, 1, 2]), np.array([3])]), IGNORED
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[x, 6, 7, x, x, 10], [x, x, 13, 14, x, x]]


def test_models_that_cannot_tell_texts_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, dtype in (("llama", torch.bfloat16), ("gpt2", torch.bfloat16)):
        check_packing(base_of(family, dtype=dtype))
    with pytest.raises(InputError, match=r"local.pack: true: bloom .*Valid: false"):
        check_packing(base_of("bloom", "eager", hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(InputError, match="opt does not tell apart"):  # it takes positions, but makes no mask of them
        check_packing(base_of("opt", **WIDE, ffn_dim=24, word_embed_proj_dim=16))
    blind = base_of("llama")
    monkeypatch.setattr(blind, "logits", lambda batch, dense: blind.model(batch["input_ids"]).logits)
    with pytest.raises(InputError, match="does not tell apart"):
        check_packing(blind)


def test_a_classifier_is_refused(tiny_model: Any) -> None:
    with pytest.raises(InputError, match="tells classes"):
        check_packing(Base(tiny_model("bert"), "all-linear", name="tiny", tokens=8))
