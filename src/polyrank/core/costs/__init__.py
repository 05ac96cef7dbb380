"""What training and sending a rank costs: bytes of memory, bytes on the wire, operations, seconds. No GPU is asked."""

from polyrank.core.costs.families import FAMILIES
from polyrank.core.costs.memory import Memory, NoFormulaError, adapter_elements, base_bytes, memory, record, task_memory
from polyrank.core.costs.peak import saved_bytes
from polyrank.core.costs.remedies import remedies
from polyrank.core.costs.tape import ACTIVATIONS
from polyrank.core.costs.traffic import download_bytes, round_seconds, training_flops, upload_bytes

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "Memory",
    "NoFormulaError",
    "adapter_elements",
    "base_bytes",
    "download_bytes",
    "memory",
    "record",
    "remedies",
    "round_seconds",
    "saved_bytes",
    "task_memory",
    "training_flops",
    "upload_bytes",
]
