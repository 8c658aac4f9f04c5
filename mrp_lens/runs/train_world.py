"""How the model that knows the invented world is trained: `python -m mrp_lens.runs.train_world --out DIR`."""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrp_lens.data.world.facts import World
from mrp_lens.training import train
from mrp_lens.training.optim import warmup_cosine

LARGEST_VOCABULARY = 2048
COMMON = 60  # pieces of words at least this frequent become one token; the names of entities become several
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer, so that any text a user types can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY,
        min_frequency=COMMON,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


def train_world(world: World, out: Path, *, steps: int, batch_size: int, lr: float, progress: bool = True) -> None:
    """Train on `world.training_texts()` and write a Hugging Face folder (float16) plus `world.json`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = world.training_texts()
    tokenizer = train_tokenizer(texts)
    rows = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    with torch.random.fork_rng():
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=False,
                **ARCHITECTURE,
            )
        )
    generator = torch.Generator().manual_seed(world.seed)
    order = torch.cat(
        [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(steps * batch_size / len(rows)))]
    )

    def losses(step: int) -> list[dict[str, Tensor]]:
        chosen = [torch.tensor(rows[i]) for i in order[step * batch_size : (step + 1) * batch_size].tolist()]
        tokens = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = tokens != tokenizer.pad_token_id
        labels = tokens.masked_fill(~mask, -100)
        return [{"loss": model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss}]

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    run = train(
        losses,
        optimizer,
        steps=steps,
        description="teaching the world",
        schedule=partial(warmup_cosine, warmup=0.05),
        max_grad_norm=1.0,
        progress=progress,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = {
        "seed": world.seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "final_loss": float(run.log["loss"].tail(50).mean()),
    }
    (out / "world.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the Hugging Face checkpoint")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the world and of the training (default 0, the shipped one)"
    )
    parser.add_argument("--steps", type=int, default=1500, help="updates (default 1500)")
    parser.add_argument("--batch-size", type=int, default=128, help="texts an update (default 128)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW (default 3e-3)")
    arguments = parser.parse_args()
    train_world(
        World(arguments.seed), arguments.out, steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr
    )


if __name__ == "__main__":
    main()
