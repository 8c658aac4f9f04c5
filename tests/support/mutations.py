"""JSON files as a careless or a hostile hand leaves them."""

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "0", "a\nb", "\ud800", "\u202e", "\x00", "x" * 5000),
    *("../../x", "/etc/passwd", "os.system", "__import__('os').abort()", "llama", "gpt2", "float16"),
    *("mlp_out", "projection", "steering", "stack", "direction", "rows.0.blocks.1.hook_resid_post"),
    *("blocks.1.hook_resid_post", "blocks.1.hook_resid_post\n", "blocks.99.hook_mlp_out"),
    *([], [0], ["x"], [[]], [-1, 10**9], ["mlp_out"], {}, {"x": 1}, {"__class__": "x"}),
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in ((*path, key), *places_in(child, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(text: str, seed: int, values: tuple[Any, ...] = VALUES) -> str:
    """The JSON text with one to four changes: values, kinds, structure or, now and then, bytes."""
    chosen = random.Random(seed)
    return _garbled(text, chosen) if chosen.random() < 0.1 else json.dumps(changed(json.loads(text), chosen, values))


def changed(content: Any, chosen: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy of a JSON value with one to four changes inside."""
    content = copy.deepcopy(content)
    for _ in range(chosen.choice((1, 1, 1, 2, 3, 4))):
        places = places_in(content)
        if not places:
            break
        path = chosen.choice(places)
        parent, key = at(content, path[:-1]), path[-1]
        what = chosen.choice(("replace", "replace", "replace", "number", "delete", "copy", "add", "rename", "wrap"))
        if what == "number" and type(parent[key]) in (int, float):
            parent[key] = chosen.choice(
                (parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, str(parent[key]))
            )
        elif what == "delete":
            del parent[key]
        elif what == "copy":
            parent[key] = copy.deepcopy(at(content, chosen.choice(places)))
        elif what == "wrap":
            parent[key] = [parent[key]]
        elif what == "rename" and isinstance(parent, dict):
            names = (f"{key}_", key.upper(), str(chosen.choice(places)[-1]), "more", "", "kind", "x\ny")
            value = parent[key] if chosen.random() < 0.5 else parent.pop(key)
            parent[chosen.choice(names)] = value
        elif what == "rename":
            chosen.shuffle(parent)
        elif what == "add" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(chosen.choice((parent[key], chosen.choice(values)))))
        else:
            parent[key] = copy.deepcopy(chosen.choice(values))
    return content


def _garbled(text: str, chosen: random.Random) -> str:
    start = chosen.randrange(len(text))
    end = min(len(text), start + chosen.choice((1, 1, 2, 10, 100)))
    return chosen.choice(
        (text[:start], text[:start] + text[end:], text[:start] + chosen.choice('{}[],:"0x') + text[end:])
    )
