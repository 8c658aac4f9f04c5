"""The methods that the comparing studies set against each other, and the settings that their results depend on."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from mrp_lens.cli.options import converted, options_of
from mrp_lens.methods import METHODS, MRP, Distillation, UnconditionalMRP
from mrp_lens.models import LensModel, is_bridge

OWN = ("mrp", "rmu", "adaptive-rmu")  # the methods of this library's papers


def compared_methods(model: LensModel) -> dict[str, Any]:
    """Name -> method: this library's with their defaults, MRP at every layer and with distillation (Bridge only), then all
    others that are registered, baselines and plugins."""
    every = range(int(model.cfg.n_layers))
    own = {name: METHODS[name]() for name in OWN}
    wider = {"mrp-all": MRP(layers=every), "mrp-mlp": UnconditionalMRP(layers=every, site="mlp_out")}
    robust = {"mrp-distilled": MRP(distillation=Distillation())} if is_bridge(model) else {}
    return own | wider | robust | {name: method() for name, method in METHODS.items() if name not in OWN}


def names_in(text: str | None, known: Collection[str], *, default: list[str], noun: str = "methods") -> list[str]:
    """The names in an option such as `--methods`, which are separated by commas; the default where it is not given.

    Raises:
        ValueError: one that is not known.
    """
    chosen = text.split(",") if text else default
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"unknown {noun} {unknown}; choose among {', '.join(known)}")
    return chosen


def settings_of(method: Any) -> dict[str, str]:
    """What a method's results depend on, to be stored beside them; a method is a dataclass."""
    options = {field.name: repr(getattr(method, field.name)) for field in fields(method)}
    return {"kind": type(method).__name__, **options}


def changed(known: Mapping[str, str], method: Any) -> list[str]:
    """Settings of stored results that are no longer the method's, each with what it was and is; an option that the method
    has gained since, and that is left at its default, changes nothing."""
    now = settings_of(method)
    gained = {field.name for field in fields(method) if now[field.name] == repr(field.default)} - set(known)
    return [
        f"{key} ({known.get(key)} there, {now.get(key)} now)"
        for key in {**known, **now}
        if key not in gained and known.get(key) != now.get(key)
    ]


def with_settings(methods: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The methods with hyperparameters given as `NAME=VALUE` or `METHOD.NAME=VALUE`; a value is JSON, or written as on the command line
    of `mrp-lens unlearn`.

    Raises:
        ValueError: no such hyperparameter, no `=`, or a value that is not of its type.
    """
    changed = dict(methods)
    for given in texts:
        place, equals, text = given.partition("=")
        method, _, name = place.rpartition(".")
        having = [key for key in methods if method in ("", key) and name in methods[key].__dataclass_fields__]
        if not equals or not having:
            raise ValueError(f"--set {given}: none of {', '.join(methods)} has {place!r}; write NAME=VALUE")
        changed |= {key: replace(changed[key], **{name: _value(type(changed[key]), name, text)}) for key in having}
    return changed


def _value(kind: type, name: str, text: str) -> Any:
    """A hyperparameter's value, of its type."""
    options = {option.name: option for option in options_of(kind, "--set")}
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = text
    return converted({name: given}, options)[name]
