"""Edit folders from strangers: refused in one line, or loaded exactly. Hashes are made to match: anybody can do so."""

import copy
import json
import os
import random
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load, load_file, save

from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit, WeightEdit, load_edit
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import captured, hook_name
from tests.support.edit_folders import CONFIG, KINDS, SAVED, TENSORS, read, write
from tests.support.edits import logits
from tests.support.mutations import changed

MATRIX = "model.layers.1.mlp.down_proj.weight"


# --- what version 0.1 saved


def test_edits_of_version_0_1_load_and_do_what_they_did(
    model: LensModel, tokens: torch.Tensor, untouched: None
) -> None:
    rows, values = torch.eye(32), (torch.arange(32.0 * 48).reshape(32, 48) % 97 - 48) / 512
    projection, steering, weight, stack = (load_edit(SAVED / kind) for kind in KINDS)
    assert isinstance(projection, ProjectionEdit)
    assert projection.requests == ("physics", "a später request")
    assert torch.equal(projection.subspaces("physics")[hook_name(1)].basis, rows[[3, 17]])
    assert projection.provenance["requests"]["physics"]["settings"] == {"rank": 2, "lr": 0.01}
    with projection.applied(model), captured(model, [hook_name(1), hook_name(2, "mlp_out")]) as states:
        logits(model, tokens)
        assert float(states[hook_name(1)][..., [3, 4, 17]].abs().max()) < 1e-5
        assert float(states[hook_name(2, "mlp_out")][..., 5].abs().max()) < 1e-5
    assert isinstance(steering, SteeringEdit)
    direction = torch.arange(1.0, 33.0) / torch.arange(1.0, 33.0).norm()
    with captured(model, [hook_name(2, "resid_pre")]) as states:
        logits(model, tokens)
        plain = states[hook_name(2, "resid_pre")].clone()
        with steering.applied(model):
            logits(model, tokens)
    with steering.applied(model), captured(model, [hook_name(2, "resid_pre")]) as states:
        logits(model, tokens)
        moved = states[hook_name(2, "resid_pre")] - plain
    torch.testing.assert_close(moved[:, [0, -1]], (4.0 * direction).expand(3, 2, 32), atol=1e-5, rtol=0)
    assert float(moved[:, 1:-1].abs().max()) == 0.0
    assert isinstance(weight, WeightEdit)
    assert torch.equal(weight.tensors[MATRIX], values)
    with weight.applied(model, check=False):
        written = logits(model, tokens)
    assert [part.kind for part in stack.parts] == ["weight", "steering", "projection"]
    assert torch.equal(stack.parts[0].tensors[MATRIX], values)  # type: ignore[attr-defined]
    with WeightEdit({MATRIX: values}, {MATRIX: {}}).applied(model, check=False):
        assert torch.equal(logits(model, tokens), written)
        with projection.without("a später request").applied(model), steering.applied(model):
            wanted = logits(model, tokens)
    with stack.applied(model, check=False):
        assert torch.equal(logits(model, tokens), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_saved_again_as_it_was(kind: str, tmp_path: Path) -> None:
    load_edit(SAVED / kind).save_pretrained(tmp_path / "edit")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "edit" / name).read_bytes() == (SAVED / kind / name).read_bytes()


# --- members of the kinds


def change(kind: str, path: str, value: Any) -> dict[str, Any]:
    config, _ = read(kind)
    *places, last = path.split("/")
    inner: Any = config
    for place in places:
        inner = inner[int(place)] if isinstance(inner, list) else inner[place]
    if isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value
    return config


NESTED: Any = {}
for _ in range(200):
    NESTED = {"a": NESTED}

HASHES = f"settings/replaces/{MATRIX}"
SHAPE = f"settings/shapes/{MATRIX}"
HOOKS = [
    *("blocks.1.hook_resid_post\nblocks.2", "blocks.01.hook_resid_post", "blocks.1.__import__('os')"),
    *("blocks.٣.hook_resid_post", f"blocks.{'9' * 5000}.hook_resid_post", None),
]
REQUESTS = ["physics", ["physics", "physics"], ["physics", ["a"]], ["a später request", "physics"], []]
# kind -> what of its configuration -> what no edit has there
WRONG: dict[str, dict[str, list[Any]]] = {
    "steering": {
        "settings/positions": ["abc", [0.5], [True], 3],
        "settings/noise": [float("inf"), float("nan"), "0", -1.0],
        "settings/coefficient": [float("-inf"), True, None],
        "settings/mode": ["exec", ["add"]],
        "settings/seed": [2**70, 1.0],
        "settings/hook": HOOKS,
        "settings": [[]],
        "settings/more": [1],
        "kind": ["stack", ["steering"]],
        "format": [True, 1.0],
        "provenance": ["a text", NESTED],
        "more": [1],
    },
    "projection": {
        "settings/requests": REQUESTS,
        "settings/hooks": [{}],
        "settings/hooks/0": [None],
        "settings/hooks/0/rank": [-2, 2.0, 10**400],
        "settings/hooks/0/tensor": ["../../x"],
        "settings/hooks/0/hook": ["blocks.1.hook_resid_pre"],
        "settings/hooks/0/more": [1],
    },
    "weight": {
        "settings/shapes": [{}],
        SHAPE: [[32, -48], [32, 48.0], [2**40, 2**40]],
        HASHES: ["text", {"float32": 3}],
        "settings/replaces/other": [{}],
    },
    "stack": {
        "settings/parts": [[], {"0": 1}],
        "settings/parts/0/kind": ["stack"],
        "settings/parts/0/provenance": [None],
        "settings/parts/1": [None],
    },
}
CASES = [(kind, path, value) for kind, of in WRONG.items() for path, values in of.items() for value in values]


