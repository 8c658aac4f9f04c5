"""A fit that was killed goes on and ends with the same bits."""

import copy
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods import MRP, NPO, RMU, UNDIAL, AdaptiveRMU, Distillation, Fit, IdkPreference, NoisyRMU, SimNPO
from mrp_lens.methods import budget as budget_module
from mrp_lens.methods.mrp import distillation as distillation_module
from mrp_lens.training import Callback
from mrp_lens.training.checkpoints import IDENTITY_FILE, STATE_FILE, Checkpoint
from mrp_lens.training.optim import update_size
from tests.support.kills import Killed, kill_at_save
from tests.support.switches import default_dtype

STEPS = 7
SMALL: dict[str, Any] = {"steps": STEPS, "batch_size": 3}
FITTERS: dict[str, Any] = {
    "mrp": MRP(layers=[1, 2], rank=2, **SMALL),
    "rmu": RMU(layer=2, **SMALL),
    "rmu-released": replace(RMU.released(layer=2), **SMALL),
    "adaptive-rmu-first-batch": AdaptiveRMU(layer=2, coefficient="first_batch", **SMALL),
    "rmu-noise": NoisyRMU(layer=2, **SMALL),
    "npo": NPO(layers=[1, 2], **SMALL),
    "simnpo": SimNPO(layers=[1, 2], **SMALL),
    "idk-preference": IdkPreference(layers=[1, 2], **SMALL),
    "undial": UNDIAL(layers=[1, 2], **SMALL),
}
BUDGETED: dict[str, Any] = {  # all control questions are below the target: the fit ends early
    name: replace(FITTERS[name], steps=12, budget=0.01, target=0.99) for name in ("mrp", "rmu", "npo")
}


