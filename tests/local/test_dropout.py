"""LoRA dropout against PEFT's own layer: what is kept is scaled up, so that the mean over masks is the layer itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream
from polyrank.local.base import Base

NAME = "bert.encoder.layer.0.attention.self.query"  # the first: dropout before it would change its input
WIDTH, ALPHA = 16, 24.0
PASSES, COPIES = 20, 150  # 3,000 masks of each example

Models = Callable[[str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]


@contextmanager
def seen(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The input and the output of a module in every forward pass."""
    passes: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: passes.append((args[0].detach(), output.detach())))
    yield passes
    handle.remove()


def layer(rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, WIDTH, generator=generator), torch.randn(WIDTH, rank, generator=generator)
    return LowRank(A, B, ALPHA / rank)


def ours(model: nn.Module, batch: dict[str, Tensor], x: LowRank, dropout: float) -> tuple[Tensor, Tensor]:
    """The module's input, and what the adapter adds to its output under each mask: masks x b x T x d_out."""
    base = Base(model, [NAME], name="tiny")
    copies = {name: tensor.repeat(COPIES, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    with base.attached(Adapter({NAME: x}), None, "AB", dropout, stream(0, "fit")) as live, torch.no_grad():
        module = base.modules[NAME]
        with seen(module) as passes:  # hooked after the adapter, so that it sees what this adds
            for _ in range(PASSES):
                live(copies)
    inputs = passes[0][0]
    added = torch.stack([output for _, output in passes]) - nn.functional.linear(inputs, module.weight, module.bias)
    count = len(batch["labels"])
    return inputs[:count], added.reshape(PASSES * COPIES, count, *added.shape[2:])


def peft_s(x: LowRank, inputs: Tensor, dropout: float) -> Tensor:
    """The same of PEFT's own layer, in training."""
    linear = nn.Linear(WIDTH, WIDTH)
    config = LoraConfig(r=x.rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["q"])
    wrapped = get_peft_model(nn.ModuleDict({"q": linear}), config).train().base_model.model["q"]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped.lora_A["default"].weight.copy_(x.A)
        wrapped.lora_B["default"].weight.copy_(x.B)
        return wrapped(inputs.expand(PASSES * COPIES, *inputs.shape)) - linear(inputs)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_the_mean_and_the_spread_over_masks_are_peft_s(dropout: float, tiny_model: Models, tiny_batch: Batches) -> None:
    x = layer(3)
    inputs, added = ours(tiny_model("bert"), tiny_batch("bert"), x, dropout)
    due = peft_s(x, inputs, dropout)
    exact = inputs @ x.A.T @ x.B.T * x.scale
    noise = due.std(dim=0) / len(due) ** 0.5  # of a mean
    for found in (added, due):
        assert ((found.mean(dim=0) - exact) / noise).abs().max() < 6
    assert ((added.mean(dim=0) - due.mean(dim=0)) / noise).abs().max() < 8
    assert added.std(dim=0).mean().item() == pytest.approx(due.std(dim=0).mean().item(), rel=0.03)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_every_element_of_the_input_is_dropped_or_scaled_up(
    dropout: float, tiny_model: Models, tiny_batch: Batches
) -> None:
    """Through an adapter that is the identity, mask by mask; PEFT's own layer does the same."""
    x = LowRank(torch.eye(WIDTH), torch.eye(WIDTH), ALPHA / WIDTH)
    inputs, added = ours(tiny_model("bert"), tiny_batch("bert"), x, dropout)
    kept = inputs * x.scale / (1 - dropout)
    for found in (added, peft_s(x, inputs, dropout)):
        dropped = found.abs() < 1e-5
        torch.testing.assert_close(found, torch.where(dropped, 0.0, kept.expand_as(found)), atol=2e-5, rtol=1e-5)
        assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.02)
