"""Adapters of PEFT: what their configs say is honoured or refused by name, whichever variant PEFT has made.

Everything is held against PEFT itself: a fresh base with the adapter that PEFT has saved, loaded by PEFT, and the same
base with what `polyrank merge` makes of that adapter alone and of it with itself.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    EvaConfig,
    LoKrConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.experiment.loading import method_with
from polyrank.experiment.merging import merge
from polyrank.local import patterns
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter, write_adapter
from polyrank.local.fingerprint import fingerprint
from polyrank.local.peft_config import REFUSED, TASKS, UNDERSTOOD, check_names
from polyrank.local.same_model import under_names

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of variants
]
Config = dict[str, Any]
TEXT = torch.arange(12)[None]


def tiny_llama(vocabulary: int = 40, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TEXT).logits


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with other values in all that PEFT has added or trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def texts() -> Any:
    return [{"input_ids": torch.arange(i, i + 12)[None]} for i in range(8)]


def saved(folder: Path, options: Config, seed: int = 1, model: nn.Module | None = None) -> Path:
    """An adapter that PEFT has made, trained (by chance) and saved."""
    lokr = options.get("kind") == "lokr"
    options = {key: value for key, value in options.items() if key != "kind"}
    common = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = (LoKrConfig if lokr else LoraConfig)(**{**common, **options})
    base = tiny_llama() if model is None else model
    _prepare(base, config)
    peft = get_peft_model(base, config)
    if options.get("init_lora_weights") == "eva":
        loader = torch.utils.data.DataLoader([{"input_ids": t["input_ids"][0]} for t in texts()], batch_size=2)
        initialize_lora_eva_weights(peft, loader, show_progress_bar=False)
    shaken(peft, seed).save_pretrained(str(folder))
    return folder


def _prepare(base: nn.Module, config: Any) -> None:
    """What some starts want to know of the base and its data."""
    if config.__dict__.get("init_lora_weights") == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: [base(**text) for text in texts()])
    if config.__dict__.get("init_lora_weights") == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        def step() -> None:
            for text in texts():
                base(**text, labels=text["input_ids"]).loss.backward()

        preprocess_loraga(base, config, step)


def loaded(folder: Path, base: nn.Module | None = None) -> Tensor:
    return logits(PeftModel.from_pretrained(tiny_llama() if base is None else base, str(folder)))


def merged(folders: list[Path], out: Path) -> Path:
    result = merge(folders, method_with("rb_lora", []))
    write_adapter(out, result.whole(), result.info)
    return out


# --- every field of PEFT's configs

FIELDS = [
    (kind, field.name)
    for kind, config in (("LORA", LoraConfig), ("LOKR", LoKrConfig))
    for field in dataclasses.fields(config)
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_of_the_installed_peft_is_decided(kind: str, name: str) -> None:
    """A new field in a new PEFT: read what load and forward do with it, then put it into one of the tables."""
    assert (name in UNDERSTOOD[kind]) != (name in REFUSED[kind])


def test_every_task_and_start_of_the_installed_peft_is_decided() -> None:
    assert set(TASKS) == {task.value for task in TaskType}
    hints = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    starts = {name for hint in hints for name in typing.get_args(hint)}
    fresh = {"gaussian", "eva", "orthogonal", "mica"}
    assert starts <= fresh | {"olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq", "lora_ga"}
    check, _ = UNDERSTOOD["LORA"]["init_lora_weights"]
    assert {start for start in starts if check(start)} == fresh


def test_what_peft_writes_of_a_config_without_options_is_understood(tmp_path: Path) -> None:
    for kind in ("lora", "lokr"):
        assert read_adapter(saved(tmp_path / kind, {"kind": kind, "r": 2}))[1].task == "CAUSAL_LM"


# --- every variant that PEFT can make

KEPT: dict[str, Config] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"layers.0.self_attn.v_proj": 3, "v_proj": 2},  # PEFT sorts the keys as it saves
        "alpha_pattern": {r"layers\.1\..*": 3, "self_attn.v_proj": 5},
    },
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "random": {"r": 4, "init_lora_weights": False},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    "eva": {"r": 4, "init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    "dropout": {"r": 4, "lora_dropout": 0.3},
    "some_layers": {"r": 4, "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"r": 4, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "expression": {"r": 4, "target_modules": r".*\.[qk]_proj"},
    "all_linear": {"r": 4, "target_modules": "all-linear"},
    "head": {"r": 4, "modules_to_save": ["lm_head"]},
}
VARIANTS: dict[str, tuple[Config, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    "corda": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "init_lora_weights = 'corda'"),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, "init_lora_weights = 'lora_ga'"),
    "dora": ({"use_dora": True}, "use_dora = True"),
    "bias": ({"bias": "all"}, "bias = 'all'"),
    "bias_lora": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias = True"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens = [5, 6]"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices = [3, 4]"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = [[0, 2], [1, 2]]"),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "tying": ({"ensure_weight_tying": True}, "ensure_weight_tying = True"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "decompose_both": ({"kind": "lokr", "decompose_both": True}, "decompose_both = True"),
    "decompose_factor": ({"kind": "lokr", "decompose_factor": 2}, "decompose_factor = 2"),
    "convolutions": ({"kind": "lokr", "use_effective_conv2d": True}, "use_effective_conv2d = True"),
}


@pytest.mark.parametrize("variant", KEPT)
def test_a_merge_with_itself_computes_what_peft_computes(variant: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", KEPT[variant])
    expected = loaded(folder)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-2
    for name, folders in (("one", [folder]), ("two", [folder, folder])):
        torch.testing.assert_close(loaded(merged(folders, tmp_path / name)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_refused_by_name(variant: str, tmp_path: Path) -> None:
    options, part = VARIANTS[variant]
    folder = saved(tmp_path / "a", {"r": 2, **options})
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder)
    assert part in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_a_start_that_changes_the_base_is_merged_after_the_conversion_that_is_advised(
    start: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
    _prepare(base, config)
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    expected = logits(shaken(model))
    model.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = start
    torch.testing.assert_close(loaded(merged([tmp_path / "out"], tmp_path / "m")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["loftq", "pissa_niter_16", "kaiming_of_tomorrow"])
def test_starts_are_refused_that_this_machine_cannot_make(start: str, tmp_path: Path) -> None:
    folder = plain(tmp_path / "a")
    set_config(folder, init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{start}' is more than a plain LoRA"):
        read_adapter(folder)


@pytest.mark.parametrize("key", [*REFUSED["LORA"], "a_key_of_tomorrow"])
def test_other_keys_are_refused_unless_they_say_nothing(key: str, tmp_path: Path) -> None:
    folder = plain(tmp_path / "a")
    for nothing in (None, False, "", [], {}):
        set_config(folder, **{key: nothing})
        read_adapter(folder)
    for value in (True, 1, 0.5, "on", [1], {"a": 1}, 0):
        set_config(folder, **{key: value})
        with pytest.raises(AdapterError, match=f"{key} = .* is more than a plain LoRA"):
            read_adapter(folder)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_families_are_merged_as_they_are(
    family: str, tmp_path: Path, tiny_model: Callable[[str], nn.Module], tiny_batch: Callable[[str], dict[str, Tensor]]
) -> None:
    targets = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}[family]
    config = LoraConfig(r=3, target_modules=targets, task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2")
    shaken(get_peft_model(tiny_model(family), config)).save_pretrained(str(tmp_path / "a"))
    inputs = {name: tensor for name, tensor in tiny_batch(family).items() if name != "labels"}
    out = merged([tmp_path / "a", tmp_path / "a"], tmp_path / "m")
    with torch.no_grad():
        one, two = (
            PeftModel.from_pretrained(tiny_model(family), str(folder)).eval()(**inputs).logits
            for folder in (tmp_path / "a", out)
        )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["modules_to_save", "save_embedding_layers"])
def test_grown_embeddings_are_kept(how: str, tied: bool, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def grown() -> nn.Module:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(45)
        return model

    whole = {"modules_to_save": ["embed_tokens"] + ["lm_head"] * (not tied)} if how == "modules_to_save" else {}
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **whole)
    model = shaken(get_peft_model(grown(), config))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(str(tmp_path / "a"), **({"save_embedding_layers": True} if not whole else {}))
    merged([tmp_path / "a"], tmp_path / "m")
    torch.testing.assert_close(loaded(tmp_path / "m", grown()), loaded(tmp_path / "a", grown()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"r": 1, "alpha": 3}, {"r": 1, "init_weights": "lycoris", "rank_dropout": 0.1}])
def test_a_lokr_is_read_and_written_as_peft_computes_it(options: Config, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", {"kind": "lokr", **options})
    adapter, info = read_adapter(folder)
    write_adapter(tmp_path / "b", adapter, info)
    torch.testing.assert_close(loaded(tmp_path / "b"), loaded(folder), atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="a LoKr adapter; only LoRA adapters can be merged"):
        merge([folder], method_with("rb_lora", []))


# --- patterns

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "1", "(a|b)", "(a+)", "(?:a|)", "a{2}", "(ab)*", "(a*)*", "^"]
ATOMS += ["$", ".*", ".+", "a?", "(a.b)", "|", "b{1,2}", "a*?", "[0-9]+"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=4).map("".join), st.text("ab.1", max_size=7))
def test_patterns_match_as_peft_matches_them(pattern: str, name: str) -> None:
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return
    patterns.check_patterns([pattern])
    assert bool(patterns.value_of({pattern: 1}, name, 0)) == expected


def test_a_pattern_cannot_take_long(tmp_path: Path) -> None:
    name = "a" * 200
    write_adapter(tmp_path, Adapter({name: LowRank(torch.ones(1, 4), torch.ones(3, 1), 1.0)}), AdapterInfo("tiny"))
    start = time.monotonic()
    for pattern in ("(a+)+b", "((a*)*)*b", ".*" * 20 + "x", "(" * 8 + "a?" + "){100}" * 8, "(a|aa)+b"):
        set_config(tmp_path, rank_pattern={pattern: 3}, alpha_pattern={pattern: 3})
        with contextlib.suppress(AdapterError):  # of rank 3, where the pattern matches
            assert read_adapter(tmp_path)[0].layers[name].rank == 1
    assert time.monotonic() - start < 5


def test_neither_can_many_patterns(tmp_path: Path) -> None:
    layers = {f"layer{number}.{'a' * 100}": LowRank(torch.ones(1, 4), torch.ones(3, 1), 1.0) for number in range(20)}
    write_adapter(tmp_path, Adapter(layers), AdapterInfo("tiny"))
    many = {f"{number}(a+)+" + "a?" * 90 + "b": 1 for number in range(40)}
    begun = time.process_time()
    set_config(tmp_path, rank_pattern=dict(list(many.items())[:32]))
    read_adapter(tmp_path)
    assert time.process_time() - begun < 5
    names = {f"name{number}": 1 for number in range(10_001)}
    for patterns_, message in ((many, "40 regular expressions, more than 32"), (names, "10001 names, more than 10000")):
        set_config(tmp_path, rank_pattern=patterns_)
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["(?=a)", "(?i)a", r"(a)\1", r"\b", "(", "[", "a**", "a)(b", "(" * 9 + ")" * 9, "+" * 2000]
)
def test_patterns_that_are_not_supported_are_refused_by_name(pattern: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    set_config(folder, alpha_pattern={pattern: 2})
    with pytest.raises(AdapterError, match=r"adapter_config\.json: alpha_pattern: '"):
        read_adapter(folder)


# --- keys of the weights


def plain(folder: Path, seed: int = 1, layers: tuple[str, ...] = ("model.layers.0.q", "model.layers.1.q")) -> Path:
    """A plain adapter, without a model."""
    generator = torch.Generator().manual_seed(seed)
    lowrank = {
        n: LowRank(torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)) for n in layers
    }
    write_adapter(folder, Adapter(lowrank), AdapterInfo("tiny"))
    return folder


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_keys(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)


PREFIX = "base_model.model."
WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled_inside": lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled_layers": lambda k: k.replace(".q.", ".q._orig_mod."),
    "parallel": lambda k: f"module.{k}",
    "parallel_inside": lambda k: k.replace(PREFIX, f"{PREFIX}module."),
    "fsdp": lambda k: f"_fsdp_wrapped_module.{k.replace('layers.0', 'layers.0._checkpoint_wrapped_module')}",
    "lightning": lambda k: f"model.{k}",
    "twice": lambda k: PREFIX + k,
    "thrice": lambda k: f"module.{PREFIX}_orig_mod.{PREFIX}{k}",
    "none": lambda k: k.removeprefix(PREFIX),
    "default": lambda k: k.replace(".weight", ".default.weight"),
    "named": lambda k: k.replace(".weight", ".client3.weight"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off_names(wrapper: str, tmp_path: Path) -> None:
    expected, _ = read_adapter(plain(tmp_path))
    set_keys(tmp_path, WRAPPED[wrapper])
    found, _ = read_adapter(tmp_path)
    assert found.layers.keys() == expected.layers.keys()
    assert all(torch.equal(found.layers[name].B, x.B) for name, x in expected.layers.items())


def test_keys_that_are_not_understood_are_refused_by_name(tmp_path: Path) -> None:
    plain(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    layer = f"{PREFIX}model.layers.0.q"
    for key in (
        f"{layer}.lora_magnitude_vector",
        f"{layer}.lora_embedding_A",
        f"{layer}.lora_B.bias",
        f"{layer}.base_layer.weight",
        f"{layer}.lora.down.weight",
        f"{layer}.lokr_w1",
        f"{PREFIX}score.weight",
        f"{PREFIX}score.original_module.weight",
        f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta",
        f"module.{layer}.lora_A.weight",
        f"{layer}.lora_A.other.weight",
    ):
        save_file({**tensors, key: torch.zeros(2, 4)}, path)
        with pytest.raises(AdapterError) as refused:
            read_adapter(tmp_path)
        assert key in str(refused.value)


def test_parameters_of_saved_modules_are_kept_as_peft_names_modules(tmp_path: Path) -> None:
    plain(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    set_config(tmp_path, modules_to_save=["head", "pooler.dense"])
    for key, name in (
        ("score_head.weight", "score_head.weight"),
        ("head.out.bias", "head.out.bias"),
        ("head.modules_to_save.default.out.bias", "head.out.bias"),
        ("bert.pooler.dense.weight", "bert.pooler.dense.weight"),
    ):
        save_file({**tensors, PREFIX + key: torch.ones(2)}, path)
        assert list(read_adapter(tmp_path)[0].dense) == [name]
    save_file({**tensors, f"{PREFIX}pooler.other.weight": torch.ones(2)}, path)
    with pytest.raises(AdapterError, match=r"modules_to_save, which is head, pooler\.dense"):
        read_adapter(tmp_path)


def test_an_adapter_to_start_from_takes_the_models_names(tmp_path: Path) -> None:
    nested, _ = read_adapter(plain(tmp_path, layers=("language_model.model.layers.0.q", "other.q")))
    assert set(under_names(nested, ["model.layers.0.q", "model.layers.1.q"]).layers) == {"model.layers.0.q", "other.q"}
    assert set(under_names(nested, [*nested.layers, "model.layers.0.q"]).layers) == set(nested.layers)


# --- files


def test_a_pickle_is_not_loaded_and_the_command_converts_it(tmp_path: Path) -> None:
    folder = plain(tmp_path / "it's a [folder]")
    expected, _ = read_adapter(folder)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin can run code when it is loaded") as refused:
        read_adapter(folder)
    command = str(refused.value).partition("convert it: ")[2]
    assert command.startswith("python -c ")
    shell = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(shell, shell=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found, _ = read_adapter(folder)
    assert all(torch.equal(found.layers[name].A, x.A) for name, x in expected.layers.items())


def sharded(folder: Path, index: bool) -> list[Path]:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name)
    if index:
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return [folder / name for name in names]


@pytest.mark.parametrize("index", [False, True])
def test_shards_are_read_whole_or_not_at_all(index: bool, tmp_path: Path) -> None:
    expected, _ = read_adapter(plain(tmp_path))
    shards = sharded(tmp_path, index)
    found, _ = read_adapter(tmp_path)
    assert all(torch.equal(found.layers[name].A, x.A) for name, x in expected.layers.items())
    if index:
        left = load_file(shards[1])
        save_file(dict(list(left.items())[1:]), shards[1])
        with pytest.raises(AdapterError, match="is not both in the index and in a shard"):
            read_adapter(tmp_path)
    shards[0].unlink()
    with pytest.raises(AdapterError, match=f"no {shards[0].name}, which is one of 2 shards"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("named", [["../x.safetensors"], {"a": "/etc/passwd"}, {"a": 3}, None])
def test_an_index_names_shards_of_its_folder(named: object, tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(AdapterError, match="weight_map must map tensors to files"):
        read_adapter(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def test_what_is_there_instead_is_said(tmp_path: Path) -> None:
    plain(tmp_path / "out" / "checkpoint-50")
    plain(tmp_path / "out" / "checkpoint-60" / "default")
    for name in ("weights_pointer", "config_pointer", "empty", "none", "other"):
        plain(tmp_path / name)
    (tmp_path / "weights_pointer" / "adapter_model.safetensors").write_text(POINTER)
    (tmp_path / "config_pointer" / "adapter_config.json").write_text(POINTER)
    (tmp_path / "empty" / "adapter_model.safetensors").write_bytes(b"")
    for name in ("none", "other"):
        (tmp_path / name / "adapter_model.safetensors").unlink()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name, part in {
        "out": "adapters in folders below: checkpoint-50, checkpoint-60/default; give one of these",
        "weights_pointer": "adapter_model.safetensors: a pointer of git-lfs, not the file; `git lfs pull`",
        "config_pointer": "adapter_config.json: a pointer of git-lfs",
        "empty": "adapter_model.safetensors: not a safetensors file: it is empty",
        "none": "no adapter_model.safetensors (a PEFT adapter folder has",
        "other": "there is model.safetensors",
        "base": "holds a model, not an adapter",
        "nowhere": "no such folder",
        "empty/adapter_config.json": f"is a file; give the folder that holds adapter_config.json and "
        f"adapter_model.safetensors: {tmp_path / 'empty'}",
    }.items():
        with pytest.raises(AdapterError) as refused:
            read_adapter(tmp_path / name)
        assert str(refused.value).startswith(str(tmp_path / name))
        assert part in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floating_point_numbers_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    plain(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    found, _ = read_adapter(tmp_path)
    for name, x in found.layers.items():
        assert torch.equal(x.A.double(), tensors[f"{PREFIX}{name}.lora_A.weight"].double())
        assert x.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    write_adapter(tmp_path / "again", *read_adapter(tmp_path))
    read_adapter(tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_numbers_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    plain(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = max(tensors)
    save_file({**tensors, key: tensors[key].to(dtype)}, path)
    with pytest.raises(AdapterError, match=re.escape(key)):
        read_adapter(tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F6_E2M3", "U128", "X", 3])
def test_types_that_torch_has_not_are_refused(dtype: object, tmp_path: Path) -> None:
    plain(tmp_path)
    header = json.dumps({"a.lora_A.weight": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: "):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ((2, 4, 3), (3, 2, 1), "of a convolution"),
        ((2, 4, 3, 3), (3, 2, 1, 1), "of a convolution"),
        ((0, 4), (3, 0), "do not fit"),
        ((8,), (3, 2), "do not fit"),
        ((), (), "do not fit"),
    ],
)
def test_factors_are_matrices(A: tuple[int, ...], B: tuple[int, ...], message: str, tmp_path: Path) -> None:
    plain(tmp_path, layers=("m",))
    keys = [f"{PREFIX}m.lora_{factor}.weight" for factor in "AB"]
    save_file(dict(zip(keys, (torch.ones(A), torch.ones(B)), strict=True)), tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=rf"layer m: lora_A .* {message}"):
        read_adapter(tmp_path)


# --- the config's form


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": True}, "r must be a positive whole number, got True"),
        ({"r": 2.0}, "r must be a positive whole number, got 2.0"),
        ({"r": "2"}, "r must be a positive whole number, got '2'"),
        ({"r": None}, "r must be a positive number, got None"),
        ({"lora_alpha": False}, "lora_alpha must be a positive number"),
        ({"lora_alpha": 10**400}, "a whole number has more than 300 digits"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive number, got -1"),
        ({"rank_pattern": [2]}, "rank_pattern must be a mapping of module names to positive whole numbers, got [2]"),
        ({"rank_pattern": {"q": 2.5}}, "rank_pattern must be a mapping"),
        ({"alpha_pattern": {"q": True}}, "alpha_pattern must be a mapping"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern must be a mapping"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"target_modules": {"q": 1}}, "target_modules must be a name or a list of names"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false, got 1"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path must be a text"),
        ({"task_type": "CHAT"}, "task_type must be one of SEQ_CLS, "),
        ({"task_type": ["SEQ_CLS"]}, "task_type must be one of SEQ_CLS, "),
        ({"lora_dropout": 2}, "lora_dropout must be a number from 0 to 1, got 2"),
        ({"init_lora_weights": 1}, "init_lora_weights must be true, false"),
        ({"bias": ["none"]}, 'bias must be "none"'),
        ({"peft_type": ["LORA"]}, "peft_type must be LORA or LOKR, got ['LORA']"),
        ({"peft_type": None}, "peft_type must be LORA or LOKR, got None"),
    ],
)
def test_values_are_of_their_type(change: Config, message: str, tmp_path: Path) -> None:
    plain(tmp_path)
    set_config(tmp_path, **change)
    with pytest.raises(AdapterError) as refused:
        read_adapter(tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"r": NaN}', "NaN is no number"),
        (b'{"r": -Infinity}', "-Infinity is no number"),
        (b'{"r": 1, "r": 2}', "'r' is given twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[1]", "must be a JSON mapping, got [1]"),
        (b"null", "must be a JSON mapping, got None"),
        (b'{"a": "\xff"}', "not text in UTF-8"),
        (b'{"a": "\\ud800"}', "not JSON: holds half of a character"),
        (b"", "not JSON"),
        (b" " * (2**22 + 1), "has more than 4,194,304 bytes"),
    ],
)
def test_what_is_no_config_is_one_message(text: bytes, message: str, tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError) as refused:
        read_adapter(tmp_path)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_config_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    plain(tmp_path)
    found, _ = read_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(read_adapter(tmp_path)[0].layers) == list(found.layers)


def test_names_that_look_like_expressions_are_written_so_that_they_read_back(tmp_path: Path) -> None:
    layers = {f"m.a+b({i})": LowRank(torch.ones(r, 4), torch.ones(3, r), 0.5) for i, r in enumerate((1, 2, 2))}
    write_adapter(tmp_path, Adapter(layers), AdapterInfo("tiny", revision="v2"))
    found, info = read_adapter(tmp_path)
    assert {name: (x.rank, x.scale) for name, x in found.layers.items()} == {
        n: (x.rank, 0.5) for n, x in layers.items()
    }
    assert info.revision == "v2"


# --- bases


def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40_000.0), "b": torch.ones(3, 2)}
    other = {**tensors, "a": tensors["a"].clone()}
    other["a"][20_000] += 1
    for name, files in {
        "one": {"model": tensors},
        "two": {"model-00001-of-00002": {"a": tensors["a"]}, "model-00002-of-00002": {"b": tensors["b"]}},
        "other": {"model": other},
        "reshaped": {"model": {**tensors, "b": torch.ones(2, 3)}},
        "half": {"model": {key: tensor.half() for key, tensor in tensors.items()}},
    }.items():
        (tmp_path / name).mkdir()
        for file, part in files.items():
            save_file(part, tmp_path / name / f"{file}.safetensors")
    prints = {path.name: fingerprint(str(path)) for path in tmp_path.iterdir()}
    assert prints["one"] == prints["two"]
    assert len(set(prints.values())) == 4
    (tmp_path / "broken").mkdir()
    for data in (b"", POINTER.encode(), b"\xff" * 99, (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "broken" / "model.safetensors").write_bytes(data)
        assert fingerprint(str(tmp_path / "broken")) is None
    assert fingerprint(str(tmp_path / "nowhere")) is None
    assert fingerprint("user/" + "x" * 5000) is None


def test_a_base_of_the_hub_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--user--model"
    for commit in ("abc", "def"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        save_file(
            {"a": torch.full((3,), float(len(commit) + ord(commit[0])))},
            repository / "snapshots" / commit / "m.safetensors",
        )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert fingerprint("user/model") == fingerprint(str(repository / "snapshots" / "abc"))
    assert fingerprint("user/model", "def") == fingerprint(str(repository / "snapshots" / "def"))
    assert fingerprint("user/model", "v9") is None
    assert fingerprint("user/other") is None


# --- what PEFT itself would match


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(a+)+b"),
        ("exclude_modules", "(.*)*x"),
        ("layers_pattern", ["(l+)+y"]),
        ("rank_pattern", {"(a+)+b": 4}),
        ("alpha_pattern", {"model.*": 4}),
    ],
)
def test_peft_is_given_no_regular_expression_of_somebody_else(key: str, value: Any, tmp_path: Path) -> None:
    """A folder in place of a run's adapter, as `evaluate` and `generate` have PEFT load it."""
    set_config(plain(tmp_path), **{key: value})
    start = time.process_time()
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key}: .* is a regular expression"):
        check_names(tmp_path)
    assert time.process_time() - start < 1


def test_peft_is_given_names_as_they_are_written(tmp_path: Path) -> None:
    """Also odd ones, which are escaped where layers have ranks of their own."""
    layers = {f"m.a b+{n}": LowRank(torch.ones(n, 4), torch.ones(3, n), 1.0) for n in (1, 2)}
    write_adapter(tmp_path, Adapter(layers), AdapterInfo("tiny"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["target_modules"] == sorted(layers)
    check_names(tmp_path)
