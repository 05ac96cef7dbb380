"""The cost model against autograd, against the wire, and against figures that are known from elsewhere."""

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from polyrank.core.architecture import Architecture, Calibration, ModelSpec
from polyrank.core.costs import (
    NoFormulaError,
    base_bytes,
    download_bytes,
    memory,
    record,
    remedies,
    round_seconds,
    saved_bytes,
    training_flops,
    upload_bytes,
)
from polyrank.core.types import ClientProfile, LocalTraining
from polyrank.local.hf import base_from_config

DOCS = Path(__file__).parents[2] / "docs"
MiB = 2**20


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load("memory")


@pytest.fixture(scope="module")
def deit() -> ModelSpec:
    """DeiT-small with its 1000-way head, which is not trained."""
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    base = base_from_config(
        config, ["query", "value"], kind="image", classes=None, tokens=0, device="meta", attention="eager"
    )
    return replace(base.spec, head_trained=False)


def everywhere(spec: ModelSpec, rank: int) -> dict[str, int]:
    return dict.fromkeys(spec.modules, rank)


# --- activations


def test_the_page_is_what_is_measured_and_within_one_percent() -> None:
    classifiers, causal = list(page.rows()), list(page.rows(causal=True))
    assert (len(classifiers), len(causal)) == (52, 18)
    for name, cells in classifiers + causal:
        for got, want in cells:
            assert want == pytest.approx(got, rel=0.01), name
    shown = (DOCS / "memory.md").read_text()
    assert page.page(classifiers, causal) == shown, "run: python docs/memory.py"


@pytest.mark.parametrize("family", page.TARGETS)
def test_activations_are_linear_in_the_batch(family: str) -> None:
    base = page.base_of(family, "tiny", "eager", "all-linear")
    ranks = everywhere(base.spec, 4)
    counts = [saved_bytes(record(base.spec, LocalTraining(batch=b), ranks).ops) for b in (2, 4, 8, 16)]
    shared = counts[0] * 2 - counts[1]  # rotary tables
    assert 0 <= shared < 0.01 * counts[0]
    assert counts[2] - shared == pytest.approx(2 * (counts[1] - shared), abs=8)
    assert counts[3] - shared == pytest.approx(4 * (counts[1] - shared), abs=16)
    got = [page.measured(base, LocalTraining(batch=b), ranks) for b in (2, 4)]
    assert got == counts[:2]


@pytest.mark.parametrize("family", page.TARGETS)
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("lowest", [0, 1])
def test_what_is_not_trained_keeps_nothing(family: str, factors: str, lowest: int) -> None:
    """One factor only; the upper layer only; unequal ranks; half of the modules."""
    base = page.base_of(family, "tiny", "sdpa", "all-linear")
    local = LocalTraining(batch=2)
    modules = [name for name in base.spec.modules if base.spec.blocks.get(name, 9) >= lowest]
    for chosen in (modules, modules[::2], modules[-1:]):
        ranks = {name: 1 + index % 5 for index, name in enumerate(chosen)}
        assert page.predicted(base, local, ranks, factors) == page.measured(base, local, ranks, factors)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=96,
            pad_token_id=0,
            sliding_window=None,
        ),
        transformers.Qwen2Config(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            pad_token_id=0,
        ),
        transformers.ElectraConfig(
            vocab_size=100,
            embedding_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
        ),
        transformers.RobertaConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        ),
        transformers.DeiTConfig(
            image_size=40,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
        ),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_relatives_of_the_five_families(config: transformers.PretrainedConfig, targets: str) -> None:
    kind = "image" if hasattr(config, "patch_size") else "text"
    base = base_from_config(config, targets, kind=kind, classes=3, tokens=page.TOKENS, device="cpu")
    local, ranks = LocalTraining(batch=2), everywhere(base.spec, 4)
    assert page.predicted(base, local, ranks) == pytest.approx(page.measured(base, local, ranks), rel=0.01)


def test_bfloat16_arithmetic_keeps_copies_of_weights_and_inputs() -> None:
    """Autocast of a frozen float32 weight is not cached, so its copy is kept: the formula knows."""
    for family in ("vit", "llama", "gpt2", "bloom"):
        base = page.base_of(family, "tiny", "eager", "all-linear")
        local, ranks = LocalTraining(batch=2, precision="bf16"), everywhere(base.spec, 4)
        with torch.autocast("cpu", torch.bfloat16):
            got = page.measured(base, local, ranks)
        assert page.predicted(base, local, ranks) == pytest.approx(got, rel=0.01)


