"""The configuration of an experiment, as strict sections: what a file may say, and what it means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, create_model, model_validator

from polyrank.core.architecture import Quantization
from polyrank.core.gate import Gate
from polyrank.core.method import Method
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.types import LocalTraining
from polyrank.engines.exchange import Terms
from polyrank.errors import InputError
from polyrank.experiment.components import (
    Count,
    Processes,
    Seed,
    Strict,
    bind,
    describe,
    entry_model,
    parameters,
    table_type,
    union_of,
)
from polyrank.experiment.privacy import check_privacy
from polyrank.experiment.questions import ChoicesConfig, GenerateConfig
from polyrank.experiment.tables import DATASETS, LOGGERS, METHODS, PARTITIONERS, SLOTS
from polyrank.experiment.trust import TrustConfig, check_trust, gate_of, written_out
from polyrank.experiment.units import CacheMemory, Flops, FreeMemory, Memory, Share, Speed

_Rounds = Annotated[int, Field(ge=1, le=100_000, strict=True)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Regime = Literal["federated", "single", "local", "zero_shot"]


class ConfigError(InputError):
    """A configuration that cannot be run; the message names the file, the key, the value and what would be valid."""


class ModelConfig(Strict):
    """The base model and where adapters go.

    Attributes:
        name: hub name, folder (seen from the file), ``package:PKG/DIR`` inside an installed package, or digits-vit.
        config: a folder with the model's config.json, to plan from where the hub is out of reach; the name's own if not
            given. A run reads the name's.
        targets: ``attention``, ``attention+mlp``, ``all-linear``, or module names.
        rank: the server's rank per module; the largest rank of the fleet if not given.
        alpha: scale = alpha / rank; equal to the rank if not given, so that the scale is 1.
        head: whether the classification head is trained and averaged, or stays as it started.
        adapter: a PEFT adapter to start from.
        export: what is published of a run. PEFT cannot load the adapter of all targets of some models; such targets are
            refused, but for ``merged``: the model with the adapter merged in has them all.
        dtype: of the base; ``float16`` on a GPU only.
        attention: ``eager``, ``sdpa`` (memory-efficient), or ``auto`` for the library's choice.
        quantize: ``8bit`` or ``4bit`` linear layers of the base, by bitsandbytes (extra ``quant``).
        image_size: pixels per side, where it is not the model's own.
        max_length: tokens per text; longer texts are cut.
    """

    name: str
    config: Path | None = None
    targets: str | list[str] = "attention"
    rank: Count | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    head: Literal["train", "freeze"] = "train"
    adapter: Path | None = None
    export: Literal["adapter", "merged"] = "adapter"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    quantize: Quantization | None = None
    image_size: Count | None = None
    max_length: Count = 128


class DataCommon(Strict):
    """What every data set takes besides its own options.

    Attributes:
        clients: how many clients share the training data; None: as many as `partition` finds (natural clients).
        partition: how the training data is split among them.
        hold_out: share of the training data held out for validation, where the data has no validation split.
        limit: largest number of examples per split, for example ``{train: 2000}``.
        importance: how many training examples the server keeps, and no client gets, to measure on which layers matter;
            None: as many as the method's scorer measures on its hold-out (its `samples`), none where it has no use
            for one. They are drawn from a stream of their own before the data is partitioned: methods that are
            compared train on the same examples if all name the same number.
    """

    clients: Count | None = None
    partition: table_type(PARTITIONERS) = Field(default_factory=lambda: {"name": "iid"}, validate_default=True)  # type: ignore[valid-type]
    hold_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: dict[Literal["train", "validation", "test"], Count] = Field(default_factory=dict)
    importance: Count | None = None


class Resources(Strict):
    """What a client can afford; what is left out is unknown, and no limit.

    Attributes:
        rank: the rank that it states.
        memory: of the accelerator, or ``detect`` for what is free on this machine.
        uplink, downlink, flops: what it reports.
    """

    rank: Count | None = None
    memory: FreeMemory | None = None
    uplink: Speed | None = None
    downlink: Speed | None = None
    flops: Flops | None = None


class Group(Resources):
    """A device group of the fleet, and what each of its clients can afford; clients are numbered group by group.

    Attributes:
        name: for tables and figures.
        share: its share of the clients; the last group takes what rounding leaves.
    """

    name: str = ""
    share: Share = 1.0


class CostsConfig(Strict):
    """What the cost model cannot know.

    Attributes:
        overhead: memory reserved beside tensors, on every client; the calibration's, or 64 MiB, if not given.
        calibration: a file that ``polyrank profile`` wrote.
    """

    overhead: Memory | None = None
    calibration: Path | None = None


class EvaluateConfig(Strict):
    """When and on how much the aggregated model is evaluated.

    Attributes:
        every: rounds between evaluations on the validation split; the last round is always evaluated.
        samples: at most so many validation examples (the test split is always used whole).
        aggregation: whether to measure, in every round, how far the aggregate is from the exact mean of the clients'
            models; keeps a cohort's low-rank layers in memory.
        clients: also evaluate the aggregated model on each client's own examples, some of which it keeps for that and
            never trains on; a number: of so many clients, drawn once.
        client_hold_out: the part of its examples that a client keeps for that.
        choices: questions with choices for a causal language model, before and after the run.
        generate: text from a causal language model, likewise.
    """

    every: Count = 1
    samples: Count | None = None
    aggregation: bool = True
    clients: bool | Count = False
    client_hold_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    choices: ChoicesConfig | None = None
    generate: GenerateConfig | None = None


class SimulationConfig(Strict):
    """How this machine runs the clients.

    Attributes:
        cache: memory for hidden states below the lowest block that a client trains (`polyrank.local.prefix`), ``off``,
            or ``auto``: where examples come again, an eighth of all memory, at most 4 GiB.
        together: most input positions of a step that clients share, where sharing is faster
            (`polyrank.local.grouping`); ``off``: each trains alone; ``auto``: 1,024 on a CPU, 16,384 on a GPU. Never
            more than half of the machine's memory has room for.
        workers: processes that train clients, each with the base on a GPU of its own or on its part of the threads
            (`polyrank.engines.workers`); 1: this process trains; ``auto``: as many as there are GPUs.
    """

    cache: CacheMemory = "auto"
    together: Literal["auto", "off"] | Count = "auto"
    workers: Literal["auto"] | Processes = 1


def _settings(made: type, name: str) -> Any:
    return create_model(name, __base__=Strict, __doc__=made.__doc__, **parameters(made, keyword_only=False))


class PrivacyConfig(Strict):
    """Differential privacy, off unless asked for.

    Attributes:
        clients: for whole clients.
        examples: for single examples.
    """

    clients: _settings(ClientPrivacy, "ClientPrivacyConfig") | None = None  # type: ignore[valid-type]
    examples: _settings(ExamplePrivacy, "ExamplePrivacyConfig") | None = None  # type: ignore[valid-type]


class Contender(Strict):
    """One of the things that a study compares.

    Attributes:
        label: what tables call it.
        set: keys of the file and their values, as ``--set`` takes them: ``{method: hralora, method.rank: 8}``.
    """

    label: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)


class StudyConfig(Strict):
    """What ``polyrank compare`` runs of the file; a run of the file itself does not look at it.

    Attributes:
        methods: names of methods and of regimes, or a label and what is set under it.
        seeds: a run each; the file's own seed if none is given.
        grid: keys of the file, and the values of each; every combination is run.
    """

    methods: list[str | Contender] = Field(default_factory=list)
    seeds: list[Seed] = Field(default_factory=list)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)


class Expected(Strict):
    """The figure that the experiment is expected to reach: final test accuracy, within a tolerance."""

    accuracy: float
    tolerance: float


def _method_model(name: str) -> type[Strict]:
    method = METHODS[name]()
    own = {slot: describe(table, getattr(method, slot))["name"] for slot, table in SLOTS.items()}
    slots = {slot: (table_type(table, own[slot]) | None, None) for slot, table in SLOTS.items()}
    return entry_model(name, METHODS[name], **slots)


def _named_slots(value: Any) -> Any:
    """Lets ``method.aggregate: {rank: 16}`` mean the method's own rule, with that option."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in METHODS:
        return value
    method, filled = _as_asked(value), dict(value)
    for slot, table in SLOTS.items():
        given = value.get(slot)
        if isinstance(given, dict):
            own = describe(table, getattr(method, slot))
            filled[slot] = {**own, **given} if given.get("name", own["name"]) == own["name"] else given
    return filled


