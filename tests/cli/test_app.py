"""The command line as a whole: help, settings from files, how errors end."""

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from mrp_lens.cli import app, console
from mrp_lens.cli.errors import is_users
from mrp_lens.cli.options import FLAG, Option, converted, described, options_of, read
from mrp_lens.cli.unlearn import Unlearn
from mrp_lens.data.task import TaskConfig
from mrp_lens.edits import load_edit
from mrp_lens.methods import METHODS, MRP, RMU, Distillation, Fit, Method
from mrp_lens.methods.registry import register
from tests.support.commands import completed, data_words, fitter, in_process, invoke, summary_of

QUICK = (
    "import sys\nfrom mrp_lens.cli import main\nmain()\n"
    "heavy = [name for name in ('torch', 'transformer_lens', 'transformers', 'pandas', 'jsonargparse') if name in sys.modules]\n"
    "assert not heavy, heavy"
)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    for words in ([], ["--help"]):
        result = in_process(*words, code=QUICK)
        assert result.returncode == 0, result.stderr
        for command, (_, summary) in app.COMMANDS.items():
            assert re.search(rf"^  {command} +{re.escape(summary)}$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", app.COMMANDS)
def test_the_summary_of_a_command_begins_its_help(command: str) -> None:
    said = " ".join(completed(command, "--help").output.split())
    assert app.COMMANDS[command][1].rstrip(".") in said
    for option in ("--config", "--print-config", "--debug"):
        assert option in said
    assert ("--out" in said) == (command != "chat")  # which writes no files


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "unlearn",
            ["mrp-lens unlearn --model ./my-checkpoint", "hub:cais/wmdp-corpora:cyber-forget-corpus", "--overwrite"],
        ),
        ("attack", ["never taught", "--search-steps", "--questions-limit"]),
        ("export", ["folded", "module", "adapter", "--push-to", "--no-verify", "--save-dtype", "--run"]),
        ("measure", ["--model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --edit runs/zephyr-rmu/edit"]),
        ("measure", ["--harness wmdp,mmlu --out runs/zephyr-rmu-harness"]),
    ],
)
def test_help_shows_examples_and_options(words: str, shown: list[str]) -> None:
    said = " ".join(completed(words, "--help").output.replace("\\", " ").split())
    for part in shown:
        assert part in said


@pytest.mark.parametrize("command", app.COMMANDS)
def test_help_shows_every_option_once_and_none_that_cannot_be_given(command: str) -> None:
    said = completed(command, "--help").output
    options = re.findall(r"^  (--[\w.-]+)", said, re.MULTILINE)
    assert sorted(options) == sorted(set(options))
    assert not [option for option in options if option.startswith(("--loading", "--data", "--fitter"))]


def test_help_without_a_method_lists_all_of_them_with_their_sources() -> None:
    said = completed("unlearn", "--help").said
    for name, kind in METHODS.items():
        assert f"{name} {kind.summary} {kind.source}" in said


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_shows_each_of_its_settings_with_default_and_meaning(name: str) -> None:
    output = completed("unlearn", "--method", name, "--help").output
    helps, said = described(METHODS[name]), " ".join(output.split())
    for setting in fields(METHODS[name]):
        spelled = f"--{setting.name.replace('_', '-')}"
        assert re.search(rf"^  {spelled}\b", output, re.MULTILINE), spelled
        if setting.name != "unit":
            assert helps[setting.name], spelled
            assert " ".join(helps[setting.name].split())[:30] in said.replace("- ", "-"), spelled
        if isinstance(setting.default, float | int) and not isinstance(setting.default, bool):
            assert f"(default: {setting.default})" in said
    assert ("--distillation.later-noise" in output) == name.startswith("mrp")
    assert ("--coverage.about-names" in output) == ("--budget" in output) == (name != "direction-ablation")


def test_every_setting_of_every_method_can_be_given() -> None:
    values = {float: "0.25", int: "3", bool: "true"}
    for name, kind in METHODS.items():
        for option in options_of(kind, name):
            if option.settings is not None or "." in option.name:
                continue
            choices = getattr(option.alternatives[0], "__args__", None)
            text = "1,2" if option.element else choices[-1] if choices else values[option.alternatives[0]]
            made = getattr(fitter("--method", name, option.spelled, text), option.field)
            assert str(list(made) if isinstance(made, tuple | list) else made) == (
                "[1, 2]" if option.element else "True" if text == "true" else text
            ), option.name


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inside.

    Args:
        noise: share.
    """

    noise: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All kinds of fields.

    Attributes:
        lr, eps: two
            at once.
        inner: deeper.
    """

    lr: float | None = None
    eps: float = 1e-8
    layers: tuple[int, ...] | None = None
    names: tuple[str, ...] = field(default=("a",), metadata={"separator": ","})
    files: tuple[str, ...] = ()
    either: str | tuple[str, ...] | None = None
    mode: Literal["one", "two"] = "one"
    forms: tuple[Literal["x", "y"], ...] = ()
    flag: bool = False
    on: bool = True
    inner: Inner | None = None
    out: Path


