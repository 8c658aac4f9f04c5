"""What plain torch and transformers say: no batch, no padding, one document at a time, hooks placed by hand.

Never imports mrp_lens: where the two disagree, this is right.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# TransformerLens starts a text with BOS by default, but not for these (model_type); a tokenizer without BOS never does.
WITHOUT_BOS = ("gpt_neox", "qwen2", "qwen3", "qwen3_moe")

# model_type -> (blocks, attention, MLP, norm between attention and MLP, MLP's output matrix), all but the first inside a block.
# Attention and MLP are the modules whose output is added to the stream.
PLACES: dict[str, tuple[str, str, str, str, str]] = {
    "gpt2": ("transformer.h", "attn", "mlp", "ln_2", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "post_attention_layernorm", "mlp.dense_4h_to_h"),
    "gemma2": (
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "mlp.down_proj",
    ),
}
LLAMA = ("model.layers", "self_attn", "mlp", "post_attention_layernorm", "mlp.down_proj")


@dataclass(frozen=True)
class Row:
    """Token ids; which count (they reach into the completion, and something comes before); which are content, not BOS."""

    ids: list[int]
    counts: list[bool]
    content: list[bool]


class Plain:
    """A plain model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        kind = model.config.model_type
        bos = tokenizer.bos_token_id
        self.start = [] if bos is None or kind in WITHOUT_BOS else [bos]
        self.context = int(model.config.max_position_embeddings)
        self.places = PLACES.get(kind, LLAMA)

    def row(self, prompt: str, completion: str, *, keep: str = "start", tokens: int | None = None) -> Row:
        """Prompt and completion as one text, up to so many tokens that count; of one over the context its start, or BOS and
        its end."""
        output = self.tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        n = len(self.start)
        ids = [*self.start, *output["input_ids"]]
        counts = [False] * n + [end > len(prompt) for _, end in output["offset_mapping"]]
        content = [False] * n + [True] * (len(ids) - n)
        counted = [i for i, counts_too in enumerate(counts) if counts_too and i > 0]
        if tokens is not None and counted:
            ids = ids[: counted[:tokens][-1] + 1]
        places = list(range(len(ids)))
        if len(ids) > self.context:
            head = self.context if keep == "start" else n
            tail = self.context - head
            places = [*range(head), *range(len(ids) - tail, len(ids))]
        counts = [counts[i] for i in places]
        return Row([ids[i] for i in places], [False, *counts[1:]], [content[i] for i in places])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[tokens, vocabulary], in float32."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.float()

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        return self.logits(ids).log_softmax(-1)

    def counted(self, row: Row) -> list[float]:
        """The log-probability of every token that counts."""
        table = self.log_probabilities(row.ids)
        return [float(table[i - 1, row.ids[i]]) for i, counts in enumerate(row.counts) if counts]

    def choice_score(self, prompt: str, choice: str) -> float:
        """Mean log-probability of the tokens that reach into the choice."""
        values = self.counted(self.row(prompt, choice, keep="end"))
        return sum(values) / len(values)

    def mean_surprise(self, documents: Sequence[tuple[str, str]]) -> tuple[float, int]:
        """Minus the mean log-probability of all tokens that count, and how many do."""
        values = [value for prompt, completion in documents for value in self.counted(self.row(prompt, completion))]
        return -sum(values) / len(values), len(values)

    def confidence(self, prompt: str, answer: str, tokens: int) -> list[tuple[int, list[float]]]:
        """For every token of the answer, at most so many: its id and the figures of `measures` where it is predicted.

        What follows the last of them is not read: under "longrope" it could change them.
        """
        row = self.row(prompt, answer, keep="end", tokens=tokens)
        places = [i for i, counts in enumerate(row.counts) if counts]
        if not places:  # an empty text
            return []
        table = self.logits(row.ids)
        return [(row.ids[i], measures(table[i - 1], row.ids[i])) for i in places]

    def greedy(self, prompt: str, tokens: int) -> list[tuple[int, list[float]]]:
        """The likeliest token again and again, up to the end of text; as `confidence`."""
        ids = list(self.row("", prompt).ids)
        found = []
        for _ in range(tokens):
            last = self.logits(ids)[-1]
            token = int(last.argmax())
            found.append((token, measures(last, token)))
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                break
        return found

    def block(self, layer: int) -> nn.Module:
        found: nn.Module = self.model.get_submodule(f"{self.places[0]}.{layer}")
        return found

    def matrix_name(self, layer: int) -> str:
        """The parameter of the MLP's output matrix."""
        return f"{self.places[0]}.{layer}.{self.places[4]}.weight"

    def project(self, layer: int, site: str, rows: Tensor, gate: tuple[Tensor, float, float] | None = None) -> None:
        """From now on h <- h - g (h Q^T) Q there, in float64; g is 1, or with a gate (w, b, s) the logistic function of
        s (h.w / |h| - b)."""
        wide = rows.double()
        keep = torch.eye(wide.shape[1], dtype=torch.float64) - wide.T @ wide

        def change(states: Tensor) -> Tensor:
            if gate is None:
                return states @ keep
            w, b, s = gate
            cosine = (states * w.double()).sum(-1, keepdim=True) / states.square().sum(-1, keepdim=True).sqrt()
            share = 1.0 / (1.0 + (-s * (cosine - b)).exp())
            return (1.0 - share) * states + share * (states @ keep)

        place_projection(self.block(layer), site, change, self.places)


