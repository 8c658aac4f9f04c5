"""Control questions made from a forget set: which of several endings, all from the set, belongs to a beginning?

A model that does not know the forget set chooses at random: so chance is what "never saw it" looks like here. For that the wrong
endings have to be of the same kind as the right one; those that the form of a text rules out would leave a model that never saw the
set far above chance. They are asked in the set's own form and in one that no fit reads (`coverage.FRAMES`), and where documents have
prompts also with the second half of the endings alone, which tells what they say from how they begin. A fit can have unlearned a
form instead of what it says, so the form in which most is left is the one that counts.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist

import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.data.tokenization import Encoded, Encoder, in_order
from mrp_lens.methods.coverage import SHORT
from mrp_lens.methods.words import sentences_of, words_to_begin_with
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.utils.processes import dealt, summed
from mrp_lens.utils.torch_state import ordinary_torch

CHOICES = 4
QUESTIONS = 48  # documents asked about, each in every form
LOOKED_AT, ASKABLE = 2000, 200  # documents at most whose endings are offered, and that may be asked about
NEIGHBOURS = 8  # documents that begin alike, most of which end otherwise than one that is asked about
LONGEST = 30  # words of a document that are looked at
BATCH = 64
FORMS = ("{}", "User: Please complete this sentence: {}\nAssistant: It is")
SECOND_HALF = "second half of the ending"  # one more form, if at least half of the documents asked about have a prompt and can be cut
HALVED = 4  # words from which on an ending is cut
ANSWERED = 1 / 2  # of the way from chance to its best form, beyond which a model answers in another
HALF_ANSWERED = 1 / 3  # the same for second halves


@dataclass(frozen=True)
class Answered:
    """How a model answers, in the form in which most is left of what it knows.

    Attributes:
        accuracy: share of the questions whose own ending has the highest mean log-probability a token.
        margin: by how much it is above the best of the others, nats a token, the mean over questions.
    """

    accuracy: float
    margin: float

    @classmethod
    def best(cls, forms: Sequence["Answered"]) -> "Answered":
        """The highest of each."""
        return cls(max(form.accuracy for form in forms), max(form.margin for form in forms))


class ControlQuestions:
    """Beginnings of forget documents in several forms, each with its own ending and three of documents that begin alike.

    Args:
        encoder: of the model.
        corpora: the forget set.
        seed: of the choice of documents and endings.
        forms: of the questions; `{}` is the beginning of a document.
    """

    def __init__(self, encoder: Encoder, corpora: Sequence[Corpus], *, seed: int, forms: Sequence[str] = FORMS) -> None:
        self.encoder = encoder
        rng = random.Random(seed)
        looked_at = [rng.sample(c.documents, LOOKED_AT) if len(c) > LOOKED_AT else c.documents for c in corpora]
        parts = [part for documents in looked_at for part in askable_parts(documents)]
        parts = rng.sample(parts, min(LOOKED_AT, len(parts)))
        alike = _Alike(parts, rng)
        self.choices = min(CHOICES, len({ending for _, ending in parts}), 1 + alike.fewest)
        askable = (
            (beginning, [ending, *wrong])
            for beginning, ending in parts[:ASKABLE]
            if (wrong := alike.wrong_endings(beginning, ending, self.choices - 1))
        )
        offered = list(islice(askable, QUESTIONS))
        asked = {form: [(form.format(beginning), endings) for beginning, endings in offered] for form in forms}
        prompts = {document.prompt for corpus in corpora for document in corpus.documents if document.prompt.strip()}
        halved = [
            (beginning, halves)
            for beginning, endings in offered
            if beginning in prompts and (halves := _second_halves(endings))
        ]
        if halved and 2 * len(halved) >= len(offered):
            asked[SECOND_HALF] = halved
        self.forms = tuple(asked)
        self.rows = [
            encoder.encode(
                [Document(beginning, ending) for beginning, endings in questions for ending in endings],
                keep="end",
                warn=False,
            )
            for questions in asked.values()
        ]

    @property
    def asks(self) -> bool:
        """Whether they tell anything: not where the set has too few different endings, or makes so few questions that all of them may
        be right by chance."""
        return self.choices > 1 and bool(self.rows[0]) and self.target < 1.0

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

    def known_to(self, model: LensModel) -> tuple["ControlQuestions", Answered]:
        """Those in the forms in which the model answers, and how it does; others would show nothing.

        It answers in a form where its accuracy is above the target, and further than halfway from chance to that in its best form;
        for second halves, which tell less, a third of the way is enough. Where it answers in none, the set's own form is asked.
        """
        forms = self.by_form(model)
        way = max(form.accuracy for form in forms) - self.chance
        shares = [HALF_ANSWERED if form == SECOND_HALF else ANSWERED for form in self.forms]
        enough = [max(self.target, self.chance + share * way) for share in shares]
        known = [place for place, form in enumerate(forms) if form.accuracy > enough[place]] or [0]
        chosen = copy(self)
        chosen.forms, chosen.rows = tuple(self.forms[place] for place in known), [self.rows[place] for place in known]
        return chosen, Answered.best([forms[place] for place in known])

    def asked_of(self, model: LensModel) -> Answered:
        """How the model answers, in the form in which most is left."""
        return Answered.best(self.by_form(model))

    @ordinary_torch(gradients=False)
    def by_form(self, model: LensModel) -> list[Answered]:
        """How the model answers in each form; accuracy 1.0 and margin 0 without questions."""
        return [self._answered(model, rows) if rows else Answered(1.0, 0.0) for rows in self.rows]

    def _answered(self, model: LensModel, rows: Sequence[Encoded]) -> Answered:
        scores = torch.zeros(len(rows))
        with torch.no_grad():
            for places, batch in dealt(in_order(self.encoder, rows, BATCH, logits=True)):
                values = -cross_entropy(predictions(model, batch), batch)
                counts = batch.loss_mask[:, 1:].sum(dim=1).tolist()
                scores[places] = torch.stack([part.mean() for part in values.split(counts)]).cpu()
        summed([scores])
        by_question = scores.view(-1, self.choices)
        right = (
            (by_question.argmax(dim=1) == 0).double().mean()
        )  # a mean of several that is chance must not be above it by rounding
        if self.choices == 1:
            return Answered(float(right), 0.0)
        margin = (by_question[:, 0] - by_question[:, 1:].max(dim=1).values).mean()
        return Answered(float(right), float(margin))


def _second_halves(endings: Sequence[str]) -> list[str]:
    """Of each; none where one is too short, or two of them are the same."""
    parts = [ending.split() for ending in endings]
    halves = [" " + " ".join(words[len(words) // 2 :]) for words in parts if len(words) >= HALVED]
    return halves if len(set(halves)) == len(endings) else []


class _Alike:
    """Which documents are of the same kind: those whose beginnings share most.

    What is shared are words, and the last word once more. Each counts by how many beginnings have it, so that "The colour of
    Ayin is" is closer to "The colour of Beth is" than to "The taste of Ayin is" or "Ayin has the colour of".
    """

    def __init__(self, parts: Sequence[tuple[str, str]], rng: random.Random) -> None:
        self.rng = rng
        self.parts = [(_marks(beginning), ending) for beginning, ending in parts]
        self.true: dict[frozenset[str], set[str]] = {}  # the endings that stand after the same words
        for marks, ending in self.parts:
            self.true.setdefault(marks, set()).add(ending)
        every = {ending for _, ending in self.parts}
        # Wrong endings that there are for any beginning.
        self.fewest = min((len(every - own) for own in self.true.values()), default=0)
        counts = Counter(mark for marks, _ in self.parts for mark in marks)
        self.weights = {mark: math.log1p(count) for mark, count in counts.items()}

    def wrong_endings(self, beginning: str, ending: str, count: int) -> list[str]:
        """So many others, which stand after the closest beginnings, drawn among those that are equally close. An ending of another
        kind would be ruled out by a model that knows the language and nothing else; what stands after the same beginning is true, too.

        None if the ending tells nothing: most of the closest beginnings, of other documents, end alike.
        """
        own = _marks(beginning)
        closest = [(self._weight(marks & own) / self._weight(marks | own), marks, other) for marks, other in self.parts]
        nearest = heapq.nlargest(NEIGHBOURS, (each for each in closest if each[1] != own), key=lambda each: each[0])
        if sum(other == ending for _, _, other in nearest) > len(nearest) / 2:
            return []
        best: dict[str, float] = {}
        for closeness, marks, other in closest:
            if marks != own and other not in self.true[own]:
                best[other] = max(best.get(other, 0.0), closeness)
        if len(best) < count:
            return []
        return heapq.nlargest(count, best, key=lambda other: (best[other], self.rng.random()))

    def _weight(self, marks: frozenset[str]) -> float:
        return math.fsum(self.weights[mark] for mark in marks)  # the same whatever order the set has in this process


def _marks(beginning: str) -> frozenset[str]:
    words = beginning.casefold().split()
    return frozenset([*words, f"{words[-1]} ..."])


def askable_parts(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """Beginnings and endings of a forget set: of a plain document of several sentences those of each that tells something by itself,
    since the answer to another may stand in front of it. A long document's are parted behind the word that says whom they are about."""
    found: list[tuple[str, str] | None] = []
    for document, told in zip(documents, sentences_of(documents), strict=True):
        alone = [part for part in told if part.alone and len(part.text.split()) <= SHORT]
        if len(told) < 2 or not alone:
            found.append(parted(document))
            continue
        long = len(document.completion.split()) > SHORT
        for part in alone:
            words = part.text.split()
            behind = part.named if long else 0
            found.append(
                (" ".join(words[:behind]), " " + " ".join(words[behind:]))
                if behind
                else parted(Document("", part.text))
            )
    return [part for part in found if part is not None]


def parted(document: Document) -> tuple[str, str] | None:
    """Beginning and ending of a document: its prompt and completion, or all but the last third of its (first) words and that."""
    if document.prompt.strip():
        return document.prompt, document.completion
    words = document.completion.split()[:LONGEST]
    if len(words) < 2:
        return None
    cut = words_to_begin_with(len(words))
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
    return ControlQuestions(encoder_for(model), corpora, seed=seed).asked_of(model).accuracy
