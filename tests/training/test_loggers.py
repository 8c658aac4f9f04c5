"""Trackers: TensorBoard and wandb (offline) for real, trackio by a stand-in with its functions."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.methods import RMU
from mrp_lens.training import LoggerCallback, logger_named, train
from mrp_lens.training.loggers import LOGGERS

SETTINGS = {"method": "rmu", "settings": {"layers": (1, 2), "rank": None}}


class Listed:
    """A logger of one's own."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self.calls.append((name, settings))

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.calls.append((step, dict(row)))

    def finish(self) -> None:
        self.calls.append("finished")


def log_three_steps(logger: Any) -> list[float]:
    """The losses that were to be logged."""
    x = torch.zeros(1, requires_grad=True)
    callbacks = [LoggerCallback(logger)]
    options: dict[str, Any] = {"steps": 3, "description": "rmu", "progress": False, "settings": SETTINGS}
    run = train(lambda _: [{"loss": (x - 3).square().sum()}], torch.optim.SGD([x], 0.1), callbacks=callbacks, **options)
    return list(run.log["loss"])


def test_a_fit_tells_a_logger_of_its_settings_and_of_every_row(model: Any, texts: tuple[Corpus, Corpus]) -> None:
    logger = Listed()
    fit = RMU(layer=2, steps=2, batch_size=4).fit(model, *texts, progress=False, callbacks=[LoggerCallback(logger)])
    (name, record), *rows, end = logger.calls
    assert (name, end) == ("rmu", "finished")
    assert record["settings"] == fit.settings
    assert record["seed"] == 0
    logged = fit.log.drop(columns="step").to_dict("records")
    assert rows == list(enumerate(logged))


def test_tensorboard_has_every_number_and_the_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    losses = log_three_steps(logger_named("tensorboard", tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rmu"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert len(events.Scalars("seconds")) == 3
    (text,) = events.Tensors("settings/text_summary")
    assert '"rank": null' in text.tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_wandb_keeps_an_offline_run_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = logger_named("wandb", tmp_path / "run")
    losses = log_three_steps(logger)
    run = logger._run  # type: ignore[attr-defined]
    assert (run.project, run.name) == ("mrp_lens", "rmu")
    assert run.config["settings"] == {"layers": [1, 2], "rank": None}
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    values = [repr(loss).removesuffix(".0").encode() for loss in losses]
    end = time.monotonic() + 30
    while not all(value in file.read_bytes() for value in values):  # another process writes it
        assert time.monotonic() < end
        time.sleep(0.1)


def test_trackio_is_called_as_its_documentation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stand_in = ModuleType("trackio")
    for function in ("init", "log", "finish"):
        setattr(stand_in, function, lambda *args, _called=function, **options: calls.append((_called, args, options)))
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    losses = log_three_steps(logger_named("trackio", tmp_path))
    first, *rows, last = calls
    assert first == ("init", (), {"project": "mrp_lens", "name": "rmu", "config": SETTINGS})
    assert [(name, row["loss"], options) for name, (row,), options in rows] == [
        ("log", loss, {"step": step}) for step, loss in enumerate(losses)
    ]
    assert last == ("finish", (), {})


@pytest.mark.parametrize("name", LOGGERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "mrp_lens\[{name}\]"'):
        logger_named(name, tmp_path)


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'mlflow'; choose one of wandb, trackio, tensorboard"):
        logger_named("mlflow", tmp_path)
