"""A round as it is usually written, around PEFT, Transformers' Trainer and Accelerate: what `bench/round.py` beats.

Written anew after what released code does, and lenient where released code differs: data is tokenised and collated
once, nothing goes through files, adapters are copied in place, the server decomposes each module once.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fleet import RANKS, Fleet, Row, rows_of
from polyrank.core.lowrank import Adapter
from polyrank.local.optimizer import autocast
from stopwatch import Stopwatch

Factors = dict[str, tuple[Tensor, Tensor]]

LR_SCHEDULE = "constant"
EVALUATED_AT_ONCE = 64


def with_lora(model: nn.Module, fleet: Fleet, rank: int) -> PeftModel:
    """PEFT's adapter in `model`, of the scale that the server's has, and the head to train."""
    layers = fleet.state.adapter.layers
    scale = next(iter(layers.values())).scale
    heads = sorted({name.rsplit(".", 1)[0] for name in fleet.base.head})
    made = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=list(layers), modules_to_save=heads)
    return get_peft_model(model, made)


@torch.no_grad()
def receive(model: PeftModel, adapter: Adapter, rank: int) -> None:
    """Copies the first `rank` rows of the server's adapter in, and its head; rows beyond are zero."""
    for name, x in adapter.layers.items():
        module = model.get_submodule(f"base_model.model.{name}")
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        A.zero_(), B.zero_()
        A[:rank].copy_(x.A[:rank])
        B[:, :rank].copy_(x.B[:, :rank])
    for name, tensor in adapter.dense.items():
        module, parameter = name.rsplit(".", 1)
        kept = model.get_submodule(f"base_model.model.{module}").modules_to_save["default"]
        kept.get_parameter(parameter).copy_(tensor)


def sent(model: PeftModel, fleet: Fleet, rank: int) -> Factors:
    """A client's factors: copies of their first `rank` rows."""
    found = {}
    for name in fleet.state.adapter.layers:
        module = model.get_submodule(f"base_model.model.{name}")
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        found[name] = A.detach()[:rank].cpu().clone(), B.detach()[:, :rank].cpu().clone()
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Centralised:
    """The floor: one PEFT model, made once, sees all clients' examples in batches of the same size, in a plain loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, rank = fleet, round(sum(RANKS) / len(RANKS))
        self.model = with_lora(copy.deepcopy(fleet.base.model), fleet, rank).train()
        receive(self.model, fleet.state.adapter, rank)
        rows = [row for client in fleet.shares for row in fleet.rows(client)]
        size = fleet.local.batch
        self.batches = [stacked(rows[at : at + size]) for at in range(0, len(rows), size)]
        self.optimizer = torch.optim.AdamW(
            trained(self.model), lr=fleet.local.lr, weight_decay=fleet.local.weight_decay, fused=True
        )

    def __call__(self) -> float:
        """All batches once; their mean loss."""
        return float(np.mean([self.step(batch) for batch in self.batches]))

    def step(self, batch: Row) -> float:
        local, device = self.fleet.local, self.fleet.base.device
        self.optimizer.zero_grad()
        with autocast(local, device):
            loss = self.model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(self.model), local.clip)
        self.optimizer.step()
        return float(loss.detach())


def stacked(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class WithTrainer:
    """A new PEFT model and a new Trainer for every client."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.model = fleet, copy.deepcopy(fleet.base.model)
        self.rows = {client: fleet.rows(client) for client in fleet.shares}
        self.folder = tempfile.gettempdir()  # Trainer wants a folder; nothing is saved

    def __call__(self) -> float:
        """The mean loss of all clients."""
        return float(np.mean([self.fit(*client) for client in zip(self.rows, RANKS, strict=True)]))

    def fit(self, client: str, rank: int) -> float:
        model = with_lora(self.model, self.fleet, rank)
        receive(model, self.fleet.state.adapter, rank)
        trainer = Trainer(model, self.arguments(), train_dataset=self.rows[client])
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        sent(model, self.fleet, rank)
        self.model = model.unload()
        return float(loss)

    def arguments(self) -> TrainingArguments:
        local, device = self.fleet.local, self.fleet.base.device
        return TrainingArguments(
            self.folder,
            per_device_train_batch_size=local.batch,
            num_train_epochs=1,
            learning_rate=local.lr,
            weight_decay=local.weight_decay,
            max_grad_norm=local.clip,
            lr_scheduler_type=LR_SCHEDULE,
            train_sampling_strategy="sequential",
            bf16=local.precision == "bf16",
            use_cpu=device.type == "cpu",
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )


class WithAccelerate:
    """A deep copy of the server's PEFT model, of the largest rank, and a new Accelerator for every client.

    Rows beyond a client's rank are zero in both factors, so that they stay zero.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.model = fleet, with_lora(copy.deepcopy(fleet.base.model), fleet, max(RANKS))
        self.rows = {client: fleet.rows(client) for client in fleet.shares}

    def __call__(self) -> float:
        """The mean loss of all clients."""
        return float(np.mean([self.fit(*client)[0] for client in zip(self.rows, RANKS, strict=True)]))

    def fit(self, client: str, rank: int) -> tuple[float, Factors]:
        """A client's loss and factors."""
        local = self.fleet.local
        precision = "bf16" if local.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=self.fleet.base.device.type == "cpu", mixed_precision=precision)
        model = copy.deepcopy(self.model)
        receive(model, self.fleet.state.adapter, rank)
        loader = DataLoader(self.rows[client], batch_size=local.batch)
        optimizer = torch.optim.AdamW(trained(model), lr=local.lr, weight_decay=local.weight_decay)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model.train()
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), local.clip)
            optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses)), sent(accelerator.unwrap_model(model), self.fleet, rank)


class Round:
    """A whole round around `WithAccelerate`: importance, training, the server's step, evaluation."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.clients = fleet, WithAccelerate(fleet)
        self.model = self.clients.model.eval()
        receive(self.model, fleet.state.adapter, max(RANKS))
        self.holdout = rows_of(fleet.holdout, np.arange(len(fleet.holdout.labels)))
        self.test = rows_of(fleet.test, np.arange(len(fleet.test.labels)))

    def __call__(self, watch: Stopwatch) -> float:
        """The mean loss of all clients."""
        with watch.phase("importance"):
            importance(self.model, stacked(self.holdout), self.fleet)
        with watch.phase("training"):
            updates = [self.clients.fit(*client) for client in zip(self.clients.rows, RANKS, strict=True)]
        with watch.phase("server"):
            redistribute([factors for _, factors in updates])
        with watch.phase("evaluation"):
            evaluate(self.model, DataLoader(self.test, batch_size=EVALUATED_AT_ONCE), self.fleet)
        return float(np.mean([loss for loss, _ in updates]))


def importance(model: PeftModel, batch: Row, fleet: Fleet) -> dict[str, float]:
    """The Fisher information of each factor: one forward pass, and a backward pass through it for each example."""
    device = fleet.base.device
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    values = model(**inputs).logits.float().log_softmax(-1).gather(-1, labels[:, None])
    sums = dict.fromkeys(factors, 0.0)
    for value in values:
        model.zero_grad()
        value.backward(retain_graph=True)
        for name, parameter in factors.items():
            sums[name] += float(parameter.grad.square().sum())
    model.zero_grad()
    return {name: total / len(labels) for name, total in sums.items()}


def redistribute(updates: list[Factors]) -> list[Factors]:
    """Factors padded with zeros and averaged; a dense SVD of their product; every client's truncation of it."""
    rank, share, handed_out = max(RANKS), 1 / len(updates), [{} for _ in updates]
    for name in updates[0]:
        A = sum(share * F.pad(u[name][0], (0, 0, 0, rank - len(u[name][0]))) for u in updates)
        B = sum(share * F.pad(u[name][1], (0, rank - len(u[name][0]))) for u in updates)
        U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
        for own, r in zip(handed_out, RANKS, strict=True):
            own[name] = Vt[:r].clone(), U[:, :r] * S[:r]
    return handed_out


@torch.no_grad()
def evaluate(model: PeftModel, batches: Iterable[Row], fleet: Fleet) -> float:
    """Accuracy."""
    model.eval()
    right = count = 0
    for batch in batches:
        inputs = {name: tensor.to(fleet.base.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
        count += len(labels)
    return right / count