def test_an_unknown_family_says_so() -> None:
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    spec = base_from_config(config, "attention", kind="text", classes=2, tokens=8, device="meta").spec
    assert spec.architecture.family == ""
    with pytest.raises(NoFormulaError, match="no formula"):
        memory(spec, LocalTraining(), everywhere(spec, 1))
    measured = replace(spec, calibration=Calibration(overhead=1.0, constant=1000.0, per_rank=10.0))
    found = memory(measured, LocalTraining(batch=4), everywhere(spec, 2))
    assert found.activations == 4 * (1000 + 10 * 2 * len(spec.modules))
    assert (found.working, found.overhead) == (0.0, 1.0)


# --- DeiT-small, whose figures are published (HRALoRA) or follow by hand


def test_deit_small_by_part(deit: ModelSpec) -> None:
    local = LocalTraining(batch=32)
    one, two = (memory(deit, local, everywhere(deit, r)) for r in (1, 2))
    assert one.base == pytest.approx(84.117 * MiB, rel=1e-4)
    head = 4 * (384 * 1000 + 1000)
    assert two.adapter - one.adapter == 73_728
    assert one.adapter == 73_728 + head  # the head is carried, not trained
    per_rank = sum(getattr(two, part) - getattr(one, part) for part in ("adapter", "gradients", "optimizer"))
    assert per_rank == 294_912
    assert two.activations - one.activations == 24 * 32 * 197 * 4  # one r-wide input of B per module
    assert one.total == pytest.approx(sum(vars(one).values()))


def test_deit_small_activations_that_do_not_grow_with_the_rank(deit: ModelSpec) -> None:
    rows = 32 * 197 * 384 * 4  # bytes of the residual stream

    def constant(dropout: float) -> float:
        local = LocalTraining(batch=32, dropout=dropout)
        one, two = (memory(deit, local, everywhere(deit, r)).activations for r in (1, 2))
        return 2 * one - two

    # A block keeps 9 streams and its probabilities; the first lacks a norm's input and the queries, which only the
    # keys' gradient would need; the final norm keeps one stream. LoRA adds one shared input a block.
    base = 12 * (9 * rows + 32 * 6 * 197 * 197 * 4) - rows
    assert constant(0.0) - 12 * rows == pytest.approx(base, rel=0.005)
    assert 1330 * MiB == pytest.approx(base, rel=0.006)
    # Dropout: a copy and a byte-mask per module, but no mask where nothing below is trained.
    assert constant(0.1) - constant(0.0) == pytest.approx((12 * 2 * 1.25 - 0.5 - 12) * rows, rel=1e-6)


def test_the_published_memory_rank_follows_from_its_own_coefficients(deit: ModelSpec) -> None:
    """The released estimator's constants (1668.51 MiB, beta2 = 24.5 counted twice) give its published ranks."""
    from polyrank.methods.estimate import by_memory

    line = Calibration(overhead=0.0, constant=1668.51 * MiB / 32, per_rank=2 * 24.5 * 197 * 4 / 24)
    spec = replace(deit, head={}, calibration=line)
    clients = {str(gib): ClientProfile(1, memory=gib * 2**30) for gib in (1.5, 2.0, 2.5)}
    ranks = {gib: budget.rank for gib, budget in by_memory(clients, spec, LocalTraining(batch=32)).items()}
    assert ranks == {"1.5": 0, "2.0": 202, "2.5": 384}


# --- base, optimizer, precision


def test_optimizers_keep_what_they_keep(deit: ModelSpec) -> None:
    def states(**options: object) -> float:
        return memory(deit, LocalTraining(**options), everywhere(deit, 4)).optimizer

    assert states(optimizer="adamw") == 2 * states(optimizer="sgd", momentum=0.9) > 0
    assert states(optimizer="sgd") == 0


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_halves_gradients_states_and_upload(deit: ModelSpec, factors: str) -> None:
    local, ranks = LocalTraining(), everywhere(deit, 8)
    whole, half = memory(deit, local, ranks), memory(deit, local, ranks, factors)
    assert (2 * half.gradients, 2 * half.optimizer) == (whole.gradients, whole.optimizer)
    assert half.adapter == whole.adapter
    assert 2 * upload_bytes(deit, ranks, factors) == upload_bytes(deit, ranks)
    assert half.activations <= whole.activations


