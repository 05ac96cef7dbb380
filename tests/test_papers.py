"""The published settings under experiments/paper/: they plan offline, to the published parameters and budgets."""

from pathlib import Path
from typing import Any

import pytest

from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import load

FOLDER = Path(__file__).parents[1] / "experiments" / "paper"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def planned(name: str, *overrides: str) -> dict[str, Any]:
    return forecast(load(FILES[name], list(overrides)))


def trained(name: str, *overrides: str) -> list[tuple[str, int]]:
    return [(entry["factors"], entry["parameters"]) for entry in planned(name, *overrides)["trained"]]


@pytest.mark.parametrize("name", FILES)
def test_a_published_setting_plans_offline(name: str) -> None:
    found = planned(name)
    assert all(group["budget"] > 0 for group in found["groups"])
    assert all(client["ranks"] for client in found["clients"])
    head = FILES[name].read_text().split("extends:")[0]
    assert head.startswith(f"# polyrank plan experiments/paper/{name}.yaml\n")
    assert "ublished" in head or "No figures" in head or "see hralora_ledgar.yaml" in head


def test_every_published_setting_is_there() -> None:
    splits = ("", "_pat20", "_pat10")
    expected = {
        f"hralora_{data}{scale}{split}" for data in ("cifar100", "ledgar") for scale in ("", "_100") for split in splits
    }
    expected |= {f"fed_hello_cifar100{split}" for split in splits}
    expected |= {f"rb_lora_llama{method}" for method in ("", "_flora", "_hetlora_uniform", "_hetlora_weighted")}
    assert set(FILES) == expected | {"rb_lora_sst2_bloom", "rb_lora_sst2_llama"}


SCALES = {"hralora_cifar100": 0, "hralora_cifar100_100": 1, "hralora_ledgar": 2}
# Trained parameters summed over all clients: DeiT-small with 20 and 100 clients, BERT of width 128 with 20.
PUBLISHED = {
    "method={name: gd_hla, pattern: uniform, rank: 24}": (6_856_704, 33_288_192, 2_285_568),  # the released FedIT
    "method={name: fed_hello, rank: 24}": (6_856_704, 33_288_192, 2_285_568),
    "method={name: hetlora_weighted, estimate: least}": (6_856_704, 33_288_192, 2_285_568),
    "method={name: flexlora, estimate: least}": (6_856_704, 33_288_192, 2_285_568),
    "method=straggler": (4_423_680, 22_118_400, 1_474_560),
    "method={name: exclusive, estimate: {rank: 24}}": (3_538_944, 15_040_512, 1_179_648),
}


@pytest.mark.parametrize("override", PUBLISHED)
@pytest.mark.parametrize("name", SCALES)
def test_the_published_parameters_follow_from_the_configuration(name: str, override: str) -> None:
    # Methods that have no estimator of their own take the same budgets as HRALoRA.
    estimate = [] if "estimate" in override or "straggler" in override else ["method.estimate=least"]
    [(factors, parameters)] = trained(name, override, *estimate)
    assert (factors, parameters) == ("AB", PUBLISHED[override][SCALES[name]])


@pytest.mark.parametrize("name", SCALES)
def test_legend_s_parameters(name: str) -> None:
    """Ranks 17 + l on the deepest 6, 9 and 12 layers: 153, 216 and 270, which the released code gives by hand."""
    ranks = "fleet=[{share: 1/3, rank: 13}, {share: 1/3, rank: 18}, {share: 1/3, rank: 23}]"
    found = trained(name, "method={name: legend, base: 17}", "model.rank=28", ranks)
    assert found == [("AB", (6_718_464, 32_804_352, 2_239_488)[SCALES[name]])]


