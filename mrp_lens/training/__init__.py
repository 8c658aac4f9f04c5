"""The one training loop, its callbacks, optimizers, losses, checkpoints and loggers."""

from mrp_lens.training.callbacks import Callback, Evaluation, TrainingState
from mrp_lens.training.checkpoints import Checkpoint
from mrp_lens.training.loggers import Logger, LoggerCallback, logger_named
from mrp_lens.training.loop import NonFiniteLossError, TrainingRun, train

__all__ = [
    "Callback",
    "Checkpoint",
    "Evaluation",
    "Logger",
    "LoggerCallback",
    "NonFiniteLossError",
    "TrainingRun",
    "TrainingState",
    "logger_named",
    "train",
]
