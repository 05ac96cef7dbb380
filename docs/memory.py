"""Holds the closed form of a step's activations against autograd, and writes docs/memory.md.

    python docs/memory.py

Random models of every family, tiny and base-size, run a forward pass on the CPU under saved-tensor hooks, which count
every storage that autograd keeps. Peaks come from bench/results/memory.json, which `python bench/memory.py` writes.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from polyrank.core.costs import record, saved_bytes
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import LocalTraining
from polyrank.local.base import Base
from polyrank.local.hf import base_from_config
from polyrank.local.losses import asked_alone, losses
from polyrank.local.measure import saved_tensors

PAGE = Path(__file__).with_name("memory.md")
PEAKS = Path(__file__).parents[1] / "bench" / "results" / "memory.json"
ROUND = PEAKS.with_name("llama_round.json")
SIZES = {"tiny": (64, 2, 4, 256), "base": (768, 12, 12, 3072)}  # hidden, layers, heads, MLP
TARGETS = {
    "bert": ["query", "value"],
    "bloom": ["query_key_value"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
}
CAUSAL = [family for family in TARGETS if family not in ("bert", "vit")]
TOKENS, RANK, BATCH, VOCABULARY = 26, 8, 2, 1000
SETTINGS = list(itertools.product((0.0, 0.1), (False, True)))  # dropout, checkpointing

HEAD = """\
# Memory: formulas against measurements

