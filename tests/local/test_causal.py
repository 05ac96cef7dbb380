"""Causal language models of every family: what is learnt of a text, and by how much."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from polyrank.core.federate import absorb, federate, plan
from polyrank.core.lowrank import Adapter, combine, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, Query, ServerState
from polyrank.data import CausalSplit
from polyrank.data.causal import IGNORED
from polyrank.engines.simulator import Simulator
from polyrank.experiment.exported import exported
from polyrank.local.adapters import write_adapter
from polyrank.local.base import Base
from polyrank.local.evaluate import Tokens, predictions
from polyrank.local.hf import load_exported
from polyrank.local.importance import importance
from polyrank.local.losses import losses
from polyrank.methods import METHODS

VOCABULARY = 48
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
_LLAMA = {**_WIDE, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}),
    "gpt_neox": ("GPTNeoX", {**_WIDE, "intermediate_size": 24, "max_position_embeddings": 32}),
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", _LLAMA),
    "opt": ("OPT", {**_WIDE, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "init_std": 0.2}),
    "qwen2": ("Qwen2", _LLAMA),
}


def model_of(family: str) -> nn.Module:
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**_COMMON, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(transformers, f"{name}{head}")(config).eval()


TOGETHER = ("bloom", "gpt2", "llama")
"""Families whose clients share steps in the test of every method; those of the others train alone."""


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base_of(family: str) -> Base:
    return Base(model_of(family), "all-linear", name=family, tokens=12)


def texts(count: int = 24) -> CausalSplit:
    """Texts whose second half repeats the first; the second half is learnt."""
    rng = np.random.default_rng(0)
    halves = [rng.integers(3, VOCABULARY, size=rng.integers(2, 6)) for _ in range(count)]
    rows = [np.concatenate([[1], half, half]) for half in halves]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    starts = np.array([1 + len(half) for half in halves])
    return CausalSplit(np.concatenate(rows).astype(np.int32), offsets, starts, np.arange(count) % 3, 0)


def adapter_of(base: Base, rank: int = 4) -> Adapter:
    return Adapter({name: fresh(shape, rank, 1.0, stream(0, name)) for name, shape in base.spec.modules.items()})


def test_no_head_is_trained_and_every_linear_layer_of_the_backbone_can_be(family: str) -> None:
    base = base_of(family)
    assert base.causal
    assert base.head == ()
    assert base.info.task == "CAUSAL_LM"
    assert len(base.spec.modules) >= 8
    assert not [name for name in base.spec.modules if "lm_head" in name or "embed_out" in name]


def test_a_batchs_losses_are_the_models_own(family: str) -> None:
    """Transformers averages over the tokens of a batch; here every text has its sum."""
    model, data = model_of(family), texts()
    batch = data.batch(np.arange(6))
    due = model(**batch).loss
    with torch.no_grad():
        each = losses(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
    assert each.shape == (6,)
    assert float(each.sum() / data.targets[:6].sum()) == pytest.approx(float(due.detach()), rel=1e-5)


def test_padding_and_company_change_nothing(family: str) -> None:
    base, data = base_of(family), texts()
    with base.attached(adapter_of(base)) as model:
        together = predictions(model, data, tokens=10_000)
        alone = [predictions(model, data, np.array([index])) for index in range(len(data))]
    assert isinstance(together, Tokens)
    assert together.losses == pytest.approx(np.concatenate([one.losses for one in alone]), rel=1e-4)
    assert together.counts.tolist() == data.targets.tolist()
    loss = together.losses.sum() / data.targets.sum()
    assert together.metrics() == pytest.approx(
        {
            "accuracy": together.correct.sum() / data.targets.sum(),
            "loss": loss,
            "perplexity": np.exp(loss),
        }
    )


def test_a_round_of_every_method(family: str, tmp_path: Path) -> None:
    """The base stays as it was, bit for bit; what is exported gives PEFT the same logits."""
    base, data = base_of(family), texts()
    before = copy.deepcopy(base.model.state_dict())
    shares = {"a": np.arange(0, 14), "b": np.arange(14, 20), "c": np.arange(20, 24)}
    profiles = {name: ClientProfile(len(own), rank=rank) for (name, own), rank in zip(shares.items(), (1, 2, 4))}  # noqa: B905
    for name in METHODS:
        method = METHODS[name]()
        if method.form == "lokr":
            continue
        clients = Simulator(base, data, shares, profiles, together=10_000 if family in TOGETHER else 0, holdout=data)
        local = LocalTraining(epochs=2, batch=4, lr=5e-3)
        start = ServerState(0, adapter_of(base))
        steps = federate(method, start, clients, base.spec, local, rounds=1, measure=clients.measure, errors=True)
        ((state, record),) = steps
        assert set(record.losses) <= set(shares)
        assert all(np.isfinite(list(record.losses.values())))
        folder = tmp_path / name
        whole = exported([state.folded, state.adapter])
        write_adapter(folder, whole, base.info)
        batch = data.batch(np.arange(5))
        with torch.no_grad(), base.attached(combine([state.folded, state.adapter])) as model:
            due = model(batch)
            found = load_exported(base_of(family), folder)(batch)
        mask = batch["attention_mask"].bool()
        assert torch.allclose(found[mask], due[mask], atol=1e-4), name
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loss_falls(family: str) -> None:
    base, data = base_of(family), texts()
    clients = Simulator(base, data, {"a": np.arange(24)}, {"a": ClientProfile(24, rank=4)})
    local = LocalTraining(epochs=4, batch=4, lr=2e-2)
    found = [
        record.losses["a"]
        for _, record in federate(
            METHODS["fedit"](), ServerState(0, adapter_of(base)), clients, base.spec, local, rounds=4
        )
    ]
    assert found[-1] < 0.9 * found[0]


def test_a_step_weighs_every_token_alike() -> None:
    """Two texts of unequal length in one step: their mean is over tokens, as Transformers has it."""
    base, data = base_of("llama"), texts()
    state = ServerState(0, adapter_of(base))
    local = LocalTraining(steps=1, batch=24, optimizer="sgd", lr=1.0, clip=None)
    tasks = plan(
        METHODS["fedit"](), state, METHODS["fedit"]().estimate({"a": ClientProfile(24, rank=4)}, base.spec, local),
        ["a"], base.spec, local, 0,
    )  # fmt: skip
    clients = Simulator(base, data, {"a": np.arange(24)}, {"a": ClientProfile(24, rank=4)})
    (update,) = clients.fit(tasks)
    with base.attached(state.adapter, factors="AB") as model:
        batch = data.batch(np.arange(24))
        logits = model(batch)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED).backward()
        name = next(iter(base.spec.modules))
        gradient = model.B[name].grad
    moved = state.adapter.layers[name].B - update.adapter.layers[name].B
    assert torch.allclose(moved, gradient, atol=1e-6)
    absorb(METHODS["fedit"](), state, [update], 0)


@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_importance_is_that_of_the_response(labels: Any) -> None:
    """Against a loop over texts: the squared gradient of a text's log-likelihood."""
    base, data = base_of("llama"), texts()
    adapter = adapter_of(base)
    adapter = Adapter({name: type(x)(x.A, torch.ones_like(x.B) * 0.01, x.scale) for name, x in adapter.layers.items()})
    state, chosen = ServerState(0, adapter), np.arange(7)
    found = importance(base, state, data, chosen, Query("fisher", labels=labels), stream(0, "x"))
    if labels == "sampled":
        other = importance(base, state, data, chosen, Query("fisher"), stream(0, "x"))
        assert found.keys() == other.keys()
        assert found != other
        return
    sums = dict.fromkeys(base.spec.modules, 0.0)
    for index in chosen:
        with base.attached(adapter, factors="AB") as model:
            batch = data.batch(np.array([index]))
            (-losses(model(batch), batch["labels"]).sum()).backward()
            for name in sums:
                sums[name] += float(model.A[name].grad.square().sum() + model.B[name].grad.square().sum()) / len(chosen)
    assert found == pytest.approx(sums, rel=1e-4)
