"""UNDIAL: the model is taught its own predictions, in which the forget set's own tokens are made less likely."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.methods.baselines import REPORT, ForgetLoss, ForgetSide, GradientMethod, Losses
from mrp_lens.methods.registry import register
from mrp_lens.methods.spaces import UNDIAL_SPACE
from mrp_lens.models import LensModel, exchanged
from mrp_lens.training.losses import predictions, targets
from mrp_lens.utils.validation import check_positive


@register(
    "undial",
    summary="Self-distillation towards logits lowered at the forget set's tokens, with descent on the retain set.",
    source="arXiv 2402.10052",
    report=REPORT,
    space=UNDIAL_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class UNDIAL(GradientMethod):
    """Self-distillation with adjusted logits (arXiv 2402.10052), with descent on the retain set:
    L = mean over counted forget tokens of CE(softmax(z_before - strength * e_y), softmax(z)) + retain_weight * CE(retain).

    z are the logits before a token y, of `d_vocab` numbers, z_before those of the unedited model, and e_y is 1 at y and 0
    elsewhere. So the loss has a minimum, at which the model says what else it held for likely. The paper's loss has no retain term:
    `retain_weight=0`. The unedited logits are computed anew for each batch, with the matrices as they were, which are kept; only
    training moves others.

    Args:
        strength: by how much the logit of the text's own token is lowered, in nats (the paper's penalty, 3 to 30).

    The other arguments are those of `GradientMethod`.
    """

    strength: float = 10.0
    retain_weight: float = 1.0

    @override
    def check(self, model: LensModel) -> None:
        super().check(model)
        check_positive(strength=self.strength)

    @override
    def forget_loss(self, losses: Losses) -> ForgetLoss:
        parameters = [weight.parameter for weight in losses.weights]
        unedited = [parameter.detach().clone() for parameter in parameters]

        def loss(side: ForgetSide) -> Float[Tensor, " counted"]:
            with exchanged(parameters, unedited):
                wanted = adjusted(losses.model, side.batch, self.strength)
            # Of a token that is ruled out 0 * -inf would be NaN.
            known = side.predicted.masked_fill(wanted == 0.0, 0.0)
            return -(wanted * known).sum(dim=-1)

        return loss


@torch.no_grad()
def adjusted(model: LensModel, batch: TokenBatch, strength: float) -> Float[Tensor, "counted d_vocab"]:
    """Probabilities before each counted token, as the model gives them with the logit of that token lowered by `strength`."""
    logits = predictions(model, batch)  # log-probabilities: softmax does not see what they differ by from logits
    return logits.scatter_add_(-1, targets(batch)[:, None], logits.new_full((len(logits), 1), -strength)).softmax(-1)
