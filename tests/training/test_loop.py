from collections.abc import Iterator

import pytest
import torch

from mrp_lens.training.loop import NonFiniteLossError, train
from mrp_lens.training.optim import linear_decay, warmup_cosine


def quadratic(x: torch.Tensor, parts: int = 1) -> "object":
    def losses(step: int) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(parts):
            yield {"loss": (x - 3.0).square().sum() / parts}

    return losses


def test_it_minimises_and_logs_one_row_a_step() -> None:
    x = torch.zeros(2, requires_grad=True)
    run = train(quadratic(x), torch.optim.SGD([x], lr=0.1), steps=50, description="test", progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(x.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert list(run.log.columns) == ["step", "loss", "seconds"]
    assert len(run.log) == 50
    assert not run.interrupted
    assert x.grad is None


def test_micro_batches_add_up_to_the_same_step() -> None:
    whole, split = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    logs = [
        train(quadratic(x, parts), torch.optim.SGD([x], lr=0.1), steps=5, description="test", progress=False).log  # type: ignore[arg-type]
        for x, parts in ((whole, 1), (split, 4))
    ]
    torch.testing.assert_close(whole, split)
    torch.testing.assert_close(torch.tensor(logs[0]["loss"]), torch.tensor(logs[1]["loss"]))


def test_a_non_finite_loss_stops_before_it_spoils_the_tensors() -> None:
    x = torch.ones(1, requires_grad=True)

    def losses(step: int) -> Iterator[dict[str, torch.Tensor]]:
        yield {"loss": (x * (float("inf") if step == 2 else 1.0)).sum()}

    with pytest.raises(NonFiniteLossError, match="the loss is inf at step 2"):
        train(losses, torch.optim.SGD([x], lr=0.1), steps=5, description="test", progress=False)
    assert float(x.detach()) == pytest.approx(0.8)


def test_schedules() -> None:
    assert linear_decay(0.0) == linear_decay(0.5) == 1.0
    assert linear_decay(0.75) == 0.5
    assert warmup_cosine(0.0) < 0.1
    assert warmup_cosine(0.05) == pytest.approx(1.0)
    assert warmup_cosine(0.999) < 0.01
    with pytest.raises(ValueError, match="at least 1"):
        train(lambda step: [], torch.optim.SGD([torch.zeros(1)], lr=1.0), steps=0, description="test")
