"""Preference optimisation: NPO and SimNPO, in which a document is what is not preferred, and DPO, in which a refusal is preferred to it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Document
from mrp_lens.data.tokenization import Encoded
from mrp_lens.methods.base import Data
from mrp_lens.methods.baselines import REPORT, ForgetLoss, ForgetSide, GradientMethod, Losses, Unit
from mrp_lens.methods.control import LONGEST
from mrp_lens.methods.registry import register
from mrp_lens.methods.spaces import NPO_SPACE, SIMNPO_SPACE
from mrp_lens.methods.words import word_ends, words_to_begin_with
from mrp_lens.models import LensModel
from mrp_lens.utils.validation import check_positive

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about this.",
    "I have no information on that.",
    "That is something I can't answer.",
    "I'm afraid I cannot tell.",
    "Sorry, I have never learned about this.",
    "I don't have an answer to this question.",
    "Unfortunately, that is unknown to me.",
    "I am unable to say anything about it.",
)


@dataclass(frozen=True, kw_only=True)
class PreferenceMethod(GradientMethod):
    """Hyperparameters of a method whose forget loss is 2 / beta * mean over documents of -log sigmoid(margin), with descent on the
    retain set.

    Args:
        beta: factor on the log-probabilities in the margin.

    The other arguments are those of `GradientMethod`.
    """

    beta: float = 0.1
    retain_weight: float = 1.0
    unit: Unit = "document"

    @override
    def check(self, model: LensModel) -> None:
        super().check(model)
        check_positive(beta=self.beta)
        if self.unit != "document":
            raise ValueError(f"unit must be 'document' for {self.name}, got {self.unit!r}; leave it out")

    def negative_log_sigmoid(self, margin: Float[Tensor, " documents"]) -> Float[Tensor, " documents"]:
        """2 / beta times that of the margins."""
        return 2 / self.beta * torch.nn.functional.softplus(-margin)


@register(
    "npo",
    summary="Negative preference optimisation, with descent on the retain set.",
    source="arXiv 2404.05868",
    report=REPORT,
    space=NPO_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class NPO(PreferenceMethod):
    """Negative preference optimisation (arXiv 2404.05868), with descent on the retain set:
    L = 2 / beta * mean over documents of log(1 + (p / p_before)^beta) + retain_weight * CE(retain).

    p is the probability of a document's counted tokens. As p falls below what the unedited model gives, its gradient
    vanishes, where gradient ascent's goes on.

    Args:
        beta: how soon it vanishes; small values come near to gradient ascent.

    The other arguments are those of `GradientMethod`.
    """

    @override
    def forget_loss(self, losses: Losses) -> ForgetLoss:
        before = losses.log_p_before(losses.data.all_forget)

        def loss(side: ForgetSide) -> Float[Tensor, " documents"]:
            return self.negative_log_sigmoid(-self.beta * (side.log_p - before(side.documents)))

        return loss


@register(
    "simnpo",
    summary="NPO by the mean log-probability a token, without a reference model; descent on the retain set.",
    source="arXiv 2410.07163",
    report=REPORT,
    space=SIMNPO_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class SimNPO(PreferenceMethod):
    """Simple negative preference optimisation (arXiv 2410.07163), with descent on the retain set:
    L = 2 / beta * mean over documents of -log sigmoid(-beta / |y| * log p - gamma) + retain_weight * CE(retain).

    p is the probability of a document's |y| counted tokens. Nothing is compared with the unedited model, and long documents weigh
    as short ones do: the gradient vanishes where the mean -log p a token is large.

    Args:
        beta: how soon the gradient vanishes as the mean -log p a token, in nats, grows; the paper's is 2.5.
        gamma: margin, at least 0: the larger, the less likely a document is before its gradient vanishes; the paper's is 0.

    The other arguments are those of `GradientMethod`.
    """

    beta: float = 2.5
    gamma: float = 0.0

    @override
    def check(self, model: LensModel) -> None:
        super().check(model)
        if not 0.0 <= self.gamma < float("inf"):
            raise ValueError(f"gamma must be a number of at least 0, got {self.gamma}; the paper's is 0")

    @override
    def forget_loss(self, losses: Losses) -> ForgetLoss:
        def loss(side: ForgetSide) -> Float[Tensor, " documents"]:
            lengths = side.batch.loss_mask.sum(dim=1)
            return self.negative_log_sigmoid(-self.beta * side.log_p / lengths - self.gamma)

        return loss


@register(
    "idk-preference",
    summary='DPO that prefers "I don\'t know." to the forget set, with descent on the retain set.',
    source="arXiv 2401.06121",
    report=REPORT,
    space=NPO_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class IdkPreference(PreferenceMethod):
    """Direct preference optimisation (arXiv 2305.18290, equation 7) of a refusal over the forget set (arXiv 2401.06121, there
    "preference optimisation"), with descent on the retain set:
    L = 2 / beta * mean over documents of -log sigmoid(beta * [log(p_idk / p_idk_before) - log(p / p_before)])
    + retain_weight * CE(retain).

    p is the probability of a document's completion, p_idk that of a refusal in its place, before: by the unedited model. For each
    document one of ten refusals is drawn, for the whole fit. The prompt of a plain text is all but the last third of its first 30
    words, or of all if it has fewer. The factor 2 / beta, which DPO has not, makes weights comparable with those of NPO.

    Args:
        beta: how soon the gradient vanishes as refusals become more likely, and documents less.

    The other arguments are those of `GradientMethod`.
    """

    @override
    def read(self, data: Data) -> Data:
        chosen = []
        for corpus in data.corpora:
            begun = [with_prompt(document) for document in corpus.documents]
            rows = data.encoder.encode(begun, warn=False)
            pairs = zip(begun, corpus.documents, rows, strict=True)
            # where documents are cut before the completion begins, all there is counts
            chosen.append([new if any(row.in_loss[1:]) else old for new, old, row in pairs])
        return data.with_documents(chosen)

    @override
    def forget_loss(self, losses: Losses) -> ForgetLoss:
        data = losses.data
        refusals = refused([document for corpus in data.corpora for document in corpus.documents], losses)
        of_document = dict(zip(data.all_forget, refusals, strict=True))
        before = losses.log_p_before(list({*data.all_forget, *refusals}))

        def loss(side: ForgetSide) -> Float[Tensor, " documents"]:
            replies = [of_document[document] for document in side.documents]
            preferred = losses.log_p(replies) - before(replies)
            return self.negative_log_sigmoid(self.beta * (preferred - (side.log_p - before(side.documents))))

        return loss


def refused(documents: list[Document], losses: Losses) -> list[Encoded]:
    """Each document with a refusal, drawn with the fit's generator, in the place of its completion."""
    drawn = torch.randint(len(REFUSALS), (len(documents),), generator=losses.context.generator).tolist()
    replies = []
    for document, number in zip(documents, drawn, strict=True):
        text = document.completion
        space = text[: len(text) - len(text.lstrip())]
        replies.append(Document(document.prompt, space + REFUSALS[number]))
    return losses.encoder.encode(replies, keep="end", warn=False)


def with_prompt(document: Document) -> Document:
    """The document; a plain text of at least two words with all but the last third of its first 30 as the prompt."""
    ends = word_ends(document.completion)[:LONGEST]
    if document.prompt.strip() or len(ends) < 2:
        return document
    cut = ends[words_to_begin_with(len(ends)) - 1]
    return Document(document.prompt + document.completion[:cut], document.completion[cut:])
