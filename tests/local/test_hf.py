"""Adapters on one shared frozen base, for the families of models that differ in how they keep their weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyrank.core.lowrank import Adapter, LowRank, combine, delta, zeros
from polyrank.core.rng import stream
from polyrank.local import attach, hf
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter, write_adapter
from polyrank.local.base import Base
from polyrank.local.targets import TargetError

FAMILIES = ["bert", "bloom", "gpt2", "llama", "vit"]
SAVED = {"bert": "classifier", "gpt2": "score", "vit": "classifier"}
QUERY_VALUE = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"], "vit": ["q_proj", "v_proj"]}

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Models = Callable[[str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]
Adapters = Callable[..., Adapter]


def base_of(model: nn.Module, targets: str | list[str] = "all-linear") -> Base:
    return Base(model, targets, name="tiny")


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def run(base: Base, batch: dict[str, Tensor], adapter: Adapter, frozen: Adapter | None = None) -> Tensor:
    with base.attached(adapter, frozen) as live, torch.no_grad():
        return live(batch)


def with_dense_weights(model: nn.Module, *parts: Adapter) -> nn.Module:
    """A copy of the model with every part written into its weights."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in parts:
            for name, x in part.layers.items():
                turned = isinstance(model.get_submodule(name), Conv1D)
                parameters[f"{name}.weight"] += delta(x).T if turned else delta(x)
            for name, tensor in part.dense.items():
                parameters[name].copy_(tensor)
    return model


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# --- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_adds_its_delta_to_the_weights(
    family: str, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    base = base_of(model)
    adapter = random_adapter(base.spec, (3, 0, 1, 2), head=base.initial_head())
    frozen = random_adapter(base.spec, (0, 2, 5), seed=1)
    assert set(frozen.layers) - set(adapter.layers)
    assert set(adapter.layers) - set(frozen.layers)
    plain = logits_of(model, batch)
    for parts in ([adapter], [Adapter(), frozen], [adapter, frozen]):
        expected = logits_of(with_dense_weights(model, *parts), batch)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(run(base, batch, *parts), expected, atol=2e-5, rtol=1e-4)


