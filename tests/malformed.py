"""Inputs that are broken in many ways, each a function of its number: data, models, stores, options, configs.

`malformed(number, given, folder)` writes what a case needs into a folder, and gives the command for it.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gradfn.cli.commands import COMMANDS
from gradfn.cli.request import slots_of

ASK = ["--query", "The capital of Peru is", "--completion", " Lima"]
ROWS = [{"id": f"r{row}", "text": f"Row {row} of ten, é."} for row in range(10)]


class Given(NamedTuple):
    """What is not broken: a model's folder, a file of rows, and a run of `gradfn build`."""

    model: Path
    corpus: Path
    store: Path


class Malformed(NamedTuple):
    """A command that cannot be done, and what is wrong with it.

    Args:
        what: in words.
        arguments: of the command.
        surely: whether it must be refused; a bit that is flipped may leave another valid input.
    """

    what: str
    arguments: list[str]
    surely: bool = True


def malformed(number: int, given: Given, folder: Path) -> Malformed:
    """One case."""
    chance = random.Random(number)
    family = FAMILIES[number % len(FAMILIES)]
    what, arguments, surely = family(chance, given, folder)
    return Malformed(f"{number}: {family.__name__}, {what}", [str(one) for one in arguments], surely)


# --- bytes


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(1, len(content))]


