"""Numbers as people write them: ``2 GiB``, ``7.08 Mbit/s``, ``1/3``."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BYTES = {f"{p}B": n for p, n in _DECIMAL.items()} | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BITS = {f"{p}bit/s": n for p, n in _DECIMAL.items()} | {f"{p}B/s": 8 * n for p, n in _DECIMAL.items()}
_FLOPS = {f"{p}FLOP/s": n for p, n in _DECIMAL.items()}


def _quantity(units: dict[str, int], example: str, *words: str) -> BeforeValidator:
    def parse(value: Any) -> Any:
        if value in words:
            return value
        if not isinstance(value, str):
            raise ValueError(f"needs a unit, for example {example!r}")
        match = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S+)\s*", value)
        if not match or match[2] not in units:
            known = "".join(f", nor {word}" for word in words)
            raise ValueError(f"is not a quantity such as {example!r}{known}; units: {', '.join(units)}")
        number = float(match[1]) * units[match[2]]
        if not (number > 0 and math.isfinite(number)):
            raise ValueError("must be more than 0")
        return number

    return BeforeValidator(parse, json_schema_input_type=str)


def _share(value: Any) -> Any:
    try:
        if not isinstance(value, str):
            return value
        parts = re.fullmatch(r"\s*(\d{1,15})\s*/\s*(\d{1,15})\s*", value)
        return int(parts[1]) / int(parts[2]) if parts else float(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError("is not a share such as '1/3' or 0.25") from None


Memory = Annotated[float, _quantity(_BYTES, "2 GiB")]
"""Bytes."""

FreeMemory = Annotated[float | Literal["detect"], _quantity(_BYTES, "2 GiB", "detect")]
"""Bytes, or what is free where the experiment runs."""

CacheMemory = Annotated[float | Literal["auto", "off"], _quantity(_BYTES, "2 GiB", "auto", "off")]
"""Bytes that a cache may take, none, or as many as pay."""

Speed = Annotated[float, _quantity(_BITS, "7.08 Mbit/s")]
"""Bits per second."""

Flops = Annotated[float, _quantity(_FLOPS, "10 TFLOP/s")]
"""Floating-point operations per second."""

Share = Annotated[float, BeforeValidator(_share, json_schema_input_type=float | str), Field(gt=0, le=1)]
"""A part of a whole."""

Multiple = Annotated[float, Field(ge=1)] | Literal["auto", "off"]
"""So many times what is usual, no bound, or a bound where clients are on other machines."""
