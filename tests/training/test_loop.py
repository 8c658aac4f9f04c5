import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mrp_lens.training import Callback, Checkpoint, Evaluation, NonFiniteLossError, TrainingRun, TrainingState, train
from mrp_lens.training.optim import MasterAdamW, Trainable, linear_decay, warmup_cosine, warmup_linear_decay
from mrp_lens.utils.interrupts import complete, deferred, interrupted
from tests.support.kills import Killed

Terms = Iterator[dict[str, torch.Tensor]]


def fitted(x: torch.Tensor, *, steps: int = 5, parts: int = 1, at: Callable[[int], None] = lambda _: None, **more: Any) -> TrainingRun:  # fmt: skip
    """Gradient descent from x to 3; `at` is called in the middle of each step."""

    def losses(step: int) -> Terms:
        at(step)
        for _ in range(parts):
            yield {"loss": (x - 3.0).square().sum() / parts}

    return train(losses, torch.optim.SGD([x], lr=0.1), steps=steps, description="test", progress=False, **more)


def zeros() -> torch.Tensor:
    return torch.zeros(2, requires_grad=True)


class Recorder(Callback):
    """What a callback is told."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def on_start(self, state: TrainingState) -> None:
        self.state = state
        self.told.append(("start", state.done))

    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        assert row is self.state.rows[step]
        assert all(tensor.grad is None for tensor in self.state.tensors)
        self.told.append(step)
        if step == self.fails_at:
            raise Killed

    def on_end(self) -> None:
        self.told.append("end")


def test_it_minimises_and_logs_one_row_a_step() -> None:
    x = zeros()
    run = fitted(x, steps=50)
    torch.testing.assert_close(x.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert list(run.log.columns) == ["step", "loss", "seconds"]
    assert len(run.log) == 50
    assert not run.interrupted
    assert x.grad is None


def test_micro_batches_add_up_to_the_same_step() -> None:
    whole, split = zeros(), zeros()
    logs = [fitted(x, parts=parts).log for x, parts in ((whole, 1), (split, 4))]
    torch.testing.assert_close(whole, split)
    torch.testing.assert_close(torch.tensor(logs[0]["loss"]), torch.tensor(logs[1]["loss"]))


def test_gradients_of_half_precision_are_clipped_too() -> None:
    moved = []
    for most in (None, 1e-3):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        master = Trainable(parameter.detach().float().requires_grad_(True), (parameter,))
        norms: list[float] = []
        optimizer = MasterAdamW([master], lr=0.1)
        optimizer.register_step_post_hook(lambda *_: norms.append(float(master.master.grad.norm())))  # type: ignore[union-attr]  # noqa: B023
        train(
            lambda step: iter([{"loss": (parameter - 3.0).square().sum()}]),  # noqa: B023
            optimizer,
            steps=2,
            description="test",
            progress=False,
            max_grad_norm=most,
        )
        moved.append(norms)
    assert min(moved[0]) > 1.0
    assert moved[1] == pytest.approx([1e-3] * len(moved[0]), rel=1e-2)


def test_parts_of_half_precision_add_up_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    master = Trainable(torch.zeros(2), (parameter,))
    optimizer = MasterAdamW([master], lr=0.1)
    found: list[float] = []
    optimizer.register_step_post_hook(lambda *_: found.append(float(master.master.grad[0])))  # type: ignore[index]
    factors = [256.0, *[1.0] * 40]
    train(
        lambda step: ({"loss": factor * parameter.sum()} for factor in factors),
        optimizer,
        steps=1,
        description="test",
        progress=False,
    )
    assert set(found) == {296.0}  # in bfloat16 256 + 1 is 256


def test_a_non_finite_loss_stops_before_it_spoils_the_tensors() -> None:
    x, recorder = torch.ones(1, requires_grad=True), Recorder()

    def losses(step: int) -> Terms:
        yield {"loss": (x * (float("inf") if step == 2 else 1.0)).sum()}

    with pytest.raises(NonFiniteLossError, match="the loss is inf at step 2"):
        train(losses, torch.optim.SGD([x], lr=0.1), steps=5, description="test", progress=False, callbacks=[recorder])
    assert float(x.detach()) == pytest.approx(0.8)
    assert recorder.told == [("start", 0), 0, 1, "end"]


def test_schedules() -> None:
    assert linear_decay(0.0) == linear_decay(0.5) == 1.0
    assert linear_decay(0.75) == 0.5
    assert warmup_linear_decay(0.0) == pytest.approx(0.1)
    assert warmup_linear_decay(0.05) == pytest.approx(0.55)
    assert warmup_linear_decay(0.1) == warmup_linear_decay(0.5) == 1.0
    assert warmup_linear_decay(0.75) == 0.5
    assert warmup_cosine(0.0) < 0.1
    assert warmup_cosine(0.05) == pytest.approx(1.0)
    assert warmup_cosine(0.999) < 0.01
    with pytest.raises(ValueError, match="at least 1"):
        train(lambda step: [], torch.optim.SGD([torch.zeros(1)], lr=1.0), steps=0, description="test")


def test_a_governor_changes_the_learning_rate_of_the_updates_that_follow() -> None:
    class Doubling(Callback):
        def on_start(self, state: TrainingState) -> None:
            self.state = state

        def on_step(self, step: int, row: Mapping[str, float]) -> None:
            self.state.pace *= 2.0

    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    train(lambda step: [{"loss": -x.sum()}], optimizer, steps=3, description="t", progress=False, governor=Doubling())
    assert float(x.detach()) == pytest.approx(0.1 + 0.2 + 0.4)


def test_callbacks_are_told_of_every_step_and_always_of_the_end() -> None:
    first, failing, never = Recorder(), Recorder(fails_at=1), Recorder()
    with pytest.raises(Killed):
        fitted(zeros(), callbacks=[first, failing, never])
    assert first.told == failing.told == [("start", 0), 0, 1, "end"]
    assert never.told == [("start", 0), 0, "end"]


def test_an_evaluation_sees_the_tensors_as_they_are_after_the_updates_it_names() -> None:
    x = zeros()
    seen: dict[int, float] = {}
    fitted(x, callbacks=[Evaluation(lambda done: seen.update({done: float(x.detach()[0])}), marks=(0, 2, 5, 9))])
    assert list(seen) == [0, 2, 5]
    assert seen[0] == 0.0
    for steps in (2, 5):
        alone = zeros()
        fitted(alone, steps=steps)
        assert seen[steps] == float(alone.detach()[0])


@pytest.mark.parametrize("saved", [False, True])
def test_the_first_ctrl_c_lets_the_step_finish_and_the_second_stops_at_once(saved: bool, tmp_path: Path) -> None:
    for presses, done in ((1, 3), (2, 2)):
        recorder, x = Recorder(), zeros()
        marks: list[int] = []

        def press(step: int, presses: int = presses) -> None:
            for _ in range(presses if step == 2 else 0):
                os.kill(os.getpid(), signal.SIGINT)

        kept = Checkpoint.claim(tmp_path / str(presses), {}) if saved else None
        callbacks = [recorder, Evaluation(marks.append, marks=range(9))]
        run = fitted(x, at=press, callbacks=callbacks, checkpoint=kept)
        assert run.interrupted
        assert len(run.log) == done
        assert recorder.told == [("start", 0), *range(done), "end"]
        assert marks == [0, 1, 2]  # told to stop, a run is not evaluated again
        with pytest.raises(KeyboardInterrupt):
            complete(run)
    assert complete(fitted(zeros())).interrupted is False


def test_a_run_that_goes_on_says_where_it_starts_and_is_not_evaluated_before_that(tmp_path: Path) -> None:
    kept, undisturbed, x = Checkpoint.claim(tmp_path, {}, every=2), zeros(), zeros()
    fitted(undisturbed)
    with pytest.raises(Killed):
        fitted(x, checkpoint=kept, callbacks=[Recorder(fails_at=3)])
    recorder, again = Recorder(), zeros()
    marks: list[int] = []
    fitted(again, checkpoint=kept, callbacks=[recorder, Evaluation(marks.append, marks=range(9))])
    assert recorder.told == [("start", 4), 4, "end"]
    assert marks == [5]
    assert torch.equal(again, undisturbed)


def test_sigterm_is_noted_only_where_the_step_is_saved_and_other_threads_note_nothing() -> None:
    import threading

    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with deferred(terminate=False) as asked:
        assert signal.getsignal(signal.SIGTERM) == usual[1]
        os.kill(os.getpid(), signal.SIGINT)
        assert asked
        asked.end_if_terminated()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with deferred(terminate=True) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            asked.end_if_terminated()
    seen: list[Any] = []

    def elsewhere() -> None:
        with deferred(terminate=True):
            seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [usual]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == usual


def test_a_frame_says_so_by_its_attributes() -> None:
    frame = fitted(zeros()).log
    assert not interrupted(frame)
    frame.attrs["interrupted"] = True
    with pytest.raises(KeyboardInterrupt):
        complete(frame)
