"""Tasks for lm-evaluation-harness over local files."""

import json
from collections.abc import Mapping
from pathlib import Path

from analysis.shipping import TASK_FILE
from mrp_lens.data import Questions

CHOICE_TASK = (
    TASK_FILE
    + """\
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
)
GENERATION_TASK = """\
task: {name}_written
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  version: 1.0
"""
GROUP = """\
group: {name}
task:
{members}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


def write_tasks(folder: Path, quizzes: Mapping[str, Questions], *, group: str | None = None) -> Path:
    """For each quiz the tasks NAME (multiple choice) and NAME_written (generation), and a group of the former; returns
    `folder`, for `include_path`. What `datasets` caches lies in it too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, quiz in quizzes.items():
        rows = folder / f"{name}.jsonl"
        entries = [{"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in quiz.questions]
        rows.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
        for suffix, template in (("", CHOICE_TASK), ("_written", GENERATION_TASK)):
            text = template.format(name=name, rows=rows, cache=folder / "cache")
            (folder / f"{name}{suffix}.yaml").write_text(text, encoding="utf-8")
    if group is not None:
        members = "\n".join(f"  - {name}" for name in quizzes)
        (folder / f"{group}.yaml").write_text(GROUP.format(name=group, members=members), encoding="utf-8")
    return folder
