"""Folders of edits: as version 0.1 wrote them, and written again by somebody who knows the format."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mrp_lens.edits.serialization import _config_hash

SAVED = Path(__file__).parent / "saved_by_0_1" / "edits"  # never to be written again
KINDS = ("projection", "steering", "weight", "stack")
CONFIG, TENSORS = "edit_config.json", "edit.safetensors"


def write(folder: Path, config: Any, tensors: bytes) -> Path:
    """A folder whose hashes match."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config, dict):
        config = {**config, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
        config = {key: value for key, value in config.items() if key != "config_sha256"}
        try:
            config["config_sha256"] = _config_hash(config)
        except UnicodeEncodeError:
            config["config_sha256"] = "0"
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    (folder / TENSORS).write_bytes(tensors)
    return folder


def read(kind: str | Path) -> tuple[dict[str, Any], bytes]:
    """Configuration and tensors of an edit of 0.1, or in a folder."""
    return json.loads((SAVED / kind / CONFIG).read_text("utf-8")), (SAVED / kind / TENSORS).read_bytes()
