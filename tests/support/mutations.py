"""JSON files as a careless or a hostile hand leaves them."""

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "../../x", "/etc/passwd", "os.system", "__import__('os').abort()"),
    *("llama", "gpt2", "float16", "\ud800"),
    *([], [0], ["x"], [[]], {}, {"x": 1}, {"__class__": "x"}, ["mlp_out"], "mlp_out", "projection", "steering"),
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
    """The JSON text with one to three changes: values, kinds, structure or, now and then, bytes."""
    chosen = random.Random(seed)
    if chosen.random() < 0.1:
        return _garbled(text, chosen)
    content = json.loads(text)
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        places = places_in(content)
        if not places:
            break
        path = chosen.choice(places)
        parent, key = at(content, path[:-1]), path[-1]
        what = chosen.choice(("replace", "replace", "replace", "number", "delete", "copy", "add", "rename"))
        if what == "number" and type(parent[key]) in (int, float):
            parent[key] = chosen.choice(
                (parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, str(parent[key]))
            )
        elif what == "delete":
            del parent[key]
        elif what == "copy":
            parent[key] = copy.deepcopy(at(content, chosen.choice(places)))
        elif what == "rename" and isinstance(parent, dict):
            parent[chosen.choice((f"{key}_", key.upper(), str(chosen.choice(places)[-1])))] = parent.pop(key)
        elif what == "add" and isinstance(parent, list):
            parent.append(copy.deepcopy(chosen.choice((parent[key], chosen.choice(values)))))
        else:
            parent[key] = copy.deepcopy(chosen.choice(values))
    return json.dumps(content)


def _garbled(text: str, chosen: random.Random) -> str:
    start = chosen.randrange(len(text))
    end = min(len(text), start + chosen.choice((1, 1, 2, 10, 100)))
    return chosen.choice(
        (text[:start], text[:start] + text[end:], text[:start] + chosen.choice('{}[],:"0x') + text[end:])
    )
