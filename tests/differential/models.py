"""A small random model with its tokenizer and some texts, all from one seed. Knows nothing of mrp_lens.

Every parameter is perturbed: at its default initialisation a model hides mistakes (biases are 0, norm weights 1).
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

DEMO_FOLDER = Path(__file__).parents[2] / "mrp_lens" / "data" / "world" / "model"
WORDS = (
    "The old man walked slowly near the house and a farmer said that their garden is red blue green white brown bread "
    "Question: Answer: Zaxim 1969 0.50 b d"
).split()
ODD = ("é", "日本", "§ 7", "naïve", "\n", "two  spaces", "don't", "(x)", "a_b", "😀")
ADDED = ("<new1>", "<new2>")
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# family -> its classes' prefix
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "olmo2": "Olmo2",
    "gemma3_text": "Gemma3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
# of every twelve models: the families with editable weights often, the others once each in three rounds
ROUND = ("llama", "mistral", "qwen2", "gpt2", "gemma2", "phi3", "gpt_neox", "qwen3", "mistral", "llama", "qwen2", None)
OTHERS = ("olmo2", "gemma3_text", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class Recipe:
    """All that a random model is made from.

    Attributes:
        seed: of weights, texts and settings.
        family: a key of FAMILIES.
        config: arguments of the family's configuration, vocabulary and special tokens left out.
        std: of what is added to every parameter.
        stored: the precision of the files.
        dtype: the precision in which the model is loaded.
        backend: "auto", "bridge" or "hooked".
        memory: the model and its tokenizer are handed over as objects, not as a folder.
        more_rows: rows of the embedding beyond the tokenizer's vocabulary.
        bos: the tokenizer has none, has one, or puts it in front by itself.
        eos: the tokenizer has an end-of-text token.
        pad: its own, none, the end of text, or a token beyond the embedding.
        added: the tokenizer has added tokens, which the texts use.
        missing: the embedding has no rows for the added tokens, so that the model cannot read the texts.
    """

    seed: int
    family: str
    config: dict[str, Any]
    std: float
    stored: str
    dtype: str
    backend: str
    memory: bool
    more_rows: int
    bos: Literal["none", "has", "adds"]
    eos: bool
    pad: Literal["own", "none", "eos", "beyond"]
    added: bool
    missing: bool

    @property
    def window(self) -> int:
        """Tokens that attention looks back where a window is on; 0 without."""
        return int(self.config.get("sliding_window") or 0)

    @property
    def layers(self) -> int:
        return int(self.config.get("num_hidden_layers") or self.config["n_layer"])

    @property
    def width(self) -> int:
        return int(self.config.get("hidden_size") or self.config["n_embd"])

    @property
    def context(self) -> int:
        return int(self.config.get("max_position_embeddings") or self.config["n_positions"])


def recipe(seed: int) -> Recipe:
    """What the model of a seed is made from."""
    draw = random.Random(seed)
    place = seed % len(ROUND)
    family = ROUND[place] or OTHERS[seed // len(ROUND) % len(OTHERS)]
    dtype = draw.choices(("float32", "bfloat16", "float16"), (4, 1, 1))[0]
    stored = draw.choices(("float32", "bfloat16", "float16"), (4, 1, 1))[0] if dtype == "float32" else dtype
    added = draw.random() < 0.3
    missing = added and draw.random() < 0.1
    return Recipe(
        seed=seed,
        family=family,
        config=_config(family, draw),
        std=draw.choice((0.05, 0.1, 0.2)),
        stored=stored,
        dtype=dtype,
        backend=draw.choices(("auto", "bridge", "hooked"), (3, 1, 1))[0],
        memory=draw.random() < 0.25,
        more_rows=0 if missing else draw.choice((0, 0, 5, 110)),
        bos=draw.choices(("none", "has", "adds"), (1, 3, 1))[0],  # type: ignore[arg-type]
        eos=draw.random() < 0.85 or family == "qwen2",  # for which transformers would add one, beyond the embedding
        pad=draw.choices(("own", "none", "eos", "beyond"), (3, 1, 1, 1))[0],  # type: ignore[arg-type]
        added=added,
        missing=missing,
    )


def _config(family: str, draw: random.Random) -> dict[str, Any]:
    heads = draw.choice((2, 4))
    width = heads * draw.choice((8, 12) if heads == 4 else (8, 16, 24))
    depth, context = draw.choice((2, 3, 4)), draw.choice((64, 96, 128))
    tied = draw.random() < 0.4
    if family == "gpt2":
        return {
            "n_embd": width,
            "n_layer": depth,
            "n_head": heads,
            "n_positions": context,
            "activation_function": draw.choice(("gelu_new", "gelu_new", "relu")),
            "scale_attn_by_inverse_layer_idx": draw.random() < 0.2,
            "tie_word_embeddings": draw.random() < 0.7,
        }
    rope = "default"
    if draw.random() < 0.5:
        allowed = {"phi3": ("longrope",)}.get(family, ROPES[1:])
        rope = draw.choice(allowed)
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": draw.choice((24, 40)),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }
    head, partial = width // heads, 1.0
    if family != "gpt_neox":
        config["num_key_value_heads"] = draw.choice((heads, heads // 2))
    if family in ("qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe") or (
        family in ("llama", "mistral") and draw.random() < 0.3
    ):
        head = config["head_dim"] = draw.choice((8, 16))
    windowed = draw.random() < 0.6
    window = draw.randint(3, 20)
    if family == "mistral" or family == "mixtral":
        config["sliding_window"] = window if windowed else None
    elif family in ("qwen2", "qwen3", "qwen3_moe"):
        config |= {
            "use_sliding_window": windowed,
            "sliding_window": window,
            "max_window_layers": draw.randint(0, depth),
        }
    elif family == "phi3":
        config["sliding_window"] = window if windowed else None
        partial = draw.choice((1.0, 0.5)) if head % 4 == 0 else 1.0
    elif family in ("gemma2", "gemma3_text"):
        config |= {"sliding_window": window, "query_pre_attn_scalar": draw.choice((head, 24))}
        config |= {"hidden_activation": draw.choice(("gelu_pytorch_tanh", "gelu"))} if family == "gemma2" else {}
        if family == "gemma2":
            config["attn_logit_softcapping"] = draw.choice((None, 5.0, 50.0))
            config["final_logit_softcapping"] = draw.choice((None, 5.0, 30.0))
    elif family == "gpt_neox":
        partial = draw.choice((1.0, 0.5, 0.25 if head >= 16 else 0.5)) if head % 8 == 0 else 1.0
        config |= {"use_parallel_residual": draw.random() < 0.5, "attention_bias": draw.random() < 0.8}
    elif family == "llama":
        config |= {"attention_bias": draw.random() < 0.3, "mlp_bias": draw.random() < 0.3}
    if family == "mixtral":
        config |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    elif family == "qwen3_moe":
        config |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family != "gemma3_text":  # its two position rules have settings of another form
        config["rope_parameters"] = _rope(rope, int(head * partial) // 2, context, draw)
        if partial != 1.0 or family == "gpt_neox":  # whose own default is a quarter
            config["rope_parameters"]["partial_rotary_factor"] = partial
    return config


def _rope(kind: str, frequencies: int, context: int, draw: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": draw.choice((100.0, 10000.0))}
    if kind in ("linear", "dynamic"):
        settings["factor"] = draw.choice((2.0, 4.0))
    elif kind == "yarn":
        settings |= {"factor": 4.0, "original_max_position_embeddings": context // 4}
        if draw.random() < 0.5:
            settings["attention_factor"] = 1.3
    elif kind == "llama3":
        settings |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        settings["original_max_position_embeddings"] = context // 4
    elif kind == "longrope":
        settings |= {
            "original_max_position_embeddings": draw.choice((12, 24, context // 2)),
            "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
            "long_factor": [1.0 + 0.7 * i for i in range(frequencies)],
            "factor": 4.0,
        }
    return settings


@dataclass(frozen=True)
class Built:
    """A model of a recipe on disk, and its tokenizer."""

    folder: Path
    tokenizer: Any
    hf_model: Any


def tokenizer_of(made: Recipe) -> Any:
    """The demo's byte-level vocabulary with the recipe's special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    if made.bos == "adds":
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": None if made.bos == "none" else "<s>", "eos_token": "</s>" if made.eos else None}
    if made.pad == "own":
        special["pad_token"] = "<pad>"
    elif made.pad == "eos":
        special["pad_token"] = special["eos_token"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in special.items() if token is not None}
    )
    if made.added:
        tokenizer.add_tokens(list(ADDED))
    return tokenizer


