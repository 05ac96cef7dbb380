"""Bases in 8 and 4 bits by bitsandbytes: loaded, trained on, untouched; and refused where they cannot be."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from polyrank.core.architecture import Quantization
from polyrank.core.costs import base_bytes
from polyrank.core.federate import federate
from polyrank.core.lowrank import Adapter, combine, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState
from polyrank.data import CausalSplit
from polyrank.engines.simulator import Simulator
from polyrank.errors import InputError
from polyrank.experiment.calibrate import calibrate
from polyrank.experiment.exported import exported
from polyrank.experiment.loading import parse
from polyrank.experiment.planning import describe
from polyrank.local.adapters import write_adapter
from polyrank.local.base import Base
from polyrank.local.evaluate import evaluate
from polyrank.local.hf import ModelError, load_base, load_exported
from polyrank.methods import METHODS

installed = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not installed, reason="bitsandbytes is not installed: pip install 'polyrank[quant]'")
# bitsandbytes looks for optional kernels and compiles through what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VOCABULARY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder: Path, quantize: Quantization | None, **options: Any) -> Base:
    kind = {"kind": "causal", "classes": [], "rng": stream(0, "head"), "tokens": 12, **options}
    return load_base(str(folder), "all-linear", quantize=quantize, **kind)


def texts() -> CausalSplit:
    rng = np.random.default_rng(0)
    rows = [np.tile(rng.integers(3, VOCABULARY, size=4), 3) for _ in range(16)]
    offsets = np.arange(17) * 12
    return CausalSplit(np.concatenate(rows).astype(np.int32), offsets, np.full(16, 4), np.zeros(16, np.int64), 0)


@needs_it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantised_base_is_trained_on_and_stays_as_it_is(
    folder: Path, quantize: Quantization, dtype: str, tmp_path: Path
) -> None:
    base, data = loaded(folder, quantize, dtype=dtype), texts()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items() if torch.is_tensor(tensor)}
    start = ServerState(0, Adapter({n: fresh(s, 8, 1.0, stream(0, n)) for n, s in base.spec.modules.items()}))
    profiles = {"a": ClientProfile(10, rank=2), "b": ClientProfile(6, rank=8)}
    clients = Simulator(base, data, {"a": np.arange(10), "b": np.arange(10, 16)}, profiles)
    local = LocalTraining(epochs=4, batch=4, lr=1e-2, checkpointing=True)
    steps = list(federate(METHODS["rb_lora"](), start, clients, base.spec, local, rounds=2))
    state = steps[-1][0]
    for name, tensor in before.items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    with base.attached(start.adapter) as model:
        untrained = evaluate(model, data)["loss"]
    with base.attached(state.adapter) as model, torch.no_grad():
        assert evaluate(model, data)["loss"] < untrained - 0.3
        due = model(data.batch(np.arange(4)))
    write_adapter(tmp_path / "adapter", exported([state.folded, state.adapter]), base.info)
    with torch.no_grad():
        found = load_exported(loaded(folder, quantize, dtype=dtype), tmp_path / "adapter")(data.batch(np.arange(4)))
    assert torch.allclose(found.float(), due.float(), atol=0.1 if dtype == "bfloat16" else 1e-3)
    combine([state.folded, state.adapter])


@needs_it
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_what_is_planned_is_what_is_loaded(folder: Path, quantize: Quantization) -> None:
    base = loaded(folder, quantize)
    made = parse(
        {
            "rounds": 1,
            "model": {"name": str(folder), "targets": "all-linear", "quantize": quantize, "max_length": 12},
            "data": {"name": "instructions", "clients": 2, "train": "a.parquet", "test": "b.parquet"},
            "fleet": [{"rank": 2}],
        },
        "test",
        folder,
    )
    planned = describe(made, made.build_method())
    assert base.spec.architecture == planned.architecture
    assert base.spec.modules == planned.modules
    kept = sum(t.numel() * t.element_size() for t in base.model.parameters())
    for module in base.modules.values():
        # with the first pass, bitsandbytes moves an 8-bit layer's statistics from its weight to its state
        statistics = next(
            (s for at in ("weight", "state") if (s := getattr(getattr(module, at, 0), "SCB", None)) is not None), None
        )
        kept += 4 * statistics.numel() if statistics is not None else 0
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        kept += state.absmax.numel() * state.absmax.element_size() if state is not None else 0
    assert base.spec.architecture is not None
    assert base_bytes(base.spec.architecture) == kept


@needs_it
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_profile_measures_the_quantised_base(folder: Path, quantize: Quantization) -> None:
    experiment = {
        "rounds": 1,
        "model": {"name": str(folder), "targets": "all-linear", "max_length": 12, "quantize": quantize},
        "data": {"name": "instructions", "clients": 1, "train": "a.parquet", "test": "b.parquet"},
        "fleet": [{"rank": 8}],
    }
    for step in calibrate(parse(experiment, "test", folder), [2, 8])["measured"]["steps"]:
        assert step["predicted"]["base"] == pytest.approx(step["measured"]["base"], rel=0.1)  # scales are no parameters


@needs_it
def test_a_classifier_keeps_its_head_as_it_is(folder: Path) -> None:
    base = loaded(folder, "4bit", kind="text", classes=["no", "yes"])
    assert base.head == ("score.weight",)
    assert base.initial_head()["score.weight"].shape == (2, 64)
    assert {type(base.modules[name]).__name__ for name in base.spec.modules} == {"Linear4bit"}


def test_where_it_is_unsupported_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    if installed:
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"quantize: 4bit: transformer.h.0.attn.c_attn of gpt2 is a Conv1D"):
            loaded(tmp_path, "4bit")
        with pytest.raises(InputError, match=r"quantize: 8bit: bitsandbytes .* does not run on meta, but on cpu"):
            loaded(folder, "8bit", device="meta")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(InputError, match=r"model.quantize: 8bit: bitsandbytes is not installed"):
        loaded(folder, "8bit")


def test_half_precision_is_refused_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.dtype: float16: training on a CPU takes float32 or bfloat16"):
        loaded(folder, None, dtype="float16")
    transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.dtype: float16"):
        loaded(tmp_path, None, dtype="auto")


@needs_it
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_biases_stay_as_they_are_under_autocast(quantize: Quantization, tmp_path: Path) -> None:
    """OPT's layers have biases, which bitsandbytes would take over into bfloat16."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    base, data = loaded(tmp_path, quantize), texts()
    before = {name: tensor.clone() for name, tensor in base.model.named_parameters()}
    start = ServerState(0, Adapter({n: fresh(s, 4, 1.0, stream(0, n)) for n, s in base.spec.modules.items()}))
    clients = Simulator(base, data, {"a": np.arange(16)}, {"a": ClientProfile(16, rank=4)})
    local = LocalTraining(steps=2, batch=4, precision="bf16")
    ((_, record),) = federate(METHODS["fedit"](), start, clients, base.spec, local, rounds=1)
    assert np.isfinite(record.losses["a"])
    for name, tensor in base.model.named_parameters():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
