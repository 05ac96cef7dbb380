"""What Transformers and PEFT load: base models, tokenizers, image sizes, exported adapters. `saved` writes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from polyrank.core.architecture import Quantization
from polyrank.local import configs, peft_layers
from polyrank.local.adapters import read_adapter
from polyrank.local.attach import Batch
from polyrank.local.base import Base, backbone_of
from polyrank.local.causality import check_causal, check_causal_config
from polyrank.local.checkpoint import CheckpointError, check_weights, entries
from polyrank.local.completeness import check_complete, gaps_of, gaps_without_weights
from polyrank.local.configs import AUTO, WHAT
from polyrank.local.pretrained import (
    ModelError,
    config_of,
    padding_token,
    quiet,
    tell_padding,
    tokenizer_at_hand,
    without_strange_padding,
)
from polyrank.local.quantized import check_quantization, loading, settled


def locate(name: str) -> str:
    """A model's name as Transformers takes it.

    ``package:PKG/DIR`` is a folder inside an installed Python package; the path of a folder stays, and so does a hub
    name.

    Raises:
        ModelError: if the package is not installed, has no such folder, or a path does not exist.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise ModelError(f"model.name: package {package!r} is not installed")
        path = Path(found.origin).parent / inner
        if not path.is_dir():
            raise ModelError(f"model.name: package {package!r} has no folder {inner!r}")
        return str(path)
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ModelError(f"model.name: no folder {name}")
    return name


def load_base(
    name: str,
    targets: str | Sequence[str],
    *,
    kind: str,
    classes: Sequence[str],
    rng: np.random.Generator,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: int | None = None,
    attention: str = "auto",
    tokens: int = 0,
    quantize: Quantization | None = None,
) -> Base:
    """Loads a classifier with a head for `classes`, or a causal language model, whose head stays as it is.

    A head that a classifier's checkpoint does not have is drawn from `rng`.

    Args:
        name: hub name or folder, as `locate` returns it.
        targets: see `polyrank.local.targets`.
        kind: ``text``, ``image`` or ``causal``.
        classes: names of the classes, in order of their labels; of no use to a causal model.
        rng: initialises the head.
        device: where to put the model.
        dtype: of the base: ``float32``, ``bfloat16``, ``float16`` on a GPU, or ``auto`` for the checkpoint's.
        image_size: pixels per side, where it is not the model's own (position embeddings are interpolated).
        attention: ``eager``, ``sdpa``, or ``auto`` for the library's choice.
        tokens: positions per text, for the cost model; an image's follow from its size.
        quantize: ``8bit`` or ``4bit`` for the linear layers of the backbone.

    Raises:
        ModelError: if the model cannot be loaded or is not of this kind, or this device has no use for its dtype.
        InputError: if it cannot be quantised here.
    """
    _check_dtype(getattr(torch, dtype, None), device)
    smaller = {} if quantize is None else _quantized(name, targets, kind, len(classes), device, dtype, quantize)
    config = _config(name, kind)
    if kind != "causal":
        labels = dict(enumerate(classes))
        config.num_labels, config.id2label = len(labels), labels
        config.label2id = {text: index for index, text in labels.items()}
    files = _entries(name, kind)
    if files is None and Path(name).is_dir():
        _checked(name, kind, check_weights)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63 - 1)))
        try:
            model, report = getattr(transformers, AUTO[kind]).from_pretrained(
                name,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                dtype=_dtype(dtype),
                **_attention(attention),
                **smaller,
            )
        except Exception as error:  # whatever a library makes of files that somebody else has written
            reason = configs.first_line(error)
            raise ModelError(f"model.name: {name!r} cannot be loaded as {configs.a(WHAT[kind])}: {reason}") from None
    check_complete(model, gaps_of(report), name, causal=kind == "causal")
    _check_dtype(model.dtype, device)
    new = [key for key in report["missing_keys"] if key.startswith(backbone_of(model))]
    if new and quantize is not None:
        raise ModelError(f"model.quantize: {quantize}: {name!r} lacks {min(new)}, and what is new is not quantised")
    if kind != "image":
        tell_padding(model.config, padding_token(model.config, tokenizer_at_hand(name, download=True)))
    made = {"name": name, "device": device, "new": report["missing_keys"], "tokens": tokens}
    base = Base(settled(model), targets, **made, kind=kind, image_size=image_size)
    if kind == "causal":
        check_causal(base)
    return base