OPTIONS = {option.name: option for option in options_of(Settings, "settings")}


def values_of(*words: str) -> dict[str, Any]:
    return converted(read(words, OPTIONS, positional=None, where="x"), OPTIONS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--lr 1e-3", {"lr": 1e-3}),
        ("--lr=none", {"lr": None}),
        ("--lr 1 --lr 2", {"lr": 2.0}),
        ("--layers 3,5", {"layers": (3, 5)}),
        ("--layers 3 --layers 5,6", {"layers": (5, 6)}),
        ("--layers -1", {"layers": (-1,)}),
        ("--names mrp,rmu", {"names": ("mrp", "rmu")}),
        ("--files a,b --files hub:c:d", {"files": ("a,b", "hub:c:d")}),
        ("--either a,b", {"either": "a,b"}),
        ("--forms x,y", {"forms": ("x", "y")}),
        ("--flag --no-on", {"flag": True, "on": False}),
        ("--flag=false", {"flag": False}),
        ("--inner", {"inner": Inner()}),
        ("--inner.noise 0.1", {"inner": Inner(noise=0.1)}),
        ("--inner --inner.noise 0.1", {"inner": Inner(noise=0.1)}),
        ("--no-inner", {"inner": None}),
        ("--out 3", {"out": Path("3")}),
    ],
)
def test_options_mean_what_their_fields_types_say(words: str, found: dict[str, Any]) -> None:
    assert values_of(*words.split()) == found


