"""The linear detector: it is at the optimum of what it says it minimises."""

import torch

from mrp_lens.utils.logistic import PENALTY, logistic_regression


def test_both_sides_count_the_same_and_the_optimum_is_found() -> None:
    draw = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(40, 6, generator=draw) + 0.7, torch.randn(200, 6, generator=draw)
    weights, offset = logistic_regression(inside, outside)
    values = torch.cat([inside, outside]).double()
    mean, spread = values.mean(dim=0), values.std(dim=0)
    w = (weights.double() * spread).requires_grad_()
    b = (offset.double() + (weights.double() * mean).sum()).requires_grad_()
    logits = ((values - mean) / spread) @ w + b
    signs = torch.cat([torch.ones(40), -torch.ones(200)]).double()
    share = torch.where(signs > 0, 0.5 / 40, 0.5 / 200)
    (PENALTY * w.square().sum() - (share * torch.nn.functional.logsigmoid(signs * logits)).sum()).backward()
    assert w.grad is not None
    assert b.grad is not None
    assert float(torch.cat([w.grad, b.grad[None]]).abs().max()) < 1e-4


def test_what_lies_apart_is_told_apart() -> None:
    inside, outside = torch.eye(4)[:1].repeat(5, 1), torch.eye(4)[1:].repeat(3, 1)
    weights, offset = logistic_regression(inside, outside)
    assert bool(((inside @ weights + offset) > 0).all())
    assert bool(((outside @ weights + offset) < 0).all())
