"""The forward passes of model families, as the tape runs them. Each reads like its block in Transformers.

To add a family: write its pass, add a line to `FAMILIES`, and add it to the table of tests that hold every family's
saved bytes against autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polyrank.core.architecture import Architecture
from polyrank.core.costs.tape import Tape, Value


def bert(tape: Tape, model: Architecture) -> Value:
    """BERT and its kin: normalisation after each sum; a pooled first token goes to the head."""
    padded = tape.step.padded

    def block(x: Value, q: str, k: str, v: str, o: str, up: str, down: str) -> Value:
        mixed = tape.attention(tape.linear(q, x), tape.linear(k, x), tape.linear(v, x), masked=padded)
        x = tape.norm(tape.add(tape.linear(o, mixed), x))
        wide = tape.activation(tape.linear(up, x))
        return tape.norm(tape.add(tape.linear(down, wide), x))

    first = tape.first_token(tape.blocks(block, tape.embedded(), *tape.mask()))
    for name in model.after:
        linear = tape.linear(name, first)
        first = tape.op([linear], linear.numel, keeps_result=True)  # tanh
    return _head(tape, first)


def vit(tape: Tape, model: Architecture) -> Value:
    """ViT and DeiT: normalisation before each part; the head reads the first token."""

    def block(x: Value, q: str, k: str, v: str, o: str, up: str, down: str) -> Value:
        y = tape.norm(x)
        x = tape.add(tape.linear(o, tape.attention(tape.linear(q, y), tape.linear(k, y), tape.linear(v, y))), x)
        return tape.add(tape.linear(down, tape.activation(tape.linear(up, tape.norm(x)))), x)

    return _head(tape, tape.first_token(tape.norm(tape.blocks(block, tape.embedded()))))


def llama(tape: Tape, model: Architecture) -> Value:
    """Llama, Mistral and Qwen2: RMSNorm, rotary positions, grouped key-value heads, a gated MLP."""
    tables = [tape.shared(name, model.tokens * (model.hidden // model.heads)) for name in ("cos", "sin")]

    def rotated(x: Value) -> Value:
        return tape.op([x], x.numel, tables, scratch=2 * x.nbytes)

    def block(x: Value, q: str, k: str, v: str, o: str, gate: str, up: str, down: str) -> Value:
        y = tape.rms_norm(x)
        query, key = rotated(tape.linear(q, y)), rotated(tape.linear(k, y))
        mixed = tape.attention(query, key, tape.linear(v, y), masked=tape.step.padded)
        x = tape.add(tape.linear(o, mixed), x)
        y = tape.rms_norm(x)
        gated = tape.multiply(tape.activation(tape.linear(gate, y)), tape.linear(up, y))
        return tape.add(tape.linear(down, gated), x)

    return _every_position(tape, tape.rms_norm(tape.blocks(block, tape.embedded())))


def gpt2(tape: Tape, model: Architecture) -> Value:
    """GPT-2: one fused projection of q, k and v (Conv1D), normalisation before each part; blocks are given the mask."""

    def block(x: Value, qkv: str, o: str, up: str, down: str) -> Value:
        fused = tape.linear(qkv, tape.norm(x))
        x = tape.add(tape.linear(o, tape.attention(fused, fused, fused, masked=tape.step.padded)), x)
        return tape.add(tape.linear(down, tape.activation(tape.linear(up, tape.norm(x)))), x)

    return _every_position(tape, tape.norm(tape.blocks(block, tape.embedded(), *tape.mask(always=True))))


def bloom(tape: Tape, model: Architecture) -> Value:
    """BLOOM: a fused, interleaved projection, ALiBi positions, attention always eager."""

    def block(x: Value, qkv: str, o: str, up: str, down: str) -> Value:
        fused = tape.linear(qkv, tape.norm(x))
        x = tape.add(tape.linear(o, tape.attention(fused, fused, fused, eager=True)), x)
        return tape.add(tape.linear(down, tape.activation(tape.linear(up, tape.norm(x)))), x)

    return _every_position(tape, tape.norm(tape.blocks(block, tape.norm(tape.embedded()))))


def gpt_neox(tape: Tape, model: Architecture) -> Value:
    """GPT-NeoX and Pythia: attention and MLP side by side, positions rotated in a part of each head."""
    rotary = int(model.rotated * (model.hidden // model.heads))
    tables = [tape.shared(name, model.tokens * rotary) for name in ("cos", "sin")]

    def block(x: Value, qkv: str, o: str, up: str, down: str) -> Value:
        fused = tape.linear(qkv, tape.norm(x))
        wide = fused.numel // 3
        query, key = (tape.op([fused], wide, tables, scratch=8 * wide // 3) for _ in range(2))
        value = tape.op([fused], wide, part_of=fused)
        mixed = tape.attention(query, key, value, masked=tape.step.padded)
        if model.attention == "sdpa":  # its result is laid out as the queries are, by head, and has to be copied
            mixed = tape.op([mixed], mixed.numel)
        mixed = tape.linear(o, mixed)
        deep = tape.linear(down, tape.activation(tape.linear(up, tape.norm(x))))
        return tape.add(tape.add(deep, mixed), x)

    return _every_position(tape, tape.norm(tape.blocks(block, tape.embedded())))


def opt(tape: Tape, model: Architecture) -> Value:
    """OPT: normalisation before each part, queries scaled, ReLU."""

    def block(x: Value, k: str, v: str, q: str, o: str, up: str, down: str) -> Value:
        y = tape.norm(x)
        query = tape.linear(q, y)
        query = tape.op([query], query.numel)
        mixed = tape.attention(query, tape.linear(k, y), tape.linear(v, y), masked=tape.step.padded)
        x = tape.add(tape.linear(o, mixed), x)
        return tape.add(tape.linear(down, tape.activation(tape.linear(up, tape.norm(x)))), x)

    return _every_position(tape, tape.norm(tape.blocks(block, tape.embedded())))


FAMILIES: dict[str, Callable[[Tape, Architecture], Value]] = {
    "bert": bert,
    "bloom": bloom,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "opt": opt,
    "vit": vit,
}


def _every_position(tape: Tape, x: Value) -> Value:
    """A decoder's classifier scores every position and keeps the last one's, by two index vectors."""
    if tape.model.causal:
        return _next_tokens(tape, x)
    return _head(tape, x, [Value(tape.step.batch, 8), Value(tape.step.batch, 8)])


def _next_tokens(tape: Tape, x: Value) -> Value:
    """A frozen output layer and the cross-entropy of every token but the first.

    A mask picks the positions out before the output layer, so that there are no more logits than are asked for.
    """
    model, batch = tape.model, tape.step.batch
    asked = batch * (model.tokens - 1)
    x = tape.op([x], asked * model.hidden, [Value(batch * model.tokens, 1)])
    if tape.step.autocast and x.itemsize != 2:
        x = tape.op([x], x.numel, itemsize=2)
    kept = tape.cast(model.classes * model.hidden) * x.grad
    logits = tape.op([x], asked * model.classes, kept, itemsize=tape.work)
    if logits.itemsize != 4:
        logits = tape.op([logits], logits.numel, itemsize=4)
    told = tape.op([logits], logits.numel, keeps_result=True)  # log-probabilities
    told = tape.op([told], asked, [Value(asked, 8), Value(1)])
    return tape.op([told], batch, [Value(asked, 1)])


def _head(tape: Tape, x: Value, indices: Sequence[Value] = ()) -> Value:
    """The classifier and its cross-entropy, which keeps log-probabilities, labels and a weight."""
    model, step = tape.model, tape.step
    rows = x.numel // model.hidden
    if step.autocast and x.itemsize != 2:
        x = tape.op([x], x.numel, itemsize=2)
    kept = [*[x] * (step.head > 0), *tape.cast(model.classes * model.hidden) * x.grad]
    logits = tape.op([x], rows * model.classes, kept, itemsize=tape.work, trained=step.head)
    chosen = tape.op([logits], step.batch * model.classes, indices, itemsize=4)
    return tape.op([chosen], 1, [chosen, Value(step.batch, 8), Value(1)])
