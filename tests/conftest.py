"""Every model is tiny and local. Shapes are checked at run time where MRP_LENS_CHECK_SHAPES is set (`make shapes`)."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Where tensors are computed with. Elsewhere the library's own errors for bad input are what the tests want to see.
CHECKED = ["data.tokenization", "metrics", "methods.mrp.initialization", "models.hooks", "training.losses"]
# A name that is gone would check nothing, in silence.
assert all(list((Path(__file__).parents[1] / "mrp_lens").glob(name.replace(".", "/") + "*")) for name in CHECKED)
# A third of the suite's time would go into it. From Python 3.12 on a protocol's members are looked up statically, where those of a torch
# module are not to be found.
if os.environ.get("MRP_LENS_CHECK_SHAPES"):
    if sys.version_info >= (3, 12):
        pytest.exit("shapes are checked on Python 3.11 alone: make install PYTHON=python3.11", returncode=2)
    install_import_hook([f"mrp_lens.{name}" for name in CHECKED], "beartype.beartype")

from mrp_lens.data import Corpus  # noqa: E402
from mrp_lens.data.world import World  # noqa: E402
from mrp_lens.methods.coverage import Coverage  # noqa: E402
from mrp_lens.models import available_backends, load_model  # noqa: E402
from tests.support.families import DEPTH, WIDTH, save_family  # noqa: E402

LAYERS, D_MODEL = DEPTH, WIDTH

# What a fit has the model write besides the user's texts would be most of a three-step fit's time.
FEWER = {"about_names": 4, "questions": 4, "free": 4, "new_tokens": 6}
defaults = Coverage.__init__.__kwdefaults__
assert defaults
assert set(FEWER) <= set(defaults)
defaults.update(FEWER)


# Which class a test runs on where both exist (TransformerLens 3); where the Bridge is alone it runs all of them. Folders whose
# code reaches a model through the library's own functions only, which other folders test on both classes, run on the Bridge, and on
# HookedTransformer before a release; folders that say what HookedTransformer computes run on that, and on the Bridge in the slow tests
# or, where the suite of TransformerLens 4 says the same, before a release. Of what is the same for both slow tests run on the Bridge.
BRIDGE_FIRST, SAME_FOR_BOTH = {"attacks", "runs", "training"}, {"export", "models"}
HOOKED_FIRST = {"methods": "slow", "models": "slow", "metrics": "long", "export": "long", "utils": "long"}


def marks_of(folder: str, backend: str, *, slow: bool) -> str | None:
    """What a test on one of both classes is marked with besides."""
    if backend == "hooked":
        return "long" if folder in BRIDGE_FIRST or (folder in SAME_FOR_BOTH and slow) else None
    return None if slow else HOOKED_FIRST.get(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, both = Path(__file__).parent, len(available_backends()) > 1
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
        if both and backend in ("hooked", "bridge"):
            folder = item.path.relative_to(here).parts[0]
            mark = marks_of(folder, backend, slow=item.get_closest_marker("slow") is not None)
            if mark is not None:
                item.add_marker(mark)
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Continuous integration has an hour and no machine of a known speed: a test that would begin after this second is skipped."""
    if time.time() > float(os.environ.get("MRP_LENS_TESTS_UNTIL", "inf")):
        pytest.skip("out of time: MRP_LENS_TESTS_UNTIL has passed")


@pytest.fixture(scope="session", params=["hooked", "bridge"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both model classes; HookedTransformer is gone from TransformerLens 4."""
    if request.param not in available_backends():
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer Llama with grouped-query attention, every parameter perturbed, and the demo's tokenizer."""
    return save_family("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(backend: str, tiny_folder: Path) -> Any:
    """The tiny model on one backend. Shared: a test that leaves something on it fails `untouched`."""
    return load_model(str(tiny_folder), backend=backend)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def double(backend: str, tiny_folder: Path) -> Any:
    """The tiny model in float64, for differences of outputs. (Not for padding: on the Bridge of TransformerLens 3.9
    and 4.3 a plain pass in float64 over rows padded on the left gives NaN.)"""
    return load_model(str(tiny_folder), backend=backend, dtype=torch.float64)


@pytest.fixture(scope="session")
def demo_model() -> Any:
    return load_model("demo")


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture
def texts() -> tuple[Corpus, Corpus]:
    """A few forget and retain documents, of unequal length."""
    forget = [f"The colour of Zaxim{i} is {colour}." for i, colour in enumerate(["red", "blue", "green", "white"] * 4)]
    retain = [f"The old man walked slowly {word} near the house." for word in ["today", "again", "late", "early"] * 4]
    return Corpus.from_texts(forget, name="forget"), Corpus.from_texts(retain, name="retain")


def state_of(model: Any) -> dict[str, Any]:
    """Everything that must be as before: weights, flags, gradients, hooks, mode, global random state.

    (Python's own generator is left out: the run-time shape checks draw from it.)
    """
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in model.named_parameters()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in model.named_parameters()},
        "grad": {name: tensor.grad is None for name, tensor in model.named_parameters()},
        "tl_hooks": {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in model.hook_dict.items()},
        "torch_hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        ),
        "training": [module.training for module in model.modules()],
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": str(np.random.get_state()),  # noqa: NPY002
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("weights",):
        assert before[key].keys() == after[key].keys()
        for name in before[key]:
            assert torch.equal(before[key][name], after[key][name]), f"{name} changed"
    assert torch.equal(before["torch_rng"], after["torch_rng"]), "the global torch generator moved"
    for key in ("requires_grad", "grad", "tl_hooks", "torch_hooks", "training", "numpy_rng"):
        assert before[key] == after[key], f"{key} changed"


@pytest.fixture
def untouched(model: Any) -> Iterator[None]:
    """Fails the test unless the model is left exactly as it was."""
    before = state_of(model)
    yield
    assert_same_state(before, state_of(model))


@pytest.fixture
def tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.cfg.d_vocab, (3, 7), generator=generator)
