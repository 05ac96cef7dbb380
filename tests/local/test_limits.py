"""What lets causal models train in little memory: it changes no gradient, and the plan knows what it saves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from polyrank.core.architecture import Calibration
from polyrank.core.costs import task_memory
from polyrank.core.federate import plan
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState, Task
from polyrank.data import CausalSplit
from polyrank.engines.simulator import Simulator
from polyrank.experiment.calibrate import calibrate
from polyrank.experiment.loading import parse
from polyrank.local.base import Base
from polyrank.local.losses import asked_alone, losses
from polyrank.local.measure import peak_of
from polyrank.local.trainer import train
from polyrank.methods import METHODS

VOCABULARY = 40
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {**WIDE, "intermediate_size": 24},
    "llama": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 24},
    "opt": {**WIDE, "ffn_dim": 24, "word_embed_proj_dim": 16},
}


def base_of(family: str) -> Base:
    config = transformers.AutoConfig.for_model(family, **TEXT, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Base(transformers.AutoModelForCausalLM.from_config(config), "all-linear", name=family, tokens=10)


def texts(count: int = 12) -> CausalSplit:
    """Of 6 to 10 tokens, learnt from the third, fourth ... on; one of them not at all."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 11, size=count)
    starts = np.arange(count) % 4 + 2
    starts[1] = lengths[1]
    ids = rng.integers(3, VOCABULARY, size=lengths.sum(), dtype=np.int32)
    return CausalSplit(ids, np.concatenate([[0], np.cumsum(lengths)]), starts, np.zeros(count, np.int64), 0)


def adapter_of(base: Base, rank: int = 4) -> Adapter:
    rng = stream(0, "adapter")
    drawn = {name: fresh(shape, rank, 1.0, rng) for name, shape in base.spec.modules.items()}
    filled = {n: torch.from_numpy(rng.normal(0, 0.1, tuple(x.B.shape)).astype(np.float32)) for n, x in drawn.items()}
    return Adapter({name: type(x)(x.A, filled[name], x.scale) for name, x in drawn.items()})


def gradients(base: Base, data: CausalSplit, alone: bool, checkpointing: bool = False) -> tuple[Tensor, list[Tensor]]:
    batch = data.batch(np.arange(6))
    seen = []
    handle = base.output.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    with base.attached(adapter_of(base), factors="AB", checkpointing=checkpointing) as model:
        with asked_alone(base.output if alone else None, batch["labels"]):
            each = losses(model(batch), batch["labels"])
        each.sum().backward()
        handle.remove()
        assert seen == [int(data.targets[:6].sum()) if alone else batch["labels"].numel()]
        return each.detach(), [tensor.grad for tensor in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_computed_only_where_a_token_is_asked(family: str) -> None:
    base, data = base_of(family), texts()
    each, found = gradients(base, data, alone=True)
    whole, due = gradients(base, data, alone=False)
    assert each[1] == 0  # a text that teaches nothing
    assert torch.allclose(each, whole, rtol=1e-5)
    for one, other in zip(found, due, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not base.output._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str) -> None:
    base, data = base_of(family), texts()
    _, found = gradients(base, data, alone=True, checkpointing=True)
    _, due = gradients(base, data, alone=True)
    for one, other in zip(found, due, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_is_one_large_batch(family: str, checkpointing: bool) -> None:
    """A step of plain gradient descent over 12 texts: at once, and in six passes; unequal counts of tokens or not."""
    base, data = base_of(family), texts()
    state = ServerState(0, adapter_of(base))

    def trained(**options: Any) -> Adapter:
        local = LocalTraining(epochs=1, optimizer="sgd", lr=1.0, clip=None, **options)
        profiles = {"a": ClientProfile(12, rank=4)}
        budgets = METHODS["fedit"]().estimate(profiles, base.spec, local)
        tasks = plan(METHODS["fedit"](), state, budgets, ["a"], base.spec, local, 0)
        (update,) = Simulator(base, data, {"a": np.arange(12)}, profiles).fit(tasks)
        return update.adapter

    whole = trained(batch=12)
    parts = trained(batch=2, accumulate=6, checkpointing=checkpointing)
    for name, layer in whole.layers.items():
        assert torch.allclose(layer.A, parts.layers[name].A, atol=1e-5), name
        assert torch.allclose(layer.B, parts.layers[name].B, atol=1e-5), name


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "fp32"), ("float32", "bf16"), ("bfloat16", "fp32")], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_with_a_large_vocabulary_is_as_planned(
    family: str, dtype: str, precision: str, tmp_path: Path
) -> None:
    config = {"model_type": family, **TEXT, **FAMILIES[family], "vocab_size": 20_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    experiment = {
        "rounds": 1,
        "threads": 1,
        "model": {"name": str(tmp_path), "targets": "all-linear", "max_length": 20, "dtype": dtype},
        "data": {"name": "instructions", "clients": 1, "train": "a.parquet", "test": "b.parquet"},
        "fleet": [{"rank": 8}],
        "local": {"batch": 4, "precision": precision},
    }
    for step in calibrate(parse(experiment, "test", tmp_path), [2, 8])["measured"]["steps"]:
        want, got = step["predicted"], step["measured"]
        assert want["activations"] == pytest.approx(got["activations"], rel=0.005)
        assert want["peak"] - want["base"] == pytest.approx(got["peak"] - got["base"], rel=0.02)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("vocabulary", [50, 500], ids="{} tokens".format)
def test_the_peak_of_a_round_counts_gradients_when_they_are_there(
    family: str, checkpointing: bool, accumulate: int, vocabulary: int
) -> None:
    """With a large vocabulary the peak comes before any gradient, unless earlier batches left theirs."""
    config = transformers.AutoConfig.for_model(family, **{**TEXT, **FAMILIES[family], "vocab_size": vocabulary})
    base = Base(transformers.AutoModelForCausalLM.from_config(config), "all-linear", name=family, tokens=16)
    ids, offsets, starts = np.full(16 * 8, 5, np.int32), np.arange(9) * 16, np.zeros(8, np.int64)
    data = CausalSplit(ids, offsets, starts, starts, 0)
    spec = replace(base.spec, calibration=Calibration(overhead=0.0))
    local = LocalTraining(epochs=1, batch=2, accumulate=accumulate, checkpointing=checkpointing, clip=None)
    task = Task(0, adapter_of(base, 16), Adapter(), "AB", local, None, 0)
    added = peak_of(lambda: train(base, task, "c", data, np.arange(8)), base.device)
    planned = task_memory(spec, task)
    assert planned.total - planned.base == pytest.approx(added, rel=0.08)
    assert (planned.apart < 0) == (accumulate == 1)