def refused(folder: Path, match: str = "edit") -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_edit(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("number", range(len(CASES)))
def test_settings_that_no_edit_has_are_refused(number: int, tmp_path: Path) -> None:
    kind, path, value = CASES[number]
    refused(write(tmp_path / "edit", change(kind, path, value), read(kind)[1]))


def test_json_that_is_not_as_it_is_saved_is_refused(tmp_path: Path) -> None:
    config, tensors = read("steering")
    text = json.dumps(config)
    for number, (wrong, match) in enumerate(
        [
            (text.replace('"format": 1', '"format": 1, "format": 1'), "twice"),
            ("[" * 100_000, "nested too deeply"),
            (text.replace('"by hand"', "[" * 1000 + "]" * 1000), "nested too deeply"),
            (text.replace('"by hand"', r'"\ud800"'), "half a character"),
            (text.replace('"add"', '"add\\u0000"'), "its hash does not match"),
            (" " * (17 * 2**20), "no edit's configuration more than"),
            ("[]", "not one JSON object"),
            ("1" * 10_000, "is damaged: it is not JSON"),
            ("", "is damaged: it is not JSON"),
        ]
    ):
        refused(write(tmp_path / str(number), wrong, tensors), match)


def test_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    for kind in KINDS:
        _, content = read(kind)
        tensors = load(content)
        first = next(iter(tensors))
        wrong = [tensors | {"extra": torch.zeros(1)}, {}]
        wrong += [
            tensors | {first: tensors[first].to(dtype)} for dtype in (torch.int32, torch.complex64, torch.float8_e5m2)
        ]
        wrong += [tensors | {first: tensors[first][..., :0]}, tensors | {first: tensors[first] * float("nan")}]
        if kind in ("projection", "steering"):
            wrong += [tensors | {first: tensors[first].to(dtype)} for dtype in (torch.float64, torch.bfloat16)]
            wrong += [tensors | {first: tensors[first] * 2}]
        for number, other in enumerate(wrong):
            content = save({name: tensor.contiguous() for name, tensor in other.items()})
            refused(write(tmp_path / f"{kind}-{number}", read(kind)[0], content))


def test_links_out_of_the_folder_are_not_followed_but_a_hub_cache_is(tmp_path: Path) -> None:
    for name in (CONFIG, TENSORS):
        folder = write(tmp_path / name / "edit", *read("steering"))
        (folder / name).rename(tmp_path / name / "outside")
        (folder / name).symlink_to("../outside")
        refused(folder, "link to a file outside")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    write(snapshot, *read("steering"))
    for name in (CONFIG, TENSORS):
        (snapshot / name).rename(blobs / name[-4:])
        (snapshot / name).symlink_to(f"../../blobs/{name[-4:]}")
    assert load_edit(snapshot) == load_edit(SAVED / "steering")
    (tmp_path / "link").symlink_to(SAVED / "steering", target_is_directory=True)
    load_edit(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    (snapshot / TENSORS).unlink()
    (snapshot / TENSORS).symlink_to(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_edit(snapshot)


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "edit", *read("steering"))
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(2**43)  # eight terabytes of nothing
    started = time.perf_counter()
    refused(folder, "of memory are free")
    refused(write(tmp_path / "header", read("steering")[0], struct.pack("<Q", 2**62) + b"{}"), "its header")
    assert time.perf_counter() - started < 1


def own_memory() -> int:
    """Bytes that are this process's alone: not the system's own copy of files that are mapped."""
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


@pytest.mark.slow
def test_a_large_edit_is_read_once(tmp_path: Path) -> None:
    size = 400 * 2**20
    edit = WeightEdit({"big.0.weight": torch.ones(size // 4)}, {"big.0.weight": {}})
    edit.save_pretrained(tmp_path / "edit")
    del edit
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    load_edit(tmp_path / "edit")
    done.set()
    thread.join()
    assert peak - before < 1.2 * size


# --- fuzz


def mutated_tensors(content: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    mutant = bytearray(content)
    action = rng.randrange(6)
    if action == 0:  # the header's text
        for _ in range(rng.randint(1, 3)):
            mutant[8 + rng.randrange(size)] = rng.randrange(32, 127)
    elif action == 1:
        mutant[rng.randrange(8)] = rng.randrange(256)
    elif action == 2:
        for _ in range(rng.randint(1, 8)):
            mutant[8 + size + rng.randrange(len(content) - 8 - size)] = rng.randrange(256)
    elif action == 3:
        mutant = mutant[: rng.randrange(len(content))]
    elif action == 4:
        mutant += bytes(rng.randint(1, 64))
    else:  # the header's values
        header = json.loads(content[8 : 8 + size])
        name = rng.choice([key for key in header if key != "__metadata__"])
        choice = rng.randrange(4)
        if choice == 0:
            header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "XX", 3])
        elif choice == 1:
            header[name]["shape"] = rng.choice(
                [[], [0], [-1, 4], [2**62, 4], [2**40, 2**40], list(reversed(header[name]["shape"])), "x"]
            )
        elif choice == 2:
            header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**63], [-4, 4], [8, 4], "x"])
        else:
            header[rng.choice(["a\nb", "../x", ""])] = header.pop(name)
        text = json.dumps(header).encode()
        mutant = bytearray(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return bytes(mutant)


def usable(edit: Edit, folder: Path, config: dict[str, Any], again: Path) -> None:
    """It is what the folder holds, and everything that does not need a model works."""
    assert repr(edit)
    assert hash(edit) == hash(copy.deepcopy(edit))
    assert edit.layers == tuple(sorted(edit.layers))
    settings, tensors = edit.to_parts()
    assert json.dumps(settings, sort_keys=True) == json.dumps(config["settings"], sort_keys=True)
    stored = load_file(folder / TENSORS)
    assert stored.keys() == tensors.keys()
    assert all(
        torch.equal(stored[name], tensors[name]) and stored[name].dtype == tensors[name].dtype for name in stored
    )
    edit.save_pretrained(again, overwrite=True)
    assert load_edit(again) == edit
    assert json.dumps(load_edit(again).provenance) == json.dumps(edit.provenance)


def fuzz(count: int, seed: int, root: Path) -> Counter[str]:
    rng, outcomes = random.Random(seed), Counter[str]()
    print(f"seed {seed}")  # noqa: T201
    bait, root = root / "bait", root / "edits"
    bait.mkdir()
    (bait / "secret").write_text("untouched")
    for number in range(count):
        kind = rng.choice(KINDS)
        config, tensors = read(kind)
        folder = root / "edit"
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
        action = rng.choices(["config", "tensors", "both", "text", "files"], [50, 25, 10, 8, 7])[0]
        if action in ("config", "both"):
            config = changed(config, rng)
        if action in ("tensors", "both"):
            tensors = mutated_tensors(tensors, rng)
        write(folder, config, tensors)
        if action == "text":
            text = bytearray((folder / CONFIG).read_bytes())
            for _ in range(rng.randint(1, 5)):
                text[rng.randrange(len(text))] = rng.randrange(256)
            (folder / CONFIG).write_bytes(text[: rng.choice([len(text), rng.randrange(len(text))])])
        elif action == "files":
            file = folder / rng.choice([CONFIG, TENSORS])
            file.unlink()
            trick = rng.randrange(5)
            if trick == 0:
                file.symlink_to(bait / "secret")
            elif trick == 1:
                file.symlink_to(file.name)
            elif trick == 2:
                file.symlink_to("/dev/zero")
            elif trick == 3:
                file.write_bytes(b"")
        started = time.perf_counter()
        try:
            edit = load_edit(folder)
        except BaseException as error:
            if type(error) not in (ValueError, FileNotFoundError) or "\n" in str(error):
                raise AssertionError(f"seed {seed}, number {number} ({kind}, {action})") from error
            outcomes[f"{action}: {type(error).__name__}"] += 1
        else:
            usable(edit, folder, config, root / "again")
            outcomes[f"{action}: loaded"] += 1
        assert time.perf_counter() - started < 10
        assert sorted(path.name for path in root.iterdir()) in (["edit"], ["again", "edit"])
    assert [path.name for path in bait.iterdir()] == ["secret"]
    assert (bait / "secret").read_text() == "untouched"
    print(dict(sorted(outcomes.items())))  # noqa: T201
    return outcomes


def test_mutated_folders_are_refused_or_loaded_exactly(tmp_path: Path) -> None:
    outcomes = fuzz(300, 0, tmp_path)
    assert sum(outcomes.values()) == 300
    assert sum(number for name, number in outcomes.items() if "loaded" in name) > 5
    assert sum(number for name, number in outcomes.items() if "Error" in name) > 100


@pytest.mark.slow
def test_ten_thousand_mutated_folders(tmp_path: Path) -> None:
    assert sum(fuzz(10_000, random.SystemRandom().randrange(10**6), tmp_path).values()) == 10_000
