"""What a model is built of, asked of its modules: backbone, linear layers, transformer blocks, attention.

No list of families: modules may be on the meta device, and a model that nobody here has seen is read like any other.

A block is what a model repeats over its depth. Lists of modules are often something else: a stage holds blocks (Swin),
a block holds parts that come one after another (T5) or several times (MobileBERT's feed-forward networks), a mixture
holds experts. So lists are opened from the outside, and a member is opened in turn if a list in it holds whole blocks:
with attention and something beside it, or anything where the member has no attention at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_LISTS = (nn.ModuleList, nn.Sequential)
_ATTENTION = ("attention", "attn")
_FUSED = ("x_proj", "dt_proj", "out_proj")  # of a Mamba mixer
_SENSES = {"pixel_values", "input_features", "input_values"}  # what Transformers calls inputs that are no texts
_NUMBERED = re.compile(r"(?P<stem>.*?)_?\d+")


@dataclass(frozen=True)
class Structure:
    """What a model is built of.

    Attributes:
        backbone: the prefix of the backbone's names, such as ``bert.``; nothing where the model is its own backbone.
        linears: the backbone's linear layers as (d_out, d_in), in order.
        blocks: full names of its transformer blocks, in order.
        attention: those of `linears` that are inside the attention of a block.
        others: elements of the backbone's matrices and tensors that belong to no linear layer and no embedding, such as
            ``model.layers.*.mlp.experts.down_proj``, by name with ``*`` for numbers, the largest first.
        elements: of the whole backbone, as far as it runs.
        passed: linear layers whose weights the model reads past them, so that an adapter would not be asked.
    """

    backbone: str
    linears: Mapping[str, tuple[int, int]]
    blocks: tuple[str, ...]
    attention: frozenset[str]
    others: Mapping[str, int]
    elements: int
    passed: tuple[str, ...] = ()


def structure(model: nn.Module, head: frozenset[str] = frozenset()) -> Structure:
    """Reads a model.

    Args:
        model: a Transformers model.
        head: names of parameters that are trained dense, wherever they are.
    """
    backbone, blocks = backbone_of(model), blocks_of(model)
    modules = dict(model.named_modules())
    names = [n for n, m in modules.items() if is_linear(m) and n.startswith(backbone) and f"{n}.weight" not in head]
    idle = _idle(model, blocks)
    idle = [] if all(_within(name, idle) for name in names) else idle
    passed = tuple(name for name in names if _passed_by(modules, name))
    skipped = [*idle, *classifier_of(model)]
    linears = {n: shape_of(modules[n]) for n in names if not _within(n, skipped) and n not in passed}
    blocks = [block for block in blocks if block.startswith(backbone) and any(_within(n, [block]) for n in linears)]
    attention = (n for block in blocks for n in linears if _within(n, [block]) and _attends(modules, n, block))
    others: dict[str, int] = {}
    elements = sum(d_out * d_in for d_out, d_in in linears.values())
    for name, tensor in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if (
            not name.startswith(backbone)
            or name in head
            or _within(owner, skipped)
            or (owner in linears and leaf == "weight")
        ):
            continue
        elements += tensor.numel()
        if tensor.ndim > 1 and not isinstance(modules[owner], nn.Embedding):
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", owner if leaf == "weight" else name)
            others[kind] = others.get(kind, 0) + tensor.numel()
    largest = dict(sorted(others.items(), key=lambda entry: -entry[1]))
    return Structure(backbone, linears, tuple(blocks), frozenset(attention), largest, elements, passed)


def blocks_of(model: nn.Module) -> list[str]:
    """Full names of a model's transformer blocks, in order; those of all its parts, whichever of them run."""
    return _blocks(model, "")


def backbone_of(model: nn.Module) -> str:
    """The prefix of the backbone's names (``bert.``), or nothing where the model is its own backbone.

    Where the attribute that a Transformers class names for it is not there, it is the child that holds the blocks.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        return f"{prefix}."
    children = dict(model.named_children())
    holding = {name.partition(".")[0] for name in blocks_of(model)}
    if len(holding) != 1 or len(children) == 1 or isinstance(children[next(iter(holding))], _LISTS):
        return ""
    return f"{holding.pop()}."


def classifier_of(model: nn.Module) -> list[str]:
    """The linear layers that score classes in a classifier that is its own backbone, outside all blocks."""
    if backbone_of(model) or (hasattr(model, "can_generate") and model.can_generate()):  # type: ignore[operator]
        return []
    classes, blocks = getattr(model.config, "num_labels", None), blocks_of(model)
    outside = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _within(n, blocks)]
    return [name for name, module in outside if module.out_features == classes]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that runs as one, GPT-2's kind included: d_in numbers in, d_out numbers out."""
    return transposed(module) or (isinstance(module, nn.Linear) and _runs_as_linear(module))


