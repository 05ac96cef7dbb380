"""What Transformers and PEFT load: base models, tokenizers, image sizes, exported adapters. `saved` writes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from polyrank.core.architecture import Quantization
from polyrank.local import configs
from polyrank.local.adapters import read_adapter
from polyrank.local.attach import Batch
from polyrank.local.base import Base, backbone_of
from polyrank.local.configs import AUTO, WHAT
from polyrank.local.configs import ModelError as ModelError
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
    configs.config_of(name, kind)
    smaller = {} if quantize is None else _quantized(name, targets, kind, len(classes), device, dtype, quantize)
    labels = dict(enumerate(classes))
    head = {
        "num_labels": len(labels),
        "id2label": labels,
        "label2id": {text: index for index, text in labels.items()},
        "ignore_mismatched_sizes": True,
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63 - 1)))
        try:
            model, report = getattr(transformers, AUTO[kind]).from_pretrained(
                name,
                **({} if kind == "causal" else head),
                output_loading_info=True,
                trust_remote_code=False,
                dtype=_dtype(dtype),
                **_attention(attention),
                **smaller,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.name: {name!r} cannot be loaded as a {WHAT[kind]}: {error}") from None
    if kind == "causal" and report["missing_keys"]:
        raise ModelError(f"model.name: {name!r} lacks {sorted(report['missing_keys'])[0]}: not a causal language model")
    prefix = backbone_of(model)
    misshapen = [entry[0] for entry in report["mismatched_keys"] if entry[0].startswith(prefix)]
    if misshapen:
        raise ModelError(f"model.name: {name!r} does not fit its own config: {misshapen[0]} has another shape")
    _check_dtype(model.dtype, device)
    new = [key for key in report["missing_keys"] if key.startswith(prefix)]
    if new and quantize is not None:
        raise ModelError(f"model.quantize: {quantize}: {name!r} lacks {min(new)}, and what is new is not quantised")
    model = settled(_with_padding(model) if kind == "text" else model)
    made = {"name": name, "device": device, "new": report["missing_keys"], "tokens": tokens}
    return Base(model, targets, **made, kind=kind, image_size=image_size)


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
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        shown = repr(name) if isinstance(name, str) else name.model_type
        config = configs.config_of(name, kind) if isinstance(name, str) else name
        configs.check_kind(config, kind, shown)
        if classes is not None and kind != "causal":
            config.num_labels = classes
        config.architectures = config.architectures or []
        try:
            with torch.device(device):
                model = getattr(transformers, AUTO[kind]).from_config(
                    config, dtype=_dtype(dtype, config), **_attention(attention)
                )
        except Exception as error:  # a config's values are the user's, and fail in any way in the library's hands
            reason = configs.first_line(error)
            raise ModelError(f"model.name: {shown} cannot be made from its config: {reason}") from None
    model = model if kind == "image" else _with_padding(model)
    return Base(model, targets, name=str(name), device=device, tokens=tokens, kind=kind, image_size=image_size)


def _with_padding(model: nn.Module) -> nn.Module:
    """Decoders need to know which token pads a text."""
    padded(model.config)
    return model


def padded(config: Any) -> Any:
    """A text model's config, with a token that pads texts: their end, where nothing else is said."""
    if hasattr(config, "vocab_size") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = getattr(config, "eos_token_id", None) or 0
    return config


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


def load_exported(base: Base, folder: Path) -> Callable[[Batch], Tensor]:
    """Logits of the base with an exported adapter, loaded by PEFT itself. The base carries it from then on.

    Raises:
        ModelError: if it is a LoKr on GPT-2's kind of linear layer, which PEFT cannot load.
    """
    if base.info.fan_in_fan_out and read_adapter(folder)[1].rank is not None:
        raise ModelError(f"{folder}: PEFT has no LoKr for Conv1D layers, GPT-2's, so it cannot load this adapter")
    from peft import PeftModel  # with all that it imports, a second that most commands need not wait

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base.model, str(folder)).to(base.device).eval()
    return lambda batch: model(**base.inputs(batch)).logits


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars and without warnings about the new head, which is expected."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
