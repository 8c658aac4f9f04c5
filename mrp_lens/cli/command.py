"""What all commands share: settings from options and files, the model they load, and `--help`."""

import argparse
import inspect
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from mrp_lens.cli.console import console
from mrp_lens.cli.options import Option, converted, options_of, read
from mrp_lens.cli.run_folder import run_of
from mrp_lens.data import TaskConfig, UnlearningTask, task_for
from mrp_lens.models import LensModel, load_model
from mrp_lens.models.load import Backend
from mrp_lens.utils.io import check_apart, read_json

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Always:
    """What every command takes.

    Attributes:
        config: YAML with these settings, or the summary.json of a run.
        print_config: Print the settings as YAML, and do nothing else.
        debug: Show where in the code an error was raised.
        help: Show this.
    """

    config: str | None = None
    print_config: bool = False
    debug: bool = False
    help: bool = False


ALWAYS = {option.name: option for option in options_of(Always, "every command")}
UNKEPT = ("overwrite",)  # what a run does to its folder is no setting of it
READ = (  # options of any command that may name files or folders, which are then read
    *("model", "reference", "base", "edit", "after", "run", "attacks", "folders", "texts", "unseen", "include_path"),
    *("forget", "retain", "questions", "retain_questions", "untaught_questions"),
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: `demo`, a local Hugging Face folder, or a name on the Hub. Default: `demo`; with `--edit`, that of the run that left it.
        backend: HookedTransformer (`hooked`, TransformerLens 3 only), TransformerBridge (`bridge`), or whichever fits.
        dtype: Precision of the weights. Default: float32; of a model that the run of an edit names, as in that run.
        device: Such as `cuda:0`. Default: a GPU if there is one.
        device_map: Spread the layers over several devices (Bridge only): `auto`, `balanced`, `sequential`, or JSON,
            `{"model.embed_tokens": 0, ...}`.
        max_memory: How much `--device-map auto` may put on each device, as JSON: `{"0": "20GiB", "1": "20GiB"}`.
    """

    model: str | None = None
    backend: Backend = "auto"
    dtype: Dtype | None = None
    device: str | None = None
    device_map: str | None = None
    max_memory: str | None = None

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model or "demo"

    @property
    def precision(self) -> Dtype:
        """Of the weights."""
        return self.dtype or "float32"

    def load(self, name: str | None = None) -> LensModel:
        """The model, or another one loaded in the same way."""
        name = name or self.name
        console.print(f"Loading {name} ...")
        return load_model(
            name,
            backend=self.backend,
            device=self.device,
            dtype=self.precision,
            device_map=by_device("--device-map", self.device_map),
            max_memory=by_device("--max-memory", self.max_memory),
        )

    def of_edit(self, edit: Path) -> "ModelOptions":
        """The same; without --model, of the model that the run fitted which left the edit, without --dtype in its precision."""
        of_run = arguments_of_run(edit, "--model")
        if self.model is not None:
            return self
        return replace(self, model=str(of_run.get("model") or self.name), dtype=self.dtype or of_run.get("dtype"))


def arguments_of_run(edit: Path, option: str) -> dict[str, Any]:
    """What the run was given that left an edit; nothing where it is not known. `option`: says the same where its record is damaged."""
    folder = run_of(edit)
    if folder is None:
        return {}
    given: dict[str, Any] = read_json(folder / "summary.json", f"name it with {option}").get("arguments", {})
    return given


def by_device(option: str, text: str | None) -> Any:
    """What such an option was given: a word, or an object in JSON, in which a GPU may be called by its number.

    Raises:
        ValueError: neither.
    """
    if text is None or not text.lstrip().startswith("{"):
        if option == "--max-memory" and text is not None:
            raise ValueError(f'{option} takes JSON such as {{"0": "20GiB"}}, got {text!r}')
        return text
    try:
        given: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is no JSON ({error}): {text!r}") from error
    if option == "--max-memory":
        return {int(name) if name.isdigit() else name: value for name, value in given.items()}
    return given


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command: a dataclass of its settings. Its docstring is what `--help` says.

    A field that `parts` names holds settings that several commands share, or those of a registered method or attack; its
    fields are options as the command's own are.
    """

    word: ClassVar[str] = ""
    positional: ClassVar[str | None] = None
    shared: ClassVar[bool] = False  # whether the processes that torchrun starts can do it together
    required: ClassVar[tuple[str, ...]] = ()  # of what other commands can do without
    inside: ClassVar[tuple[str, ...]] = ()  # fields that are parts not yet chosen, or that `gathered` makes of parts

    @abstractmethod
    def execute(self) -> Any:
        """Do it."""

    def check_apart(self) -> None:
        """Refuse an output folder that is, or holds, what the command reads.

        Raises:
            ValueError: names the option whose files would be deleted.
        """
        given, out = self.arguments(), getattr(self, "out", None)
        if out is None:
            return
        for name in READ:
            values = given.get(name)
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, str) and value != "demo" and os.path.exists(value):  # others are on the Hub
                    check_apart(out, value, f"what --{name.replace('_', '-')} names")

    @classmethod
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        """Field -> the dataclass of its settings, which may depend on what was given."""
        return {}

    @classmethod
    def titles(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Field of `parts` -> the title of its options in `--help`."""
        return {"loading": "model", "data": "data"}

    @classmethod
    def assembled(cls, kind: type, values: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        """A part, from what was given of it; `others`: what was given of the command's own."""
        return TaskConfig.from_options(values) if kind is TaskConfig else kind(**values)

    @classmethod
    def aliases(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """What version 0.1 called an option -> its name."""
        return {}

    @classmethod
    def earlier(cls, filed: dict[str, Any]) -> dict[str, Any]:
        """The settings in a file, where version 0.1 wrote them otherwise."""
        return filed

    @classmethod
    def gathered(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The parts as fields of the command."""
        return dict(settings)

    def scattered(self) -> dict[str, Any]:
        """The inverse: the command's parts by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: given[name] for name in self.parts(given)}

    @classmethod
    def placed(cls, parts: Mapping[str, type], titles: Mapping[str, str]) -> dict[str, tuple[str, Option]]:
        """Name -> the part it belongs to ("": the command itself) and the option. A name that is taken stands behind the
        first word of its part's title."""
        apart = {*parts, *cls.inside}
        own = (option for option in options_of(cls, "options") if option.name.split(".")[0] not in apart)
        found = {option.name: ("", option) for option in own}
        for part, kind in parts.items():
            title = titles.get(part, part)
            taken = {field.name for field in fields(kind)} & set(found)
            for option in options_of(kind, title):
                behind = title.split(":")[0].replace("-", "_") + "_" if option.name.split(".")[0] in taken else ""
                found[behind + option.name] = (part, replace(option, name=behind + option.name))
        return found

    @classmethod
    def parsed(cls, words: Sequence[str]) -> Self | None:
        """The command with its settings; None: only `--help` or `--print-config` was asked for.

        Raises:
            ValueError: an option or a file makes no sense; says which.
        """
        first = peeked(words)
        filed = cls.earlier(settings_in(Path(first["config"]), cls.word)) if "config" in first else {}
        chosen = filed | first
        parts, titles, aliases = cls.parts(chosen), cls.titles(chosen), cls.aliases(chosen)
        places = cls.placed(parts, titles)
        if "help" in first:
            sys.stdout.write(cls.help(places, chosen))
            return None
        options = {name: option for name, (_, option) in places.items()}
        named = options | {old: options[name] for old, name in aliases.items()} | ALWAYS
        where = " ".join([cls.word, *cls.chosen(chosen)])
        typed = read(words, named, positional=cls.positional, where=where)
        unknown = [name for name in filed if name not in named]
        if unknown:
            raise ValueError(f"{first['config']}: {where} has no setting {unknown[0]!r}")
        given = {
            named[name].name: value for part in (filed, typed) for name, value in part.items() if name not in ALWAYS
        }
        values = converted(given, options)
        own = {name: value for name, value in values.items() if places[name][0] == ""}
        settings = {}
        for part, kind in parts.items():
            inner = {options[name].field: value for name, value in values.items() if places[name][0] == part}
            settings[part] = cls.assembled(kind, inner, own)
        if "print_config" in typed:
            unset = {name: None for name, (part, option) in places.items() if not part and "." not in name}
            defaults = {name: options[name].default for name in unset if options[name].default is not MISSING}
            inner = {name: value for part, known in settings.items() for name, value in named_in(known, part, places)}
            kept = {name: value for name, value in (unset | defaults | own | inner).items() if name not in UNKEPT}
            sys.stdout.write(yaml.safe_dump(as_json(kept), sort_keys=False))
            return None
        absent = [name for name in cls.required if not values.get(name)]
        absent += [name for name, (_, option) in places.items() if option.default is MISSING and name not in values]
        if absent:
            wanted = ", ".join(options[name].spelled for name in dict.fromkeys(absent))
            raise ValueError(
                f"{where} needs {wanted}; `mrp-lens {where} --help` says what {'it is' if len(set(absent)) == 1 else 'they are'}"
            )
        return cls(**own, **cls.gathered(settings))

    @classmethod
    def chosen(cls, given: Mapping[str, Any]) -> list[str]:
        """What was chosen of the registry of methods, as it was typed."""
        return ["--method", str(given["method"])] if given.get("method") else []

    @classmethod
    def listed(cls, given: Mapping[str, Any]) -> str:
        """What `--help` says behind the options."""
        return ""

    def arguments(self) -> dict[str, Any]:
        """All settings by the names of their options, as JSON: a valid `--config`."""
        parts = self.scattered()
        kinds = {name: type(value) for name, value in parts.items()}
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        places = self.placed(kinds, self.titles(mine))
        own = {
            name: mine[name] for name, (part, _) in places.items() if not part and name in mine and name not in UNKEPT
        }
        inner = {name: value for part, value in parts.items() for name, value in named_in(value, part, places)}
        settings: dict[str, Any] = as_json(own | inner)
        return settings

    @classmethod
    def help(cls, places: Mapping[str, tuple[str, Option]], given: Mapping[str, Any]) -> str:
        """What `--help` prints."""
        usage = f"mrp-lens {' '.join([cls.word, *cls.chosen(given)])} [OPTIONS]"
        if cls.positional is not None:
            usage += " FOLDER" if places[cls.positional][1].element is None else " FOLDER..."
        text = inspect.cleandoc(cls.__doc__ or "").split("\nAttributes:")[0].strip()
        parser = argparse.ArgumentParser(
            usage=usage,
            description=text,
            epilog=cls.listed(given) or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        groups: dict[str, Any] = {}
        shown = {name: option for name, (_, option) in places.items()} | ALWAYS
        for name, option in shown.items():
            if option.part not in groups:
                groups[option.part] = parser.add_argument_group(option.part)
            text = option.help
            if name in cls.required or option.default is MISSING:
                text += " (required)"
            elif option.shows_default:
                default = option.default
                text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
            metavar = {} if option.metavar is None else {"metavar": option.metavar}
            action = {} if metavar else {"action": "store_true"}
            if option.has_negative:
                text = f"{text.rstrip()} Off: {option.negative}."
            help_text = text.replace("%", "%%")
            groups[option.part].add_argument(option.spelled, help=help_text, dest=name, **metavar, **action)
        return parser.format_help()


@dataclass(frozen=True, kw_only=True)
class OnData(Command):
    """A command that works on a model and data.

    Attributes:
        topic: `--model demo` without data: what to forget.
    """

    loading: ModelOptions
    data: TaskConfig
    topic: str | None = None

    @classmethod
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        """The model and the data."""
        return {"loading": ModelOptions, "data": TaskConfig}

    def task(self) -> UnlearningTask:
        """The data."""
        self.data.check_quiz_options()
        return task_for(self.loading.name, self.data, topic=self.topic)

    def of_edit(self, edit: Path, *, with_data: bool = True) -> Self:
        """The same with what the run was given that left the edit and this command is not: the model, its precision, and the data."""
        of_run, loading = arguments_of_run(edit, "--forget and --retain"), self.loading.of_edit(edit)
        known = replace(self, loading=loading)
        if not with_data or self.topic is not None or self.data != TaskConfig():
            return known
        if of_run.get("forget") and of_run.get("retain"):
            names = {field.name for field in fields(TaskConfig)}
            given: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in of_run.items()
                if name in names
            }
            console.print(f"Data as in the run that left {edit}: {', '.join(given['forget'])} ...")
            return replace(known, data=TaskConfig(**given))
        return replace(known, topic=of_run.get("topic")) if loading.name == "demo" else known


def named_in(value: Any, part: str, places: Mapping[str, tuple[str, Option]]) -> list[tuple[str, Any]]:
    """The settings of a part by the names of their options."""
    return [
        (name, getattr(value, option.field))
        for name, (place, option) in places.items()
        if place == part and "." not in name
    ]


def as_json(value: Any) -> Any:
    """Settings as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def peeked(words: Sequence[str]) -> dict[str, str]:
    """What some options were given, before it is known which there are: the last value of each, and whether it is help that is
    asked for."""
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        if word in ("-h", "--help"):
            found["help"] = ""
        elif word.startswith("--"):
            typed, equals, value = word[2:].partition("=")
            behind = words[number + 1 : number + 2]
            found[typed.replace("-", "_")] = value if equals else (behind[0] if behind else "")
    return found


def settings_in(path: Path, word: str) -> dict[str, Any]:
    """The settings in a YAML file, or in the summary.json that a run of this command left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no settings, or those of another command.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; --config takes YAML, or the summary.json of a run")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; write `name: value` lines")
    if "arguments" not in content:
        return {str(name).replace("-", "_"): value for name, value in content.items()}
    if content.get("command") != word:
        raise ValueError(f"{path} is of `mrp-lens {content.get('command')}`, not of `mrp-lens {word}`")
    kept = {name: value for name, value in content["arguments"].items() if name not in UNKEPT}
    return kept if "seeds" in kept else {"seed": content["seed"], **kept}
