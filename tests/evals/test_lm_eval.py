"""lm-evaluation-harness on Hugging Face models, against sums of log-probabilities counted by hand; what it leaves as it was, what
it may run, and what is refused."""

import inspect
import json
import random
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrp_lens.evals.lm_eval as harness_module
from mrp_lens import metrics
from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.data.world import World
from mrp_lens.data.world.facts import QUESTION
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.evals import evaluate
from mrp_lens.evals.lm_eval import WITHOUT_BOS, Bos, HarnessModel, prepends_bos
from mrp_lens.hf import attach
from mrp_lens.metrics.tokens import by_document
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


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(lm_eval.__file__).parent / "tasks" / "wmdp"
    manager = TaskManager(include_path=str(path), include_defaults=False)  # all of them take ten seconds to read
    monkeypatch.setattr(harness_module, "catalogue", lambda: manager)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_models_without_bos_are_those_of_transformer_lens() -> None:
    """An adapter says so in its source alone, until there is a model."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    told = set()
    for name, adapter in SUPPORTED_ARCHITECTURES.items():
        sources = (inspect.getsource(kind) for kind in adapter.__mro__ if kind is not object)
        said = next((found for source in sources if (found := re.findall(r"default_prepend_bos = (\w+)", source))), [])
        if said[-1:] == ["False"] and name.endswith("ForCausalLM"):
            told.add(name)
    assert len(told) > 20
    assert told <= WITHOUT_BOS


@pytest.mark.slow
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


def test_the_likelihood_of_whole_texts_is_that_of_the_metrics(hf_model: Any, tokenizer: Any) -> None:
    texts = ["The old man walked near the house.", "It rained."]
    model = load_model("demo")
    expected = [float(own.sum()) for own in by_document(model, Corpus.from_texts(texts), progress=False)]
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    for bos in get_args(Bos):
        harness = HarnessModel(hf_model, tokenizer, batch_size=2, bos=bos)
        assert harness.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)
        assert harness.start == ([tokenizer.bos_token_id] if bos == "metrics" else [])


def test_of_a_text_that_is_too_long_bos_and_the_end_are_read(hf_model: Any, tokenizer: Any) -> None:
    harness = HarnessModel(hf_model, tokenizer, batch_size=1, bos="metrics")
    prompt, choice = " ".join(["It rained near the old house."] * 60), " The old man"
    ids = tokenizer(prompt + choice, add_special_tokens=False).input_ids
    count = len(ids) - len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert len(ids) > harness.max_length
    (found,) = harness.loglikelihood([SimpleNamespace(args=(prompt, choice))], disable_tqdm=True)
    kept = [tokenizer.bos_token_id, *ids[-harness.max_length :]]
    with torch.no_grad():
        logs = hf_model(torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
    by_hand = sum(float(logs[at - 1, kept[at]]) for at in range(len(kept) - count, len(kept)))
    assert found[0] == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- what is left as it was, and what is refused


@pytest.mark.usefixtures("small_catalogue")
def test_model_tokenizer_and_random_states_stay_as_they_are(hf_model: Any, tasks: Path) -> None:
    own = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    own.pad_token = None
    hf_model.train()
    hf_model.model.layers[1].eval()
    hf_model.lm_head.weight.requires_grad_(False)
    # Tied by its configuration, and untied in memory: the harness would tie it again.
    hf_model.config.tie_word_embeddings = True
    with torch.no_grad():
        hf_model.lm_head.weight = torch.nn.Parameter(hf_model.lm_head.weight * 1.01, requires_grad=False)
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    flags = [(module.training, sorted(vars(module))) for module in hf_model.modules()]
    trainable = [parameter.requires_grad for parameter in hf_model.parameters()]
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002  (away from where an earlier seed may have left them)
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())  # noqa: NPY002
    evaluate(hf_model, "towns", tokenizer=own, include_path=tasks, limit=4)
    with pytest.raises(ValueError, match="no task 'nothing'"):
        evaluate(hf_model, "nothing", tokenizer=own, include_path=tasks)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [(module.training, sorted(vars(module))) for module in hf_model.modules()] == flags
    assert [parameter.requires_grad for parameter in hf_model.parameters()] == trainable
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf_model.state_dict().items())
    assert all(parameter.grad is None for parameter in hf_model.parameters())
    assert own.pad_token is None


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = -output.logits
        return output
"""


@pytest.fixture
def module_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code of its own: the tiny model with its logits turned round."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "export"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_folder_with_code_of_its_own_is_run_when_that_is_allowed(
    module_folder: Path, tiny_folder: Path, tasks: Path
) -> None:
    with pytest.raises(ValueError, match=r"code of its own \(modeling_own.py\).*trust_remote_code=True"):
        evaluate(module_folder, "towns", include_path=tasks)
    frame = evaluate(module_folder, "towns", include_path=tasks, trust_remote_code=True, limit=6, per_question=True)
    plain = evaluate(tiny_folder, "towns", include_path=tasks, limit=6, per_question=True)
    differences = np.concatenate([np.subtract(*pair) for pair in zip(frame["answers"], plain["answers"], strict=True)])
    assert np.abs(differences).max() > 0.1


def test_the_published_tasks_of_the_help_are_in_the_harness() -> None:
    for folder, name in (("wmdp", "wmdp"), ("mmlu/default", "mmlu")):
        path = Path(lm_eval.__file__).parent / "tasks" / folder
        assert name in TaskManager(include_path=str(path), include_defaults=False).all_groups


@pytest.mark.usefixtures("small_catalogue")
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"tasks": "wmdp_bo"}, ValueError, r"no task 'wmdp_bo' \(it has wmdp_bio.*include_path"),
        ({"tasks": "towns,,potions"}, ValueError, "no task in 'towns,,potions'; name some"),
        ({"tasks": []}, ValueError, "no task in"),
        ({"include_path": "/nowhere"}, FileNotFoundError, "no folder at /nowhere"),
        ({"include_path": None}, ValueError, "no task 'towns'"),
        ({"limit": 0}, ValueError, "limit must be above 0, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be above 0"),
        ({"bos": "never"}, ValueError, "unknown bos 'never'; choose one of metrics, tokenizer"),
        ({"dtype": "int8"}, ValueError, "unknown dtype 'int8'"),
        ({"model": "/nowhere"}, ValueError, "no folder at '/nowhere'"),
        ({"model": 3}, TypeError, "the harness runs on Hugging Face models, got int"),
    ],
)
def test_bad_input_is_named_with_its_remedy(
    changed: dict[str, Any], kind: type[Exception], message: str, tasks: Path
) -> None:
    arguments: dict[str, Any] = {"model": "demo", "tasks": "towns", "include_path": tasks, **changed}
    with pytest.raises(kind, match=message):
        evaluate(**arguments)


def test_a_transformerlens_model_is_sent_to_attach(model: Any, tasks: Path, untouched: None) -> None:
    with pytest.raises(TypeError, match=r"mrp_lens.hf.attach\(hf_model, edit\)"):
        evaluate(model, "towns", include_path=tasks)


def test_a_model_without_a_folder_needs_its_tokenizer(hf_model: Any, tasks: Path) -> None:
    assert len(evaluate(hf_model, "towns", include_path=tasks, limit=2)) == 2  # it came from a folder that has one
    hf_model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"pass evaluate\(model, tasks, tokenizer=...\)"):
        evaluate(hf_model, "towns", include_path=tasks)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    monkeypatch.setattr(harness_module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'mrp_lens\[harness\]'"):
        evaluate("demo", "towns", include_path=tasks)
