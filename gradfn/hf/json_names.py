"""Names of rows as JSON spells them; readers of tables make floats of integers that 64 bits do not hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfn.errors import InputError
from gradfn.hf.unpack import read_bytes

if TYPE_CHECKING:
    import datasets

_NAMED = ("id", "source")
"""The columns that hold names of rows."""


class _Digits(float):
    """A float that remembers how it was spelled."""

    def __new__(cls, text: str) -> "_Digits":
        """The number that a text spells."""
        number = super().__new__(cls, text)
        number.text = text  # pyright: ignore[reportAttributeAccessIssue]
        return number

    def __str__(self) -> str:
        return self.text  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, eq=False)
class NamedRows:
    """A file of JSON, its columns of names with the digits as they are, and whether readers keep all digits.

    Readers of tables keep ten digits of the numbers in one list, and all of those in rows of their own.
    """

    file: Path
    names: dict[str, list[str | None]]
    exact: bool = True

    def rewritten(self, file: Path) -> "NamedRows":
        """The same in another file, where names are texts."""
        with file.open("w", encoding="utf-8") as lines:
            for number, row in enumerate(_values(self.file)[0]):
                own = {key: values[number] for key, values in self.names.items()}
                lines.write(json.dumps({**row, **own} if isinstance(row, dict) else {"text": row}) + "\n")
        return NamedRows(file, self.names)


def named_rows(file: Path) -> NamedRows:
    """The names in a file of JSON.

    Raises:
        InputError: a row is no object, or nested so deeply that readers of tables crash.
        ValueError: it is not JSON in UTF-8.
    """
    try:
        rows, lines = _values(file)
    except RecursionError as error:
        raise InputError(f"{file} has values nested too deeply: give rows of plain values") from error
    if all(isinstance(row, str) for row in rows):
        return NamedRows(file, {})
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            shown, line = json.dumps(row)[:40], f" (line {lines[number]})" if lines else ""
            raise InputError(
                f"row {number} of {file}{line} is {shown}, expected an object such as "
                '{"text": ...}: correct it or leave it out'
            )
    found = {name: [row.get(name) for row in rows] for name in _NAMED if any(name in row for row in rows)}
    names = {key: [None if one is None else str(one) for one in values] for key, values in found.items()}
    return NamedRows(file, names, bool(lines) and all(map(_is_column, found.values())))


def _values(file: Path) -> tuple[list[Any], list[int]]:
    """The values that stand one after the other, and the line that each begins in; or those of one list.

    Raises:
        ValueError: naming the first line that is no JSON, or not in UTF-8.
    """
    data = read_bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"'utf-8' codec can't decode byte 0x{data[error.start]:02x}"
        raise ValueError(f"{what}: line {line} of {file} is not UTF-8") from None
    decoder, start, values, lines = json.JSONDecoder(parse_float=_Digits), 0, [], [1]
    while start < (end := len(text)):
        begun = start
        while start < end and text[start].isspace():
            start += 1
        lines[-1] += text.count("\n", begun, start)
        if start < end:
            begun = start
            try:
                value, start = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                inside = error.lineno > lines[-1] and text[begun] == "{"
                first = f", in the row that begins in line {lines[-1]}" if inside else ""
                place = f"line {error.lineno} column {error.colno} of {file}{first}"
                raise ValueError(f"{error.msg}: {place}") from None
            values.append(value)
            lines.append(lines[-1] + text.count("\n", begun, start))
    return (values[0], []) if len(values) == 1 and isinstance(values[0], list) else (values, lines)


def _is_column(values: list[Any]) -> bool:
    """Whether a table holds the values as they are: texts, or whole numbers of 64 bits."""
    kinds = {type(value) for value in values if value is not None}
    return kinds <= {str} or (kinds == {int} and all(one is None or abs(one) < 2**63 for one in values))


def with_names(rows: "datasets.Dataset", parts: list[NamedRows]) -> "datasets.Dataset":
    """The rows of files one after the other, with names as texts."""
    import datasets

    order = rows.column_names
    for column in {*_NAMED} & {*order}:
        names: list[str | None] = []
        for part in parts:
            count = len(next(iter(part.names.values()), []))
            names += part.names.get(column, [None] * count)
        if len(names) == len(rows):
            plain: Any = rows.remove_columns(column)
            rows = plain.add_column(column, names, feature=datasets.Value("string"))
    return rows.select_columns(order)
