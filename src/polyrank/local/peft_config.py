"""``adapter_config.json``: what of it is understood, and the refusal of everything else by name.

An adapter means what its config says. A key of `UNDERSTOOD` may have the values that are named there; any other key
must be null, false or empty, which is how PEFT says that a variant is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from polyrank.errors import InputError
from polyrank.files import from_json
from polyrank.local.patterns import check_patterns, is_literal

CONFIG = "adapter_config.json"
MOST_BYTES = 2**22
"""Of a config."""

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's task types."""

_MOST_SHOWN, _MOST_NAMES = 60, 3
_LFS = b"version https://git-lfs.github.com/spec/"


class AdapterError(InputError):
    """A folder is not an adapter that polyrank can read, or not one of the expected model."""


Check = Callable[[Any], bool]
Values = tuple[Check, str]
"""Which values are understood, and how a message names them."""


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _mapping_to(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _rank(value: Any) -> bool:
    return _whole(value) and value > 0


def _alpha(value: Any) -> bool:
    return _number(value) and value > 0


def _fresh(value: Any) -> bool:
    """Whether factors were started so that the base's weights stayed as they were."""
    named = isinstance(value, str) and (value in ("eva", "orthogonal", "mica") or value.lower() == "gaussian")
    return isinstance(value, bool) or named


TEXT: Values = (_text, "a text")
FLAG: Values = (lambda value: isinstance(value, bool), "true or false")
SHARE: Values = (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1")
RANK: Values = (_rank, "a positive whole number")
ALPHA: Values = (_alpha, "a positive number")
RANKS: Values = (_mapping_to(_rank), "a mapping of module names to positive whole numbers")
ALPHAS: Values = (_mapping_to(_alpha), "a mapping of module names to positive numbers")
NAMES: Values = (_list_of(_text), "a list of names")
MODULES: Values = (_either(_text, _list_of(_text)), "a name or a list of names")
INDICES: Values = (_either(_whole, _list_of(_whole)), "a whole number or a list of them")
OPTIONS: Values = (lambda value: isinstance(value, dict), "a mapping")

_COMMON: dict[str, Values] = {
    "peft_type": TEXT,
    "task_type": (lambda value: value in TASKS, "one of " + ", ".join(TASKS)),
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "peft_version": TEXT,
    "auto_mapping": OPTIONS,  # which class the base was loaded with
    "inference_mode": FLAG,
    "r": RANK,
    "rank_pattern": RANKS,
    "alpha_pattern": ALPHAS,
    "modules_to_save": NAMES,
    # which modules have a layer: the tensors of the file say it
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "layers_to_transform": INDICES,
    "layers_pattern": MODULES,
}
UNDERSTOOD: dict[str, dict[str, Values]] = {
    "LORA": {
        **_COMMON,
        "lora_alpha": ALPHA,
        "use_rslora": FLAG,
        "fan_in_fan_out": FLAG,
        "bias": (lambda value: value == "none", '"none"'),
        "init_lora_weights": (_fresh, 'true, false, "gaussian", "eva", "orthogonal" or "mica"'),
        # how a training went that is over
        "lora_dropout": SHARE,
        "eva_config": OPTIONS,
        "corda_config": OPTIONS,  # stays after a conversion
        "lora_ga_config": OPTIONS,
        "runtime_config": OPTIONS,
        # of variants that are not used
        "qalora_group_size": RANK,
        "megatron_core": TEXT,
    },
    "LOKR": {
        **_COMMON,
        "alpha": ALPHA,
        "decompose_factor": (lambda value: _whole(value) and value == -1, "-1"),
        "init_weights": (lambda value: isinstance(value, bool) or value == "lycoris", 'true, false or "lycoris"'),
        "rank_dropout": SHARE,
        "module_dropout": SHARE,
        "rank_dropout_scale": FLAG,
    },
}
"""What a config may say by the kind of adapter: the values of each key that change nothing, or that are honoured."""

REFUSED: dict[str, dict[str, str]] = {
    "LORA": {
        "use_dora": "it has a magnitude for every output besides B A",
        "lora_bias": "B has a bias, which is no part of B A",
        "use_qalora": "A sees groups of inputs",
        "use_bdlora": "its factors are block-diagonal",
        "monteclora_config": "its factors are drawn anew in every pass",
        "kasa_config": "it cuts components of the base's weights and has a diagonal between B and A",
        "velora_config": "it carries projections of its gradients",
        "arrow_config": "it chooses among several adapters token by token",
        "alora_invocation_tokens": "it works from certain tokens on only",
        "trainable_token_indices": "it replaces rows of the embedding",
        "target_parameters": "it updates parameters that are no linear layer",
        "layer_replication": "its base repeats layers",
        "megatron_config": "its layers are Megatron's",
        "loftq_config": "its base is a quantised one",
        "ensure_weight_tying": "its layers share tensors",
    },
    "LOKR": {
        "decompose_both": "its left factor is a product too",
        "use_effective_conv2d": "it is of convolutions",
    },
}
"""Variants that are known and not supported: why each is more than a plain adapter."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter's folder, every value of it understood; null counts as not given.

    Raises:
        AdapterError: if it is missing or broken, or says anything of the adapter that is not understood.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = str(config.get("peft_type", "")).upper()
    if kind not in UNDERSTOOD:
        raise AdapterError(f"{path}: peft_type must be LORA or LOKR, got {_shown(config.get('peft_type'))}")
    for key, value in config.items():
        if value is not None:
            _check(path, kind, key, value)
    for key in ("r", "lora_alpha" if kind == "LORA" else "alpha"):
        if config.get(key) is None:
            raise AdapterError(f"{path}: {key} must be a positive number, got None")
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            check_patterns(config.get(key) or ())
        except ValueError as error:
            raise AdapterError(f"{path}: {key}: {error}; name modules, or parts of their names after a dot") from None
    return {**{key: value for key, value in config.items() if value is not None}, "peft_type": kind}


def check_names(folder: Path) -> None:
    """Refuses a config that names modules by anything but their names: PEFT hands the rest to `re`, which can hang.

    Raises:
        AdapterError: naming the key and the expression.
    """
    path, config = folder / CONFIG, read_config(folder)
    matched = {key: list(config.get(key) or ()) for key in ("rank_pattern", "alpha_pattern")}
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key) or []
        matched[key] = [value] if isinstance(value, str) else value if key == "layers_pattern" else []
    for key, patterns in matched.items():
        for pattern in patterns:
            if not is_literal(pattern):
                raise AdapterError(
                    f"{path}: {key}: {_shown(pattern)} is a regular expression, for which PEFT may need endless time; "
                    "name the modules themselves"
                )


def _check(path: Path, kind: str, key: str, value: Any) -> None:
    name = "LoRA" if kind == "LORA" else "LoKr"
    if key not in UNDERSTOOD[kind]:
        if value is False or value in ("", [], {}):
            return
        why = REFUSED[kind].get(key, "polyrank does not know this key")
        raise AdapterError(f"{path}: {_shown(key, '')} = {_shown(value)} is more than a plain {name}: {why}")
    check, values = UNDERSTOOD[kind][key]
    if check(value):
        return
    if key == "init_lora_weights" and isinstance(value, str):
        raise AdapterError(f"{path}: {key} = {_shown(value)} is more than a plain LoRA: {_converted(value)}")
    if key in ("bias", "decompose_factor") and isinstance(value, str | int):
        raise AdapterError(f"{path}: {key} = {_shown(value)} is more than a plain {name}, which has {values}")
    raise AdapterError(f"{path}: {key} must be {values}, got {_shown(value)}")


def _converted(value: str) -> str:
    """Why such a start is refused, and PEFT's way to a plain LoRA."""
    if value.lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        return (
            "this start changes the base's weights, and the adapter is of the changed ones. PEFT makes a plain LoRA of "
            "it where it was trained: before training, set model.peft_config['default'].init_lora_weights = True and "
            "model.save_pretrained(START); after it, model.save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=START)"
        )
    if value.lower().startswith("loftq"):
        return "this start quantises the base's weights, and the adapter belongs to the quantised ones alone"
    return "polyrank does not know this start; it may have changed the base's weights"


def read_json(path: Path) -> dict[str, Any]:
    """A mapping from a JSON file that somebody else has written.

    Raises:
        AdapterError: if there is no such file, or it is a pointer of git-lfs, too large, no UTF-8, or no JSON mapping;
            also for NaN and infinite numbers, and for a key that is given twice.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent}: no {path.name}")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise AdapterError(f"{path}: has more than {MOST_BYTES:,} bytes, which no {path.name} needs")
    check_pointer(path, data)
    try:
        value = from_json(data.decode("utf-8-sig"), finite=True, unique=True, characters=True)
    except UnicodeError as error:
        raise AdapterError(f"{path}: not text in UTF-8: {error}") from None
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: must be a JSON mapping, got {_shown(value)}")
    return value


def check_pointer(path: Path, start: bytes) -> None:
    """Refuses what git-lfs leaves in place of a file: `start` are its first bytes."""
    if start.startswith(_LFS):
        raise AdapterError(f"{path}: a pointer of git-lfs, not the file; `git lfs pull` in its folder fetches it")


def _shown(value: Any, quote: str = "'") -> str:
    text = value if isinstance(value, str) and not quote else repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def few(names: Iterable[object]) -> str:
    """A few of these names, and how many more there are."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return ", ".join(shown[:_MOST_NAMES]) + more
