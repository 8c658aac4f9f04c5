import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch

from mrp_lens.attacks import FactSplit, Probe, v_information
from mrp_lens.attacks.probe import probe
from mrp_lens.attacks.v_information import LabelledStates, ProbeKind, usable_information
from mrp_lens.data import Question, Questions
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.data.world import World
from mrp_lens.models import LensModel, load_model
from mrp_lens.models.hooks import hook_name
from tests.conftest import LAYERS, assert_same_state, state_of
from tests.support.edits import projection

KINDS: list[ProbeKind] = ["linear", "mlp"]
DIRECTION = torch.randn(16, generator=torch.Generator().manual_seed(100))
CLASSES = torch.randn(10, 16, generator=torch.Generator().manual_seed(101))


def entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def erased(n: int, seed: int) -> LabelledStates:
    """The state is that of the right answer in 6 of 10 facts, and nothing else: 0.6 of 2 bits."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.stack([torch.randperm(10, generator=generator)[:4] for _ in range(n)])
    right = torch.randint(4, (n,), generator=generator)
    seen = torch.rand(n, 1, generator=generator) < 0.6
    states = CLASSES[choices.gather(1, right[:, None])[:, 0]] * seen
    return LabelledStates(states + 0.01 * torch.randn(n, 16, generator=generator), choices, right)


def flipped(n: int, seed: int) -> LabelledStates:
    """Two answers, of which the state shows the wrong one in 1 of 10 facts: a binary symmetric channel."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.1
    states = (2 * (right ^ wrong.long()) - 1)[:, None] * DIRECTION
    noise = 0.1 * torch.randn(n, 16, generator=generator)
    return LabelledStates(states + noise, torch.tensor([[0, 1]]).repeat(n, 1), right)


