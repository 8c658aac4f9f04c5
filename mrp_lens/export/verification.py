"""The proof of an export: reloaded in a fresh process, it computes what the model with its hooks computes."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.edits import Edit, edit_on
from mrp_lens.export import reload
from mrp_lens.models import LensModel, device_of, devices_of, encoder_for, logits_of
from mrp_lens.models.hooks import frozen

ALLOWED = 1e-4  # largest difference of a log-probability, in float32
# Beyond these the base folder holds another model: nats in float32, rms over spread in half precision.
ALLOWED_UNEDITED, ALLOWED_UNEDITED_COARSE = 1e-3, 0.1
ALLOWED_RATIO = 2.0  # in half precision: rms difference over spread, relative to the unedited model's
FINE = (torch.float32, torch.float64)
LONGEST = 64  # tokens of each text that are compared

TEXTS = (
    "The old lighthouse keeper climbed the stairs every evening and lit the lamp before the fog came in.",
    "In 1969 two people walked on the Moon for the first time, and half a billion others watched them do it.",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
    "Bread is made of flour, water, salt and yeast; the dough rises for an hour, then goes into a hot oven.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level, and at lower temperatures high up in the mountains.",
)

# On these tokenizers part that look alike on plain sentences.
SPLIT = (
    "",
    "  two  spaces\n\n\tand a tab ",
    "caf\u00e9, cafe\u0301 and 10 \u212b",
    "a<s>b</s><unk><pad><|endoftext|>",
    "\u4f60\u597d \U0001f600 1,234.5",
)


class ExportMismatchError(ValueError):
    """What was written does not compute what the edited model computes."""


@dataclass(frozen=True)
class Difference:
    """Between two models' log-probabilities of the same tokens.

    Attributes:
        largest: in nats.
        rms: root mean square, over the spread of the reference's log-probabilities.
    """

    largest: float
    rms: float

    @classmethod
    def between(cls, reference: Float[Tensor, "n d_vocab"], other: Float[Tensor, "n d_vocab"]) -> "Difference":
        """Of the second from the first."""
        off = (reference - other).double()
        return cls(float(off.abs().max()), float(off.square().mean().sqrt() / reference.double().std()))


@dataclass(frozen=True)
class Proof:
    """What the comparison found.

    Attributes:
        dtype: the precision in which Hugging Face's model was loaded.
        tokens: predictions compared.
        edited: the exported model against the hooked one.
        unedited: the base model against the unedited one: what the two libraries differ by anyway.
        rounding: in half precision, where the two libraries compute the same bits: the base model in float32 against
            itself in half precision. Else None.
    """

    dtype: torch.dtype
    tokens: int
    edited: Difference
    unedited: Difference
    rounding: Difference | None = None

    @property
    def same_base(self) -> bool:
        """Whether the two unedited models are one."""
        if self.dtype in FINE:
            return self.unedited.largest <= ALLOWED_UNEDITED
        return self.unedited.rms <= ALLOWED_UNEDITED_COARSE

    @property
    def exact(self) -> bool:
        """Within 1e-4 nats in float32; in half precision within twice the unedited model's difference."""
        if self.dtype in FINE:
            return self.edited.largest <= ALLOWED
        return self.edited.rms <= ALLOWED_RATIO * (self.rounding or self.unedited).rms

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        if self.dtype in FINE:
            return (
                f"largest difference of {self.tokens} predictions' log-probabilities in {precision}: {self.edited.largest:.1e} "
                f"(allowed {ALLOWED:.0e}; the unedited models': {self.unedited.largest:.1e})"
            )
        known = self.rounding or self.unedited  # the former where the unedited models agree bit for bit
        whose = "the unedited models'" if self.rounding is None else f"what {precision} itself changes"
        return (
            f"rms difference of {self.tokens} predictions' log-probabilities in {precision}, over their spread: {self.edited.rms:.1e} "
            f"(allowed {ALLOWED_RATIO * known.rms:.1e}: twice {whose}, {known.rms:.1e})"
        )


