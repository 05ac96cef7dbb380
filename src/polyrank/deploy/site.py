"""A client's side: its own data, its own copy of the base model, and answers to what a server asks.

What a site is made of, and what it allows, is in a file that stays with it. A server learns the number of examples, the
resources that the file states, a fingerprint of the base model, and what it asks to be trained; it names no path and no
model. Every question passes the same gate: the run must be one that the site takes part in (`consent`), what is asked
must be within what the file allows (`policy`), and what the answer tells is entered before it is made (`ledger`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyrank.core.privacy import Privacy
from polyrank.core.types import LocalTraining, Task, Update
from polyrank.deploy.consent import Consent, Known
from polyrank.deploy.holdings import holdings_of, loaded
from polyrank.deploy.ledger import NOTHING, Entry, PrivacyLedger, Protection, check_budget, protection_of, spent
from polyrank.deploy.policy import BudgetConfig, RefusalError, check_cost, check_limits, check_protection, time_limit
from polyrank.deploy.site_file import read_site
from polyrank.engines.announcement import Announcement, announcement_of, digest_of
from polyrank.engines.audit import Journal
from polyrank.engines.letters import (
    answer_to_another_version,
    decode_query,
    encode_profile,
    encode_refusal,
    encode_scores,
)
from polyrank.engines.post import Kind
from polyrank.engines.wire import LISTING, VersionError, decode_task, digest, encode_update, opened
from polyrank.errors import TrainingError
from polyrank.experiment.machine import default_threads, pick_device
from polyrank.experiment.models import Split
from polyrank.files import write_bytes
from polyrank.local.base import Base
from polyrank.local.importance import measured
from polyrank.local.trainer import train
from polyrank.text import one_line

_log = logging.getLogger(__name__)


class Site:
    """Answers what a server asks, or says why not.

    Args:
        path: its configuration. Beside it, ``history.jsonl`` says who asked what and what has left this machine,
            ``runs.json`` which runs the site takes part in, and ``ledger.json`` what its answers have told;
            ``last-update`` is the answer to the last task, given again to who asks again: nothing is trained or
            released twice.
        data: its training data, where that is not as the file says.
    """

    def __init__(self, path: Path, data: Path | None = None) -> None:
        self.path, self.config = path, read_site(path, data)
        config, folder = self.config, path.resolve().parent
        torch.set_num_threads(config.threads or default_threads())
        self.device = pick_device(config.device)
        self.holdings = holdings_of(config)
        self.fingerprint = self.holdings.fingerprint()
        self.history = Journal(path.with_name("history.jsonl"))
        self.consent = Consent(path.with_name("runs.json"), config.approve, config.policy)
        ledger = BudgetConfig.model_fields["ledger"].default if config.budget is None else config.budget.ledger
        self.ledger = PrivacyLedger(folder / ledger)
        self._ready: dict[str, tuple[Base, Split]] = {}
        self._asker: dict[str, str] = {}
        self._refusal: dict[str, str] = {}

    @property
    def examples(self) -> int:
        """How many it has."""
        return len(self.holdings.own)

    def answer(self, kind: Kind, blob: bytes) -> bytes:
        """The answer to a message; where the site does not agree to what is asked, its reason.

        Raises:
            InputError: if what is asked does not go with what the site has.
            WireError: if the message is not what it should be.
        """
        self._asker = {}
        try:
            return {"profile": self._profile, "fit": self._fit, "measure": self._measure}[kind](blob)
        except VersionError as error:
            _log.error("%s: the server's message %s", self.path, error)
            return answer_to_another_version()
        except RefusalError as refusal:
            self._note(kind, refused=str(refusal))
            return encode_refusal(str(refusal), blob)
        except Exception as error:
            self._note(kind, failed=f"{type(error).__name__}: {error}"[:1000])
            if not self.config.guarded:
                raise
            return encode_refusal("this site cannot answer; its history.jsonl says why", blob)  # that may tell of data

    def _profile(self, blob: bytes) -> bytes:
        header, _ = opened(blob, "hello", LISTING)
        run = announcement_of(header.get("run"))
        self._asker = {"run": run.id, "name": run.name, "by": run.by}
        self._check_model(run, header)
        if (known := self.consent.meet(run, self.cost(run))) is not None:
            self._show(known)
        self.consent.require(run.id)
        self._check(run, run.privacy, run.local)
        base, _ = self._model(header["model"])
        profile = self.holdings.profile
        if self._hides_size:
            profile = replace(profile, examples=min(profile.examples, 1))
        reply = encode_profile(profile, base.fingerprint(), blob)
        self._remember("profile", run, examples=profile.examples, sent=digest(reply), bytes=len(reply))
        return reply

    def _fit(self, blob: bytes) -> bytes:
        started, asked = time.monotonic(), digest(blob)
        task, header = decode_task(blob)
        run = self._run(header)
        self._check_model(run, header)
        if (difference := run.mismatch(task, self.examples)) is not None:
            raise RefusalError(f"not as the run was announced: {difference}")
        if (given := self._given(asked)) is not None:
            return given
        self._check(run, task.privacy, task.local)
        if task.penalty is not None and task.privacy:
            raise RefusalError("privacy: no noise covers the ranks that a tail penalty prunes")
        base, data = self._model(header["model"])
        spec = replace(base.spec, head_trained=bool(task.adapter.dense))
        check_cost(self.config.limits, task, self.examples, spec, self.config.flops)
        self._enter(run, "fit", protection_of(task.privacy, task.local, self.examples))
        with time_limit(base.model, self.config.limits.seconds):
            update = self._update(base, task, str(header["client"]), data)
        reply = encode_update(update, task, asked, header["reply"])
        write_bytes(self._last, asked.encode() + reply)
        self._remember(
            "fit",
            run,
            round=task.round,
            protection=_named(task.privacy),
            epsilon=_finite(self.spent(task.privacy)),
            sent=digest(reply),
            bytes=len(reply),
            examples=update.examples,
            loss=update.metrics.get("loss"),
            seconds=round(time.monotonic() - started, 2),
        )
        return reply

    def _measure(self, blob: bytes) -> bytes:
        query, state, header = decode_query(blob)
        run = self._run(header)
        self._check_model(run, header)
        if self.config.guarded:
            raise RefusalError("privacy: no noise covers importance that is measured on a site's own data")
        base, data = self._model(header["model"])
        own, client = self.holdings.own, str(header["client"])
        self._enter(run, "measure", NOTHING)
        with time_limit(base.model, self.config.limits.seconds):
            nothing = dict.fromkeys(state.adapter.layers, 0.0)
            scores = measured(base, query, state, data, own, client) if len(own) else nothing
        reply = encode_scores(scores, len(own), blob)
        left = {"scores": len(scores), "sent": digest(reply), "bytes": len(reply)}
        self._remember("measure", run, round=state.round, protection=_named(Privacy()), epsilon=None, **left)
        return reply

    def cost(self, run: Announcement) -> float | None:
        """Epsilon of all rounds of a run; infinite where nothing is hidden, None where no accountant is installed."""
        protection = protection_of(run.privacy, run.local, self.examples)
        entry = Entry(self.fingerprint, run.id, "fit", protection, run.rounds)
        return self._epsilon([entry], run.privacy)

    def spent(self, privacy: Privacy | None = None) -> float | None:
        """Epsilon of all that was ever answered, as `cost` has it."""
        return self._epsilon(self.ledger.entries(), privacy or Privacy())

    @property
    def _hides_size(self) -> bool:
        """Whether the number of examples is part of what must not show."""
        budget = self.config.budget
        return self.config.floor.on_client is not None or (budget is not None and budget.unit == "clients")

    @property
    def _last(self) -> Path:
        return self.path.with_name("last-update")

    def _given(self, asked: str) -> bytes | None:
        """The answer to the last task, if it was this one."""
        held = self._last.read_bytes() if self._last.is_file() else b""
        return held[len(asked) :] if held.startswith(asked.encode()) else None

    def _run(self, header: dict[str, Any]) -> Announcement:
        """The run that a message is of, as it was announced; the site takes part in it."""
        self._asker = {"run": one_line(str(header.get("run")), 40)}
        run = self.consent.require(header.get("run"))
        self._asker |= {"name": run.name, "by": run.by}
        return run

    def _check_model(self, run: Announcement, header: dict[str, Any]) -> None:
        if not isinstance(header.get("model"), dict) or digest_of(header["model"]) != run.model:
            raise RefusalError("not as the run was announced: model")

    def _check(self, run: Announcement, privacy: Privacy, local: LocalTraining) -> None:
        """Refuses a round that the file does not allow, or that the budget has no room for."""
        config = self.config
        check_protection(config.floor, config.budget, privacy)
        check_limits(config.limits, local, self.examples)
        if config.budget is not None:
            entry = Entry(self.fingerprint, run.id, "fit", protection_of(privacy, local, self.examples))
            check_budget([*self.ledger.entries(), entry], run.id, config.budget)

    def _enter(self, run: Announcement, question: str, protection: Protection) -> None:
        self.ledger.enter(Entry(self.fingerprint, run.id, question, protection), self.config.budget)

    def _update(self, base: Base, task: Task, client: str, data: Split) -> Update:
        own = self.holdings.own
        # What protects real data is drawn from entropy; a rehearsal repeats what is simulated.
        secret = bool(task.privacy) and self.config.rehearse is None
        try:
            return train(base, task, client, data, own, secret=secret)
        except TrainingError:
            if task.privacy.on_client is None:
                raise
            # That training fails tells of the data, and no noise covers that: what is sent is noise on no change.
            return train(base, task, client, data, own[:0], secret=secret)

    def _model(self, asked: Any) -> tuple[Base, Split]:
        """The base model and the data as a server wants them; loaded once."""
        key = json.dumps(asked, sort_keys=True)
        if key not in self._ready:
            self._ready = {key: loaded(self.path, self.config, self.holdings, self.device, asked)}
        return self._ready[key]

    def _epsilon(self, entries: list[Entry], privacy: Privacy) -> float | None:
        """Epsilon of answers, as the budget counts; without one, at the delta of what protects them."""
        budget, kind = self.config.budget, privacy.examples or privacy.clients
        if budget is not None:
            return spent(entries, budget.unit, budget.delta)
        try:
            return spent(entries, "examples", 1e-5 if kind is None else kind.delta)
        except ImportError:
            return None

    def _show(self, known: Known) -> None:
        """Tells the site's log, and its history, of a run that is new."""
        run = known.run
        cost = cost_text(known.epsilon)
        _log.warning(
            "run %s, %s: %s asks for %d rounds of %s (protection: %s; %s): %s (%s)",
            *(run.id, run.name or "without a name", run.by, run.rounds, run.method),
            *(json.dumps(_named(run.privacy)), cost, known.state, known.why),
        )
        about = {"method": run.method, "rounds": run.rounds, "protection": _named(run.privacy)}
        decision = {"state": known.state, "why": known.why}
        self._remember("announcement", run, **about, epsilon=_finite(known.epsilon), **decision)

    def _note(self, question: Kind, **reason: str) -> None:
        """Notes what is not answered; a server that asks the same again and again is noted once."""
        line = {"question": question, **self._asker, **reason}
        if self._refusal != line:
            self.history.append(**line)
            self._refusal = line

    def _remember(self, question: str, run: Announcement, **what: Any) -> None:
        self._refusal = {}
        self.history.append(question=question, run=run.id, name=run.name, by=run.by, **what)


def cost_text(epsilon: float | None) -> str:
    """What answers tell, as people read it."""
    if epsilon is None:
        return "epsilon is not counted here: Opacus is not installed"
    return "nothing bounds what they tell" if math.isinf(epsilon) else f"epsilon {epsilon:.4g}"


def _finite(epsilon: float | None) -> float | None:
    """As JSON has it: nothing where nothing bounds it."""
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def _named(privacy: Privacy) -> dict[str, Any] | str:
    """A protection as people read it."""
    parts: dict[str, Any] = {}
    if privacy.clients is not None:
        parts["clients"] = {"noise": privacy.clients.noise, "where": privacy.clients.where}
    if privacy.examples is not None:
        parts["examples"] = {"noise": privacy.examples.noise}
    return parts or "none"
