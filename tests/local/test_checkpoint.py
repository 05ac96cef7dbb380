"""Folders of models that are not whole: one message, exit code 2, from `run` and from `plan`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from polyrank.core.rng import stream
from polyrank.local import hf
from polyrank.local.checkpoint import entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> the folder of a model; to be copied."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            config = {"text": tiny.bert, "causal": tiny.llama, "image": tiny.vit}[kind]()
            made[kind] = tiny.saved(tmp_path_factory.mktemp(kind) / "model", config, kind)
        return made[kind]

    return folder


@pytest.fixture
def copy(whole: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(whole(kind), tmp_path / "model"))


def cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def longer(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")


def a_page(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!doctype html><html>not found</html>" * 9)


def pointer(name: str) -> Callable[[Path], None]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1044992\n"

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(text)

    return spoil


def sharded(folder: Path) -> dict[str, str]:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def no_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-2.safetensors").unlink()


def another_index(folder: Path) -> None:
    index = sharded(folder) | {"nowhere.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def only_tokenizer(folder: Path) -> None:
    (folder / "config.json").unlink()


SPOILT = [
    (cut_in_half, "model.safetensors: incomplete"),
    (cut_in_header, "model.safetensors: incomplete"),
    (emptied, "model.safetensors: incomplete"),
    (longer, "model.safetensors: not a safetensors file"),
    (a_page, "model.safetensors: incomplete"),
    (pointer("model.safetensors"), "model.safetensors: a pointer of git-lfs"),
    (pointer("pytorch_model.bin"), "pytorch_model.bin: a pointer of git-lfs"),
    (no_shard, "1 of 2 files that model.safetensors.index.json names are missing"),
    (another_index, "has no tensor nowhere.weight"),
    (no_json, "config.json: not JSON"),
    (a_list, "config.json: holds no JSON object, but a list"),
    (no_type, "cannot be loaded as a"),
    (nothing, "the folder is empty"),
    (only_tokenizer, "no config.json; the folder holds"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_broken_folders(
    spoil: Callable[[Path], None], message: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("text")
    spoil(folder)
    said = tiny.refused(tiny.experiment(tmp_path, folder, "text"), "plan", "run")
    assert message in said
    assert "model.name" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("saved_whole", [False, True])
def test_an_adapter_is_no_model(saved_whole: bool, copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("causal")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder if saved_whole else tmp_path / "adapter")
    file = tiny.experiment(tmp_path, folder if saved_whole else tmp_path / "adapter", "causal")
    said = tiny.refused(file, "plan", "run")
    assert "the folder is an adapter" in said
    assert str(tmp_path / "model") in said


def test_a_config_alone_is_enough_to_plan_with(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("text")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    file = tiny.experiment(tmp_path, folder, "text")
    assert tiny.polyrank("plan", file).exit_code == 0
    assert "no weights (model.safetensors)" in tiny.refused(file, "run")


def test_whole_folders_are_read_as_safetensors_has_them(copy: Callable[[str], Path]) -> None:
    folder = copy("causal")
    tensors = load_file(folder / "model.safetensors")
    assert {n: e.shape for n, e in (entries(folder) or {}).items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    sharded(folder)
    assert set(entries(folder) or {}) == set(tensors)
    hf.check_files(str(folder), "causal")


# --- what a checkpoint lacks, and what it has besides


@pytest.mark.parametrize("kind", ["text", "causal", "image"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda key: "module." + key, "begin with 'module.', as saved from DataParallel"),
        (lambda key: "_orig_mod." + key, "begin with '_orig_mod.', as saved from torch.compile"),
        (lambda key: None if ".1." in key else key, "tensors"),
        (lambda key: None if key.endswith("layer.0.output.dense.weight") or ".0.mlp." in key else key, "tensors"),
        (lambda key: None if "embed" in key else key, "tensors"),
        (lambda key: key.replace("bert.", "roberta.").replace("model.", "other.").replace("vit.", "deit."), "instead"),
    ],
    ids=["module", "orig_mod", "block", "layer", "embedding", "other"],
)
def test_a_backbone_that_is_not_whole_is_refused(
    kind: str, spoil: Callable[[str], str | None], message: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny.spoilt(copy(kind), spoil)
    said = tiny.refused(tiny.experiment(tmp_path, folder, kind), "plan", "run")
    assert "lacks" in said
    assert message in said


def test_blocks_and_biases_that_the_config_has_no_place_for(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny.restated(copy("text"), num_hidden_layers=1)
    said = tiny.refused(tiny.experiment(tmp_path, folder, "text"), "plan", "run")
    assert "holds bert.encoder.layer.1" in said
    shutil.rmtree(folder)
    qwen = transformers.Qwen2Config(**{**tiny.ENCODER, "num_key_value_heads": 2})
    tiny.restated(tiny.saved(folder, qwen, "causal"), model_type="llama")
    said = tiny.refused(tiny.experiment(tmp_path, folder, "causal"), "plan", "run")
    assert "model.layers.0.self_attn.k_proj.bias" in said


def test_another_width_than_the_config_s(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny.restated(copy("causal"), intermediate_size=40)
    said = tiny.refused(tiny.experiment(tmp_path, folder, "causal"), "plan", "run")
    assert "does not fit its own config: model.layers.0.mlp.down_proj.weight" in said


def test_a_causal_model_has_to_have_its_head(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny.spoilt(copy("causal"), lambda key: None if key.startswith("lm_head") else key)
    said = tiny.refused(tiny.experiment(tmp_path, folder, "causal"), "plan", "run")
    assert "lacks lm_head.weight" in said
    assert "not a causal language model" in said


BODIES = {
    "bert": lambda: tiny.bert(),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=tiny.ROWS, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(**tiny.ENCODER, relative_attention=True, type_vocab_size=0),
    "albert": lambda: transformers.AlbertConfig(**tiny.ENCODER, embedding_size=8),
    "modernbert": lambda: transformers.ModernBertConfig(**tiny.ENCODER, cls_token_id=2, sep_token_id=3),
    "llama": lambda: tiny.llama(),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=tiny.ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("auto", ["body", "masked"])
def test_a_head_and_a_pooler_may_be_new(family: str, auto: str, tmp_path: Path) -> None:
    """What a checkpoint of a backbone, or of another task, does not have; plan and run agree."""
    config = BODIES[family]()
    if auto == "masked" and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        pytest.skip("predicts no masked tokens")
    torch.manual_seed(0)
    made = transformers.AutoModelForMaskedLM if auto == "masked" else transformers.AutoModel
    made.from_config(config).save_pretrained(tmp_path / "model")
    hf.check_files(str(tmp_path / "model"), "text")
    base = hf.load_base(
        str(tmp_path / "model"), "all-linear", kind="text", classes=("a", "b"), rng=stream(0, "head"), tokens=8
    )
    assert all("layer" not in name for name in base.head)
    if family == "bert" and auto == "masked":
        assert "bert.pooler.dense.weight" in base.head
