"""What PEFT makes of an adapter: it renames layers where Transformers has renamed a family's, and may lose some."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, zeros
from polyrank.local.adapters import write_adapter
from polyrank.local.attach import Batch
from polyrank.local.base import Base
from polyrank.local.peft_config import check_names
from polyrank.local.pretrained import ModelError, quiet

_SHOWN = 9


def loaded(base: Base, folder: Path, adapter: Adapter) -> Callable[[Batch], Tensor]:
    """Logits of the base with an adapter's folder, by PEFT. The base carries it from then on.

    Args:
        base: of the adapter.
        folder: the adapter's.
        adapter: what the folder holds.

    Raises:
        AdapterError: if its config names modules by regular expressions, which PEFT would match in unbounded time.
        ModelError: if PEFT cannot load it, or loses layers of it.
    """
    check_names(folder)
    try:
        model = _peft(base, folder)
    except Exception as error:  # whatever a library makes of a folder
        raise ModelError(f"{folder}: PEFT {version('peft')} cannot load this adapter: {error}") from None
    model = model.to(base.device).eval()
    lost = [name for name, x in adapter.layers.items() if x.rank and not _has(model, name, x.B)]
    if lost:
        raise ModelError(f"{folder}: {loss(lost, len(adapter.layers), base)}")
    return lambda batch: model(**base.inputs(batch)).logits


def lost_layers(base: Base) -> list[str]:
    """Targeted layers that PEFT would lose of an exported adapter. The base, on the meta device, is of no use after.

    Only where Transformers has renamed layers of a family does PEFT rename those of adapters, and is it asked: an
    adapter of zeros is written and loaded.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # what Transformers renames

    if not get_checkpoint_conversion_mapping(base.model.config.model_type):
        return []
    layers = {name: zeros(shape, 1) for name, shape in base.spec.modules.items()}
    parameters = dict(base.model.named_parameters())
    head = {name: torch.zeros(parameters[name].shape) for name in base.head}
    with TemporaryDirectory() as folder:
        write_adapter(Path(folder), Adapter(layers, head), base.info)
        try:
            model = _peft(base, Path(folder))
            report = model.load_adapter(folder, "default", low_cpu_mem_usage=True)
        except Exception:  # it loads all of an adapter or none
            return list(layers)
    strange = " ".join(report.unexpected_keys)
    return [name for name in layers if not _has(model, name, None) or f".{name}.lora_" in f" .{strange}"]


def loss(lost: Sequence[str], layers: int, base: Base) -> str:
    """What there is to say of layers that PEFT loses."""
    shown = ", ".join(lost[:_SHOWN]) + (" and more" if len(lost) > _SHOWN else "")
    return (
        f"PEFT {version('peft')} loses {len(lost)} of {layers} layers of an adapter when it loads it on a "
        f"{base.model.config.model_type}: {shown}; the model with the adapter merged in "
        "(`polyrank export --merge`) is right"
    )


def _peft(base: Base, folder: Path) -> Any:
    from peft import PeftModel  # with all that it imports, a second that most commands need not wait

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base.model, str(folder), low_cpu_mem_usage=base.model.device.type == "meta")


def _has(model: nn.Module, name: str, B: Tensor | None) -> bool:
    """Whether a PEFT model has a layer's adapter, with these values if any are given."""
    module = dict(model.named_modules()).get(f"base_model.model.{name}")
    factors: Any = getattr(module, "lora_B", {})
    if "default" not in factors:
        return False
    weight = factors["default"].weight
    return B is None or torch.equal(weight.cpu(), B.to(weight.dtype))
