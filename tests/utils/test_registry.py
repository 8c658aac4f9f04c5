"""Registries: what is registered under which name, and packages of others that register too."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrp_lens.utils import registry
from mrp_lens.utils.registry import Registry, UnknownNameError, load_plugins


class First:
    pass


class Second:
    pass


@pytest.fixture
def things() -> Registry[type]:
    found: Registry[type] = Registry("thing", __name__)
    found.add("first", First)
    return found


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins.cache_clear()
    yield tmp_path
    load_plugins.cache_clear()
    sys.modules.pop("plugin_of_a_test", None)


def install(folder: Path, code: str) -> None:
    (folder / "plugin_of_a_test.py").write_text(code, encoding="utf-8")
    metadata = folder / "plugin_of_a_test-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text(f"[{registry.GROUP}]\nmine = plugin_of_a_test\n", encoding="utf-8")


def test_a_registry_is_a_mapping_in_order_of_registration(things: Registry[type]) -> None:
    things.add("second-one", Second)
    assert list(things.items()) == [("first", First), ("second-one", Second)]
    assert len(things) == 2
    assert "first" in things
    assert things.get("third") is None


@pytest.mark.parametrize("name", ["", "First", "a b", "-a", "a-", "1a"])
def test_a_name_is_lower_case_words(things: Registry[type], name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a thing; use lower-case words"):
        things.add(name, Second)


def test_a_name_is_taken_once_but_a_module_may_be_imported_again(things: Registry[type]) -> None:
    things.add("first", type("First", (), {"__module__": __name__}))
    with pytest.raises(ValueError, match=r"a thing named 'first' is registered already, by .*First; choose another"):
        things.add("first", Second)


def test_an_unknown_name_lists_those_there_are(things: Registry[type]) -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown thing 'x'; choose one of first$"):
        things["x"]
    with pytest.raises(UnknownNameError, match=r"^unknown thing 'frist'; did you mean first\? choose one of first$"):
        things["frist"]


def test_an_installed_package_registers_by_its_entry_point(plugins: Path) -> None:
    install(
        plugins, "from mrp_lens.models.architectures import LAYOUTS, layout_of\nHAS = 'LlamaForCausalLM' in LAYOUTS\n"
    )
    assert load_plugins() == ("mine",)
    assert sys.modules["plugin_of_a_test"].HAS


def test_a_package_that_fails_is_told_of_and_left_out(plugins: Path, things: Registry[type]) -> None:
    install(plugins, "raise ImportError('it is broken')")
    with pytest.warns(UserWarning, match=r"the plugin 'mine' \(plugin_of_a_test\) was left out: ImportError"):
        assert list(things) == ["first"]
    assert list(things) == ["first"]
