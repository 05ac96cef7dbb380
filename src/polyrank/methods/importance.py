"""Which layers matter? Scorers give every layer a non-negative importance.

A layer is an adapted module; allocators that rank transformer blocks add up the modules of each. `fisher` and
`gradient_norm` are measured on real data, through the `measure` that `federate` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge, Lt

from polyrank.core.lowrank import norm, stack
from polyrank.core.method import Measure, Positive, Score
from polyrank.core.types import FisherForm, Labels, MeasuredOn, ModelSpec, Query, ServerState, Target

Round = Annotated[int, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def alike(spec: ModelSpec, state: ServerState, measure: Measure | None = None) -> dict[str, float]:
    """Every layer matters as much as any other."""
    return dict.fromkeys(spec.modules, 1.0)


def weight_norm(spec: ModelSpec, state: ServerState, measure: Measure | None = None) -> dict[str, float]:
    """The size of what each layer has learnt, with no data.

        s_l = || delta_l ||_F,   delta_l = what the fold and the adapter add to the base's weights

    It is 0 everywhere in round 0, which allocators take for all alike.
    """
    parts = [state.folded.layers, state.adapter.layers]
    learnt = {name: [part[name] for part in parts if name in part] for name in spec.modules}
    return {name: norm(stack(xs)) if xs else 0.0 for name, xs in learnt.items()}


def fisher(
    spec: ModelSpec,
    state: ServerState,
    measure: Measure | None = None,
    *,
    every: Positive = 1,
    after: Round = 0,
    smoothing: Fraction = 0.0,
    on: MeasuredOn = "holdout",
    samples: Positive | None = 100,
    labels: Labels = "given",
    form: FisherForm = "trace",
    target: Target = "log_likelihood",
) -> Mapping[str, float]:
    """The Fisher information of each layer's factors, from gradients of single examples.

        F_t = 1/n sum_i g_i^2    elementwise,    g_i = d log p(y_i | x_i) / d t    for t = A_l and B_l

        trace    s_l = sum_t sum(F_t)        the layer's part of the trace of the Fisher information matrix
        squared  s_l = sum_t sum(F_t^2)      fourth powers of gradients, as HRALoRA's released code
        norm     s_l = sum_t ||F_t||_F       as Fed-HeLLo's

    The model runs as the server holds it, at its full rank, without dropout, in float32. Where nobody can answer, the
    scores stay as they are.

    Args:
        spec: the adapted modules.
        state: the server's state.
        measure: computes gradients on real data.
        every: rounds from one measurement to the next; in between, scores are kept.
        after: the round of the first measurement; before it, all layers are alike.
        smoothing: the share of the last scores in the new ones: s <- smoothing * s + (1 - smoothing) * measured.
        on: ``holdout``: training examples that the server keeps for it; ``clients``: those of the round's cohort, each
            on its own data, averaged by size.
        samples: examples, of the hold-out or of each client, drawn anew for every measurement; None: all there are.
        labels: ``given``, or ``sampled`` from the model's prediction: the first is the empirical Fisher information,
            the second an unbiased estimate of the true one.
        form: see above.
        target: ``log_likelihood``, or the raw ``logit`` of the label, whose gradient does not vanish where the model
            is certain.

    References:
        HRALoRA, CCGrid 2026. Zhang et al., Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with
        Heterogeneous LoRA Allocation. arXiv 2506.12213. Kunstner et al., Limitations of the Empirical Fisher
        Approximation. arXiv 1905.12558.

    Note:
        The released code of both differentiates the logit and takes the number of batches for that of samples: 4 of
        100 images in HRALoRA, 1 in Fed-HeLLo. That is ``target="logit"`` with ``form="squared", samples=4``, or
        ``form="norm", samples=1``.
    """
    query = Query("fisher", on, samples, labels, form, target)
    return _measured(query, spec, state, measure, every, after, smoothing)


def gradient_norm(
    spec: ModelSpec,
    state: ServerState,
    measure: Measure | None = None,
    *,
    every: Positive = 1,
    after: Round = 0,
    smoothing: Fraction = 0.0,
    on: MeasuredOn = "holdout",
    samples: Positive | None = 100,
) -> Mapping[str, float]:
    """How steep the loss is in each layer's factors.

        s_l = sqrt( sum_t || 1/n sum_i g_i ||_F^2 ),   g_i = d log p(y_i | x_i) / d t   for t = A_l and B_l

    Unlike `fisher`, gradients of different examples cancel here: a layer scores high if it can still lower the mean
    loss.

    Args:
        spec, state, measure, every, after, smoothing, on, samples: as for `fisher`.
    """
    return _measured(Query("gradient", on, samples), spec, state, measure, every, after, smoothing)


def every(n: int, scorer: Score, *, after: int = 0) -> Score:
    """`scorer` in rounds ``after``, ``after + n``, ``after + 2 n``, ...; its scores are kept in between.

    Before round `after` all layers are alike.

    >>> from polyrank.core.types import ModelSpec, ServerState
    >>> from polyrank.core.lowrank import Adapter
    >>> rarely = every(10, lambda spec, state, measure: {"q": 0.1 * state.round}, after=5)
    >>> spec, state = ModelSpec({"q": (4, 4)}), ServerState(15, Adapter(), scores={"q": 0.5})
    >>> rarely(spec, state, None), rarely(spec, ServerState(16, Adapter(), scores={"q": 1.5}), None)
    ({'q': 1.5}, {'q': 1.5})
    >>> rarely(spec, ServerState(4, Adapter()), None)
    {'q': 1.0}
    """

    def scheduled(spec: ModelSpec, state: ServerState, measure: Measure | None = None) -> Mapping[str, float]:
        if state.round < after:
            return alike(spec, state)
        if state.scores and (state.round - after) % n:
            return state.scores
        return scorer(spec, state, measure)

    return scheduled


def _measured(
    query: Query, spec: ModelSpec, state: ServerState, measure: Measure | None, n: int, after: int, smoothing: float
) -> Mapping[str, float]:
    """What `measure` answers, on the schedule of `every`, mixed with the scores of earlier measurements."""
    if measure is None:
        raise ValueError(f"the method's scorer ({query.kind}, on {query.on}) is measured: give `federate` a `measure`")

    def fresh(spec: ModelSpec, state: ServerState, measure: Measure | None) -> Mapping[str, float]:
        assert measure is not None
        found = measure(query)
        if not found:
            return state.scores or alike(spec, state)
        # Scores from before the first measurement are those of a warm-up: on no scale that could be mixed with.
        mixed = smoothing if state.memory.get("scored", -1) >= after else 0.0
        return {name: mixed * state.scores.get(name, found[name]) + (1 - mixed) * found[name] for name in spec.modules}

    return every(n, fresh, after=after)(spec, state, measure)


SCORERS: dict[str, Score] = {
    "alike": alike,
    "fisher": fisher,
    "gradient_norm": gradient_norm,
    "weight_norm": weight_norm,
}
