"""What a site agrees to, attacked as its security office would: by servers that ask whatever they like."""

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from asking import DIGITS, Asker
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.types import LocalTraining, ServerState, TailPenalty
from polyrank.deploy.ledger import Entry, PrivacyLedger, Protection, protection_of, spent
from polyrank.deploy.site import Site
from polyrank.engines.letters import decode_scores, refusal_of
from polyrank.engines.post import Kind
from polyrank.engines.wire import digest, opened
from polyrank.errors import InputError, TrainingError
from polyrank.local.dp import Part

EXAMPLES = 6
NOISY = Privacy(examples=ExamplePrivacy(clip=1.0, noise=2.0))
FLOOR = {"examples": {"clip": 1.0, "noise": 2.0}}


def write(folder: Path, **config: Any) -> Path:
    """The file of a site with six images, one of each of six digits."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (EXAMPLES, 8, 8), np.uint8), np.arange(EXAMPLES).astype(str)
    np.savez(folder / "own.npz", image=pixels, label=labels)
    data = {"name": "files", "train": "own.npz", "test": "own.npz", "image": "image"}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"model": "digits-vit", "data": data, "threads": 1, **config}))
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Rank 1 on every layer, and a head."""
    base, _ = Site(write(tmp_path_factory.mktemp("any")))._model(DIGITS)
    rng = torch.Generator().manual_seed(0)
    layers = {
        name: LowRank(torch.randn(1, d_in, generator=rng), torch.randn(d_out, 1, generator=rng) / 10, 1.0)
        for name, (d_out, d_in) in base.spec.modules.items()
    }
    return Adapter(layers, base.initial_head())


def refused(site: Site, kind: Any, blob: bytes) -> str:
    """Why a site declines."""
    reason = refusal_of(site.answer(kind, blob), digest(blob))
    assert reason is not None
    return reason


def joined(site: Site, asker: Asker) -> Asker:
    """A run that a site takes part in."""
    blob = asker.hello()
    assert refusal_of(site.answer("profile", blob), digest(blob)) is None
    return asker


def test_labels_are_not_read_off_gradients(tmp_path: Path, adapter: Adapter) -> None:
    """With a head that is sure of one class, the gradient of an example vanishes exactly where that is its label."""
    bias = next(name for name in adapter.dense if name.endswith("bias"))

    def labels(site: Site, asker: Asker) -> list[int]:
        found = []
        for seed in range(3):
            norms = []
            for digit in range(10):
                sure = 1e3 * torch.nn.functional.one_hot(torch.tensor(digit), 10).float()
                state = ServerState(0, Adapter(adapter.layers, {**adapter.dense, bias: sure}))
                blob = asker.question(state, samples=1, seed=seed)
                answer = site.answer("measure", blob)
                if refusal_of(answer, digest(blob)) is None:
                    norms.append(sum(decode_scores(answer, blob, adapter, "a")[0].values()))
            found += [int(np.argmin(norms))] if norms else []
        return found

    open_site = Site(write(tmp_path / "open"))
    assert set(labels(open_site, joined(open_site, Asker()))) <= set(range(EXAMPLES))  # the attack works
    for number, file in enumerate(({"privacy": FLOOR}, {"budget": {"epsilon": 8}})):
        site = Site(write(tmp_path / str(number), **file))
        assert labels(site, joined(site, Asker(privacy=NOISY))) == []
        assert not PrivacyLedger(tmp_path / str(number) / "ledger.json").entries()


@pytest.mark.parametrize("state", ["paused", "denied", "waiting"])
def test_every_question_passes_the_same_gate(tmp_path: Path, adapter: Adapter, state: str) -> None:
    site, asker = Site(write(tmp_path, approve="ask")), Asker()
    questions = {
        "profile": asker.hello(),
        "fit": asker.task(adapter),
        "measure": asker.question(ServerState(0, adapter), samples=1),
    }
    assert set(questions) == set(get_args(Kind))
    refused(site, "profile", asker.hello())
    if state == "paused":
        site.consent.decide(asker.run.id, "approved", "")
        site.consent.pause("a holiday")
    elif state == "denied":
        site.consent.decide(asker.run.id, "denied", "no")
    words = {"paused": "a holiday", "denied": "denied", "waiting": "not approved"}[state]
    for kind, blob in questions.items():
        assert words in refused(site, kind, blob)
        assert list(site.history.lines())[-1]["run"] == asker.run.id
    assert not site.ledger.entries()
    assert not site._ready  # nobody has had a model loaded


