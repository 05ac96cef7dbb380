"""LoKr held against PEFT's own: shapes, what is computed, gradients, files, and what the cost model says of it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyrank.core.costs import memory, record, saved_bytes, training_flops
from polyrank.core.lokr import factorise, lokr_elements, lokr_parameters, lokr_shapes
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import LocalTraining
from polyrank.local import hf, lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter, write_adapter
from polyrank.local.base import Base
from polyrank.local.measure import saved_tensors

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SAVED = {"bert": "classifier", "gpt2": "score", "vit": "classifier"}
SHAPES = [(384, 384), (128, 128), (16, 24), (64, 16), (7, 9), (48, 16), (1536, 384)]

Models = Callable[[str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]


def base_of(model: nn.Module, targets: str = "attention+mlp", tokens: int = 0) -> Base:
    return Base(model, targets, name="tiny", tokens=tokens)


def random_lokr(base: Base, rank: int, scale: float = 1.0, seed: int = 0) -> Adapter:
    """An adapter of random factors, w1 included, and a random head."""
    generator = torch_generator(stream(seed, "lokr"))
    shapes = lokr_parameters(base.spec.modules, rank)
    dense = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    head = {n: t + torch.randn(t.shape, generator=generator) * 0.3 for n, t in base.initial_head().items()}
    return Adapter({}, {**dense, **head, **lokr.scales(base.spec.modules, scale)})


def linear_only(model: nn.Module) -> nn.Module:
    """The same model with nn.Linear in place of Conv1D, for which PEFT has no LoKr."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            layer = nn.Linear(*module.weight.shape)
            layer.weight.data, layer.bias.data = module.weight.data.T.clone(), module.bias.data.clone()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
    return model


# --- shapes and first values


def test_dimensions_are_factorised_as_peft_does() -> None:
    assert [factorise(d) for d in range(1, 1200)] == [factorization(d) for d in range(1, 1200)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 12, 24])
