"""The table of points as a file: CSV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"\s*[=+\-@]")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """One header row, an empty cell for unknown, no cell that a spreadsheet would run as a formula."""
    cells = _typed(table)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(map(_csv_text, cells.columns)) + "\n")
        for start in range(0, len(cells), _CHUNK):
            columns = [_csv_cells(cells[name].iloc[start : start + _CHUNK]) for name in cells.columns]
            file.writelines(",".join(row) + "\n" for row in zip(*columns, strict=True))


_CHUNK = 10_000


def _csv_cells(column: pd.Series[Any]) -> list[str]:
    """The cells of a column as text: each text once, where pandas would do it for every row, which took most of the
    time of a large analysis."""
    known = column.notna()
    values = column.tolist() if known.all() else column.astype(object).where(known, None).tolist()
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return list(map(str, values)) if known.all() else ["" if value is None else str(value) for value in values]
    texts = {value: "" if value is None else _csv_text(value) for value in set(values)}
    return [texts[value] for value in values]


def _csv_text(value: Any) -> str:
    text = f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else str(value)
    return '"' + text.replace('"', '""') + '"' if re.search('[,"\n\r]', text) else text


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers stay whole where others of their column are unknown."""
    return table.astype({"setting": object}).convert_dtypes()
