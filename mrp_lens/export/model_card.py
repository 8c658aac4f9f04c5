"""The model card of an edited model: README.md, from the edit's provenance and from what runs measured, never from texts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, get_args

from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mrp_lens.edits import ConditionalProjectionEdit, Edit, ProjectionEdit, SteeringEdit, WeightEdit
from mrp_lens.edits.conditional import Gated
from mrp_lens.edits.provenance import fits_of, label_of
from mrp_lens.export.formats import ExportForm
from mrp_lens.export.measurements import Measurements, check_record, rows_about
from mrp_lens.methods import METHODS
from mrp_lens.methods.outcome import Ended
from mrp_lens.runs.report.table import INTERVALS, Cell, Table, table_of
from mrp_lens.utils.frames import Row, versions
from mrp_lens.utils.validation import check_one_of

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
LONGEST_NAME = 200
CARRIED = ("license", "license_name", "license_link", "language", "datasets")
WORDS = (
    "method",
    "attack",
    "verdict",
    "outcome",
    "task",
    "metric",
)  # the only cells of a run that are shown and are not numbers
UNSHOWN = {"n"}  # of attacks: how many questions
ROOT = r"(?:file://)?(?:~|[A-Za-z]:)?[/\\]"
DIRECTORIES = re.compile(rf"(?:^|(?<=[\s'\"`(=,])){ROOT}(?:[^\s/\\'\"`,;|()]+[/\\])*(?=[^\s/\\(])")
WITHOUT_OWNER = {  # names that the Hub still takes without an owner, of families that are supported
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}


def model_card(
    edit: Edit,
    *,
    base: str,
    form: ExportForm | str,
    checks: Sequence[str] = (),
    record: Measurements | None = None,
    base_front_matter: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of README.md: the same for the same arguments and versions.

    Of data it holds names and hashes, of paths the last component, of runs numbers.

    Args:
        edit: what was exported.
        base: name on the Hub, or folder, of the model that was edited; "demo".
        form: "folded", "module" or "adapter".
        checks: sentences on how the folder was shown to compute what the hooked model computes.
        record: what was measured; None: the card says that nothing was.
        base_front_matter: of the base model's card; its license, language and data sets are carried over.
        repo_id: where it will lie on the Hub.

    Raises:
        ValueError: an unknown form, no base, a repo_id that the Hub does not take, or a record of another edit.
    """
    check_one_of(ExportForm, form=form)
    if not base:
        raise ValueError("base is empty; name the model that was edited, such as 'org/name'")
    if repo_id is not None:
        validate_repo_id(repo_id)
    measured, label, on_hub = record or Measurements(), label_of(edit), _hub_name(base)
    check_record(edit, measured)
    fits = [{**_method_of(fit), **fit} for fit in fits_of(edit)]
    return TEMPLATES.get_template("card.md.j2").render(
        front_matter=_front_matter(label if fits else None, form, on_hub, base_front_matter or {}),
        base=on_hub or _name(base),
        on_hub=on_hub,
        repo_id=repo_id,
        form=form,
        label=label,
        fits=fits,
        reached=_reached(fits),
        without_record=_without_record(edit),
        model=next((part.provenance["model"] for part in edit.parts if "model" in part.provenance), None),
        places=_places(edit),
        has_weights=any(isinstance(part, WeightEdit) for part in edit.parts),
        checks=checks,
        figures=_table(rows_about(measured.rows, label)),
        attacks=_tables(rows_about(measured.attacks, label)),
        record=measured,
        versions=versions(),
    )


def front_matter_of(readme: Path) -> dict[str, Any]:
    """The YAML at the top of a model card; {} if there is no such file, or none that can be read."""
    try:
        return dict(metadata_load(readme) or {})
    except Exception:  # a stranger's file; the parser of YAML raises errors of its own
        return {}


def _method_of(fit: Mapping[str, Any]) -> dict[str, str]:
    """What a method says of itself; of one that is not registered here, nothing."""
    known = METHODS.get(str(fit["method"]))
    return {"summary": "", "source": ""} if known is None else {"summary": known.summary, "source": known.source}


def _reached(fits: Sequence[Mapping[str, Any]]) -> str:
    """Whether the fits got where they were to, by what they recorded."""
    ended = [outcome.get("ended") if isinstance(outcome := fit.get("outcome"), Mapping) else None for fit in fits]
    if all(end == "target" for end in ended):
        return "The fit reached its target on questions that it made from these data."
    if any(end in get_args(Ended) and end != "target" for end in ended):
        return "The fit did not reach its target: on questions that it made from these data, more than that was left."
    return "No target was recorded that the fit had to reach."


def _without_record(edit: Edit) -> list[str]:
    """The parts and requests about whose making nothing is recorded."""
    missing = []
    for part in edit.parts:
        if isinstance(part, ProjectionEdit):
            known = part.provenance.get("requests", {})
            missing += [f"request {name}" for name in part.requests if "method" not in known.get(name, {})]
        elif "method" not in part.provenance:
            missing.append(f"the {part.kind} edit")
    return missing