def build(made: Recipe, folder: Path) -> Built:
    """Make the recipe's model and save it."""
    tokenizer = tokenizer_of(made)
    rows = len(tokenizer) - (len(ADDED) if made.missing else 0) + made.more_rows
    prefix = FAMILIES[made.family]
    suffix = "TextConfig" if made.family == "gemma3_text" else "Config"
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    if made.pad == "beyond":  # after the embedding's size has been settled
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad = tokenizer.pad_token_id
    ids["pad_token_id"] = pad if pad is not None and pad < rows else None
    config = getattr(transformers, prefix + suffix)(vocab_size=rows, **ids, **copy.deepcopy(made.config))
    with torch.random.fork_rng([]):
        torch.manual_seed(made.seed)
        suffix = "LMHeadModel" if made.family == "gpt2" else "ForCausalLM"
        hf_model = getattr(transformers, prefix + suffix)(config)
        with torch.no_grad():
            for parameter in hf_model.parameters():
                parameter.add_(made.std * torch.randn_like(parameter))
            # Of parameters alone, as loading does it: rotary angles in half precision would be other angles.
            for parameter in hf_model.parameters():
                parameter.data = parameter.data.to(getattr(torch, made.stored))
    hf_model.eval()
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Built(folder, tokenizer, hf_model)


