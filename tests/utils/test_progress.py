import inspect
import sys
import time

import pytest
import torch

from mrp_lens import metrics
from mrp_lens.training.callbacks import ProgressBar, TrainingState
from mrp_lens.utils import progress


@pytest.mark.parametrize(("delay", "shown", "drawn"), [(60.0, True, False), (0.0, True, True), (0.0, False, False)])
def test_a_bar_appears_only_where_work_takes_long(
    delay: float, shown: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", delay)
    assert list(progress.progress_bar(range(3), desc="working", progress=shown)) == [0, 1, 2]
    with progress.progress_bar(total=3, desc="working", progress=shown) as bar:
        bar.update(3)
    assert ("working" in capsys.readouterr().err) is drawn


def test_every_metric_shows_its_progress_unless_told_otherwise() -> None:
    functions = [function for name in metrics.__all__ if callable(function := getattr(metrics, name))]
    known = [inspect.signature(function).parameters.get("progress") for function in functions]
    defaults = [parameter.default for parameter in known if parameter is not None]
    assert len(defaults) >= 15
    assert set(defaults) == {True}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_file_is_a_line_now_and_then(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    bar = ProgressBar()
    bar.on_start(TrainingState("mine", 200, torch.optim.SGD([torch.zeros(1)])))
    for step in range(200):
        time.sleep(0.005)
        bar.on_step(step, {"loss": 1.0})
    bar.on_end()
    drawn = capsys.readouterr().err.count("mine:")
    assert (drawn > 5) if terminal else (drawn <= 2)