@pytest.mark.parametrize("name", SCALES)
def test_hralora_s_parameters_with_the_doubled_warm_up(name: str) -> None:
    phases = trained(name, "method.multiplier=2")
    assert phases == [
        ("AB", (13_713_408, 66_576_384, 4_571_136)[SCALES[name]]),
        ("B", (3_428_352, 16_644_096, 1_142_784)[SCALES[name]]),
        ("A", (3_428_352, 16_644_096, 1_142_784)[SCALES[name]]),
    ]
    mean = (20 * phases[0][1] + 180 * phases[1][1]) / 200
    fedit = PUBLISHED["method={name: gd_hla, pattern: uniform, rank: 24}"][SCALES[name]]
    assert mean / fedit == pytest.approx(0.65, abs=0.0001)  # not half
    if name == "hralora_cifar100":
        assert round(mean) == 4_456_858


def test_a_doubled_warm_up_is_flagged_and_one_within_budget_is_not() -> None:
    assert any("2 times its budget" in note for note in planned("hralora_cifar100", "method.multiplier=2")["notes"])
    assert not any("budget" in note for note in planned("hralora_cifar100")["notes"])


def test_the_plan_shows_the_whole_path() -> None:
    """Memory and link, budget, importance, ranks per layer: with the scores of round 20 as published (iid)."""
    scores = [0.079413, 1.100811, 0.546707, 0.085971, 0.175156, 0.099647]
    scores += [0.275515, 0.114502, 0.274488, 0.227051, 0.092557, 0.083468]
    experiment = load(FILES["hralora_cifar100"], ["method.warmup=0", "method.allocate.leftover=highest"])
    modules = forecast(experiment)["blocks"]
    found = forecast(experiment, {name: scores[block] / 2 for name, block in modules.items()})
    strong = found["groups"][2]
    assert [strong["budget"], strong["limit"]] == [576, "upload"]
    by_block = {modules[name]: rank for name, rank in strong["ranks"].items()}
    assert [by_block[block] for block in range(12)] == [14, 48, 48, 14, 19, 15, 40, 16, 24, 22, 14, 14]
    weak = found["groups"][0]["ranks"]
    assert len(weak) == 12
    assert sum(weak.values()) == 288


def test_rb_lora_s_clients() -> None:
    """Parameters and bytes of Llama-3.1-8B with queries and values: 425,984 words a rank, over 32 layers."""
    found = planned("rb_lora_llama")
    sizes = load(FILES["rb_lora_llama"]).data.partition.sizes
    assert sizes == [500, 500, 1000, 1000, 1500, 1500, 1900, 1900, 2500, 2500]
    assert found["model"]["parameters"] == 8_030_261_248
    ranks = [next(iter(client["ranks"].values())) for client in found["clients"]]
    assert ranks == [4, 4, 16, 16, 64, 64, 128, 128, 256, 256]
    for group, rank in zip(found["groups"], (4, 16, 64, 128, 256), strict=True):
        assert group["clients"] == 2
        assert [group["traffic"][0][key] for key in ("bytes_up", "bytes_down")] == [4 * 425_984 * rank] * 2
        parts = group["peak"]
        assert parts["base"] == 2 * 8_030_261_248
        assert parts["adapter"] == parts["gradients"] == parts["optimizer"] / 2 == 4 * 425_984 * rank
    peaks = [group["peak_memory"] for group in found["groups"]]
    assert 20e9 < peaks[0] < peaks[-1] < 30e9
    lighter = [group["peak_memory"] for group in planned("rb_lora_llama", "model.quantize=4bit")["groups"]]
    assert max(lighter) < 20e9


# Parameters as published, without LLaMA-2's output layer; words that a rank takes: 4 x 1,024 in each of 24 layers of
# BLOOM, twice 2 x 4,096 in each of 32 of LLaMA-2.
SST2 = {"bloom": (559_214_592, 24 * 4096, 1024), "llama": (6_738_415_616 - 32_000 * 4096, 32 * 16_384, 4096)}


@pytest.mark.parametrize("name", SST2)
def test_sst2_with_decoders(name: str) -> None:
    parameters, words, hidden = SST2[name]
    found = planned(f"rb_lora_sst2_{name}")
    assert found["model"]["parameters"] == parameters + 2 * hidden
    up = [group["traffic"][0]["bytes_up"] for group in found["groups"]]
    assert up == [4 * (words * rank + 2 * hidden) for rank in (16, 64, 256)]
