"""A frozen model with the modules that carry adapters; `polyrank.local.hf` loads it.

One base stays in memory however many clients there are. Adapters are attached to it (`polyrank.local.attach`) at each
client's own ranks; trained dense parameters (the head) are passed to each call instead of being written into it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyrank.core.architecture import ModelSpec
from polyrank.core.lowrank import Adapter, Factors
from polyrank.local.adapters import AdapterInfo
from polyrank.local.attach import Attachment, Batch, Masks, attachment, hooked
from polyrank.local.describe import architecture, quantization_of
from polyrank.local.images import Images, images_of
from polyrank.local.inputs import random_images, random_texts
from polyrank.local.layout import Layout
from polyrank.local.structure import backbone_of as backbone_of
from polyrank.local.structure import classifier_of, structure
from polyrank.local.structure import transposed as transposed
from polyrank.local.targets import resolve_targets

_SHORT = 16  # tokens


class Base:
    """A frozen Transformers model with the modules that carry adapters.

    Attributes:
        spec: what planning knows of the model, for examples of `tokens` positions.
        head: names of the dense parameters that are trained: all outside the backbone, and the `new` ones,
            which its checkpoint lacked; none of a causal language model.
        causal: whether it predicts next tokens.
        output: the layer that makes logits of them, if so.
        info: what an exported adapter's config says of the model.
        device: where it runs.
        weights: elements of the backbone's linear layers.
        blocks: full names of its transformer blocks.
        images: how it takes images, where it does.
        accepted: names of the inputs that it can be called with; None: any.
        layouts: of the modules whose inputs are not batch-first, as `polyrank.local.probe` has seen them.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str],
        *,
        name: str,
        device: str = "cpu",
        new: Sequence[str] = (),
        tokens: int = 0,
        kind: str | None = None,
        image_size: int | None = None,
    ) -> None:
        """Finds out what the model is built of and which modules carry adapters; nothing of it is trained any more.

        Args:
            model: as Transformers loads it.
            targets: see `polyrank.local.targets`.
            name: of the model.
            device: where it is to run.
            new: parameters that its checkpoint lacked.
            tokens: positions per text; an image's are asked of the model.
            kind: ``text``, ``image`` or ``causal``: what the data are; None: what the model's class says.
            image_size: pixels per side; None: as the config says.

        Raises:
            InputError: if a target matches nothing, or the model takes no images of that size.
        """
        self.model = model.eval().requires_grad_(False)
        if quantization_of(model) is None:  # quantised layers are where they were loaded to
            self.model.to(device)
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False  # nothing here generates; a cache would only copy keys and values
        self.device = torch.device(device)
        self.modules = dict(model.named_modules())
        backbone = backbone_of(model)
        # What a causal model predicts tokens with is pretrained, as large as the vocabulary, and often the embedding.
        self.causal = hasattr(model, "generate") and model.can_generate()
        self.output: nn.Module | None = model.get_output_embeddings() if self.causal else None  # type: ignore[assignment]
        scoring = classifier_of(model)
        outside = (
            n
            for n, _ in model.named_parameters()
            if not n.startswith(backbone) or n in new or n.rpartition(".")[0] in scoring
        )
        self.head = () if self.causal else tuple(outside)
        images = kind == "image" or (kind is None and getattr(model, "main_input_name", "") == "pixel_values")
        self.images: Images | None = images_of(model, image_size) if images else None
        found = structure(model, frozenset(self.head))
        self.blocks = found.blocks
        chosen, exact = resolve_targets(targets, found, f"{name!r} ({model.config.model_type})")
        named = dict(model.named_parameters())
        self.spec = ModelSpec(
            {n: found.linears[n] for n in chosen},
            {n: index for index, block in enumerate(found.blocks) for n in chosen if n.startswith(f"{block}.")},
            head={n: named[n].numel() for n in self.head},
            architecture=architecture(model, found, self.images.tokens if self.images else tokens, causal=self.causal),
            exact=exact,
        )
        conv = any(transposed(self.modules[n]) for n in chosen)
        task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM" if self.causal else None
        saved = (n.rsplit(".", 1)[0] if n.startswith(backbone) else n.split(".", 1)[0] for n in self.head)
        self.info = AdapterInfo(name, task, conv, tuple(dict.fromkeys(saved)))
        self.weights = sum(d_out * d_in for d_out, d_in in found.linears.values())
        self.accepted = _accepted(model)
        self.layouts: dict[str, Layout] = {}
        self.answers: dict[bool, Any] = {}

    def fingerprint(self) -> str:
        """A SHA-256 of the frozen weights' names, shapes, types and first and last values: the same base, or another.

        The head is left out, as a server sends it. Not all values are read, so that a large model costs no more.
        """
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.named_parameters()):
            if name not in self.head:
                ends = torch.cat([tensor.flatten()[:16], tensor.flatten()[-16:]]).float().cpu()
                found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{ends.tolist()}".encode())
        return found.hexdigest()

    def random_batch(self, size: int, rng: np.random.Generator, tokens: int | None = None) -> dict[str, Tensor]:
        """Inputs of random content, texts of so many tokens, or of full length; see `polyrank.local.inputs`."""
        if self.images is not None:
            return random_images(self.images, size, rng)
        full = self.spec.architecture.tokens if self.spec.architecture else 0
        return random_texts(self.model.config, size, full if tokens is None else min(tokens, full), rng)

    @torch.no_grad()
    def unused(self) -> list[str]:
        """Targeted modules that a short pass does not run: the model reads their weights past them, or not at all."""
        ran: set[str] = set()
        handles = [self.modules[n].register_forward_hook(lambda *_, n=n: ran.add(n)) for n in self.spec.modules]
        try:
            self.logits(self.random_batch(1, np.random.default_rng(0), _SHORT), {})
        finally:
            for handle in handles:
                handle.remove()
        return [name for name in self.spec.modules if name not in ran]

    def initial_head(self) -> dict[str, Tensor]:
        """The head as it was loaded or initialised."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach().cpu().float().clone() for name in self.head}

    @contextmanager
    def attached(
        self,
        adapter: Adapter,
        frozen: Adapter | None = None,
        factors: Factors | None = None,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
        checkpointing: bool = False,
        copies: int | None = None,
    ) -> Iterator[Attachment]:
        """The base with `adapter` in training and `frozen` beside it, until the context ends.

        Args:
            adapter: layers at any ranks and dense parameters; their tensors are copied, never written to.
            frozen: layers that only run, and dense parameters that replace the base's.
            factors: the factors that need gradients, with the dense parameters; None: nothing does.
            dropout: probability that an input element of A is dropped.
            rng: draws the dropout masks.
            checkpointing: whether transformer blocks run again in the backward pass instead of keeping activations.
            copies: a copy of the factors for each of so many examples, for gradients of each; None: one for all.
        """
        live = attachment(self.logits, self.device, adapter, frozen or Adapter(), factors, copies, self.layouts)
        masks = Masks(dropout, [int(rng.integers(2**63 - 1))]) if dropout and rng is not None else None
        if masks is not None:
            live.forward = masks.counted(self.logits)
        again = self.run_again([adapter]) if checkpointing and factors else []
        with hooked(live, self.modules, masks, again):
            yield live

    def block_of(self, name: str) -> int | None:
        """The index of the transformer block that a module or parameter is in, if any."""
        return next((index for index, block in enumerate(self.blocks) if name.startswith(f"{block}.")), None)

    def lowest(self, adapter: Adapter) -> int:
        """The lowest transformer block with a trained tensor of `adapter`; as many as there are where none has one.

        A low-rank layer counts where its rank is not 0, a dense parameter (LoKr's factors are some) where it is inside
        a block.
        """
        trained = [*(name for name, x in adapter.layers.items() if x.rank), *adapter.dense]
        blocks = [block for name in trained if (block := self.block_of(name)) is not None]
        return min(blocks, default=len(self.blocks))

    def run_again(self, adapters: Iterable[Adapter]) -> list[nn.Module]:
        """The blocks that keep their inputs only where activations are not kept: from the lowest trained one."""
        lowest = min(map(self.lowest, adapters))
        return [self.modules[name] for name in self.blocks[lowest:]]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with: the batch without its labels, on the model's device."""
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if self.accepted is not None:
            given = {name: tensor for name, tensor in given.items() if name in self.accepted}
        extra = self.images.extra if self.images is not None else {}
        return {**{name: tensor.to(self.device) for name, tensor in given.items()}, **extra}

    def logits(self, batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for a batch, with `dense` instead of parameters of its own."""
        call = self.inputs(batch)
        if not dense:
            return self.model(**call).logits
        return functional_call(self.model, dict(dense), (), call, tie_weights=False).logits


def _accepted(model: nn.Module) -> frozenset[str] | None:
    """The inputs that a model can be called with; None: any. FNet, which has no attention, takes no attention mask."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return None if anything else frozenset(parameters)
