"""What an accuracy says beside that on facts that were never taught."""

from mrp_lens.metrics.controls import verdict


def test_verdicts() -> None:
    assert [verdict(a, 0.25) for a in (0.21, 0.25, 0.29, 0.1, 0.5)] == [
        "absent",
        "absent",
        "absent",
        "suppressed",
        "known",
    ]
