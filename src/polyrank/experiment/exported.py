"""A run's models as PEFT adapters: one in the folder, or one per client in folders below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from polyrank.core.compress import compress
from polyrank.core.lowrank import Adapter, combine, trim, truncate
from polyrank.core.types import Client
from polyrank.experiment.regimes import EVERYBODY, Models
from polyrank.local.adapters import AdapterInfo, read_adapter, write_adapter


def exported(parts: Sequence[Adapter]) -> Adapter:
    """One adapter that computes what these compute together, no larger than it need be."""
    total = combine(parts)
    tight = {name: trim(compress(x) if x.rank > min(x.shape) else x) for name, x in total.layers.items()}
    # PEFT has no layers of rank 0: an untrained one keeps a row.
    return Adapter({name: x if x.rank else truncate(total.layers[name], 1) for name, x in tight.items()}, total.dense)


def write_models(folder: Path, models: Models, info: AdapterInfo) -> None:
    """Writes the models of a run."""
    for client, parts in models.items():
        write_adapter(folder_of(folder, client), exported(parts), info)


def read_models(folder: Path, models: Models) -> Models:
    """The models that were written for the same clients as `models` has."""
    return {client: [read_adapter(folder_of(folder, client))[0]] for client in models}


def folder_of(folder: Path, client: Client) -> Path:
    """Where a client's model is; names that are no file names are quoted as in an URL."""
    if client == EVERYBODY:
        return folder
    quoted = quote(client, safe=" ")
    return folder / (f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted)
