"""A model whose layers lie on several devices, as transformers and accelerate spread them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from mrp_lens.models.base import device_named
from mrp_lens.utils.io import one_line
from mrp_lens.utils.processes import launched

NamedMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Place = int | str | torch.device
DeviceMap = NamedMap | str | Mapping[str, Place]
MaxMemory = Mapping[int | str, int | str]


@dataclass(frozen=True)
class Spread:
    """Where the parts of a model go.

    Attributes:
        device_map: by name, or module -> device.
        max_memory: device -> bytes, or text such as "20GiB".
    """

    device_map: str | dict[str, int | str]
    max_memory: dict[int | str, int | str] | None

    @classmethod
    def checked(
        cls, device_map: DeviceMap | None, max_memory: MaxMemory | None, *, device: Any, backend: str
    ) -> "Spread | None":
        """What the arguments of `load_model` say; None: the model is to be on one device.

        Raises:
            ValueError: they contradict each other, or name a map or a device that there is not.
        """
        if device_map is None:
            if max_memory is not None:
                raise ValueError(
                    "max_memory says how much a device map may put on each device; give device_map='auto' too"
                )
            return None
        if device is not None:
            raise ValueError(
                f"device {str(device)!r} and device_map are two answers to one question: give the first for one device, the second for several"
            )
        if launched() > 1:
            raise ValueError(
                f"each of the {launched()} processes that torchrun started has the whole model on its own device; give device_map to one alone"
            )
        if backend == "hooked":
            raise ValueError(
                "HookedTransformer has all of its layers on one device; a device_map needs backend='bridge' (or 'auto')"
            )
        memory = None if max_memory is None else dict(max_memory)
        if isinstance(device_map, str):
            if device_map not in get_args(NamedMap):
                raise ValueError(
                    f"unknown device_map {device_map!r}; give one of {', '.join(get_args(NamedMap))}, or names of modules -> devices"
                )
            return cls(device_map, memory)
        if not isinstance(device_map, Mapping) or not device_map:
            raise ValueError(f"device_map must be a name or a dict of modules -> devices, got {device_map!r}")
        if memory is not None:
            raise ValueError(
                "max_memory is for a map by name, such as device_map='auto'; a dict says itself where each module goes"
            )
        places = {str(name): _place(name, place) for name, place in device_map.items()}
        if len({_kind(place) for place in places.values()}) > 1:
            raise ValueError(
                "device_map has modules on the CPU beside others on a GPU: accelerate offloads these, and they would have no weights to edit; "
                "put all of them on GPUs, or all on the CPU"
            )
        return cls(places, None)

    @property
    def options(self) -> dict[str, Any]:
        """Of `from_pretrained`."""
        limits = {} if self.max_memory is None else {"max_memory": self.max_memory}
        return {"device_map": self.device_map, **limits}

    def dispatched(self, hf_model: Any) -> Any:
        """A model in memory, spread likewise.

        Raises:
            ValueError: the map leaves out a module, or names one that there is not.
        """
        from accelerate import dispatch_model, infer_auto_device_map  # type: ignore[import-untyped]
        from accelerate.utils import get_balanced_memory  # type: ignore[import-untyped]

        whole = hf_model._no_split_modules
        places: Any = self.device_map
        try:
            if isinstance(places, str):
                memory = self.max_memory
                if places != "sequential":
                    memory = get_balanced_memory(
                        hf_model, memory, no_split_module_classes=whole, low_zero=places == "balanced_low_0"
                    )
                places = infer_auto_device_map(hf_model, memory, no_split_module_classes=whole)
            return dispatch_model(hf_model, places)
        except Exception as error:
            raise ValueError(f"the model cannot be spread as device_map says: {one_line(error)}") from error

    def check(self, hf_model: Any) -> None:
        """Refuse a model that was not spread as it was to be.

        Raises:
            ValueError: the map leaves out a module, or names one that there is not; or a part was offloaded.
        """
        parameters = dict(hf_model.named_parameters())
        if isinstance(self.device_map, dict):
            modules = {name for name, _ in hf_model.named_modules()}
            unknown = [name for name in self.device_map if name not in modules and name not in parameters]
            left_out = [name for name in parameters if not any(_holds(place, name) for place in self.device_map)]
            if unknown or left_out:
                wrong = f"names {unknown[0]!r}, which it has not" if unknown else f"leaves out {left_out[0]}"
                raise ValueError(
                    f"device_map {wrong}: this model has {', '.join(name for name, _ in hf_model.named_children())}, and what is in them"
                )
        kinds = {_kind(parameter.device) for parameter in parameters.values()}
        away = [name for name, parameter in parameters.items() if parameter.device.type in ("meta", "cpu")]
        if "meta" in kinds or len(kinds) > 1:
            raise ValueError(
                f"the model does not fit: {away[0]} and {len(away) - 1} more were offloaded to the CPU or to disk, where they have no weights to "
                "edit. Give more GPUs or memory, or dtype=torch.bfloat16"
            )


def _holds(module: str, parameter: str) -> bool:
    return module == "" or parameter == module or parameter.startswith(f"{module}.")


def _kind(place: Any) -> str:
    """Such as "cuda", which accelerate also calls by a bare number."""
    return "cuda" if isinstance(place, int) else str(place).split(":")[0]


def _place(name: str, place: Any) -> int | str:
    """The device as accelerate calls it."""
    if place in ("disk", "meta"):
        raise ValueError(
            f"device_map puts {name!r} on {place!r}, where it has no weights to edit; put it on a GPU, or the whole model on the CPU"
        )
    found = device_named(f"cuda:{place}" if isinstance(place, int) else place)
    return found.index or 0 if found.type == "cuda" else str(found)
