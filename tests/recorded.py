"""Folders of runs and studies with plausible records, as the real ones have them; the same ones every time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

GROUPS = (("small", 2, 2.0), ("medium", 6, 4.0), ("large", 16, 8.0))
LEVELS = {"single": 0.94, "local": 0.55, "zero_shot": 0.1, "hralora": 0.87, "hetlora": 0.84, "fedit": 0.79}


def experiment(method: str, regime: str, seed: int, rounds: int, clients: int) -> dict[str, Any]:
    fleet = [
        {"name": name, "share": 1 / 3, "rank": rank, "memory": f"{gib * 2**30} B", "uplink": "7080000.0 bit/s"}
        for name, rank, gib in GROUPS
    ]
    return {
        "seed": seed,
        "regime": regime,
        "rounds": rounds,
        "model": {"name": "digits-vit", "rank": 16},
        "data": {"name": "digits", "clients": clients, "partition": {"name": "dirichlet", "alpha": 0.5}},
        "fleet": fleet,
        "method": {"name": "fedit" if regime != "federated" else method},
        "local": {"epochs": 2, "lr": 0.003},
    }


def modules(layers: int) -> list[str]:
    parts = ("q_proj", "v_proj", "fc1", "fc2")
    return [f"vit.layers.{i // 4}.{parts[i % 4]}" for i in range(layers)]


def write_run(
    folder: Path,
    method: str = "hralora",
    *,
    seed: int = 0,
    rounds: int = 3,
    done: int | None = None,
    clients: int = 6,
    cohort: int | None = None,
    layers: int = 8,
    links: bool = True,
    setting: dict[str, Any] | None = None,
    trouble: bool = True,
) -> Path:
    """A run with everything that a run may have; unfinished after `done` rounds, if given."""
    rng = np.random.default_rng([seed, len(method), clients, layers])
    regime = method if method in ("single", "local", "zero_shot") else "federated"
    rounds = 0 if regime == "zero_shot" else rounds
    people = [f"client_{i:04d}" if clients > 100 else f"client_{i:02d}" for i in range(clients)]
    members = {c: {"group": GROUPS[3 * i // clients][0], "examples": 20 + i} for i, c in enumerate(people)}
    names = modules(layers)
    folder.mkdir(parents=True)
    plain = experiment(method, regime, seed, rounds, clients)
    for key, value in (setting or {}).items():
        section, word = key.split(".")
        plain[section][word] = value
    (folder / "experiment.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    facts = {
        "clients": clients,
        "groups": [
            {
                **{"name": n, "clients": clients // 3, "memory": g * 2**30, "uplink": 7.08e6 * r, "downlink": 5e7},
                **{"flops": None, "budget": r * layers, "rank": r, "limit": "memory"},
            }
            for n, r, g in GROUPS
        ],
        "members": members if clients <= 1000 else None,
        "modules": {name: {"shape": [32, 16], "block": i // 4} for i, name in enumerate(names)},
        "dense": 170,
        "classes": [str(i) for i in range(4)],
        "data": "digits",
    }
    (folder / "setting.json").write_text(json.dumps(facts))
    top = LEVELS.get(method, 0.8) + 0.01 * rng.normal()
    lines, timings = [], []
    for t in range(rounds if done is None else done):
        asked = sorted(rng.choice(people, cohort, replace=False).tolist()) if cohort else people
        ranks = {c: _ranks(rng, c, members, names, method, t) for c in asked}
        accuracy = top * (1 - np.exp(-(t + 1) / max(rounds / 4, 1))) + 0.005 * rng.normal()
        dropped = asked[:1] if trouble and t == 1 else []
        refused = (
            {asked[1]: "its change is 40 times the cohort's median"} if trouble and t == 2 and len(asked) > 1 else {}
        )
        sent = [c for c in asked if c not in dropped]
        own = {c: {"accuracy": float(np.clip(accuracy + 0.08 * rng.normal(), 0, 1)), "loss": 1.0} for c in people[:60]}
        lines.append(
            {
                "round": t,
                "factors": "AB" if t % 2 == 0 else "B",
                "lr": 0.003,
                "ranks": ranks,
                "bytes_down": {c: 4 * 48 * sum(ranks[c].values()) for c in asked},
                "bytes_up": {c: 4 * 48 * sum(ranks[c].values()) for c in sent},
                "losses": {c: float(2.3 * np.exp(-t / 3) + 0.1 * rng.random()) for c in sent},
                "examples": {c: members[c]["examples"] for c in sent},
                "dropped": dropped,
                "refused": refused,
                "seconds": float(1 + rng.random()) if links else None,
                "metrics": {
                    "validation/accuracy": float(accuracy),
                    "validation/loss": float(2 - accuracy),
                    "privacy/clients": float(np.sqrt(t + 1)),
                },
                "predicted_memory": {c: 7.0e7 + 1e5 * sum(ranks[c].values()) for c in asked},
                "aggregation_error": float(0.1 * rng.random()) if regime == "federated" else None,
                "scores": {n: float(rng.random() + i / layers) for i, n in enumerate(names)} if t % 2 == 0 else {},
                "client_metrics": own,
            }
        )
        timings.append(
            {"round": t, "wall_seconds": 0.5, "measured_memory": {c: 7.2e7 for c in asked} if seed == 0 else {}}
        )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    if done is None:
        _finish(folder, method, seed, rounds, top, lines, people)
    return folder


def _ranks(rng: np.random.Generator, client: str, members: Any, names: Sequence[str], method: str, t: int) -> Any:
    rank = dict((n, r) for n, r, _ in GROUPS)[members[client]["group"]]
    if method != "hralora":
        return {name: rank for name in names}
    kept = sorted(rng.choice(len(names), max(1, len(names) // 2), replace=False).tolist())
    return {names[i]: rank for i in kept}


def _finish(folder: Path, method: str, seed: int, rounds: int, top: float, lines: Any, people: Sequence[str]) -> None:
    test = {"accuracy": top, "loss": 2 - top, "macro_f1": top - 0.01, "mcc": top - 0.02}
    own = lines[-1]["client_metrics"] if lines else {c: {"accuracy": top, "loss": 1.0} for c in people[:60]}
    summary = {
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "before": {"test": {"accuracy": 0.1, "loss": 2.3}},
        "final": {"round": rounds - 1, "test": test, "clients": own},
        "selected": {"round": rounds - 1, "test": {**test, "accuracy": top - 0.002}} if rounds else None,
        "bytes_up": sum(sum(line["bytes_up"].values()) for line in lines),
        "bytes_down": sum(sum(line["bytes_down"].values()) for line in lines),
        "wall_seconds": 0.5 * rounds,
        "environment": {"polyrank": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "gpu": None},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    counts = np.full((4, 4), 2) + np.diag([18 + seed, 20, 15, 19])
    (folder / "confusion.json").write_text(
        json.dumps({"classes": [str(i) for i in range(4)], "counts": counts.tolist()})
    )


METHODS = ("single", "hralora", "hetlora", "fedit", "local", "zero_shot")


def write_study(
    folder: Path, methods: Sequence[str] = METHODS, seeds: Sequence[int] = (0, 1), name: str = "digits", **options: Any
) -> Path:
    """A study of finished runs; `options` are `write_run`'s."""
    cells = []
    for method in methods:
        for seed in seeds:
            where = f"runs/{method}/seed-{seed}"
            write_run(folder / where, method, seed=seed, **options)
            cells.append({"run": where, "method": method, "setting": options.get("setting") or {}, "seed": seed})
    (folder / "study.json").write_text(json.dumps({"name": name, "cells": cells}))
    return folder


HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2><a href='javascript:1'>$x$</a>"


def write_hostile(folder: Path, text: str = HOSTILE) -> Path:
    """A study in which all that users name is `text`: the study, methods, settings, clients, classes."""
    study = write_study(folder, ("fedit",), (0, 1), name=text)
    plain = json.loads((study / "study.json").read_text())
    for cell in plain["cells"]:
        cell["method"], cell["setting"] = f"mine {text}", {"x": text}
    (study / "study.json").write_text(json.dumps(plain))
    inside = json.dumps(text)[1:-1]
    for path in (study / "runs").rglob("*.json*"):
        found = path.read_text().replace("client_0", f"{inside}_").replace('["0"', f'["{inside}"')
        path.write_text(found.replace("small", inside).replace("vit.", f"{inside}."))
    return study
