"""What the library says in Python, the command line says in its own words."""

import pytest

from mrp_lens.cli.errors import as_typed


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        (
            "choose another folder, or overwrite it (overwrite=True)",
            "choose another folder, or overwrite it (--overwrite)",
        ),
        (
            "the column with field=..., or completion=' {answer}'",
            "the column with --field, or --completion ' {answer}'",
        ),
        ("for a data set of the Hub use from_hub", "for a data set of the Hub write hub:NAME"),
        ("give its own name (fit(..., request=...))", "give its own name (fit(..., --request))"),
        ("on the forget set; give questions=...", "on the forget set; give --questions"),
        ("give forget=... and retain=... (and questions=...)", "give --forget and --retain (and --questions)"),
        ("give --untaught-questions; untaught_questions=...", "give --untaught-questions; untaught_questions=..."),
        ("load_model(..., tokenizer=...)", "load_model(..., tokenizer=...)"),  # no option
    ],
)
def test_arguments_are_spelled_as_options(said: str, typed: str) -> None:
    assert as_typed(said) == typed
