"""What people hand to `load_model`, or hand to everything else instead of what it gives."""

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens import attacks, hf, metrics
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import ProjectionEdit, SteeringEdit, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, GradientAscent
from mrp_lens.models import encoder_for, load_model, tensor_digests
from mrp_lens.models.hooks import hook_name
from tests.support.families import DEMO_FOLDER, WIDTH, save_family
from tests.support.reference import difference, random_tokens

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
QUIZ = Questions.from_rows([{"question": "It is", "choices": ["red", "blue"], "answer": 0}])
OTHER = Questions.from_rows([{"question": "The house is", "choices": ["red", "blue"], "answer": 0}])
F, R = Corpus.from_texts(["The house is red."] * 4), Corpus.from_texts(["The old man walked."] * 4)


@pytest.fixture(scope="module")
def hf_model(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small Gemma-3 that reads pictures too, every parameter perturbed, and its folder."""
    folder, tokenizer = tmp_path_factory.mktemp("gemma3"), AutoTokenizer.from_pretrained(DEMO_FOLDER)
    text = SIZE | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "sliding_window": 8}
    text |= {"max_position_embeddings": 64, "query_pre_attn_scalar": 8}
    vision = SIZE | {"image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.Gemma3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("from_folder", [True, False])
def test_the_language_model_of_one_that_reads_pictures_is_loaded(
    from_folder: bool, multimodal: tuple[Path, Any]
) -> None:
    folder, whole = multimodal
    model = load_model(
        folder if from_folder else whole, tokenizer=None if from_folder else AutoTokenizer.from_pretrained(folder)
    )
    whole.set_attn_implementation("eager")
    assert difference(model, whole, random_tokens(800, 40, rows=2, first=10)) < 1e-4


def test_a_model_without_a_language_model_head_is_refused(tiny_folder: Path, hf_model: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match=r"a LlamaModel has no language-model head.*load it as LlamaForCausalLM"):
        load_model(hf_model.model, tokenizer=tokenizer)
    classifier = tf.LlamaForSequenceClassification(hf_model.config)
    with pytest.raises(ValueError, match="a LlamaForSequenceClassification has no language-model head"):
        load_model(classifier, tokenizer=tokenizer)
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    t5.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a t5 model, which is none that writes text"):
        load_model(tmp_path)


def test_an_offloaded_model_is_refused_and_one_that_was_dispatched_whole_is_loaded(
    tiny_folder: Path, tmp_path: Path, hf_model: Any, backend: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    names = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    places: dict[str, Any] = dict.fromkeys(names, "cpu")
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map=places)
    model = load_model(whole, tokenizer=tokenizer, backend=backend)
    tokens = torch.arange(3, 20)[None]
    assert difference(model, hf_model, tokens) < 1e-4
    with torch.no_grad():
        model.blocks[0].mlp.W_out.zero_()
    assert difference(whole, hf_model, tokens) == 0  # its own copy
    places["model.layers.1"] = "disk"
    away = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"offloaded to disk or were never filled .*model.layers.1.*load it whole"):
        load_model(away, tokenizer=tokenizer, backend=backend)
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(hf_model.config)
    with pytest.raises(ValueError, match="never filled"):
        load_model(empty, tokenizer=tokenizer, backend=backend)


def test_a_model_with_hooks_of_an_attached_edit_is_refused(tiny_folder: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hf_model(input_ids=torch.tensor([[3, 4]]), output_hidden_states=True)  # leaves hooks of transformers' own
    edit = ProjectionEdit({hook_name(1): Subspace.random(2, WIDTH, seed=0)})
    with hf.attach(hf_model, edit), pytest.raises(ValueError, match=r"hooks are on this model \(at model.layers.1\)"):
        load_model(hf_model)
    assert load_model(hf_model).cfg.n_layers == 4


def test_a_model_into_which_an_attached_edit_has_written_is_refused(tiny_folder: Path, backend: str) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    own = hf_model.get_parameter(DOWN).detach()
    edit = WeightEdit({DOWN: 2.0 * own}, {DOWN: tensor_digests(own)})
    with hf.attach(hf_model, edit), pytest.raises(ValueError, match=f"an edit is on this model and has written {DOWN}"):
        load_model(hf_model, backend=backend)


def test_a_frozen_model_and_one_made_in_inference_mode_can_be_trained_once_loaded(
    tiny_folder: Path, backend: str
) -> None:
    with torch.inference_mode():
        made = AutoModelForCausalLM.from_pretrained(tiny_folder)
    frozen = AutoModelForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    for hf_model in (made, frozen):
        model = load_model(hf_model, backend=backend)
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
        assert len(RMU(steps=1).fit(model, F, R, progress=False).log) == 1


EDIT = {hook_name(1): Subspace.random(2, WIDTH, seed=0)}
DIRECTION = torch.ones(WIDTH)
DOWN = "model.layers.1.mlp.down_proj.weight"
USES: dict[str, Callable[[Any], Any]] = {
    "encoder": lambda m: encoder_for(m),
    "mrp": lambda m: MRP(steps=1).fit(m, F, R),
    "rmu": lambda m: RMU(steps=1).fit(m, F, R),
    "adaptive": lambda m: AdaptiveRMU(steps=1).fit(m, F, R),
    "gradient ascent": lambda m: GradientAscent(steps=1).fit(m, F, R),
    "weights": lambda m: WeightEdit({DOWN: torch.zeros(32, 48)}, {DOWN: {}}).applied(m).__enter__(),
    "relearn": lambda m: attacks.relearn(m, None, train=QUIZ, held_out=OTHER, steps=1),
}
USES_CHECKED = {  # by type in this suite already, before the library's own check: see the slow test
    "accuracy": lambda m: metrics.accuracy(m, QUIZ),
    "perplexity": lambda m: metrics.perplexity(m, F),
    "confidence": lambda m: metrics.confidence(m, QUIZ),
    "alignment": lambda m: metrics.alignment(m, F, DIRECTION),
    "jailbreak": lambda m: attacks.jailbreak(m, None, train=QUIZ, held_out=OTHER, steps=1),
    "probe": lambda m: attacks.probe(m, None, train=QUIZ, held_out=OTHER),
    "lens": lambda m: metrics.logit_lens(m, QUIZ),
    "projection": lambda m: ProjectionEdit(EDIT).applied(m).__enter__(),
    "steering": lambda m: SteeringEdit.towards(DIRECTION, layer=1, coefficient=2.0).applied(m).__enter__(),
}
TOLD = r"expected a HookedTransformer or a TransformerBridge, got \w+; .* loaded with mrp_lens.load_model\(\.\.\.\)"


def told(uses: dict[str, Callable[[Any], Any]], things: Sequence[Any]) -> None:
    for use in uses.values():
        for thing in things:
            with pytest.raises(TypeError, match=TOLD):
                use(thing)


def test_a_plain_hugging_face_model_is_told_how_to_be_loaded(hf_model: Any) -> None:
    told(USES, [hf_model, "runs/model"])


@pytest.mark.slow
def test_a_plain_hugging_face_model_is_told_how_to_be_loaded_without_run_time_checks(tiny_folder: Path) -> None:
    code = (
        "from tests.models.test_load_objects import *\n"
        f"told(USES | USES_CHECKED, [AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r}), 'runs/model'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copy_of_a_loaded_model_keeps_its_tokenizer(model: Any) -> None:
    assert copy.deepcopy(model).to_tokens("The old man.").tolist() == model.to_tokens("The old man.").tolist()


def test_every_backend_takes_the_family_that_is_asked_for(tmp_path: Path, backend: str) -> None:
    """A folder called as a family, and one whose configuration names no class."""
    folder = save_family("mistral", tmp_path / "gpt2" / "llama")
    assert load_model(str(folder), backend=backend).cfg.n_layers == 4