def test_what_is_answered_without_protection_is_counted(tmp_path: Path, adapter: Adapter) -> None:
    path = write(tmp_path)
    site, asker = Site(path), Asker()
    joined(site, asker)
    site.answer("measure", asker.question(ServerState(0, adapter), samples=1))
    site.answer("fit", asker.task(adapter))
    lines = list(site.history.lines())
    assert [line["question"] for line in lines] == ["announcement", "profile", "measure", "fit"]
    assert {(line["run"], line["by"]) for line in lines} == {(asker.run.id, "eve@server")}
    assert [line["protection"] for line in lines[2:]] == ["none", "none"]
    write(tmp_path, budget={"epsilon": 8})  # too late for these data: everything is told
    reason = refused(Site(path), "profile", Asker(privacy=NOISY, mark="another").hello())
    assert reason == "budget.epsilon: this site allows an epsilon of 8 in all, and this answer would make it inf"


@pytest.mark.parametrize(
    ("local", "noise", "reason"),
    [
        (LocalTraining(steps=100_000), 2.0, "budget.epsilon"),
        (LocalTraining(epochs=5_000, batch=1), 2.0, "limits.epochs: this site allows 1000 in a task"),
        (LocalTraining(steps=1_000_000), 2.0, "limits.steps: this site allows 100000 in a task"),
        (LocalTraining(steps=1, batch=2**31 - 1), 0.1, "budget.epsilon: this site allows an epsilon of 8 in all"),
        (LocalTraining(steps=1), 1e-12, "budget.epsilon"),
        (LocalTraining(steps=1), 1e-320, "budget.epsilon"),
    ],
)
def test_noise_alone_is_no_epsilon(
    tmp_path: Path, adapter: Adapter, local: LocalTraining, noise: float, reason: str
) -> None:
    path = write(tmp_path, budget={"epsilon": 8}, limits={"epochs": 200_000} if local.steps == 100_000 else {})
    asker, site = Asker(local=local, privacy=Privacy(examples=ExamplePrivacy(1.0, noise))), Site(path)
    assert reason in refused(site, "profile", asker.hello())
    assert reason in refused(site, "fit", asker.task(adapter))
    assert not site.ledger.entries()
    assert "last-update" not in {file.name for file in tmp_path.iterdir()}


def test_a_task_is_held_against_what_was_announced(tmp_path: Path, adapter: Adapter) -> None:
    site, asker = Site(write(tmp_path)), Asker(privacy=NOISY, rounds=2)
    assert "has not been announced" in refused(site, "fit", asker.task(adapter))
    joined(site, asker)
    assert "not as the run was announced: round 2, of 2 announced" in refused(site, "fit", asker.task(adapter, 2))
    for changes, what in (
        ({"privacy": Privacy()}, "privacy"),
        ({"privacy": Privacy(examples=ExamplePrivacy(1.0, 1.0))}, "privacy"),
        ({"local": LocalTraining(steps=2)}, "local.steps"),
        ({"local": LocalTraining(steps=1, batch=33)}, "local.batch"),
        ({"model": {**DIGITS, "classes": ["0"]}}, "model"),
    ):
        assert f"not as the run was announced: {what}" in refused(site, "fit", asker.task(adapter, **changes))
    assert "no noise covers the ranks" in refused(site, "fit", asker.task(adapter, penalty=TailPenalty()))
    assert "has not been announced" in refused(site, "fit", asker.task(adapter, run="another"))
    assert not site.ledger.entries()


