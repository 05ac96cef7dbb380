"""A federated round of a Llama of 1.2 billion parameters, with random weights in bfloat16: predicted against measured.

    python bench/llama_round.py

Three clients of ranks 4, 16 and 64 adapt every linear layer on texts of random tokens, and RB-LoRA makes one adapter of
theirs; then the same with checkpointing. A client's memory is the most that torch has allocated at any
moment of its round, the base included. Takes about 6 GB and some minutes; exits with 1 if any error exceeds 5 %.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from machine import machine
from polyrank.core.architecture import Calibration
from polyrank.core.costs import task_memory
from polyrank.core.federate import absorb, plan
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState
from polyrank.data import CausalSplit
from polyrank.engines.simulator import Simulator
from polyrank.local.base import Base
from polyrank.local.hf import base_from_config
from polyrank.local.measure import model_bytes, peak_of
from polyrank.methods import METHODS
from records import store

RESULTS = Path(__file__).parent / "results" / "llama_round.json"
GOAL = 0.05
RANKS = {"a": 4, "b": 16, "c": 64}
ROUNDS = [(False, list(RANKS)), (True, list(RANKS))]  # checkpointing, clients
TOKENS, BATCH = 128, 2


def llama(layers: int) -> Base:
    """Llama-3.2-1B's shape where `layers` is 16."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, max_position_embeddings=TOKENS, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return base_from_config(
        config, "all-linear", kind="causal", classes=None, tokens=TOKENS, device="cpu", dtype="bfloat16"
    )


def texts(base: Base) -> CausalSplit:
    """Two steps' for each client, of random tokens; every other text is a token short, so that a mask is due."""
    lengths = np.array([TOKENS, TOKENS - 1] * BATCH * len(RANKS))
    ids = stream(0, "texts").integers(1, base.model.config.vocab_size, lengths.sum(), dtype=np.int32)
    nothing = np.zeros(len(lengths), np.int64)
    return CausalSplit(ids, np.concatenate([[0], np.cumsum(lengths)]), nothing, nothing, 0)


def round_of(base: Base, checkpointing: bool, cohort: list[str]) -> list[dict[str, Any]]:
    """A row for each client of the cohort, after a round."""
    method, data = METHODS["rb_lora"](), texts(base)
    shares = {name: np.arange(2 * BATCH) + 2 * BATCH * place for place, name in enumerate(RANKS)}
    profiles = {name: ClientProfile(2 * BATCH, rank=rank) for name, rank in RANKS.items()}
    clients = Simulator(base, data, shares, profiles)
    layers = {n: fresh(s, max(RANKS.values()), 1.0, stream(0, n)) for n, s in base.spec.modules.items()}
    state = ServerState(0, Adapter(layers))
    local = LocalTraining(epochs=1, batch=BATCH, checkpointing=checkpointing, precision="fp32")
    spec = replace(base.spec, calibration=Calibration(overhead=0.0))
    tasks = plan(method, state, method.estimate(profiles, spec, local), cohort, spec, local, 0)
    updates, rows = [], []
    for client, task in tasks.items():
        started = time.monotonic()
        added = peak_of(lambda client=client, task=task: updates.extend(clients.fit({client: task})), base.device)
        row = {
            "client": client,
            "rank": RANKS[client],
            "checkpointing": checkpointing,
            "predicted": task_memory(spec, task).total,
            "measured": model_bytes(base.model) + added,
            "loss": updates[-1].metrics["loss"],
            "seconds": round(time.monotonic() - started, 1),
        }
        print(row, flush=True)
        rows.append(row)
    after = absorb(method, state, updates, 0)
    assert all(torch.isfinite(x.B).all() and x.B.any() for x in after.adapter.layers.values())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    base = llama(options.layers)
    assert base.spec.architecture is not None
    rows = [row for checkpointing, cohort in ROUNDS for row in round_of(base, checkpointing, cohort)]
    largest = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    print(f"largest error {largest:.2%} (goal {GOAL:.0%})")
    facts = {"parameters": base.spec.architecture.parameters, "tokens": TOKENS, "batch": BATCH, "goal": GOAL}
    store(options.out, {"machine": machine(), **facts, "rows": rows})
    return 0 if largest <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