def _as_asked(value: dict[str, Any]) -> Method:
    """The method with the options that the file gives, so that overriding one option of an answer keeps the others."""
    function = METHODS[value["name"]]
    try:
        return function(**{key: value[key] for key in parameters(function) if key in value})
    except Exception:  # validation will say what is wrong with them
        return function()


MethodConfig = Annotated[union_of(_method_model(name) for name in METHODS), BeforeValidator(_named_slots)]
DataConfig = union_of(entry_model(name, function, base=DataCommon) for name, function in DATASETS.items())
LocalConfig: Any = create_model(
    "LocalConfig", __base__=Strict, __doc__=LocalTraining.__doc__, **parameters(LocalTraining, keyword_only=False)
)
DeploymentConfig: Any = create_model(
    "DeploymentConfig", __base__=Strict, __doc__=Terms.__doc__, **parameters(Terms, keyword_only=False)
)


class Experiment(Strict):
    """One experiment.

    Attributes:
        seed: of everything random.
        rounds: how many.
        cohort: clients per round; None: all of them.
        absent: probability that a client asked in a round does not answer.
        device: ``auto`` is a GPU if there is one.
        threads: CPU threads; None: all cores the process may use.
        model, data, fleet, method, local, costs, evaluate, simulation, deployment, trust, privacy: see there.
        regime: ``federated``, or what is run in its place to compare with: ``single``, one adapter on the pooled data;
            ``local``, every client alone; ``zero_shot``, the model as it starts (`polyrank.experiment.regimes`).
        baselines: ``single`` and ``local`` runs at the end of a federated one, for its summary.
        study: what ``polyrank compare`` runs.
        log: where figures of every round go besides the run's own files; ``auto``: to TensorBoard's files, where the
            package is installed.
        expected: the figure to reach, checked by tests.
    """

    seed: Seed = 0
    rounds: _Rounds
    cohort: Count | None = None
    absent: Probability = 0.0
    device: str = "auto"
    threads: Processes | None = None
    model: ModelConfig
    data: DataConfig  # type: ignore[valid-type]
    fleet: list[Group] = Field(min_length=1)
    method: MethodConfig = Field(default_factory=lambda: {"name": "fedit"}, validate_default=True)  # type: ignore[valid-type]
    local: LocalConfig = Field(default_factory=dict, validate_default=True)
    costs: CostsConfig = CostsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    simulation: SimulationConfig = SimulationConfig()
    deployment: DeploymentConfig = Field(default_factory=dict, validate_default=True)
    trust: TrustConfig = Field(default_factory=dict, validate_default=True)
    privacy: PrivacyConfig = PrivacyConfig()
    regime: Regime = "federated"
    baselines: list[Literal["single", "local"]] = Field(default_factory=list)
    study: StudyConfig = StudyConfig()
    log: Literal["auto"] | list[table_type(LOGGERS)] = "auto"  # type: ignore[valid-type]
    expected: Expected | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        total = sum(group.share for group in self.fleet)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"fleet: shares sum to {total:g}, not 1")
        if self.regime != "federated" and self.baselines:
            raise ValueError(f"baselines: {', '.join(self.baselines)}: of a federated run, not of regime {self.regime}")
        protection = self.protection()
        check_privacy(protection, self.build_method(), self.local_training())
        self.terms()
        check_trust(self.trust, protection)
        return self

    @property
    def label(self) -> str:
        """What a table calls the run: its method, or what is run in place of one."""
        return str(self.method.name) if self.regime == "federated" else self.regime

    def local_training(self) -> LocalTraining:
        """The settings of a client's round."""
        return LocalTraining(**self.local.model_dump())

    def terms(self) -> Terms:
        """How a server waits for its clients."""
        return Terms(**self.deployment.model_dump())

    def trusting(self) -> Experiment:
        """The experiment with what its server believes of clients on other machines written out."""
        trust = written_out(self.trust, self.protection(), remote=True)
        return self.model_copy(update={"trust": trust})

    def gate(self, *, remote: bool = False) -> Gate:
        """What an update must satisfy, of clients in this process or on other machines."""
        return gate_of(self.trust, self.protection(), remote=remote)

    def protection(self) -> Privacy:
        """What is protected, and how."""
        return Privacy.of(self.privacy.model_dump())

    def build_method(self) -> Method:
        """The composition, with the slots that the file overrides."""
        chosen: Any = self.method
        options = {key: getattr(chosen, key) for key in parameters(METHODS[chosen.name])}
        method = METHODS[chosen.name](**options)
        bound = {slot: bind(table, own) for slot, table in SLOTS.items() if (own := getattr(chosen, slot)) is not None}
        if self.model.head == "freeze":
            bound["dense"] = "freeze"  # type: ignore[assignment]
        return replace(method, **bound)  # type: ignore[arg-type]

    def resolved(self) -> dict[str, Any]:
        """One run with every default and every answer of the method written out; loads again as it is."""
        plain: dict[str, Any] = _stated(self, self.model_dump(mode="json", exclude={"study"}))
        method = self.build_method()
        plain["method"] |= {slot: describe(table, getattr(method, slot)) for slot, table in SLOTS.items()}
        for group, given in zip(plain["fleet"], self.fleet, strict=True):
            units = {"memory": "B", "uplink": "bit/s", "downlink": "bit/s", "flops": "FLOP/s"}
            numbers = {key: unit for key, unit in units.items() if isinstance(group.get(key), float)}
            group.update({key: f"{getattr(given, key)!r} {unit}" for key, unit in numbers.items()})
        if self.costs.overhead is not None:
            plain["costs"]["overhead"] = f"{self.costs.overhead!r} B"
        if isinstance(self.simulation.cache, float):
            plain["simulation"]["cache"] = f"{self.simulation.cache!r} B"
        return plain


def _stated(value: Any, plain: Any) -> Any:
    """The plain form of a value without what is None and would be if it were left out."""
    if isinstance(value, list):
        return [_stated(*pair) for pair in zip(value, plain, strict=True)]
    if not isinstance(value, Strict):
        return plain
    fields = type(value).model_fields
    kept = [key for key, held in plain.items() if held is not None or fields[key].get_default() is not None]
    return {key: _stated(getattr(value, key), plain[key]) for key in kept}


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors. A file that extends another may leave out whole sections."""
    schema = TypeAdapter(Experiment).json_schema()
    whole = {"required": schema.pop("required")}
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A file beside this one, which it goes on from.",
    }
    ways = {"anyOf": [whole, {"required": ["extends"]}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "polyrank experiment", **schema, **ways}
