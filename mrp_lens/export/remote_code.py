"""A model folder with code of its own: the projections inside the forward pass, and no way to load it without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mrp_lens.edits import exported_hooks
from mrp_lens.export.checkpoint import HFCheckpoint, architecture_in
from mrp_lens.hf.attach import Steps
from mrp_lens.models.source import EDITED
from mrp_lens.utils.io import write_json, write_text

CODE_FILE = "modeling_mrp_lens.py"
SETTINGS = "mrp_lens"

# transformers reads a config.json of a foreign model type with a warning if it is told to by the class of the base
# model, and would then load the unedited model. So the base model's settings are nested, and in the place of one of
# them stands what the error will show.
SENTINEL = "vocab_size"
MESSAGE = "this is an edited model: load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"

# What stands beside the base model's settings instead of among them.
OWN = ("model_type", "architectures", "auto_map", SETTINGS, "dtype", "torch_dtype", "transformers_version")

TAIL = '''

# --- Generated: an edited {model_class}. ---

import json
from contextlib import nullcontext

from transformers import {config_class}, {model_class}

try:  # transformers 5 renames some architectures' tensors on loading, and skips classes that it does not know
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as renaming_of
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping as register_renaming
except ImportError:
    pass
else:
    renaming = renaming_of("{model_class}") or renaming_of({config_class}.model_type)
    if renaming:
        register_renaming("{model_type}", renaming, overwrite=True)

OWN = {own}


class EditedConfig({config_class}):
    """The settings of the base model, kept apart so that no other class takes this folder for it."""

    model_type = "{model_type}"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        own = dict(config_dict)
        base = own.pop("base_config", None)
        if base is None:
            return super().from_dict(own, **kwargs)
        if not isinstance(base, dict):
            raise ValueError("base_config in config.json holds no settings; fetch the folder again")
        own.pop("{sentinel}", None)
        return super().from_dict({{**base, **own}}, **kwargs)

    def to_json_string(self, *args, **kwargs):
        flat = json.loads(super().to_json_string(*args, **kwargs))
        nested = {{key: flat.pop(key) for key in OWN if key in flat}}
        nested.update({{"{sentinel}": {message!r}, "base_config": flat}})
        return json.dumps(nested, indent=2, sort_keys=True) + "\\n"


class EditedForCausalLM({model_class}):
    """The base model with the edit inside its forward pass."""

    config_class = EditedConfig
    _keep_in_fp32_modules_strict = ["edit"]

    def __init__(self, config):
        super().__init__(config)
        build(self, getattr(config, "{settings}", None))
        self.post_init()

    def generate(self, *args, **kwargs):
        with Prompt(kwargs) if counts_positions(self.config.{settings}) else nullcontext():
            return super().generate(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lost = [name for name in info["missing_keys"] if ".edit." in name]
        if lost:
            raise ValueError(f"the edit's tensors are missing from this folder: {{', '.join(sorted(lost))}}")
        check_values(model, model.config.{settings})
        return (model, info) if output_loading_info else model
'''


def write_module(out: Path, base: HFCheckpoint, steps: Steps, config: Mapping[str, Any]) -> None:
    """Write config.json and the modelling file of an edited model.

    Args:
        out: the new folder.
        base: whose architecture it has.
        steps: what the edit's hooks do.
        config: the base model's settings as they are to be.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Both are looked up by the type, which is one that transformers knows: nothing that a config.json says becomes code.
    architecture = architecture_in(config)
    config_class = str(CONFIG_MAPPING[str(config["model_type"])].__name__)
    model_type = f"{EDITED}{config['model_type']}"
    stem = CODE_FILE.removesuffix(".py")
    nested = {key: value for key, value in config.items() if key not in OWN}
    own: dict[str, Any] = {
        "model_type": model_type,
        "architectures": ["EditedForCausalLM"],
        "auto_map": {"AutoConfig": f"{stem}.EditedConfig", "AutoModelForCausalLM": f"{stem}.EditedForCausalLM"},
        SETTINGS: settings_of(steps, base),
        SENTINEL: MESSAGE,
        "base_config": nested,
    }
    own |= {key: config[key] for key in ("dtype", "torch_dtype", "transformers_version") if key in config}
    write_json(out / "config.json", own)
    source = Path(str(exported_hooks.__file__)).read_text(encoding="utf-8")
    tail = TAIL.format(
        model_class=architecture,
        config_class=config_class,
        model_type=model_type,
        settings=SETTINGS,
        sentinel=SENTINEL,
        message=MESSAGE,
        own=OWN,
    )
    write_text(out / CODE_FILE, source + tail)


def settings_of(steps: Steps, base: HFCheckpoint) -> dict[str, Any]:
    """What the modelling file has to know, as JSON."""
    changes = [
        {"layer": layer, "site": site, "steps": [_settings_of_step(step) for step in done]}
        for (layer, site), done in steps.items()
    ]
    settings = {"blocks": base.layout.blocks, "modules": dict(base.layout.modules), "changes": changes}
    return {**settings, exported_hooks.HASH: exported_hooks.hash_of(settings)}


def _settings_of_step(step: nn.Module) -> dict[str, Any]:
    if isinstance(step, exported_hooks.Steering):
        own: dict[str, Any] = {"kind": "steering", "mode": step.mode, "positions": step.positions}
    elif isinstance(step, exported_hooks.ConditionalProjection):
        own = {"kind": "conditional-projection", "gates": step.gates}
    else:
        own = {"kind": "projection"}
    values = next(step.buffers())
    return {**own, "shape": list(values.shape), "values_sha256": exported_hooks.hash_of_values(values)}