@pytest.mark.parametrize("text", ["{q}", "1e-3", "true", "[a]", "a: b\nc", " {answer}", "null?", "- x", "#1", "'"])
def test_text_stays_as_it_was_typed(text: str) -> None:
    assert values_of("--either", text) == {"either": text}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr fast", "--lr must be a number, got 'fast'"),
        ("--lr", "--lr needs a value"),
        ("--layers 1;2", "--layers takes numbers separated by commas, got '1;2'"),
        ("--mode three", "unknown mode 'three'; choose one of one, two"),
        ("--forms x,z", "unknown forms 'z'; choose one of x, y"),
        ("--layer 3", "x has no --layer; did you mean --layers?"),
        ("--inner.noise loud", "inner"),
        ("stray", "x takes no 'stray'; options begin with --"),
        ("--files a b", "x takes no 'b'; several of them are --files A --files B; options begin with --"),
        ("--layers 1 2", "x takes no '2'; several of them are --layers A,B; options begin with --"),
        ("--names mrp rmu", "x takes no 'rmu'; several of them are --names A,B; options begin with --"),
    ],
)
def test_what_makes_no_sense_is_named(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        values_of(*words.split())
    assert "\n" not in str(raised.value)


def test_what_is_given_twice_and_counts_once_is_told(caplog: pytest.LogCaptureFixture) -> None:
    values_of(*"--lr 1 --lr 1 --files a --files b --flag --flag".split())
    assert not caplog.records
    values_of(*"--lr 1 --lr 2 --layers 3 --layers 5".split())
    assert [record.getMessage() for record in caplog.records] == [
        "--lr is given 2 times; the last one counts, 2",
        "--layers is given 2 times; the last one counts, 5 (several of them: --layers 3,5)",
    ]


def test_a_docstring_describes_fields_one_by_one_together_and_in_a_base_class() -> None:
    assert {name: OPTIONS[name].help for name in ("lr", "eps", "inner.noise")} == {
        **dict.fromkeys(["lr", "eps"], "two at once."),
        "inner.noise": "share.",
    }
    assert described(METHODS["npo"])["retain_weight"].startswith("weight of the cross-entropy")
    assert OPTIONS["out"].default is MISSING
    assert OPTIONS["flag"].prepared(FLAG) is True


def test_a_printed_configuration_is_one(tiny_folder: Path, files: Path) -> None:
    words = [*data_words(tiny_folder, files), "--method", "mrp", "--distillation.steps", "7", "--lr", "1e-7"]
    printed = completed("unlearn", *words, "--print-config").output
    assert not (files / "out").exists()
    settings = yaml.safe_load(printed)
    assert (settings["lr"], settings["distillation"]["steps"], settings["retain_energy"]) == (
        1e-7,
        7,
        MRP.retain_energy,
    )
    (files / "run.yaml").write_text(printed)
    assert completed("unlearn", "--config", str(files / "run.yaml"), "--print-config").output == printed
    again = Unlearn.parsed(["--config", str(files / "run.yaml"), "--lr", "3e-4", "--layers", "1"])
    assert again is not None
    assert again.fitter == MRP(lr=3e-4, layers=[1], distillation=Distillation(steps=7))
    assert again.data == TaskConfig.from_options(settings)
    assert fitter("--method", "rmu", "--released", "--alpha", "3") == RMU.released(alpha=3.0)
    empty = yaml.safe_load(completed("unlearn", "--method", "rmu", "--released", "--print-config").output)
    assert (empty["out"], empty["positions"], empty["forget"]) == (None, "all", [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "method: mrp\nrnk: 3\n", "run.yaml: unlearn --method mrp has no setting 'rnk'"),
        ("run.yaml", "method: [", "run.yaml is neither YAML nor JSON"),
        ("run.yaml", "- 1", "run.yaml holds no settings"),
        (
            "summary.json",
            '{"command": "attack", "arguments": {}, "seed": 0}',
            "is of `mrp-lens attack`, not of `mrp-lens unlearn`",
        ),
        ("run.yaml", "method: mrp\n", "unlearn --method mrp needs --model, --forget, --retain, --out"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    result = invoke("unlearn", "--config", str(tmp_path / name))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert "no file at" in str(invoke("unlearn", "--config", str(tmp_path / "none")).exception)


READS = {  # a command, what it reads, and the output folder that would delete that
    "a checkpoint": (["unlearn", "--method", "rmu"], "--model", "checkpoint", "checkpoint"),
    "a folder with the checkpoint": (["unlearn", "--method", "rmu"], "--model", "checkpoint", "."),
    "a reference": (["unlearn", "--method", "rmu"], "--reference", "checkpoint", "checkpoint"),
    "an earlier edit": (["unlearn", "--method", "rmu"], "--after", "run/edit", "run"),
    "texts": (["unlearn", "--method", "rmu"], "--forget", "run/texts.jsonl", "run"),
    "a quiz": (["sweep"], "--untaught-questions", "run/texts.jsonl", "run"),
    "an edit to measure": (["measure"], "--edit", "run/edit", "run"),
    "tasks": (["measure"], "--include-path", "run/edit", "run/edit"),
    "an edit to attack": (["attack"], "--edit", "run/edit", "run/edit"),
    "texts to tune on": (["tune"], "--retain", "run/texts.jsonl", "run"),
    "an edit to export": (["export"], "--edit", "run/edit", "run"),
    "its figures": (["export", "--edit", "other"], "--attacks", "run", "run"),
    "a model to plan": (["plan"], "--model", "checkpoint", "checkpoint"),
    "runs to compare": (["compare", "run", "other"], "--folders", "run", "run"),
}


@pytest.mark.parametrize("what", READS)
def test_no_command_writes_to_what_it_reads(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, option, read, out = READS[what]
    for name in ("checkpoint/config.json", "run/edit/edit_config.json", "run/texts.jsonl", "run/summary.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    given = {"--model": "own", "--forget": "f.jsonl", "--retain": "r.jsonl"} if words[0] == "unlearn" else {}
    given |= {} if words[0] == "compare" else {option: read}
    line = [*words, *(word for pair in given.items() for word in pair), "--out", out]
    may_overwrite = words[0] not in ("sweep", "attack", "tune")
    for more in ([], ["--overwrite"]) if may_overwrite else ([],):
        refused = invoke(*line, *more).exception
        assert isinstance(refused, ValueError)
        assert f"what {option} names ({read}), which would be deleted; choose another output folder" in str(refused)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_called_as_a_model_of_the_library_may_hold_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "unknown topic 'x'" in str(invoke("measure", "--topic", "x", "--out", "demo").exception)


@pytest.mark.slow
def test_bad_input_ends_with_one_line_and_code_2_and_debug_shows_where() -> None:
    words = "unlearn --model /nowhere --method mrp --forget none.jsonl --retain r.txt --out o".split()
    result = in_process(*words)
    assert result.returncode == 2
    assert result.stderr == "mrp-lens: no file at none.jsonl\n" or "no file at none.jsonl" in result.stderr
    assert result.stderr.count("\n") == 1
    traced = in_process(*words, "--debug")
    assert traced.returncode == 2
    assert "Traceback" in traced.stderr
    assert traced.stderr.endswith(result.stderr)
    for wrong, message in ((["nope"], "no command 'nope'; choose one of demo, "), (["demo", "--ot", "x"], "--out")):
        assert message in str(invoke(*wrong).exception)


FAULTS: dict[str, tuple[Callable[[], object], bool | None]] = {
    "a check of the library": (lambda: RMU(layer=99).fit(None, [], None), None),  # type: ignore[arg-type]
    "a conversion": (lambda: int("x"), False),
    "a wrong call": (lambda: load_edit(), False),  # type: ignore[call-arg]
    "a shape": (lambda: torch.zeros(2, 3) @ torch.zeros(2), False),
    "a key": (lambda: {"y": 1}["x"], False),
    "a file that nobody checked": (lambda: Path("/nowhere/at/all").read_text(), False),
    "a folder that is none": (lambda: load_edit("/nowhere/at/all"), True),
    "an unknown method": (lambda: METHODS["nope"], True),
    "a check of another library": (lambda: torch.arange(3, device="nowhere"), False),
}


@pytest.mark.parametrize("fault", [name for name, (_, users) in FAULTS.items() if users is not None])
def test_a_fault_of_the_library_is_told_from_bad_input_by_who_raised_it(fault: str) -> None:
    make, users = FAULTS[fault]
    with pytest.raises(Exception) as raised:  # noqa: PT011
        make()
    assert is_users(raised.value) is users
    full = OSError(28, "No space left on device")
    assert is_users(full)


@pytest.mark.slow
def test_a_fault_of_the_library_ends_with_its_traceback() -> None:
    code = (
        "from mrp_lens.cli import main\nimport mrp_lens.cli.report as module\n"
        "module.report = lambda *_: int('x')\nmain()"
    )
    result = in_process("report", "somewhere", code=code)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ValueError: invalid literal" in result.stderr


@pytest.mark.slow
def test_a_method_of_another_package_is_run_by_name(tiny_folder: Path, files: Path) -> None:
    try:

        @register("toy", summary="Projects.", source="nowhere", report="projected at layers {layers}")
        @dataclass(frozen=True, kw_only=True)
        class Toy(MRP):
            """A toy.

            Args:
                model: a field whose name an option has already.
                strength: of nothing.
            """

            model: str = "x"
            strength: float = 3.0

        said = completed("unlearn", "--method", "toy", "--help").said
        assert "--strength X of nothing. (default: 3.0)" in said
        assert "toy Projects. nowhere" in completed("unlearn", "--help").said
        words = ["--method", "toy", *data_words(tiny_folder, files), "--steps", "2", "--strength", "4"]
        completed("unlearn", *words, "--toy-model", "y")
        arguments = summary_of(files / "out")["arguments"]
        assert (arguments["strength"], arguments["toy_model"], arguments["model"]) == (4.0, "y", str(tiny_folder))
        assert "projected at layers" in (files / "out" / "report.html").read_text(encoding="utf-8")
        assert issubclass(Toy, Method)
    finally:
        METHODS._entries.pop("toy", None)


def test_an_option_knows_its_type() -> None:
    option = Option("distillation", "distillation", Distillation | None, None, "", "x")
    assert (option.settings, option.is_flag, option.element) == (Distillation, True, None)


@pytest.mark.slow
def test_the_demo_runs_the_whole_job(tmp_path: Path) -> None:
    completed("demo", "--out", str(tmp_path / "demo"))
    rows = {row["method"]: row for row in json.loads((tmp_path / "demo" / "summary.json").read_text())["rows"]}
    assert list(rows) == ["unedited", "random-projection", "untrained-start", "mrp", "rmu", "adaptive-rmu"]
    assert rows["unedited"]["forget_accuracy"] >= 0.97
    assert rows["random-projection"]["forget_accuracy"] > rows["mrp"]["forget_accuracy"] + 0.1
    for method in ("mrp", "rmu", "adaptive-rmu"):
        assert rows[method]["forget_accuracy"] <= 0.35  # RMU's two end where the verdict's limit of 0.31 lies
        assert rows[method]["worst_topic_accuracy"] >= 0.97
        assert rows[method]["text_perplexity_ratio"] < 1.1
        load_edit(tmp_path / "demo" / method / "edit")
        assert (tmp_path / "demo" / method / "log.csv").is_file()
        assert rows[method]["outcome"] == Fit.load(tmp_path / "demo" / method).ended
        assert rows[method]["recovery_20_low"] < rows[method]["recovery_20"] < rows[method]["recovery_20_high"]
    assert rows["mrp"]["verdict"] == "absent"
    assert rows["unedited"]["recovery_20"] > rows["mrp"]["recovery_20"]
    assert "recovery_20" not in rows["untrained-start"]
    assert rows["untrained-start"]["outcome"] is None
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    for picture in ("accuracies", "alignment_by_layer", "confidence_by_method", "displacement", "relearning_curves"):
        assert f'id="{picture}"' in page


def test_what_goes_into_a_file_is_as_wide_as_a_table_or_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console._width() == 200
    for asked, width in (("120", 120), ("0", 200), ("wide", 200)):
        monkeypatch.setenv("COLUMNS", asked)
        assert console._width() == width
