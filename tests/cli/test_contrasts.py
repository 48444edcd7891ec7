"""Queries made of others: contrasts, one token of each, training rows. All against naive gradients."""

import json

import h5py
import numpy as np
import pytest
import torch
from tiny import DOCUMENTS, QUERIES, mostly_slow, write_jsonl
from torch.func import grad

import gradfn as gf
from gradfn.model import params_of
from gradfn.store import open_store
from gradfn.testing.naive import naive_causal_lm_loss

WRONG = (" Rome", " Quito", " Lagos")


@pytest.fixture(scope="module")
def rejected(folder):
    rows = [{**row, "completion": other} for row, other in zip(QUERIES, WRONG, strict=True)]
    return write_jsonl(folder / "rejected.jsonl", rows)


@pytest.fixture(scope="module")
def chosen(folder):
    return write_jsonl(folder / "chosen.jsonl", [{**row, "kind": row["id"] > "q-g"} for row in QUERIES])


@pytest.fixture(scope="module")
def base(model, corpus):
    return ("--model", model, "--dataset", corpus, "--precision", "fp64", "--projection-dim", 0)


@pytest.fixture(scope="module")
def naive(model, corpus):
    """`naive(documents)`: a plain gradient of each document, `{block: [rows, numbers]}`, in float64."""
    net = gf.load_model(model, precision="fp64")
    blocks = gf.collect(net, gf.tokenize(gf.load_rows(corpus, "train[:1]"), gf.load_tokenizer(model)))
    loss, params = naive_causal_lm_loss(net), params_of(net)

    def gradients(documents):
        rows = [grad(loss)(params, documents[row]) for row in range(len(documents))]
        return {name: torch.stack([row[f"{name}.weight"].flatten() for row in rows]) for name in blocks}

    return gradients


def scores_in(run):
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][:, 0]


def read(model, path, pair=True):
    columns = {"prompt_column": "prompt", "completion_column": "completion"} if pair else {}
    return gf.tokenize(gf.load_rows(path), gf.load_tokenizer(model), **columns)


def joined(blocks):
    return torch.cat(list(blocks.values()), 1)


def by_hand(rows, queries, how):
    """Scores of rows for queries, both `{block: [.., numbers]}`, with dense matrices."""
    if how == "grad_dot":
        return joined(rows) @ joined(queries).T
    if how == "grad_cosine":
        return torch.cosine_similarity(joined(rows)[:, None], joined(queries)[None], dim=-1)
    moments = {name: G.T @ G / len(G) for name, G in rows.items()}
    damped = {
        name: S + 0.1 * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype) for name, S in moments.items()
    }
    return joined(rows) @ joined({n: torch.linalg.solve(damped[n], q.T).T for n, q in queries.items()}).T


METHODS = ("grad_dot", "grad_cosine", "logra")


@pytest.mark.parametrize("method", METHODS)
def test_a_contrast_is_the_difference_of_two_gradients(
    ok, base, model, corpus, naive, chosen, rejected, tmp_path, method
):
    ok("score", tmp_path / "run", *base, "--query", chosen, "--against", rejected, "--method", method)
    better, worse = naive(read(model, chosen)), naive(read(model, rejected))
    queries = {name: G - worse[name] for name, G in better.items()}
    expected = by_hand(naive(read(model, corpus, False)), queries, method)
    np.testing.assert_allclose(
        scores_in(tmp_path / "run"), expected, rtol=1e-4, atol=1e-6 * expected.abs().max()
    )
    if method == "grad_dot":
        plain = [by_hand(naive(read(model, corpus, False)), one, method) for one in (better, worse)]
        np.testing.assert_allclose(expected, plain[0] - plain[1], rtol=1e-9)


def test_a_group_is_the_mean_of_contrasts(ok, base, model, corpus, naive, chosen, rejected, tmp_path):
    ask = ("--query", chosen, "--against", rejected, "--group-column", "kind", "--method", "grad-cosine")
    ok("score", tmp_path / "run", *base, *ask)
    better, worse = naive(read(model, chosen)), naive(read(model, rejected))
    queries = {name: G - worse[name] for name, G in better.items()}
    groups = {name: torch.stack([G[:1].mean(0), G[1:].mean(0)]) for name, G in queries.items()}
    expected = by_hand(naive(read(model, corpus, False)), groups, "grad_cosine")
    np.testing.assert_allclose(scores_in(tmp_path / "run"), expected, rtol=1e-4, atol=1e-6)


def test_another_completion_is_a_contrast(ok, base, chosen, rejected, tmp_path):
    ok("score", tmp_path / "file", *base, "--query", chosen, "--against", rejected)
    out = ok("score", tmp_path / "text", *base, "--query", "The capital of Peru is", "--completion", " Lima",
             "--against", " Quito")  # fmt: skip
    assert "→ Lima, not Quito" in out
    np.testing.assert_allclose(
        scores_in(tmp_path / "text")[:, 0], scores_in(tmp_path / "file")[:, 1], rtol=1e-5
    )
    with open_store(tmp_path / "file", "scores") as store:
        assert store.settings["query"]["against"]["path"] == str(rejected)
        assert store.settings["query"]["against"]["fingerprint"] != store.settings["query"]["fingerprint"]


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("grad_dot", -1),
        *(pytest.param(one, 1, marks=pytest.mark.slow) for one in METHODS),
    ],
)
def test_one_token_is_asked(ok, base, model, corpus, naive, tmp_path, method, number):
    asked = write_jsonl(
        tmp_path / "q.jsonl", [{"prompt": "The capital of Kenya is", "completion": " Nairobi far away."}]
    )
    out = ok("score", tmp_path / "run", *base, "--query", asked, "--query-token", number, "--method", method)
    query = read(model, asked)
    places = (query.labels != -100).nonzero()[0]
    place = int(places[number - (number > 0)])
    labels = np.full_like(query.labels, -100)
    labels[place] = query.labels[place]
    one = gf.make_documents([query.input_ids.tolist()], [labels.tolist()])
    expected = by_hand(naive(read(model, corpus, False)), naive(one), method)
    np.testing.assert_allclose(
        scores_in(tmp_path / "run"), expected, rtol=1e-4, atol=1e-6 * expected.abs().max()
    )
    token = gf.load_tokenizer(model).decode([int(query.input_ids[place])])
    assert f"→ {token.strip()}" in out.replace("\u00a0", " ")


