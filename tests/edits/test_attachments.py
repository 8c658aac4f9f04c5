"""Edits on a model are a record that knows itself: any order ends with the original bits, or is refused before it begins."""

import copy
import gc
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.edits import EditStack, ProjectionEdit, SteeringEdit, WeightEdit, edits_on
from mrp_lens.edits.subspace import Subspace
from mrp_lens.hf import attach
from mrp_lens.models import (
    LensModel,
    available_backends,
    describe,
    is_bridge,
    load_model,
    mlp_out_weight,
    tensor_digests,
)
from mrp_lens.models.attachments import exclusive
from mrp_lens.models.hooks import captured, frozen, hook_name
from mrp_lens.models.weights import weights_by_name
from tests.conftest import D_MODEL, assert_same_state, state_of
from tests.support.edits import all_kinds, assert_refused, logits, projection, weight_edit

TEXT = Corpus.from_texts(["The old man walked slowly near the house."])


def steering(coefficient: float = 2.0) -> SteeringEdit:
    return SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=coefficient, mode="add")


def chain(model: LensModel, *scales: float) -> list[WeightEdit]:
    """Weight edits of one matrix, each made on top of the one before."""
    weight = mlp_out_weight(model, 1)
    values, edits = weight.read(), []
    for scale in scales:
        edits.append(WeightEdit({weight.name: values * scale}, {weight.name: tensor_digests(values)}))
        values = values * scale
    return edits


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_weight_edits_leave_in_any_order(
    model: LensModel, tokens: torch.Tensor, order: tuple[int, ...], untouched: None
) -> None:
    edits = chain(model, 1.5, 0.5, -1.0)
    original, name = mlp_out_weight(model, 1).read(), mlp_out_weight(model, 1).name
    handles = [edit.attach(model) for edit in edits]
    left = [0, 1, 2]
    for number in order:
        handles[number].detach()
        left.remove(number)
        wanted = edits[left[-1]].tensors[name] if left else original
        assert torch.equal(mlp_out_weight(model, 1).read(), wanted)
        assert edits_on(model) == tuple(edits[n] for n in left)


def test_an_edit_that_is_on_is_refused_before_it_changes_anything(model: LensModel, untouched: None) -> None:
    for edit in (steering(), projection(1), weight_edit(model, 1)):
        twin = pickle.loads(pickle.dumps(edit))
        with edit.applied(model):
            before = state_of(model)
            for again in (edit, twin, EditStack([projection(3), twin]) if edit.kind != "projection" else twin):
                with pytest.raises(ValueError, match="attached to this model already or applied"):
                    again.attach(model, check=False)
                with pytest.raises(ValueError, match="already"), again.applied(model, check=False):
                    pass
            assert_same_state(before, state_of(model))


def test_a_handle_ends_with_its_block_and_says_whether_the_edit_is_on(model: LensModel, untouched: None) -> None:
    with projection(1).attach(model) as handle:
        assert handle.on
        assert "on=True" in repr(handle)
    assert edits_on(model) == ()
    with pytest.raises(ValueError, match="detached already"):
        handle.detach()
    with pytest.raises(RuntimeError, match="inside"), weight_edit(model, 1).attach(model):
        raise RuntimeError("inside")
    handle = projection(1).attach(model)
    projection(1).detach(model)  # an equal edit, a loaded one for example
    assert edits_on(model) == ()
    assert "on=False" in repr(handle)


@pytest.mark.parametrize("kind", range(4))
def test_a_copy_of_an_edited_model_carries_the_edit_and_can_lose_it(own: Any, tokens: torch.Tensor, kind: int) -> None:
    plain = logits(own, tokens)
    edit = [all_kinds(own, 1)[0], steering(), weight_edit(own, 1), projection(2) + weight_edit(own, 1)][kind]
    handle = edit.attach(own)
    edited, twin = logits(own, tokens), copy.deepcopy(own)
    handle.detach()
    assert torch.equal(logits(own, tokens), plain)
    assert torch.equal(logits(twin, tokens), edited)
    assert edits_on(twin) == (edit,)
    with pytest.raises(ValueError, match="already"):
        edit.attach(twin, check=False)
    edit.detach(twin)
    assert torch.equal(logits(twin, tokens), plain)
    assert_same_state(state_of(own), state_of(twin))


