"""A site's file: what it is made of, and what it allows."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from polyrank.core.privacy import Privacy
from polyrank.deploy.consent import Approve
from polyrank.deploy.policy import BudgetConfig, LimitsConfig, PolicyConfig
from polyrank.experiment.components import Processes, Strict, entry_model, union_of
from polyrank.experiment.config import ConfigError, PrivacyConfig, Resources
from polyrank.experiment.loading import anchored, located, validated, yaml_of
from polyrank.experiment.tables import DATASETS

DataConfig = union_of(entry_model(name, function) for name, function in DATASETS.items())


class Rehearsal(Strict):
    """The data and the resources that a simulated client has, to try a deployment with.

    Attributes:
        experiment: a file that divides its data among clients.
        client: the one to be.
        overrides: ``key.sub=value``, as after ``--set``.
    """

    experiment: Path
    client: str
    overrides: tuple[str, ...] = ()


class SiteConfig(Resources):
    """What a client is made of, what it can afford, and what it allows.

    Attributes:
        model: its copy of the base model: a folder, a hub name, or a built-in one.
        data: its own data; all training examples are used, and nothing else. Of instructions it names the columns and
            the template itself; a template that says something else than the server's is refused.
        rehearse: the data and the resources of a simulated client, in place of `data` and of what this file states.
        privacy: the least protection that it agrees to: a task without it, or with less noise, is refused.
        budget: how much all answers together may tell of the data; None: nobody counts.
        limits: what one task may cost it.
        approve: who decides whether it takes part in a new run: ``auto``, everybody may ask; ``ask``, its operator;
            ``policy``, what is stated there, and its operator where that does not allow the run.
        policy: runs that need no operator, where ``approve: policy``.
        device: ``auto`` is a GPU if there is one.
        threads: CPU threads; None: all cores the process may use.
    """

    model: str
    data: DataConfig | None = None  # type: ignore[valid-type]
    rehearse: Rehearsal | None = None
    privacy: PrivacyConfig = PrivacyConfig()
    budget: BudgetConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    approve: Approve = "auto"
    policy: PolicyConfig | None = None
    device: str = "auto"
    threads: Processes | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SiteConfig:
        if (self.data is None) == (self.rehearse is None):
            raise ValueError("exactly one of data and rehearse says what it trains on")
        if self.data is not None and getattr(self.data, "train", self.data) is None:
            raise ValueError("data.train: missing: a site trains on it")
        if (self.policy is None) == (self.approve == "policy"):
            raise ValueError("policy: says which runs are approved where approve: policy, and goes with nothing else")
        if self.budget is not None and self.floor.on_server is not None:
            raise ValueError("budget: where: central leaves what this site sends as it is, so nothing can be counted")
        return self

    @property
    def floor(self) -> Privacy:
        """The least protection that it agrees to."""
        return Privacy.of(self.privacy.model_dump())

    @property
    def guarded(self) -> bool:
        """Whether its answers must hide something of its data."""
        return bool(self.floor) or self.budget is not None


def read_site(path: Path, data: Path | None = None) -> SiteConfig:
    """A site's file; paths in it are seen from it. `data` is its training data, where that is not as the file says.

    Raises:
        ConfigError: naming the file, the key, the value and what would be valid.
    """
    raw = yaml_of(path)
    if data is not None:
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict) or "train" not in raw["data"]:
            raise ConfigError(f"{path}: data.train: missing, which --data {data} would replace")
        raw["data"]["train"] = data.resolve()
    config, folder = validated(SiteConfig, raw, str(path)), path.resolve().parent
    parts = {key: anchored(part, folder) for key in ("data", "rehearse") if (part := getattr(config, key)) is not None}
    for section, part in parts.items():
        for key, value in part:
            if isinstance(value, Path) and not value.exists():
                raise ConfigError(f"{path}: {section}.{key}: {value}: no such file")
    return config.model_copy(update={"model": located(config.model, folder), **parts})
