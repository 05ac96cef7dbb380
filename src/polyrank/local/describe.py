"""What a model is made of, read from its config and its modules, which may be on the meta device, without data."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyrank.core.architecture import Architecture, Quantization
from polyrank.core.costs import ACTIVATIONS
from polyrank.local.configs import vocabulary
from polyrank.local.structure import Structure

# Transformers' model types whose blocks run as one of the families of `polyrank.core.costs`, with the number of linear
# layers that such a block has.
_FAMILIES = {
    "bert": ("bert", 6),
    "bloom": ("bloom", 4),
    "deit": ("vit", 6),
    "electra": ("bert", 6),
    "gpt2": ("gpt2", 4),
    "gpt_neox": ("gpt_neox", 4),
    "llama": ("llama", 7),
    "mistral": ("llama", 7),
    "opt": ("opt", 6),
    "qwen2": ("llama", 7),
    "roberta": ("bert", 6),
    "vit": ("vit", 6),
}


def architecture(model: nn.Module, found: Structure, tokens: int, *, causal: bool = False) -> Architecture:
    """The model as the cost model sees it.

    Args:
        model: a Transformers model.
        found: what it is built of.
        tokens: positions per example.
        causal: whether it predicts the next token at every position.
    """
    config: Any = model.config
    linears = found.linears
    inside = tuple(tuple(name for name in linears if name.startswith(f"{block}.")) for block in found.blocks)
    family, per_block = _FAMILIES.get(config.model_type, ("", 0))
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    activation = "bloom_gelu" if config.model_type == "bloom" else str(activation)
    hidden, heads = (_number(config, name) for name in ("hidden_size", "num_attention_heads"))
    plain = all(len(names) == per_block for names in inside) and activation in ACTIVATIONS and hidden and heads
    if not plain or not tokens or not _usual(config):
        family = ""  # a variant with other layers, such as cross-attention, or inputs of unknown length
    parameters = list(model.parameters())
    quantization = quantization_of(model)
    packed = sum(d_out * d_in // 2 for d_out, d_in in linears.values()) if quantization == "4bit" else 0
    return Architecture(
        family=family,
        linears=dict(linears),
        blocks=inside,
        after=tuple(name for name in linears if not any(name in names for names in inside)),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        activation=activation,
        attention="eager" if config._attn_implementation == "eager" else "sdpa",
        tokens=tokens,
        classes=vocabulary(config) if causal else config.num_labels,
        causal=causal,
        weights=max((p.element_size() for p in parameters if p.is_floating_point()), default=4),
        parameters=sum(p.numel() for p in parameters) + packed,  # two elements a byte
        quantization=quantization,
        rotated=(getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0),
        kind=config.model_type,
        backbone=found.elements,
        others=found.others,
    )


def _number(config: Any, name: str) -> int:
    """A size that is one whole number for all blocks; 0 where it is not stated, or another for each stage."""
    stated = getattr(config, name, None)
    return stated if isinstance(stated, int) else 0


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the linear layers of a loaded model are quantised, if they are."""
    kinds = {type(module).__name__ for module in model.modules()}
    return "8bit" if "Linear8bitLt" in kinds else "4bit" if "Linear4bit" in kinds else None


def _usual(config: Any) -> bool:
    """Whether the blocks are put together as most models of the family are: Pythia's, OPT's but for the one of 350M."""
    before = getattr(config, "do_layer_norm_before", True) and not getattr(config, "_remove_final_layer_norm", False)
    return bool(before and getattr(config, "use_parallel_residual", True))