def measures(logits: Tensor, token: int) -> list[float]:
    """Largest logit, largest probability, entropy, margin of log-probability, probability of the token."""
    table = logits.float().log_softmax(-1)
    first, second = table.sort(descending=True).values[:2].tolist()
    entropy = -sum(p * q for p, q in zip(table.exp().tolist(), table.tolist(), strict=True) if p > 0)
    return [float(logits.max()), float(table.exp().max()), entropy, first - second, float(table[token].exp())]


def place_projection(block: nn.Module, site: str, change: Callable[[Tensor], Tensor], places: tuple[str, ...]) -> None:
    """Hooks on one block of a plain model; the change is one of states in float64."""
    _, attention, mlp, norm, _ = places

    def apply(states: Tensor) -> Tensor:
        return change(states.double()).to(states.dtype)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    if site == "resid_post":
        block.register_forward_hook(on_output)
    elif site == "resid_pre":
        block.register_forward_pre_hook(lambda module, args: (apply(args[0]), *args[1:]))
    elif site in ("attn_out", "mlp_out"):
        block.get_submodule(attention if site == "attn_out" else mlp).register_forward_hook(on_output)
    else:  # resid_mid: the norm sees the projected sum; what the block carries past it loses the same part
        lost: list[Tensor] = []

        def on_norm(module: nn.Module, args: Any) -> Any:
            lost[:] = [args[0].double() - change(args[0].double())]
            return (apply(args[0]),)

        def on_block(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return ((output[0].double() - lost[0]).to(output[0].dtype), *output[1:])
            return (output.double() - lost[0]).to(output.dtype)

        block.get_submodule(norm).register_forward_pre_hook(on_norm)
        block.register_forward_hook(on_block)


@dataclass(frozen=True)
class RmuSettings:
    """Of a few steps of RMU over batches in the order of the texts."""

    layer: int
    coefficient: float
    alpha: float
    lr: float
    eps: float
    steps: int
    batch_size: int


def rmu(
    plain: Plain, forget: Sequence[str], retain: Sequence[str], direction: Tensor, settings: RmuSettings
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The matrices of layers l-2, l-1, l after the steps, by name; and the losses of every step.

    L = mean over forget tokens of ||h_l - c u||^2 / d + alpha * the same over retain tokens of h_l - h_l^frozen, BOS left
    out; AdamW without weight decay on float32 copies.
    """
    model, layer = copy.deepcopy(plain.model), settings.layer
    names = [plain.matrix_name(number) for number in range(max(0, layer - 2), layer + 1)]
    held = dict(model.named_parameters())
    masters = {name: held[name].detach().float().clone().requires_grad_() for name in names}
    optimizer = torch.optim.AdamW(masters.values(), lr=settings.lr, eps=settings.eps, weight_decay=0.0)
    kept: list[Tensor] = []
    model.get_submodule(f"{plain.places[0]}.{layer}").register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )

    def states(row: Row, weights: dict[str, Tensor]) -> Tensor:
        kept.clear()
        torch.func.functional_call(model, weights, (), {"input_ids": torch.tensor([row.ids]), "use_cache": False})
        return kept[0][0].float()[torch.tensor(row.content)]

    def batch_loss(rows: Sequence[Row], target: Callable[[Row], Tensor]) -> Tensor:
        used = {name: master.to(held[name].dtype) for name, master in masters.items()}
        errors = [(states(row, used) - target(row)).square() for row in rows]
        return torch.cat(errors).mean()

    def unchanged(row: Row) -> Tensor:
        with torch.no_grad():
            return states(row, {})

    def batch(texts: Sequence[str], step: int) -> list[Row]:
        groups = [texts[i : i + settings.batch_size] for i in range(0, len(texts), settings.batch_size)]
        return [plain.row("", text) for text in groups[step % len(groups)]]

    log = []
    for step in range(settings.steps):
        misdirect = batch_loss(batch(forget, step), lambda row: settings.coefficient * direction)
        hold = batch_loss(batch(retain, step), unchanged)
        optimizer.zero_grad()
        (misdirect + settings.alpha * hold).backward()
        optimizer.step()
        log.append({"forget": float(misdirect.detach()), "retain": float(hold.detach())})
    return {name: master.detach() for name, master in masters.items()}, log
