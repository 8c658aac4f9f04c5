"""Configurations of exported folders, changed at random: refused, or loaded as what was exported.

Settings of the base model are transformers' own: a model with another rope base is another model, and loads as that. What
mrp_lens has written beside them is checked by the exported modelling file, and must be as it was.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from mrp_lens.edits import load_edit
from mrp_lens.hf import attach
from tests.support.export_edits import log_probabilities
from tests.support.mutations import mutated

FORMS = {"folded": "config.json", "module": "config.json", "adapter": "edit_config.json"}
# transformers' own are of any kind
REFUSALS = (ValueError, KeyError, TypeError, OSError, AttributeError, ImportError, RuntimeError)
SLOW_IN_TRANSFORMERS = 64  # layers: it builds any number of them before it looks at the weights

_events: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        _events.append(f"{event} {args}")
    elif event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wxa+"):
        _events.append(f"write {args[0]}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """The commands that were started and the files that were opened for writing inside."""
    global _events
    _events = []
    try:
        yield _events
    finally:
        _events = None


@pytest.fixture(scope="module")
def known(exports: dict[str, Path], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A copy of the folder of each form, its configuration and what it computes, and what the unedited model computes."""
    place, plain = tmp_path_factory.mktemp("changed"), AutoModelForCausalLM.from_pretrained(tiny_folder)
    found: dict[str, Any] = {"base": tiny_folder, "unedited": log_probabilities(plain)}
    for form, name in FORMS.items():
        folder = Path(shutil.copytree(exports[form], place / form))
        found[form] = (folder, (folder / name).read_text(), _computed(folder, form, found))
    return found


def _computed(folder: Path, form: str, known: dict[str, Any]) -> Tensor:
    if form == "adapter":
        edit = load_edit(folder)
        plain = AutoModelForCausalLM.from_pretrained(known["base"])
        with attach(plain, edit):
            return log_probabilities(plain)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form == "module")
    return log_probabilities(loaded.float())


def _layers(text: str) -> Any:
    try:
        config = json.loads(text)
        return config.get("base_config", config).get("num_hidden_layers", 0)
    except (ValueError, AttributeError, RecursionError):
        return 0


def outcome(known: dict[str, Any], form: str, seed: int) -> str:
    """What came of one changed configuration; fails where something else than was exported is passed off for it."""
    folder, text, wanted = known[form]
    changed = mutated(text, seed)
    layers = _layers(changed)
    if isinstance(layers, int) and layers > SLOW_IN_TRANSFORMERS:
        return "left out: so many layers that transformers alone takes hours to build them"
    file = folder / FORMS[form]
    file.write_bytes(changed.encode(errors="surrogatepass"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    try:
        with watched() as events:
            got = _computed(folder, form, known)
    except MemoryError:
        raise
    except Exception as error:
        if form == "adapter" and not isinstance(error, ValueError):
            pytest.fail(f"seed {seed}: {error!r}")
        refusal = next((kind for kind in REFUSALS if isinstance(error, kind)), Exception)
        return f"refused: {refusal.__name__}"
    finally:
        after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        file.write_text(text)
        assert after == before, f"seed {seed}: the folder was written to"
        written = [event for event in events if "/modules/transformers_modules/" not in event and "/dev/" not in event]
        assert not written, f"seed {seed}: {written}"
    same = bool((got - wanted).abs().max() <= 1e-5)
    if form == "adapter":
        assert same, f"seed {seed}: another edit was loaded"
    if form == "module":
        now, then = json.loads(changed), json.loads(text)
        assert now["mrp_lens"] == then["mrp_lens"], f"seed {seed}: changed settings of the edit were loaded"
        assert not bool((got - known["unedited"]).abs().max() <= 1e-5), f"seed {seed}: the unedited model was loaded"
    return "loaded exactly" if same else "loaded by transformers as another model (its own settings were changed)"


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_configuration_is_refused_or_loads_what_was_exported(form: str, known: dict[str, Any]) -> None:
    outcomes = [outcome(known, form, seed) for seed in range(12)]
    assert any(kind.startswith("refused") for kind in outcomes)


@pytest.mark.slow
def test_two_thousand_changed_configurations_are_refused_or_load_what_was_exported(known: dict[str, Any]) -> None:
    seeds = {form: range(10_000 * number, 10_000 * number + 667) for number, form in enumerate(FORMS, 1)}
    counts = Counter((form, outcome(known, form, seed)) for form, numbers in seeds.items() for seed in numbers)
    for (form, kind), count in sorted(counts.items()):
        sys.stdout.write(f"{form:8} {count:5} {kind}\n")
    assert sum(counts.values()) == 2001
    assert sum(count for (_, kind), count in counts.items() if kind == "loaded exactly") > 100
