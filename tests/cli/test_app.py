import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import typer
from tiny import write_jsonl

import gradfn
from gradfn.cli import main
from gradfn.cli.app import app, report
from gradfn.errors import InputError, StorageError

TOP = typer.main.get_command(app)
ROOT = Path(__file__).parents[2]


def in_a_fresh_python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "code",
    [
        "import gradfn",
        "import sys; sys.argv = ['gradfn', 'score', '--help']; from gradfn.cli import main; main()",
    ],
)
def test_starting_loads_nothing_heavy(code):
    heavy = ("torch", "transformers", "datasets", "h5py", "rich.progress", "pyarrow", "numpy")
    check = f"import sys; print('HEAVY', [name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    result = in_a_fresh_python(f"{code}\n{check}", "-W", "error")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "HEAVY []\n"


def test_the_console_script_and_the_front_door_are_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"gradfn": "gradfn.cli:main"}
    installed = [script for script in entry_points(group="console_scripts") if script.name == "gradfn"]
    assert all(script.load() is main for script in installed)
    result = subprocess.run([sys.executable, "cli.py", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{gradfn.__version__}\n", "")


@pytest.mark.parametrize("group", [[], ["mask"], ["evaluate"]], ids=str)
def test_no_command_shows_the_help(ok, group):
    assert ok(*group) == ok(*group, "--help") == ok(*group, "-h")


def test_the_help_names_all_commands(ok):
    assert all(f"│ {name} " in ok() for name in TOP.list_commands(None))


@pytest.mark.parametrize("name", sorted(TOP.list_commands(None)))
def test_the_list_of_commands_is_not_cut_short(ok, name):
    assert "..." not in next(line for line in ok().splitlines() if line.startswith(f"│ {name} "))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scor"], r"No such command 'scor'.*: see gradfn --help"),
        (["score", "--modl", "x"], r"No such option: --modl.*--model.*: see gradfn score --help"),
        (["score", "--top", "many"], r"'--top'.*integer.*: see gradfn score --help"),
        (["score", "--top"], r"'--top' requires an argument: see gradfn --help"),
        (["score", "a", "b"], r"unexpected extra argument.*b.*: see gradfn score --help"),
        (["build"], r"Missing argument 'run': see gradfn build --help"),
        (["score", "--method", "wizard"], r"no method 'wizard': choose grad_dot, .*, or FILE\.py:NAME"),
        (
            ["score", "--precision", "int4"],
            r"'int4' is not one of 'fp32', 'tf32', 'bf16', 'fp16', 'fp64': see",
        ),
        (
            ["score", "--projection", "cauchy"],
            r"no projection 'cauchy' in 'cauchy': choose rademacher, gaussian, orthonormal, mask",
        ),
        (
            ["score", "--by", "word"],
            r"'word' is not one of 'example', 'module', 'head', 'time', 'token': see",
        ),
        (["build", "r", "--by", "module"], r"'module' is not one of 'example', 'head', 'token': see"),
        (["score", "--loss", "hinge"], r"'hinge' is not one of 'cross-entropy', 'log-odds', 'kl': see"),
        (["score", "--query-loss", "hinge"], r"'hinge' is not one of 'cross-entropy', 'log-odds', 'kl': see"),
        (["build", "r", "--task", "vision"], r"'vision' is not one of 'causal-lm', 'seq2seq-lm', 'class"),
        (["build", "r", "--loss-reduction", "max"], r"'max' is not one of 'mean', 'sum': see gradfn build"),
        (["reduce", "r", "--aggregation", "max"], r"'max' is not one of 'mean', 'sum': see gradfn reduce"),
    ],
)
def test_what_cannot_be_parsed_is_one_sentence(command, arguments, words):
    result = command(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("gradfn: ")
    assert re.search(words, result.err), result.err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("no \x1b[31mfile\n  x"), 2, "gradfn: no [31mfile x\n"),
        (StorageError("the disk is gone"), 1, "gradfn: the disk is gone\n"),
        (StorageError(28, "cannot write x"), 1, "gradfn: cannot write x\n"),
        (OSError(28, "No space left on device"), 1, "gradfn: No space left on device\n"),
        (
            RuntimeError("CUDA out of memory. Tried"),
            1,
            "gradfn: out of memory (CUDA out of memory. Tried): lower",
        ),
        (MemoryError(), 1, "gradfn: out of memory (RAM): lower --token-batch-size"),
        (KeyError("x"), 1, "gradfn: KeyError: 'x' (gradfn's fault: run again with --debug and tell us)\n"),
    ],
)
def test_report(capsys, error, status, words):
    assert report(error) == status
    assert capsys.readouterr().err.startswith(words)


def test_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradfn", "info", "--debug", "no-such-run"])
    with pytest.raises(InputError):
        main()


# Every option of a command, changed: what it changes is recorded, computed or shown.
COMMON = {
    "precision": "bf16", "split": "train[:7]", "text_column": "prompt", "prompt_column": "prompt",
    "completion_column": "completion", "projection_dim": 3, "projection": "gaussian", "seed": 1,
    "unit_normalize": True, "loss_reduction": "sum", "include": "*mlp*", "exclude": "*mlp*",
    "loss": "log_odds", "label_smoothing": 0.5, "by": "head",
}  # fmt: skip
SCORED = COMMON | {"method": "grad_cosine", "query": "The capital of Nepal", "completion": " Oslo",
                   "query_loss": "log_odds", "by": "token"}  # fmt: skip