def _flipped(content: bytes, chance: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(8):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def _zeroed(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.randrange(16, 512))
    return content[:start] + bytes(stop - start) + content[stop:]


def _noise(content: bytes, chance: random.Random) -> bytes:
    return b"\x93" + chance.randbytes(chance.randrange(8, 300))


Damage = Callable[[bytes, random.Random], bytes]
DAMAGES: dict[str, Damage] = {
    "cut short": _cut, "flipped bits": _flipped, "zeros": _zeroed, "noise": _noise,
    "empty": lambda content, _: b"",
    "twice": lambda content, _: content + content,
    "another ending": lambda content, _: content + b"\x00\xff\xfe garbage",
    "a web page": lambda content, _: b"<!doctype html><title>404</title>",
}  # fmt: skip
SURE = {"noise", "empty", "a web page"}


def _damage(path: Path, chance: random.Random) -> str:
    name = chance.choice([*DAMAGES])
    path.write_bytes(DAMAGES[name](path.read_bytes(), chance))
    return name


# --- data


def _table(rows: Any) -> pa.Table:
    return pa.Table.from_pylist(rows) if isinstance(rows, list) else rows


def write_rows(path: Path, rows: Any) -> Path:
    """Rows in the format that the name says."""
    kind = path.suffix
    if kind == ".parquet":
        pq.write_table(_table(rows), path)
    elif kind == ".arrow":
        table = _table(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == ".csv":
        _table(rows).to_pandas().to_csv(path, index=False)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS: dict[str, Any] = {
    "no text": [{"id": "a", "body": "b"}],
    "numbers": [{"text": 1.5}, {"text": 2}],
    "a null": [{"text": "a b c"}, {"text": None}],
    "only nulls": [{"text": None}, {"text": None}],
    "lists": [{"text": ["a", "b"]}],
    "dicts": [{"text": {"a": "b"}}],
    "truths": [{"text": True}],
    "bytes": pa.table({"text": [b"\xff\xfe", b"a"]}),
    "times": pa.table({"text": pa.array([1, 2], pa.timestamp("s"))}),
    "no rows": pa.table({"text": pa.array([], pa.string())}),
    "no columns": pa.table({}),
    "empty texts": [{"text": ""}, {"text": ""}],
    "too long": [{"text": "The capital " * 400}],
}
LINES: dict[str, bytes] = {
    "a word": b"hello\n",
    "a number a line": b"1\n2\n3\n",
    "a list a line": b'["a", "b"]\n["c"]\n',
    "an open brace": b'{"text": "a b"\n',
    "an open string": b'{"text": "a b}\n',
    "a comma too many": b'{"text": "a b",}\n',
    "single quotes": b"{'text': 'a b'}\n",
    "no UTF-8": b'{"text": "\xff\xfe\xfd"}\n',
    "UTF-16": '{"text": "a b"}\n'.encode("utf-16"),
    "a NUL": b'{"text": "a b"}\n\x00\n',
    "blanks": b"  \n\n \t\n",
    "null": b"null\n",
    "NaN": b"NaN\n",
    "two objects a line": b'{"text": "a b"} {"text": "c d"}} \n',
    "texts, then numbers": b'{"text": "a b"}\n{"text": 5}\n',
    "texts, then dicts": b'{"text": "a b"}\n{"text": {"a": 1}}\n',
    "deep": b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
    "a list in one file": b'[{"body": "a"}]\n',
}
RAGGED: dict[str, bytes] = {
    "more cells than names": b"id,text\na,b,c,d\ne,f\n",
    "an open quote": b'id,text\na,"b\nc,d\n',
    "a header alone": b"id,text\n",
    "one name twice": b"text,text\na,b\n",
    "no UTF-8": b"id,text\na,\xff\xfe\n",
    "a NUL": b"id,text\n\x00,\x00\n\x00\x01,a\n",
    "other separators": b"id;text\na;b\n",
    "blanks": b"\n\n\n",
}
DATA_OPTIONS: dict[str, list[str]] = {
    "a split that is none": ["--split", "test"],
    "a split that is no slice": ["--split", "train[5:"],
    "a split past the end": ["--split", "train[50:60]"],
    "a column that is none": ["--text-column", "body"],
    "half of a pair": ["--prompt-column", "text"],
    "columns twice": ["--prompt-column", "nope", "--completion-column", "text"],
    "rewards of texts": ["--reward-column", "text"],
    "advantages of texts": ["--advantage-column", "text"],
    "labels without classes": ["--label-column", "text"],
    "chats that are texts": ["--messages-column", "text"],
    "chunks of none": ["--chunk-length", "0"],
    "images that are texts": ["--image-column", "text"],
}


def data(chance: random.Random, given: Given, folder: Path) -> tuple[str, list[Any], bool]:
    """Rows that are none."""
    base, run = ["build", folder / "run", "--model", given.model, "--dataset"], chance.randrange(5)
    kind = chance.choice([".jsonl", ".json", ".csv", ".parquet", ".arrow"])
    path = folder / f"d{kind}"
    if run == 0:
        write_rows(path, ROWS)
        name = _damage(path, chance)
        return f"{kind} {name}", [*base, path], name in SURE
    if run == 1:
        name = chance.choice([*COLUMNS])
        rows = COLUMNS[name]
        kind = chance.choice([".parquet", ".arrow"] if isinstance(rows, pa.Table) else [".jsonl", ".parquet"])
        return (
            f"{kind} of {name}",
            [*base, write_rows(folder / f"d{kind}", rows)],
            name not in ("empty texts", "a null"),
        )
    if run == 2:
        name = chance.choice([*LINES])
        path = folder / chance.choice(["d.jsonl", "d.json"])
        path.write_bytes(LINES[name])
        return f"{path.suffix} with {name}", [*base, path], False
    if run == 3:
        name = chance.choice([*RAGGED])
        (folder / "d.csv").write_bytes(RAGGED[name])
        return f".csv with {name}", [*base, folder / "d.csv"], False
    name = chance.choice([*DATA_OPTIONS])
    return name, [*base, write_rows(path, ROWS), *DATA_OPTIONS[name]], True


# --- models


CONFIGS: dict[str, Any] = {
    "no type": {"model_type": None},
    "another type": {"model_type": "no-such-model"},
    "a type that is a number": {"model_type": 3},
    "no width": {"hidden_size": 0},
    "a negative width": {"hidden_size": -16},
    "a width in words": {"hidden_size": "wide"},
    "another width": {"hidden_size": 32},
    "more layers": {"num_hidden_layers": 5},
    "heads that do not divide": {"num_attention_heads": 3},
    "another vocabulary": {"vocab_size": 17},
    "an activation that is none": {"hidden_act": "no-such-act"},
    "a dtype that is none": {"dtype": "float7"},
    "a vision model": {"model_type": "vit"},
    "a depth of 3000": {"rope_scaling": json.loads("[" * 900 + "]" * 900)},
}


ADAPTERS = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "no base": b'{"peft_type": "LORA"}',
    "a base that is a number": b'{"peft_type": "LORA", "base_model_name_or_path": 3}',
    "a base that is nowhere": b'{"peft_type": "LORA", "base_model_name_or_path": "./nowhere"}',
    "no weights": b'{"peft_type": "LORA", "base_model_name_or_path": "BASE", "target_modules": ["q_proj"]}',
    "another kind": b'{"peft_type": "NONE", "base_model_name_or_path": "BASE", "target_modules": ["q_proj"]}',
    "a task in a list": b'{"peft_type": "LORA", "base_model_name_or_path": "BASE", "task_type": [1]}',
    "deep": b'{"task_type": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "no UTF-8": b"\xff\xfe\xfd",
}


def models(chance: random.Random, given: Given, folder: Path) -> tuple[str, list[Any], bool]:
    """Folders of models that are none."""
    model = Path(shutil.copytree(given.model, folder / "model"))
    ask = ["build", folder / "run", "--model", model, "--dataset", given.corpus]
    run = chance.randrange(6)
    if run == 5:
        what = chance.choice([*ADAPTERS])
        shutil.rmtree(model)
        model.mkdir()
        (model / "adapter_config.json").write_bytes(
            ADAPTERS[what].replace(b"BASE", str(given.model).encode())
        )
        return f"an adapter, {what}", ask, True
    if run == 0:
        path = model / chance.choice(["config.json", "model.safetensors", "tokenizer.json"])
        name = _damage(path, chance)
        return f"{path.name} {name}", ask, name in SURE
    if run == 1:
        path = model / chance.choice(["config.json", "model.safetensors"])
        path.unlink()
        if chance.random() < 0.5:
            path.mkdir()
        return f"no {path.name}", ask, True
    if run == 2:
        name = chance.choice([*CONFIGS])
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **CONFIGS[name]}))
        return f"a config with {name}", ask, True
    if run == 3:
        content = (model / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        which, how = chance.choice(names), chance.choice(["dropped", "of another shape", "of another dtype"])
        if how == "dropped":
            del header[which]
        elif how == "of another shape":
            header[which]["shape"] = [*header[which]["shape"], 2]
        else:
            header[which]["dtype"] = "F7"
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        return f"a tensor {how}", ask, True
    name = chance.choice(["nowhere", "empty", "a file", "an index of nothing"])
    if name == "nowhere":
        shutil.rmtree(model)
    elif name == "empty":
        shutil.rmtree(model)
        model.mkdir()
    elif name == "a file":
        shutil.rmtree(model)
        model.write_text("no model")
    else:
        (model / "model.safetensors").unlink()
        deep = "[" * 3000 + "]" * 3000
        index = chance.choice(['{"weight_map": {"a": "model-1.safetensors"}}', "{}", "[]", "no JSON", deep])
        (model / "model.safetensors.index.json").write_text(index)
    return name, ask, True


# --- stores


def stores(chance: random.Random, given: Given, folder: Path) -> tuple[str, list[Any], bool]:
    """Runs that are damaged, incomplete or something else."""
    run = Path(shutil.copytree(given.store, folder / "store"))
    asks = [
        ["query", run, *ASK],
        ["info", run],
        ["verify", run],
        ["rerun", run],
        ["score", folder / "run", "--model", given.model, "--dataset", given.corpus, "--query-path", run],
        ["build", folder / "run", "--model", given.model, "--dataset", given.corpus, "--hessian-path", run],
        ["merge", run],
        ["mix", folder / "run", run, run],
        ["evaluate", "lds", run, run],
        ["evaluate", "overlap", run, run],
        ["score", folder / "run", "--training", run, "--self", "--method", "tracin"],
    ]
    ask = chance.choice(asks)
    path = chance.choice(sorted(run.rglob("*.h5")))
    how = chance.choice([*DAMAGES, "gone", "a folder", "a pipe", "a link", "of no run"])
    surely = ask[0] not in ("info", "query", "score", "rerun", "build", "mix", "evaluate", "merge", "verify")
    if how in DAMAGES:
        path.write_bytes(DAMAGES[how](path.read_bytes(), chance))
    elif how == "of no run":
        shutil.rmtree(run)
        run.mkdir()
        (run / "note.txt").write_text("no run")
        surely = True
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a pipe":
            os.mkfifo(path)
        elif how == "a link":
            path.symlink_to(given.store / "store.h5")
    return f"{path.name} {how}, to {ask[0]}", ask, surely


# --- options and configs


def _value(kind: str, chance: random.Random) -> str:
    numbers = [
        "x",
        "",
        "nan",
        "1e400",
        "-1",
        "--",
        "1,2",
        "0x",
        "٣",
        "1 2",
        "-inf",
        "99999999999999999999999x",
    ]
    return chance.choice(numbers if kind == "number" else ["no such thing", "", "\udcff", "\n", "-"])


def _slots() -> list[tuple[Any, Any, str]]:
    """Options of commands with numbers or names, which have values that do not fit."""
    out = []
    for request in COMMANDS:
        for slot in slots_of(request).values():
            kind = str(slot.type)
            if not slot.about.positional and ("int" in kind or "float" in kind or "Literal" in kind):
                out.append((request, slot, "name" if "Literal" in kind else "number"))
    return out


def options(chance: random.Random, given: Given, folder: Path) -> tuple[str, list[Any], bool]:
    """Options that are none, or have values that do not fit."""
    base = ["--model", given.model, "--dataset", given.corpus]
    if chance.random() < 0.25:
        word = chance.choice(
            ["--no-such-option", "--Model", "-z", "--top=", "--quiet=maybe", "extra", "---", "--projection"]
        )
        return word, ["build", folder / "run", *base, word], True
    request, slot, kind = chance.choice(_slots())
    value = _value(kind, chance)
    name = slot.name.replace("_", "-")
    places = sum(one.about.positional for one in slots_of(request).values())
    runs = [folder / f"run{place}" for place in range(places)]
    return (
        f"{request.COMMAND} --{name} {value!r}",
        [*request.COMMAND.split(), *runs, f"--{name}={value}"],
        True,
    )


CONFIG_FILES: dict[str, tuple[str, bytes]] = {
    "no TOML": (".toml", b"model = = 3"),
    "no JSON": (".json", b"{model: 3}"),
    "a list": (".json", b"[1, 2]"),
    "null": (".json", b"null"),
    "a text": (".json", b'"model"'),
    "an option that is none": (".toml", b"no_such_option = 1"),
    "a table for a value": (".toml", b"[model]\na = 1"),
    "a list for a value": (".json", b'{"projection_dim": [1, 2]}'),
    "a text for a number": (".json", b'{"projection_dim": "many"}'),
    "a number for a text": (".json", b'{"model": 3.5}'),
    "null for a number": (".json", b'{"projection_dim": null}'),
    "a number for a switch": (".toml", b"unit_normalize = 3"),
    "an infinite number": (".toml", b"token_batch_size = inf"),
    "one option twice": (".toml", b"seed = 1\nseed = 2"),
    "a large number": (".json", b'{"projection_dim": 1e400}'),
    "no UTF-8": (".toml", b"model = '\xff\xfe'"),
    "noise": (".json", bytes(range(128, 256))),
    "empty JSON": (".json", b""),
    "another ending": (".yaml", b"model: a"),
    "deep": (".json", b'{"model": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
}


def configs(chance: random.Random, given: Given, folder: Path) -> tuple[str, list[Any], bool]:
    """Files of --config that are none."""
    name = chance.choice([*CONFIG_FILES, "nowhere", "a folder", "damaged"])
    path = folder / "config.toml"
    if name in CONFIG_FILES:
        ending, content = CONFIG_FILES[name]
        path = path.with_suffix(ending)
        path.write_bytes(content)
    elif name == "a folder":
        path.mkdir()
    elif name == "damaged":
        path.write_text('projection_dim = 8\nmodel = "a"\n')
        name = f"{_damage(path, chance)} bytes"
    command = chance.choice(["build", "hessian", "reduce", "train"])
    ask = [command, folder / "run", "--config", path]
    return f"{name}, to {command}", ask if "bytes" in name else [*ask, "--dataset", given.corpus], True


FAMILIES = (data, models, data, stores, options, configs)
