"""A client's own file, and the process that keeps its model loaded."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from asking import DIGITS, Asker
from polyrank.core.privacy import ClientPrivacy, Privacy
from polyrank.data import files
from polyrank.deploy.holdings import renumbered
from polyrank.deploy.keeper import SiteError, ask, socket_of
from polyrank.deploy.policy import RefusalError, check_protection
from polyrank.deploy.site import Site
from polyrank.deploy.site_file import read_site
from polyrank.engines.letters import decode_profile
from polyrank.engines.wire import WireError, frame
from polyrank.errors import InputError
from polyrank.experiment.config import ConfigError


def write(folder: Path, **config: Any) -> Path:
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"model": "digits-vit", **config}))
    return path


def test_a_site_holds_all_of_its_own_training_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8), np.uint8)
    labels = np.array(["cat", "dog", "cat"] * 4)
    np.savez(tmp_path / "own.npz", image=pixels, label=labels)
    data = {"name": "files", "train": "own.npz", "test": "own.npz", "image": "image"}
    site = Site(write(tmp_path, data=data, rank=3, memory="2 GiB", threads=1))
    asked = Asker({**DIGITS, "classes": ["bird", "dog", "cat"]}).hello()
    reply = site.answer("profile", asked)
    base, _ = site._model(json.loads(json.dumps({**DIGITS, "classes": ["bird", "dog", "cat"]})))
    profile = decode_profile(reply, asked, base.fingerprint())
    assert (profile.examples, profile.rank, profile.memory) == (12, 3, 2 * 2**30)
    _, split = site._model({**DIGITS, "classes": ["bird", "dog", "cat"]})
    assert split.labels.tolist() == [2, 1, 2] * 4
    with pytest.raises(InputError, match=r"site\.yaml: data: classes cat are none of the server's: bird, dog"):
        site.answer("profile", Asker({**DIGITS, "classes": ["bird", "dog"]}).hello())
    with pytest.raises(InputError, match="holds image data, and the server trains on text"):
        site.answer("profile", Asker({**DIGITS, "kind": "text"}).hello())
    with pytest.raises(WireError, match="description of the model"):
        site.answer("profile", Asker({"targets": "attention"}).hello())
    with pytest.raises(WireError, match="description of the model"):
        site.answer("profile", Asker({**DIGITS, "name": "/etc"}).hello())
    with pytest.raises(WireError):
        site.answer("fit", frame({"kind": "task"}))


def test_a_task_that_comes_again_is_answered_as_before(tmp_path: Path, random_adapter: Any) -> None:
    path = write(tmp_path, data="digits", threads=1)
    site = Site(path)
    base, _ = site._model(DIGITS)
    adapter = random_adapter(base.spec, (2,), head=base.initial_head())
    asker = Asker()
    site.answer("profile", asker.hello())

    def answers() -> list[str]:
        return [line["question"] for line in site.history.lines() if line["question"] == "fit"]

    first = site.answer("fit", asker.task(adapter))
    assert Site(path).answer("fit", asker.task(adapter)) == first
    assert len(answers()) == 1
    assert site.answer("fit", asker.task(adapter, 1)) != first
    assert len(answers()) == 2


def test_a_site_refuses_less_protection_than_it_agrees_to() -> None:
    agreed = Privacy(ClientPrivacy(clip=1.0, noise=1.0, where="client"))
    check_protection(agreed, None, Privacy(ClientPrivacy(clip=9.0, noise=1.5, where="client")))
    check_protection(Privacy(), None, Privacy())
    for found in (Privacy(), Privacy(ClientPrivacy(1.0, 0.5, "client")), Privacy(ClientPrivacy(1.0, 2.0, "central"))):
        with pytest.raises(RefusalError, match=r"privacy\.clients: this site agrees to noise 1, client or more"):
            check_protection(agreed, None, found)


def test_classes_are_known_by_name() -> None:
    labels = np.array([0, 2, 2])
    assert renumbered(labels, ("a", "unused", "b"), ["b", "a"], Path("x")).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("labels", "numbers"), [([3, 1], [2, 0]), ([1, 3, 2], [0, 2, 1]), ([3, 3], [2, 2]), (["2", "3"], [1, 2])]
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_of_a_site_that_lacks_a_class_are_numbered_as_the_servers_are(
    tmp_path: Path, suffix: str, labels: list[Any], numbers: list[int]
) -> None:
    def table(name: str, labels: list[Any]) -> Path:
        path = tmp_path / f"{name}.{suffix}"
        made = pa.table({"text": ["x"] * len(labels), "label": labels})
        (pq.write_table if suffix == "parquet" else pa.csv.write_csv)(made, path)
        return path

    whole = table("whole", [1, 2, 3])
    server = files(train=whole, test=whole, text="text").classes
    table("own", labels)
    data = {"name": "files", "train": f"own.{suffix}", "test": f"own.{suffix}", "text": "text"}
    path = write(tmp_path, data=data)
    own = Site(path).holdings
    assert renumbered(own.source.labels, own.classes, list(server), path).tolist() == numbers
    shifted = f"classes {', '.join(own.classes)} are none of the server's: no, yes"
    with pytest.raises(InputError, match=shifted):
        renumbered(own.source.labels, own.classes, ["no", "yes"], path)


def test_a_sites_file_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    path = write(tmp_path, data="digits")
    text = path.read_text() + "# é\n"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read_site(path).model == "digits-vit"
    for encoding, said in (("latin-1", "line 3 is not UTF-8"), ("utf-16", "its bytes look like UTF-16")):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match=rf"site\.yaml: not YAML: {said}.*; save the file as UTF-8"):
            read_site(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "exactly one of data and rehearse"),
        ({"data": {"name": "digits"}, "rehearse": {"experiment": "x", "client": "y"}}, "exactly one"),
        ({"data": "digits", "memory": "2"}, r"memory: '2' Value error|memory: '2' is not a quantity"),
        ({"data": "digits", "rnk": 2}, "unknown key 'rnk'. Did you mean 'rank'"),
        ({"data": {"name": "digts"}}, "Did you mean 'digits'"),
        ({"rehearse": {"experiment": "x.yaml", "client": "y"}}, r"rehearse.experiment: .*/x.yaml: no such file"),
        ({"data": {"name": "files", "train": "a.csv", "test": "b.csv"}}, r"data.train: .*/a.csv: no such file"),
        (
            {"data": {"name": "files", "test": "b.csv", "validation": "b.csv"}},
            r"data.train: missing: a site trains on it",
        ),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    path = write(tmp_path, **config)
    with pytest.raises(ConfigError, match=said) as caught:
        read_site(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_an_unknown_client(tmp_path: Path, digits_file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_site(tmp_path / "none.yaml")
    path = write(tmp_path, rehearse={"experiment": str(digits_file), "client": "nobody"})
    with pytest.raises(ConfigError, match="'nobody' is none of client_0, client_1"):
        Site(path)


def test_a_keeper_answers_as_the_site_does_and_outlives_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path, data="digits", threads=1)
    asked = Asker().hello()
    command = [sys.executable, "-m", "polyrank.cli", "deploy", "keep", str(path)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as keeper:
        try:
            ends = time.monotonic() + 120
            while not socket_of(path).exists():
                assert keeper.poll() is None
                assert time.monotonic() < ends
                time.sleep(0.05)
            assert stat.S_IMODE(socket_of(path).stat().st_mode) == 0o600
            kept = ask(path, "profile", asked)
            with pytest.raises(SiteError, match="WireError: is no hello"):
                ask(path, "profile", frame({"kind": "task"}))
            assert ask(path, "profile", asked) == kept
        finally:
            keeper.send_signal(signal.SIGTERM)
            keeper.wait(20)
    assert not socket_of(path).exists()
    assert ask(path, "profile", asked) == kept  # without a keeper
