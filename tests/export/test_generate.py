"""What an exported model writes, token by token, is what the hooked model writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.edits import ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.hf import attach
from mrp_lens.models import load_model, logits_of
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL
from tests.support.export_edits import EDITS, exported, write
from tests.support.families import NO_HOOKED, families_mostly_slow, save_family

NEW = 50
PROMPTS = [[5, 9, 31], [7, 400, 12, 66, 81, 2 + 90], [300, 21]]
SAVED = {
    "module": "projection, resid_post",
    "folded": "new matrices + projection, mlp_out",
    "adapter": "projection, resid_mid",
}


@pytest.fixture(scope="module", params=families_mostly_slow())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def lens(folder: Path, backend: str) -> Any:
    if backend == "hooked" and folder.name in NO_HOOKED:
        pytest.skip("HookedTransformer does not load this family from a folder")
    return load_model(folder, backend=backend)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS], dtype=torch.bool)
    return tokens, mask


def written_by_hooks(lens: Any, edit: Any) -> torch.Tensor:
    """Greedy, one whole pass a token, over rows padded on the left."""
    tokens, mask = left_padded()
    start = tokens.shape[1]
    with edit.applied(lens), torch.no_grad():
        for _ in range(NEW):
            best = logits_of(lens, tokens, mask)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, best], dim=1)
            mask = torch.cat([mask, torch.ones_like(best, dtype=torch.bool)], dim=1)
    return tokens[:, start:]


def written_by_exported(hf_model: Any, *, use_cache: bool) -> torch.Tensor:
    tokens, mask = left_padded()
    hf_model.generation_config.eos_token_id = None
    written: torch.Tensor = hf_model.generate(
        input_ids=tokens,
        attention_mask=mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return written[:, tokens.shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize("form", list(SAVED))
def test_fifty_greedy_tokens_with_and_without_cache_batched_with_padding(
    form: str, lens: Any, folder: Path, tmp_path: Path
) -> None:
    if form == "folded" and folder.name == "gemma2":
        pytest.skip("a norm stands between the matrix and the hook")
    edit = EDITS["projection, resid_post" if folder.name == "neox" and form == "adapter" else SAVED[form]](lens)
    out = write(lens, edit, tmp_path / "out", form)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder if form == "adapter" else out, trust_remote_code=form == "module"
    )
    if form == "adapter":
        attach(loaded, out)
    wanted = written_by_hooks(lens, edit)
    assert torch.equal(written_by_exported(loaded, use_cache=True), wanted)
    assert torch.equal(written_by_exported(loaded, use_cache=False), wanted)
    unedited = written_by_exported(AutoModelForCausalLM.from_pretrained(folder), use_cache=True)
    assert not torch.equal(unedited, wanted)


@pytest.mark.parametrize("steered", [False, True], ids=["projection", "steering at positions"])
def test_ways_of_generating_that_have_no_prompt_pass_are_refused_of_steering_in_the_prompt_alone(
    steered: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    lens = load_model(tiny_folder)
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, positions=[0, -1])
    edit = steering if steered else ProjectionEdit({hook_name(1): Subspace.random(3, D_MODEL, seed=0)})
    model = exported(write(lens, edit, tmp_path / "edited", "module"))
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "prompt_lookup_num_tokens": 2}
    prompt = torch.tensor([PROMPTS[0]])
    if steered:
        with pytest.raises(ValueError, match="cannot be told with prompt_lookup_num_tokens"):
            model.generate(prompt, **given)
    else:
        assert torch.equal(model.generate(prompt, **given), model.generate(prompt, max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_the_hooked_models_own_generate_writes_the_same(backend: str, tmp_path: Path) -> None:
    lens = load_model("demo", backend=backend)
    edit = ProjectionEdit({"blocks.5.hook_resid_post": Subspace.random(16, 128, seed=3)})
    loaded = exported(write(lens, edit, tmp_path / "out", dtype=torch.float32))
    loaded.generation_config.eos_token_id = None
    prompt = torch.tensor([[1, 40, 60, 80, 100]])
    ours = loaded.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    for use_cache in (True, False):
        with edit.applied(lens):
            theirs = lens.generate(
                prompt,
                max_new_tokens=NEW,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                use_past_kv_cache=use_cache,
            )
        assert torch.equal(ours, theirs)
