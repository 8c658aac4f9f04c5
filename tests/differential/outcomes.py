"""What came of one measure on one model: a figure that agrees, a clear refusal, or a fault."""

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass


class DisagreementError(Exception):
    """mrp_lens and the oracle give different values."""


@dataclass
class Outcome:
    """Of one measure on one model: "ok", "refused", "wrong" (another value) or "crashed" (an obscure exception)."""

    status: str
    detail: str = ""
    reason: str = ""


def outcome_of(measure: Callable[[], str]) -> Outcome:
    try:
        return Outcome("ok", measure())
    except DisagreementError as error:
        return Outcome("wrong", str(error))
    except (ValueError, TypeError, ImportError, FloatingPointError) as error:
        if not raised_by_the_library(error):
            return Outcome("crashed", traceback.format_exc(), f"{type(error).__name__} from elsewhere")
        return Outcome("refused", str(error), reason_of(error))
    except Exception as error:
        return Outcome("crashed", traceback.format_exc(), f"{type(error).__name__}: {error}"[:200])


def raised_by_the_library(error: BaseException) -> bool:
    """A refusal is raised by a `raise` of mrp_lens: numpy's and torch's own ValueErrors are accidents."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.sep}mrp_lens{os.sep}" in frames[-1].filename


def reason_of(error: BaseException) -> str:
    """The message without its numbers, names and paths, so that equal reasons can be counted."""
    message = re.sub(r"/\S+", "PATH", str(error).split("\n")[0])
    message = re.sub(r"'[^']*'", "'...'", message)
    return f"{type(error).__name__}: {re.sub(r'[-+]?[0-9][0-9.,e+-]*', '#', message)}"[:220]
