"""How the values of a message travel: as they are, or in fewer bits.

Every encoding turns a list of float32 tensors into a few flat ones, whose types and lengths follow from the tensors'
sizes alone: a receiver knows what it must get before it looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Encoding = Literal["float32", "bfloat16", "int8", "nf4"]
Sizes = Sequence[int]

BLOCK = 64
"""Values that share a scale. Blocks do not cross from one tensor into the next."""

# The quantiles of a normal distribution that NormalFloat takes (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@dataclass(frozen=True)
class Codec:
    """An encoding.

    Attributes:
        exact: whether float32 values come back as they were.
        layout: sizes of the tensors -> name, type and length of each flat tensor that travels.
        pack: the tensors -> the flat ones.
        unpack: the flat ones and the sizes -> the tensors, one-dimensional float32, each in memory of its own.
    """

    exact: bool
    layout: Callable[[Sizes], dict[str, tuple[torch.dtype, int]]]
    pack: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Sizes], list[Tensor]]

    def nbytes(self, sizes: Sizes) -> int:
        """Bytes of the tensors that travel."""
        return sum(dtype.itemsize * length for dtype, length in self.layout(sizes).values())


def relative_error(tensors: Sequence[Tensor], received: Sequence[Tensor]) -> float:
    """The L2 distance of what is received from what was sent, relative to the latter."""
    pairs = zip(tensors, received, strict=True)
    lost = math.hypot(*(float(torch.linalg.vector_norm(x.flatten() - y.flatten())) for x, y in pairs))
    size = math.hypot(*(float(torch.linalg.vector_norm(x)) for x in tensors))
    return lost / size if size else lost


def _plain(dtype: torch.dtype, exact: bool) -> Codec:
    def pack(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"values": torch.cat([torch.zeros(0), *(x.flatten() for x in tensors)]).to(dtype)}

    def unpack(parts: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
        return [part.to(torch.float32, copy=True) for part in parts["values"].split(list(sizes))]

    return Codec(exact, lambda sizes: {"values": (dtype, sum(sizes))}, pack, unpack)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of a tensor divided by their largest magnitude, (blocks, BLOCK), padded with zeros; the magnitudes."""
    blocks = torch.zeros(_blocks(x.numel()) * BLOCK)
    blocks[: x.numel()] = x.flatten()
    blocks = blocks.view(_blocks(x.numel()), BLOCK)
    scales = blocks.abs().amax(1)
    return blocks / torch.where(scales > 0, scales, 1.0)[:, None], scales


def _whole(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """The tensor back from its values between -1 and 1 and the scales of their blocks."""
    return (values * scales.repeat_interleave(BLOCK)[:size]).clone()


def _pack_int8(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    codes, scales = [torch.zeros(0, dtype=torch.int8)], [torch.zeros(0)]
    for x in tensors:
        blocks, own = _scaled(x)
        codes.append((blocks * 127).round().to(torch.int8).flatten()[: x.numel()])
        scales.append(own)
    return {"codes": torch.cat(codes), "scales": torch.cat(scales)}


def _unpack_int8(parts: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
    codes, scales = parts["codes"].split(list(sizes)), parts["scales"].split([_blocks(size) for size in sizes])
    return [_whole(c.float() / 127, s, n) for c, s, n in zip(codes, scales, sizes, strict=True)]


def _pack_nf4(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    codes, scales = [torch.zeros(0, dtype=torch.uint8)], [torch.zeros(0)]
    between = (NF4[1:] + NF4[:-1]) / 2
    for x in tensors:
        blocks, own = _scaled(x)
        nearest = torch.bucketize(blocks.flatten()[: x.numel() + x.numel() % 2], between).to(torch.uint8)
        codes.append(nearest[::2] * 16 + nearest[1::2])
        scales.append(own)
    return {"codes": torch.cat(codes), "scales": torch.cat(scales)}


def _unpack_nf4(parts: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
    codes = parts["codes"].split([(size + 1) // 2 for size in sizes])
    scales = parts["scales"].split([_blocks(size) for size in sizes])
    pairs = [NF4[torch.stack([c // 16, c % 16], 1).long()].flatten() for c in codes]
    return [_whole(values[:n], s, n) for values, s, n in zip(pairs, scales, sizes, strict=True)]


def _blockwise(code: torch.dtype, codes: Callable[[int], int]) -> Callable[[Sizes], dict[str, tuple[torch.dtype, int]]]:
    def layout(sizes: Sizes) -> dict[str, tuple[torch.dtype, int]]:
        return {"codes": (code, sum(map(codes, sizes))), "scales": (torch.float32, sum(map(_blocks, sizes)))}

    return layout


CODECS: Mapping[Encoding, Codec] = {
    "float32": _plain(torch.float32, exact=True),
    "bfloat16": _plain(torch.bfloat16, exact=False),
    "int8": Codec(False, _blockwise(torch.int8, lambda size: size), _pack_int8, _unpack_int8),
    "nf4": Codec(False, _blockwise(torch.uint8, lambda size: (size + 1) // 2), _pack_nf4, _unpack_nf4),
}
"""int8 and nf4 scale every `BLOCK` values by their largest magnitude: 27 % and 14 % of the bytes of float32."""
