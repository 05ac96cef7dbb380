"""What stands beside a model's weights: its config and its tokenizer; and the token that pads, by both of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from polyrank.local.checkpoint import CheckpointError, check_config
from polyrank.local.configs import ModelError as ModelError
from polyrank.local.configs import a, check_counts, reason_of


def config_of(name: str, what: str = "model") -> Any:
    """The config of a model; one that pads with a token that the model has not says that it has none.

    Args:
        name: hub name or folder.
        what: what it is to be loaded as, for messages.

    Raises:
        ModelError: if there is none, it is broken, or it is an adapter's.
    """
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if Path(name).is_dir():
                check_config(Path(name))
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except CheckpointError as error:
            raise ModelError(f"model.name: {name!r} cannot be loaded as {a(what)}: {error}") from None
        except Exception as error:  # whatever a library makes of a file that somebody else has written
            raise ModelError(f"model.name: {name!r} cannot be loaded as {a(what)}: {reason_of(name, error)}") from None
    check_counts(config.to_dict(), repr(name))
    return without_strange_padding(config)


def without_strange_padding(config: Any) -> Any:
    """A config whose padding token, where the model has no such token, is None: -1, or one beyond the vocabulary."""
    for part in {id(x): x for x in (config, config.get_text_config())}.values():
        if hasattr(part, "vocab_size") and _valid(getattr(part, "pad_token_id", None), part) is None:
            part.pad_token_id = None
    return config


def tokenizer_of(name: str) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: if it has none.
    """
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise ModelError(f"model.name: {name!r} has no tokenizer: {error}") from None


def tokenizer_at_hand(name: str, *, download: bool = False) -> Any | None:
    """The model's tokenizer, if it has one that is on this machine or may be downloaded."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return transformers.AutoTokenizer.from_pretrained(name, local_files_only=not download)
        except Exception:  # a folder with a config alone is enough to plan with
            return None


def padding_of(name: str, tokenizer: Any) -> int:
    """The padding token of a model with this tokenizer, whose config may be missing."""
    try:
        return padding_token(config_of(name), tokenizer)
    except ModelError:
        return padding_token(None, tokenizer)


def padding_token(config: Any | None, tokenizer: Any | None) -> int:
    """The token that fills up batches, and that the model is told of: the one place that decides it.

    The first of these that the model has: the config's, the tokenizer's, the end of a text by either of them, its
    beginning, any other special token; 0. A decoder finds a text's class at the last token that is not this one, so an
    end that the tokenizer puts behind every text comes after those that stand nowhere else. A token that the tokenizer
    takes for a word is left to the end, too: made to pad, it would be cut out of words.

    Args:
        config: the model's; None: unknown.
        tokenizer: the model's; None: unknown.
    """
    text = None if config is None else config.get_text_config()
    special = [] if tokenizer is None else _special(tokenizer)
    of = (text, tokenizer)
    known = [i for key in ("pad", "eos", "bos") for part in of for i in _ids(getattr(part, f"{key}_token_id", None))]
    candidates = [i for i in [*known, *special] if _valid(i, text) is not None]
    usual = [i for i in candidates if tokenizer is None or i in special]
    stated = {i for part in of for i in _ids(getattr(part, "pad_token_id", None))}
    last = None if stated & set(usual) or tokenizer is None else _last(tokenizer)
    return next(iter([*(i for i in usual if i != last), *usual, *candidates]), 0)


def tell_padding(config: Any, pad: int) -> None:
    """Writes the token that pads into a text model's config, and into the part of it that is of texts."""
    for part in {id(x): x for x in (config, config.get_text_config())}.values():
        if hasattr(part, "vocab_size") or part is config:
            part.pad_token_id = pad


def _ids(stated: Any) -> list[int]:
    """Token ids as configs state them: one, several, or none."""
    found = stated if isinstance(stated, list | tuple) else [stated]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool)]


def _valid(token: Any, config: Any | None) -> int | None:
    """A token id that a model of this config has; None of any other."""
    size = getattr(config, "vocab_size", None)
    if not isinstance(token, int) or token < 0 or (isinstance(size, int) and token >= size):
        return None
    return token


def _special(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer takes for no part of a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return list(dict.fromkeys([*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)]))


def _last(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts behind a text."""
    return next(reversed(tokenizer("a", verbose=False)["input_ids"]), None)


@contextmanager
def quiet() -> Iterator[None]:
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
