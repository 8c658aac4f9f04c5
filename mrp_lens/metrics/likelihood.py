"""How likely what counts in rows of tokens is to a model, over as few tokens as it takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mrp_lens.data.tokenization import Encoded, Encoder, groups_within, in_order
from mrp_lens.models import LensModel
from mrp_lens.models.base import same_positions
from mrp_lens.models.hooks import frozen
from mrp_lens.models.memory import ran_out
from mrp_lens.models.prefix import Continued, logits_behind, reads_prefixes
from mrp_lens.training.losses import predictions, rows_at_once
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.sequences import common_start
from mrp_lens.utils.validation import check_whole

SHORTEST = 4  # tokens that rows have to have in common before these are read once for all of them


def mean_log_probabilities(
    model: LensModel,
    encoder: Encoder,
    rows: Sequence[Encoded],
    sizes: Sequence[int],
    *,
    batch_size: int,
    progress: bool = True,
) -> list[NDArray[np.float64]]:
    """The mean log-probability (nats) of the tokens that count in each row, grouped as the rows are.

    Within a group one pass over a row also scores those that share its tokens up to their own last one: where every
    choice of a question is a single token, one pass a question. Where there are several, what they begin with is read once;
    so is what all groups begin with.
    -infinity where the model rules a token out.

    Args:
        model: with the edit on, if there is one.
        encoder: the model's.
        rows: in which a token counts, and never the first one.
        sizes: of the groups of rows that may share passes, such as the choices of a question.
        batch_size: passes at a time.
        progress: show a progress bar.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    check_whole(batch_size=batch_size)
    places = [_counted(row) for row in rows]
    groups: list[list[_Pass]] = []
    start = 0
    for size in sizes:
        groups.append(_passes(model, rows, range(start, start + size), places))
        start += size
    values = np.full(len(rows), np.nan)
    bar = progress_bar(total=sum(map(len, groups)), desc="scoring choices", progress=progress)
    with frozen(model), torch.no_grad(), bar:
        for passes, predicted in _predicted(model, encoder, groups, batch_size):
            scored: list[int] = []
            lines: list[int] = []
            begin = 0
            for each in passes:
                line = {place: begin + i for i, place in enumerate(_counted(each.row))}
                begin += len(line)
                scored += each.scored
                lines += [line[place] for row in each.scored for place in places[row]]
            ids = [rows[row].ids[place] for row in scored for place in places[row]]
            found = predicted[lines, ids].double().cpu().numpy()
            ends = np.cumsum([len(places[row]) for row in scored])
            values[scored] = [part.mean() for part in np.split(found, ends[:-1])]
            bar.update(len(passes))
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []


@dataclass(frozen=True)
class _Pass:
    """A row that is read, and the numbers of the rows that it scores: their tokens but the last are its first ones."""

    row: Encoded
    scored: list[int]

    def marked(self, places: Sequence[Sequence[int]]) -> "_Pass":
        """With every place in the loss at which one of the scored rows has a token that counts.

        These are not the row's own: where a token holds the end of the prompt and the beginning of one choice, and two
        tokens do for another, the same place belongs to the prompt of one and to the other choice itself.
        """
        wanted = {place for number in self.scored for place in places[number]}
        row = replace(self.row, in_loss=tuple(place in wanted for place in range(len(self.row.ids))))
        return replace(self, row=row)


def _passes(
    model: LensModel, rows: Sequence[Encoded], numbers: Sequence[int], places: Sequence[Sequence[int]]
) -> list[_Pass]:
    """Those that it takes to score the rows of a group."""
    found: list[_Pass] = []
    for number in sorted(numbers, key=lambda n: -len(rows[n].ids)):
        context, length = rows[number].ids[:-1], len(rows[number].ids)
        alike = (it for it in found if it.row.ids[: len(context)] == context)
        known = next((it for it in alike if same_positions(model, len(it.row.ids), length)), None)
        if known is None:
            known = _Pass(rows[number], [])
            found.append(known)
        known.scored.append(number)
    return [each.marked(places) for each in found]


def _predicted(
    model: LensModel, encoder: Encoder, groups: Sequence[Sequence[_Pass]], batch_size: int
) -> Iterator[tuple[list[_Pass], Float[Tensor, "counted d_vocab"]]]:
    """Batches of passes, with the log-probabilities at the places that count in them, pass by pass."""
    alike = sorted((_Alike.of(group) for group in groups), key=lambda group: group.length)
    shared = [group for group in alike if group.length >= SHORTEST]
    if all(len(group.passes) == 1 for group in shared):  # then there is nothing to share but what all groups begin with
        starts = [group.passes[0].row.ids[: group.length] for group in shared]
        shared = shared if len(shared) > 1 and common_start(starts) >= SHORTEST else []
    if shared:
        longest = max(shared, key=lambda group: max(len(each.row.ids) for each in group.passes) - group.length)
        tried = [
            replace(group, passes=(group.passes[0], group.passes[-1])) for group in (longest, shared[0], shared[-1])
        ]
        if not reads_prefixes(model, _behind(tried, encoder)):
            shared = []
    whole = [each for group in alike if not (shared and group.length >= SHORTEST) for each in group.passes]
    counts = [sum(len(_counted(each.row)) for each in group.passes) for group in shared]
    most = max(1, batch_size // max(len(group.passes) for group in shared)) if shared else 1
    for part in groups_within([count * encoder.rows for count in counts], most):
        passes = [each for group in shared[part] for each in group.passes]
        found = _read_behind(model, _behind(shared[part], encoder))
        if found is None:
            whole += passes
        else:
            yield passes, found
    for chosen, read in in_order(encoder, [each.row for each in whole], batch_size, logits=True):
        yield [whole[number] for number in chosen], predictions(model, read)


def _read_behind(model: LensModel, texts: Continued) -> Float[Tensor, "counted d_vocab"] | None:
    """Their log-probabilities; None where whole passes have to say where NaN comes from, or take less memory."""
    try:
        found = logits_behind(model, texts).float()
        for rows in found.split(rows_at_once(found)):  # in their place: they are as much memory as all else
            rows.copy_(rows.log_softmax(-1))
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None
    return None if bool(found.isnan().any()) else found


@dataclass(frozen=True)
class _Alike:
    """Passes, the longest first, that begin with so many tokens in common before any of them counts."""

    passes: Sequence[_Pass]
    length: int

    @classmethod
    def of(cls, passes: Sequence[_Pass]) -> "_Alike":
        first = min(_counted(each.row)[0] for each in passes)
        return cls(passes, min(first, common_start(each.row.ids[:-1] for each in passes)))


def _behind(groups: Sequence[_Alike], encoder: Encoder) -> Continued:
    """What the groups begin with, and what follows in each pass, with the tokens that count."""
    prefixes = [group.passes[0].row.at(range(group.length)) for group in groups]
    owner = [place for place, group in enumerate(groups) for _ in group.passes]
    rests = [each.row.at(range(group.length, len(each.row.ids))) for group in groups for each in group.passes]
    rest = encoder.collate(rests, side="right")
    wanted = [[*row.in_loss, *[False] * (rest.tokens.shape[1] - len(row.ids))] for row in rests]
    return Continued(
        encoder.collate(prefixes, side="right"),
        torch.tensor(owner, device=encoder.device),
        rest,
        torch.tensor(wanted, device=encoder.device),
    )


def _counted(row: Encoded) -> list[int]:
    return [place for place, counts in enumerate(row.in_loss) if counts]
