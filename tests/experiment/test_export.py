"""What a run exports: adapters at any rank, merged weights, and a card whose code runs where polyrank is not."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.lokr import lokr_parameters
from polyrank.core.lowrank import Adapter, LowRank, combine, delta
from polyrank.core.rng import stream, torch_generator
from polyrank.experiment.build import build
from polyrank.experiment.publishing import chosen, compressed
from polyrank.experiment.store import Run, RunError
from polyrank.local import hf, lokr
from polyrank.local.adapters import AdapterError, read_adapter, write_adapter
from polyrank.local.base import Base
from polyrank.local.evaluate import evaluate
from polyrank.local.saved import save_image_processor, save_merged
from polyrank.local.weights import write_into
from sittings import finished, started

FAMILIES = ["bert", "bloom", "gpt2", "llama", "vit"]
AUTO = {"vit": transformers.AutoModelForImageClassification}
PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Config = dict[str, Any]
Models = Callable[[str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]
Adapters = Callable[..., Adapter]


def call(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return result.stderr


def logits_of(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, **options).logits


# --- compression


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_cut_is_the_best_approximation_and_says_what_it_costs(
    family: str, rank: int, tiny_model: Models, random_adapter: Adapters
) -> None:
    base = Base(tiny_model(family), "all-linear", name="tiny")
    whole = random_adapter(base.spec, (6, 2, 4), head=base.initial_head())
    adapter, cut = compressed(whole, rank)
    gaps, sizes = [], []
    for name, x in whole.layers.items():
        U, S, Vt = torch.linalg.svd(delta(LowRank(x.A.double(), x.B.double(), x.scale)))
        best = U[:, :rank] * S[:rank] @ Vt[:rank]
        torch.testing.assert_close(delta(adapter.layers[name]).double(), best, atol=1e-5, rtol=1e-4)
        assert adapter.layers[name].rank == min(rank, x.rank)
        gaps.append(float(S[rank:].norm()))
        sizes.append(float(S.norm()))
        assert cut.errors[name] == pytest.approx(gaps[-1] / sizes[-1], rel=1e-4, abs=1e-6)
    assert cut.overall == pytest.approx(math.hypot(*gaps) / math.hypot(*sizes), rel=1e-4)
    assert cut.worst[1] == max(cut.errors.values()) > cut.overall > 0.01
    assert adapter.dense is whole.dense


@pytest.mark.parametrize("rank", [None, 6, 100])
def test_no_rank_and_ranks_above_what_is_there_change_nothing(
    rank: int | None, tiny_model: Models, random_adapter: Adapters
) -> None:
    base = Base(tiny_model("bert"), "all-linear", name="tiny")
    whole = random_adapter(base.spec, (6, 2, 4))
    adapter, cut = compressed(whole, rank)
    assert all(adapter.layers[name] is x for name, x in whole.layers.items())
    assert cut.overall == 0.0 == cut.worst[1]


# --- merged weights


def merged_and_loaded(base: Base, adapter: Adapter, folder: Path, family: str, **options: Any) -> nn.Module:
    """The model as plain Transformers loads what was written, and its config says."""
    write_into(base, adapter)
    save_merged(base, folder)
    auto = AUTO.get(family, transformers.AutoModelForSequenceClassification)
    return auto.from_pretrained(folder, **options).eval()


def saved_base(model: nn.Module, folder: Path, targets: str = "all-linear") -> Base:
    """A base that has come from a folder, as a run's has."""
    model.save_pretrained(folder)
    return Base(model, targets, name=str(folder))


@PEFT_IS_BEHIND
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_the_logits_of_peft_s_model(
    family: str, tmp_path: Path, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    batch, base = tiny_batch(family), saved_base(tiny_model(family), tmp_path / "base")
    adapter = random_adapter(base.spec, (3, 0, 1, 2), head=base.initial_head())
    before = logits_of(base.model, batch)
    write_adapter(tmp_path / "adapter", adapter, base.info)
    peft = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "adapter")).eval()
    loaded = merged_and_loaded(base, adapter, tmp_path / "merged", family)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(peft, batch), atol=1e-4, rtol=0)
    assert (before - logits_of(loaded, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 24])