def test_a_pickled_model_has_its_edit_or_says_why_it_cannot(tiny_folder: Path, tokens: torch.Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    unedited = plain(tokens).logits
    attach(plain, projection(1))
    twin = pickle.loads(pickle.dumps(plain))
    assert torch.equal(twin(tokens).logits, plain(tokens).logits)
    projection(1).detach(twin)
    assert torch.equal(twin(tokens).logits, unedited)


def test_a_model_that_is_steered_at_positions_says_why_it_cannot_be_pickled(tiny_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    attach(plain, SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, positions=[-1]))
    with pytest.raises(ValueError, match="a Hugging Face model that is steered at positions, cannot be pickled"):
        pickle.dumps(plain)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """`torch.compile` as it comes, and nothing compiled before or after."""
    import torch._dynamo

    checked = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    torch._dynamo.reset()
    yield
    torch._dynamo.config.skip_nnmodule_hook_guards = checked
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_sees_edits_come_and_go_and_its_twin_none(dynamo: None) -> None:
    """One block of each, which compiles sooner."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=8, vocab_size=16)
    model, twin = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    edit = ProjectionEdit({hook_name(0, "mlp_out"): Subspace.random(3, 8, seed=0)})
    states = torch.randn(1, 5, 8)
    block, beside = model.transformer.h[0], twin.transformer.h[0]
    plain, other = block(states), beside(states)
    with attach(model, edit):
        edited = block(states)
    compiled: Any = torch.compile(block, backend="eager")
    compiled_beside: Any = torch.compile(beside, backend="eager")
    torch.testing.assert_close(compiled(states), plain)
    with attach(model, edit):
        for _ in range(2):  # in turns, so that neither is taken for the other
            torch.testing.assert_close(compiled(states), edited)
            torch.testing.assert_close(compiled_beside(states), other)
    torch.testing.assert_close(compiled(states), plain)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_of_transformer_lens_sees_edits_come_and_go(own: Any, dynamo: None) -> None:
    tokens, edit = torch.arange(3, 9)[None], projection(1)
    plain = own(tokens)
    with edit.applied(own):
        edited = own(tokens)
    compiled: Any = torch.compile(own, backend="eager")
    torch.testing.assert_close(compiled(tokens), plain)
    with edit.applied(own):
        torch.testing.assert_close(compiled(tokens), edited)
    torch.testing.assert_close(compiled(tokens), plain)


def test_hooks_of_transformer_lens_are_not_pickled(own: Any, tokens: torch.Tensor) -> None:
    if is_bridge(own):
        pytest.skip("a TransformerBridge cannot be pickled at all")
    with projection(1).applied(own), pytest.raises(ValueError, match="cannot be pickled with the hooks of an edit on"):
        pickle.dumps(own)
    edit = weight_edit(own, 1)
    with edit.applied(own):
        twin, edited = pickle.loads(pickle.dumps(own)), logits(own, tokens)
    assert torch.equal(logits(twin, tokens), edited)
    edit.detach(twin)
    assert torch.equal(logits(twin, tokens), logits(own, tokens))


def test_edits_are_equal_if_they_do_the_same(model: LensModel) -> None:
    for edit in all_kinds(model, 1):
        for twin in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
            assert twin == edit
            assert hash(twin) == hash(edit)
    assert projection(1) != projection(1, seed=9)
    assert steering(1.0) != steering(2.0)
    assert weight_edit(model, 1) != weight_edit(model, 1, scale=2.0)
    assert projection(1) != steering()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_while_edits_are_on_is_the_cast_of_the_unedited_model(own: Any, dtype: torch.dtype) -> None:
    twin = copy.deepcopy(own)
    edits = [projection(2), *chain(own, 1.5, 0.5)]
    for edit in edits:
        edit.attach(own)
    own.to(dtype)
    twin.to(dtype)
    with frozen(own):
        assert torch.isfinite(logits(own, torch.tensor([[5, 6, 7]]))).all()
    for edit in edits:
        edit.detach(own)
    assert_same_state(state_of(twin), state_of(own))


def test_a_matrix_that_somebody_else_changed_is_not_overwritten_in_silence(own: Any) -> None:
    edit, parameter = weight_edit(own, 1), mlp_out_weight(own, 1).parameter
    original = parameter.detach().clone()
    handle = edit.attach(own)
    with torch.no_grad():
        parameter[0, 0] += 1
    trained = parameter.detach().clone()
    for take_off in (handle.detach, partial(edit.detach, own)):
        with pytest.raises(ValueError, match=r"down_proj\.weight was changed while this edit was on"):
            take_off()
        assert torch.equal(parameter, trained)
        assert edits_on(own) == (edit,)
    with pytest.warns(UserWarning, match="that change is overwritten"):
        edit.detach(own, discard=True)
    assert torch.equal(parameter, original)
    edit.attach(own)
    with torch.no_grad():
        parameter.copy_(original)
    with pytest.warns(UserWarning, match="ran without the edit's"):
        edit.detach(own)
    with pytest.warns(UserWarning, match="overwritten"), edit.applied(own), torch.no_grad():
        parameter[0, 0] += 1
    assert torch.equal(parameter, original)


def test_a_replaced_parameter_is_noticed(own: Any) -> None:
    edit = weight_edit(own, 1)
    edit.attach(own)
    module, name = (
        (own.blocks[1].mlp.out.original_component, "weight") if is_bridge(own) else (own.blocks[1].mlp, "W_out")
    )
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().clone()))
    with pytest.raises(ValueError, match="was changed while this edit was on"):
        edit.detach(own)


def test_a_metric_is_refused_once_hooks_are_gone(own: Any) -> None:
    edit = projection(1)
    handle = edit.attach(own)
    own.reset_hooks(including_permanent=True)
    with pytest.raises(ValueError, match="hooks of an edit that is on were removed"):
        metrics.perplexity(own, TEXT)
    with pytest.warns(UserWarning, match="removed before detach"):
        handle.detach()
    with pytest.warns(UserWarning, match="removed before detach"), edit.applied(own):
        own.reset_hooks(including_permanent=True)
    assert edits_on(own) == ()
    metrics.perplexity(own, TEXT)


def test_the_compatibility_mode_of_the_bridge_does_not_go_unnoticed(own: Any) -> None:
    if not is_bridge(own):
        pytest.skip("only the Bridge has such a mode")
    projection(1).attach(own)
    own.enable_compatibility_mode()
    with pytest.raises(ValueError, match="rewrote this model while an edit was on"):
        metrics.perplexity(own, TEXT)


def test_merging_under_another_edit_is_refused(own: Any) -> None:
    with projection(2).applied(own):
        before = state_of(own)
        with pytest.raises(ValueError, match="take it off first"):
            projection(1, site="mlp_out").merge_(own)
        assert_same_state(before, state_of(own))


def test_a_hook_under_two_names_is_refused(model: LensModel, untouched: None) -> None:
    points = [n for n, p in model.hook_dict.items() if p is model.hook_dict[hook_name(1)] and n.startswith("blocks.")]
    if len(points) < 2:
        pytest.skip("this class knows each hook by one name")
    subspaces = {name: projection(1, seed=n).subspaces()[hook_name(1)] for n, name in enumerate(points[:2])}
    edit = type(projection(1))(subspaces)
    assert_refused(model, edit, "names of one hook")


@pytest.mark.parametrize("first", ["attn_out", "resid_mid"])
def test_the_order_of_sites_does_not_depend_on_the_order_of_attaching(
    model: Any, tiny_folder: Path, tokens: torch.Tensor, first: str
) -> None:
    """In one block the sum at resid_mid is changed after what attention adds to it."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    sites = [first, *{"attn_out", "resid_mid"} - {first}]
    edits = {site: projection(1, site=site, seed=number) for number, site in enumerate(sorted(sites))}
    at_once = edits["attn_out"] + projection(1, site="resid_mid", seed=1, request="other")
    with at_once.applied(model):
        wanted = logits(model, tokens)
    with edits[sites[0]].applied(model), edits[sites[1]].applied(model), captured(model, [hook_name(1)]):
        torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-5, rtol=0)
    with attach(plain, edits[sites[0]]), attach(plain, edits[sites[1]]), torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, wanted, atol=1e-4, rtol=0)


