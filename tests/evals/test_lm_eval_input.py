"""What lm-evaluation-harness leaves as it was, what it may run, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrp_lens.evals.lm_eval as harness_module
from mrp_lens.data.world import World
from mrp_lens.evals import evaluate
from tests.support.families import DEMO_FOLDER
from tests.support.harness_tasks import write_tasks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip for all installed packages at each call: two seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(lm_eval.__file__).parent / "tasks" / "wmdp"
    manager = TaskManager(include_path=str(path), include_defaults=False)  # all of them take ten seconds to read
    monkeypatch.setattr(harness_module, "catalogue", lambda: manager)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), {"towns": World().questions("towns").spread(24)})


@pytest.fixture
def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()


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