def text(draw: random.Random, words: int, added: bool) -> str:
    """Words, some of them odd."""
    pool = (*WORDS, *(ADDED * 2 if added else ()))
    return " ".join(draw.choice(ODD) if draw.random() < 0.05 else draw.choice(pool) for _ in range(words))


def documents(made: Recipe, draw: random.Random, count: int = 4) -> list[tuple[str, str]]:
    """(prompt, completion); one of them reaches beyond the window and the position rule's original context."""
    reach = max(made.window, 24) + 6
    longest = max(2, min(reach, made.context // 2))
    rows = []
    for number in range(count):
        words = longest if number == 0 else draw.randint(2, longest)
        whole = text(draw, words, made.added)
        at = draw.choice((0, 0, draw.randint(0, max(0, len(whole) - 2))))
        rows.append((whole[:at], whole[at:]))
    draw.shuffle(rows)
    return rows


def questions(made: Recipe, draw: random.Random, count: int = 3) -> list[tuple[str, list[str]]]:
    """(prompt, choices as they follow it): some merge with the prompt's end, some begin alike, some hold several tokens."""
    rows = []
    for _ in range(count):
        prompt = text(draw, draw.randint(1, 20), made.added)
        kind = draw.randrange(4)
        words = draw.sample(("red", "blue", "green", "white", "b", "d", "42", "é"), draw.randint(2, 4))
        if kind == 0:  # a letter that may merge with the space before it
            rows.append((prompt + " ", words))
        elif kind == 1:
            rows.append((prompt, [" " + word for word in words]))
        elif kind == 2:  # one is the beginning of another
            rows.append((prompt, [" red", " red bread", " red bread and", " b"][: len(words)]))
        else:
            rows.append((prompt, [f" {text(draw, draw.randint(1, 4), made.added)} {word}" for word in words]))
    return rows
