"""A fit within a budget of damage: the weight of the retain loss keeps to it, and the fit ends once it has forgotten.

The damage is KL(unedited || edited) on retain text that no update sees, and on what the model knows of the answers to questions made
from it. The weight is a multiplier that rises while there is more damage than the budget allows: dual ascent, as for the constraint
that PDU (arXiv 2506.05314) puts on the retain loss. It falls while there is less, until the fit is where it aims: what is over by then
is not spent. For the same reason a fit keeps to a share of its budget first, and is allowed more where it would not get to its target
at the speed that it has. Damage follows the weight with a delay, so that dual ascent alone swings from a tenth of the budget to ten
times as much; a part of the weight that answers to the damage as it is now damps that (PID Lagrangian, arXiv 2007.03964).

A fit aims at chance itself, and has forgotten where what is left cannot be told from chance: the questions are few and of two forms,
and what is asked otherwise comes down later. Where the weight is as small as it gets and nothing has been forgotten, the steps are
too small for this model: they grow until something happens.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch, in_order
from mrp_lens.edits import Edit
from mrp_lens.methods.control import Answered, ControlQuestions
from mrp_lens.methods.outcome import MOVED, SPENT, Outcome
from mrp_lens.models import LensModel
from mrp_lens.training.callbacks import Callback, TrainingState
from mrp_lens.training.loop import TrainingRun
from mrp_lens.training.losses import kl, predictions, targets
from mrp_lens.utils.processes import dealt, gathered

logger = logging.getLogger(__name__)

EVERY = 5  # updates between two looks at the damage
LOOK = 20  # updates between two looks at the control questions
PATIENCE = 3  # looks whose mean tells whether a fit is where it aims
SETTLING = 0.5  # as many updates more, over those done when a fit was seen to be at its end
STALLED = 10  # looks without progress after which a fit ends
SHORT = 4  # looks that tell whether a fit gets to its target in the updates that are left; if not, it is allowed more of its budget
MORE = 2.0  # times as much
LESS = 0.02  # by which the accuracy has to come down in so many looks, or the fit has stalled
NEARER = 0.05  # or so much of the margin before the fit, by which the right endings are above the others
RATE = 0.15  # of the multiplier's logarithm at each look, for a damage off by a factor of e
DAMPING = 1.0  # of what the multiplier's logarithm has on top, for a damage off by a factor of e as it is now
FARTHEST = 2.0  # factors of e above the budget beyond which no more is answered
LIMITS = (1e-2, 1e3)  # of the multiplier
GROWTH = 0.5  # of the logarithm of the steps' size at each look, in a fit in which nothing happens
FASTEST = 16.0  # times the learning rate, at most, that a fit in which nothing happens goes to
NUMBERS = 2**25  # log-probabilities of the unedited model that are kept in memory at most, of documents and of answers
ANSWERS = 0.25  # of the divergence on answers that counts
DOCUMENTS = 8  # of which a damage is read at least, at fewer tokens of each where not all fit
BATCH = 16
LOGGED = ("left", "target", "damage", "allowed", "budget", "retain_factor")  # columns that a budget adds to a fit's log

Reference = tuple[TokenBatch, Bool[Tensor, " tokens"], Float[Tensor, "counted d_vocab"]]


class Damage:
    """KL(unedited || edited) a token, in nats, on documents and on answers; the unedited model's side is computed once.

    Of the answers those tokens count that the unedited model predicts rightly, and a quarter of their divergence. What it does not
    know it cannot lose, and in a wording that it has never met, what it says changes with any edit. And where most tokens of a
    document follow from the ones before, an answer has only those that have to be known.

    Args:
        model: as it is before the fit, with the earlier edits on.
        encoder: of the model.
        documents: at least one. As many are read as their log-probabilities fit into 2^25 numbers (682 tokens of a vocabulary
            of 49,152, 262 of one of 128,256); of the answers as many again. Where not all fit, each counts at as many tokens,
            spread over it, as leave room for eight documents, since documents differ more than tokens of one do.
        answers: to questions. Where the model predicts none of them, the documents alone count.
    """

    def __init__(
        self, model: LensModel, encoder: Encoder, documents: Sequence[Encoded], answers: Sequence[Encoded] = ()
    ) -> None:
        self.model, self.encoder = model, encoder
        kinds = [(1.0, self._read(documents, known=False)), (ANSWERS, self._read(answers, known=True))]
        counts = [sum(gathered(sum(len(before) for _, _, before in kind))) for _, kind in kinds]
        self.reference = [(*kind, count) for kind, count in zip(kinds, counts, strict=True) if count]

    def _read(self, rows: Sequence[Encoded], *, known: bool) -> list[Reference]:
        """What the unedited model predicts there, at all counted tokens or at those where it is right."""
        read = []
        with torch.no_grad():
            fitting = _fitting(rows, NUMBERS // int(self.model.cfg.d_vocab))
            for _, batch in dealt(in_order(self.encoder, fitting, BATCH, logits=True)):
                before = predictions(self.model, batch)
                right = before.argmax(dim=-1) == targets(batch)
                counted = right if known else torch.ones_like(right)
                read.append((batch, counted, before[counted]))
        return read

    def __call__(self) -> float:
        """Of the model as it is now: that on documents or a quarter of that on answers, whichever is more."""
        with torch.no_grad():
            return max(share * (self._sum_of(kind) / count) for share, kind, count in self.reference)

    def _sum_of(self, reference: Sequence[Reference]) -> float:
        total = 0.0
        for batch, counted, before in reference:
            values = kl(before, predictions(self.model, batch)[counted])
            total += float(values.double().sum())
        return sum(gathered(total))


def counted_tokens(tokens: int) -> int:
    """Tokens of a document that a damage is measured at, at most, where so many of all documents fit together and there are more."""
    return max(1, tokens // DOCUMENTS)


def _fitting(rows: Sequence[Encoded], tokens: int) -> list[Encoded]:
    """The first of them, up to so many tokens to predict; at least one. Where not all fit, a long one counts at some of its tokens."""
    if sum(sum(row.in_loss[1:]) for row in rows) > tokens:
        rows = [_thinned(row, counted_tokens(tokens)) for row in rows]
    kept: list[Encoded] = []
    for row in rows:
        tokens -= sum(row.in_loss[1:])
        if kept and tokens < 0:
            break
        kept.append(row)
    return kept


def _thinned(row: Encoded, tokens: int) -> Encoded:
    """The same text, of whose tokens to predict so many count, evenly spread."""
    places = [place for place, counts in enumerate(row.in_loss) if counts and place]
    chosen = (
        {places[(2 * n + 1) * len(places) // (2 * tokens)] for n in range(tokens)}
        if len(places) > tokens
        else {*places}
    )
    return replace(row, in_loss=tuple(place in chosen for place in range(len(row.ids))))


class Budget(Callback):
    """Watches a fit: keeps the multiplier, ends the fit at its target, and tells how it ended.

    The log gets six columns: `left` (accuracy on the control questions) and `damage`, each as it was last looked at, beside `target`,
    `allowed` (what of the budget may be spent so far) and `budget`; and `retain_factor`, the multiplier of that update.

    Args:
        model: the model under training.
        damage: of the model as it is.
        control: questions on the forget set.
        nats: the damage that is allowed for.
        target: accuracy on the control questions to forget down to. None: what cannot be told from chance, with chance as the aim.
        holds: there is a retain loss to weigh; else the fit ends at the first damage above the budget.
        first: share of the budget that the fit keeps to until it is too slow with that.

    Attributes:
        aim: accuracy at which there is no more to forget.
        multiplier: factor on the retain loss's weight, 1 at the start.
        found: the damage when it was last looked at.
        allowed: the damage that the multiplier keeps to, nats a token.
        stalled: at the last look at the control questions the fit got no further.
        looks: how they were answered, before the fit and every 20 updates.
    """

    def __init__(
        self,
        model: LensModel,
        damage: Damage,
        control: ControlQuestions,
        *,
        nats: float,
        target: float | None,
        holds: bool = True,
        first: float = 1.0,
    ) -> None:
        self.model, self.damage, self.nats, self.holds = model, damage, nats, holds
        self.control, before = control.known_to(model)
        self.looks = [before]
        # Where nothing is asked the level of chance stays the target, at which every model is: what was forgotten is not known.
        self.target = self.control.target if target is None or not self.control.asks else target
        self.aim = self.control.chance if target is None else target
        self.multiplier, self.found = 1.0, 0.0
        self.allowed = first * nats
        if not self.control.asks:  # when the fit is done cannot be told
            self.allowed = nats
            logger.warning(
                "the texts of the forget set end too much alike for control questions: the fit makes all of its updates, unless Ctrl-C ends it"
            )
        elif target is None and self.before <= self.target:
            logger.warning(
                "the model answers %.2f of the control questions on the forget set, which is what guessing gives, so that the fit ends soon. If "
                "it knows the set all the same, fit with target=0.001: out of reach, it makes the fit spend its whole budget",
                self.before,
            )
        self.stalled = False
        self._allowed_since = 0  # looks before it became what it is
        self._lately_found: deque[float] = deque(maxlen=SHORT * LOOK // EVERY)
        self._level = 0.0  # of the multiplier's logarithm, on top of which it is damped

    @override
    def on_start(self, state: TrainingState) -> None:
        self._state, self._planned = state, state.steps

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        weighed = self.multiplier
        # Not at state.last: a fit that is told to stop goes on from here, with this look.
        if step + 1 < self._state.steps:
            self._look(step + 1)
        values = (self.looks[-1].accuracy, self.target, self.found, self.allowed, self.nats, weighed)
        self._state.rows[-1] |= dict(zip(LOGGED, values, strict=True))

    def _look(self, done: int) -> None:
        """What is due after so many updates: damage, control questions, and what follows from them."""
        state = self._state
        if done % EVERY == 0:
            with state.shown():
                self.found = self.damage()
            self._lately_found.append(self.found)
            if not self.holds and self.found > self.nats:
                state.steps = done
            self._follow(math.log(max(self.found, 1e-6) / self.allowed))
        if not self._settling and done % LOOK == 0:
            with state.shown():
                self.looks.append(self.control.asked_of(self.model))
            self.stalled = self._stalled()
            if self._needs_more(self._planned - done):
                self.allowed, self._allowed_since = min(self.nats, MORE * self.allowed), len(self.looks)
            if self._there() or self.stalled:
                state.steps = min(state.steps, done + max(1, round(SETTLING * done)))

    def _follow(self, off: float) -> None:
        """Move the multiplier, and if that is of no use the steps' size, for a damage that is off by so many factors of e."""
        if self._settling or (self.control.asks and self.looks[-1].accuracy <= self.aim):  # nothing is left to pay for
            off = max(0.0, off)
        least, most = LIMITS
        bounded = max(-1.0, min(1.0, off))
        if bounded < 0.0 and self.multiplier <= least and self._unmoved():
            self._state.pace = min(FASTEST, self._state.pace * math.exp(-GROWTH * bounded))
        self._level = min(math.log(most), max(math.log(least), self._level + RATE * bounded))
        damped = self._level + DAMPING * max(-1.0, min(FARTHEST, off))
        self.multiplier = min(most, max(least, math.exp(damped)))

    @property
    def before(self) -> float:
        """Accuracy on the control questions before the fit."""
        return self.looks[0].accuracy

    @property
    def _settling(self) -> bool:
        """Whether the fit is over but for the last updates, in which the learning rate falls to zero."""
        return self._state.steps < self._planned

    def _there(self) -> bool:
        return self.control.asks and self._lately() <= self.aim

    def _lately(self) -> float:
        """The mean accuracy of the last looks; of one that was not trained yet, infinite."""
        return fmean(look.accuracy for look in self.looks[-PATIENCE:]) if len(self.looks) > PATIENCE else math.inf

    def _unmoved(self) -> bool:
        """Whether the accuracy at the last look was that from before the fit, but for a tenth of the way."""
        return self.looks[-1].accuracy > self.before - MOVED * (self.before - self.aim)

    def _needs_more(self, updates: int) -> bool:
        """Whether the damage that is allowed so far is done, and the fit, not within a tenth of the way to its target, too slow with it
        to get there in so many updates."""
        spent = SPENT * self.allowed <= fmean(self._lately_found) and self.allowed < self.nats
        near = self.target + MOVED * (self.before - self.target)
        looks = self.looks[self._allowed_since :]
        if not spent or self._lately() <= near or len(looks) <= SHORT:
            return False
        courses = ([look.accuracy for look in looks], self.target), ([look.margin for look in looks], 0.0)
        missing = [(_fall(values, SHORT) / SHORT, min(values) - goal) for values, goal in courses]
        return not any(far > 0.0 and pace * updates / LOOK >= far for pace, far in missing)

    def _stalled(self) -> bool:
        """Whether accuracy and margin stay where they are, and would under a smaller multiplier and with larger steps: the damage
        allowed for is done, or there are none."""
        free = self.multiplier <= LIMITS[0] and (self._state.pace >= FASTEST or not self._unmoved())
        if not self.control.asks or len(self.looks) <= STALLED or not (self.found >= SPENT * self.allowed or free):
            return False
        margins = [look.margin for look in self.looks]
        nearer = margins[0] > 0.0 and _fall(margins, STALLED) >= NEARER * margins[0]
        return not (nearer or _fall([look.accuracy for look in self.looks], STALLED) >= LESS)

    def outcome(self, run: TrainingRun, *, earlier: float) -> Outcome:
        """How the fit ended; the edit is on. `earlier`: the damage of earlier requests, which is added up."""
        damage = self.damage()
        return Outcome.of(
            left=self.control.asked_of(self.model).accuracy,
            before=self.before,
            target=self.target,
            damage=damage,
            budget=self.nats,
            total=earlier + damage,
            steps=len(run.log),
            there=self._there(),
            stalled=self.stalled,
            interrupted=run.interrupted,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "multiplier": self.multiplier,
            "level": self._level,
            "found": self.found,
            "allowed": self.allowed,
            "allowed_since": self._allowed_since,
            "lately_found": list(self._lately_found),
            "stalled": self.stalled,
            "looks": [(look.accuracy, look.margin) for look in self.looks],
            "steps": self._state.steps,
            "pace": self._state.pace,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.multiplier, self.found = float(state["multiplier"]), float(state["found"])
        self._level = float(state["level"])
        self.allowed, self._allowed_since = float(state["allowed"]), int(state["allowed_since"])
        self._lately_found.extend(state["lately_found"])
        self.looks = [Answered(*look) for look in state["looks"]]
        self.stalled = bool(state["stalled"])
        self._state.steps, self._state.pace = int(state["steps"]), float(state["pace"])


def _fall(values: Sequence[float], last: int) -> float:
    """By how much the lowest of the last values is below the lowest before them."""
    return min(values[:-last]) - min(values[-last:])


def damage_of(edit: Edit | None) -> float:
    """The damage that the fits of an edit's parts and requests report, added up; 0 where none had a budget."""
    if edit is None:
        return 0.0
    records = [part.provenance for part in edit.parts]
    records += [entry for record in records for entry in record.get("requests", {}).values()]
    return float(sum(record["outcome"]["damage"] for record in records if record.get("outcome")))
