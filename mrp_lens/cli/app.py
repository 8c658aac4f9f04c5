"""`mrp-lens demo | plan | unlearn | sweep | tune | attack | measure | compare | chat | export | report`."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "demo": (
        "Demo",
        "Forget one topic of the embedded invented world with MRP, RMU and Adaptive RMU, and compare them.",
    ),
    "plan": ("PlanFits", "Say what a fit will need, before any weights are loaded: memory, time, batch, devices."),
    "unlearn": ("Unlearn", "Make your own model forget: fit an edit, save it, and measure before and after."),
    "sweep": ("Sweep", "Fit every method at one layer after another and compare what each did."),
    "tune": ("Tune", "Search a method's settings: what forgets most for least damage."),
    "attack": ("AttackEdit", "See what survives an edit: retrain, probe, bypass and jailbreak it."),
    "measure": ("Measure", "Measure a model, and the same model with an edit on, without fitting anything."),
    "compare": ("Compare", "Put the edits of several runs into one table, by the damage that they did."),
    "export": ("Export", "Write an edited model for Hugging Face's transformers, and prove it by reloading."),
    "chat": (
        "ChatWithEdit",
        "Ask a model, and the same model with an edit on, side by side, in the terminal or on a page.",
    ),
    "report": ("Report", "Make one HTML page of a run: table, controls, figures, answers, settings."),
}
HELP = """usage: mrp-lens COMMAND [OPTIONS]

Make a language model forget a topic on its residual stream, and see what was forgotten and what was kept.

Start with `mrp-lens demo`: it needs no data, no network and no GPU. Then run `mrp-lens unlearn` on your own checkpoint.

commands:
{commands}

`mrp-lens COMMAND --help` shows the options of one. Every command takes --config FILE (YAML, or the summary.json of a run),
--print-config, and --debug, which shows where in the code an error was raised.
"""


def run(words: Sequence[str]) -> Any:
    """Do what a command line says; errors come out as they are.

    Raises:
        ValueError: there is no such command or option, or a value makes no sense.
    """
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items())
        sys.stdout.write(HELP.format(commands=listed))
        return None
    if words[0] == "--version":
        sys.stdout.write(f"{version('mrp_lens')}\n")
        return None
    word = words[0]
    if word not in COMMANDS:
        from mrp_lens.utils.validation import meant

        raise ValueError(f"no command {word!r}; {meant(word, COMMANDS)}choose one of {', '.join(COMMANDS)}")
    kind = getattr(import_module(f"mrp_lens.cli.{word}"), COMMANDS[word][0])
    command = kind.parsed(words[1:])
    if command is None:
        return None
    from mrp_lens.utils.processes import joined, launched  # heavy, as the command's own modules are

    if launched() > 1 and not kind.shared:
        raise ValueError(
            f"several processes can share the fit of `mrp-lens unlearn`, and no other command; start `mrp-lens {word}` without torchrun "
            "(`sweep --shard 1/4`, and `tune` started several times, divide their fits)"
        )
    with joined():
        command.check_apart()
        return command.execute()


def main(words: Sequence[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if words is None else words
    as_program("mrp-lens", lambda: run(words), debug="--debug" in words)


def as_program(name: str, call: Callable[[], Any], *, debug: bool = False) -> None:
    """Bad input ends with one line and code 2, Ctrl-C with code 130, a fault of the library with its traceback. Warnings are a line, too.

    Args:
        name: of the program, which begins such a line.
        call: what it does.
        debug: show the traceback of bad input as well.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    try:
        call()
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        sys.exit(130)
    except Exception as error:
        from mrp_lens.cli.errors import as_typed, is_users  # heavy

        if not is_users(error):
            raise
        if debug:
            traceback.print_exception(error)
        sys.stderr.write(f"{name}: {as_typed(str(error))}\n")
        sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """What is warned of without the line of code at which it was, which says nothing to who typed a command."""
    from mrp_lens.cli.errors import as_typed

    sys.stderr.write(f"{as_typed(str(message))}\n")
