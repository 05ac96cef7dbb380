"""TensorBoard's event files. The only file that knows TensorBoard, which is an extra."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from polyrank.experiment.loggers.logger import Open, Sitting, last_step, results


def tensorboard() -> Open:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir``."""
    _library()
    return _Events


class _Events:
    """They are written anew from the records when a run goes on.

    So no step is missing, and none is there twice, whenever the run was killed and whatever reads them. `purge_step`
    tells a TensorBoard that has the old ones open to forget them.
    """

    first = 0

    def __init__(self, sitting: Sitting) -> None:
        folder = sitting.folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.seconds, self.opened = sitting.seconds, time.time()
        self.writer = _library()(str(folder), purge_step=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """On disk when it returns."""
        # Rounds of earlier sittings as if the run had not been interrupted.
        self._write(step, values, self.opened - sum(self.seconds[step + 1 :]) if step < len(self.seconds) else None)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._write(last_step(summary), results(summary))
        self.writer.close()

    def _write(self, step: int, values: Mapping[str, float], when: float | None = None) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=when)
        self.writer.flush()


def _library() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("log: tensorboard: needs TensorBoard: pip install tensorboard (the extra 'report')") from None
    return SummaryWriter
