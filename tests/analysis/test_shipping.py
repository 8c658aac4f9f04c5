"""`analysis.shipping`: hooked and shipped answers side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from analysis import shipping
from mrp_lens.data import Questions
from mrp_lens.export import export_hf
from mrp_lens.models import load_model
from tests.support.edits import projection

ROWS = [
    {"question": f"The colour of Zaxim{n} is", "choices": ["red as blood", "blue", "a deep green"], "answer": n % 3}
    for n in range(9)
]


@pytest.fixture(scope="module")
def questions() -> Questions:
    rows = [{**row, "choices": [f" {choice}" for choice in row["choices"]]} for row in ROWS]  # type: ignore[attr-defined]
    return Questions.from_rows(rows)


def test_answers_are_those_of_the_largest_sum(tiny_folder: Path, questions: Questions, tmp_path: Path) -> None:
    model, edit = load_model(tiny_folder, backend="bridge"), projection(1, 2)
    export_hf(model, edit, tmp_path / "out", verify=False, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = []
    for question in questions.questions:
        sums = []
        for choice in question.choices:
            prompt = model.to_tokens(question.prompt)
            tokens = model.to_tokens(question.prompt + choice)
            with torch.no_grad():
                logs = plain(input_ids=tokens).logits.log_softmax(-1)[0]
            places = range(prompt.shape[1], tokens.shape[1])
            sums.append(sum(float(logs[place - 1, tokens[0, place]]) for place in places))
        expected.append(int(np.argmax(sums)))
    assert shipping.answers_of(model, edit, questions).tolist() == expected


@pytest.mark.slow
def test_it_ships_a_saved_edit_of_ones_own(tiny_folder: Path, tmp_path: Path) -> None:
    projection(1, 2).save_pretrained(tmp_path / "edit")
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "texts.txt").write_text("\n".join(f"House {n} is old." for n in range(20)))
    texts = str(tmp_path / "texts.txt")
    data = ["--forget", texts, "--retain", texts, "--questions", str(tmp_path / "quiz.jsonl")]
    out = tmp_path / "out"
    edits = ["--edits", f"mine={tmp_path / 'edit'}"]
    shipping.main(["--model", str(tiny_folder), *data, *edits, "--backend", "bridge", "--out", str(out)])
    (row,) = json.loads((out / "summary.json").read_text())["rows"]
    assert row["method"] == "mine"
    assert row["form"] == "module"
    assert row["exported_accuracy"] == pytest.approx(row["hooked_accuracy"])
    assert row["same_answers"] == 1.0
    assert (out / "finding.md").read_text().startswith("| method | form ")
