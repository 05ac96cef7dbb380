"""How a model takes images of a size: asked of the model itself, with one image and nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.local import configs
from polyrank.local.configs import ModelError
from polyrank.local.structure import blocks_of


@dataclass(frozen=True)
class Images:
    """How a model takes images.

    Attributes:
        size: pixels per side.
        channels: of an image.
        tokens: positions that enter its first block; 0 where they are in no row (a convolution's), or not known.
        extra: what it is called with besides the images.
    """

    size: int
    channels: int = 3
    tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def images_of(model: nn.Module, image_size: int | None) -> Images:
    """Runs one image of zeros through the model, which may be on the meta device.

    Where images are not of the model's own size, it is first called as usual, and then told to interpolate its position
    embeddings.

    Args:
        model: an image classifier.
        image_size: pixels per side; None: as its config says.

    Raises:
        ModelError: if it takes no images of this size, or nobody has stated one.
    """
    config: Any = model.config
    usual, channels = configs.image_size(config), configs.channels(config)
    size = image_size or usual
    if size is None:
        raise ModelError(f"model.image_size: a {config.model_type} model does not state an image size; give one")
    ways: list[dict[str, Any]] = [{}] if size == usual else [{}, {"interpolate_pos_encoding": True}]
    faults = []
    for extra in ways:
        try:
            return Images(size, channels, _positions(model, size, channels, extra, size != usual), extra)
        except Exception as error:  # any of Transformers' models may refuse a size in any way
            faults.append(error)
    if size == usual or (model.device.type == "meta" and usual is not None and not _runs(model, usual, channels)):
        return Images(size, channels)  # it cannot be asked on the meta device
    own = "" if usual is None else f" of {usual} x {usual} pixels"
    reason = configs.first_line(faults[0])
    raise ModelError(f"model.image_size: {size}: {config.model_type} takes images{own} alone: {reason}")


def _runs(model: nn.Module, size: int, channels: int) -> bool:
    try:
        _positions(model, size, channels, {})
    except Exception:
        return False
    return True


class _Entered(Exception):  # noqa: N818 -- nothing went wrong
    """The pass has come to the first block."""


def _positions(model: nn.Module, size: int, channels: int, extra: Mapping[str, Any], whole: bool = True) -> int:
    """The T of what enters the first block, where that is 1 x T x d; `whole`: whether the rest of the pass runs."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next((x for x in (*args, *named.values()) if isinstance(x, Tensor)), None)
        seen.append(x.shape[1] if x is not None and x.ndim == 3 and x.shape[0] == 1 else 0)
        if not whole:
            raise _Entered

    blocks = blocks_of(model)
    handle = model.get_submodule(blocks[0]).register_forward_pre_hook(note, with_kwargs=True) if blocks else None
    training = model.training
    try:
        pixels = torch.zeros(1, channels, size, size, device=model.device, dtype=model.dtype)  # type: ignore[call-overload]
        with torch.no_grad():
            model.eval()(pixel_values=pixels, **extra)
    except _Entered:
        pass
    finally:
        model.train(training)
        if handle is not None:
            handle.remove()
    return seen[0] if seen else 0