def test_what_is_added_at_attn_out_comes_after_what_was_there_whatever_is_on_at_resid_mid(
    model: Any, tiny_folder: Path, tokens: torch.Tensor
) -> None:
    mid = projection(1, site="resid_mid", request="mid")
    steps = [
        SteeringEdit(hook_name(1, "attn_out"), torch.ones(D_MODEL), c, mode=mode)
        for c, mode in ((3.0, "add"), (1.0, "replace"))
    ]
    with (steps[0] + steps[1] + mid).applied(model):
        wanted = logits(model, tokens)
    with (mid + steps[0] + steps[1]).applied(model):
        torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    with attach(plain, mid), attach(plain, steps[0]), attach(plain, steps[1]), torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, wanted, atol=1e-4, rtol=0)
    removed = projection(1, site="attn_out", rank=8, request="out")
    with removed.applied(model), mid.applied(model), captured(model, [hook_name(1, "attn_out")]) as states:
        logits(model, tokens)
    (seen,) = states.values()
    subspace = removed.subspaces()[hook_name(1, "attn_out")]
    assert float((seen @ subspace.basis.T).abs().max()) < 1e-4 * float(seen.abs().max())


def test_an_edit_on_another_embedding_knows_its_model_before_that_is_written(tiny_folder: Path) -> None:
    bridge = load_model(tiny_folder, backend="bridge")
    weight = next(weight for name, weight in weights_by_name(bridge).items() if "embed_tokens" in name)
    written = WeightEdit({weight.name: 2 * weight.read()}, {weight.name: tensor_digests(weight.read())})
    made = projection(1)
    made.provenance = {"model": describe(bridge)}
    before = state_of(bridge)
    with (written + made).applied(bridge):
        pass
    assert_same_state(before, state_of(bridge))


