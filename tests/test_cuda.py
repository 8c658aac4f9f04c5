"""On a GPU everything gives what it gives on the CPU: figures, fits, checkpoints, edits on and off, attacks, exports. Skipped
where there is none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mrp_lens as ml
from mrp_lens import attacks, metrics
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit, WeightEdit, load_edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods import MRP, NPO, RMU, AdaptiveRMU
from mrp_lens.models import load_model
from tests.conftest import assert_same_state, state_of
from tests.support.commands import invoke
from tests.support.edits import projection
from tests.support.kills import Killed, arguments, kill_at_save, write_data

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FITTERS: dict[str, Any] = {
    "mrp": MRP(layers=[1, 2], rank=2, steps=6, batch_size=3),
    "rmu": RMU(layer=2, steps=6, batch_size=3),
    "adaptive-rmu": AdaptiveRMU(layer=2, steps=6, batch_size=3),
    "npo": NPO(layers=[1, 2], steps=6, batch_size=3),
}


@pytest.fixture(scope="module")
def pair(backend: str, tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model on the CPU and on the GPU."""
    return tuple(load_model(str(tiny_folder), backend=backend, device=device) for device in ("cpu", "cuda"))  # type: ignore[return-value]


@pytest.fixture
def quiz() -> Questions:
    rows = [
        {"question": f"The colour of Zaxim{i} is", "choices": ["red", "blue", "dark green", "white"], "answer": i % 4}
        for i in range(12)
    ]
    return Questions.from_rows([row | {"who": f"Zaxim{i // 2}"} for i, row in enumerate(rows)], entity="who")


def close(a: Any, b: Any, tolerance: float = 2e-3) -> None:
    """Two frames are alike: numbers to a tolerance (a float32 sum depends on its order), all else to the letter."""
    assert list(a.columns) == list(b.columns)
    for column in a:
        if a[column].dtype.kind == "f":
            np.testing.assert_allclose(a[column], b[column], rtol=tolerance, atol=tolerance, err_msg=str(column))
        else:
            assert a[column].tolist() == b[column].tolist(), column


def tensors_of(edit: Edit) -> dict[str, torch.Tensor]:
    return edit.to_parts()[1]


def test_figures_are_those_of_the_cpu(pair: tuple[Any, Any], texts: tuple[Corpus, Corpus], quiz: Questions) -> None:
    groups = {"forget": texts[0], "retain": texts[1]}
    u = torch.ones(pair[0].cfg.d_model)
    edit = projection(1, 2)
    readers: list[Callable[[Any], Any]] = [
        lambda m: metrics.accuracy(m, quiz),
        lambda m: metrics.perplexity(m, texts[1]),
        lambda m: metrics.answer_probability(m, texts[0]),
        lambda m: metrics.alignment(m, groups, u),
        lambda m: metrics.confidence(m, quiz, mode="forced"),
        lambda m: metrics.confidence(m, quiz, tokens=4),
        lambda m: metrics.logit_lens(m, quiz),
    ]
    for read in readers:
        close(*(read(model) for model in pair))
        with edit.applied(pair[0]), edit.applied(pair[1]):
            close(*(read(model) for model in pair))
    for look in (metrics.geometry, metrics.propagation):
        close(*(look(model, groups, edit) for model in pair))