def test_merged_lokr_gives_the_logits_of_the_attached_one(
    family: str, rank: int, tmp_path: Path, tiny_model: Models, tiny_batch: Batches
) -> None:
    batch, base = tiny_batch(family), saved_base(tiny_model(family), tmp_path / "base")
    generator = torch_generator(stream(0, "lokr"))
    shapes = lokr_parameters(base.spec.modules, rank)
    factors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    adapter = Adapter({}, {**factors, **base.initial_head(), **lokr.scales(base.spec.modules, 1.5)})
    before = logits_of(base.model, batch)
    with base.attached(adapter) as live, torch.no_grad():
        expected = live(batch)
    loaded = merged_and_loaded(base, adapter, tmp_path / "merged", family)
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sums_are_rounded_once(family: str, tiny_model: Models, random_adapter: Adapters) -> None:
    base = Base(tiny_model(family).bfloat16(), "all-linear", name="tiny")
    adapter = random_adapter(base.spec, (3, 1, 2))
    before = {name: base.modules[name].weight.float() for name in adapter.layers}
    write_into(base, adapter)
    for name, x in adapter.layers.items():
        update = delta(x).T if family == "gpt2" else delta(x)
        assert torch.equal(base.modules[name].weight, (before[name] + update).bfloat16())
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in write_into(base, Adapter(), torch.float16).parameters()} == {torch.float16}


def test_another_model_s_adapter_is_refused(tiny_model: Models, random_adapter: Adapters) -> None:
    bert = Base(tiny_model("bert"), "all-linear", name="tiny")
    adapter = random_adapter(bert.spec, head=bert.initial_head())
    with pytest.raises(AdapterError, match="none of the model's modules"):
        write_into(Base(tiny_model("vit"), "all-linear", name="tiny"), adapter)
    with pytest.raises(AdapterError, match="no parameter of the model"):
        write_into(bert, Adapter({}, {"classifier.weight": torch.zeros(2, 2)}))


def test_images_of_another_size_need_no_interpolation_once_merged(
    tmp_path: Path, tiny_model: Models, random_adapter: Adapters
) -> None:
    saved = saved_base(tiny_model("vit"), tmp_path / "base")
    base = Base(saved.model, "all-linear", name=str(tmp_path / "base"), image_size=16)
    adapter = random_adapter(base.spec, head=base.initial_head())
    batch = {"pixel_values": torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    with base.attached(adapter) as live, torch.no_grad():
        expected = live(batch)
    loaded = merged_and_loaded(base, adapter, tmp_path / "merged", "vit")
    assert loaded.config.image_size == 16
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-4, rtol=0)


MEMORY = """
import resource, sys, torch, transformers
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.local.base import Base
from polyrank.local.saved import save_merged
from polyrank.local.weights import write_into

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

config = transformers.BertConfig(vocab_size=20_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
                                 num_attention_heads=16)
config.save_pretrained(sys.argv[1])
with torch.device("cpu"):
    model = transformers.BertForSequenceClassification(config)
size = sum(p.numel() * p.element_size() for p in model.parameters())
base = Base(model, "all-linear", name=sys.argv[1])
layers = {n: LowRank(torch.ones(4, d_in), torch.ones(d_out, 4)) for n, (d_out, d_in) in base.spec.modules.items()}
before = peak()
write_into(base, Adapter(layers))
save_merged(base, sys.argv[1])
print(size, peak() - before)
"""


def test_merging_needs_the_model_and_a_layer(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "m")], check=True, capture_output=True, text=True
    )
    size, more = map(int, shown.stdout.split())
    layer = 4096 * 1024 * 4
    assert size > 12 * layer
    assert more < 7 * layer  # a sum and its parts, and what libraries take when they are first used


