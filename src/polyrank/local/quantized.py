"""Bases whose linear layers are kept in 8 or 4 bits, by bitsandbytes: what it takes, and what cannot be so.

Adapters stay in float32 and are attached by hooks as to any base; nothing is ever written into a quantised layer.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from polyrank.core.architecture import Quantization
from polyrank.errors import InputError
from polyrank.local.base import Base, backbone_of, transposed


def loading(wanted: Quantization, empty: Base, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What Transformers has to be told to load a quantised model.

    8 bits are LLM.int8 without outliers kept apart in training, 4 bits NF4; the arithmetic is in the base's dtype. The
    head, the embedding and the output layer stay as they are.

    Args:
        wanted: ``8bit`` or ``4bit``.
        empty: the model on the meta device.
        device: where it is to run.
        dtype: of everything else, and of the arithmetic.

    Raises:
        InputError: where it cannot be so, before a weight is read.
    """
    check_quantization(wanted, device)
    conv = [name for name, module in empty.modules.items() if transposed(module)]
    if conv:
        raise InputError(
            f"model.quantize: {wanted}: {conv[0]} of {empty.model.config.model_type} is a Conv1D, which keeps its "
            "weight transposed; leave model.quantize out, or take a model with linear layers"
        )
    backbone = backbone_of(empty.model)
    kept = [n for n, m in empty.modules.items() if isinstance(m, nn.Linear) and not n.startswith(backbone)]
    options: dict[str, Any] = {"load_in_8bit": True} if wanted == "8bit" else {"load_in_4bit": True}
    if wanted == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=kept)
    return {"quantization_config": config, "device_map": {"": device}}


def settled(model: nn.Module) -> nn.Module:
    """A model just loaded, kept from changing itself: bitsandbytes would, in passes without gradients.

    On CPUs with bfloat16 products it packs 4-bit weights anew and rounds their scales, so that training would go on
    from another base; and an 8-bit layer takes its bias over into the dtype of what it is given, such as autocast's.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if type(module).__name__ == "Linear8bitLt" and module.bias is not None:
            module.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(layer.bias.dtype), *inputs[1:]))
    return model


def check_quantization(wanted: Quantization, device: str) -> None:
    """Refuses a quantised base where nothing could run it.

    Raises:
        InputError: if a package is missing, or has no kernels for the device.
    """
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"model.quantize: {wanted}: {package} is not installed; install the extra `quant` "
                "(`pip install '.[quant]'` in a checkout), or leave model.quantize out"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    able = sorted(bitsandbytes.supported_torch_devices)
    if torch.device(device).type not in able:
        raise InputError(
            f"model.quantize: {wanted}: bitsandbytes {bitsandbytes.__version__} does not run on {device}, but on "
            f"{', '.join(able)}"
        )
