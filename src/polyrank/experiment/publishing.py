"""What a finished run has made, as others take it: a PEFT adapter at any rank, or a model with the adapter merged in.

The run's folder is all that is read, and the base model where its weights are merged or its preprocessing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyrank.core.compress import compress_all
from polyrank.core.lowrank import Adapter, LowRank, norm, stack
from polyrank.core.rng import stream
from polyrank.experiment.components import did_you_mean
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.models import Kind, load_base, located
from polyrank.experiment.store import Run, RunError
from polyrank.experiment.verifying import sample, small, verify_adapter, verify_merged
from polyrank.local.adapters import CONFIG, AdapterError, AdapterInfo, read_adapter, write_adapter
from polyrank.local.saved import save_config, save_image_processor, save_merged, save_tokenizer
from polyrank.local.weights import write_into

DTYPES = ("bfloat16", "float16", "float32")
"""Types of merged weights."""


@dataclass(frozen=True)
class Cut:
    """What an adapter's compression to a rank has cost: ``|| x - cut(x) ||_F / || x ||_F``, computed from factors.

    Attributes:
        rank: that was asked for; None: the adapter is whole.
        errors: by layer.
        overall: of all layers together.
    """

    rank: int | None
    errors: Mapping[str, float]
    overall: float

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and its error."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))


@dataclass(frozen=True)
class Export:
    """A finished run, and what of it is exported.

    Attributes:
        run: the run.
        experiment: what was run.
        summary, setting: what the run's files of these names say.
        selected: whether it is the adapter of the round that was best on validation, not the final one.
        adapter: as it is exported.
        info: what an adapter's config says of the model.
        cut: what compression has cost.
        merged: the type of the weights that the adapter is merged into, ``auto`` for the checkpoint's own until it is
            written; None: it is exported as an adapter.
        channels: of images; 0 for texts, and until it is written.
        verified: what others' load of it gave on one batch, as a sentence; empty until it is written.
    """

    run: Run
    experiment: Experiment
    summary: Mapping[str, Any]
    setting: Mapping[str, Any]
    selected: bool
    adapter: Adapter
    info: AdapterInfo
    cut: Cut
    merged: str | None = None
    channels: int = 0
    verified: str = ""

    @property
    def kind(self) -> Kind:
        """What the model is given and asked."""
        return {"SEQ_CLS": "text", "CAUSAL_LM": "causal"}.get(self.info.task or "", "image")  # type: ignore[return-value]

    @property
    def faithful(self) -> bool:
        """Whether it computes what the run has evaluated, but for rounding in float32."""
        return self.cut.overall < 1e-5 and self.merged in (None, "float32")


def chosen(
    run: Run, *, best: bool = False, rank: int | None = None, merge: bool = False, dtype: str | None = None
) -> Export:
    """What to export of a run; nothing is written, and no model is loaded.

    Args:
        run: a finished run.
        best: the adapter that validation selected, instead of the final one.
        rank: compress every layer to at most this rank; None: lossless.
        merge: merge the adapter into the base's weights.
        dtype: of merged weights; None: as the run held the base.

    Raises:
        RunError: if the run is not finished or has no such adapter.
        AdapterError: for a rank of a LoKr, or a LoKr that PEFT cannot load.
        ConfigError: for a `dtype` of nothing that is merged.
    """
    summary, folder = run.summary(), run.best if best else run.adapter
    if summary is None:
        raise RunError(f"{run.folder}: is not finished; `polyrank resume {run.folder}` finishes it")
    if not (folder / CONFIG).is_file():
        raise RunError(f"{run.folder}: no adapter of the whole federation in {folder.name}/, so nothing to export")
    if dtype is not None and not merge:
        raise ConfigError(f"--dtype: {dtype!r} is of merged weights: add --merge; adapters stay in float32")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is unknown.{did_you_mean(dtype, DTYPES)}")
    whole, info = read_adapter(folder)
    if info.rank is not None and rank is not None:
        raise AdapterError(f"--rank: {rank}: {folder} is a LoKr, which has no rank to cut; leave --rank out")
    if info.rank is not None and info.fan_in_fan_out and not merge:
        raise AdapterError(f"{folder}: PEFT has no LoKr for Conv1D layers, GPT-2's; export it with --merge")
    adapter, cut = compressed(whole, rank)
    experiment = run.experiment()
    merged = (dtype or experiment.model.dtype) if merge else None
    return Export(run, experiment, summary, _setting(run), best, adapter, info, cut, merged)


def _setting(run: Run) -> dict[str, Any]:
    found = run.setting()
    if found is None:
        raise RunError(f"{run.folder}: has no setting.json: an earlier version of polyrank has made it; run it again")
    return found


def compressed(adapter: Adapter, rank: int | None) -> tuple[Adapter, Cut]:
    """The adapter with every layer's best approximation of at most `rank`, and what it costs.

    Layers of no more rank, and dense parameters, stay as they are.
    """
    small = {} if rank is None else compress_all({n: x for n, x in adapter.layers.items() if x.rank > rank}, rank)
    layers = {name: small.get(name, x) for name, x in adapter.layers.items()}
    gaps = {name: _gap(x, layers[name]) for name, x in adapter.layers.items()}
    sizes = {name: norm(x) for name, x in adapter.layers.items()}
    errors = {name: gaps[name] / sizes[name] if gaps[name] else 0.0 for name in layers}
    gap, size = (math.hypot(*values.values()) for values in (gaps, sizes))
    return Adapter(layers, adapter.dense), Cut(rank, errors, gap / size if gap else 0.0)


def _gap(x: LowRank, y: LowRank) -> float:
    """``|| x - y ||_F``, in float64 from the factors."""
    return 0.0 if x is y else norm(stack([LowRank(z.A.double(), z.B.double(), z.scale) for z in (x, y)], [1.0, -1.0]))


def write(export: Export, folder: Path, base: str | None = None) -> Export:
    """Writes the adapter or the merged model, with the config and the preprocessing that belong to it.

    Args:
        export: what to write.
        folder: where to.
        base: the base's name for readers, where the run has loaded a copy.

    Returns:
        The export, with what the base says: the type of merged weights, the channels of images; and whether what PEFT
        or Transformers load of it gives polyrank's logits.

    Raises:
        InputError: if it does not.
    """
    model, source = export.experiment.model, located(export.experiment.model)
    if export.merged is None:
        write_adapter(folder, export.adapter, replace(export.info, base=base or source))
        save_config(source, folder, None if export.kind == "causal" else export.setting["classes"])
        classes = export.setting["classes"]
        said = verify_adapter(export.experiment, export.kind, classes, export.adapter, folder)
        export = replace(export, verified=said)
    else:
        export = _merge(export, folder)
    if export.kind != "image":
        save_tokenizer(source, folder, model.max_length if export.kind == "text" else None)
        return export
    return replace(export, channels=save_image_processor(source, folder, model.image_size).channels)


def _merge(export: Export, folder: Path) -> Export:
    """Loads the base, adds the adapter to its weights, and writes them."""
    experiment, classes = export.experiment, export.setting["classes"]
    whole = small(experiment.model)  # an adapter is merged into the weights themselves, not into quantised ones
    base = load_base(whole, export.kind, classes, "cpu", stream(experiment.seed, "head"))
    missing = sorted(set(base.head) - export.adapter.dense.keys())
    if missing:
        raise AdapterError(f"{export.run.folder}: the adapter lacks {missing[0]} of the head")
    dtype = None if export.merged == "auto" else getattr(torch, str(export.merged))
    expected = sample(base, export.adapter)
    found = next(write_into(base, export.adapter, dtype).parameters()).dtype
    save_merged(base, folder)
    base.model.to("meta")  # one model in memory at a time
    said = verify_merged(expected, base, export.kind, folder)
    return replace(export, merged=str(found).removeprefix("torch."), verified=said)