def test_shapes_and_first_values_are_peft_s(shape: tuple[int, int], rank: int) -> None:
    d_out, d_in = shape
    model = nn.Sequential(nn.Linear(d_in, d_out))
    peft = get_peft_model(model, LoKrConfig(r=rank, alpha=rank, target_modules=["0"]))
    theirs = {name.split(".")[-2]: p.detach() for name, p in peft.named_parameters() if ".lokr_" in name}
    assert {name: tuple(p.shape) for name, p in theirs.items()} == lokr_shapes(shape, rank)
    ours = lokr.fresh({"m": shape}, rank, stream(0, "adapter"))
    assert not ours["m.lokr_w1"].any()
    assert not theirs["lokr_w1"].any()
    for name, due in theirs.items():
        found = ours[f"m.{name}"]
        bound = found.shape[1] ** -0.5
        assert found.abs().max() <= bound
        if name != "lokr_w1" and found.numel() > 300:
            assert found.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert due.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    again = lokr.fresh({"m": shape}, rank, stream(0, "adapter"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


def test_published_sizes() -> None:
    assert lokr_shapes((384, 384), 24) == {"lokr_w1": (16, 16), "lokr_w2": (24, 24)}
    assert lokr_shapes((128, 128), 24) == {"lokr_w1": (8, 8), "lokr_w2": (16, 16)}
    assert lokr_elements({"q": (384, 384)}, 24) == 832
    deit = {f"{block}.{part}": (384, 384) for block in range(12) for part in ("q", "v")}
    assert lokr_elements(deit, 24) == 19_968


@pytest.mark.parametrize(("shape", "rank"), [((12, 10), 1), ((12, 10), 9), ((7, 9), 2), ((64, 16), 4)])
def test_the_product_is_that_of_the_kronecker_matrix(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in lokr_parameters({"m": shape}, rank).items()
    }
    layer = lokr.grouped({**dense, **lokr.scales(["m"], 1.5)})["m"]
    w2 = layer.w2 if isinstance(layer.w2, Tensor) else layer.w2[0] @ layer.w2[1]
    full = 1.5 * torch.kron(layer.w1, w2)
    assert full.shape == shape
    for size in ((3, shape[1]), (2, 5, shape[1])):
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ full.T)


# --- against PEFT's layers


@PEFT_IS_BEHIND
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (2, 3), (24, 24)])
def test_forward_and_gradients_are_peft_s(
    family: str, rank: int, alpha: float, tmp_path: Path, tiny_model: Models, tiny_batch: Batches
) -> None:
    base, batch = base_of(tiny_model(family)), tiny_batch(family)
    adapter = random_lokr(base, rank, alpha / rank)
    trained = {name: t for name, t in adapter.dense.items() if not lokr.is_scale(name)}
    fixed = {name: t for name, t in adapter.dense.items() if lokr.is_scale(name)}
    with base.attached(Adapter({}, trained), Adapter({}, fixed), "AB") as live:
        ours = live(batch)
        F.cross_entropy(ours, batch["labels"]).backward()
        gradients = {name: tensor.grad for name, tensor in live.dense.items()}
        assert live.dense.keys() == trained.keys()
    write_adapter(tmp_path, adapter, base.info)
    peft = PeftModel.from_pretrained(linear_only(tiny_model(family)), str(tmp_path), is_trainable=True).eval()
    theirs = peft(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    F.cross_entropy(theirs, batch["labels"]).backward()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    found = {
        name.removeprefix("base_model.model.").removesuffix(".default").replace("modules_to_save.default.", ""): p.grad
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == gradients.keys() == trained.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, found[name], atol=2e-5, rtol=1e-3)
    with torch.no_grad(), base.attached(adapter) as live:  # all of it in one adapter, the scales included
        torch.testing.assert_close(live(batch), ours)


def test_fresh_factors_change_nothing_and_nothing_is_left(tiny_model: Models, tiny_batch: Batches) -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        plain = model(**inputs).logits
    base = base_of(model)
    factors = lokr.fresh(base.spec.modules, 4, stream(0, "adapter"))
    with torch.no_grad(), base.attached(Adapter({}, factors)) as live:
        assert torch.equal(live(batch), plain)
    with torch.no_grad(), base.attached(random_lokr(base, 4)) as live:
        assert not torch.allclose(live(batch), plain)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def test_lokr_beside_low_rank_layers_adds_up(
    tiny_model: Models, tiny_batch: Batches, random_adapter: Callable[..., Adapter]
) -> None:
    base, batch = base_of(tiny_model("bert")), tiny_batch("bert")
    kron, low = random_lokr(base, 2), random_adapter(base.spec)
    whole = {name: torch.kron(x.w1, x.w2[0] @ x.w2[1]) if isinstance(x.w2, tuple) else torch.kron(x.w1, x.w2)
             for name, x in lokr.grouped(kron.dense).items()}  # fmt: skip
    dense = {name: LowRank(torch.eye(matrix.shape[1]), matrix) for name, matrix in whole.items()}
    head = {name: tensor for name, tensor in kron.dense.items() if not lokr.is_part(name)}
    with torch.no_grad():
        with base.attached(low, kron) as live:
            found = live(batch)
        with base.attached(low, Adapter(dense, head)) as live:
            torch.testing.assert_close(found, live(batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_checkpointing_gives_the_same_gradients(family: str, tiny_model: Models, tiny_batch: Batches) -> None:
    base, batch = base_of(tiny_model(family)), tiny_batch(family)
    adapter = random_lokr(base, 2)

    def gradients(checkpointing: bool) -> list[Tensor]:
        with base.attached(adapter, None, "AB", 0.0, np.random.default_rng(0), checkpointing) as live:
            F.cross_entropy(live(batch), batch["labels"]).backward()
            return [parameter.grad for parameter in live.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain)


# --- files


@PEFT_IS_BEHIND
@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2), (2, 2), (24, 24)])
def test_peft_loads_what_is_exported(
    family: str, rank: int, alpha: float, tmp_path: Path, tiny_model: Models, tiny_batch: Batches
) -> None:
    base, batch = base_of(tiny_model(family)), tiny_batch(family)
    adapter = random_lokr(base, rank, alpha / rank)
    info = AdapterInfo(base.info.base, base.info.task, False, base.info.modules_to_save, rank)
    write_adapter(tmp_path, adapter, info)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOKR", rank, alpha)
    assert config["modules_to_save"] == [SAVED[family]]
    found, read = read_adapter(tmp_path)
    assert read == info
    assert not found.layers
    assert found.dense.keys() == adapter.dense.keys()
    assert all(torch.equal(found.dense[name], tensor) for name, tensor in adapter.dense.items())
    with torch.no_grad(), base.attached(adapter) as live:
        expected = live(batch)
    with torch.no_grad():
        torch.testing.assert_close(hf.load_exported(base, tmp_path)(batch), expected, atol=1e-5, rtol=1e-5)


