"""Generated answers, the same on both TransformerLens classes."""

from collections.abc import Sequence

import torch

from mrp_lens.batching import Encoder
from mrp_lens.corpus import Document
from mrp_lens.model import LensModel
from mrp_lens.stream import frozen


def continuations(model: LensModel, prompts: Sequence[str], *, max_new_tokens: int = 12) -> list[str]:
    """What the model writes after each prompt: greedy, up to the end-of-text token, special tokens left out."""
    encoder = Encoder.for_model(model)
    answers = []
    with frozen(model), torch.no_grad():
        for row in encoder.encode([Document("", prompt) for prompt in prompts]):
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
