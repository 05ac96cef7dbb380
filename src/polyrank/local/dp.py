"""What Opacus does for us: its accountant, and its optimizer. The only file that knows Opacus; it is an extra."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from polyrank.core.noise import Noise
from polyrank.core.privacy import ExamplePrivacy


class Part(NamedTuple):
    """Equal steps of a Gaussian mechanism.

    Attributes:
        multiplier: the noise's standard deviation over the sensitivity.
        rate: probability that a member is in a step's sample, drawn independently (Poisson); 1: no sampling.
        steps: how many.
    """

    multiplier: float
    rate: float
    steps: int


_HIGH_ORDERS = (64, 80, 96, 128, 192, 256, 384, 512)  # beyond Opacus' own, for much noise


def epsilon(parts: Iterable[Part], delta: float) -> float:
    """Epsilon at `delta` of mechanisms one after another, by Opacus' Renyi accountant; 0 where there are none.

    References:
        Mironov et al., Renyi Differential Privacy of the Sampled Gaussian Mechanism. arXiv 1908.10530.
    """
    terms = [part.steps * _divergences(part.multiplier, part.rate) for part in parts if part.steps]
    if not terms:
        return 0.0
    analysis = require_opacus().accountants.analysis.rdp
    with warnings.catch_warnings():
        # Says that more orders could give less; what these give holds.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return float(analysis.get_privacy_spent(orders=_orders(), rdp=sum(terms), delta=delta)[0])


def _orders() -> list[float]:
    return [*require_opacus().accountants.RDPAccountant.DEFAULT_ALPHAS, *_HIGH_ORDERS]


@lru_cache(maxsize=4096)
def _divergences(multiplier: float, rate: float) -> np.ndarray:
    """Renyi divergences of one step, by order: they add up over steps."""
    analysis = require_opacus().accountants.analysis.rdp
    found = np.asarray(analysis.compute_rdp(q=rate, noise_multiplier=multiplier, steps=1, orders=_orders()))
    return np.maximum(found, 0.0)  # which rounding may miss, where there is much noise


def private_optimizer(
    optimizer: torch.optim.Optimizer, settings: ExamplePrivacy, expected: float, noise: Noise
) -> Any:  # Opacus' DPOptimizer, which has no types
    """Opacus' optimizer around ours: it clips every ``grad_sample``, sums, adds noise, and divides by `expected`.

        g = (sum_i g_i min(1, C / ||g_i||) + z C N(0, I)) / expected

    Args:
        optimizer: of the parameters.
        settings: C and z.
        expected: examples of a step, in the mean over samples.
        noise: draws, in place of torch's generators.
    """

    class Private(require_opacus().optimizers.DPOptimizer):  # type: ignore[misc,name-defined]
        def add_noise(self) -> None:
            for p in self.params:
                loud = self.noise_multiplier * self.max_grad_norm * noise(p.shape)
                p.grad = p.summed_grad.view_as(p) + loud.to(p.device, p.dtype)

    return Private(
        optimizer, noise_multiplier=settings.noise, max_grad_norm=settings.clip, expected_batch_size=expected
    )


def require_opacus() -> Any:
    """Opacus.

    Raises:
        ImportError: naming the extra to install, if it is missing.
    """
    try:
        import opacus.accountants.analysis.rdp
        import opacus.optimizers
    except ImportError:
        raise ImportError("privacy: needs Opacus: pip install opacus (the extra 'privacy')") from None
    return opacus