def prove(
    model: LensModel,
    edit: Edit,
    *,
    folder: Path,
    base: Path,
    form: str,
    texts: Corpus,
    dtype: torch.dtype,
    tokenizer: Any = None,
) -> Proof:
    """Compare an exported folder, loaded in a fresh process, with the hooked model.

    Args:
        model: without the edit.
        edit: what was exported.
        folder: where to.
        base: the checkpoint that it was made from.
        form: "folded", "module" or "adapter".
        texts: what is compared on.
        dtype: the precision in which Hugging Face's models are loaded.
        tokenizer: what was exported; None: that of the base folder.

    Raises:
        ValueError: the base folder holds another model than `model`.
        ExportMismatchError: the folder does not load, splits texts into other tokens, or computes something else.
    """
    batch = batch_of(model, texts)
    with frozen(model), torch.no_grad():
        unedited = _log_probabilities(model, batch)
        with edit_on(model, edit):
            edited = _log_probabilities(model, batch)
    adapter = form == "adapter"
    device = device_of(model) if len(devices_of(model)) == 1 else torch.device("cpu")  # one may be too small
    from_base = not adapter and tokenizer is None
    plain = {"folder": str(base), "trust_remote_code": False, "edit": None, "tokenizer": from_base}
    found = _in_fresh_process(
        {
            "base": plain,
            "exported": {
                "folder": str(base if adapter else folder),
                "trust_remote_code": form == "module",
                "edit": str(folder) if adapter else None,
                "tokenizer": not adapter,
            },
        },
        batch,
        texts,
        dtype,
        device,
    )
    mask = batch.attention_mask.cpu()
    unedited_hf = found["base"]["log_probabilities"][mask]
    proof = Proof(
        dtype,
        int(mask.sum()),
        Difference.between(edited, found["exported"]["log_probabilities"][mask]),
        Difference.between(unedited, unedited_hf),
    )
    if dtype not in FINE and proof.unedited.rms == 0.0:
        wide = _in_fresh_process({"base": plain}, batch, texts, torch.float32, device)["base"]["log_probabilities"][
            mask
        ]
        proof = replace(proof, rounding=Difference.between(wide, unedited_hf))
    if not proof.same_base:
        raise ValueError(
            f"{base} is not the checkpoint of this model: its log-probabilities differ by {proof.unedited.largest:.2g} even without the "
            "edit. Give base=FOLDER of the checkpoint that the model was loaded from"
        )
    if not adapter:
        wanted = found["base"]["token_ids"] if tokenizer is None else reload.token_ids(tokenizer, split_by(texts))
        if not torch.equal(wanted, found["exported"]["token_ids"]):
            whose = "that of the base folder" if tokenizer is None else "that of the model"
            raise ExportMismatchError(f"the exported tokenizer splits texts into other tokens than {whose}")
    if not proof.exact:
        raise ExportMismatchError(f"the exported model is not the edited one: {proof}")
    return proof


def batch_of(model: LensModel, texts: Corpus) -> TokenBatch:
    """The beginnings of the texts, padded on the right, on the model's device."""
    encoder = encoder_for(model, max_length=min(LONGEST, int(model.cfg.n_ctx)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*longer than \d+ tokens")  # beginnings are what is wanted
        return encoder.collate(encoder.encode(texts.documents), side="right")


def split_by(corpus: Corpus) -> list[str]:
    """What both tokenizers have to split alike."""
    return [*SPLIT, *(document.prompt + document.completion for document in corpus.documents)]


def _log_probabilities(model: LensModel, batch: TokenBatch) -> Float[Tensor, "n d_vocab"]:
    logits = logits_of(model, batch.tokens, batch.attention_mask)[batch.attention_mask]
    return logits.float().log_softmax(-1).cpu()


def _in_fresh_process(
    models: Mapping[str, dict[str, Any]], batch: TokenBatch, texts: Corpus, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Run `reload.py` on these models.

    Raises:
        ExportMismatchError: one does not load.
    """
    with tempfile.TemporaryDirectory(prefix="mrp-lens-proof-") as temporary:
        place = Path(temporary)
        tokens = {"tokens": batch.tokens.cpu(), "attention_mask": batch.attention_mask.long().cpu()}
        save_file(tokens, place / "tokens.safetensors")
        results = {name: place / f"{name}.safetensors" for name in models}
        job = {
            "tokens": str(place / "tokens.safetensors"),
            "texts": split_by(texts),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "models": [{**settings, "result": str(results[name])} for name, settings in models.items()],
        }
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # Nothing may come from the network, and no code of the folder may stay in the user's cache.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
        command = [sys.executable, "-P", str(Path(str(reload.__file__))), str(place / "job.json")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            last = ended.stderr.strip().splitlines()[-1:] or [f"it ended with {ended.returncode}"]
            raise ExportMismatchError(f"the exported model could not be loaded in a fresh process: {last[0]}")
        return {name: load_file(file) for name, file in results.items()}
