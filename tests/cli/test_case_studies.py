"""The studies that people run from a shell, end to end, against dense algebra on float64 gradients."""

import json

import h5py
import numpy as np
import pytest
import torch
from tiny import DOCUMENTS, QUERIES, make_model, make_tokenizer, save

import gradfn as gf
from gradfn.engine.reference import naive_blocks
from gradfn.testing.naive import naive_causal_lm_loss

COLUMNS = ("--prompt_column", "prompt", "--completion-column", "completion")
STEPS, DAMPING = 3, 0.1
EPS = 1e-3  # far above the rounding of gradients that are zero in exact arithmetic


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return torch.from_numpy(file["scores"][:, 0]).double()


def flat(blocks):
    return torch.cat([G.flatten(1) for G in blocks.values()], 1)


def cosines(rows, queries):
    return torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(queries).T


def assert_same(got, expected):
    """To the rounding of float32, of numbers that are not all alike."""
    assert got.shape == expected.shape
    assert expected.std() > 0.05 * expected.abs().max()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def trained(folder):
    """A GPT-NeoX that AdamW has trained a few steps, the optimizer's state, and what Adam divides by."""
    model, tokens = make_model("neox"), make_tokenizer(first=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    for document in DOCUMENTS[:STEPS]:
        ids = tokens(document["text"], return_tensors="pt").input_ids
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    path = folder / "adamw.pt"
    torch.save(optimizer.state_dict(), path)
    moments = {
        name: optimizer.state[parameter]["exp_avg_sq"].double() / (1 - 0.999**STEPS)
        for name, parameter in model.named_parameters()
    }
    scales = {
        name.removesuffix(".weight"): torch.cat([v, moments[name[:-6] + "bias"][:, None]], 1).sqrt() + EPS
        for name, v in moments.items()
        if v.ndim == 2 and ".layers." in name
    }
    return save(folder / "trained", model, tokens), path, scales


@pytest.fixture(scope="module")
def gradients(trained):
    """Of training rows and of queries, `{block: [rows, out, in + 1]}`."""
    net, tokens = gf.load_model(trained[0]).double(), gf.load_tokenizer(trained[0])
    sides = (
        [gf.text_query(tokens, document["text"])[0] for document in DOCUMENTS],
        [gf.text_query(tokens, query["prompt"], query["completion"])[0] for query in QUERIES],
    )
    blocks = [naive_blocks(naive_causal_lm_loss(net), net, rows) for rows in sides]
    net.float()  # the commands take the same from memory
    return blocks


@pytest.fixture(scope="module")
def powers(gradients):
    """Projected gradients of both sides, and a function of the power p that gives `H^p` of every block."""
    train, query = (gf.project(8)(side) for side in gradients)
    spectra = {name: torch.linalg.eigh(G.flatten(1).T @ G.flatten(1) / len(G)) for name, G in train.items()}

    def power(exponent):
        return {name: Q @ torch.diag((values + DAMPING * values.mean()) ** exponent) @ Q.T
                for name, (values, Q) in spectra.items()}  # fmt: skip

    return train, query, power


@pytest.fixture(scope="module")
def base(trained, corpus):
    return ("--model", trained[0], "--dataset", corpus)


@pytest.fixture(scope="module")
def asked(trained, queries):
    return ("--model", trained[0], "--dataset", queries, *COLUMNS)


@pytest.fixture(scope="module")
def fitted(ok, folder, base):
    out = ok("hessian", folder / "H", *base, "--projection_dim", 8)
    assert "second_moment, 8 blocks, 12 rows" in " ".join(out.split())
    return folder / "H"


@pytest.mark.parametrize("cosine", [True, False])
def test_the_mean_of_the_queries_in_adams_units(ok, base, asked, trained, gradients, tmp_path, cosine):
    """The mean is taken of gradients that are not normalised to one; it is the mean that is normalised."""
    _, state, scales = trained
    Q, R = tmp_path / "Q", tmp_path / "R"
    ok("reduce", Q, *asked, "--projection_dim", 0, "--optimizer_state", state, "--aggregation", "mean")
    ok(
        "score", R, *base, "--query_path", Q, "--projection-dim", 0, "--optimizer-state", state,
        *(["--unit_normalize"] if cosine else []),
    )  # fmt: skip
    train, query = (flat({name: G / scales[name] for name, G in side.items()}) for side in gradients)
    mean = query.mean(0, keepdim=True)
    assert_same(scores_of(R), cosines(train, mean) if cosine else train @ mean.T)


def test_an_inner_product_behind_a_curvature_has_it_on_the_query_alone(
    ok, base, asked, fitted, powers, tmp_path
):
    Q, R = tmp_path / "Q", tmp_path / "R"
    ok("reduce", Q, *asked, "--projection-dim", 8, "--hessian_path", fitted)
    ok("score", R, *base, "--query_path", Q, "--projection_dim", 8, "--hessian-path", fitted)
    train, query, power = powers
    inverse = power(-1)
    expected = sum(
        G.flatten(1) @ inverse[name] @ query[name].flatten(1).mean(0)[:, None] for name, G in train.items()
    )
    assert_same(scores_of(R), expected)


def half(side, power):
    return flat({name: G.flatten(1) @ power(-0.5)[name] for name, G in side.items()})


def test_a_cosine_behind_a_curvature_has_its_root_on_both_sides(ok, base, asked, fitted, powers, tmp_path):
    Q, R = tmp_path / "Q", tmp_path / "R"
    cosine = ("--unit_normalize", "--hessian_path", fitted)
    ok("build", Q, *asked, "--projection_dim", 8, *cosine)
    ok("score", R, *base, "--query_path", Q, "--projection_dim", 8, *cosine)
    train, query, power = powers
    assert_same(scores_of(R), cosines(half(train, power), half(query, power)))


def test_a_store_asked_behind_a_curvature_gives_the_same(ok, base, fitted, queries, powers, tmp_path):
    ok("build", tmp_path / "store", *base, "--projection-dim", 8)
    ok("query", tmp_path / "store", "--query", queries, "--unit-normalize", "--hessian-path", fitted,
       "--top", 12, "--jsonl", tmp_path / "t.jsonl")  # fmt: skip
    train, query, power = powers
    expected = cosines(half(train, power), half(query, power))
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(table) == expected.numel()
    got = torch.zeros_like(expected)
    names = [document["id"] for document in QUERIES]
    for row in table:
        got[row["row"], names.index(row["query"])] = row["score"]
    assert_same(got, expected)
    assert np.sign([row["score"] for row in table]).tolist() == [
        1 if row["side"] == "proponent" else -1 for row in table
    ]