def test_failures_tell_a_server_nothing(tmp_path: Path, adapter: Adapter) -> None:
    """Which classes a site has is learnt by leaving one out; that a weight overflows, by an example that makes it."""
    site = Site(write(tmp_path / "a", privacy=FLOOR))
    probe = Asker({**DIGITS, "classes": ["0", "1", "2", "4", "5", "6"]}, privacy=NOISY)
    assert refused(site, "profile", probe.hello()) == "this site cannot answer; its history.jsonl says why"
    assert "classes 3 are none of the server's" in list(site.history.lines())[-1]["failed"]

    # A head whose logits overflow: every loss is NaN, and so is what is trained on it.
    weight = next(name for name in adapter.dense if name.endswith("weight"))
    huge = Adapter(adapter.layers, {**adapter.dense, weight: 3e38 * adapter.dense[weight].sign()})
    honest = Site(write(tmp_path / "c"))
    with pytest.raises(TrainingError, match="loss is nan"):
        honest.answer("fit", joined(honest, Asker()).task(huge))
    asker = joined(site, Asker(privacy=NOISY))
    assert _kind(site.answer("fit", asker.task(huge))) == "update"
    own = Privacy(ClientPrivacy(clip=1.0, noise=4.0, where="client"))
    other = Site(write(tmp_path / "b", privacy={"clients": {"clip": 1.0, "noise": 4.0, "where": "client"}}))
    asker = joined(other, Asker(privacy=own))
    assert _kind(other.answer("fit", asker.task(huge))) == "update"


def _kind(blob: bytes) -> str:
    for kind in ("update", "refusal"):
        try:
            opened(blob, kind)
            return kind
        except ValueError:
            continue
    raise AssertionError


def test_a_site_that_hides_all_of_its_data_hides_its_size(tmp_path: Path) -> None:
    own = Privacy(ClientPrivacy(clip=1.0, noise=8.0, where="client"))
    for name, file in (("a", {"budget": {"epsilon": 8, "unit": "clients"}}), ("b", {"budget": {"epsilon": 8}})):
        blob = Asker(privacy=own).hello()
        header, _ = opened(Site(write(tmp_path / name, **file)).answer("profile", blob), "profile")
        assert header["profile"]["examples"] == (1 if name == "a" else EXAMPLES)


def test_a_budget_needs_what_it_counts(tmp_path: Path) -> None:
    site = Site(write(tmp_path, budget={"epsilon": 8}))
    for privacy in (Privacy(), Privacy(ClientPrivacy(1.0, 9.0))):
        assert "budget: this site counts what its answers tell" in refused(
            site, "profile", Asker(privacy=privacy).hello()
        )
    clients = Site(write(tmp_path / "b", budget={"epsilon": 8, "unit": "clients"}))
    assert "privacy.clients with where: client" in refused(clients, "profile", Asker(privacy=NOISY).hello())


