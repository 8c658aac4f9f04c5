"""Documents -> token batches with an attention mask, a mask of what is content, and a mask of what the loss counts."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mrp_lens.data.documents import Document
from mrp_lens.utils.processes import shares
from mrp_lens.utils.validation import check_one_of, check_whole

PaddingSide = Literal["left", "right"]
Kept = Literal["start", "end"]

LOGITS = 2**24  # logits computed at once: 64 MiB in float32


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch. Every mask is True where its name holds.

    Attributes:
        tokens: [batch, seq] token ids.
        attention_mask: a real token, not padding.
        content_mask: a real token other than a BOS at the start (whose state is the same in every text).
        loss_mask: a token to be predicted: part of a completion, and not the first of its row.
    """

    tokens: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    content_mask: Bool[Tensor, "batch seq"]
    loss_mask: Bool[Tensor, "batch seq"]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on a device."""
        return TokenBatch(
            self.tokens.to(device),
            self.attention_mask.to(device),
            self.content_mask.to(device),
            self.loss_mask.to(device),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "TokenBatch":
        return TokenBatch(self.tokens[rows], self.attention_mask[rows], self.content_mask[rows], self.loss_mask[rows])


@dataclass(frozen=True)
class Encoded:
    """One document as token ids, with the same two flags per token as in a TokenBatch."""

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    in_loss: tuple[bool, ...]

    def at(self, places: Sequence[int]) -> "Encoded":
        """The tokens at these places alone."""
        return Encoded(
            tuple(self.ids[place] for place in places),
            tuple(self.content[place] for place in places),
            tuple(self.in_loss[place] for place in places),
        )

    def pieces(self, length: int) -> "list[Encoded]":
        """The text in pieces of at most so many tokens, at least two, BOS included, which each begins with if the text does; whole,
        if it is not longer or has a prompt, without which its completion says nothing. A last token that would be alone, with
        nothing before it that predicts it, is left out."""
        begins = 0 if not self.content or self.content[0] else 1
        body = range(begins, len(self.ids))
        if len(self.ids) <= length or not all(self.in_loss[place] for place in body if place):
            return [self]
        width = max(2, length - begins)
        starts = range(0, len(body) + begins - 1, width)
        return [self.at([*range(begins), *body[start : start + width]]) for start in starts]


@dataclass(frozen=True)
class Encoder:
    """How documents become tokens for one model, whose embedding has `rows` rows."""

    tokenizer: Any
    prepend_bos: bool
    append_eos: bool
    max_length: int
    rows: int
    device: torch.device

    def encode(self, documents: Iterable[Document], *, keep: Kept = "start", warn: bool = True) -> list[Encoded]:
        """Tokenise prompt and completion as one text; a token that reaches into the completion counts in the loss.

        Of documents over `max_length` the start is kept, or the end (and BOS): what a long prompt leads up to. A
        UserWarning tells how many were cut; without `warn`, for documents that are not the user's, nothing does.

        Raises:
            ValueError: a document with a token that the embedding has no row for.
        """
        documents = list(documents)
        encoded, long = self._encoded(documents, keep)
        if warn:
            self._warn_of_cuts(long, len(documents), keep)
        return encoded

    def fitted(self, rows: Sequence[Encoded], *, keep: Kept) -> list[Encoded]:
        """Rows that may be longer than `max_length`, cut as `encode` does, with its warning."""
        self._warn_of_cuts(sum(len(row.ids) > self.max_length for row in rows), len(rows), keep)
        return [self._cut(row, keep) for row in rows]

    def windows(self, documents: Sequence[Document], size: int) -> Iterator[list[Encoded]]:
        """`encode` for `size` documents at a time, so that memory does not grow with their number; one warning at the end."""
        cut = 0
        for start in range(0, len(documents), size):
            encoded, long = self._encoded(documents[start : start + size], "start")
            cut += long
            yield encoded
        self._warn_of_cuts(cut, len(documents), "start")

    def _encoded(self, documents: Sequence[Document], keep: Kept) -> tuple[list[Encoded], int]:
        """The documents, and how many of them were cut."""
        encoded = [self._flagged(ids, in_loss) for ids, in_loss in self._tokenised(documents)]
        self._check(encoded, documents)
        long = sum(len(row.ids) > self.max_length for row in encoded)
        return [self._cut(row, keep) for row in encoded], long

    def _check(self, encoded: Sequence[Encoded], documents: Sequence[Document]) -> None:
        """Refuse what no embedding can be looked up for."""
        known = range(self.rows).__contains__
        for row, document in zip(encoded, documents, strict=True):
            if not all(map(known, row.ids)):
                wrong = next(token for token in row.ids if not known(token))
                text = (document.prompt + document.completion)[:60]
                token = str(self.tokenizer.convert_ids_to_tokens(wrong)) if wrong >= 0 else "?"
                raise ValueError(f"in the text {text!r}, {without_row(token, wrong, self.rows)}")

    def _warn_of_cuts(self, cut: int, total: int, keep: Kept) -> None:
        if cut:
            warnings.warn(
                f"{cut} of {total} documents are longer than {self.max_length} tokens; only the {keep} of them is read",
                stacklevel=3,
            )

    def _tokenised(self, documents: Sequence[Document]) -> Iterator[tuple[list[int], list[bool]]]:
        """The ids of each document, and which of them reach into the completion."""
        if not documents:
            return
        texts = [document.prompt + document.completion for document in documents]
        if getattr(self.tokenizer, "is_fast", False):
            output = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for document, ids, offsets in zip(documents, output["input_ids"], output["offset_mapping"], strict=True):
                yield ids, [end > len(document.prompt) for _, end in offsets]
            return
        # A tokenizer in Python does not tell where in the text a token ends, but the tokens that the prompt alone
        # does not begin with are those that the completion has changed.
        whole = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = self.tokenizer([document.prompt for document in documents], add_special_tokens=False)["input_ids"]
        for ids, prompt in zip(whole, prompts, strict=True):
            common = next(
                (i for i, pair in enumerate(zip(ids, prompt, strict=False)) if pair[0] != pair[1]), len(prompt)
            )
            yield list(ids), [i >= common for i in range(len(ids))]

    def _flagged(self, ids: list[int], in_loss: list[bool]) -> Encoded:
        """With BOS and EOS. A BOS that the text begins with, such as a chat template's, is as good as ours."""
        bos = self.tokenizer.bos_token_id
        starts = bos is not None and ids[:1] == [bos]
        content = [True] * len(ids)
        if starts:
            in_loss, content = [False, *in_loss[1:]], [False, *content[1:]]
        elif self.prepend_bos:
            ids, in_loss, content = [bos, *ids], [False, *in_loss], [False, *content]
        if self.append_eos:
            ids, in_loss, content = [*ids, self.tokenizer.eos_token_id], [*in_loss, True], [*content, True]
        return Encoded(tuple(ids), tuple(content), tuple(in_loss))

    def _cut(self, row: Encoded, keep: Kept) -> Encoded:
        length = len(row.ids)
        if length <= self.max_length:
            return row
        head = self.max_length if keep == "start" else int(not row.content[0])  # a BOS stays where it is
        tail = self.max_length - head
        return row.at([*range(head), *range(length - tail, length)])

    def collate(self, rows: Sequence[Encoded], *, side: PaddingSide = "right") -> TokenBatch:
        """Pad to the longest row. The padding id is arbitrary: it is masked everywhere.

        Raises:
            ValueError: a side that is neither "right" nor "left".
        """
        check_one_of(PaddingSide, padding=side)
        width = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id if valid_id(self.tokenizer.pad_token_id, self.rows) else 0

        def padded(values: Sequence[int | bool], fill: int | bool) -> list[int | bool]:
            gap = [fill] * (width - len(values))
            return [*values, *gap] if side == "right" else [*gap, *values]

        tokens = torch.tensor([padded(row.ids, pad) for row in rows])
        attention = torch.tensor([padded([True] * len(row.ids), False) for row in rows])
        content = torch.tensor([padded(row.content, False) for row in rows])
        predicted = torch.tensor([padded([False, *row.in_loss[1:]], False) for row in rows])
        return TokenBatch(tokens, attention, content, predicted).to(self.device)


