"""`polyrank merge`: which adapters are of one model, under which names, and what is said of what was not used."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.lowrank import Adapter, LowRank, delta
from polyrank.local.adapters import AdapterInfo, read_adapter, write_adapter

LAYERS = ("model.layers.0.q", "model.layers.1.q")
INFO = AdapterInfo("tiny", "SEQ_CLS")


def adapter(
    folder: Path, seed: int, layers: tuple[str, ...] = LAYERS, info: AdapterInfo = INFO, **dense: Tensor
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    held = {n: LowRank(torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)) for n in layers}
    write_adapter(folder, Adapter(held, {f"{name}.weight": tensor for name, tensor in dense.items()}), info)
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    return {name: delta(x) for name, x in read_adapter(folder)[0].layers.items()}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=False)


def done(*arguments: object) -> list[str]:
    """The notes of a merge that succeeds; the screen shows what --json holds."""
    *rest, flag, out = arguments
    assert flag == "--out"
    result = call(*rest, "--out", f"{out}_shown")
    assert result.exit_code == 0, result.output
    printed = call(*rest, "--out", out, "--json")
    notes: list[str] = json.loads(printed.stdout)[0]["notes"]
    assert all(note in result.stdout for note in notes)
    return notes


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    text: str = result.stderr
    return text


def test_a_plain_merge_has_nothing_to_say(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(i), i) for i in range(2)]
    assert done(*folders, "--weights", "1,3", "--method", "flexlora", "--out", tmp_path / "m") == []
    one, two = map(deltas, folders)
    for name, found in deltas(tmp_path / "m").items():
        torch.testing.assert_close(found, (one[name] + 3 * two[name]) / 4, atol=1e-5, rtol=1e-5)


# --- names


NESTINGS: dict[str, Callable[[str], str]] = {
    "language_model": lambda name: f"language_model.{name}",
    "inside": lambda name: name.replace("model.", "model.language_model.", 1),
    "no model": lambda name: name.removeprefix("model."),
    "another model": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("swapped", [False, True])
def test_layers_under_another_nesting_are_the_same_layers(nesting: str, swapped: bool, tmp_path: Path) -> None:
    other = NESTINGS[nesting]
    one = adapter(tmp_path / "one", 1, tuple(map(other, LAYERS)) if swapped else LAYERS, head=torch.ones(2), info=HEAD)
    two = adapter(tmp_path / "two", 2, LAYERS if swapped else tuple(map(other, LAYERS)), head=torch.zeros(2), info=HEAD)
    notes = done(one, two, "--method", "flexlora", "--out", tmp_path / "m")
    assert len(notes) == 1
    assert re.search(rf"{two}: .* is read as .*, and 1 more names likewise", notes[0])
    for name, first, second in zip(deltas(one), deltas(one).values(), deltas(two).values(), strict=True):
        torch.testing.assert_close(deltas(tmp_path / "m")[name], (first + second) / 2, atol=1e-5, rtol=1e-5)


HEAD = AdapterInfo("tiny", "SEQ_CLS", modules_to_save=("head",))


def test_most_adapters_decide_the_names(tmp_path: Path) -> None:
    nested = tuple(f"language_model.{name}" for name in LAYERS)
    folders = [adapter(tmp_path / str(i), i, nested if i == 0 else LAYERS) for i in range(3)]
    done(*folders, "--out", tmp_path / "m")
    assert set(deltas(tmp_path / "m")) == set(LAYERS)


def test_two_stacks_of_one_adapter_stay_two(tmp_path: Path) -> None:
    both = (*LAYERS, *(f"language_model.{name}" for name in LAYERS))
    folders = [adapter(tmp_path / str(i), i, both) for i in range(2)]
    assert done(*folders, "--out", tmp_path / "m") == []
    assert set(deltas(tmp_path / "m")) == set(both)


def test_adapters_that_share_no_layer_are_refused(tmp_path: Path) -> None:
    """Whatever else they share: a head of one shape is in many models."""
    names = tuple(f"encoder.block.{i}.q" for i in range(5))
    one = adapter(tmp_path / "one", 1, head=torch.ones(2), info=HEAD)
    two = adapter(tmp_path / "two", 2, names, head=torch.ones(2), info=HEAD)
    message = refused(one, two, "--out", tmp_path / "m")
    assert f"{two}: shares no layer with {one}" in message
    assert "it has encoder.block.0.q, encoder.block.1.q, encoder.block.2.q and 2 more" in message
    assert "the other has model.layers.0.q, model.layers.1.q" in message
    assert not (tmp_path / "m").exists()


def test_layers_in_common_may_be_others_of_every_pair(tmp_path: Path) -> None:
    chain = [("a.x", "b.x"), ("c.x", "d.x"), ("b.x", "c.x")]
    folders = [adapter(tmp_path / str(i), i, layers) for i, layers in enumerate(chain)]
    notes = done(*folders, "--out", tmp_path / "m")
    assert notes[0] == f"{folders[0]}: lacks 2 of 4 layers (c.x, d.x); the others alone decide"


# --- one base, one task


def base(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"model.w": torch.full((4, 4), value)}, folder / "model.safetensors")
    return folder


def of(folder: Path, seed: int, **info: Any) -> Path:
    return adapter(folder, seed, info=AdapterInfo(**info))


def test_bases_on_this_disk_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    here, copy, other = base(tmp_path / "x", 1.0), base(tmp_path / "copy", 1.0), base(tmp_path / "other", 2.0)
    one, two, three = (
        of(tmp_path / path.name[::-1] / "a", i, base=str(path)) for i, path in enumerate((here, copy, other))
    )
    assert done(one, two, "--out", tmp_path / "m") == []
    assert read_adapter(tmp_path / "m")[1].base == str(here)
    message = refused(one, two, three, "--out", tmp_path / "n")
    assert "adapters of different base models cannot be merged: their weights differ" in message
    assert f"{three}: {other}" in message
    assert "--base NAME" in message


def test_other_bases_are_told_apart_by_their_names(tmp_path: Path) -> None:
    here = base(tmp_path / "x", 1.0)
    named = [str(here), "user/model", str(tmp_path / "elsewhere"), None]
    folders = [of(tmp_path / f"a{i}", i, base=name) for i, name in enumerate(named)]
    for pair in (folders[:2], folders[1:3], [folders[0], folders[2]]):
        assert "not all are on this disk, so that names decide" in refused(*pair, "--out", tmp_path / "n")
        done(*pair, "--base", "user/same", "--out", tmp_path / f"m{pair[0].name}{pair[1].name}")
        assert read_adapter(tmp_path / f"m{pair[0].name}{pair[1].name}")[1].base == "user/same"
    done(folders[3], folders[1], "--out", tmp_path / "unnamed")
    assert read_adapter(tmp_path / "unnamed")[1].base == "user/model"


def test_other_revisions_are_other_bases(tmp_path: Path) -> None:
    one, two, main, none = (
        of(tmp_path / f"a{i}", i, base="user/model", revision=name) for i, name in enumerate(("v1", "v2", "main", None))
    )
    assert "their revisions differ" in refused(one, two, "--out", tmp_path / "n")
    assert "their revisions differ" in refused(one, none, "--out", tmp_path / "n")
    done(main, none, "--out", tmp_path / "m")
    done(one, "--out", tmp_path / "single")
    assert read_adapter(tmp_path / "single")[1].revision == "v1"


def test_tasks_that_contradict_are_refused(tmp_path: Path) -> None:
    one, two, none = (of(tmp_path / f"a{i}", i, task=task) for i, task in enumerate(("SEQ_CLS", "CAUSAL_LM", None)))
    message = refused(one, two, "--out", tmp_path / "n")
    assert f"task_type differs ({one}: SEQ_CLS; {two}: CAUSAL_LM)" in message
    done(none, two, "--out", tmp_path / "m")
    assert read_adapter(tmp_path / "m")[1].task == "CAUSAL_LM"


def test_a_head_that_one_adapter_alone_has_is_kept_and_said(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2, head=torch.ones(2), info=HEAD)
    notes = done(one, two, "--out", tmp_path / "m")
    assert notes == [f"{one}: lacks head.weight; the others alone decide"]
    merged, info = read_adapter(tmp_path / "m")
    assert info.modules_to_save == ("head",)
    assert torch.equal(merged.dense["head.weight"], torch.ones(2))


def test_adapters_without_a_layer_are_refused(tmp_path: Path) -> None:
    one, none = adapter(tmp_path / "one", 1), adapter(tmp_path / "none", 2, (), head=torch.ones(2), info=HEAD)
    assert f"{none}: holds no LoRA layer" in refused(one, none, "--out", tmp_path / "m")


# --- what was not used


@pytest.mark.parametrize(
    ("method", "used"), [("fedex_lora", False), ("flexlora", True), ("rb_lora", True), ("fedit", True)]
)
def test_weights_that_a_rule_does_not_use_are_said(method: str, used: bool, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(i), i) for i in range(2)]
    notes = done(*folders, "--weights", "1,3", "--method", method, "--out", tmp_path / "m")
    assert notes == ([] if used else ["--weights: not used: this rule weighs the layers of all adapters alike"])
    done(*folders, "--method", method, "--out", tmp_path / "alike")
    same = all(torch.allclose(x, deltas(tmp_path / "alike")[n], atol=1e-5) for n, x in deltas(tmp_path / "m").items())
    assert same != used
    assert done(*folders, "--weights", "2,2", "--method", method, "--out", tmp_path / "two") == []


def test_weights_that_the_head_alone_uses_are_said(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(i), i, head=torch.full((2,), float(i)), info=HEAD) for i in range(2)]
    notes = done(*folders, "--weights", "1,3", "--method", "fedex_lora", "--out", tmp_path / "m")
    by_size = torch.equal(read_adapter(tmp_path / "m")[0].dense["head.weight"], torch.full((2,), 0.75))
    use = "used for head.weight alone" if by_size else "not used"
    assert notes == [f"--weights: {use}: this rule weighs the layers of all adapters alike"]


def test_weights_of_zero(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1, LAYERS[:1]), adapter(tmp_path / "two", 2)
    assert "--weights: all are zero" in refused(one, two, "--weights", "0,0", "--out", tmp_path / "m")
    notes = done(one, two, "--weights", "1,0", "--method", "flexlora", "--out", tmp_path / "m")
    assert notes == [
        f"{two}: has weight 0, so it counts for nothing",
        f"{one}: lacks 1 of 2 layers (model.layers.1.q); the others alone decide",
        "zero in the merged adapter, and left out of its file: model.layers.1.q",
    ]
    assert list(deltas(tmp_path / "m")) == [LAYERS[0]]
    torch.testing.assert_close(deltas(tmp_path / "m")[LAYERS[0]], deltas(one)[LAYERS[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("method", ["flexlora", "fedit", "flora"])
def test_layers_that_count_as_zero_are_said(method: str, zero: bool, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1, LAYERS[:1]), adapter(tmp_path / "two", 2)
    options = ["--set", "layers=zero"] if zero else []
    notes = done(one, two, "--method", method, *options, "--out", tmp_path / "m")
    how = "counts as zero there" if zero else "the others alone decide"
    assert notes == [f"{one}: lacks 1 of 2 layers (model.layers.1.q); {how}"]
    due = deltas(two)[LAYERS[1]] * (0.5 if zero else 1.0)
    if method != "fedit":  # which averages A and B
        torch.testing.assert_close(deltas(tmp_path / "m")[LAYERS[1]], due, atol=1e-5, rtol=1e-5)


def test_ranks_without_room_are_said(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1)
    notes = done(one, "--rank", "500", "--client-ranks", "2,9", "--out", tmp_path / "m")
    assert notes == [
        "--rank 500: 2 of 2 layers have room for less, 3 the smallest",
        "--client-ranks 9: 2 of 2 layers have room for less, 3 the smallest",
    ]


def test_folders_whose_names_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    one = adapter(tmp_path / "w[/b]c", 1)
    result = call(one, one, "--weights", "1,0", "--out", tmp_path / "m[/red]")
    assert result.exit_code == 0
    assert f"{tmp_path / 'm[/red]'}: 2 layers of rank 2" in result.stdout
    assert f"{one}: has weight 0" in result.stdout


def test_one_file_in_16_bits_is_merged_as_peft_loads_it(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1)
    path = one / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    expected = deltas(one)
    done(one, one, "--out", tmp_path / "m")
    for name, found in deltas(tmp_path / "m").items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)