# --- threads


def in_thread(work: Callable[[], object], name: str) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_second_thread_is_refused_by_name(model: LensModel, tokens: torch.Tensor, untouched: None) -> None:
    edit = projection(1)
    works: list[Callable[[], object]] = [
        lambda: steering().attach(model),
        lambda: steering().applied(model).__enter__(),
        lambda: metrics.perplexity(model, TEXT),
        lambda: edit.detach(model),
    ]
    for held in (edit.applied(model), frozen(model), exclusive(model)):
        with held:
            before = state_of(model)
            for work in works[: 4 if edits_on(model) else 3]:
                error = in_thread(work, "the second")
                assert isinstance(error, ValueError)
                assert "'the second'" in str(error)
                assert repr(threading.current_thread().name) in str(error)
            assert_same_state(before, state_of(model))
    with edit.attach(model):
        wanted = logits(model, tokens)
        passes: list[torch.Tensor] = []
        assert in_thread(lambda: passes.append(logits(model, tokens)), "a reader") is None
        assert torch.equal(passes[0], wanted)
        assert in_thread(lambda: metrics.perplexity(model, TEXT), "a reader") is None
        assert in_thread(lambda: edit.detach(model), "a reader") is None


def test_plain_passes_of_many_threads_do_not_mix(model: LensModel, untouched: None) -> None:
    batches = [torch.randint(3, 800, (2, 5 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with projection(1, site="resid_mid").attach(model):
        wanted = [logits(model, batch) for batch in batches]
        same: list[bool] = []

        def work(number: int) -> None:
            same.extend(torch.equal(logits(model, batches[number]), wanted[number]) for _ in range(15))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same == [True] * 60


# --- endurance


def cycles(models: list[Any], count: int, seed: int) -> dict[str, float]:
    """Put edits of all kinds on and off, in random order and with exceptions; returns memory before and after."""
    rng = random.Random(seed)
    before = [state_of(model) for model in models]
    pools = [
        [*all_kinds(m, 1), steering(), projection(2, site="resid_mid"), *chain(m, 1.5, 0.5), weight_edit(m, 3)]
        for m in models
    ]
    figures: dict[str, float] = {}
    process = psutil.Process()
    for number in range(count):
        if number == count // 10:  # allocators and caches have warmed up
            gc.collect()
            figures |= {"rss_before": process.memory_info().rss / 2**20, "objects_before": float(len(gc.get_objects()))}
        place = rng.randrange(len(models))
        handles = []
        for edit in rng.sample(pools[place], rng.randint(1, 4)):
            try:
                if rng.random() < 0.3:
                    with edit.applied(models[place]):
                        if rng.random() < 0.5:
                            raise RuntimeError("inside")
                else:
                    handles.append(edit.attach(models[place]))
            except (ValueError, RuntimeError):  # refused, beside what is on
                pass
        if number % 25 == 0:
            logits(models[place], torch.tensor([[5, 6, 7]]))
        rng.shuffle(handles)
        for handle in handles:
            handle.detach()
        assert edits_on(models[place]) == ()
    gc.collect()
    figures |= {"rss_after": process.memory_info().rss / 2**20, "objects_after": float(len(gc.get_objects()))}
    for model, state in zip(models, before, strict=True):
        after = state_of(model)
        after["torch_rng"] = state["torch_rng"]
        assert_same_state(state, after)
    return figures


def test_many_cycles_leave_nothing_behind(model: LensModel) -> None:
    figures = cycles([model], 60, seed=0)
    assert figures["objects_after"] - figures["objects_before"] < 200


@pytest.mark.slow
def test_two_thousand_cycles_leave_nothing_behind(tiny_folder: Path) -> None:
    figures = cycles([load_model(tiny_folder, backend=backend) for backend in available_backends()], 2000, seed=0)
    print(figures)  # noqa: T201
    assert figures["objects_after"] - figures["objects_before"] < 200
    assert figures["rss_after"] - figures["rss_before"] < 20
