"""Does an edit score the same once it is shipped? Each is exported, and lm-evaluation-harness scores the exported folder.

`python -m analysis.shipping --model demo --out runs/shipping` (needs `pip install 'mrp_lens[harness]'`)

The harness runs in a process of its own from which mrp_lens is hidden, so what it scores is what anybody gets who loads
the folder with plain transformers. Next to it stand the answers of the model with its hooks, counted here: the choice
with the largest sum of log-probabilities. `--edits NAME=DIR` ships saved edits instead of fitting.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from analysis.common import plain_harness
from analysis.common.arguments import Study, named_paths, parser_for
from analysis.common.tables import markdown_of_rows
from mrp_lens.cli.app import as_program
from mrp_lens.data import Document, Questions
from mrp_lens.edits import Edit, edit_on, load_edit
from mrp_lens.export import ExportReport, export_hf
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, UnconditionalMRP
from mrp_lens.metrics import choice_scores
from mrp_lens.models import LensModel, encoder_for

METHODS: dict[str, Any] = {
    "mrp": MRP(),
    "mrp-mlp": UnconditionalMRP(site="mlp_out"),
    "rmu": RMU(),
    "adaptive-rmu": AdaptiveRMU(),
}
READING = """\
`exported accuracy` is the harness's, on the folder in the form given; `hooked accuracy` that of the model with its hooks, by the
same rule. Nothing is lost by shipping where they are equal and `same answers` is 1; `largest difference` is that of any
log-probability when the export was checked."""
TASK = "forgotten"
TASK_FILE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "shipping")
    parser.add_argument("--edits", nargs="+", default=[], metavar="NAME=DIR", help="saved edits to ship, unfitted")
    parser.add_argument("--limit", type=int, help="at most this many questions")
    options = parser.parse_args(arguments)
    study = Study.begin("analysis.shipping", "Edits as shipped", options)
    if study.task.questions is None:
        raise ValueError("the harness asks questions about what was forgotten; give --questions")
    questions = study.task.questions.spread(options.limit)
    saved = named_paths(options.edits, "--edits")
    rows = []
    with tqdm(list(saved) or list(METHODS), desc="edits") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            edit = load_edit(saved[name]) if saved else study.fit(METHODS[name]).edit
            rows.append({"method": name, **shipped(study.model, edit, questions)})
    keys = ["method", "form", "n", "hooked_accuracy", "exported_accuracy", "same_answers", "largest_difference"]
    study.end(f"{markdown_of_rows(rows, keys)}\n\n{READING}", {}, pd.DataFrame(rows))


def shipped(model: LensModel, edit: Edit, questions: Questions) -> dict[str, Any]:
    """Answers of the model with its hooks, and of the exported folder in a process without mrp_lens."""
    hooked = answers_of(model, edit, questions)
    with tempfile.TemporaryDirectory(prefix="mrp-lens-shipping-") as temporary:
        place = Path(temporary)
        report = export_hf(model, edit, place / "model", dtype=torch.float32, progress=False)
        exported = answers_by_harness(report, write_task(place / "tasks", questions, start_of(model)))
    right = np.array([question.answer for question in questions.questions])
    return {
        "form": report.form,
        "largest_difference": report.max_logit_diff,
        "n": len(questions),
        "hooked_accuracy": float((hooked == right).mean()),
        "exported_accuracy": exported["accuracy"],
        "same_answers": float((hooked == np.array(exported["answers"])).mean()),
    }


def answers_of(model: LensModel, edit: Edit, questions: Questions) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each question the choice with the largest sum of log-probabilities, which is what the harness calls `acc`."""
    encoder = encoder_for(model)
    with edit_on(model, edit):
        means = choice_scores(model, questions, progress=True)
    chosen = []
    for question, mean in zip(questions.questions, means, strict=True):
        encoded = encoder.encode([Document(question.prompt, choice) for choice in question.choices], keep="end")
        chosen.append(int(np.argmax(mean * [sum(row.in_loss) for row in encoded])))
    return np.array(chosen)


def start_of(model: LensModel) -> str:
    """What TransformerLens puts in front of a text: BOS, or nothing. The tokenizer of a folder need not add it by itself."""
    encoder = encoder_for(model)
    return str(encoder.tokenizer.bos_token) if encoder.prepend_bos else ""


def write_task(folder: Path, questions: Questions, start: str) -> Path:
    """The questions as a task of the harness; returns the folder."""
    folder.mkdir()
    rows = [{"prompt": start + q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions.questions]
    file = folder / f"{TASK}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = TASK_FILE.format(name=TASK, rows=file, cache=folder / "cache")
    (folder / f"{TASK}.yaml").write_text(text, encoding="utf-8")
    return folder


def answers_by_harness(report: ExportReport, tasks: Path) -> Mapping[str, Any]:
    """Accuracy and answers of the exported folder, by `plain_harness.py` in a process of its own."""
    answered = tasks / "result.json"
    job = {
        "folder": str(report.folder),
        "trust_remote_code": report.form == "module",
        "tasks": str(tasks),
        "task": TASK,
        "result": str(answered),
    }
    subprocess.run([sys.executable, "-P", str(plain_harness.__file__), json.dumps(job)], check=True)
    result: Mapping[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    as_program("analysis.shipping", main)
