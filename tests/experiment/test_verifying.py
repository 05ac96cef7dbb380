"""An export is held against the run: PEFT's own load of the adapter, Transformers' own of the merged model."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from families import FAMILIES
from polyrank.core.lowrank import Adapter, LowRank, fresh
from polyrank.core.rng import stream
from polyrank.experiment import publishing
from polyrank.local import hf
from polyrank.local.adapters import write_adapter
from polyrank.local.base import Base
from polyrank.local.peft_layers import lost_layers

DEEPSEEK = {
    **tiny.ENCODER,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def trained(folder: Path, config: Any, kind: str, **options: Any) -> Path:
    """A finished run."""
    model = tiny.saved(folder / "model", config, kind)
    file = tiny.experiment(folder, model, kind, **options)
    result = tiny.polyrank("run", file, "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    return trained(folder, transformers.DeepseekV3Config(**DEEPSEEK), "causal", targets="all-linear", export="merged")


def test_layers_that_peft_loses_are_named(mixture: Path, tmp_path: Path) -> None:
    result = tiny.polyrank("export", mixture, "--out", tmp_path / "out")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "loses 9 of 24 layers" in said
    assert "model.layers.0.mlp.gate_proj" in said
    assert "model.layers.2.mlp.shared_experts.down_proj" in said
    assert "--merge`) is right" in said
    assert not (tmp_path / "out").exists()
    assert "loses 9 of 24" in " ".join(tiny.polyrank("evaluate", mixture).stderr.split())


def test_targets_that_peft_would_lose_are_refused(mixture: Path, tmp_path: Path) -> None:
    file = mixture.parent / "experiment.yaml"
    planned = json.loads(tiny.polyrank("plan", file, "--json").stdout)
    assert any("loses 9 of 24 layers" in note for note in planned["notes"])  # the file says that merged is enough
    adapter = ("--set", "model.export=adapter")
    for command in (("plan", file), ("run", file, "--out", tmp_path / "run")):
        result = tiny.polyrank(*command, *adapter)
        message = " ".join(result.stderr.split())
        assert result.exit_code == 2
        assert "model.targets: PEFT" in message
        assert "loses 9 of 24 layers" in message
        assert "model.export: merged" in message
    some = tiny.polyrank("plan", file, *adapter, "--set", "model.targets=[gate_proj]")
    assert "loses 3 of 3 layers" in " ".join(some.stderr.split())
    less = tiny.polyrank("plan", file, *adapter, "--set", "model.targets=attention")
    assert less.exit_code == 0, less.output


@pytest.mark.parametrize("name", ["swin", "mixtral", "qwen2_moe", "clip", "siglip"])
def test_no_layer_is_called_lost_that_peft_loads(name: str) -> None:
    """Families of which Transformers has renamed layers; PEFT's own load of an adapter tells."""
    family = FAMILIES[name]
    size = {"image_size": 32} if family.kind == "image" else {}

    def base(device: str) -> Base:
        kind: Any = family.kind
        return hf.base_from_config(family.make(), "all-linear", kind=kind, classes=3, tokens=0, device=device, **size)

    whole, meta = base("cpu"), base("meta")
    layers = {n: fresh(shape, 1, 1.0, stream(0, "x")) for n, shape in whole.spec.modules.items()}
    adapter = Adapter({n: LowRank(x.A, torch.ones_like(x.B)) for n, x in layers.items()}, whole.initial_head())
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads what Transformers has deprecated
        write_adapter(Path(folder), adapter, whole.info)
        model = PeftModel.from_pretrained(whole.model, folder)
    factors = {n.removeprefix("base_model.model.") for n, x in model.named_parameters() if ".lora_B." in n and x.any()}
    assert {n.split(".lora_B.")[0] for n in factors} == set(layers) - set(lost_layers(meta))
    assert not lost_layers(base("meta"))


def test_the_merged_mixture_is_verified(mixture: Path, tmp_path: Path) -> None:
    result = tiny.polyrank("export", mixture, "--out", tmp_path / "out", "--merge", "--json")
    assert result.exit_code == 0, result.output
    assert "verified: Transformers gives polyrank's logits" in json.loads(result.stdout)["verified"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("kind", "config"), [("text", tiny.bert), ("causal", tiny.llama), ("image", tiny.vit)])
def test_exports_are_verified(kind: str, config: Any, merge: bool, tmp_path: Path) -> None:
    run = trained(tmp_path, config(), kind)
    result = tiny.polyrank("export", run, "--out", tmp_path / "out", *["--merge"] * merge)
    assert result.exit_code == 0, result.output
    loader = "Transformers" if merge else "PEFT"
    assert f"verified: {loader} gives polyrank's logits" in " ".join(result.stdout.split())


def test_an_export_that_is_not_what_was_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is spoilt behind the writer's back: a head's values, which no name tells."""
    run = trained(tmp_path, tiny.bert(), "text")
    write = publishing.write_adapter

    def spoil(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        path = folder / "adapter_model.safetensors"
        tensors = {n: torch.ones_like(x) if "classifier" in n else x.clone() for n, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(publishing, "write_adapter", spoil)
    result = tiny.polyrank("export", run, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "logits differ from polyrank's" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