def same(a: Fit, b: Fit) -> bool:
    logs = [fit.log.drop(columns="seconds") for fit in (a, b)]
    directions = [{name: u.tolist() for name, u in fit.directions.items()} for fit in (a, b)]
    edits = [fingerprint(fit.edit) for fit in (a, b)]
    return (
        a.outcome == b.outcome and edits[0] == edits[1] and logs[0].equals(logs[1]) and directions[0] == directions[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTERS)
@pytest.mark.usefixtures("untouched")
def test_a_killed_fit_goes_on_and_ends_with_the_same_bits(
    name: str, model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter, options = FITTERS[name], {"seed": 3, "progress": False}
    undisturbed = fitter.fit(model, *texts, **options)
    kept = {"checkpoint": tmp_path / "fit", "every": 2}
    with monkeypatch.context() as patch:
        kill_at_save(patch, 2)
        with pytest.raises(Killed):
            fitter.fit(model, *texts, **options, **kept)
    resuming, idle = Watcher(), Watcher()
    assert same(fitter.fit(model, *texts, **options, **kept, callbacks=[resuming]), undisturbed)
    assert resuming.steps == [4, 5, 6]  # what the second checkpoint held was not done again
    assert same(fitter.fit(model, *texts, **options, **kept, callbacks=[idle]), undisturbed)
    assert idle.steps == []  # a finished fit is read, not made again


class Watcher(Callback):
    """Remembers the steps, and sends a signal after one."""

    def __init__(self, number: int = 0, after: int = -1) -> None:
        self.steps: list[int] = []
        self.number, self.after = number, after

    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        self.steps.append(step)
        if step == self.after:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_fit_after_the_step_under_way_and_keeps_it(
    number: signal.Signals, model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path
) -> None:
    """One that comes while callbacks look on counts for the next step, which is saved."""
    fitter = FITTERS["rmu"]
    undisturbed = fitter.fit(model, *texts, progress=False)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    options: dict[str, Any] = {"progress": False, "checkpoint": tmp_path, "every": 100}
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            fitter.fit(model, *texts, callbacks=[Watcher(number, 2)], **options)
        assert ended.value.code == 128 + signal.SIGTERM
    else:
        stopped = fitter.fit(model, *texts, callbacks=[Watcher(number, 2)], **options)
        assert stopped.interrupted
        assert len(stopped.log) == 4
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers
    state = Checkpoint(tmp_path).load()
    assert state is not None
    assert len(state["rows"]) == 4
    assert same(fitter.fit(model, *texts, progress=False, checkpoint=tmp_path), undisturbed)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage is looked at after every other update, the control questions after 4 and 8: then 4 more are left."""
    for name, count in {"EVERY": 2, "LOOK": 4, "PATIENCE": 2}.items():
        monkeypatch.setattr(budget_module, name, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(
    ("save", "left"),
    [
        (1, list(range(3, 12))),
        (2, list(range(6, 12))),
        (3, list(range(9, 12))),
    ],
)
@pytest.mark.usefixtures("untouched", "quick_looks")
def test_a_killed_fit_within_a_budget_goes_on_with_what_it_has_seen(
    name: str,
    save: int,
    left: list[int],
    model: Any,
    texts: tuple[Corpus, Corpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first look at the questions, between both, and after it has decided to end; texts that the model wrote for
    it are written again."""
    fitter, kept = BUDGETED[name], {"checkpoint": tmp_path / "fit", "every": 3}
    undisturbed = fitter.fit(model, *texts, progress=False)
    assert undisturbed.outcome is not None
    assert len(undisturbed.log) == undisturbed.outcome.steps == 12
    with monkeypatch.context() as patch:
        kill_at_save(patch, save)
        with pytest.raises(Killed):
            fitter.fit(model, *texts, progress=False, **kept)
    resuming, idle = Watcher(), Watcher()
    assert same(fitter.fit(model, *texts, progress=False, **kept, callbacks=[resuming]), undisturbed)
    assert resuming.steps == left
    assert same(fitter.fit(model, *texts, progress=False, **kept, callbacks=[idle]), undisturbed)
    assert idle.steps == []


@pytest.mark.parametrize("after", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 6])
@pytest.mark.usefixtures("quick_looks")
def test_a_signal_at_an_update_with_a_look_does_not_lose_the_look(
    after: int, model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path
) -> None:
    fitter = BUDGETED["mrp"]
    undisturbed = fitter.fit(model, *texts, progress=False)
    options: dict[str, Any] = {"progress": False, "checkpoint": tmp_path, "every": 100}
    with pytest.raises(SystemExit):
        fitter.fit(model, *texts, callbacks=[Watcher(signal.SIGTERM, after)], **options)
    resuming = Watcher()
    assert same(fitter.fit(model, *texts, callbacks=[resuming], **options), undisturbed)
    assert resuming.steps == list(range(after + 2, 12))


@pytest.mark.slow
def test_a_later_request_goes_on_as_well(
    model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter = FITTERS["mrp"]
    first = fitter.fit(model, *texts, progress=False).edit
    other = Corpus(texts[0].documents[:5], "other")
    undisturbed = fitter.fit(model, other, texts[1], after=first, progress=False)
    with monkeypatch.context() as patch:
        kill_at_save(patch, 1)
        with pytest.raises(Killed):
            fitter.fit(model, other, texts[1], after=first, progress=False, checkpoint=tmp_path, every=3)
    assert same(fitter.fit(model, other, texts[1], after=first, progress=False, checkpoint=tmp_path), undisturbed)
    with pytest.raises(ValueError, match="holds the checkpoint of another fit \\(other after\\)"):
        fitter.fit(model, other, texts[1], progress=False, checkpoint=tmp_path, request="other")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["texts", "training"])
def test_a_distillation_goes_on_and_never_loses_the_projection(
    stage: str, model: Any, backend: str, texts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "bridge":
        pytest.skip("distillation needs the Bridge")
    settings = Distillation(layers=[0, 1], texts=12, text_length=6, agreement=1e3, steps=4, batch_size=4)
    fitter = replace(FITTERS["mrp"], distillation=settings)
    undisturbed = fitter.fit(model, *texts, progress=False)
    kept: dict[str, Any] = {"progress": False, "checkpoint": tmp_path, "every": 2}
    with monkeypatch.context() as patch:
        if stage == "texts":
            patch.setattr(distillation_module, "kl", killed)
        else:
            kill_at_save(patch, 5)  # the first of the distillation: the projection writes after 2, 4, 6 and 7 steps
        with pytest.raises(Killed):
            fitter.fit(model, *texts, **kept)
    assert (tmp_path / "distillation" / "texts.json").is_file()
    watcher = Watcher()
    with monkeypatch.context() as patch:
        patch.setattr(distillation_module, "written_texts", killed)
        assert same(fitter.fit(model, *texts, **kept, callbacks=[watcher]), undisturbed)
    assert watcher.steps == ([0, 1, 2, 3] if stage == "texts" else [2, 3])


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


def test_another_fit_is_refused_before_it_starts_and_says_what_differs(
    model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path
) -> None:
    fitter = RMU(layer=2, steps=2, batch_size=3)
    fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, options, differs in (
        (replace(fitter, steps=3), {}, "settings"),
        (fitter, {"seed": 1}, "seed"),
        (NoisyRMU(layer=2, steps=2, batch_size=3), {}, "method, settings"),
    ):
        with pytest.raises(ValueError, match=f"another fit \\(other {differs}\\)"):
            other.fit(model, *texts, progress=False, checkpoint=tmp_path, **options)
    with pytest.raises(ValueError, match=r"another fit \(other .*data\)"):
        fitter.fit(model, Corpus(texts[0].documents[1:], "forget"), texts[1], progress=False, checkpoint=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_fit_goes_on_where_what_it_measures_of_the_model_has_other_digits(
    model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter = RMU(layer=2, steps=2, batch_size=3)
    whole = fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    measured = update_size
    monkeypatch.setattr(
        "mrp_lens.methods.rmu.update_size", lambda matrices: measured(matrices) * (1 + 1e-7)
    )  # of another processor
    assert fitter.fit(model, *texts, progress=False, checkpoint=tmp_path).log.equals(whole.log)


def test_a_model_with_other_weights_and_the_same_embedding_is_another_fit(
    model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path
) -> None:
    fitter = RMU(layer=2, steps=1, batch_size=3)
    fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    weight = next(parameter for name, parameter in model.named_parameters() if "ln" in name or "norm" in name)
    with torch.no_grad():
        weight[0] += 1.0
    try:
        with pytest.raises(ValueError, match=r"another fit \(other .*model\)"):
            fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    finally:
        with torch.no_grad():
            weight[0] -= 1.0


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 nothing", (2).to_bytes(8, "little") + b"{}", (2**60).to_bytes(8, "little")]
)
def test_a_damaged_checkpoint_is_refused(content: bytes, model: Any, texts: Any, tmp_path: Path) -> None:
    fitter = RMU(layer=2, steps=1, batch_size=3)
    fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    (tmp_path / IDENTITY_FILE).write_text("[1")
    with pytest.raises(ValueError, match="is damaged"):
        fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)


def test_a_state_of_other_tensors_is_refused_and_leaves_the_model(model: Any, untouched: None, tmp_path: Path) -> None:
    texts = Corpus.from_texts(["One two three."], name="a"), Corpus.from_texts(["Four five six."], name="b")
    fitter = RMU(layer=2, steps=1, batch_size=3)
    fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)
    kept = Checkpoint(tmp_path)
    state = kept.load()
    assert state is not None
    wrong: dict[str, Any]
    for wrong in (
        {"tensors": state["tensors"][:1]},
        {"tensors": 3},
        {"rows": [1]},
        {"resumable": {}},
        {"generator": 1},
        {"rows": [{"step": 0}]},
    ):
        kept.save(state | wrong)
        with pytest.raises(ValueError, match="does not fit this run"):
            fitter.fit(model, *texts, progress=False, checkpoint=tmp_path)


def test_a_folder_that_cannot_be_written_into_is_found_before_the_fit(model: Any, texts: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RMU(layer=2, steps=1).fit(model, *texts, progress=False, checkpoint=tmp_path / "file" / "fit")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        RMU(layer=2, steps=1).fit(model, *texts, progress=False, checkpoint=tmp_path / "fit", every=0)


def test_a_saved_fit_is_the_same_fit(model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    for name in ("mrp", "rmu"):
        fit = FITTERS[name].fit(model, *texts, progress=False)
        assert fit.outcome is not None
        fit.save(tmp_path / name)
        loaded = Fit.load(tmp_path / name)
        assert same(loaded, fit)
        assert loaded.log.equals(fit.log)
        assert json.loads(json.dumps(loaded.settings)) == json.loads(json.dumps(dict(fit.settings)))
    (tmp_path / "rmu" / "fit.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Fit.load(tmp_path / "rmu")
    with pytest.raises(FileNotFoundError, match=r"holds no fit\.json"):
        Fit.load(tmp_path)


def test_settings_may_be_numpy_numbers_and_the_edit_can_still_be_saved(
    model: Any, texts: tuple[Corpus, Corpus], tmp_path: Path
) -> None:
    fitters: dict[str, Any] = {
        "rmu": RMU(layer=np.argmax([0, 0, 1]), steps=np.int64(1), batch_size=4, lr=np.float32(1e-3)),
        "mrp": MRP(layers=np.arange(1, 3), rank=2, steps=1),
        "adaptive": AdaptiveRMU(layer=2, steps=1, beta=torch.tensor(3.0)),
    }
    fits = {name: fitter.fit(model, *texts, seed=np.int64(2), progress=False) for name, fitter in fitters.items()}
    for name, fit in fits.items():
        fit.edit.save_pretrained(tmp_path / name)
    assert fits["rmu"].settings["lr"] == float(np.float32(1e-3))
    assert fits["rmu"].edit.provenance["seed"] == 2


@pytest.mark.slow
def test_a_fit_is_the_same_whatever_a_notebook_has_switched_off(model: Any, texts: tuple[Corpus, Corpus]) -> None:
    for name in ("mrp", "rmu", "npo"):
        usual = FITTERS[name].fit(model, *texts, progress=False)
        for switched in (
            torch.no_grad(),
            torch.inference_mode(),
            torch.device("meta"),
            torch.autocast("cpu", dtype=torch.bfloat16),
            default_dtype(torch.float64),
            default_dtype(torch.bfloat16),
        ):
            with switched:
                assert same(FITTERS[name].fit(model, *texts, progress=False), usual)


def test_a_model_made_in_inference_mode_is_refused_by_name(model: Any, texts: tuple[Corpus, Corpus]) -> None:
    with torch.inference_mode():
        made = copy.deepcopy(model)
    for name in ("mrp", "rmu", "npo"):
        with pytest.raises(ValueError, match=r"loaded inside torch\.inference_mode\(\)"):
            FITTERS[name].fit(made, *texts, progress=False)