def test_a_frozen_head_replaces_the_base_s_and_a_trained_one_wins(
    tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    base = base_of(model)
    one, two = (random_adapter(base.spec, (0,), seed, base.initial_head()) for seed in (1, 2))
    expected = logits_of(with_dense_weights(model, two), batch)
    torch.testing.assert_close(run(base, batch, Adapter(), two), expected)
    torch.testing.assert_close(run(base, batch, two, one), expected)


def test_gqa_keeps_the_narrow_shape_of_the_value_projection(tiny_model: Models) -> None:
    base = base_of(tiny_model("llama"), ["q_proj", "v_proj"])
    assert base.spec.modules["model.layers.0.self_attn.q_proj"] == (16, 16)
    assert base.spec.modules["model.layers.0.self_attn.v_proj"] == (8, 16)


def test_conv1d_has_the_shape_of_the_linear_layer_it_is(tiny_model: Models) -> None:
    base = base_of(tiny_model("gpt2"), "c_attn")
    assert set(base.spec.modules.values()) == {(48, 16)}
    assert base.info.fan_in_fan_out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factors", ["A", "B", "AB", None])
def test_gradients_are_where_they_were_asked_for(
    family: str, factors: str | None, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    base = base_of(model)
    adapter = random_adapter(base.spec, head=base.initial_head())
    frozen = random_adapter(base.spec, seed=1)
    with base.attached(adapter, frozen, factors) as live:
        logits = live(batch)
        assert logits.requires_grad == (factors is not None)
        if factors is not None:
            logits.logsumexp(-1).square().sum().backward()
        for group, trained in ((live.A, "A" in (factors or "")), (live.B, "B" in (factors or ""))):
            assert len(group) == len(base.spec.modules)
            for name, tensor in group.items():
                assert tensor.is_leaf
                assert (tensor.grad is not None and tensor.grad.abs().max() > 0) == trained, name
        assert all((tensor.grad is not None) == (factors is not None) for tensor in live.dense.values())
        due = len(base.spec.modules) * len(factors or "") + (len(base.head) if factors else 0)
        assert len(live.parameters()) == due
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("factors", ["AB", None])
def test_the_layout_of_factors_in_memory_makes_no_difference(
    factors: str | None, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    """A checkpoint and a wire keep values only: what is sent on from memory must give the same bits."""
    base, batch = base_of(tiny_model("bert")), tiny_batch("bert")
    rows = random_adapter(base.spec, (5, 3))
    turned = {name: LowRank(x.A.T.contiguous().T, x.B.T.contiguous().T, x.scale) for name, x in rows.layers.items()}
    assert not any(x.A.is_contiguous() for x in turned.values())
    for one, other in (((rows,), (Adapter(turned),)), ((Adapter(), rows), (Adapter(), Adapter(turned)))):
        with base.attached(*one, factors=factors) as live:
            expected = live(batch)
        with base.attached(*other, factors=factors) as live:
            assert torch.equal(live(batch), expected)
            assert all(tensor.is_contiguous() for tensor in live.tensors())


# --- what is left behind


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_on_the_base(
    family: str, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    before, plain, ids = bytes_of(model), logits_of(model, batch), [id(p) for p in model.parameters()]
    base = base_of(model)
    adapter = random_adapter(base.spec, head=base.initial_head())
    sent = {name: (x.A.clone(), x.B.clone()) for name, x in adapter.layers.items()}
    with base.attached(adapter, random_adapter(base.spec, seed=1), "AB") as live:
        optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
        live(batch).square().sum().backward()
        optimizer.step()
        assert hooks_of(model) > 0
    with pytest.raises(RuntimeError, match="in between"), base.attached(adapter):
        raise RuntimeError("in between")
    assert hooks_of(model) == 0
    assert bytes_of(model) == before
    assert [id(p) for p in model.parameters()] == ids
    assert torch.equal(logits_of(model, batch), plain)
    assert all(torch.equal(x.A, sent[n][0]) and torch.equal(x.B, sent[n][1]) for n, x in adapter.layers.items())


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_one_adapter_after_another_does_not_leak(
    family: str, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    batch = tiny_batch(family)
    shared = base_of(tiny_model(family))
    first = random_adapter(shared.spec, (4, 1), seed=1, head=shared.initial_head())
    second = random_adapter(shared.spec, (0, 2, 1), seed=2)
    run(shared, batch, first, random_adapter(shared.spec, seed=3))
    after = run(shared, batch, second)
    assert torch.equal(after, run(base_of(tiny_model(family)), batch, second))
    assert not torch.equal(after, run(shared, batch, first))


# --- targets


def test_targets_by_name_and_group(tiny_model: Models) -> None:
    bert, vit, gpt2 = tiny_model("bert"), tiny_model("vit"), tiny_model("gpt2")

    def chosen(model: nn.Module, targets: str | list[str]) -> list[str]:
        return list(base_of(model, targets).spec.modules)

    assert chosen(bert, ["query", "value"]) == [
        f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
    ]
    assert chosen(bert, "bert.encoder.layer.1.attention.self.key") == ["bert.encoder.layer.1.attention.self.key"]
    assert len(chosen(bert, "attention")) == 8
    assert len(chosen(bert, "attention+mlp")) == 12
    assert chosen(bert, "all-linear") == [*chosen(bert, "attention+mlp"), "bert.pooler.dense"]
    assert len(chosen(vit, "attention")) == 8
    assert len(chosen(vit, "attention+mlp")) == 12
    assert chosen(gpt2, "attention") == [
        f"transformer.h.{i}.attn.{part}" for i in (0, 1) for part in ("c_attn", "c_proj")
    ]
    assert len(chosen(tiny_model("llama"), "attention+mlp")) == 14
    assert len(chosen(tiny_model("bloom"), "attention")) == 4
    assert not any("classifier" in name or "score" in name for name in chosen(bert, "all-linear"))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("vit", "query", "q_proj"),
        ("vit", "value", "v_proj"),
        ("vit", "attention.output.dense", "o_proj"),
        ("vit", "intermediate.dense", "fc1"),
        ("vit", "output.dense", "fc2"),
        ("bert", "query", "q_proj"),
        ("bert", "key", "k_proj"),
        ("bert", "value", "v_proj"),
        ("bert", "attention.output.dense", "o_proj"),
        ("bert", "intermediate.dense", "fc1"),
    ],
)
def test_old_and_new_names_mean_the_same(family: str, old: str, new: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    assert base_of(model, old).spec.modules == base_of(model, new).spec.modules
    assert len(base_of(model, old).spec.modules) == 2


def test_the_second_layer_of_an_mlp_is_not_the_attention_s_output(tiny_model: Models) -> None:
    names = list(base_of(tiny_model("bert"), "fc2").spec.modules)
    assert names == ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"]


def test_targets_that_match_nothing_are_refused_with_what_would(tiny_model: Models) -> None:
    with pytest.raises(TargetError) as refused:
        base_of(tiny_model("vit"), ["q_proj", "kproj"])
    message = str(refused.value)
    assert "'kproj'" in message
    assert "Did you mean 'k_proj'?" in message
    for would in ("q_proj (2)", "v_proj (2)", "fc1 (2)", "attention+mlp", "all-linear"):
        assert would in message


# --- the head


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", ("classifier.weight", "classifier.bias")),
        ("bloom", ("score.weight",)),
        ("gpt2", ("score.weight",)),
        ("llama", ("score.weight",)),
        ("vit", ("classifier.weight", "classifier.bias")),
    ],
)
def test_the_head_is_what_is_outside_the_backbone(family: str, names: tuple[str, ...], tiny_model: Models) -> None:
    model = tiny_model(family)
    base = base_of(model)
    assert base.head == names
    stored = dict(model.named_parameters())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in base.initial_head().items())


@pytest.fixture
def headless(tmp_path: Path, tiny_model: Models) -> str:
    """A checkpoint of the backbone alone."""
    hf.save_model(tiny_model("bert").bert, tmp_path / "model")
    return str(tmp_path / "model")


def load(name: str, seed: int = 0, kind: str = "text", classes: tuple[str, ...] = ("a", "b", "c")) -> Base:
    return hf.load_base(name, "attention", kind=kind, classes=classes, rng=stream(seed, "head"))


def test_a_missing_head_is_drawn_from_the_stream_alone(headless: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = load(headless).initial_head()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = load(headless).initial_head(), load(headless, seed=1).initial_head()
    assert one["classifier.weight"].shape == (3, 16)
    assert torch.equal(one["classifier.weight"], again["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_a_head_of_the_checkpoint_is_kept_where_it_fits(tmp_path: Path, tiny_model: Models) -> None:
    model = tiny_model("bert")
    hf.save_model(model, tmp_path)
    assert torch.equal(load(str(tmp_path), seed=3).initial_head()["classifier.weight"], model.classifier.weight)
    assert load(str(tmp_path), classes=("a", "b", "c", "d")).initial_head()["classifier.weight"].shape == (4, 16)


def test_what_a_checkpoint_lacks_of_the_backbone_travels_with_the_head(
    tmp_path: Path, tiny_model: Models, tiny_batch: Batches
) -> None:
    """Otherwise the exported adapter would give other answers on the base as anybody else loads it."""
    model = tiny_model("bert")
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if "pooler" not in name}
    hf.save_model(model, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    base = load(str(tmp_path / "model"))
    batch, adapter = tiny_batch("bert"), Adapter({}, base.initial_head())
    layers = {name: zeros(shape, 1) for name, shape in base.spec.modules.items()}
    write_adapter(tmp_path / "adapter", Adapter(layers, adapter.dense), base.info)
    elsewhere = load(str(tmp_path / "model"), seed=1)
    loaded = hf.load_exported(elsewhere, tmp_path / "adapter")
    torch.testing.assert_close(loaded(batch), run(base, batch, adapter))


def test_models_that_cannot_be_used_are_refused(tmp_path: Path, tiny_model: Models) -> None:
    with pytest.raises(hf.ModelError, match="cannot be loaded as a text classifier"):
        load(str(tmp_path))
    hf.save_model(tiny_model("vit"), tmp_path / "vit")
    with pytest.raises(hf.ModelError, match="cannot be loaded as a text classifier"):
        load(str(tmp_path / "vit"))
    with pytest.raises(hf.ModelError, match="no folder"):
        hf.locate("./nowhere")
    with pytest.raises(hf.ModelError, match="'no_such_package' is not installed"):
        hf.locate("package:no_such_package/model")
    with pytest.raises(hf.ModelError, match="has no folder 'nowhere'"):
        hf.locate("package:polyrank/nowhere")
    assert hf.locate(str(tmp_path / "vit")) == str(tmp_path / "vit")
    assert hf.locate("google/vit-base") == "google/vit-base"


# --- dropout


def test_dropout_comes_from_the_stream(tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters) -> None:
    batch = tiny_batch("bert")
    base = base_of(tiny_model("bert"))
    adapter = random_adapter(base.spec)

    def logits(dropout: float, seed: int) -> Tensor:
        with base.attached(adapter, None, "AB", dropout, stream(seed, "fit")) as live, torch.no_grad():
            return torch.cat([live(batch), live(batch)])

    state = torch.get_rng_state()
    once = logits(0.5, 0)
    assert torch.equal(once, logits(0.5, 0))
    assert not torch.equal(once, logits(0.5, 1))
    assert not torch.equal(once[:5], once[5:])
    assert torch.equal(logits(0.0, 0)[:5], run(base, batch, adapter))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_drops_its_share_and_meets_new_masks_in_every_forward_pass() -> None:
    masks = attach.Masks(0.25, [0])
    x = torch.ones(200, 500)
    first, again = masks.drop("q", x), masks.drop("q", x)
    assert first.unique().tolist() == [0, 1]
    assert first.mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(first, again)  # a checkpointed block meets the mask it met before
    assert not torch.equal(first, masks.drop("v", x))
    masks.counted(lambda batch, dense: torch.zeros(()))({}, {})
    assert not torch.equal(first, masks.drop("q", x))


@pytest.mark.parametrize("family", ["bert", "bloom", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(
    family: str, dropout: float, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    base, batch = base_of(tiny_model(family), "all-linear"), tiny_batch(family)
    adapter = random_adapter(base.spec, head=base.initial_head())

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        rng = np.random.default_rng(0)
        with base.attached(adapter, None, "AB", dropout, rng, checkpointing) as live:
            torch.nn.functional.cross_entropy(live(batch), batch["labels"]).backward()
            return [parameter.grad for parameter in live.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain)
    assert all("forward" not in vars(module) for module in base.modules.values())


# --- PEFT's format


@PEFT_IS_BEHIND
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_peft_loads_what_is_exported(
    family: str, tmp_path: Path, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    base = base_of(model, "attention+mlp")
    adapter = random_adapter(base.spec, (3, 0, 1, 2), head=base.initial_head())
    assert len({x.scale * x.rank for x in adapter.layers.values()}) > 2
    write_adapter(tmp_path, adapter, base.info)
    expected = run(base, batch, adapter)
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(model, batch)).abs().max() > 1e-2
    ours = hf.load_exported(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_what_is_exported_reads_back(family: str, tmp_path: Path, tiny_model: Models, random_adapter: Adapters) -> None:
    base = base_of(tiny_model(family))
    adapter = random_adapter(base.spec, (3, 0, 1, 2), head=base.initial_head())
    write_adapter(tmp_path, adapter, base.info)
    found, info = read_adapter(tmp_path)
    assert info == base.info
    assert found.layers.keys() == adapter.layers.keys()
    for name, x in adapter.layers.items():
        assert torch.equal(found.layers[name].A, x.A)
        assert torch.equal(found.layers[name].B, x.B)
        assert found.layers[name].scale == pytest.approx(x.scale, rel=1e-12)
    assert all(torch.equal(found.dense[name], tensor) for name, tensor in adapter.dense.items())


@PEFT_IS_BEHIND
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read(family: str, rslora: bool, tmp_path: Path, tiny_model: Models) -> None:
    model = tiny_model(family)
    targets = QUERY_VALUE[family]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={f"1.*{targets[0]}": 2, targets[1]: 3},
        alpha_pattern={f"0.*{targets[1]}": 5},
        use_rslora=rslora,
        modules_to_save=[SAVED[family]],
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        peft.get_parameter(f"base_model.model.{SAVED[family]}.modules_to_save.default.weight").add_(1.0)
    peft.save_pretrained(str(tmp_path))
    adapter, info = read_adapter(tmp_path)
    modules = {n.removeprefix("base_model.model."): m for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    modules = {name: m for name, m in modules.items() if "default" in m.lora_A}
    assert adapter.layers.keys() == modules.keys()
    assert len({x.rank for x in adapter.layers.values()}) == 3
    for name, module in modules.items():
        expected = module.get_delta_weight("default")
        expected = expected.T if family == "gpt2" else expected
        assert expected.abs().max() > 0
        torch.testing.assert_close(delta(adapter.layers[name]), expected, atol=1e-6, rtol=1e-5)
    weight = peft.get_parameter(f"base_model.model.{SAVED[family]}.modules_to_save.default.weight")
    assert torch.equal(adapter.dense[f"{SAVED[family]}.weight"], weight)
    assert info.modules_to_save == (SAVED[family],)
    assert info.fan_in_fan_out == (family == "gpt2")


def test_an_adapter_beside_a_fold_is_one_adapter(
    tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    batch = tiny_batch("bert")
    base = base_of(tiny_model("bert"))
    adapter, folded = random_adapter(base.spec, (2, 0, 1)), random_adapter(base.spec, (0, 3), seed=1)
    torch.testing.assert_close(
        run(base, batch, combine([folded, adapter])), run(base, batch, adapter, folded), atol=1e-5, rtol=1e-5
    )


# --- folders that are no adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = {f"layer.{i}": LowRank(torch.ones(r, 4), torch.ones(3, r), 0.5) for i, r in enumerate((1, 2))}
    write_adapter(tmp_path / "adapter", Adapter(layers), AdapterInfo("tiny"))
    read_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensor(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


FIRST = "base_model__model__layer__0__lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: set_config(f, use_dora=True), "use_dora = True is more than a plain LoRA"),
        (lambda f: set_config(f, bias="lora_only"), "bias = 'lora_only' is more than a plain LoRA"),
        (lambda f: set_config(f, peft_type="IA3"), "peft_type must be LORA"),
        (lambda f: set_config(f, r=0), "r must be a positive whole number, got 0"),
        (lambda f: set_config(f, lora_alpha="8"), "lora_alpha must be a positive number, got '8'"),
        (lambda f: set_config(f, rank_pattern={}, r=2), "layer layer.0 has rank 1, but adapter_config.json says 2"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"broken" * 9),
            "not a safetensors file",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "not a safetensors file"),
        (lambda f: set_tensor(f, **{f"{FIRST}A__weight": torch.full((1, 4), torch.nan)}), "layer.0 holds NaN"),
        (lambda f: set_tensor(f, **{f"{FIRST}B__weight": torch.full((3, 1), torch.inf)}), "layer.0 holds NaN or inf"),
        (lambda f: set_tensor(f, **{f"{FIRST}A__weight": None}), "layer.0 has lora_B only"),
        (lambda f: set_tensor(f, **{f"{FIRST}A__weight": torch.ones(2, 4)}), "do not fit"),
        (lambda f: set_tensor(f, **{f"{FIRST}magnitude_vector": torch.ones(3)}), "is no factor of a plain LoRA"),
        (
            lambda f: (
                set_config(f, modules_to_save=["head"]),
                set_tensor(f, base_model__model__head__weight=torch.full((2,), torch.nan)),
            ),
            "head.weight holds NaN",
        ),
    ],
)
def test_folders_that_are_no_plain_lora_are_refused(
    damage: Callable[[Path], object], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder)
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)


@PEFT_IS_BEHIND
def test_real_dora_and_bias_adapters_are_refused(tmp_path: Path, tiny_model: Models) -> None:
    for name, options in (("dora", {"use_dora": True}), ("bias", {"bias": "lora_only"})):
        config = LoraConfig(r=2, target_modules=["query"], **options)
        get_peft_model(tiny_model("bert"), config).save_pretrained(str(tmp_path / name))
        with pytest.raises(AdapterError, match="more than a plain LoRA"):
            read_adapter(tmp_path / name)
