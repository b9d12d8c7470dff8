"""Image-text pairs from a CSV, read by the rules of open_clip's training (open_clip_train/data.py, CsvDataset).

Training calls `pandas.read_csv(path, sep=separator)` and takes `str()` of each path and caption. So a path may be an
address that pandas can open, and a caption that pandas takes for a missing value (such as "", "NA" and "None") is the
word "nan".
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


class DataError(ValueError):
    """Data that cannot be read, in one line that names the file."""


def read_pairs(
    path: str | Path, separator: str, image_key: str, caption_key: str, further: Collection[str] = ()
) -> "DataFrame":
    """The rows of a CSV. Paths and captions are values as training has them; `further` columns are texts as written.

    Args:
        path: a file, or an address that pandas can open.
        separator: one character, or a regular expression, as pandas takes it.
        image_key: column of the images.
        caption_key: column of the captions.
        further: columns that may be there as well; an empty field is "".

    Raises:
        DataError: it cannot be read, or one of the first two columns is missing.
    """
    table = read_table(path, separator)
    columns = [str(column) for column in table.columns]
    for key in (image_key, caption_key):
        if key not in columns:
            raise DataError(f"{path} has the columns {', '.join(columns) or 'none'}; expected {key} among them")
    present = [column for column in further if column in columns]
    if present:
        # As written: pandas would read a text like NA as missing, and digits as a number.
        written = read_table(path, separator, usecols=present, dtype=str, keep_default_na=False).fillna("")
        table[present] = written[present].astype(object)
    return table


def read_table(path: str | Path, separator: str, **options: Any) -> "DataFrame":
    """The result of `pandas.read_csv` with these options; an empty table for an empty file.

    Raises:
        DataError: it cannot be read.
    """
    import warnings

    import pandas

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pandas.errors.ParserWarning)  # a separator of several characters is slow
            return pandas.read_csv(path, sep=separator, **options)
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()
    # ParserError and UnicodeDecodeError are ValueErrors.
    except (OSError, ValueError, ImportError, re.error) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def separator_of(path: str | Path) -> str:
    """A tab if the first line contains one, otherwise a comma.

    Raises:
        DataError: it cannot be read.
    """
    return "\t" if len(read_table(path, "\t", nrows=0).columns) > 1 else ","


def missing_captions(table: "DataFrame", path: str | Path, separator: str, caption_key: str) -> str | None:
    """One line that says which captions are read as "nan", and what the file has there; None if there is none."""
    missing = table[caption_key].isna()
    if not missing.any():
        return None
    written = read_table(path, separator, usecols=[caption_key], dtype=str, keep_default_na=False)[caption_key]
    cells = ", ".join(repr(cell) for cell in sorted(set(written[missing].tolist()))[:5])
    first = line_of(table, missing.tolist().index(True))
    return (
        f"{missing.sum()} of {len(table)} captions in {path} are read as the word 'nan': pandas takes {cells} for "
        f"missing values; the first is in line {first}"
    )


def line_of(table: "DataFrame", row: int) -> int:
    """The line of the file on which row `row`, from 0, begins. Blank lines, which pandas skips, are not counted."""
    texts = table.iloc[:row].select_dtypes(include=["object", "string"])
    breaks = sum(str(cell).count("\n") for column in texts for cell in texts[column])
    return row + 2 + breaks