def in_order(
    encoder: Encoder, rows: Sequence[Encoded], batch_size: int, *, side: PaddingSide = "right", logits: bool = False
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Batches of similar length (least padding), each with the positions of its rows.

    Args:
        encoder: of the model.
        rows: to read.
        batch_size: rows a batch, at most.
        side: of the padding.
        logits: they are computed at every token that counts: fewer rows a batch where these would be more than 2^24 numbers, and none
            without such a token, as an empty text.

    Raises:
        TypeError, ValueError: a batch size that is no whole number, or below 1, which would read nothing.
    """
    check_whole(batch_size=batch_size)
    order = sorted(
        (i for i, row in enumerate(rows) if not logits or any(row.in_loss[1:])), key=lambda i: len(rows[i].ids)
    )
    sizes = [sum(rows[place].in_loss) * encoder.rows for place in order] if logits else [0] * len(order)
    for part in groups_within(sizes, batch_size):
        chosen = order[part]
        yield chosen, encoder.collate([rows[i] for i in chosen], side=side)


def groups_within(numbers: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours, at most so many a group and together no more than 2^24 numbers, unless one alone has more."""
    start, total = 0, 0
    for place, own in enumerate(numbers):
        if place > start and (place - start == most or total + own > LOGITS):
            yield slice(start, place)
            start, total = place, 0
        total += own
    if start < len(numbers):
        yield slice(start, len(numbers))


def parts_of(batch: TokenBatch, micro_batch: int | None, *, d_vocab: int | None = None) -> Iterator[TokenBatch]:
    """The batch in parts of at most `micro_batch` rows, padding as in the whole; of several processes that train together each has
    its share of the rows.

    Without `micro_batch` it is whole, or, with `d_vocab`, in parts whose logits at the tokens that count are at most 2^24 numbers.
    """
    for rows in shares(len(batch), micro_batch or rows_within(batch, d_vocab)):
        yield batch[rows]


def rows_within(batch: TokenBatch, d_vocab: int | None) -> int:
    """Rows of a batch that have `rows_with_logits`; all where no logits are computed."""
    longest = int(batch.loss_mask.sum(dim=1).max()) if d_vocab is not None else 0
    return rows_with_logits(longest, d_vocab) if longest and d_vocab else max(1, len(batch))


def rows_with_logits(tokens: int, d_vocab: int) -> int:
    """Rows, at least one, of so many tokens that count, whose logits are at most 2^24 numbers."""
    return max(1, LOGITS // (tokens * d_vocab))


class Batches(Iterator[list[Encoded]]):
    """Random batches for ever: each pass over the rows in a new order drawn from `generator`.

    A batch is never larger than the number of rows. `state_dict` holds what is left of the pass under way, so that a fit
    can go on in another process; the generator's own state is kept by whoever owns it.

    Args:
        rows: texts.
        batch_size: of them at a time.
        generator: draws.
        length: of a longer text a batch has one of its `pieces`, drawn anew each time. None: all of it.
    """

    def __init__(
        self, rows: Sequence[Encoded], batch_size: int, generator: torch.Generator, *, length: int | None = None
    ) -> None:
        self.rows, self.size, self.generator = rows, min(batch_size, len(rows)), generator
        self.pieces = [[row] if length is None else row.pieces(length) for row in rows]
        self.waiting: list[int] = []

    @property
    def texts(self) -> list[Encoded]:
        """Every text that a batch may have."""
        return [piece for pieces in self.pieces for piece in pieces]

    def __next__(self) -> list[Encoded]:
        while len(self.waiting) < self.size:
            self.waiting += torch.randperm(len(self.rows), generator=self.generator).tolist()
        chosen, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        return [self._piece(self.pieces[i]) for i in chosen]

    def _piece(self, pieces: Sequence[Encoded]) -> Encoded:
        return pieces[int(torch.randint(len(pieces), (1,), generator=self.generator)) if len(pieces) > 1 else 0]

    def state_dict(self) -> dict[str, Any]:
        """The rows that this pass has still to come to."""
        return {"waiting": list(self.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is that of other rows.
        """
        if not all(isinstance(place, int) and 0 <= place < len(self.rows) for place in state["waiting"]):
            raise ValueError(f"it waits for rows beyond the {len(self.rows)} there are")
        self.waiting = list(state["waiting"])


class BatchesInTurn(Batches):
    """Batches for ever in the order of the rows, each pass the same; the last of a pass may be smaller."""

    def __init__(self, rows: Sequence[Encoded], batch_size: int) -> None:
        super().__init__(rows, batch_size, torch.Generator())

    def __next__(self) -> list[Encoded]:
        if not self.waiting:
            self.waiting = list(range(len(self.rows)))
        chosen, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        return [self.rows[i] for i in chosen]


def valid_id(token: Any, rows: int) -> bool:
    """Whether the embedding has a row for a token id."""
    return isinstance(token, int) and 0 <= token < rows


def without_row(text: str, token: int, rows: int) -> str:
    """What is wrong with a token id, and what helps."""
    return (
        f"the token {text!r} has id {token}, and the model's embedding has {rows} rows (0..{rows - 1}); pass the tokenizer that the model "
        "was trained with, or resize the model first: hf_model.resize_token_embeddings(len(tokenizer)), then load_model(hf_model, tokenizer=...)"
    )