def test_quantised_bases_shrink_the_linear_layers_only() -> None:
    made = page.base_of("bert", "base", "sdpa", "attention").spec.architecture
    full, eight, four = (base_bytes(replace(made, quantization=q)) for q in (None, "8bit", "4bit"))
    linear = sum(a * b for a, b in made.linears.values())
    rows = sum(a for a, _ in made.linears.values())
    assert full - eight == 3 * linear - 4 * rows
    assert full - four == pytest.approx((4 - 0.5625) * linear)


# --- seconds


def test_a_round_s_seconds_come_from_bytes_and_operations(deit: ModelSpec) -> None:
    ranks, local = everywhere(deit, 12), LocalTraining(batch=32, epochs=2)
    profile = ClientProfile(100, uplink=7.08e6, downlink=51.1e6, flops=1e12)
    up, down = upload_bytes(deit, ranks), download_bytes(deit, ranks)
    assert up == 884_736
    found = round_seconds(profile, deit, local, ranks, "AB", down, up)
    assert found.upload == pytest.approx(8 * 884_736 / 7.08e6)
    assert found.compute == pytest.approx(training_flops(deit, local, ranks, "AB", 100) / 1e12)
    assert found.total == pytest.approx(found.upload + found.download + found.compute)
    unknown = round_seconds(ClientProfile(100), deit, local, ranks, "AB", down, up)
    assert unknown.total is None


def test_operations_are_those_of_the_matrix_products(deit: ModelSpec) -> None:
    """Forward: 2 per weight and position; backward: as much again for inputs, above the lowest trained layer."""
    linear = sum(a * b for a, b in deit.architecture.linears.values())
    forward = 197 * 2 * linear + 12 * 4 * 197 * 197 * 384
    all_layers = training_flops(deit, LocalTraining(), everywhere(deit, 1), "AB", 1)
    assert all_layers == pytest.approx(3 * forward - 197 * 2 * linear, rel=0.06)
    top = {name: 1 for name in deit.modules if deit.blocks[name] >= 8}
    assert training_flops(deit, LocalTraining(), top, "AB", 1) < 0.75 * all_layers
    again = training_flops(deit, LocalTraining(checkpointing=True), everywhere(deit, 1), "AB", 1)
    assert again == pytest.approx(all_layers + forward, rel=0.01)


def test_steps_stop_a_round_early(deit: ModelSpec) -> None:
    ranks = everywhere(deit, 1)

    def operations(**options: object) -> float:
        return training_flops(deit, LocalTraining(batch=10, **options), ranks, "AB", 25)

    assert operations(epochs=2) == operations(steps=6)  # 10 + 10 + 5, twice
    assert operations(steps=1) == pytest.approx(operations(epochs=1) * 10 / 25)


# --- what would help


def test_remedies_are_enough_and_each_is_needed(deit: ModelSpec) -> None:
    local, one = LocalTraining(batch=32), everywhere(deit, 1)
    room = 600.0 * MiB
    assert memory(deit, local, one).total > room
    advice = remedies(deit, local, "AB", room)
    [batch] = [int(text.split()[1]) for text in advice if text.startswith("batch")]
    assert memory(deit, replace(local, batch=batch), one).total <= room
    assert memory(deit, replace(local, batch=2 * batch), one).total > room
    assert any("checkpointing" in text for text in advice)
    assert memory(deit, replace(local, checkpointing=True), one).total <= room
    assert not any("base" in text for text in advice)  # quantisation alone is not enough here


def test_remedies_combine_and_say_what_is_missing(deit: ModelSpec) -> None:
    local = LocalTraining(batch=32)
    [both] = remedies(deit, local, "AB", 110.0 * MiB)
    assert both == "batch 1, checkpointing, a 8-bit base"
    [missing] = remedies(deit, local, "AB", 30.0 * MiB)
    assert "MiB more" in missing


def test_stored_peaks_meet_the_goals() -> None:
    stored = json.loads((DOCS.parent / "bench" / "results" / "memory.json").read_text())
    for run in stored["runs"]:
        errors = [abs(row["predicted"] / row["measured"] - 1) for row in run["rows"]]
        assert len(errors) >= 12
        assert sum(errors) / len(errors) < 0.05
        assert max(errors) < 0.10


def test_a_larger_rank_never_costs_less() -> None:
    for family, checkpointing in itertools.product(page.TARGETS, (False, True)):
        base = page.base_of(family, "tiny", "sdpa", "all-linear")
        local = LocalTraining(batch=3, dropout=0.1, checkpointing=checkpointing)
        totals = [memory(base.spec, local, everywhere(base.spec, r)).total for r in range(1, 65)]
        assert totals == sorted(totals)
        assert isinstance(base.spec.architecture, Architecture)
