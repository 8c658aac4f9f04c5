"""Control questions made from a forget set: which of several endings, all from the set, belongs to a beginning?

A model that does not know the forget set chooses at random, whatever form the set has: so chance is what "never saw it" looks
like here. They are asked in the set's own form and in one that no fit reads (`coverage.FRAMES`), since a fit can have
unlearned a form instead of what it says, and the form in which most is left is the one that counts.
"""

import math
import random
from collections.abc import Sequence
from copy import copy
from statistics import NormalDist

import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.data.tokenization import Encoded, Encoder, in_order
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.utils.torch_state import ordinary_torch

CHOICES = 4
QUESTIONS = 48  # documents asked about, each in every form
LONGEST = 30  # words of a document that are looked at
BATCH = 64
FORMS = ("{}", "User: Please complete this sentence: {}\nAssistant: It is")


class ControlQuestions:
    """Beginnings of forget documents in several forms, each with its own ending and three of other documents.

    Args:
        encoder: of the model.
        corpora: the forget set.
        seed: of the choice of documents and endings.
        forms: of the questions; `{}` is the beginning of a document.
    """

    def __init__(self, encoder: Encoder, corpora: Sequence[Corpus], *, seed: int, forms: Sequence[str] = FORMS) -> None:
        self.encoder, self.forms = encoder, tuple(forms)
        rng = random.Random(seed)
        parts = [part for corpus in corpora for document in corpus.documents if (part := parted(document))]
        endings = sorted({ending for _, ending in parts})
        self.choices = min(CHOICES, len(endings))
        asked = rng.sample(parts, min(QUESTIONS, len(parts))) if self.choices > 1 else []
        offered = [
            (beginning, [ending, *rng.sample([other for other in endings if other != ending], self.choices - 1)])
            for beginning, ending in asked
        ]
        self.rows = [
            encoder.encode(
                [Document(form.format(beginning), each) for beginning, endings in offered for each in endings],
                keep="end",
                warn=False,
            )
            for form in self.forms
        ]

    @property
    def chance(self) -> float:
        """Accuracy of choosing at random; 1.0 where the set has too few different endings to ask anything."""
        return 1.0 / max(1, self.choices)

    @property
    def target(self) -> float:
        """The accuracy that cannot be told from chance: what the highest of the forms exceeds as rarely by chance as one form
        exceeds a standard error."""
        count = max(1, len(self.rows[0]) // max(1, self.choices))
        errors = NormalDist().inv_cdf(NormalDist().cdf(1.0) ** (1 / len(self.forms)))
        return min(1.0, self.chance + errors * math.sqrt(self.chance * (1.0 - self.chance) / count))

    def known_to(self, model: LensModel) -> tuple["ControlQuestions", float]:
        """Those in the forms in which the model's answers can be told from chance, others would show nothing, at least the set's
        own form; and the model's accuracy on them."""
        accuracies = self.accuracies(model)
        known = [place for place, accuracy in enumerate(accuracies) if accuracy > self.target] or [0]
        chosen = copy(self)
        chosen.forms, chosen.rows = tuple(self.forms[place] for place in known), [self.rows[place] for place in known]
        return chosen, max(accuracies[place] for place in known)

    def accuracy(self, model: LensModel) -> float:
        """In the form in which it is highest."""
        return max(self.accuracies(model))

    @ordinary_torch(gradients=False)
    def accuracies(self, model: LensModel) -> list[float]:
        """In each form, the share of questions whose own ending has the highest mean log-probability a token; 1.0 without
        questions."""
        return [self._accuracy(model, rows) if rows else 1.0 for rows in self.rows]

    def _accuracy(self, model: LensModel, rows: Sequence[Encoded]) -> float:
        scores = torch.zeros(len(rows))
        with torch.no_grad():
            for places, batch in in_order(self.encoder, rows, BATCH):
                values = -cross_entropy(predictions(model, batch), batch)
                counts = batch.loss_mask[:, 1:].sum(dim=1).tolist()
                scores[places] = torch.stack([part.mean() for part in values.split(counts)]).cpu()
        return float((scores.view(-1, self.choices).argmax(dim=1) == 0).float().mean())


def parted(document: Document) -> tuple[str, str] | None:
    """Beginning and ending of a document: its prompt and completion, or all but the last third of its (first) words and that."""
    if document.prompt.strip():
        return document.prompt, document.completion
    words = document.completion.split()[:LONGEST]
    if len(words) < 2:
        return None
    cut = len(words) - max(1, len(words) // 3)
    return " ".join(words[:cut]), " " + " ".join(words[cut:])


def control_accuracy(model: LensModel, forget: Corpus | Sequence[Corpus], *, seed: int = 0) -> float:
    """The accuracy of a model on the control questions of a forget set, in the form in which it is highest; of one that never saw
    the set, it is a fit's `target`.

    Args:
        model: HookedTransformer or TransformerBridge.
        forget: the forget set.
        seed: of the questions.

    Example:
        >>> target = control_accuracy(model, forget)
    """
    corpora = [forget] if isinstance(forget, Corpus) else list(forget)
    return ControlQuestions(encoder_for(model), corpora, seed=seed).accuracy(model)
