"""Tokenizers and image sizes of a model, as the preparation of data needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from polyrank.data.prompts import CHAT, form_of, prompt_of
from polyrank.data.source import Prompting, Turn
from polyrank.local import configs
from polyrank.local.pretrained import ModelError, config_of, padding_of, quiet, tokenizer_of


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer, as data preparation needs it."""

    encode: Callable[[list[str]], list[list[int]]]
    pad_id: int
    fingerprint: str


@dataclass(frozen=True)
class CausalProcessor:
    """A tokenizer, as the preparation of prompts and responses needs it."""

    encode: Callable[[Sequence[Turn]], list[tuple[list[int], int]]]
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
    tokenizer = tokenizer_of(name)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    probe = encode(["The quick brown fox, 12345. Ärger 東京"])[0]
    fingerprint = f"{name}|{len(tokenizer)}|{max_length}|{probe}"
    return TextProcessor(encode, padding_of(name, tokenizer), fingerprint)


def causal_processor(name: str, max_length: int, prompting: Prompting) -> CausalProcessor:
    """The model's tokenizer for prompts and responses.

    A response ends with the tokenizer's end of text, if it has one. Which tokens are learnt follows from where they
    stand in the text: those that reach beyond the prompt. Texts are cut on the right, to `max_length` tokens.
    """
    tokenizer = tokenizer_of(name)
    if prompting.template == CHAT and not tokenizer.chat_template:
        raise ModelError(f"data.template: chat: the tokenizer of {name!r} has no chat template; name another")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def one(turn: Turn) -> tuple[list[int], int]:
        if prompting.template == CHAT:
            ids, first = _chat(tokenizer, turn)
        else:
            ids, first = located_response(tokenizer, prompt_of(prompting.template, turn), turn.response)
            ids = [*ids, *end] if turn.response and ids[-1:] != end else ids
        return ids[:max_length], 0 if prompting.train_on_inputs else min(first, max_length)

    probe = one(Turn("The quick brown fox", "12345. Ärger 東京", "Yes."))
    return CausalProcessor(
        lambda turns: [one(turn) for turn in turns],
        padding_of(name, tokenizer),
        f"{name}|{len(tokenizer)}|{max_length}|{form_of(prompting)}|{probe}",
    )


def located_response(tokenizer: Any, prompt: str, response: str, *, special: bool = True) -> tuple[list[int], int]:
    """The tokens of a prompt and its response, with `special` ones, and the first that reaches into the response."""
    if not tokenizer.is_fast:  # it cannot say where its tokens stand
        before = tokenizer(prompt, add_special_tokens=special)["input_ids"] if prompt else []
        return tokenizer(prompt + response, add_special_tokens=special)["input_ids"], len(before)
    found = tokenizer(prompt + response, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in found["offset_mapping"]]
    reaching = (place for place, end in enumerate(ends) if end > len(prompt))
    return found["input_ids"], next(reaching, len(ends))


def _chat(tokenizer: Any, turn: Turn) -> tuple[list[int], int]:
    """A turn by the tokenizer's chat template; what the template says before an answer is the prompt."""
    asked = [{"role": "user", "content": "\n\n".join(part for part in (turn.instruction, turn.input) if part)}]
    answered = [*asked, {"role": "assistant", "content": turn.response}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(prompt):  # templates may word a finished answer differently; what both share is asked
        prompt = prompt[: next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))]
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    reaching = (place for place, (_, end) in enumerate(found["offset_mapping"]) if end > len(prompt))
    return found["input_ids"], next(reaching, len(found["input_ids"]))


def image_processor(name: str, image_size: int | None = None) -> ImageProcessor:
    """Size, channels and normalisation that the model was trained with; 0.5 where it does not say."""
    config = config_of(name, "image classifier")
    with quiet():
        try:
            stated, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:
            stated = {}
    channels = configs.channels(config)
    size = image_size or configs.image_size(config)
    if size is None:
        raise ModelError(f"model.image_size: {name!r} does not state an image size; give one")
    mean, std = stated.get("image_mean") or [0.5] * channels, stated.get("image_std") or [0.5] * channels
    return ImageProcessor(int(size), channels, tuple(map(float, mean)), tuple(map(float, std)))