@lru_cache
def divergence(noise: float, rate: float, order: float) -> float:
    """The Renyi divergence of the sampled Gaussian mechanism, integrated (Mironov et al. 2019, arXiv:1908.10530).

    1 / (order - 1) log E_z [((1 - q) + q exp((2 z - 1) / (2 s^2)))^order],   z ~ N(0, s^2)
    """
    z = np.linspace(-40 * noise, 40 * noise + 2 * order, 20_001)
    density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(np.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
    values = density + order * ratio
    return float(values.max() + math.log(np.trapezoid(np.exp(values - values.max()), z))) / (order - 1)


def independent(parts: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of mechanisms (noise, rate, steps), composed by the formulas alone: none of polyrank's, nor of Opacus'.

    rdp(a) + log((a - 1) / a) - (log delta + log a) / (a - 1), the least over orders a (Canonne et al. 2020)
    """
    orders = np.concatenate([np.linspace(1.5, 8, 53), np.arange(9, 33)])
    total = np.array([sum(n * divergence(s, q, a) for s, q, n in parts) for a in orders.tolist()])
    return float((total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)).min())


def test_the_independent_accountant_knows_the_gaussian_mechanism() -> None:
    assert divergence(2.0, 1.0, 5.0) == pytest.approx(5 / 8, rel=1e-9)
    # (1 - q)^2 + 2 q (1 - q) + q^2 exp(1 / s^2), of order 2
    assert divergence(1.0, 0.5, 2.0) == pytest.approx(math.log(0.75 + 0.25 * math.e), rel=1e-9)


@pytest.mark.parametrize("noise", [1e20, 1e308])
def test_no_answer_gives_anything_back(noise: float) -> None:
    """What an accountant computes of much noise is rounding, which summed over many steps may be less than nothing."""
    before = Entry("data", "run", "fit", Protection(Part(2.0, 1.0, 1)))
    local = LocalTraining(steps=1_000_000, batch=EXAMPLES // 2)
    after = Entry(
        "data", "run", "fit", protection_of(Privacy(examples=ExamplePrivacy(1.0, noise)), local, EXAMPLES), 2**40
    )
    assert 0 < spent([before], "examples", 1e-5) <= spent([before, after], "examples", 1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_budget_is_never_exceeded(tmp_path: Path, adapter: Adapter, seed: int) -> None:
    """Twenty tasks of honest and hostile servers, with restarts between; what came out is added up from outside."""
    rng, path, delta = np.random.default_rng(seed), write(tmp_path, budget={"epsilon": 8, "run": 5}), 1e-5
    released: list[tuple[str, float, float, int]] = []
    refusals, askers, site = 0, [], Site(path)
    for number in range(20):
        if rng.random() < 0.3:
            site = Site(path)
        if not askers or rng.random() < 0.5:
            local = LocalTraining(
                steps=None if rng.random() < 0.3 else int(rng.choice([1, 2, 5, 200_000])),
                batch=int(rng.choice([1, 2, 3, 6, 1000])),
                optimizer="sgd",
            )
            noise = float(rng.choice([1e-3, 1.5, 2.0, 3.0, 4.0]))
            privacy = Privacy() if rng.random() < 0.1 else Privacy(examples=ExamplePrivacy(1.0, noise, delta))
            askers.append(Asker(local=local, privacy=privacy, mark=f"{number}"))
            site.answer("profile", askers[-1].hello())
        asker = askers[int(rng.integers(len(askers)))]
        blob = asker.task(adapter, number)
        if rng.random() < 0.2:
            blob = asker.task(adapter, number, local=LocalTraining(steps=50, batch=6))
        answer = site.answer("fit", blob)
        if refusal_of(answer, digest(blob)) is not None:
            refusals += 1
            continue
        assert asker.privacy.examples is not None
        rate = min(1.0, asker.local.batch / EXAMPLES)
        steps = asker.local.steps or math.ceil(1 / rate)
        released.append((asker.run.id, asker.privacy.examples.noise, rate, steps))
    assert len(released) > 3
    assert refusals > 3
    total = independent([part for _, *part in released], delta)  # type: ignore[misc]
    assert 4 < total <= 8
    for run in {run for run, *_ in released}:
        assert independent([part for id_, *part in released if id_ == run], delta) <= 5  # type: ignore[misc]
    assert Site(path).spent() == pytest.approx(total, rel=0.03)


def test_who_is_killed_before_training_has_paid_for_it(
    tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asker = write(tmp_path, budget={"epsilon": 8}), Asker(privacy=NOISY)
    site = Site(path)
    joined(site, asker)
    if not (process := os.fork()):
        monkeypatch.setattr("polyrank.deploy.site.train", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        site.answer("fit", asker.task(adapter))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    site = Site(path)
    (entry,) = site.ledger.entries()
    assert (entry.run, entry.answers, entry.protection.examples) == (asker.run.id, 1, (2.0, 1.0, 1))
    before = site.spent()
    site.answer("fit", asker.task(adapter))
    after = site.spent()
    assert before is not None
    assert after is not None
    assert 0 < before < after
    assert site.ledger.entries()[0].answers == 2


@pytest.mark.parametrize("damage", ["torn", "empty", "line", "edited", "infinite"])
def test_a_ledger_that_is_not_whole_lets_nothing_out(tmp_path: Path, adapter: Adapter, damage: str) -> None:
    path = write(tmp_path, budget={"epsilon": 8})
    site, asker = Site(path), Asker(privacy=NOISY)
    joined(site, asker)
    site.answer("fit", asker.task(adapter))
    file = tmp_path / "ledger.json"
    text = file.read_text()
    torn = {
        "torn": text[: len(text) // 2],
        "empty": "",
        "line": text + '{"entries": [',
        "edited": text.replace('"answers": 1', '"answers": -1'),
        "infinite": text.replace("2.0", "Infinity"),
    }[damage]
    assert torn != text
    file.write_text(torn)
    assert "cannot answer" in refused(Site(path), "fit", asker.task(adapter, 1))
    assert "ledger.json: not as it was written" in list(site.history.lines())[-1]["failed"]
    with pytest.raises(InputError, match=r"ledger\.json: not as it was written"):
        site.spent()
    file.write_text(text)
    assert _kind(site.answer("fit", asker.task(adapter, 1))) == "update"


def test_a_ledger_outlives_runs_and_data_and_can_be_shared(tmp_path: Path, adapter: Adapter) -> None:
    """Another run, another spelling of the data, or another site's file: the same people, and one budget."""
    budget = {"epsilon": 3, "ledger": "../ledger.json"}
    asker = Asker(privacy=NOISY)
    one = Site(write(tmp_path / "one", budget=budget))
    joined(one, asker)
    one.answer("fit", asker.task(adapter))
    path = write(tmp_path / "two", budget=budget)
    np.savez(tmp_path / "two" / "own.npz", image=np.zeros((6, 8, 8), np.uint8), label=np.arange(6).astype(str))
    two = Site(path)
    assert two.fingerprint != one.fingerprint
    another = Asker(privacy=NOISY, mark="another")
    assert "budget.epsilon: this site allows an epsilon of 3 in all" in refused(two, "profile", another.hello())
    fresh = Site(write(tmp_path / "three", budget={**budget, "ledger": "ledger.json"}))
    joined(fresh, another)


def test_answers_at_once_are_all_counted(tmp_path: Path) -> None:
    def enter(run: str) -> None:
        for _ in range(20):
            entry = Entry("data", run, "fit", Protection(Part(2.0, 1.0, 1)))
            PrivacyLedger(tmp_path / "ledger.json").enter(entry, None)

    threads = [threading.Thread(target=enter, args=(run,)) for run in ("a", "b")]  # whose locks are files' own
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = PrivacyLedger(tmp_path / "ledger.json").entries()
    assert sorted((entry.run, entry.answers) for entry in entries) == [("a", 20), ("b", 20)]


def test_a_task_is_ended_at_its_time(tmp_path: Path, adapter: Adapter) -> None:
    site = Site(write(tmp_path, limits={"seconds": 0.3, "epochs": 1e6}))
    asker = joined(site, Asker(local=LocalTraining(steps=90_000)))
    started = time.monotonic()
    assert refused(site, "fit", asker.task(adapter)).startswith("limits.seconds: ended after 0.3 s")
    assert time.monotonic() - started < 30
    assert len(site.ledger.entries()) == 1  # what was begun is paid for
    slow = Site(write(tmp_path / "slow", flops="1 FLOP/s"))
    asker = joined(slow, Asker())
    assert "limits.seconds: this site allows 8.64e+04 s in a task, and this one takes" in refused(
        slow, "fit", asker.task(adapter)
    )
    assert not slow.ledger.entries()


def test_memory_is_predicted_before_training(tmp_path: Path, adapter: Adapter) -> None:
    site = Site(write(tmp_path, limits={"memory": "100 MiB"}))
    few, many = joined(site, Asker()), joined(site, Asker(local=LocalTraining(steps=1, batch=2**31 - 1)))
    assert _kind(site.answer("fit", few.task(adapter))) == "update"
    assert _kind(site.answer("fit", many.task(adapter))) == "update"  # a site's examples are its largest batch
    tight = Site(write(tmp_path / "tight", limits={"memory": "1 MiB"}))
    joined(tight, few)
    assert "limits.memory: this site allows 1 MiB in a task, and this one takes" in refused(
        tight, "fit", few.task(adapter)
    )


def test_a_site_takes_part_where_its_operator_agrees(tmp_path: Path, adapter: Adapter) -> None:
    path, asker = write(tmp_path, approve="ask", budget={"epsilon": 8}), Asker(privacy=NOISY, rounds=3)
    site = Site(path)
    assert "has not approved the run yet" in refused(site, "profile", asker.hello())
    assert "has not approved the run yet" in refused(site, "fit", asker.task(adapter))
    ((id_, known),) = site.consent.known().items()
    assert (id_, known.state, known.run) == (asker.run.id, "waiting", asker.run)
    assert known.epsilon == pytest.approx(independent([(2.0, 1.0, 3)], 1e-5), rel=0.01)
    site.consent.decide(id_[:4], "approved", "the board agreed")
    assert _kind(Site(path).answer("fit", asker.task(adapter))) == "update"
    site.consent.pause("we move")
    assert refused(site, "fit", asker.task(adapter)) == "this site is paused: we move"  # nor is an old answer given
    site.consent.resume()
    site.consent.decide(id_, "denied", "the board has thought again")
    assert refused(site, "fit", asker.task(adapter, 1)) == (
        "this site's operator has denied the run: the board has thought again"
    )
    with pytest.raises(InputError, match="run 'zz': 0 runs begin so"):
        site.consent.decide("zz", "approved", "")
    other = Asker(privacy=NOISY, rounds=4)  # says another thing of itself, so it is another run
    assert "has not approved" in refused(site, "profile", other.hello())
    assert [line.get("refused", line.get("state")) is not None for line in site.history.lines()].count(True) >= 4


def test_a_policy_approves_what_it_names(tmp_path: Path) -> None:
    policy = {"methods": ["fedit"], "rounds": 5, "epsilon": 6, "bytes": "2 kB", "by": ["eve@server"]}
    site = Site(write(tmp_path, approve="policy", policy=policy, budget={"epsilon": 8}))
    joined(site, Asker(privacy=NOISY, rounds=2))
    for about, reason in (
        ({"rounds": 6}, "policy.rounds: 6 is more than 5; policy.epsilon: 6.68 is more than 6"),
        ({"rounds": 2, "method": "flora"}, "policy.methods: flora is none of fedit"),
        ({"rounds": 2, "nbytes": 3000}, "policy.bytes: 3000 is more than 2000"),
        ({"rounds": 2, "by": "mallory"}, "policy.by: mallory is none of eve@server"),
    ):
        assert reason.split(":")[0] in refused(site, "profile", Asker(privacy=NOISY, **about).hello())
    waiting = [known.why for known in site.consent.known().values() if known.state == "waiting"]
    assert len(waiting) == 4
    assert waiting[1] == "policy.methods: flora is none of fedit"


def test_hellos_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyrank.deploy.consent._MOST", 5)
    site = Site(write(tmp_path, approve="ask"))
    site.answer("profile", Asker(mark="kept").hello())
    (id_,) = site.consent.known()
    site.consent.decide(id_, "approved", "")
    for number in range(9):
        site.answer("profile", Asker(mark=str(number)).hello())
    assert len(site.consent.known()) == 5
    assert site.consent.known()[id_].state == "approved"
    for _ in range(3):
        site.answer("profile", Asker(mark="8").hello())
    assert len(list(site.history.lines())) <= 2 * 11


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"name": "\x1b]0;pwned\x07"}, "run: name: "),
        ({"method": "a\nb"}, "run: method: "),
        ({"by": "x" * 201}, "is not a line of up to 200 signs"),
        ({"rounds": 0}, "run: rounds: 0 is not a whole number from 1"),
        ({"rounds": 1.5}, "run: rounds: 1.5 is not a whole number"),
        ({"nbytes": -1}, "run: nbytes: -1"),
        ({"mark": 7}, "run: mark: 7"),
    ],
)
def test_an_announcement_is_checked(tmp_path: Path, about: dict[str, Any], reason: str) -> None:
    site = Site(write(tmp_path))
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        site.answer("profile", Asker(**about).hello())
    assert not site.consent.known()
