"""A small random model with the settings of a configuration: what a TransformerLens class ignores shows on it at no cost.

transformers is imported where it is used, as in `source`.
"""

import copy
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mrp_lens.models.backends import Kind, boot
from mrp_lens.models.base import logits_of
from mrp_lens.models.source import is_count
from mrp_lens.utils.io import one_line

HEADS, LAYERS, VOCABULARY, EXPERT = 4, 4, 211, 32  # sizes at most, which no rule depends on
REACH = 48  # tokens that a window or a position rule spans in the small model, at most
LARGEST = 60_000_000  # numbers in a small model, at most
TOLERANCE = 3e-4  # largest difference of log-probabilities from Hugging Face's, in float32
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
SWITCHED = ("dynamic", "longrope")  # rotary rules that change once a text is longer than a limit
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
_NOT_RULES = (
    "dtype",
    "model_type",
    "transformers_version",
    "use_sliding_window",
    "use_cache",
    "tie_word_embeddings",
    "_name_or_path",
)
_EXPERTS = ("moe_intermediate_size", "shared_expert_intermediate_size")


def context_of(config: Any) -> int:
    """Tokens that the configuration says a text may have."""
    context: Any = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(context) if is_count(context) else 2048


def windows(config: Any) -> dict[str, int]:
    """Window settings that act within the context, by name."""
    if getattr(config, "use_sliding_window", True) is False:
        return {}
    found: dict[str, Any] = {name: getattr(config, name, None) for name in WINDOWS}
    return {name: size for name, size in found.items() if is_count(size) and size < context_of(config)}


def rotary_rules(config: Any) -> list[dict[str, Any]]:
    """The rules by which positions become angles: one, or one for each kind of layer."""
    rules = getattr(config, "rope_parameters", None)
    if not isinstance(rules, dict):
        return []
    nested: list[dict[str, Any]] = [rule for rule in rules.values() if isinstance(rule, dict)]
    return nested or [rules]


def reach(config: Any) -> int:
    """Tokens of a text that goes beyond every window and position rule that a configuration names, within its context.

    Beyond the context only where a rule speaks of that: rotary angles that change with the text's length.

    Example:
        >>> from transformers import MistralConfig
        >>> reach(MistralConfig(sliding_window=40, max_position_embeddings=512))
        60
    """
    config = config.get_text_config()
    limits = [*windows(config).values()]
    for rule in rotary_rules(config):
        limits += [size for size in _position_limits(config, rule) if is_count(size)]
    longest = max(limits, default=16)
    length = longest + max(8, longest // 2)
    switched = any(rule.get("rope_type") in SWITCHED for rule in rotary_rules(config))
    return length if switched else min(length, context_of(config))


def _position_limits(config: Any, rule: Mapping[str, Any]) -> list[Any]:
    kind = rule.get("rope_type", "default")
    if kind == "default":
        return []
    trained = rule.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return [trained] if is_count(trained) else [context_of(config)] if kind in SWITCHED else []


def small_config(config: Any) -> Any:
    """The same rules in a few small layers.

    Kept are the width of a head (lists of rotary factors have its length), every flag, and a layer of each kind. Windows
    and position limits are scaled down until a short text crosses them. That is the same rule: a class that reads a
    window or a limit computes with the small one as with the large one (both enter as numbers, nowhere as a case), and a
    class that ignores it ignores either. What stands in a ratio (the context and the one trained on) is scaled together.
    """
    small = copy.deepcopy(config.get_text_config())
    width, heads = int(small.hidden_size), int(small.num_attention_heads)
    kept = kept_layers(small)
    sizes: dict[str, Any] = {"num_hidden_layers": len(kept), "vocab_size": min(int(small.vocab_size), VOCABULARY)}
    if width % heads == 0:
        fewer = min(heads, HEADS)
        narrow = width // heads * fewer
        sizes |= {"num_attention_heads": fewer, "hidden_size": narrow}
        groups = getattr(small, "num_key_value_heads", None)
        if is_count(groups):
            sizes["num_key_value_heads"] = 1 if groups == 1 else fewer if groups == heads else max(1, fewer // 2)
        if is_count(getattr(small, "intermediate_size", None)):
            sizes["intermediate_size"] = min(int(small.intermediate_size), narrow + 16)
        if getattr(small, "n_inner", None) == 4 * width:  # GPT-2's, which HookedTransformer takes for granted
            sizes["n_inner"] = 4 * narrow
        sizes |= {name: narrow for name, value in vars(small).items() if name.endswith("_proj_dim") and value == width}
    sizes |= {name: EXPERT for name in _EXPERTS if is_count(getattr(small, name, None))}
    sizes |= {name: None for name in _IDS if getattr(small, name, None) is not None}
    sizes |= {name: [values[layer] for layer in kept] for name, values in _per_layer(small).items()}
    sizes |= {name: min(size, REACH) for name, size in windows(small).items()}
    limits = {size for rule in rotary_rules(small) for size in _position_limits(small, rule)}
    shrink = max(limits, default=1) / REACH
    if shrink > 1:
        for rule in rotary_rules(small):
            if "original_max_position_embeddings" in rule:
                rule["original_max_position_embeddings"] = round(rule["original_max_position_embeddings"] / shrink)
        if is_count(getattr(small, "original_max_position_embeddings", None)):
            sizes["original_max_position_embeddings"] = round(small.original_max_position_embeddings / shrink)
        sizes["max_position_embeddings"] = round(context_of(small) / shrink)
    for name, value in sizes.items():
        setattr(small, name, value)
    return type(small).from_dict(json.loads(small.to_json_string(use_diff=False)))


def kept_layers(config: Any) -> list[int]:
    """The layers of the small model: the first of each kind, and more up to `LAYERS`."""
    layers = range(int(config.num_hidden_layers))
    lists = _per_layer(config).values()
    first: dict[str, int] = {}
    for layer in layers:
        first.setdefault(str([values[layer] for values in lists]), layer)
    more = [layer for layer in layers if layer not in first.values()]
    return sorted([*first.values(), *more[: max(0, LAYERS - len(first))]])


def _per_layer(config: Any) -> dict[str, list[Any]]:
    """Settings that have a value for each layer."""
    count = int(config.num_hidden_layers)
    return {
        name: values for name, values in vars(config).items() if isinstance(values, list) and len(values) == count > 1
    }


def small_model(config: Any) -> Any:
    """A random model in float32 on the CPU, every parameter away from where it starts.

    At its default initialisation a model hides what is left out: biases are 0, norm weights 1, and attention is even.

    Raises:
        ValueError: it would not be small.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"a small model of this kind has {size / 1e6:.0f} million numbers")
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim < 2 else 1.0 / math.sqrt(min(parameter.shape[-2:]))
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def probe(config: Any, length: int) -> Tensor:
    """Random token ids [2, length], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(config.get_text_config().vocab_size), (2, length), generator=generator)


def hf_log_probabilities(hf_model: Any, tokens: Tensor) -> Tensor:
    """What Hugging Face says."""
    with torch.no_grad():
        output = hf_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    logits: Tensor = output.logits
    return logits.float().log_softmax(-1)


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """What a TransformerLens model says."""
    with torch.no_grad():
        return logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).float().log_softmax(-1)


