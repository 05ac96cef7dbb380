"""What a model is built of, for families of a table: against the numbers of its config, and a forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from families import CONVOLUTIONS, FAMILIES, SIZES, Family
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.images import images_of
from polyrank.local.structure import Structure, backbone_of, blocks_of, is_linear, structure
from polyrank.local.targets import TargetError, resolve_targets


def model_of(family: Family, device: str = "meta") -> nn.Module:
    return family.model(device)


def read(name: str) -> Structure:
    return structure(model_of(FAMILIES[name]))


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_those_that_the_config_counts(name: str) -> None:
    family = FAMILIES[name]
    model = model_of(family)
    found = structure(model)
    assert len(found.blocks) == family.blocks == len(set(found.blocks))
    modules = dict(model.named_modules())
    assert all(any(map(is_linear, modules[block].modules())) for block in found.blocks)
    assert bool(found.attention) == family.attends
    with torch.device("meta"):
        base = hf.base_from_config(
            family.make(), "all-linear", kind=family.kind, classes=3, tokens=16, device="meta", image_size=32
        )
    assert list(base.blocks) == list(found.blocks)
    assert set(base.spec.modules) == set(found.linears)
    assert all(not name.startswith(backbone_of(model)) for name in base.head) or name == "pp_lcnet"
    assert base.causal or base.head
    assert base.spec.covered is not None
    assert 0 < base.spec.covered < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_run_one_after_another_and_adapters_in_them_are_asked(name: str) -> None:
    """A forward pass goes through every block, in the order of the list within each part; every target is run."""
    family = FAMILIES[name]
    model = model_of(family, "cpu")
    base = Base(model, "all-linear", name=name, tokens=8, kind=family.kind, image_size=32)
    ran: list[str] = []
    for part in [*base.blocks, *base.spec.modules]:
        base.modules[part].register_forward_hook(lambda *_, part=part: ran.append(part))
    batch = base.random_batch(2, np.random.default_rng(0))
    with torch.no_grad():
        base.logits(batch, {})
    order = [part for part in dict.fromkeys(ran) if part in base.blocks]
    if name not in ("canine", "xlm", "flaubert"):  # canine's last layer, of characters, stands before the others
        assert order == list(base.blocks)
    assert set(base.spec.modules) - set(ran) == set(base.unused())
    assert (name == "longcat") == bool(base.unused())  # its router multiplies by the classifier's weight itself


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_changes_the_logits_as_its_weights_would(name: str) -> None:
    """Against the same model with B A added to the weights, whatever the family."""
    family = FAMILIES[name]
    base = Base(model_of(family, "cpu"), "all-linear", name=name, tokens=8, kind=family.kind, image_size=32)
    generator = torch.Generator().manual_seed(1)

    def layer(d_out: int, d_in: int, rank: int) -> LowRank:
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        return LowRank(A / d_in**0.5, 0.1 * B)

    unused = base.unused()
    adapter = Adapter({n: layer(*base.spec.modules[n], own) for n, own in base.spec.at(4).items() if n not in unused})
    batch = base.random_batch(2, np.random.default_rng(0))
    with base.attached(adapter) as live, torch.no_grad():
        attached = live(batch)
    plain = base.logits(batch, {})
    for module, x in adapter.layers.items():
        weight: Any = base.modules[module].weight
        update = x.B @ x.A
        weight.data += update if weight.shape == update.shape and type(base.modules[module]) is not Conv1D else update.T
    merged = base.logits(batch, {})
    assert float((merged - plain).abs().max()) > 1e-4 * float(plain.abs().max())
    torch.testing.assert_close(attached, merged, atol=1e-3 * float(merged.abs().max()), rtol=0)


Conv1D = transformers.pytorch_utils.Conv1D


def test_attention_is_what_a_block_attends_with() -> None:
    assert {n.rpartition(".")[2] for n in read("t5").attention} == {"q", "k", "v", "o"}
    assert sum("EncDecAttention" in n for n in read("t5").attention) == 2 * 4
    assert {n.rpartition(".")[2] for n in read("llama").attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {n.rpartition(".")[2] for n in read("mpnet").attention} == {"q", "k", "v", "o"}


def test_a_vision_tower_that_texts_never_reach_is_left_alone() -> None:
    found = read("gemma3-images")
    assert all(name.startswith("model.language_model.") for name in found.linears)
    assert not any("vision" in name for name in found.others)


def test_experts_are_said_and_are_no_targets() -> None:
    found = read("mixtral")
    first, second = list(found.others)[:2]
    assert (first, second) == ("model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj")
    weights = dict(model_of(FAMILIES["mixtral"]).named_parameters())
    assert found.others[first] == sum(t.numel() for n, t in weights.items() if n.endswith("experts.gate_up_proj"))
    linear = sum(d_out * d_in for d_out, d_in in found.linears.values())
    backbone = sum(t.numel() for n, t in weights.items() if n.startswith("model."))
    assert found.elements == backbone
    assert 0.05 < linear / backbone < 0.5


def test_layers_that_are_linear_by_class_alone_are_no_targets() -> None:
    model = model_of(FAMILIES["llama4"])
    router = model.get_submodule("model.layers.0.feed_forward.router")
    assert isinstance(router, nn.Linear)
    assert not is_linear(router)
    assert is_linear(model_of(FAMILIES["falcon"]).get_submodule("transformer.h.0.mlp.dense_h_to_4h"))
    attention = nn.MultiheadAttention(8, 2)
    assert not is_linear(attention.out_proj)


def test_layers_that_mamba_s_kernels_read_past_are_no_targets() -> None:
    found = read("mamba")
    assert {name.rpartition(".")[2] for name in found.linears} == {"in_proj"}
    with pytest.raises(TargetError, match=r"reads the weights of backbone\.layers\.0\.mixer\.out_proj past that layer"):
        resolve_targets("out_proj", found)


def test_blocks_that_are_numbered_attributes_are_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.Linear(4, 4)

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block1, self.block2, self.norm = Layer(), Layer(), nn.LayerNorm(4)
            self.stages = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer()))
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    assert blocks_of(Numbered()) == ["block1", "block2", "stages.0.0", "stages.0.1", "stages.1.0"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_model_of_convolutions_is_refused_with_what_it_is_made_of(name: str) -> None:
    family = CONVOLUTIONS[name]
    with pytest.raises(TargetError, match=r"no linear layer outside its classifier: its weights are .*conv") as refused:
        hf.base_from_config(
            family.make(), "all-linear", kind=family.kind, classes=3, tokens=0, device="meta", image_size=32
        )
    assert family.make().model_type in str(refused.value)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.attends])
def test_a_model_without_attention_says_so(name: str) -> None:
    with pytest.raises(TargetError) as refused:
        resolve_targets("attention", read(name))
    message = str(refused.value)
    assert "no linear layer in its attention" in message
    assert "all-linear" in message
    assert "Did you mean" not in message


def test_a_message_names_no_hundred_layers_and_never_the_same_word() -> None:
    linears = {f"layer{i}": (4, 4) for i in range(100)} | {"q_proj": (4, 4)}
    many = Structure("", linears, (), frozenset(), {}, 1)
    with pytest.raises(TargetError) as refused:
        resolve_targets("attention+mlp", many)
    message = str(refused.value)
    assert "and 89 more" in message
    assert "'attention+mlp'?" not in message
    assert len(message) < 600


# --- images


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind == "image"])
def test_the_positions_of_an_image_are_what_enters_the_first_block(name: str) -> None:
    model = model_of(FAMILIES[name], "cpu")
    seen: list[Tensor] = []
    first = model.get_submodule(blocks_of(model)[0])
    first.register_forward_pre_hook(lambda _, args, named: seen.append((*args, *named.values())[0]), with_kwargs=True)
    found = images_of(model_of(FAMILIES[name]), 32)
    with torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, 32, 32), **found.extra)
    rows = seen[0].ndim == 3 and len(seen[0]) == 1
    assert found.tokens == (seen[0].shape[1] if rows else 0)
    assert (found.size, found.channels) == (32, 3)


def test_a_size_that_is_a_pair_is_one_number_where_it_is_square() -> None:
    assert (
        images_of(model_of(Family("image", "ViT", {**FAMILIES["vit"].values, "image_size": [32, 32]}, 3)), None).size
        == 32
    )
    tall = model_of(Family("image", "ViT", {**FAMILIES["vit"].values, "image_size": [64, 32]}, 3))
    with pytest.raises(hf.ModelError, match="vit takes images of 64 x 32, and polyrank makes square ones"):
        images_of(tall, None)


@pytest.mark.parametrize(("name", "told"), [("vit", True), ("clip", True), ("dinov2", False), ("convnext", False)])
def test_images_of_another_size(name: str, told: bool) -> None:
    """A model is told to interpolate where it asks for it, and only there."""
    for device in ("meta", "cpu"):
        found = images_of(model_of(FAMILIES[name], device), 48)
        assert bool(found.extra) == told
        assert found.size == 48


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_images_of_a_size_that_a_model_does_not_take(device: str) -> None:
    with pytest.raises(hf.ModelError, match=r"model.image_size: 4: vit takes images of 32 x 32 pixels alone"):
        images_of(model_of(FAMILIES["vit"], device), 4)
    with pytest.raises(hf.ModelError, match="a segformer model does not state an image size; give one"):
        images_of(model_of(FAMILIES["segformer"], device), None)


# --- kinds


def test_a_model_of_another_kind_is_told_by_its_name(tmp_path: Path) -> None:
    whisper = transformers.WhisperConfig()
    whisper.save_pretrained(tmp_path)
    with pytest.raises(hf.ModelError) as refused:
        hf.base_from_config(str(tmp_path), "attention", kind="image", classes=3, tokens=8, device="meta")
    message = str(refused.value)
    assert "is a whisper model (WhisperConfig) and cannot be loaded as an image classifier" in message
    assert len(message) < 600
    assert "BertConfig" not in message


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"model_type": "nonesuch"}, "does not know its model_type, 'nonesuch'"),
        ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "m.C"}}, "Python code of its own"),
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "bert", "hidden_size": -4}, "cannot be loaded as a text classifier"),
        ({"model_type": "bert", "hidden_size": "eight"}, "cannot be loaded as a text classifier"),
        ({"model_type": "bert", "num_attention_heads": 7}, "cannot be loaded as a text classifier"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, stated: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(__import__("json").dumps(SIZES | {"vocab_size": 45} | stated))
    with pytest.raises(hf.ModelError, match=said) as refused:
        hf.base_from_config(str(tmp_path), "attention", kind="text", classes=3, tokens=8, device="meta")
    assert len(str(refused.value)) < 500


def test_a_known_model_with_code_of_its_own_runs_without_that_code(tmp_path: Path) -> None:
    FAMILIES["bert"].make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"auto_map": {"AutoModel": "nowhere.Model"},', 1))
    base = hf.base_from_config(str(tmp_path), "attention", kind="text", classes=3, tokens=8, device="meta")
    assert len(base.spec.modules) == 12


def test_a_pair_of_groups_takes_what_there_is_room_for_and_a_name_is_exact() -> None:
    found = read("qwen2_moe")
    chosen, exact = resolve_targets(["all-linear", "shared_expert_gate"], found)
    assert set(chosen) == set(found.linears)
    assert {name.rpartition(".")[2] for name in exact} == {"shared_expert_gate"}
    assert resolve_targets("all-linear", found)[1] == frozenset()


def test_draws_are_the_same_whatever_the_family(tmp_path: Path) -> None:
    """Making a model twice leaves torch's generator alone."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hf.base_from_config(FAMILIES["vit"].make(), "attention", kind="image", classes=3, tokens=0, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert stream(0, "x").integers(9) == stream(0, "x").integers(9)
