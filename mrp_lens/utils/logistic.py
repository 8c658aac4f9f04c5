"""A linear detector: logistic regression of two sides that count the same."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

PENALTY = 1e-3  # on the squared weights of standardised inputs
ITERATIONS = 60  # of L-BFGS


@torch.enable_grad()
def logistic_regression(
    inside: Float[Tensor, "inside width"], outside: Float[Tensor, "outside width"]
) -> tuple[Float[Tensor, " width"], Float[Tensor, ""]]:
    """Weights and offset of the logit of being inside, each side counting the same whatever its size."""
    values = torch.cat([inside, outside]).detach()
    wanted = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).to(values)
    share = torch.where(wanted > 0, 0.5 / len(inside), 0.5 / len(outside))
    mean, spread = values.mean(dim=0), values.std(dim=0) + 1e-6
    standard = (values - mean) / spread
    weights = torch.zeros(values.shape[1]).to(values).requires_grad_()
    offset = torch.zeros(()).to(values).requires_grad_()
    optimizer = torch.optim.LBFGS([weights, offset], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        errors = binary_cross_entropy_with_logits(standard @ weights + offset, wanted, reduction="none")
        loss = (share * errors).sum() + PENALTY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (weights / spread).detach()
    return found, (offset - (weights * mean / spread).sum()).detach()