@cache
def difference(kind: Kind, settings: str) -> float | str:
    """How far a class is from Hugging Face on the small model of these settings (JSON), or what it raises."""
    from transformers import CONFIG_MAPPING

    values = json.loads(settings)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    hf_model = small_model(config)
    tokens = probe(config, reach(config))
    expected = hf_log_probabilities(hf_model, tokens)
    try:
        model = boot(kind, hf_model, torch.device("cpu"), torch.float32)
        return float((log_probabilities(model, tokens) - expected).abs().max())
    except ImportError:
        raise
    except Exception as error:  # TransformerLens raises all kinds for what it does not know
        return one_line(error)


def ignored_settings(kind: Kind, config: Any) -> str | None:
    """Why a class computes another model than a configuration says, in words; None: it computes that model.

    Raises:
        ImportError: there is no such class.
        Exception: no small model of this kind can be made, in Hugging Face or in the class, which settles nothing.
    """
    small = json.loads(small_config(config).to_json_string(use_diff=False))
    found = difference(kind, json.dumps(small))
    if _agrees(found):
        return None
    blamed = _blamed(kind, config.get_text_config(), small)
    if blamed:
        return f"it leaves out {', '.join(blamed)}"
    if isinstance(found, str):
        raise ValueError(found)
    return f"on a small model of this configuration its log-probabilities are {found:.2g} off Hugging Face's"


def _agrees(found: float | str) -> bool:
    return isinstance(found, float) and found <= TOLERANCE


def _blamed(kind: Kind, config: Any, small: dict[str, Any]) -> list[str]:
    """The settings that a class leaves out: without all unusual ones it agrees, with any of these it does not."""
    unusual = unusual_settings(config, small)
    plain = {key: value for change in unusual.values() for key, value in change.items()}
    if not unusual or not _agrees(_difference_or_error(kind, small | plain)):
        return []
    alone = {}
    for label in unusual:
        others = {key: value for other, change in unusual.items() if other != label for key, value in change.items()}
        alone[label] = _difference_or_error(kind, small | others)
    return [label for label, found in alone.items() if not _agrees(found)] or list(unusual)


def _difference_or_error(kind: Kind, settings: dict[str, Any]) -> float | str:
    try:
        return difference(kind, json.dumps(settings))
    except Exception as error:  # settings that do not go together
        return one_line(error)


def unusual_settings(config: Any, small: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings under which a model is no plain one: in words -> the same settings (of the small model) made plain."""
    usual = json.loads(type(config)().to_json_string(use_diff=False))
    unusual: dict[str, dict[str, Any]] = {}
    found = windows(config)
    if found:
        label = ", ".join(f"{name} = {size}" for name, size in found.items())
        kinds = {"layer_types": ["full_attention"] * int(small["num_hidden_layers"])} if "layer_types" in small else {}
        unusual[label] = dict.fromkeys(found) | kinds
        unusual[label] |= {"use_sliding_window": False} if "use_sliding_window" in small else {}
    rule = small.get("rope_parameters")
    if isinstance(rule, dict) and "rope_type" in rule:
        rotary = {"rope_type": "default", "rope_theta": rule.get("rope_theta", 10000.0)}
        if rule["rope_type"] != "default":
            unusual[f"rope_parameters (rope_type = {rule['rope_type']!r})"] = {"rope_parameters": rotary}
        elif rule.get("partial_rotary_factor", 1.0) != 1.0:
            label = f"rope_parameters (partial_rotary_factor = {rule['partial_rotary_factor']})"
            unusual[label] = {"rope_parameters": rotary | {"partial_rotary_factor": 1.0}}
    width, heads = int(small.get("hidden_size", 0)), int(small.get("num_attention_heads", 1))
    if is_count(small.get("head_dim")) and small["head_dim"] * heads != width:
        unusual[f"head_dim = {small['head_dim']}"] = {"head_dim": width // heads}
    for name, value in small.items():
        if isinstance(value, (bool, float, str)) and name not in _NOT_RULES and usual.get(name, value) != value:
            unusual.setdefault(f"{name} = {value}", {name: usual[name]})
    if is_count(small.get("n_inner")):
        unusual[f"n_inner = {getattr(config, 'n_inner', None)}"] = {"n_inner": None}
    return unusual