def _runs_as_linear(module: nn.Linear) -> bool:
    """Not Llama 4's router, which gives two tensors, nor a layer whose weights torch's attention reads past it."""
    kind = type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes"):
        return True
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict().items()}
    x = torch.empty(1, 1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        y = functional_call(module, empty, (x,))
    except Exception:  # it is called in a way of its own
        return False
    return isinstance(y, Tensor) and y.shape == (1, 1, module.out_features)


def _passed_by(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a Mamba mixer reads the layer's weights past the layer, as its kernels do: no hook would be asked."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _FUSED and all(hasattr(modules[owner], sign) for sign in ("A_log", "D"))


def transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, which keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer."""
    if transposed(module):
        d_in, d_out = module.weight.shape  # type: ignore[union-attr, misc]
    else:
        d_out, d_in = module.out_features, module.in_features  # type: ignore[assignment]
    return int(d_out), int(d_in)


def _blocks(module: nn.Module, prefix: str) -> list[str]:
    """Full names of the blocks inside a module, in order."""
    found: list[str] = []
    children = dict(module.named_children())
    numbered = [] if isinstance(module, _LISTS) else _numbered(children)
    for name, child in children.items():
        full = f"{prefix}{name}"
        if isinstance(child, _LISTS):
            if "expert" not in name.lower():
                found += [block for key, member in child.named_children() for block in _opened(member, f"{full}.{key}")]
        elif name in numbered:
            found += _opened(child, full)
        else:
            found += _blocks(child, f"{full}.")
    return found


def _opened(member: nn.Module, name: str) -> list[str]:
    """A list's member as a block, or the blocks that it holds; nothing where it is too small to be one."""
    if is_linear(member) or not any(map(is_linear, member.modules())):
        return []
    if isinstance(member, _LISTS):
        return [block for key, part in member.named_children() for block in _opened(part, f"{name}.{key}")]
    inner = _blocks(member, f"{name}.")
    return inner if inner and _is_stage(member, [block[len(name) + 1 :] for block in inner]) else [name]


def _is_stage(member: nn.Module, inner: list[str]) -> bool:
    """Whether the lists inside hold whole blocks, not parts of one."""
    modules = dict(member.named_modules())
    linears = [name for name, module in modules.items() if is_linear(module)]
    if not any(_attends(modules, name, "") for name in linears):
        return True
    kinds = [{_attends(modules, n, block) for n in linears if n.startswith(f"{block}.")} for block in inner]
    return any(len(kind) == 2 for kind in kinds)


def _attends(modules: Mapping[str, nn.Module], name: str, block: str) -> bool:
    """Whether a linear layer is part of its block's attention, by the names and classes of what holds it.

    A block's own name counts, as a list of attentions has it; its class does not, as some are of an attention's layer.
    """
    start = block.rpartition(".")[0].rfind(".") + 1
    within = len(block) + 1 if block else 0
    holders = [type(modules[name[:i]]).__name__ for i, letter in enumerate(name) if letter == "." and i > within]
    return any(word in text.lower() for text in (name[start:], *holders) for word in _ATTENTION)


def _numbered(children: Mapping[str, nn.Module]) -> list[str]:
    """Children that are numbered in place of being a list, such as ``block1`` and ``block2``, of one class."""
    stems: dict[tuple[str, type], list[str]] = {}
    for name, child in children.items():
        if match := _NUMBERED.fullmatch(name):
            stems.setdefault((match["stem"], type(child)), []).append(name)
    return [name for names in stems.values() if len(names) > 1 for name in names]


def _idle(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Parts of a language model that do not run for texts: towers for images or sound, and what connects them to it.

    A tower is a model in the model whose input is another, or whose config is that of images or sound. What holds
    nothing but towers and no block beside them is idle, and so is what stands between a tower and the language model.
    """
    modules = dict(model.named_modules())
    inputs = {n: m.main_input_name for n, m in modules.items() if isinstance(getattr(m, "main_input_name", None), str)}
    if inputs.get("") != "input_ids":
        return []
    parts = getattr(model.config, "sub_configs", {}).items()
    strange = tuple(
        kind for key, kind in parts if any(sense in key for sense in ("vision", "image", "audio", "speech"))
    )
    towers = [
        n for n, x in inputs.items() if n and (x in _SENSES or type(getattr(modules[n], "config", None)) in strange)
    ]
    idle: dict[str, None] = {}
    for name in towers:
        parent = name.rpartition(".")[0]
        while parent and all(_within(block, towers) for block in blocks if _within(block, [parent])):
            name, parent = parent, parent.rpartition(".")[0]
        beside = [f"{parent}.{child}".lstrip(".") for child, _ in modules[parent].named_children()]
        language = [child for child in beside if inputs.get(child) == "input_ids" and not _within(child, towers)]
        idle |= dict.fromkeys([name, *(child for child in beside if language and child not in language)])
    return list(idle)


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
