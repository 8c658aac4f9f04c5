"""Documents -> token batches with an attention mask, a mask of what is content, and a mask of what the loss counts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mrp_lens.corpus import Document

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch. Every mask is True where its name holds.

    Attributes:
        tokens: [batch, seq] token ids.
        attention_mask: a real token, not padding.
        content_mask: a real token other than a prepended BOS (whose state is the same in every text).
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


@dataclass(frozen=True)
class Encoded:
    """One document as token ids, with the same two flags per token as in a TokenBatch."""

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    in_loss: tuple[bool, ...]


@dataclass(frozen=True)
class Encoder:
    """How documents become tokens for one model."""

    tokenizer: Any
    prepend_bos: bool
    append_eos: bool
    max_length: int
    device: torch.device

    @classmethod
    def for_model(cls, model: Any, *, prepend_bos: bool | None = None, append_eos: bool = False) -> "Encoder":
        """BOS follows `cfg.default_prepend_bos` unless given; texts are cut at the context length `cfg.n_ctx`.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if model.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; set one with model.set_tokenizer(...) or load a folder that holds one"
            )
        bos = bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
        device = next(iter(model.parameters())).device
        return cls(
            model.tokenizer, bos and model.tokenizer.bos_token_id is not None, append_eos, int(model.cfg.n_ctx), device
        )

    def encode(self, documents: Iterable[Document]) -> list[Encoded]:
        """Tokenise prompt and completion as one text; a token that reaches into the completion counts in the loss."""
        documents = list(documents)
        if not documents:
            return []
        texts = [document.prompt + document.completion for document in documents]
        output = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        encoded = []
        for document, ids, offsets in zip(documents, output["input_ids"], output["offset_mapping"], strict=True):
            in_loss = [end > len(document.prompt) for _, end in offsets]
            content = [True] * len(ids)
            if self.prepend_bos:
                ids, in_loss, content = [self.tokenizer.bos_token_id, *ids], [False, *in_loss], [False, *content]
            if self.append_eos:
                ids, in_loss, content = [*ids, self.tokenizer.eos_token_id], [*in_loss, True], [*content, True]
            cut = slice(self.max_length)
            encoded.append(Encoded(tuple(ids[cut]), tuple(content[cut]), tuple(in_loss[cut])))
        return encoded

    def collate(self, rows: Sequence[Encoded], *, side: PaddingSide = "right") -> TokenBatch:
        """Pad to the longest row. The padding id is arbitrary: it is masked everywhere."""
        width = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def padded(values: Sequence[int | bool], fill: int | bool) -> list[int | bool]:
            gap = [fill] * (width - len(values))
            return [*values, *gap] if side == "right" else [*gap, *values]

        tokens = torch.tensor([padded(row.ids, pad) for row in rows])
        attention = torch.tensor([padded([True] * len(row.ids), False) for row in rows])
        content = torch.tensor([padded(row.content, False) for row in rows])
        predicted = torch.tensor([padded([False, *row.in_loss[1:]], False) for row in rows])
        return TokenBatch(tokens, attention, content, predicted).to(self.device)


def in_order(
    encoder: Encoder, rows: Sequence[Encoded], batch_size: int, *, side: PaddingSide = "right"
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Batches of similar length (least padding), each with the positions of its rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, encoder.collate([rows[i] for i in chosen], side=side)


def endless(rows: Sequence[Encoded], batch_size: int, generator: torch.Generator) -> Iterator[list[Encoded]]:
    """Random batches for ever: each pass over the rows in a new order drawn from `generator`.

    A batch is never larger than the number of rows.
    """
    size = min(batch_size, len(rows))
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        chosen, waiting = waiting[:size], waiting[size:]
        yield [rows[i] for i in chosen]
