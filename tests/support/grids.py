"""How made-up frames are put together."""

from typing import Any

import pandas as pd


def grid(**keys: Any) -> pd.DataFrame:
    """A row for each combination of the keys."""
    return pd.MultiIndex.from_product([list(values) for values in keys.values()], names=list(keys)).to_frame(
        index=False
    )


def with_interval(frame: pd.DataFrame, column: str, share: float = 0.1) -> pd.DataFrame:
    """With `low` and `high` so much below and above the column."""
    return frame.assign(low=frame[column] * (1 - share), high=frame[column] * (1 + share))