This page is written by `python docs/memory.py`; a test keeps it up to date. How to read a plan is on the
[commands page](cli.md#plan).

## Activations

What a training step keeps from the forward for the backward pass is computed from the model's structure alone: a tape
(`polyrank.core.costs`) runs each family's forward pass on values without content, and notes what autograd saves. Below,
each cell is what autograd did save, counted with saved-tensor hooks on the CPU, and how far the formula is from it.
Random models in float32, rank 8, 2 examples of 26 positions, texts padded. *Tiny* is 2 layers of width 64, *base* 12
layers of width 768. *qv* adapts the queries and values (in BLOOM and GPT-2 the fused layer), *all* every linear layer.

What follows from the rules of autograd, and is easily got wrong:

- A frozen linear layer keeps nothing; its LoRA keeps the input of A and the input of B. Modules that share an input
  keep it once, unless dropout gives each a copy of its own and a mask of one byte per element.
- Below the lowest trained layer there is no backward pass and nothing is kept. In the first trained layer itself, what
  does not depend on a trained module keeps nothing either.
- Eager attention keeps heads x tokens² probabilities per layer; memory-efficient attention (sdpa) does not.
- With checkpointing a block keeps its input only, and is run again in the backward pass, one block at a time.
- A trained factor has no gradient before the backward pass has come to it. By then most activations are gone, unless
  batches accumulate: the gradients of those before are there from the start.
- Where a value is used twice, its two gradients and their sum are three tensors for a moment.
"""
COLUMNS = """
| family | size | attention | targets | plain | checkpointing | dropout | dropout, checkpointing |
|---|---|---|---|---|---|---|---|
"""
CAUSAL_HEAD = """
## Activations of causal language models

The same for tiny models that predict the next of {vocabulary:,} tokens, with every token learnt. The output layer is
frozen and sees only the positions whose next token is asked for; of its logits autograd keeps the log-probabilities, 4
bytes for each token of a text times each of the vocabulary. Where only responses are learnt, it is less than planned.
"""
PEAK_HEAD = """
## Peaks

A whole step (forward, backward, clipping, AdamW) with random weights, {batch} examples at a time: what the plan
predicts without overhead, and the most that was allocated at any moment.
Measured by `python bench/memory.py` on {device}, torch {torch}, {date}.

| model | targets | rank | predicted, MiB | measured, MiB | error |
|---|---|---|---|---|---|
"""
ROUND_HEAD = """
## A round of a large language model

A Llama of {parameters:,} parameters with random weights in bfloat16, every linear layer adapted, {batch} texts of
{tokens} tokens at a time, two steps a client, all tokens learnt: what the plan predicts without overhead, and the most
that torch had allocated at any moment of the client's round. Measured by `python bench/llama_round.py` on {threads}
thread(s) of {cpu}, torch {torch}, {date}.

| rank | checkpointing | predicted, MiB | measured, MiB | error | seconds |
|---|---|---|---|---|---|
"""


def config(family: str, size: str, attention: str, vocabulary: int = 100) -> Any:
    """A config of the family with random weights to come."""
    hidden, layers, heads, mlp = SIZES[size]
    common = {"attn_implementation": attention, "num_labels": 5}
    text = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "vit":
        return transformers.ViTConfig(**common, **names, intermediate_size=mlp, image_size=40, patch_size=8)
    if family == "bert":
        return transformers.BertConfig(**common, **text, **names, intermediate_size=mlp, max_position_embeddings=64)
    if family == "llama":
        grouped = {"num_key_value_heads": heads // 2, "intermediate_size": mlp, "max_position_embeddings": 64}
        return transformers.LlamaConfig(**common, **text, **names, **grouped)
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**common, **text, **names, intermediate_size=mlp, max_position_embeddings=64)
    if family == "opt":
        return transformers.OPTConfig(
            **common, **text, **names, ffn_dim=mlp, max_position_embeddings=64, word_embed_proj_dim=hidden
        )
    if family == "gpt2":
        return transformers.GPT2Config(
            **common, **text, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=64, n_inner=mlp
        )
    return transformers.BloomConfig(**common, **text, hidden_size=hidden, n_layer=layers, n_head=heads)


def base_of(family: str, size: str, attention: str, targets: str | list[str], causal: bool = False) -> Base:
    """A model whose weights are zero: what autograd keeps does not depend on them. BLOOM knows eager attention only."""
    attention = "eager" if family == "bloom" else attention
    kind = "causal" if causal else "image" if family == "vit" else "text"
    made = config(family, size, attention, VOCABULARY if causal else 100)
    empty = base_from_config(made, targets, kind=kind, classes=None, tokens=TOKENS, device="meta")
    model = empty.model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    base = Base(model, targets, name=family, tokens=TOKENS)
    return base


def measured(base: Base, local: LocalTraining, ranks: dict[str, int], factors: str = "AB") -> int:
    """Bytes that autograd keeps of a real forward pass, its loss included."""
    rng = stream(0, "memory")
    layers = {n: fresh(base.spec.modules[n], rank, 1.0, rng) for n, rank in ranks.items()}
    batch = base.random_batch(local.batch, rng)
    adapter = Adapter(layers, base.initial_head())
    labels = torch.zeros((local.batch, TOKENS) if base.causal else local.batch, dtype=torch.int64)
    with (
        base.attached(adapter, None, factors, local.dropout, rng, local.checkpointing) as live,
        asked_alone(base.output, labels),
        saved_tensors([*base.model.parameters(), *live.tensors()]) as kept,
    ):
        if base.causal:
            losses(live(batch), labels)
        else:
            F.cross_entropy(live(batch).float(), labels)
    return kept.nbytes


def predicted(base: Base, local: LocalTraining, ranks: dict[str, int], factors: str = "AB") -> int:
    """The closed form of the same."""
    return saved_bytes(record(base.spec, local, ranks, factors).ops)


def cells(base: Base) -> Iterator[tuple[int, int]]:
    """(measured, predicted) bytes for each setting."""
    for dropout, checkpointing in SETTINGS:
        local = LocalTraining(batch=BATCH, dropout=dropout, checkpointing=checkpointing)
        ranks = dict.fromkeys(base.spec.modules, RANK)
        yield measured(base, local, ranks), predicted(base, local, ranks)


def rows(causal: bool = False) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """A row for each family, size, attention and choice of targets."""
    for family, size in itertools.product(CAUSAL if causal else TARGETS, ("tiny",) if causal else SIZES):
        for attention in ("eager",) if family == "bloom" else ("sdpa", "eager"):
            for name, targets in (("qv", TARGETS[family]), ("all", "all-linear")):
                base = base_of(family, size, attention, targets, causal)
                yield f"| {family} | {size} | {attention} | {name} |", list(cells(base))


Rows = list[tuple[str, list[tuple[int, int]]]]


def page(classifiers: Rows, causal: Rows) -> str:
    """The page."""
    return (
        HEAD + table(classifiers) + CAUSAL_HEAD.format(vocabulary=VOCABULARY) + table(causal) + peaks() + whole_round()
    )


def table(found: Rows) -> str:
    """What was measured, and how far the formula is from it."""
    text = COLUMNS
    for name, own in found:
        shown = (f"{got / 2**20:,.3f} MiB ({want / got - 1:+z.2%})" for got, want in own)
        text += f"{name} {' | '.join(shown)} |\n"
    return text


def peaks() -> str:
    """The section of peaks, from what was stored."""
    stored = json.loads(PEAKS.read_text())
    text = ""
    for run in stored["runs"]:
        text += PEAK_HEAD.format(**run["machine"], batch=run["batch"])
        for row in run["rows"]:
            want, got = row["predicted"] / 2**20, row["measured"] / 2**20
            name = f"{row['model']} | {row['targets']} | {row['rank']}"
            text += f"| {name} | {want:,.1f} | {got:,.1f} | {want / got - 1:+z.2%} |\n"
        errors = [abs(row["predicted"] / row["measured"] - 1) for row in run["rows"]]
        text += f"\nMean error {sum(errors) / len(errors):.2%}, largest {max(errors):.2%}.\n"
    return text


def whole_round() -> str:
    """The section of a round of a large model, from what was stored, if anything was."""
    if not ROUND.is_file():
        return ""
    stored = json.loads(ROUND.read_text())
    text = ROUND_HEAD.format(**stored["machine"], **{key: stored[key] for key in ("parameters", "tokens", "batch")})
    for row in stored["rows"]:
        want, got = row["predicted"] / 2**20, row["measured"] / 2**20
        again = "yes" if row["checkpointing"] else "no"
        text += (
            f"| {row['rank']} | {again} | {want:,.1f} | {got:,.1f} | {want / got - 1:+z.2%} | {row['seconds']:.0f} |\n"
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(page(list(rows()), list(rows(causal=True))))
    print(PAGE)