def base_from_config(
    name: str | Any,
    targets: str | Sequence[str],
    *,
    kind: str,
    classes: int | None,
    tokens: int,
    device: str,
    dtype: str = "float32",
    image_size: int | None = None,
    attention: str = "auto",
) -> Base:
    """A classifier from its config alone: on the ``meta`` device without weights, elsewhere with random ones.

    Args:
        name: hub name or folder, as `locate` returns it; a folder needs no more than a config.json. Or a config.
        targets: see `polyrank.local.targets`.
        kind: ``text``, ``image`` or ``causal``.
        classes: outputs of the head; None: as the config says.
        tokens: positions per text; an image's follow from its size.
        device: where to put the model.
        dtype, image_size, attention: see `load_base`.

    Raises:
        ModelError: if there is no such config, or it is not one of this kind.
    """
    config = _config(name, kind) if isinstance(name, str) else without_strange_padding(name)
    if classes is not None and kind != "causal":
        config.num_labels = classes
    config.architectures = config.architectures or []
    shown = repr(name) if isinstance(name, str) else name.model_type
    model = _made(config, kind, shown, device, dtype=_dtype(dtype, config), **_attention(attention))
    if kind != "image":
        tokenizer = tokenizer_at_hand(name) if isinstance(name, str) else None
        tell_padding(model.config, padding_token(model.config, tokenizer))
    return Base(model, targets, name=str(name), device=device, tokens=tokens, kind=kind, image_size=image_size)


def check_files(name: str, kind: str) -> None:
    """Holds a local folder's weights, if it has any, against its config; of the files, headers alone are read.

    Raises:
        InputError: if a file is broken or missing, or a backbone is not whole.
    """
    files = _entries(name, kind)
    config = _config(name, kind)
    if files is None or getattr(config, "quantization_config", None) is not None:
        return
    model = _made(config, kind, repr(name), "meta")
    with quiet(), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        gaps = gaps_without_weights(model, files)
    check_complete(model, gaps, name, causal=kind == "causal")


def _made(config: Any, kind: str, shown: str, device: str, **options: Any) -> nn.Module:
    """A model without a checkpoint."""
    configs.check_kind(config, kind, shown)
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device(device):
        warnings.simplefilter("ignore")
        try:
            model: nn.Module = getattr(transformers, AUTO[kind]).from_config(config, **options)
        except Exception as error:  # whatever a library makes of a config that somebody else has written
            reason = configs.first_line(error)
            raise ModelError(f"model.name: {shown} cannot be loaded as {configs.a(WHAT[kind])}: {reason}") from None
    return model


def _config(name: str, kind: str) -> Any:
    """The config of a model of this kind."""
    config = config_of(name, WHAT[kind])
    if kind == "causal":
        check_causal_config(config, name, type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING)
    configs.check_kind(config, kind, repr(name))
    return config


def _entries(name: str, kind: str) -> Any:
    return _checked(name, kind, entries) if Path(name).is_dir() else None


def _checked(name: str, kind: str, check: Callable[[Path], Any]) -> Any:
    """What a look at a folder's files gives; what is wrong with them, as what is wrong with the model."""
    try:
        return check(Path(name))
    except CheckpointError as error:
        raise ModelError(f"model.name: {name!r} cannot be loaded as {configs.a(WHAT[kind])}: {error}") from None


def _quantized(
    name: str, targets: str | Sequence[str], kind: str, classes: int, device: str, dtype: str, quantize: Quantization
) -> dict[str, Any]:
    """What has to be said to load the linear layers quantised; refused, where it has to be, before a weight is read."""
    check_quantization(quantize, device)
    empty = base_from_config(name, targets, kind=kind, classes=classes, tokens=0, device="meta", dtype=dtype)
    return loading(quantize, empty, device, empty.model.dtype)  # type: ignore[arg-type]


def _check_dtype(dtype: torch.dtype | None, device: str) -> None:
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        raise ModelError("model.dtype: float16: training on a CPU takes float32 or bfloat16; float16 takes a GPU")


def _dtype(dtype: str, config: Any = None) -> Any:
    stated = getattr(config, "dtype", None) or torch.float32
    return (stated if config is not None else dtype) if dtype == "auto" else getattr(torch, dtype)


def _attention(attention: str) -> dict[str, str]:
    return {} if attention == "auto" else {"attn_implementation": attention}


def small_vit_config(
    image_size: int, patch_size: int, hidden: int, layers: int, heads: int, channels: int, classes: int
) -> Any:
    """The config of a small ViT classifier, for models that are trained on the spot."""
    return transformers.ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_channels=channels,
        num_labels=classes,
    )


def random_vit(config: Any, rng: np.random.Generator) -> nn.Module:
    """A ViT classifier of this config with weights drawn from `rng`."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63 - 1)))
        return transformers.ViTForImageClassification(config)


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes a model as Transformers reads it."""
    with quiet():
        model.save_pretrained(folder)


def load_plain(folder: Path, kind: str) -> Callable[[Batch], Tensor]:
    """Logits of a whole model, loaded from its folder as anybody loads it."""
    with quiet():
        model = getattr(transformers, AUTO[kind]).from_pretrained(str(folder), dtype="auto").eval()
    return lambda batch: model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def load_exported(base: Base, folder: Path) -> Callable[[Batch], Tensor]:
    """Logits of the base with an exported adapter, loaded by PEFT itself. The base carries it from then on.

    Raises:
        ModelError: if it is a LoKr on GPT-2's kind of linear layer, which PEFT cannot load, or PEFT loses layers of it.
    """
    adapter, info = read_adapter(folder)
    if base.info.fan_in_fan_out and info.rank is not None:
        raise ModelError(f"{folder}: PEFT has no LoKr for Conv1D layers, GPT-2's, so it cannot load this adapter")
    return peft_layers.loaded(base, folder, adapter)
