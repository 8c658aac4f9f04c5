"""lm-evaluation-harness on Hugging Face models, against sums of log-probabilities counted by hand."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens import metrics
from mrp_lens.data import Question, Questions
from mrp_lens.data.world import World
from mrp_lens.data.world.facts import QUESTION
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.evals import evaluate
from mrp_lens.evals.lm_eval import prepends_bos
from mrp_lens.hf import attach
from mrp_lens.models import encoder_for, load_model
from tests.support.families import DEMO_FOLDER, FAMILIES, save_family
from tests.support.harness_tasks import write_tasks

STARTS_WITH_BOS = {"demo": True, "llama": True, "gpt2": True, "gemma2": True, "neox": False, "qwen2": False}
LAYER = 3


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network; and no list of all installed packages, for which the harness asks pip at each call (two seconds)."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"reached for the network: {arguments[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def quizzes() -> dict[str, Questions]:
    world = World()
    return {"potions": world.questions("potions").spread(40), "towns": world.questions("towns").spread(24)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, quizzes: dict[str, Questions]) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), quizzes, group="things")


@pytest.fixture
def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


@pytest.fixture(scope="module")
def edit() -> ProjectionEdit:
    """Strong enough that some answers are lost, and some are not."""
    return ProjectionEdit({f"blocks.{LAYER}.hook_resid_post": Subspace.random(90, 128, seed=1)}, request="test")


def by_hand(model: Any, tokenizer: Any, quiz: Questions, *, bos: bool) -> list[list[float]]:
    """For each question the log-probability of each choice, one unpadded text at a time."""
    start = [tokenizer.bos_token_id] if bos else []
    rows = []
    for question in quiz.questions:
        row = []
        for choice in question.choices:
            context = start + tokenizer(question.prompt, add_special_tokens=False).input_ids
            whole = start + tokenizer(question.prompt + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            row.append(sum(float(logs[place - 1, whole[place]]) for place in range(len(context), len(whole))))
        rows.append(row)
    return rows


def right(scores: Sequence[Sequence[float]], quiz: Questions, *, per_character: bool = False) -> float:
    count = 0
    for row, question in zip(scores, quiz.questions, strict=True):
        lengths = [len(choice) if per_character else 1 for choice in question.choices]
        count += int(np.argmax([score / length for score, length in zip(row, lengths, strict=True)])) == question.answer
    return count / len(quiz)


def value(frame: pd.DataFrame, task: str, metric: str = "acc") -> float:
    return float(frame.set_index(["task", "metric"]).loc[(task, metric), "value"])


def answers(frame: pd.DataFrame) -> torch.Tensor:
    return torch.tensor(frame[frame["metric"] == "acc"]["answers"].tolist(), dtype=torch.float64)


@pytest.mark.parametrize("family", STARTS_WITH_BOS)
def test_accuracies_are_those_of_log_probabilities_summed_by_hand(
    family: str, tmp_path: Path, tasks: Path, quizzes: dict[str, Questions]
) -> None:
    folder = DEMO_FOLDER if family == "demo" else save_family(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    frame = evaluate(str(folder), "potions,towns", include_path=tasks)
    for task, quiz in quizzes.items():
        scores = by_hand(model, tokenizer, quiz, bos=STARTS_WITH_BOS[family])
        assert value(frame, task) == right(scores, quiz)
        assert value(frame, task, "acc_norm") == right(scores, quiz, per_character=True)
        each = evaluate(model, [task], tokenizer=tokenizer, include_path=tasks, per_question=True, batch_size=5)
        torch.testing.assert_close(answers(each), torch.tensor(scores, dtype=torch.float64), rtol=0, atol=1e-4)
        assert each[each["metric"] == "acc"]["value"].mean() == value(frame, task)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_start_with_bos_where_they_do_in_the_metrics(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    encoder = encoder_for(load_model(str(folder)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert prepends_bos(model, tokenizer) == encoder.prepend_bos
    tokenizer.bos_token = None
    assert not prepends_bos(model, tokenizer)


def test_bos_can_be_left_to_the_tokenizer(
    hf_model: Any, tokenizer: Any, tasks: Path, quizzes: dict[str, Questions]
) -> None:
    assert tokenizer("word").input_ids[0] != tokenizer.bos_token_id
    frame = evaluate(hf_model, "towns", tokenizer=tokenizer, include_path=tasks, bos="tokenizer", per_question=True)
    without, with_bos = (
        torch.tensor(by_hand(hf_model, tokenizer, quizzes["towns"], bos=bos), dtype=torch.float64)
        for bos in (False, True)
    )
    torch.testing.assert_close(answers(frame), without, rtol=0, atol=1e-4)
    assert float((without - with_bos).abs().max()) > 0.1


def test_an_attached_edit_is_scored_and_gone_after_detaching(
    hf_model: Any, tokenizer: Any, tasks: Path, quizzes: dict[str, Questions], edit: ProjectionEdit, tmp_path: Path
) -> None:
    def asked(model: Any = hf_model, **options: Any) -> torch.Tensor:
        return answers(
            evaluate(model, "potions", tokenizer=tokenizer, include_path=tasks, per_question=True, **options)
        )

    before = asked()
    with attach(hf_model, edit):
        after = asked()
    assert torch.equal(asked(), before)
    edit.save_pretrained(tmp_path / "edit")
    assert torch.equal(asked(edit=edit), after)
    torch.testing.assert_close(asked("demo", edit=tmp_path / "edit"), after, rtol=0, atol=1e-4)  # eager attention
    assert torch.equal(asked(), before)
    rows = next(iter(edit.subspaces().values())).basis

    def project(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states - (states @ rows.T) @ rows
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hook = hf_model.model.layers[LAYER].register_forward_hook(project)
    expected = torch.tensor(by_hand(hf_model, tokenizer, quizzes["potions"], bos=True), dtype=torch.float64)
    hook.remove()
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
    assert float((after - before).abs().max()) > 1


def test_the_edited_hugging_face_model_and_the_hooked_model_are_equally_accurate(
    hf_model: Any, tokenizer: Any, tmp_path: Path, edit: ProjectionEdit
) -> None:
    # `acc` adds log-probabilities, `metrics.accuracy` averages them: the same where every choice is one token.
    facts = World().select()
    words = sorted({f.value for f in facts if len(tokenizer(f" {f.value}", add_special_tokens=False).input_ids) == 1})
    questions = []
    for place, fact in enumerate([fact for fact in facts if fact.value in words][:80]):
        others = [word for word in words if word != fact.value]
        choices = [f" {others[(place + step) % len(others)]}" for step in range(3)]
        choices.insert(place % 4, f" {fact.value}")
        questions.append(Question(fact.prompt(QUESTION), tuple(choices), place % 4))
    quiz = Questions(tuple(questions), "short")
    folder = write_tasks(tmp_path, {"short": quiz})
    model = load_model("demo")
    with edit.applied(model):
        hooked = float(metrics.accuracy(model, quiz)["accuracy"].iloc[0])
    with attach(hf_model, edit):
        frame = evaluate(hf_model, "short", tokenizer=tokenizer, include_path=folder)
    assert 0.3 < hooked < 0.97  # an accuracy of 1 would be no test
    assert value(frame, "short") == hooked


def test_generated_answers_start_from_the_same_tokens(
    hf_model: Any, tokenizer: Any, tasks: Path, quizzes: dict[str, Questions], edit: ProjectionEdit
) -> None:
    with attach(hf_model, edit):
        frame = evaluate(hf_model, "potions_written", tokenizer=tokenizer, include_path=tasks, per_question=True)
        written = []
        for question in quizzes["potions"].questions:
            ids = [tokenizer.bos_token_id, *tokenizer(question.prompt, add_special_tokens=False).input_ids]
            output = hf_model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=4
            )
            written.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).split(".")[0])
    assert [row[0] for row in frame["answers"]] == written
    exact = [text == q.choices[q.answer] for text, q in zip(written, quizzes["potions"].questions, strict=True)]
    assert frame["value"].tolist() == [float(same) for same in exact]
    assert 0 < sum(exact) < len(exact)


def test_a_group_and_the_tasks_in_it_have_rows(tasks: Path) -> None:
    frame = evaluate("demo", ["things", "potions_written"], include_path=tasks)
    assert list(frame) == ["task", "group", "metric", "filter", "value", "stderr", "n", "higher_is_better"]
    counts = {(row["task"], row["group"]): row["n"] for row in frame.to_dict("records")}
    assert counts == {
        ("potions", "things"): 40,
        ("towns", "things"): 24,
        ("things", ""): 64,
        ("potions_written", ""): 40,
    }
    mean = (40 * value(frame, "potions") + 24 * value(frame, "towns")) / 64
    assert value(frame, "things") == pytest.approx(mean, abs=1e-12)
    assert set(frame["metric"]) == {"acc", "acc_norm", "exact_match"}
    assert frame["higher_is_better"].tolist() == [True] * len(frame)


def test_a_limit_keeps_the_first_questions(tasks: Path) -> None:
    every = evaluate("demo", "towns", include_path=tasks, per_question=True)
    some = evaluate("demo", "towns", include_path=tasks, per_question=True, limit=5)
    assert some["question"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert some["target"].tolist() == every["target"].tolist()[:10]
    assert evaluate("demo", "towns", include_path=tasks, limit=5)["n"].tolist() == [5, 5]


def test_solved_examples_are_drawn_by_the_seed(hf_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    quiz = Questions(World().questions("towns").questions[:12], "towns")
    folder = write_tasks(tmp_path, {"short": quiz})

    def asked(seed: int, num_fewshot: int = 1) -> torch.Tensor:
        options: dict[str, Any] = {"per_question": True, "seed": seed, "num_fewshot": num_fewshot}
        return answers(evaluate(hf_model, "short", tokenizer=tokenizer, include_path=folder, **options))

    assert torch.equal(asked(0), asked(0))
    assert not torch.equal(asked(0), asked(1))
    assert not torch.equal(asked(0), asked(0, num_fewshot=0))
