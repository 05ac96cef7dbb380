"""What does the client receive? Dispatchers cut the server's adapter to a client's ranks.

All of them hand out real rank-r factors. `scaling` sets the scale the client trains under; the delta it receives
is the same in every case, half of the ratio of scales on each factor, as the rules that average factors take it back:

    constant   the server's scale for everybody (alpha proportional to the rank)
    lora       one alpha for all: scale = alpha / r, so scale_server * rank_server / r
    rslora     one alpha for all, rank-stabilised: scale = alpha / sqrt(r)   (arXiv 2312.03732)
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from polyrank.core.lowrank import LowRank, pad, rescale, tail
from polyrank.core.lowrank import truncate as cut
from polyrank.core.method import Dispatch, Ranks
from polyrank.core.types import ServerState

Scaling = Literal["constant", "lora", "rslora"]


def truncate(
    state: ServerState, ranks: Ranks, rng: np.random.Generator, *, scaling: Scaling = "constant"
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """The first r rows of each layer; the client never sees the rest.

    Where the server's factors are ordered by energy this is the truncated SVD. A rank above the server's adds
    rows as a fresh LoRA would have them, so that they can learn.
    """
    return {name: _cut(state.adapter.layers[name], rank, rng, scaling) for name, rank in ranks.items()}, {}


def whole(
    state: ServerState, ranks: Ranks, rng: np.random.Generator, *, scaling: Scaling = "constant"
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """The first r rows to train and all the rest to run, frozen: every client computes with the whole adapter.

    The same forward pass and gradients as a mask on the full adapter, at rank-r gradients, optimizer states and
    upload. Layers the client does not train are carried whole.
    """
    trained, _ = truncate(state, ranks, rng, scaling=scaling)
    carried = {
        name: tail(x, ranks.get(name, 0)) for name, x in state.adapter.layers.items() if x.rank > ranks.get(name, 0)
    }
    return trained, carried


def _cut(x: LowRank, rank: int, rng: np.random.Generator, scaling: Scaling) -> LowRank:
    ratio = {"constant": 1.0, "lora": x.rank / rank, "rslora": (x.rank / rank) ** 0.5}[scaling]
    return pad(rescale(cut(x, rank), x.scale * ratio, fold="both"), rank, rng)


DISPATCHERS: dict[str, Dispatch] = {
    "truncate": truncate,
    "whole": whole,
}