# --- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> Callable[..., Path]:
    """(method, changes) -> the folder of a finished run on the digits; made once."""
    made: dict[str, Path] = {}

    def run(method: str, **changes: Any) -> Path:
        key = json.dumps([method, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / method
            finished(started(made[key], digits_config, **{"method": {"name": method}, **changes}))
        return made[key]

    return run


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, digits_config: Config, tiny_model: Models) -> Path:
    """A finished run of a tiny GPT-2, which has no padding token, on texts from a file."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["[UNK]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(36))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    model = tiny_model("gpt2")
    model.config.pad_token_id = None
    for part in (fast, model):
        part.save_pretrained(folder / "gpt2")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 21)):
        rows = [
            {"text": " ".join(f"w{w}" for w in rng.integers(12 * k, 12 * k + 12, size=rng.integers(3, 9))), "label": k}
            for k in (i % 3 for i in range(count))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    config = {
        **digits_config,
        "rounds": 2,
        "model": {"name": str(folder / "gpt2"), "targets": "attention", "rank": 4, "max_length": 12},
        "data": {"name": "files", **files, "text": "text", "clients": 4, "classes": ["low", "middle", "high"]},
    }
    finished(started(folder / "run", config))
    return folder / "run"


CHILD = """
import contextlib, io, json, os, re, sys
sys.modules["polyrank"] = None  # whoever imports it fails
import numpy as np
found = {}
for folder in sys.argv[2:]:
    os.chdir(folder)
    space = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1], space)
    inputs = json.load(open(sys.argv[1]))
    model, prepare, torch = (space[name] for name in ("model", "prepare", "torch"))
    if isinstance(inputs[0], str):
        ready = prepare(inputs, truncation=True, padding=True, return_tensors="pt")
    else:
        ready = prepare([space["Image"].fromarray(np.array(i, np.uint8)) for i in inputs], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**ready).logits
    found[folder] = {"said": shown.getvalue().strip(), "logits": logits.tolist(), "class": type(model).__name__}
