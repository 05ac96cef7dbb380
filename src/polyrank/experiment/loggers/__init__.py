"""Where a run's figures go besides its own files, by name: an experiment's ``log`` is a list of these.

An entry is called with its options, which are its keyword-only parameters; it looks whether what it needs is installed
and returns a function that opens a run's log (`polyrank.experiment.loggers.logger`). So what is missing is found before
anything is trained. Another package adds an entry through the entry-point group ``polyrank.loggers``.
"""

from polyrank.experiment.loggers.mlflow import mlflow
from polyrank.experiment.loggers.tensorboard import tensorboard
from polyrank.experiment.loggers.wandb import wandb

LOGGERS = {"mlflow": mlflow, "tensorboard": tensorboard, "wandb": wandb}
"""Loggers by name."""
