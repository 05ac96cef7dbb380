"""What training and sending a rank costs: bytes of memory, bytes on the wire, operations, seconds. No GPU is asked."""

from polyrank.core.costs.families import FAMILIES
from polyrank.core.costs.memory import Memory, NoFormula, adapter_elements, base_bytes, memory, record
from polyrank.core.costs.tape import peak_bytes, saved_bytes

__all__ = [
    "FAMILIES",
    "Memory",
    "NoFormula",
    "adapter_elements",
    "base_bytes",
    "memory",
    "peak_bytes",
    "record",
    "saved_bytes",
]
