"""Models, data and runs from somebody else: no code of theirs runs, and their texts are only texts."""

import ast
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
import xml.dom.minidom
from pathlib import Path

import pytest
import torch
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl

import gradfn
from gradfn.evaluate.bootstrap import Estimate
from gradfn.report.exports import WRITERS, export_table
from gradfn.report.plots import plot_runs
from gradfn.store import open_writer
from gradfn.train.kept import Kept

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
ESCAPES = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202eright\u200b \ud83d [red]x[/red] :smile:"
UNSEEN = set("\x1b\x07\x9b\u202e\u200b\ud83d")


class Evil:
    """What makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def evil(tmp_path):
    """Something that is seen to be unpickled."""
    made = tmp_path / "made"
    yield Evil(made)
    assert not made.exists()


# --- code


SUSPECT = re.compile(r"\bload\(|pickle|dill|joblib|shelve|marshal|\beval\(|\bexec\(|trust_remote_code=")


def calls():
    """The calls of the library: `(file:line, what is called, {keyword: value as written})`."""
    for path in Path(gradfn.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if SUSPECT.search(text) else ():
            if isinstance(node, ast.Call):
                keywords = {one.arg: ast.unparse(one.value) for one in node.keywords}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), keywords


def test_nothing_is_unpickled_anywhere_in_the_library():
    unpickling = re.compile(
        r"(c?pickle|dill|joblib|shelve|marshal)\.\w+|(np|numpy)\.load|pd\.read_pickle|eval|exec"
    )
    loads = [(where, keywords) for where, called, keywords in calls() if called == "torch.load"]
    assert len(loads) > 3
    assert [where for where, keywords in loads if keywords.get("weights_only") != "True"] == []
    assert [where for where, called, _ in calls() if unpickling.fullmatch(called)] == []
    assert [where for where, _, keywords in calls() if keywords.get("trust_remote_code") == "True"] == []
    assert [where for where, _, keywords in calls() if "allow_pickle" in keywords] == []


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin"]
)
def test_a_pickle_in_the_folder_of_a_model_is_refused_and_not_run(
    command, model, corpus, tmp_path, evil, name
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    torch.save({"weight": evil}, folder / name)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if name == "adapter_model.bin":
        config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").unlink()
    more = ("--optimizer-state", folder / name) if name == "optimizer.pt" else ()
    result = command("score", "--model", folder, "--dataset", corpus, *ASK, *more)
    if name == "training_args.bin":
        assert result.status == 0
    else:
        assert (result.status, result.err.count("\n")) == (2, 1), result.err


def test_a_pickle_in_the_place_of_what_a_run_keeps_is_not_run(command, ok, model, corpus, tmp_path, evil):
    train = (
        "train",
        tmp_path / "run",
        "--model",
        model,
        "--dataset",
        corpus,
        "--epochs",
        2,
        "--batch-size",
        6,
    )
    ok(*train)
    for path in ("training.h5", "segments/training-0000000002-0000000004.h5"):
        (tmp_path / "run" / path).unlink()
    torch.save({"state": evil}, tmp_path / "run/checkpoint-2/optimizer.pt")
    assert command(*train).status == 2
    torch.save({"key": "a", "values": evil}, tmp_path / "queries-0.pt")
    assert Kept(tmp_path, "a").read(range(1), torch.device("cpu")) is None


def test_a_row_that_holds_a_pickle_is_only_bytes(command, model, tmp_path, evil):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"text": [pickle.dumps(evil)] * 3})
    pq.write_table(rows.replace_schema_metadata({"pandas": pickle.dumps(evil)}), tmp_path / "d.parquet")
    result = command("score", "--model", model, "--dataset", tmp_path / "d.parquet", *ASK)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err


def test_code_of_a_model_is_not_run_unasked(command, corpus, tmp_path, evil):
    folder = save(tmp_path / "model", make_model(), make_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(evil.folder)!r})\n")
    result = command("score", "--model", folder, "--dataset", corpus, *ASK)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert "--trust-remote-code" in result.err


# --- text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def hostile_run(path):
    """A run whose settings and request are not what gradfn writes."""
    given = {"run": str(path), "model": ESCAPES, "dataset": ESCAPES}
    with open_writer(path, "store", {"model": {"path": ESCAPES}}, 1,
                     request={"command": "build", "given": given}) as writer:  # fmt: skip
        writer.write(0, 1, {"gradients/a": torch.zeros(1, 2).numpy(), "rows/id": [ESCAPES]})
        writer.finish()
    return path


@pytest.mark.parametrize("arguments", [
    ("info",), ("info", "--command"), ("info", "--json"), ("verify",), ("rerun",), ("query", *ASK),
])  # fmt: skip
def test_what_a_foreign_run_says_of_itself_is_only_text(command, tmp_path, arguments):
    name, *more = arguments
    run = hostile_run(tmp_path / "run")
    result = command(name, run, *more)
    assert not UNSEEN & set(result.out + result.err)
    if "--json" in arguments:
        assert json.loads(result.out)["files"][0]["settings"]["model"]["path"] == ESCAPES
    (tmp_path / "run/store.h5").write_bytes(b"x")
    result = command(name, run, *more)
    assert not UNSEEN & set(result.out + result.err)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_on_a_terminal_moves_no_cursor(monkeypatch, kind):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    export_table([{"id": ESCAPES, "text": "one\r\ntwo\tGrüße, 世界"}], ("id", "text"), {kind: Path("-")})
    assert not UNSEEN & set(out.getvalue())
    assert "Grüße, 世界" in out.getvalue()
    assert "\r" not in out.getvalue()


@pytest.mark.parametrize("kind", [*WRITERS])
def test_a_file_of_a_table_has_every_letter_of_the_text(tmp_path, kind):
    path = tmp_path / "table"
    export_table([{"id": ESCAPES, "text": "\x00a\x1b"}], ("id", "text"), {kind: path})
    if kind == "jsonl":
        assert json.loads(path.read_text()) == {"id": ESCAPES, "text": "\x00a\x1b"}
        assert not UNSEEN & set(path.read_text())
    elif kind == "csv":
        (row,) = csv.DictReader(io.StringIO(path.read_bytes().decode()))
        assert row == {"id": ESCAPES.replace("\ud83d", "\ufffd"), "text": "\x00a\x1b"}


FORMULAS = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1+1", "\tx", "\rx", "\n=1", " =1", "-1-1",
            *(f"{sign}A1" for sign in "\uff1d\uff0b\uff0d\uff20")]  # fmt: skip


def test_no_cell_of_a_csv_is_a_formula(ok, model, tmp_path):
    rows = [{"id": f"{text}{number}", "text": f"{text} of"} for number, text in enumerate(FORMULAS)]
    data = write_jsonl(tmp_path / "d.jsonl", [*rows, *DOCUMENTS])
    ok("score", "--model", model, "--dataset", data, *ASK, "--csv", tmp_path / "t.csv", "--top", 30)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        cells = [
            cell
            for line in csv.DictReader(file)
            for name, cell in line.items()
            if name in ("query", "id", "text")
        ]
    assert sum(cell.startswith("'") for cell in cells) == 2 * len(FORMULAS)
    assert [cell for cell in cells if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r]", cell)] == []


def test_the_names_in_a_plot_are_only_text(tmp_path):
    name = '</text><script>alert(1)</script>" onload="x --> $\\frac$ \x1b[31m &amp; \x00'
    path = plot_runs({name: Estimate(0.4, 0.3, 0.5)}, tmp_path / "runs.svg", title=name)
    seen = xml.dom.minidom.parse(str(path))
    assert not seen.getElementsByTagName("script")
    assert "alert(1)" in path.read_text()
    assert plot_runs({name: Estimate(0.4, 0.3, 0.5)}, tmp_path / "runs.png", title=name).exists()


@pytest.mark.parametrize("value", ["False", "FALSE", "false", "no", "0", ""])
def test_a_switch_that_is_set_to_false_is_not_on(command, corpus, model, tmp_path, value):
    ask = ("score", "--model", model, "--dataset", corpus, *ASK, f"--quiet={value}")
    result = command(*ask)
    if value.lower() == "false":
        assert result.status == 0
        assert result.out
    else:
        assert result.status == 2
        assert f"--quiet is true or false, not {value!r}: give it without a value" in result.err