def _places(edit: Edit) -> Table:
    """Where the edit changes what the model computes."""
    rows = []
    for part in edit.parts:
        if isinstance(part, ConditionalProjectionEdit):
            gated = ((hook, own) for hook in part.hook_names for own in part.gated_at(hook))
            rows += [[hook, _removed(own), ", ".join(own.requests)] for hook, own in gated]
        elif isinstance(part, ProjectionEdit):
            for hook, subspace in sorted(part.subspaces().items(), key=lambda item: part.hook_names.index(item[0])):
                names = [name for name in part.requests if hook in part.subspaces(name)]
                rows.append([hook, f"a subspace of rank {subspace.rank} removed", ", ".join(names)])
        elif isinstance(part, WeightEdit):
            rows += [[name, f"new values, {list(tensor.shape)}", ""] for name, tensor in part.tensors.items()]
        elif isinstance(part, SteeringEdit):
            how = "set to" if part.mode == "replace" else "moved by"
            where = "" if part.positions is None else f", at positions {_name(part.positions)} of the prompt"
            rows.append([part.hook, f"states {how} {part.coefficient:.6g} times a fixed unit vector{where}", ""])
    return Table(["where", "what", "request"], [(False, [Cell(text) for text in row]) for row in rows], [])


def _removed(gated: Gated) -> str:
    """What is removed at a hook, and of which states."""
    gate, what = gated.gate, f"a subspace of rank {gated.subspace.rank} removed"
    if gate is None:
        return what
    if gate.direction.ndim == 2:
        return f"{what} from states in the direction of one of {len(gate.rows)} fixed unit vectors" + (
            "" if gate.hard else ", gradually"
        )
    how = "" if gate.hard else f", gradually (sharpness {gate.sharpness:.6g})"
    return f"{what} from states whose cosine with a fixed unit vector is above {gate.threshold:.6g}{how}"


def _front_matter(label: str | None, form: str, on_hub: str | None, base: Mapping[str, Any]) -> str:
    """What the Hub reads: a base model only if it lies there, no license but the base model's."""
    relation = "adapter" if form == "adapter" else "finetune"
    return ModelCardData(
        base_model=on_hub,
        base_model_relation=None if on_hub is None else relation,
        **{key: _without_norway(base[key]) for key in CARRIED if _is_carried(base.get(key))},
        library_name="mrp_lens" if form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "mrp_lens", *(label.split(" + ") if label else [])],
    ).to_yaml()


def _is_carried(value: Any) -> bool:
    """Whether it is a name or a list of names, as the Hub knows them; anything else stays where it came from."""
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(
        name is False or (isinstance(name, str) and name.isprintable() and len(name) <= LONGEST_NAME) for name in names
    )


def _without_norway(value: Any) -> Any:
    """`language: no` is Norwegian, and false to YAML."""
    return [_without_norway(item) for item in value] if isinstance(value, list) else "no" if value is False else value


def _hub_name(base: str) -> str | None:
    """`owner/name` of a base model on the Hub; None for a folder, as which transformers would read it first, and the demo."""
    if base in WITHOUT_OWNER and not Path(base).is_dir():
        return WITHOUT_OWNER[base]
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base if "/" in base and not Path(base).is_dir() else None


def _table(rows: Sequence[Row]) -> Table | None:
    """The rows as a table; None if there is nothing to show."""
    kept = [{key: value for key, value in row.items() if key in WORDS or _is_figure(value)} for row in rows]
    if not kept:
        return None
    table = table_of(kept)
    return Table(table.headings, table.rows, [line for line in table.legend if line != INTERVALS])


def _tables(rows: Sequence[Row]) -> list[Table | None]:
    """A table for each kind of attack: rows that have no figure in common say different things."""
    groups: list[tuple[set[str], list[Row]]] = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in UNSHOWN}
        keys = {key for key, value in kept.items() if key not in WORDS and value is not None and _is_figure(value)}
        known, members = next(((known, members) for known, members in groups if known & keys), (set(), []))
        if not members:
            groups.append((known, members))
        known |= keys
        members.append(kept)
    return [_table(members) for _, members in groups]


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _text(value: Any) -> str:
    """One line; of an absolute path in it, the last component. What a stranger named so is no markup."""
    return _escaped(DIRECTORIES.sub("", _line(value)))


def _name(value: Any) -> str:
    """A name or a setting in one line, without markup; of a path, which may hold spaces, the last component."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_name(item) for item in value)
    return _escaped(_line(PureWindowsPath(str(value)).name)) if re.match(ROOT, str(value)) else _text(value)


def _cell(value: Any) -> str:
    """What stays in its cell of a Markdown table."""
    return _name(value).replace("|", "\\|")


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _escaped(text: str) -> str:
    """Shown as it is: no HTML, no link or picture, no code."""
    for mark, shown in (("\\", "\\\\"), ("<", "&lt;"), ("](", "]\\("), ("`", "\\`")):
        text = text.replace(mark, shown)
    return text


TEMPLATES.filters |= {"text": _text, "name": _name, "cell": _cell}
