"""How steep the loss is towards a model's input: what an attack by gradients has to go by."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.data import Questions
from mrp_lens.data.kinds import check_questions
from mrp_lens.data.tokenization import PaddingSide, TokenBatch, in_order
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.multiple_choice import by_group, encoded_choices
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.finite import check_finite, non_finite
from mrp_lens.models.hooks import frozen, hooked
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from mrp_lens.utils.validation import check_whole

EMBEDDING_HOOK = "hook_embed"

MEASURES = ("norm", "relative", "loss")


class InputGradient(NamedTuple):
    """Losses of the rows of a batch, what left the embedding, and the gradient of the losses' sum towards that."""

    losses: Float[Tensor, " rows"]
    embeddings: Float[Tensor, "rows seq d_model"]
    gradient: Float[Tensor, "rows seq d_model"]


@ordinary_torch(gradients=True)
def input_gradients(
    model: LensModel,
    edit: Edit | None,
    questions: Questions,
    *,
    batch_size: int = 32,
    padding: PaddingSide = "right",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Norm of the gradient of the right answer's cross-entropy towards the embeddings of the prompt's tokens.

    arXiv 2408.06223 argues, without a measurement, that RMU resists attacks by gradients because these vanish where
    h is pinned to c u. A gradient alone does not tell: it also vanishes where the model is sure of the answer, so read
    it beside the loss, and beside the unedited model, which is the control. Nor does a small gradient stop a search:
    `jailbreak` ranks replacements by it, and scale does not change a ranking.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: None: the unedited model alone.
        questions: each with its right choice; reported by group.
        batch_size: questions at a time.
        padding: "right" or "left"; of no effect beyond rounding.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row for each model ("unedited", then "edited") and group, and, if there are several groups, "all" (first):
        `model`, `group`, `n` questions; the Frobenius norm over all tokens of the prompt (no pads, no BOS, nothing of
        the answer), in nats per unit of embedding: `mean` over questions with its 95% bootstrap interval `low`,
        `high`, `median`, `quantile_10`, `quantile_90`; `relative`, the mean of this norm times the norm of the
        prompt's embeddings (nats, free of the embedding's scale), with `relative_low`, `relative_high`; `loss`, mean
        cross-entropy of the right answers, in nats per token. Intervals are NaN with a single question.

    Raises:
        TypeError: questions are no Questions.
        ValueError: there are none, one whose prompt holds no token or whose right answer cannot be scored, or an edit
            that does not fit the model; NonFiniteError where logits or gradients are NaN or infinite.

    Example:
        >>> frame = input_gradients(model, fit.edit, questions)
    """
    check_questions(questions=questions)
    if not len(questions):
        raise ValueError(f"no questions in {questions.name!r}")
    check_whole(batch_size=batch_size)
    table = pd.DataFrame({"group": [q.group for q in questions.questions]})
    groups = [(name, part.index.to_numpy()) for name, part in by_group(table)]
    rows = []
    for name, applied in [("unedited", None)] + ([] if edit is None else [("edited", edit)]):
        with edit_on(model, applied):
            measured = _measured(model, questions, batch_size, padding, progress)
        rows += [{"model": name, "group": group, **_summary(measured[chosen], seed)} for group, chosen in groups]
    return pd.DataFrame(rows)


def input_gradient(model: LensModel, losses: Callable[[], Float[Tensor, " rows"]]) -> InputGradient:
    """The gradient of losses that a forward pass gives, towards what leaves the embedding.

    Zeros that require grad are added at `hook_embed`, which both classes have, so that every position of every row has
    a gradient of its own. A model that scales its embeddings does so before or after this point.

    Args:
        model: with the edit on, if there is one.
        losses: runs the model once and gives one loss a row; independent of the input (steering may replace every
            state), its gradient is 0.
    """
    store: dict[str, Tensor] = {}

    def attach(activation: Tensor, hook: Any) -> Tensor:
        store["embeddings"] = activation.detach()
        store["shift"] = torch.zeros_like(activation, requires_grad=True)
        return activation + store["shift"]

    refuse_inference_tensors(model.parameters())
    with frozen(model), torch.enable_grad(), hooked(model, [(EMBEDDING_HOOK, attach)]):
        values = losses()
        gradient = torch.zeros_like(store["shift"])
        if values.requires_grad:
            (gradient,) = torch.autograd.grad(values.sum(), store["shift"], allow_unused=True, materialize_grads=True)
    return InputGradient(values.detach(), store["embeddings"], gradient.detach())


def answer_losses(model: LensModel, batch: TokenBatch) -> Float[Tensor, " rows"]:
    """Cross-entropy of each row's tokens that count in the loss: their mean, in nats per token, in float64.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    losses = cross_entropy(predictions(model, batch), batch).double()
    if bool(losses.isnan().any()):
        raise non_finite(model, batch.tokens, batch.attention_mask, "the logits")
    rows = batch.loss_mask.nonzero()[:, 0]
    totals = torch.zeros(len(batch), dtype=torch.float64, device=losses.device).index_add(0, rows, losses)
    return totals / batch.loss_mask.sum(dim=1)


def _measured(
    model: LensModel, questions: Questions, batch_size: int, padding: PaddingSide, progress: bool
) -> NDArray[np.float64]:
    """[questions, MEASURES]."""
    encoder = encoder_for(model)
    rows = encoded_choices(encoder, questions, right_only=True)
    for place, row in enumerate(rows):
        predicted = (False, *row.in_loss[1:])
        if not any(content and not counts for content, counts in zip(row.content, predicted, strict=True)):
            raise ValueError(f"question {place} of {questions.name!r} has no token before its answer; give it a prompt")
    values = np.empty((len(rows), len(MEASURES)))
    with tqdm(total=len(rows), desc="input gradients", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, rows, batch_size, side=padding, logits=True):
            prompt = batch.content_mask & ~batch.loss_mask
            found = input_gradient(model, partial(answer_losses, model, batch))
            norm, size = (
                tensor.double().square().sum(dim=-1).where(prompt, 0.0).sum(dim=1).sqrt()
                for tensor in (found.gradient, found.embeddings)
            )
            measured = torch.stack([norm, norm * size, found.losses], dim=1).cpu()
            check_finite(
                model,
                measured,
                f"the loss of a right answer in {questions.name!r} or its gradient",
                remedy="weaken the edit; or leave out answers that the model rules out",
            )
            values[chosen] = measured.numpy()
            bar.update(len(chosen))
    return values


def _summary(measured: NDArray[np.float64], seed: int) -> dict[str, float]:
    norms, relative, losses = measured.T
    low, high = bootstrap_interval(norms, seed=seed)
    relative_low, relative_high = bootstrap_interval(relative, seed=seed)
    return {
        "n": len(norms),
        "mean": float(norms.mean()),
        "low": low,
        "high": high,
        "median": float(np.median(norms)),
        "quantile_10": float(np.quantile(norms, 0.1)),
        "quantile_90": float(np.quantile(norms, 0.9)),
        "relative": float(relative.mean()),
        "relative_low": relative_low,
        "relative_high": relative_high,
        "loss": float(losses.mean()),
    }