ELSEWHERE = {  # options that change no number, or need other data, each with a test of its own
    "run", "model", "dataset", "device", "token_batch_size", "truncation", "query_path", "top", "csv",
    "jsonl", "parquet", "overwrite", "task", "reference", "label_column", "image_column",
    "messages_column", "reward_column", "advantage_column", "attention", "optimizer_state", "hessian_path",
    "damping", "self", "config", "group_column", "checkpoints", "checkpoint_weights",
    "target_downweight_components", "labels", "partitions", "shard", "show", "quiet", "threads", "memory",
    "no_biases", "fsdp",
    "trust_remote_code", "no_special_tokens", "revision", "dataset_revision", "tokenizer", "chunk_length",
    "query_split", "product", "iterations", "tolerance", "scale", "minibatches", "segments", "optimizer",
    "normalize", "training", "steps", "replay_slots", "curvature", "against", "query_token", "query_rows",
    "baseline",
}  # fmt: skip
PAIRED = {"prompt_column": "completion_column", "completion_column": "prompt_column"}


@pytest.mark.parametrize(("name", "changes"), [("build", COMMON), ("reduce", COMMON), ("score", SCORED)])
def test_the_tables_of_this_file_name_every_option(name, changes):
    names = {parameter.name for parameter in TOP.get_command(None, name).params}
    assert names - {"aggregation"} <= set(changes) | ELSEWHERE
    assert set(changes) <= names


def flags(changes):
    for key, value in changes.items():
        yield f"--{key}"
        if value is not True:
            yield value


def result_of(run, name):
    """What a run computed, and the settings that it records of how."""
    kind = "scores" if name == "score" else "store"
    with gradfn.open_store(run, kind) as store:
        arrays = store.names("scores" if name == "score" else "gradients")
        values = {array: store.read(array) for array in arrays}
        settings = {key: value for key, value in store.settings.items() if key != "gradfn"}
    return values, settings


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def defaults(ok, store, folder, model, corpus):
    ok("score", folder / "default", "--model", model, "--dataset", corpus, "--query", "The capital of Peru")
    return {"score": folder / "default", "build": store}


@pytest.mark.parametrize(
    ("name", "option"), [("build", option) for option in COMMON] + [("score", option) for option in SCORED]
)
def test_every_option_changes_the_result_and_the_settings(
    ok, defaults, model, corpus, tmp_path, name, option
):
    changes = COMMON if name == "build" else {"query": "The capital of Peru"} | {option: SCORED[option]}
    changed = {option: changes[option]} if name == "build" else changes
    if option in PAIRED:
        changed[PAIRED[option]] = COMMON[PAIRED[option]]
    ok(name, tmp_path / "run", "--model", model, "--dataset", corpus, *flags(changed))
    values, settings = result_of(tmp_path / "run", name)
    before, recorded = result_of(defaults[name], name)
    assert not same(values, before)
    assert settings != recorded
    assert json.dumps(settings)  # and they are plain


def test_token_batch_size_changes_no_result_and_is_not_recorded(ok, store, model, corpus, tmp_path):
    ok("build", tmp_path / "run", "--model", model, "--dataset", corpus, "--token-batch-size", 40)
    values, settings = result_of(tmp_path / "run", "build")
    before, recorded = result_of(store, "build")
    assert settings == recorded
    for name in before:
        np.testing.assert_allclose(values[name], before[name], rtol=1e-4, atol=1e-4)
    assert len(list((tmp_path / "run" / "segments").glob("*.h5"))) == 1


def test_ctrl_c_says_what_is_kept(command, model, corpus, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradfn.methods.inner_product.EngineScorer.__call__", stop)
    result = command("build", tmp_path / "run", "--model", model, "--dataset", corpus)
    run = tmp_path / "run"
    assert result.status == 130
    assert result.err.splitlines()[-1] == (
        f"gradfn: stopped; nothing is complete in {run}: the same command begins again"
    )


def test_truncation_cuts_what_is_too_long(command, ok, model, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "The capital of Peru is Lima. " * 30}])
    args = ("build", tmp_path / "run", "--model", model, "--dataset", data)
    assert command(*args).status == 2
    assert not (tmp_path / "run").exists()
    out = ok(*args, "--truncation")
    assert "1 row, 128 tokens" in out
    assert re.search(r"^note +1 row of \S+ cut to 128 tokens; the longest had \d{3}", out, re.MULTILINE)


def test_top(ok, model, corpus):
    for top in (1, 2):
        out = ok("score", "--model", model, "--dataset", corpus, "--query", "The capital", "--top", top)
        assert len([line for line in out.splitlines() if " proponent " in line]) == top


def test_device(command, model, corpus, monkeypatch):
    seen = []

    def refuse(path, *, device, **_):
        seen.append(device)
        raise InputError("enough")

    monkeypatch.setattr("gradfn.cli.inputs.load_model", refuse)
    command("score", "--model", model, "--dataset", corpus, "--query", "x y", "--device", "cuda:3")
    assert seen == ["cuda:3"]


def test_stored_precision(ok, model, corpus, tmp_path):
    ok("build", tmp_path / "run", "--model", model, "--dataset", corpus, "--precision", "fp64")
    stored = gradfn.open_store(tmp_path / "run")
    assert stored.read("gradients/model.layers.0.mlp.up_proj").dtype == np.float64
