"""Training rows sent to an experiment tracker. The log itself is always kept by whoever fits, as `log.csv`."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from typing_extensions import override

from mrp_lens.training.callbacks import Callback, TrainingState
from mrp_lens.utils.processes import is_first

PROJECT = "mrp_lens"


class Logger(Protocol):
    """What a tracker has to offer; one of your own needs these three methods and no base class."""

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run.

        Args:
            name: of what is trained.
            settings: of it, nested; JSON.
        """
        ...

    def log(self, row: Mapping[str, float], step: int) -> None:
        """A row of numbers, after the update with this index."""
        ...

    def finish(self) -> None:
        """End the run, and see that everything is written."""
        ...


class LoggerCallback(Callback):
    """Tells a logger of every update; of several processes only the first one's.

    Example:
        >>> callback = LoggerCallback(logger_named("tensorboard", "out"))  # doctest: +SKIP
        >>> fit = MRP().fit(model, forget, retain, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    @override
    def on_start(self, state: TrainingState) -> None:
        if is_first():
            self._logger.start(state.description, state.settings)

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        if is_first():
            self._logger.log({name: value for name, value in row.items() if name != "step"}, step)

    @override
    def on_end(self) -> None:
        if is_first():
            self._logger.finish()


class WandbLogger(Logger):
    """Weights & Biases, in the project `mrp_lens`; offline with WANDB_MODE=offline. Files go into `folder`/wandb."""

    def __init__(self, folder: str | Path) -> None:
        self._wandb, self._folder = tracker("wandb"), Path(folder)

    @override
    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._wandb.init(project=PROJECT, name=name, config=dict(settings), dir=str(self._folder))
        except self._wandb.Error as error:
            raise ValueError(
                f"Weights & Biases did not start: {error}. Log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    @override
    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    @override
    def finish(self) -> None:
        self._run.finish()


class TrackioLogger(Logger):
    """Trackio, in the project `mrp_lens`. It keeps its data where its own settings say, not in `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self._trackio = tracker("trackio")

    @override
    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self._trackio.init(project=PROJECT, name=name, config=dict(settings))

    @override
    def log(self, row: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(row), step=step)

    @override
    def finish(self) -> None:
        self._trackio.finish()


class TensorBoardLogger(Logger):
    """TensorBoard's event files, in `folder`/tensorboard/`name`; the settings are a text beside them."""

    def __init__(self, folder: str | Path) -> None:
        self._tensorboard = tracker("tensorboard", "torch.utils.tensorboard")
        self._folder = Path(folder) / "tensorboard"

    @override
    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self._writer = self._tensorboard.SummaryWriter(str(self._folder / name))
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    @override
    def log(self, row: Mapping[str, float], step: int) -> None:
        for term, value in row.items():
            self._writer.add_scalar(term, value, step)

    @override
    def finish(self) -> None:
        self._writer.close()


LOGGERS: dict[str, Callable[[str | Path], Logger]] = {
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
    "tensorboard": TensorBoardLogger,
}


def logger_named(name: str, folder: str | Path) -> Logger:
    """A logger for a run folder.

    Args:
        name: "wandb", "trackio" or "tensorboard".
        folder: of the run.

    Raises:
        ValueError: another name.
        ImportError: the tracker is not installed; the message says how to.
    """
    if name not in LOGGERS:
        raise ValueError(f"unknown logger {name!r}; choose one of {', '.join(LOGGERS)}")
    return LOGGERS[name](folder)


def tracker(name: str, module: str | None = None) -> ModuleType:
    """The tracker's module: of its own name, if no other is given.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(module or name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'the logger {name!r} needs a package that is not installed; install it with: pip install "mrp_lens[{name}]"'
        ) from error
