"""Commands of other programs: read as gradfn's, or answered with the command that does it here."""

import shlex

import pytest
import typer

from gradfn.cli.app import app
from gradfn.cli.commands import COMMANDS
from gradfn.cli.peers import ANY, COMMANDS_THERE, DAMPINGS, OPTIONS, PREFIXES, translated
from gradfn.cli.request import flag_of, slots_of
from gradfn.errors import InputError

REQUESTS = {request.COMMAND: request for request in COMMANDS}


@pytest.mark.parametrize(
    ("there", "here"),
    [  # as Bergson documents them, but for names of models and data
        (
            "build runs/index --model M --dataset D --truncation --token_batch_size 4096 --projection_dim 16",
            "build runs/index --model M --dataset D --truncation --token-batch-size 4096 --projection-dim 16",
        ),
        ("query --index runs/index --unit_norm", "query runs/index --unit-normalize"),
        (
            "reduce runs/q --model M --dataset D --aggregation mean --unit_normalize --skip_hessians",
            "reduce runs/q --model M --dataset D --aggregation mean --unit-normalize",
        ),
        ("build q --dataset D --aggregation mean", "reduce q --dataset D --aggregation mean"),
        ("hessian h --method kfac --ev_correction", "hessian h --method kfac --method ekfac"),
        ("hessian h --method autocorrelation", "hessian h --method second_moment"),
        (
            "mix --query_path runs/q --index_path runs/i --output_path runs/m",
            "mix runs/m runs/q runs/i",
        ),
        (
            "score s --query_path runs/q --score individual --processor_path runs/q --unit_normalize",
            "score s --query-path runs/q --unit-normalize",
        ),
        (
            "score s --data.dataset D --query.dataset Q --index_cfg.precision bf16 --score_cfg.modules a b",
            "score s --dataset D --query Q --precision bf16 --include *a --include *b",
        ),
        ("build r --filter_modules '*.q,lm'", "build r --exclude **.q --exclude *lm"),
        ("build r --truncation true --nooverwrite", "build r --truncation"),
        ("build r --truncation false --overwrite", "build r --overwrite"),
        ("hessian h --use_dataset_labels false", "hessian h"),
        (
            "build r --loss_fn margin --projection_type normal",
            "build r --loss log_odds --projection gaussian",
        ),
        (
            "build r --model M --revision step1000 --tokenizer T --dataset D --chunk_length 512",
            "build r --model M --revision step1000 --tokenizer T --dataset D --chunk-length 512",
        ),
        ("score s --query.dataset Q --query.split test", "score s --query Q --query-split test"),
        ("query --index=s --top_k=7 --record t.csv", "query s --top 7 --csv t.csv"),
        (
            "query --index s --faiss_cfg.index_factory IVF1024,SQfp16 --faiss_cfg.nprobe 10",
            "query s --index IVF1024,SQfp16 --nprobe 10",
        ),
        ("query s --top 3 --index Flat", "query s --top 3 --index Flat"),
        ("score s --hessian_path H --damping_factor 0.2", "score s --hessian-path H --damping 0.2"),
        ("score s --inversion pseudoinverse", "score s --damping truncated:0.1"),
    ],
)
def test_bergsons_commands_are_read_as_gradfns(there, here):
    assert translated(shlex.split(there)) == here.split()


def test_what_is_gradfns_own_stays_as_it_is():
    words = ["score", "r", "--query", "--modules", "--top=3", "--", "--index"]
    assert translated(words) == words
    assert translated([]) == []
    for words in (["mask", "fit", "m"], ["evaluate", "lds"], ["--version"], ["nonsense", "--index", "x"]):
        assert translated(words) == words
    assert translated(["build", "r", "--nonsense", "x"]) == ["build", "r", "--nonsense", "x"]


def test_a_line_says_why_an_option_does_nothing(command, model, corpus, tmp_path):
    result = command(
        "reduce", tmp_path / "r", "--model", model, "--dataset", corpus, "--skip_hessians", "--batch_size=3"
    )
    assert result.status == 2  # the second is an option of other commands
    result = command("reduce", tmp_path / "r", "--model", model, "--dataset", corpus, "--skip_hessians")
    assert (result.status, result.err.count("\n")) == (0, 1)
    assert result.err == (
        "gradfn: --skip_hessians does nothing here: no curvature is fitted unless it is asked for\n"
    )


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("query r --split test", "--split is no option here: the split of a dataset in --query is --query-s"),
        ("query r --faiss", "--faiss is no option here: name the index by its factory string, --index Flat"),
        ("build r --projection_target global", "--projection 'joint > rademacher:512'"),
        ("score s --score nearest", "--score is no option here: every query has a column of scores"),
        ("score s --aggregation mean", "make one query of them with gradfn reduce"),
        ("score s --inversion inverse", "no inversion 'inverse': choose damped_inverse"),
    ],
)
def test_what_is_not_here_is_refused_with_a_remedy(command, there, words):
    result = command(*shlex.split(there))
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


@pytest.mark.parametrize("name", COMMANDS_THERE)
def test_commands_that_are_elsewhere_are_answered_with_gradfns(command, name):
    result = command(name, "--model", "M")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"{name} is no command here: use " in result.err
    assert command(name.replace("-", "_")).status == 2


def words_of(text):
    """Commands in an answer, as words."""
    for part in text.split(", then "):
        if part.startswith("gradfn "):
            yield shlex.split(part.split(", which")[0])[1:]


@pytest.mark.parametrize("answer", COMMANDS_THERE.values())
def test_the_answers_are_commands_of_gradfn(answer):
    for words in words_of(answer):
        name = " ".join(words[:2]) if " ".join(words[:2]) in REQUESTS else words[0]
        slots = slots_of(REQUESTS[name])
        assert all(flag_of(word[2:]) in map(flag_of, slots) for word in words if word.startswith("--"))


def test_the_table_is_of_commands_and_options_that_are_here():
    names = {flag_of(name) for request in COMMANDS for name in slots_of(request)}
    for (command, key), there in OPTIONS.items():
        assert command == ANY or command in REQUESTS
        assert key == flag_of(key)
        own = {} if command == ANY else slots_of(REQUESTS[command])
        assert flag_of(key) not in map(flag_of, own) or there.names, (command, key)
        for word in (there.here or "").split():
            assert not word.startswith("--") or word[2:] in names, word
        assert (there.here == "") <= bool(there.why)
        assert (there.here is None) <= bool(there.why)
    assert not set(COMMANDS_THERE) & {name.split()[0] for name in REQUESTS}
    assert all(prefix.endswith(".") for prefix in PREFIXES)


def test_every_damping_has_a_name(monkeypatch):
    for kind in DAMPINGS:
        words = translated(["score", "s", "--inversion", kind, "--damping_factor", "0.5"])
        slot = slots_of(REQUESTS["score"])["damping"]
        (damping,) = slot.value(words[-1])
        assert damping.value == 0.5
    with pytest.raises(InputError, match="no inversion"):
        translated(["score", "--inversion=x"])


def test_no_alias_is_in_the_help():
    command = typer.main.get_command(app).get_command(None, "score")
    spelled = {name for one in command.params for name in one.opts}
    assert "--skip-hessians" not in spelled