def test_all_tokens_are_queries_of_their_own(ok, base, chosen, tmp_path):
    given = (*base, "--method", "grad_dot", "--query", chosen)
    ok("score", tmp_path / "all", *given, "--query-token", "all")
    ok("score", tmp_path / "whole", *given)
    with open_store(tmp_path / "all", "scores") as store:
        ids, of = store.index_array("queries/id").tolist(), store.settings["query"]["tokens_of"]
    every, whole = scores_in(tmp_path / "all"), scores_in(tmp_path / "whole")
    assert ids[0] == ids[0].split("[")[0] + "[1]"
    for query in range(whole.shape[1]):  # the loss is the mean over the tokens, and the score is linear
        own = [place for place, one in enumerate(of) if one == query]
        np.testing.assert_allclose(
            every[:, own].mean(1), whole[:, query], rtol=1e-4, atol=1e-6 * abs(whole).max()
        )
    ok("score", tmp_path / "last", *given, "--query-token", -1)
    last = [place for place, one in enumerate(of) if place + 1 == len(of) or of[place + 1] != one]
    np.testing.assert_allclose(every[:, last], scores_in(tmp_path / "last"), rtol=1e-5)


def test_tokens_of_rows_are_not_answered_by_these_rows(ok, base, tmp_path):
    table = tmp_path / "t.jsonl"
    ok("score", *base, "--query-rows", "doc-peru", "--query-token", "all", "--top", 11, "--jsonl", table)
    shown = [json.loads(line) for line in table.read_text().splitlines()]
    assert {line["query"].split("[")[0] for line in shown} == {"doc-peru"}
    assert len({line["query"] for line in shown}) > 3
    assert "doc-peru" not in {line["id"] for line in shown}


@pytest.mark.parametrize("method", mostly_slow(METHODS, "grad_cosine"))
def test_rows_are_queries_and_not_their_own_proponents(ok, base, model, corpus, naive, tmp_path, method):
    table = tmp_path / "t.jsonl"
    ok("score", tmp_path / "run", *base, "--query-rows", "doc-peru,doc-cuba", "--method", method, "--top", 11,
       "--jsonl", table)  # fmt: skip
    rows = naive(read(model, corpus, False))
    numbers = [[row["id"] for row in DOCUMENTS].index(name) for name in ("doc-peru", "doc-cuba")]
    expected = by_hand(rows, {name: G[numbers] for name, G in rows.items()}, method)
    np.testing.assert_allclose(
        scores_in(tmp_path / "run"), expected, rtol=1e-4, atol=1e-6 * expected.abs().max()
    )
    shown = [json.loads(line) for line in table.read_text().splitlines()]
    for query in ("doc-peru", "doc-cuba"):
        ids = [line["id"] for line in shown if line["query"] == query]
        assert sorted([*ids, query]) == sorted(row["id"] for row in DOCUMENTS)


def test_a_row_is_left_out_for_itself_at_every_damping_and_checkpoint(ok, base, model, tmp_path):
    for more in (("--method", "kfac", "--damping", "0.1,1"), ("--checkpoints", f"{model},{model}")):
        table = tmp_path / f"{len(more)}{more[1]}.csv".replace("/", "_")
        ok("score", *base, "--query-rows", "doc-peru,doc-cuba", *more, "--top", 1, "--csv", table)
        lines = table.read_text().splitlines()[1:]
        assert lines
        assert not [line for line in lines if line.split(",")[0].split()[0] == line.split(",")[5]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--query", "CHOSEN", "--against", "CORPUS"), "--against has 12 rows and --query 3"),
        (("--query", "CHOSEN", "--against", "CHOSEN"), "--query and --against say the same"),
        (("--query", "CHOSEN", "--against", "a text"), "are two datasets, or two texts: give --against as"),
        (("--query-rows", "doc-peru", "--against", "CHOSEN"), "--against is what --query is contrasted with"),
        (("--query-rows", "doc-peru,doc-none"), "no training row has the id 'doc-none'"),
        (("--query-rows", "doc-peru,doc-peru"), "a row is given twice among --query-rows"),
        (("--query", "CHOSEN", "--query-rows", "doc-peru"), "give one of --query (a dataset"),
        (("--query", "CHOSEN", "--query-token", 0), "counted from 1, or from the end with -1"),
        (("--query", "CHOSEN", "--query-token", 99), "so there is no token 99: give a number that all"),
        (("--query", "CHOSEN", "--query-token", "some"), "--query-token 'some' is no token: give its number"),
        (("--query", "CHOSEN", "--query-token", "all", "--against", "CHOSEN"), "leave out --against"),
        (("--self", "--against", "CHOSEN"), "--self has no queries: leave out --against"),
        (("--query", "CHOSEN", "--against", "none.jsonl"), "no dataset"),
    ],
)
def test_what_cannot_be_asked_is_refused(command, base, chosen, corpus, options, words):
    paths = {"CHOSEN": chosen, "CORPUS": corpus}
    result = command("score", *base, *(paths.get(option, option) for option in options))
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