def marked(n: int, seed: int) -> LabelledStates:
    """A state a choice: that of the right one is marked in 6 of 10 facts. Every second fact has 2 choices, not 4."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([4, 2]).repeat(n // 2)
    choices = torch.where(torch.arange(4) < counts[:, None], 0, -1)
    right = (torch.rand(n, generator=generator) * counts).long()
    states = torch.randn(n, 1, 16, generator=generator) + 0.1 * torch.randn(n, 4, 16, generator=generator)
    states[torch.arange(n), right] += (torch.rand(n, 1, generator=generator) < 0.6) * DIRECTION
    return LabelledStates(states * (choices == 0)[..., None], choices, right)


def crossed(n: int, seed: int) -> LabelledStates:
    """As `flipped`, but the answer is in the product of two coordinates, where no linear probe sees it."""
    facts = flipped(n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shown = (facts.states @ DIRECTION).sign()
    other = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    states = torch.stack([other, other * shown], dim=1) + 0.05 * torch.randn(n, 2, generator=generator)
    return LabelledStates(states, facts.choices, facts.right)


PLANTED: list[tuple[Callable[[int, int], LabelledStates], float]] = [
    (erased, 0.6 * 2),
    (flipped, 1 - entropy(0.1)),
    (marked, 0.6 * (2 + 1) / 2),
]


def bits(train: LabelledStates, held_out: LabelledStates, kind: ProbeKind) -> float:
    return float(usable_information(train, held_out, kind=kind).bits.mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("planted", "truth"), PLANTED, ids=["erased", "flipped", "marked"])
def test_planted_information_is_found_and_shuffled_labels_tell_nothing(
    planted: Callable[[int, int], LabelledStates], truth: float, kind: ProbeKind
) -> None:
    train, held_out = planted(400, 1), planted(4000, 2)
    assert bits(train, held_out, kind) == pytest.approx(truth, rel=0.1)
    shuffled = train.shuffled(torch.Generator().manual_seed(0))
    assert abs(bits(shuffled, held_out, kind)) <= 0.05


def test_only_an_mlp_sees_what_is_in_a_product() -> None:
    train, held_out = crossed(400, 1), crossed(4000, 2)
    assert abs(bits(train, held_out, "linear")) <= 0.05
    assert bits(train, held_out, "mlp") == pytest.approx(1 - entropy(0.1), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frequent_answer_is_no_information(kind: ProbeKind) -> None:
    def skewed(n: int, seed: int) -> LabelledStates:
        generator = torch.Generator().manual_seed(seed)
        right = (torch.rand(n, generator=generator) < 0.2).long()
        return LabelledStates(torch.randn(n, 16, generator=generator), torch.tensor([[0, 1]]).repeat(n, 1), right)

    estimate = usable_information(skewed(400, 1), skewed(4000, 2), kind=kind)
    assert float(estimate.right.mean()) == pytest.approx(0.8, abs=0.02)
    assert float(estimate.blind.mean()) == pytest.approx(entropy(0.2), abs=0.03)
    assert abs(float(estimate.bits.mean())) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_probes_of_states_without_information_give_nothing_and_seldom_less(kind: ProbeKind) -> None:
    def empty(seed: int, n: int) -> LabelledStates:
        generator = torch.Generator().manual_seed(seed)
        facts = erased(n, seed)
        return LabelledStates(torch.randn(n, 16, generator=generator), facts.choices, facts.right)

    found = [bits(empty(seed, 150), empty(seed + 50, 500), kind) for seed in range(8)]
    assert abs(sum(found) / len(found)) <= 0.02
    assert sum(value == 0 for value in found) > 4  # it takes a gain of two standard errors for another value


def test_constant_states_and_scaled_states_are_no_trouble() -> None:
    train, held_out = erased(300, 1), erased(1000, 2)
    nothing, neither = (
        LabelledStates(torch.full_like(facts.states, 1e4 / 3), facts.choices, facts.right)
        for facts in (train, held_out)
    )
    assert abs(bits(nothing, neither, "linear")) <= 0.01
    moved, too = (LabelledStates(1e4 * facts.states + 1e5, facts.choices, facts.right) for facts in (train, held_out))
    assert bits(moved, too, "linear") == pytest.approx(bits(train, held_out, "linear"), abs=0.02)


def test_shuffling_keeps_answers_with_their_choices_and_parts_them_from_their_states() -> None:
    facts = erased(200, 1)
    shuffled = facts.shuffled(torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.states, facts.states)
    rows = [sorted((*map(tuple, f.choices.tolist()),)) for f in (facts, shuffled)]
    assert rows[0] == rows[1]
    assert torch.equal(shuffled.answers.sort().values, facts.answers.sort().values)
    assert float((shuffled.answers == facts.answers).double().mean()) == pytest.approx(0.1, abs=0.07)
    by_choice = marked(2000, 1)
    drawn = by_choice.shuffled(torch.Generator().manual_seed(0)).right
    assert bool((by_choice.choices.gather(1, drawn[:, None]) == 0).all())
    assert float((drawn == by_choice.right).double().mean()) == pytest.approx((1 / 4 + 1 / 2) / 2, abs=0.05)


COLOURS = (" red", " blue", " green", " white")
WORDS = {"today": 0, "again": 1, "late": 2, "early": 3}  # tell the colour, so that there is something to find


def quiz(numbers: range, name: str) -> Questions:
    words = list(WORDS)
    return Questions(
        tuple(
            Question(
                ("They say " if i % 3 else "") + f"the colour of Zaxim{i} " + words[i % 4],
                COLOURS[: 3 + (i // 4 + WORDS[words[i % 4]] == 3)] if WORDS[words[i % 4]] < 3 else COLOURS,
                WORDS[words[i % 4]],
            )
            for i in numbers
        ),
        name,
    )


TRAIN, HELD_OUT, UNTAUGHT = quiz(range(32), "train"), quiz(range(32, 56), "held out"), quiz(range(56, 80), "untaught")


def slowly(model: Any, questions: Questions, layer: int, *, by_choice: bool) -> LabelledStates:
    """One text at a time, without padding."""
    states, choices = [], []
    for question in questions.questions:
        row = []
        for text in question.choices if by_choice else ("",):
            ids = [model.tokenizer.bos_token_id]
            ids += model.tokenizer(question.prompt + text, add_special_tokens=False)["input_ids"]
            mask = torch.ones(1, len(ids), dtype=torch.long)
            seen: list[torch.Tensor] = []
            with torch.no_grad(), model.hooks(fwd_hooks=[(hook_name(layer), lambda x, hook, to=seen: to.append(x))]):
                model(torch.tensor([ids]), attention_mask=mask)
            row.append(seen[0][0, -1].float())
        row += [torch.zeros_like(row[0])] * ((4 - len(row)) if by_choice else 0)
        states.append(torch.stack(row) if by_choice else row[0])
        choices.append([*range(len(question.choices)), *[-1] * (4 - len(question.choices))])
    right = torch.tensor([question.answer for question in questions.questions])
    return LabelledStates(torch.stack(states), torch.tensor(choices), right)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["answer", "choice"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_probe_reads_the_states_that_a_pass_over_each_text_alone_gives(
    model: LensModel, backend: str, tiny_folder: Path, target: Any, precision: str
) -> None:
    if precision == "bfloat16":
        model = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]
    before = state_of(model)
    by_choice = target == "choice"
    estimate = usable_information(*(slowly(model, part, 1, by_choice=by_choice) for part in (TRAIN, HELD_OUT)))
    for padding in get_args(PaddingSide):
        options: dict[str, Any] = {"target": target, "batch_size": 7, "padding": padding, "layers": [1]}
        row = probe(model, None, train=TRAIN, held_out=HELD_OUT, progress=False, **options).iloc[0]
        # In bfloat16 states are off by roundings of 2^-8, which fitting passes on.
        tolerance = 1e-3 if precision == "float32" else 0.05
        assert row["bits"] == pytest.approx(float(estimate.bits.mean()), abs=tolerance)
        assert row["entropy"] == pytest.approx(float(estimate.blind.mean()), abs=1e-6)
        assert row["cross_entropy"] == pytest.approx(row["entropy"] - row["bits"], abs=1e-9)
        assert row["low"] <= row["bits"] <= row["high"]
        if target == "answer":
            assert row["bits"] > 0.3  # the words were there to be found
    assert_same_state(before, state_of(model))


@pytest.fixture(scope="module")
def frame(model: LensModel) -> pd.DataFrame:
    """With an edit at layer 2."""
    return probe(model, projection(2, rank=30), train=TRAIN, held_out=HELD_OUT, untaught=UNTAUGHT, progress=False)


def test_the_frame_says_what_was_asked_of_which_probe(frame: pd.DataFrame) -> None:
    assert list(frame["layer"]) == [layer for layer in range(LAYERS) for _ in range(3)]
    assert list(frame["group"]) == ["held-out", "shuffled", "never-taught"] * LAYERS
    assert set(frame["kind"]) == {"linear"}
    assert set(frame["target"]) == {"answer"}
    assert (frame["classes"] == 4).all()
    assert list(frame["train_n"]) == [32, 32, 12] * LAYERS
    assert (frame["n"] == 24).all()


@pytest.mark.slow
def test_an_edit_shows_from_its_layer_on_and_is_off_again(
    model: LensModel, frame: pd.DataFrame, untouched: None
) -> None:
    unedited = probe(model, None, train=TRAIN, held_out=HELD_OUT, untaught=UNTAUGHT, progress=False)
    below = frame["layer"] < 2
    pd.testing.assert_frame_equal(unedited[below], frame[below])
    assert (unedited["cross_entropy"] != frame["cross_entropy"])[~below & (frame["group"] == "held-out")].all()


@pytest.mark.filterwarnings("ignore:only 18 held-out questions")
def test_questions_may_have_different_numbers_of_choices(model: LensModel, untouched: None) -> None:
    """The probes of `train` and `held_out` are not those of the halves of `untaught`, of which one has the widest question."""

    def fewer(part: Questions, count: int) -> Questions:
        kept = [replace(q, choices=q.choices[:count]) for q in part.questions if q.answer < count]
        return replace(part, questions=tuple(kept))

    mixed = (*fewer(UNTAUGHT, 3).questions, UNTAUGHT.questions[-1])
    parts: dict[str, Any] = {"held_out": fewer(HELD_OUT, 3), "untaught": replace(UNTAUGHT, questions=mixed)}
    frame = probe(model, None, train=fewer(TRAIN, 2), target="choice", layers=[1], progress=False, **parts)
    assert frame.set_index("group")["classes"].to_dict() == {"held-out": 3, "shuffled": 3, "never-taught": 4}
    alone = probe(
        model, None, train=fewer(TRAIN, 2), held_out=parts["held_out"], target="choice", layers=[1], progress=False
    )
    assert alone["bits"].tolist() == pytest.approx(frame["bits"].tolist()[:2], rel=1e-4)


@pytest.mark.parametrize("place", ["last_states", "usable_information"])
def test_the_model_is_left_alone_when_a_probe_is_stopped(
    model: LensModel, monkeypatch: pytest.MonkeyPatch, place: str, untouched: None
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[probe.__module__], place, stop)
    with pytest.raises(KeyboardInterrupt):
        probe(model, projection(2), train=TRAIN, held_out=HELD_OUT, progress=False)


def test_what_a_probe_cannot_answer_is_refused(model: LensModel, untouched: None) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            probe(model, None, **{"train": TRAIN, "held_out": HELD_OUT, "progress": False, **changes})

    texts = [Question(f"Tell about Zaxim{i}:", (f" it is {i}", f" it was {i}"), 0) for i in range(60)]
    free, more = Questions(tuple(texts[:30]), "free"), Questions(tuple(texts[30:]), "more")
    refused(ValueError, "120 different answers .* only 30 training facts in 'free'", train=free, held_out=more)
    refused(ValueError, "overlap in 32 questions", held_out=TRAIN)
    refused(ValueError, "24 questions of untaught 'held out' are in train or held_out", untaught=HELD_OUT)
    refused(ValueError, "only 3 training facts in 'train'", train=TRAIN.spread(3))
    refused(ValueError, "unknown kind 'deep'; choose one of linear, mlp", kind="deep")
    refused(ValueError, "unknown target 'token'", target="token")
    refused(ValueError, "unknown padding 'middle'", padding="middle")
    refused(ValueError, "layer 9 is out of range", layers=[9])
    refused(ValueError, "unknown site 'resid'", site="resid")
    refused(ValueError, "batch_size must be above 0", batch_size=0)
    refused(TypeError, "seed must be an int", seed=0.5)
    refused(TypeError, "held_out must be Questions", held_out=["who"])
    refused(TypeError, "untaught must be Questions", untaught=["who"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_knows_its_facts_at_the_last_layer_and_none_that_it_was_not_taught(
    demo_model: Any, world: World, kind: ProbeKind
) -> None:
    train, held_out = (world.questions("potions", half=half) for half in (0, 1))
    untaught = world.questions("potions", taught=False)
    frame = probe(
        demo_model, None, train=train, held_out=held_out, untaught=untaught, layers=[7], kind=kind, progress=False
    ).set_index("group")
    assert (frame["entropy"] == 2).all()  # four choices, none more frequent
    assert frame["bits"]["held-out"] > 1.5
    assert frame["accuracy"]["held-out"] > 0.9
    assert abs(frame["bits"]["shuffled"]) <= 0.05
    assert abs(frame["bits"]["never-taught"]) <= 0.05


def test_where_no_probe_is_used_nothing_is_known_of_how_far_off_its_zero_is(
    model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v_information, "CERTAINTY", math.inf)
    row = probe(model, None, train=TRAIN, held_out=HELD_OUT, layers=[1], progress=False).iloc[0]
    assert row["bits"] == 0.0
    assert math.isnan(row["low"])
    assert math.isnan(row["high"])


@pytest.mark.parametrize(
    ("target", "few", "needed"),
    [("answer", 9, 5), ("choice", 9, 5), ("answer", 24, 15)],
    ids=["folds", "choice", "classes"],
)
def test_too_few_never_taught_facts_are_left_out_and_the_suite_says_so_beforehand(
    model: LensModel, target: Any, few: int, needed: int, untouched: None
) -> None:
    untaught = quiz(range(56, 56 + few), "untaught")
    if needed > 5:  # another wrong choice in each of some: more answers than facts in a half
        more = (replace(q, choices=(*q.choices[:3], f" hue{i % 11}")) for i, q in enumerate(untaught.questions))
        untaught = Questions(tuple(replace(q, answer=min(q.answer, 2)) for q in more), "untaught")
    data: dict[str, Any] = {"train": TRAIN, "held_out": HELD_OUT}
    message = f"a half of the {few} untaught questions of 'untaught' .*needs .* in each half"
    with pytest.warns(UserWarning, match=message):
        frame = probe(model, None, **data, untaught=untaught, target=target, layers=[1], progress=False)
    assert set(frame["group"]) == {"held-out", "shuffled"}
    facts = FactSplit(TRAIN, HELD_OUT, untaught, None)
    with pytest.warns(UserWarning, match=message):
        Probe().check_facts(facts)
    Probe().check_facts(replace(facts, untaught=UNTAUGHT))


def test_the_table_takes_the_best_layer_of_the_answers_and_of_the_control() -> None:
    bits = {"held-out": (0.2, 0.9, 0.1), "never-taught": (0.3, -0.1, 0.0)}
    rows = [
        {"layer": layer, "group": group, "bits": value, "low": value, "high": value, "entropy": 2.0, "n": 24}
        for group, values in bits.items()
        for layer, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows).assign(method="mrp", kind="linear")
    (row,) = Probe().rows({"probe_bits": frame}, "mrp")
    assert (row["layer"], row["bits"], row["never_taught_bits"]) == (1, 0.9, 0.3)
    (row,) = Probe().rows({"probe_bits": frame[frame["group"] == "held-out"]}, "mrp")
    assert math.isnan(row["never_taught_bits"])
