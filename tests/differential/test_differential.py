"""mrp_lens against plain transformers on small random models (the long job: `python -m tests.differential`)."""

import json
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mrp_lens.models import available_backends
from tests.differential.faults import FAULTS, Fault, apply, caught_by, sound_seeds
from tests.differential.job import described, failures, results, run_one
from tests.differential.models import FAMILIES, ROPES, Recipe, recipe
from tests.differential.trial import LAYOUTS, MEASURES, trial

SEEDS, OFTEN = range(100), range(12)

PLAIN = Recipe(
    seed=1,
    family="llama",
    config={
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "tie_word_embeddings": False,
    },
    std=0.2,
    stored="float32",
    dtype="float32",
    backend="auto",
    memory=False,
    more_rows=0,
    bos="has",
    eos=True,
    pad="own",
    added=False,
    missing=False,
)


GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}


def made(family: str = "llama", *, config: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    usual = GPT2 if family == "gpt2" else PLAIN.config
    return replace(PLAIN, family=family, config=usual | (config or {}), **changes)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


WINDOW = {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 0}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=24)
LONG = rope(
    "longrope",
    factor=4.0,
    original_max_position_embeddings=12,
    short_factor=[1.0] * 4,
    long_factor=[1.0, 1.7, 2.4, 3.1],
)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
HALF: dict[str, Any] = {"dtype": "float16", "stored": "float16", "std": 0.05}
COARSE: dict[str, Any] = {"dtype": "bfloat16", "stored": "bfloat16", "std": 0.05}
TEXTS = ("choices", "perplexity", "confidence", "rmu")

# What was once wrong, found by the job or by hand: the model, and the measures that gave another value or an obscure error.
FOUND: dict[str, tuple[Recipe, tuple[str, ...]]] = {
    "a window longer than the text that load compares": (made("qwen2", config=WINDOW), ("logits", *TEXTS)),
    "a window in half precision": (made("qwen2", config=WINDOW, **HALF), ("logits",)),
    "yarn in bfloat16": (made("mistral", config=YARN, **COARSE), ("logits", "rmu")),
    "llama3's rule in bfloat16": (made("mistral", config=LLAMA3, **COARSE), ("logits",)),
    "longrope in float16": (made("mistral", config=LONG, **HALF), ("logits",)),
    "longrope, texts on both sides of its switch in one batch": (
        made("phi3", config=LONG | {"num_key_value_heads": 4}),
        ("logits", "projection", *TEXTS),
    ),
    "longrope, a choice whose longer neighbour is beyond the switch": (
        made("llama", config=LONG, seed=33),
        ("choices",),
    ),
    "choices that merge with the prompt's last token": (made(seed=13), ("choices",)),
    "no BOS": (made(bos="none"), TEXTS),
    "no BOS, EOS or pad": (made("gemma2", bos="none", eos=False, pad="none", config={"head_dim": 8}), TEXTS),
    "a pad beyond the embedding": (made("qwen3", pad="beyond", config={"head_dim": 8}), TEXTS),
    "a pad beyond the embedding, HookedTransformer": (made(pad="beyond", backend="hooked"), TEXTS),
    "words beyond the embedding": (made(added=True, missing=True), TEXTS),
    "a tokenizer made in memory": (made(memory=True, added=True), TEXTS),
    "the caller's tokenizer without BOS": (made("gpt2", memory=True, bos="none", pad="eos"), ()),
    "the caller's tokenizer, which stays as it is": (made(memory=True, bos="none", pad="none", backend="bridge"), ()),
}


@cache
def result(seed: int) -> dict[str, Any]:
    return run_one((seed, True))


@pytest.mark.parametrize(
    "seed", [seed if seed in OFTEN else pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS]
)
def test_a_random_model_gives_what_plain_transformers_gives(seed: int) -> None:
    entry = result(seed)
    assert not failures(entry), described(entry)


@pytest.mark.parametrize("found", FOUND)
def test_what_was_once_wrong_is_right(found: str) -> None:
    chosen, measures = FOUND[found]
    if chosen.backend == "hooked" and "hooked" not in available_backends():
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    outcomes = trial(chosen, measures)
    assert {
        name: f"{o.status}: {o.detail[-400:]}" for name, o in outcomes.items() if o.status in ("wrong", "crashed")
    } == {}
    assert outcomes.keys() == {"load", *measures}


@pytest.mark.slow
def test_the_random_models_reach_every_family_rule_and_measure() -> None:
    entries = [result(seed) for seed in SEEDS]
    loaded = [entry for entry in entries if entry["outcomes"]["load"]["status"] == "ok"]
    families = Counter(entry["recipe"]["family"] for entry in loaded)
    assert families.keys() == FAMILIES.keys()
    assert all(families[family] >= 4 for family in LAYOUTS), families
    rules = Counter((entry["recipe"]["config"].get("rope_parameters") or {}).get("rope_type") for entry in loaded)
    assert set(ROPES) < set(rules), rules
    measured = Counter(
        name for entry in entries for name, outcome in entry["outcomes"].items() if outcome["status"] == "ok"
    )
    assert all(measured[measure] >= 8 for measure in MEASURES), measured
    assert {entry["outcomes"]["load"]["detail"] for entry in loaded} == {
        {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[kind] for kind in available_backends()
    }


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "fast.jsonl"
    kept = {"seed": 5, "recipe": asdict(recipe(5)), "seconds": 0.0, "outcomes": {}}
    file.write_text(json.dumps(kept) + "\n" + '{"seed": 6, "rec', encoding="utf-8")
    assert list(results([5], fast=True, out=tmp_path)) == [kept]
    (new,) = results([6], fast=True, out=tmp_path)
    assert new["recipe"]["seed"] == 6
    assert list(results([5, 6], fast=True, out=tmp_path)) == [kept, json.loads(json.dumps(new))]


def test_equal_seeds_give_equal_models() -> None:
    assert recipe(17) == recipe(17)
    assert len({json.dumps(recipe(seed).config) for seed in range(50)}) > 40


@pytest.fixture(scope="module")
def sound() -> list[int]:
    return sound_seeds(SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_deliberate_fault_is_caught(fault: Fault, sound: list[int]) -> None:
    if "hooked" in fault.pattern + fault.replacement and "hooked" not in available_backends():
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    assert caught_by(fault, sound) is not None


def test_a_fault_that_no_longer_applies_is_reported(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("x = 1\nx = 1\n", encoding="utf-8")
    for pattern in ("y = 1", "x = 1"):
        with pytest.raises(ValueError, match="the fault no longer applies: rewrite it"):
            apply(Fault("none", pattern, ""), tmp_path)


@pytest.mark.slow
def test_a_hundred_random_models_under_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.differential.__main__ import run

    with capsys.disabled():
        assert run(range(100)) == 0  # `python -m tests.differential` runs 2,000
