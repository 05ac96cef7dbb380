"""The only file that knows Transformers and PEFT: a frozen base model, its tokenizer and its pixels.

One base stays in memory however many clients there are. Adapters are attached to it (`polyrank.local.attach`) at each
client's own ranks; trained dense parameters (the head) are passed to each call instead of being written into it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from polyrank.core.architecture import ModelSpec, Quantization
from polyrank.core.lowrank import Adapter, Factors
from polyrank.errors import InputError
from polyrank.local.adapters import AdapterInfo
from polyrank.local.attach import Attachment, Batch, attached
from polyrank.local.describe import architecture
from polyrank.local.targets import resolve_targets

_AUTO = {"text": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}


class ModelError(InputError):
    """A model cannot be found, loaded, or used for the task."""


class Base:
    """A frozen Transformers model with the modules that carry adapters.

    Attributes:
        spec: what planning knows of the model, for examples of `tokens` positions.
        head: names of the dense parameters that are trained: all outside the backbone, and the `new` ones,
            which its checkpoint lacked.
        info: what an exported adapter's config says of the model.
        device: where it runs.
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
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False  # nothing here generates; a cache would only copy keys and values
        self.device = torch.device(device)
        self.modules = dict(model.named_modules())
        backbone = _backbone(model)
        self.head = tuple(n for n, _ in model.named_parameters() if not n.startswith(backbone) or n in new)
        linear = [n for n, m in self.modules.items() if isinstance(m, nn.Linear | Conv1D)]
        linear = [n for n in linear if n.startswith(backbone) and f"{n}.weight" not in self.head]
        self.blocks = blocks = _blocks(model)
        chosen = resolve_targets(targets, linear, blocks)
        inside = {n: index for index, block in enumerate(blocks) for n in chosen if n.startswith(f"{block}.")}
        shapes = {n: _shape(self.modules[n]) for n in linear}
        named = dict(model.named_parameters())
        self.spec = ModelSpec(
            {n: shapes[n] for n in chosen},
            inside,
            head={n: named[n].numel() for n in self.head},
            architecture=architecture(model, shapes, blocks, tokens),
        )
        conv = any(isinstance(self.modules[n], Conv1D) for n in chosen)
        task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None
        saved = (n.rsplit(".", 1)[0] if n.startswith(backbone) else n.split(".", 1)[0] for n in self.head)
        self.info = AdapterInfo(name, task, conv, tuple(dict.fromkeys(saved)))
        self._extra: dict[str, Any] = {}

    def initial_head(self) -> dict[str, Tensor]:
        """The head as it was loaded or initialised."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach().cpu().float().clone() for name in self.head}

    def attached(
        self,
        adapter: Adapter,
        frozen: Adapter | None = None,
        factors: Factors | None = None,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
        checkpointing: bool = False,
    ) -> AbstractContextManager[Attachment]:
        """The base with `adapter` in training and `frozen` beside it, until the context ends.

        Args:
            adapter: layers at any ranks and dense parameters; their tensors are copied, never written to.
            frozen: layers that only run, and dense parameters that replace the base's.
            factors: the factors that need gradients, with the dense parameters; None: nothing does.
            dropout: probability that an input element of A is dropped.
            rng: draws the dropout masks.
            checkpointing: whether transformer blocks run again in the backward pass instead of keeping activations.
        """
        lowest = min((self.spec.blocks.get(name, len(self.blocks)) for name in adapter.layers), default=0)
        again = [self.modules[name] for name in self.blocks[lowest:]] if checkpointing and factors else []
        return attached(
            self.modules, self._logits, self.device, adapter, frozen or Adapter(), factors, dropout, rng, again
        )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with: the batch without its labels, on the model's device."""
        tensors = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        return {**tensors, **self._extra}

    def _logits(self, batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
        call = self.inputs(batch)
        if not dense:
            return self.model(**call).logits
        return functional_call(self.model, dict(dense), (), call, tie_weights=False).logits


def _backbone(model: nn.Module) -> str:
    """The prefix of the backbone's names (``bert.``), or nothing where the model is its own backbone."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks: the members of every list of modules that hold linear layers."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    members = {f"{name}.{index}": member for name, module in lists for index, member in enumerate(module)}
    return [name for name, m in members.items() if any(isinstance(x, nn.Linear | Conv1D) for x in m.modules())]


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
    else:
        d_out, d_in = module.out_features, module.in_features
    return int(d_out), int(d_in)


def locate(name: str) -> str:
    """A model's name as Transformers takes it.

    ``package:PKG/DIR`` is a folder inside an installed Python package; the path of a folder stays, and so does a hub
    name.

    Raises:
        ModelError: if the package is not installed, has no such folder, or a path does not exist.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise ModelError(f"model.name: package {package!r} is not installed")
        path = Path(found.origin).parent / inner
        if not path.is_dir():
            raise ModelError(f"model.name: package {package!r} has no folder {inner!r}")
        return str(path)
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ModelError(f"model.name: no folder {name}")
    return name


def load_base(
    name: str,
    targets: str | Sequence[str],
    *,
    kind: str,
    classes: Sequence[str],
    rng: np.random.Generator,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: int | None = None,
    attention: str = "auto",
    tokens: int = 0,
) -> Base:
    """Loads a classifier with a head for `classes`; a head the checkpoint does not have is drawn from `rng`.

    Args:
        name: hub name or folder, as `locate` returns it.
        targets: see `polyrank.local.targets`.
        kind: ``text`` or ``image``.
        classes: names of the classes, in order of their labels.
        rng: initialises the head.
        device: where to put the model.
        dtype: of the base: ``float32``, ``bfloat16``, or ``auto`` for the checkpoint's.
        image_size: pixels per side, where it is not the model's own (position embeddings are interpolated).
        attention: ``eager``, ``sdpa``, or ``auto`` for the library's choice.
        tokens: positions per text, for the cost model; an image's follow from its size.

    Raises:
        ModelError: if the model cannot be loaded or is not of this kind.
    """
    labels = dict(enumerate(classes))
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63 - 1)))
        try:
            model, report = getattr(transformers, _AUTO[kind]).from_pretrained(
                name,
                num_labels=len(labels),
                id2label=labels,
                label2id={text: index for index, text in labels.items()},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=_dtype(dtype),
                **_attention(attention),
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.name: {name!r} cannot be loaded as a {kind} classifier: {error}") from None
    prefix = _backbone(model)
    misshapen = [entry[0] for entry in report["mismatched_keys"] if entry[0].startswith(prefix)]
    if misshapen:
        raise ModelError(f"model.name: {name!r} does not fit its own config: {misshapen[0]} has another shape")
    if kind == "text" and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = getattr(model.config, "eos_token_id", None) or 0
    if kind == "image":
        tokens = image_tokens(model.config, image_size)
    base = Base(model, targets, name=name, device=device, new=report["missing_keys"], tokens=tokens)
    if image_size is not None and image_size != getattr(model.config, "image_size", image_size):
        base._extra["interpolate_pos_encoding"] = True
    return base


def describe(
    name: str | Any,
    targets: str | Sequence[str],
    *,
    kind: str,
    classes: int | None,
    tokens: int,
    dtype: str = "float32",
    image_size: int | None = None,
    attention: str = "auto",
    quantize: Quantization | None = None,
) -> ModelSpec:
    """What planning knows of a model, from its config alone: no weights are downloaded, and none take memory.

    Args:
        name: hub name or folder, as `locate` returns it; a folder needs no more than a config.json. Or a config.
        targets: see `polyrank.local.targets`.
        kind: ``text`` or ``image``.
        classes: outputs of the head; None: as the config says.
        tokens: positions per text; an image's follow from its size.
        dtype, image_size, attention: see `load_base`.
        quantize: how the base will be loaded.

    Raises:
        ModelError: if there is no such config, or it is not one of this kind.
    """
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(name) if isinstance(name, str) else name
            if classes is not None:
                config.num_labels = classes
            with torch.device("meta"):
                model = getattr(transformers, _AUTO[kind]).from_config(
                    config, dtype=_dtype(dtype, config), **_attention(attention)
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.name: {name!r} cannot be loaded as a {kind} classifier: {error}") from None
    if kind == "image":
        tokens = image_tokens(config, image_size)
    spec = Base(model, targets, name=str(name), device="meta", tokens=tokens).spec
    assert spec.architecture is not None
    return replace(spec, architecture=replace(spec.architecture, quantization=quantize))


def image_tokens(config: Any, image_size: int | None) -> int:
    """Positions per image: its patches and the tokens in front of them; 0 where the config does not say."""
    size, patch = image_size or getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return 0
    return (size // patch) ** 2 + (2 if config.model_type == "deit" else 1)


def _dtype(dtype: str, config: Any = None) -> Any:
    stated = getattr(config, "dtype", None) or torch.float32
    return (stated if config is not None else dtype) if dtype == "auto" else getattr(torch, dtype)


def _attention(attention: str) -> dict[str, str]:
    return {} if attention == "auto" else {"attn_implementation": attention}


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer, as data preparation needs it."""

    encode: Callable[[list[str]], list[list[int]]]
    pad_id: int
    fingerprint: str


@dataclass(frozen=True)
class ImageProcessor:
    """How images become pixel values."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def text_processor(name: str, max_length: int) -> TextProcessor:
    """The model's tokenizer, truncating to `max_length` tokens."""
    with _quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.name: {name!r} has no tokenizer: {error}") from None

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    probe = encode(["The quick brown fox, 12345. Ärger 東京"])[0]
    fingerprint = f"{name}|{len(tokenizer)}|{max_length}|{probe}"
    return TextProcessor(encode, int(pad or 0), fingerprint)


def image_processor(name: str, image_size: int | None = None) -> ImageProcessor:
    """Size, channels and normalisation that the model was trained with; 0.5 where it does not say."""
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(name)
        try:
            stated, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:
            stated = {}
    channels = int(getattr(config, "num_channels", 3))
    size = image_size or getattr(config, "image_size", None)
    if size is None:
        raise ModelError(f"model.image_size: {name!r} does not state an image size; give one")
    mean, std = stated.get("image_mean") or [0.5] * channels, stated.get("image_std") or [0.5] * channels
    return ImageProcessor(int(size), channels, tuple(map(float, mean)), tuple(map(float, std)))


def small_vit_config(
    image_size: int, patch_size: int, hidden: int, layers: int, heads: int, channels: int, classes: int
) -> Any:
    """The config of a small ViT classifier, for models that are trained on the spot."""
    return transformers.ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_channels=channels,
        num_labels=classes,
    )


def random_vit(config: Any, rng: np.random.Generator) -> nn.Module:
    """A ViT classifier of this config with weights drawn from `rng`."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63 - 1)))
        return transformers.ViTForImageClassification(config)


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes a model as Transformers reads it."""
    with _quiet():
        model.save_pretrained(folder)


def load_exported(base: Base, folder: Path) -> Callable[[Batch], Tensor]:
    """Logits of the base with an exported adapter, loaded by PEFT itself. The base carries it from then on."""
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base.model, str(folder)).to(base.device).eval()
    return lambda batch: model(**base.inputs(batch)).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without progress bars and without warnings about the new head, which is expected."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
