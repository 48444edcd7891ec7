"""Rows that the tests of datasets and texts share."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet

ROWS = [{"id": f"r{i}", "text": f"Row {i} of ten, é."} for i in range(10)]


def write(kind, folder, rows=ROWS):
    """The rows as a file or folder of that kind."""
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        table.to_pandas().to_csv(path, index=False)
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "arrow file":
        path = folder / "rows.arrow"
        with pa.ipc.new_file(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    elif kind == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "disk dict":
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])
        ).save_to_disk(path)
    return path


CLASSES = {"bad": 0, "good": 1}


def said(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
