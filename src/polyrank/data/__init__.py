"""Data sets, their split among clients, and batches.

To add a data set or a partitioner: one function whose keyword-only parameters are its options, one line here or in
`PARTITIONERS`.
"""

from polyrank.data.cache import cache_dir
from polyrank.data.causal import CausalSplit, prepare_causal, warn_of_silent
from polyrank.data.digits import digits, public_digits
from polyrank.data.hub import hub
from polyrank.data.instructions import hub_instructions, instructions
from polyrank.data.outline import Outline, outline
from polyrank.data.partition import Partition
from polyrank.data.partitioners import PARTITIONERS
from polyrank.data.per_client import per_client, refuse_used, write_per_client
from polyrank.data.prepare import ImageSplit, TextSplit, prepare_images, prepare_text
from polyrank.data.presets import (
    HUB_NAMES,
    ag_news,
    alpaca,
    banking77,
    cifar100,
    dolly,
    ledgar,
    natural_instructions,
    sst2,
)
from polyrank.data.source import DataError, Dataset, Source, hold_out, limit, set_apart
from polyrank.data.tables import files

DATASETS = {
    "ag_news": ag_news,
    "alpaca": alpaca,
    "banking77": banking77,
    "cifar100": cifar100,
    "digits": digits,
    "dolly": dolly,
    "files": files,
    "hub": hub,
    "hub_instructions": hub_instructions,
    "instructions": instructions,
    "ledgar": ledgar,
    "natural_instructions": natural_instructions,
    "per_client": per_client,
    "sst2": sst2,
}

__all__ = [
    "DATASETS",
    "HUB_NAMES",
    "PARTITIONERS",
    "CausalSplit",
    "DataError",
    "Dataset",
    "ImageSplit",
    "Outline",
    "Partition",
    "Source",
    "TextSplit",
    "cache_dir",
    "files",
    "hold_out",
    "hub",
    "hub_instructions",
    "instructions",
    "limit",
    "outline",
    "per_client",
    "prepare_causal",
    "prepare_images",
    "prepare_text",
    "public_digits",
    "refuse_used",
    "set_apart",
    "warn_of_silent",
    "write_per_client",
]
