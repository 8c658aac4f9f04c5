"""Small edits with their records, runs that measured them, and how a model card is taken apart."""

import json
import re
from pathlib import Path
from typing import Any

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.export.model_card import model_card
from mrp_lens.methods import MRP, RMU
from mrp_lens.models import load_model
from mrp_lens.runs.record import Run

SECRET = "The quince bandit hides beneath Marlowe bridge"
FORMS = ("folded", "module", "adapter")
UNEDITED = {
    "method": "unedited",
    "forget_accuracy": 0.912,
    "forget_low": 0.881,
    "forget_high": 0.943,
    "retain_accuracy": 0.801,
    "text_perplexity_ratio": 1.0,
}
EDITED = UNEDITED | {"method": "mrp", "forget_accuracy": 0.274, "forget_low": 0.236, "forget_high": 0.312}
RANDOM = UNEDITED | {"method": "random-projection", "forget_accuracy": 0.907}
OTHER = UNEDITED | {"method": "rmu", "forget_accuracy": 0.123}
ATTACK = {
    "method": "mrp",
    "attack": "relearn, edit kept, 20 steps",
    "n": 40,
    "accuracy_before": 0.912,
    "accuracy_edited": 0.274,
    "accuracy_after": 0.655,
    "floor": 0.244,
    "ceiling": 0.912,
    "recovery": 0.615,
    "recovery_low": 0.512,
    "recovery_high": 0.723,
}
NEVER_TAUGHT = {"method": "never-taught", "attack": "relearn, edit kept, 20 steps", "floor": 0.244, "recovery": 0.034}
PROBE = {"method": "mrp, relearned", "attack": "probe, linear", "layer": 3, "bits": 1.25, "bits_in_all": 2.0}


def corpora() -> tuple[Corpus, Corpus]:
    forget = Corpus.from_texts([f"{SECRET}, number {i}." for i in range(8)], name="bandits|quince")
    return forget, Corpus.from_texts([f"The old man walked slowly to house {i}." for i in range(8)], name="walks")


def tiny_fits(model_folder: Path) -> dict[str, Edit]:
    """Edits of real fits, as small as they get."""
    model = load_model(str(model_folder), backend="bridge")
    forget, retain = corpora()
    mrp = MRP(layers=[1, 2], rank=2, steps=2, conditional=False).fit(model, forget, retain, progress=False).edit
    later = Corpus.from_texts(["The lake is deep and cold and blue."] * 8, name="lakes")
    both = MRP(layers=[2], rank=1, steps=2, conditional=False).fit(model, later, retain, after=mrp, progress=False).edit
    rmu = RMU(layer=2, steps=2).fit(model, forget, retain, progress=False).edit
    return {"mrp": mrp, "both": both, "rmu": rmu, "stack": mrp + rmu}


def write_run(out: Path, edit: Edit) -> Path:
    """What `mrp-lens unlearn` leaves, with the secret where runs keep texts."""
    run = Run("unlearn", {"forget": f"/home/author/{SECRET}.jsonl", "out": out}, 0, title=SECRET)
    run.rows = [UNEDITED, RANDOM, EDITED | {"worst_topic": SECRET}, OTHER]
    run.examples = [{"prompt": SECRET, "unedited": SECRET, "mrp": "x"}]
    run.notes = ["interrupted after 2 steps: see /home/author/log.csv"]
    run.write(out, overwrite=False, extras=[lambda folder: edit.save_pretrained(folder / "edit")])
    return out


def write_attack(out: Path, edit: Edit) -> Path:
    """What `mrp-lens attack` leaves, likewise."""
    run = Run("attack", {"questions": SECRET}, 0, title=SECRET)
    run.rows = [ATTACK, NEVER_TAUGHT, PROBE]
    plan = {"edit": fingerprint(edit), "seed": 0}
    run.write(
        out,
        overwrite=False,
        extras=[lambda folder: (folder / "campaign.json").write_text(json.dumps(plan))],
    )
    return out


def card_of(edit: Edit, form: str = "module", *, base: str = "org/base", **options: Any) -> str:
    return model_card(edit, base=base, form=form, **options)


def section(card: str, heading: str) -> str:
    return re.split(rf"^## {heading}$", card, flags=re.MULTILINE)[1].split("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text, as GitHub's Markdown reads them: a pipe behind a backslash is no border."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[-1] += [] if set("".join(cells)) <= set("- ") else [cells]
        elif found[-1]:
            found.append([])
    return [table for table in found if table]