@PEFT_IS_BEHIND
def test_what_peft_saves_is_read(tmp_path: Path, tiny_model: Models, tiny_batch: Batches) -> None:
    config = LoKrConfig(
        r=1,
        alpha=3,
        target_modules=["query", "value"],
        rank_pattern={"value": 8},
        alpha_pattern={"0.*query": 5},
        modules_to_save=["classifier"],
        init_weights=False,
    )
    peft = get_peft_model(tiny_model("bert"), config).eval()
    peft.save_pretrained(str(tmp_path))
    batch, base = tiny_batch("bert"), base_of(tiny_model("bert"))
    adapter, info = read_adapter(tmp_path)
    assert info.rank == 1
    scales = {name: layer.scale for name, layer in lokr.grouped(adapter.dense).items()}
    assert sorted(scales.values()) == [3 / 8, 3 / 8, 3, 5]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = peft(**inputs).logits
        with base.attached(adapter) as live:
            torch.testing.assert_close(live(batch), expected, atol=2e-5, rtol=1e-4)
    write_adapter(tmp_path / "again", adapter, info)
    with torch.no_grad():
        again = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "again")).eval()
        torch.testing.assert_close(again(**inputs).logits, expected)


def test_peft_has_no_lokr_for_conv1d(tmp_path: Path, tiny_model: Models) -> None:
    base = base_of(tiny_model("gpt2"))
    write_adapter(tmp_path, random_lokr(base, 2), base.info)
    with pytest.raises(hf.ModelError, match="PEFT has no LoKr for Conv1D layers"):
        hf.load_exported(base, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decompose_both": True}, "decompose_both = True is more than a plain LoKr"),
        ({"decompose_factor": 4}, "decompose_factor = 4 is more than a plain LoKr"),
        ({"alpha": None}, "alpha must be a positive number, got None"),
        ({"r": 3}, "has factors of rank 2, but adapter_config.json says 3"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA or LOKR"),
        ({"peft_type": "LORA", "lora_alpha": 1}, "is more than a plain LoRA: polyrank does not know this key"),
    ],
)
def test_what_is_no_plain_lokr_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    dense = lokr.fresh({"m.a": (384, 384)}, 2, stream(0, "x"))
    write_adapter(tmp_path, Adapter({}, dense), AdapterInfo("tiny", rank=2))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError) as refused:
        read_adapter(tmp_path)
    assert message in str(refused.value)


def test_incomplete_or_mixed_layers_are_refused(tmp_path: Path) -> None:
    dense = lokr.fresh({"m.a": (384, 384)}, 2, stream(0, "x"))
    info = AdapterInfo("tiny")
    for broken, message in (
        ({n: t for n, t in dense.items() if not n.endswith("w1")}, "layer m.a has lokr_w2_a, lokr_w2_b only"),
        ({**dense, "m.a.lokr_w2_b": torch.ones(3, 24)}, r"lokr_w2_a \(24, 2\) and lokr_w2_b \(3, 24\) do not fit"),
        ({**dense, "m.a.lokr_w1": torch.ones(3)}, "layer m.a: the factors of a linear layer are matrices"),
        ({n: t[None] for n, t in dense.items()}, "layer m.a: the factors of a linear layer are matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            lokr.grouped(broken)
    low = LowRank(torch.ones(1, 4), torch.ones(3, 1))
    with pytest.raises(AdapterError, match="has layers of both"):
        write_adapter(tmp_path, Adapter({"m.b": low}, dense), info)


# --- what it costs


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("rank", [1, 24])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(family: str, rank: int, checkpointing: bool, tiny_model: Models) -> None:
    base = base_of(tiny_model(family), tokens=7 if family != "vit" else 5)
    spec = replace(base.spec, lokr=rank)
    local = LocalTraining(batch=4, checkpointing=checkpointing)
    adapter = random_lokr(base, rank)
    rng = stream(0, "memory")
    batch = base.random_batch(local.batch, rng)
    with (
        base.attached(adapter, None, "AB", 0.0, rng, checkpointing) as live,
        saved_tensors([*base.model.parameters(), *live.tensors()]) as kept,
    ):
        F.cross_entropy(live(batch).float(), torch.zeros(4, dtype=torch.int64))
    assert saved_bytes(record(spec, local, {}).ops) == kept.nbytes
    found = memory(spec, local, {})
    trained = 4 * (lokr_elements(spec.modules, rank) + sum(spec.head.values()))
    assert (found.adapter, found.gradients, found.optimizer) == (trained, trained, 2 * trained)
    assert found == memory(spec, local, dict.fromkeys(spec.modules, 9))  # the same at every budget
    assert training_flops(spec, local, {}, "AB", 10) > training_flops(base.spec, local, {}, "AB", 10)
