"""What a model writes: answers, the same on both TransformerLens classes, and texts of its own."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from mrp_lens.batching import Encoder
from mrp_lens.corpus import Document
from mrp_lens.model import LensModel, device_of
from mrp_lens.stream import frozen

AT_ONCE = 256  # texts written side by side


def continuations(model: LensModel, prompts: Sequence[str], *, max_new_tokens: int = 12) -> list[str]:
    """What the model writes after each prompt: greedy, up to the end-of-text token, special tokens left out.

    Raises:
        ValueError: an empty prompt, where the tokenizer has no BOS to start from.
    """
    encoder = Encoder.for_model(model)
    answers = []
    with frozen(model), torch.no_grad():
        for row in encoder.encode([Document("", prompt) for prompt in prompts]):
            if not row.ids:
                raise ValueError(
                    "a prompt is empty, and this model's texts start without BOS: there is nothing to go on from"
                )
            tokens = torch.tensor([row.ids], device=encoder.device)
            output = model.generate(
                tokens,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stop_at_eos=model.tokenizer.eos_token_id is not None,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
            answers.append(str(model.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)).strip())
    return answers


def written_texts(
    model: LensModel, count: int, *, max_new_tokens: int, generator: torch.Generator, progress: bool = True
) -> list[str]:
    """Texts that the model writes from nothing, sampled at temperature 1; no text twice, in order of the alphabet.

    Args:
        model: HookedTransformer or TransformerBridge.
        count: how many are sampled; equal ones count once, so fewer may be left.
        max_new_tokens: length at most; a text ends before its end-of-text token.
        generator: gives the seed; the global random state is left as it is.
        progress: show a progress bar.

    Raises:
        ValueError: the tokenizer has neither BOS nor EOS to start from.
    """
    tokenizer, start = model.tokenizer, start_token(model)
    texts: set[str] = set()
    device = device_of(model)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with (
        frozen(model),
        torch.no_grad(),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        tqdm(total=count, desc="texts", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for begun in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - begun)
            output = model.generate(
                torch.full((size, 1), start, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                stop_at_eos=tokenizer.eos_token_id is not None,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
            texts.update(tokenizer.decode(row[1:], skip_special_tokens=True).strip() for row in output)
            bar.update(size)
    return sorted(texts - {""})


def start_token(model: LensModel) -> int:
    """What a text of the model's own starts from: BOS, or EOS where there is none.

    A text from nothing needs a token to start behind. Models without BOS are trained on documents with EOS between
    them, so EOS is what comes before a text there; a text that is given (`Encoder`) still starts with its own first token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("this model's tokenizer has neither a BOS nor an EOS token, so it cannot start texts of its own")
