"""How a method looks: the same colour, marker and dash in every chart, report and format.

The colours are six of Okabe and Ito's, which colour-blind readers can tell apart, on white and on dark paper. There
are more methods than such colours, so a marker and a dash go with each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
NEUTRAL = "#7A7F87"

# A method's place is its look: new ones go to the end.
_NAMED = (
    *("fedit", "hetlora", "flexlora", "rb_lora", "hralora", "fed_hello"),
    *("flora", "fedex_lora", "ffa_lora", "rolora", "lora_fair", "fedsvd"),
    *("rbla", "legend", "fedra", "gd_hla", "rgd_hla", "fim_hla"),
    *("lokr", "straggler", "exclusive", "hetlora_uniform", "hetlora_weighted", "raflora"),
    *("trimmed_mean", "median", "krum", "norm_clipping"),
)


@dataclass(frozen=True)
class Style:
    """A look: ``color`` as #rrggbb, ``marker`` and ``dash`` by Plotly's names."""

    color: str
    marker: str
    dash: str


_BASELINES = {
    "single": Style(NEUTRAL, "triangle-up", "dash"),
    "local": Style(NEUTRAL, "triangle-down", "dot"),
    "zero_shot": Style(NEUTRAL, "x", "dashdot"),
}


def style_of(method: str, setting: int = 0) -> Style:
    """The look of a method, whatever else is shown; settings of one method differ by dash.

    Args:
        method: its label. One that has no place of its own gets one that follows from its name.
        setting: number of its setting, from 0.
    """
    if method in _BASELINES:
        look = _BASELINES[method]
        return replace(look, dash=DASHES[(DASHES.index(look.dash) + setting) % len(DASHES)])
    if method in _NAMED:
        place = _NAMED.index(method)
    else:
        digest = hashlib.sha256(method.encode(errors="backslashreplace")).digest()
        place = int.from_bytes(digest[:4], "big") % (len(COLORS) * len(MARKERS))
    row, column = divmod(place, len(COLORS))
    look = Style(COLORS[column], MARKERS[(column + 7 * row) % len(MARKERS)], DASHES[row % len(DASHES)])
    return replace(look, dash=DASHES[(row + setting) % len(DASHES)])
