"""Which errors are the user's, and end with one line; all others are ours, and show where they were raised.

An error is the user's if a check raised it: the innermost frame of its traceback stands at a `raise` statement of this library, or
of a registered plugin. What an operation raises (`int("x")`, a missing column, a shape that torch refuses) escaped every check:
a fault of the library. Of the operating system and the Hub, an OSError that some library raised by name is the user's too, and so
is one that says what the machine lacks.
"""

import dis
import errno
import re
from types import TracebackType

from mrp_lens.attacks import ATTACKS
from mrp_lens.methods import METHODS

# What errors of the library say to somebody who writes Python, and how it is typed on a command line. A quiz has options of its own.
NAMES = "forget retain questions retain_questions field prompt completion choices answer entity request question_prompt system chat_template"
ARGUMENT = re.compile(rf"(?<![\w.(])({NAMES.replace(' ', '|')})=(\.\.\.|True|'[^']*')")
WORD = re.compile(r"(?<![\w.(])(split|form|backend|target|max_length|micro_batch)=('?)([\w./-]+)\2")
IN_PYTHON = {
    "schema='locuslab/TOFU'": "--forget-schema or --retain-schema locuslab/TOFU",
    "overwrite=True": "--overwrite",
    "use from_hub": "write hub:NAME",
    "set tokenizer.chat_template, or": "set it in the checkpoint's tokenizer, or",
    "leave dtype out": "leave --dtype out",
    "leave system out": "leave --system out",
    "edit.save_pretrained(...)": "`mrp-lens unlearn`, such as runs/mine/edit",
}
KINDS = (ValueError, TypeError, OSError, FloatingPointError, ImportError)
OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM),
    *(errno.EMFILE, errno.ENFILE, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH),
}


def as_typed(message: str) -> str:
    """A message of the library in the words of the command line."""
    for said, typed in IN_PYTHON.items():
        message = message.replace(said, typed)
    message = WORD.sub(lambda found: f"--{found[1].replace('_', '-')} {found[3]}", message)
    return ARGUMENT.sub(
        lambda found: f"--{found[1].replace('_', '-')} {found[2]}".removesuffix(" ...").removesuffix(" True"), message
    )


def is_users(error: BaseException) -> bool:
    """Whether an error tells of bad input or of the machine, and not of a fault in the library."""
    if not isinstance(error, KINDS):
        return False
    innermost = _innermost(error.__traceback__)
    raised = innermost is not None and _at_raise(innermost)
    if isinstance(error, OSError):
        return raised or error.errno in OF_THE_MACHINE
    return raised and innermost is not None and _package(innermost) in _own()


def _innermost(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _at_raise(traceback: TracebackType) -> bool:
    """Whether the frame stands at a `raise` statement, not at a call."""
    instruction = next(
        (one for one in dis.get_instructions(traceback.tb_frame.f_code) if one.offset == traceback.tb_lasti), None
    )
    return instruction is not None and instruction.opname == "RAISE_VARARGS"


def _package(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _own() -> set[str]:
    """This package, its studies (of which the one that runs is `__main__`), and those whose methods and attacks are registered."""
    entries = [*METHODS.values(), *ATTACKS.values()]
    return {"mrp_lens", "analysis", "__main__", *(kind.__module__.partition(".")[0] for kind in entries)}
