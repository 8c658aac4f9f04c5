"""Family x class x edit x form x precision: exact, refused or not applicable, against hooks placed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mrp_lens.hf import attach
from mrp_lens.models import load_model
from tests.support.edits import logits
from tests.support.export_edits import EDITS, log_probabilities, put_on_by_hand, rms_over_spread, table_of, write
from tests.support.families import FAMILIES, NO_HOOKED, families_mostly_slow, save_family

FORMS = ("folded", "module", "adapter")
TOKENS = torch.randint(3, 800, (3, 20), generator=torch.Generator().manual_seed(3))
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=pytest.mark.slow),
]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"

FOLDED = {"projection, mlp_out", "projection, attn_out", "projection, resid_pre of layer 0", "projection, every write"}
FOLDED |= {"new matrices (RMU)", "new matrices + projection, mlp_out"}


def expected(edit: str, family: str, form: str) -> str:
    """What the design says of a cell."""
    if edit == "projection, resid_mid" and family == "neox":
        return "not applicable"  # attention and MLP write side by side: there is no middle
    if form == "module" and edit == "new matrices (RMU)":
        return "refused"  # a plain checkpoint holds it
    if form != "folded":
        return "exact"
    behind_a_norm = family == "gemma2" and edit not in ("new matrices (RMU)", "projection, resid_pre of layer 0")
    return "exact" if edit in FOLDED and not behind_a_norm else "refused"


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=families_mostly_slow("llama"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_family(family, tmp_path_factory.mktemp("base") / family)
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lens(family: str, folder: Path, backend: str, dtype: torch.dtype) -> Any:
    if backend == "hooked" and family in NO_HOOKED:
        pytest.skip("HookedTransformer does not load this family from a folder")
    return load_model(folder, backend=backend, dtype=dtype)


def plain(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def outcome(lens: Any, folder: Path, family: str, edit_name: str, form: str, out: Path) -> str:
    """Export, load, compare with the hooked model and with the oracle."""
    edit = EDITS[edit_name](lens)
    if not all(hook in lens.hook_dict for part in edit.parts for hook in getattr(part, "hook_names", ())):
        return "not applicable"
    try:
        write(lens, edit, out, form)
    except ValueError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert "not possible" in reason
        assert not out.exists()
        return "refused"
    exported = plain(folder if form == "adapter" else out, **({"trust_remote_code": True} if form == "module" else {}))
    if form == "adapter":
        attach(exported, out)
    by_hand = plain(folder)
    unedited = log_probabilities(by_hand, TOKENS)
    put_on_by_hand(by_hand, family, edit)
    got = log_probabilities(exported, TOKENS)
    assert exported.dtype == by_hand.dtype
    with edit.applied(lens):
        hooked = logits(lens, TOKENS).float().log_softmax(-1)
    noise = rms_over_spread(logits(lens, TOKENS).float().log_softmax(-1), unedited)
    if noise == 0.0:  # both libraries compute the same bits (Gemma-2): what does the precision itself change?
        noise = rms_over_spread(log_probabilities(plain(folder, dtype=torch.float32), TOKENS), unedited)
    for reference in (hooked, log_probabilities(by_hand, TOKENS)):
        check(got, reference, exported.dtype, noise)
    assert rms_over_spread(unedited, got) > 4 * max(noise, 1e-3)  # so an unedited model would not pass
    return "exact"


def check(got: Tensor, reference: Tensor, dtype: torch.dtype, noise: float) -> None:
    if dtype == torch.float32:
        assert float((got - reference).abs().max()) <= 1e-4
    else:
        assert rms_over_spread(reference, got) <= 2 * noise


@pytest.mark.parametrize("edit_name", list(EDITS))
def test_each_form_is_exact_or_refused(
    edit_name: str, lens: Any, folder: Path, family: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for form in FORMS:
        with subtests.test(form=form):
            assert outcome(lens, folder, family, edit_name, form, tmp_path / form) == expected(edit_name, family, form)


def test_the_documentation_shows_the_matrix() -> None:
    cells = [(e, f, form, expected(e, f, form)) for e in EDITS for f in FAMILIES for form in FORMS]
    assert table_of(cells) in PAGE.read_text(encoding="utf-8")