@pytest.mark.parametrize("name", FITTERS)
def test_a_fit_learns_what_it_learns_on_the_cpu_and_goes_on_after_a_kill(
    name: str, pair: tuple[Any, Any], texts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter, (cpu, gpu) = FITTERS[name], pair
    before = state_of(gpu)
    mine = fitter.fit(gpu, *texts, progress=False)
    theirs = fitter.fit(cpu, *texts, progress=False)
    assert mine.log["loss"].iloc[0] == pytest.approx(theirs.log["loss"].iloc[0], rel=1e-3, abs=1e-4)
    if isinstance(mine.edit, WeightEdit):
        for key, tensor in tensors_of(mine.edit).items():
            assert float((tensor - tensors_of(theirs.edit)[key]).abs().max()) < 0.2 * float(tensor.std())
    assert fingerprint(fitter.fit(gpu, *texts, progress=False).edit) == fingerprint(mine.edit)
    kept: dict[str, Any] = {"progress": False, "checkpoint": tmp_path, "every": 2}
    with monkeypatch.context() as patch:
        kill_at_save(patch, 2)
        with pytest.raises(Killed):
            fitter.fit(gpu, *texts, **kept)
    resumed = fitter.fit(gpu, *texts, **kept)
    assert fingerprint(resumed.edit) == fingerprint(mine.edit)
    assert resumed.log.drop(columns="seconds").equals(mine.log.drop(columns="seconds"))
    assert_same_state(before, state_of(gpu))
    with mine.edit.applied(gpu), mine.edit.applied(cpu):
        close(metrics.perplexity(gpu, texts[0]), metrics.perplexity(cpu, texts[0]), 5e-3)
    mine.edit.save_pretrained(tmp_path / "edit")
    assert fingerprint(load_edit(tmp_path / "edit")) == fingerprint(mine.edit)
    assert_same_state(before, state_of(gpu))


def test_edits_come_on_and_off_in_any_order(pair: tuple[Any, Any], texts: tuple[Corpus, Corpus]) -> None:
    gpu = pair[1]
    before = state_of(gpu)
    first = RMU(layer=2, steps=2, batch_size=3).fit(gpu, *texts, progress=False).edit
    first.attach(gpu)
    second = RMU(layer=2, steps=2, batch_size=3).fit(gpu, *texts, seed=1, progress=False).edit
    second.attach(gpu)
    third = ml.SteeringEdit.towards(torch.ones(gpu.cfg.d_model), layer=1, coefficient=3.0, noise=0.01)
    with third.applied(gpu):
        metrics.perplexity(gpu, texts[0])
    first.detach(gpu)
    second.detach(gpu)
    assert_same_state(before, state_of(gpu))


def test_attacks_leave_the_model_and_agree_with_the_cpu(
    pair: tuple[Any, Any], texts: tuple[Corpus, Corpus], quiz: Questions
) -> None:
    train, held_out = quiz.halves(by="entity")
    edit, before = projection(1, 2), state_of(pair[1])
    curves = [
        attacks.relearn(m, edit, train=train, held_out=held_out, steps=3, marks=(0, 3), lr=1e-3, progress=False)
        for m in pair
    ]
    close(*(curve[["step", "lr", "held_out_accuracy", "train_accuracy"]] for curve in curves))
    others: list[Callable[[Any], Any]] = [
        lambda m: attacks.bypass(
            m, edit, held_out=held_out, shots=train, forget=texts[0], retain=texts[1], progress=False
        ),
        lambda m: attacks.probe(m, edit, train=train, held_out=held_out, progress=False),
        lambda m: attacks.jailbreak(m, edit, train=train, held_out=held_out, steps=2, every=1, progress=False),
        lambda m: attacks.input_gradients(m, edit, held_out, progress=False),
    ]
    for attack in others:
        assert len(attack(pair[1]))
        assert_same_state(before, state_of(pair[1]))


@pytest.mark.parametrize("form", ["folded", "module"])
def test_an_export_from_the_gpu_is_the_hooked_model(
    form: str, pair: tuple[Any, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    edit = projection(1, 2, site="mlp_out") if form == "folded" else projection(1, 2)
    report = ml.export_hf(pair[1], edit, tmp_path / "out", form, base=tiny_folder, progress=False)
    assert report.proof is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=form == "module").to("cuda").eval()
    tokens = torch.randint(3, 200, (2, 30), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad(), edit.applied(pair[1]):
        wanted = pair[1](tokens)
        torch.testing.assert_close(plain(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    write_data(tmp_path)
    return tmp_path  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["mrp", "rmu"])
def test_the_whole_command_runs_there(method: str, dtype: str, tiny_folder: Path, data: Path) -> None:
    line = [*arguments("unlearn", tiny_folder, data, data / "out", method), "--dtype", dtype, "--device", "cuda"]
    result = invoke(*line)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert invoke(*line).exit_code == 0
    assert (data / "out" / "report.html").is_file()