print(json.dumps(found))
"""


def elsewhere(inputs: list[Any], tmp_path: Path, *folders: Path) -> dict[Path, dict[str, Any]]:
    """What the cards' own code makes of inputs, in a process that has no polyrank."""
    given = tmp_path / "inputs.json"
    given.write_text(json.dumps(inputs))
    command = [sys.executable, "-c", CHILD, str(given), *map(str, folders)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    return {Path(folder): found for folder, found in json.loads(shown.stdout).items()}


def test_a_run_s_exports_work_where_polyrank_is_not(
    tmp_path: Path, runs: Callable[..., Path], digits_config: Config
) -> None:
    run = runs("fedex_lora")
    whole, cut, merged = (tmp_path / name for name in ("whole", "cut", "merged"))
    assert call(run, "--out", whole)["error"] == 0
    assert call(run, "--out", cut, "--rank", 2)["error"] > 0
    assert call(run, "--out", merged, "--merge")["merged"] == "float32"
    world = build(Run.open(run).experiment())
    pixels, labels = world.splits["test"].pixels, world.splits["test"].labels
    found = elsewhere(pixels[:, 0].tolist(), tmp_path, whole, cut, merged)
    assert all(entry["said"] in set("0123456789") for entry in found.values())
    assert [entry["class"] for entry in found.values()] == [
        "PeftModel",
        "PeftModel",
        "ViTForImageClassification",
    ]
    reached = Run.open(run).summary()["final"]["test"]["accuracy"]
    for folder in (whole, merged):
        logits = np.array(found[folder]["logits"])
        assert (logits.argmax(1) == labels).mean() == pytest.approx(reached)
        batch = world.splits["test"].batch(np.arange(len(labels)))
        with world.base.attached(read_adapter(run / "adapter")[0]) as live, torch.no_grad():
            np.testing.assert_allclose(logits, live(batch).numpy(), atol=1e-4)
    assert not np.allclose(found[cut]["logits"], found[whole]["logits"], atol=1e-3)


def test_texts_are_prepared_as_in_training(tmp_path: Path, text_run: Path) -> None:
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    call(text_run, "--out", whole)
    call(text_run, "--out", merged, "--merge", "--best")
    rows = [json.loads(line) for line in (text_run.parent / "test.jsonl").read_text().splitlines()]
    found = elsewhere([row["text"] for row in rows], tmp_path, whole, merged)
    assert all(entry["said"] in ("low", "middle", "high") for entry in found.values())
    world = build(Run.open(text_run).experiment())
    for folder, source in ((whole, "adapter"), (merged, "best")):
        with world.base.attached(read_adapter(text_run / source)[0]) as live, torch.no_grad():
            expected = torch.cat([live(world.splits["test"].batch(np.array([i]))) for i in range(len(rows))])
        np.testing.assert_allclose(found[folder]["logits"], expected.numpy(), atol=1e-4)
    with hf.quiet():
        ask = transformers.pipeline("text-classification", model=str(merged), truncation=True)
        said = [answer["label"] for answer in ask([row["text"] for row in rows])]
    assert said == [("low", "middle", "high")[index] for index in expected.argmax(-1).tolist()]


@pytest.mark.parametrize("method", ["flora", "lokr"])
def test_merged_runs_reach_what_the_run_did(method: str, tmp_path: Path, runs: Callable[..., Path]) -> None:
    run = runs(method, rounds=2)
    call(run, "--out", tmp_path / "merged", "--merge")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    world = build(Run.open(run).experiment())
    found = evaluate(lambda batch: model(pixel_values=batch["pixel_values"]).logits, world.splits["test"])
    due = Run.open(run).summary()["final"]["test"]
    assert found["accuracy"] == due["accuracy"]
    assert found["loss"] == pytest.approx(due["loss"], rel=1e-4)
    assert model.config.id2label == dict(enumerate("0123456789"))


def test_without_a_rank_the_adapter_is_the_run_s(tmp_path: Path, runs: Callable[..., Path]) -> None:
    run = runs("fedex_lora")
    call(run, "--out", tmp_path / "out", "--best", "--base", "me/digits")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (run / "best" / weights).read_bytes()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == "me/digits"
    assert config.items() <= json.loads((run / "best" / "adapter_config.json").read_text()).items()


def test_the_same_run_makes_the_same_bytes(tmp_path: Path, runs: Callable[..., Path]) -> None:
    run = runs("fedex_lora")
    folders = [tmp_path / name for name in ("one", "two")]
    folders[0].mkdir()
    for folder in folders:
        call(run, "--out", folder, "--rank", 2)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


# --- the card


def test_the_card_says_what_the_run_knows(tmp_path: Path, runs: Callable[..., Path]) -> None:
    run = runs("fedex_lora", baselines=["local", "single"])
    call(run, "--out", tmp_path / "out", "--license", "apache-2.0", "--base", "me/digits")
    card, summary = ModelCard.load(tmp_path / "out" / "README.md"), Run.open(run).summary()
    assert card.data.library_name == "peft"
    assert card.data.base_model == "me/digits"
    assert card.data.license == "apache-2.0"
    assert {"federated-learning", "fedex_lora"} <= set(card.data.tags)
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["Test accuracy, final round"] == pytest.approx(summary["final"]["test"]["accuracy"], abs=1e-4)
    selected = summary["selected"]["test"]["accuracy"]
    assert figures["Test accuracy, round selected on validation"] == pytest.approx(selected, abs=1e-4)
    text = card.text
    for part in (
        "2410.09432",  # FedEx-LoRA
        "dirichlet (alpha: 1.0",
        "| clients | 4, all of them a round |",
        "| rounds | 3, ",
        "| seed | 0 |",
        "| small | 2 | 2 |",
        f"| before | {summary['before']['test']['accuracy']:.4f} |",
        "pooled data",
        "No differential privacy was promised",
        f"| torch | {torch.__version__} |",
        "To be filled in",
    ):
        assert part in text, part
    assert str(run) not in text
    assert str(Path.home()) not in text


def test_a_card_states_no_more_than_it_knows(tmp_path: Path, runs: Callable[..., Path]) -> None:
    call(runs("fedex_lora"), "--out", tmp_path / "out", "--rank", 1)
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header.keys() == {"library_name", "pipeline_tag", "metrics", "tags"}  # no licence, base or figures
    assert "not stated" in text
    assert "was not evaluated again" in text
    assert re.search(r"relative error of \d\.\d\de-\d\d overall", text)


def test_a_promise_of_privacy_is_on_the_card(tmp_path: Path, runs: Callable[..., Path]) -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    run = runs("fedit", rounds=2, privacy={"clients": {"clip": 1.0, "noise": 1.0}})
    call(run, "--out", tmp_path / "out")
    epsilon = Run.open(run).summary()["privacy"]["clients"]["epsilon"]
    assert f"epsilon {epsilon:.3g} at delta 1e-05 for clients" in (tmp_path / "out" / "README.md").read_text()


# --- what is refused


def test_mistakes_are_refused_and_leave_nothing(
    tmp_path: Path, runs: Callable[..., Path], digits_config: Config
) -> None:
    run, out = runs("fedex_lora"), tmp_path / "out"
    assert "experiment.yaml" in refused(tmp_path, "--out", out)
    assert "resume" in refused(started(tmp_path / "open", digits_config).run.folder, "--out", out)
    assert "Did you mean 'bfloat16'" in refused(run, "--out", out, "--merge", "--dtype", "bfloat")
    assert "add --merge" in refused(run, "--out", out, "--dtype", "bfloat16")
    assert "no rank to cut" in refused(runs("lokr", rounds=2), "--out", out, "--rank", 2)
    assert "HF_HUB_OFFLINE" in refused(run, "--out", out, "--push", "me/digits")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "not an empty folder" in refused(run, "--out", out)
    assert "already holds a run" in refused(run, "--out", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["open", "out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_half_way_leaves_nothing(
    tmp_path: Path, runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr("polyrank.report.card.model_card", fails)
    assert "the disk is full" in refused(runs("fedex_lora"), "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_an_adapter_is_refused(tmp_path: Path, runs: Callable[..., Path]) -> None:
    run = runs("fedit", rounds=1)
    (run / "best").rename(run / "elsewhere")
    with pytest.raises(RunError, match="in best/"):
        chosen(Run.open(run), best=True)
    with pytest.raises(RunError, match="in adapter/"):
        chosen(Run.open(runs("fedit", rounds=1, regime="local")))
    (run / "setting.json").unlink()
    with pytest.raises(RunError, match="an earlier version"):
        chosen(Run.open(run))


# --- the hub


def test_a_push_uploads_the_folder_once(
    tmp_path: Path, runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **given: sent.append({"repo": repo, **given}) or repo)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: sent.append(given))
    assert call(runs("fedex_lora"), "--out", tmp_path / "out", "--push", "me/digits")["pushed"] == "me/digits"
    created, uploaded = sent
    assert created == {"repo": "me/digits", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/digits"
    assert uploaded["folder_path"] == tmp_path / "out"
    assert 'place = "me/digits"' in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_that_does_not_answer_leaves_the_folder(
    tmp_path: Path, runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", fails)
    assert "hf upload me/digits" in refused(runs("fedex_lora"), "--out", tmp_path / "out", "--push", "me/digits")
    assert (tmp_path / "out" / "README.md").is_file()


def test_pixels_are_prepared_as_in_training(tmp_path: Path, tiny_model: Models) -> None:
    from polyrank.data import Source, prepare_images

    tiny_model("vit").save_pretrained(tmp_path / "vit")
    made = save_image_processor(str(tmp_path / "vit"), tmp_path / "out", 12)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 15, 1), dtype=np.uint8)
    due = prepare_images(Source(pixels, np.zeros(4, np.int64)), made.size, made.channels, made.mean, made.std)
    with hf.quiet():
        prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    found = prepare([Image.fromarray(image[..., 0]) for image in pixels], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, due.batch(np.arange(4))["pixel_values"], atol=1e-6, rtol=0)


def test_a_fold_and_an_adapter_are_merged_together(
    tmp_path: Path, tiny_model: Models, tiny_batch: Batches, random_adapter: Adapters
) -> None:
    base, batch = saved_base(tiny_model("bert"), tmp_path / "base"), tiny_batch("bert")
    folded, adapter = random_adapter(base.spec, (2, 0, 1)), random_adapter(base.spec, (0, 3), seed=1)
    with base.attached(adapter, folded) as live, torch.no_grad():
        expected = live(batch)
    loaded = merged_and_loaded(base, combine([folded, adapter]), tmp_path / "merged", "bert")
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-4, rtol=0)
