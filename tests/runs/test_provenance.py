"""What a run was made of: described, compared, rebuilt."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_model

import gradfn as gf
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Spectrum
from gradfn.model.sites import View
from gradfn.runs import provenance as runs


def test_a_transform_comes_back_from_its_settings(transform):
    assert runs.rebuild({"transform": gf.chain(transform).settings()}) == gf.chain(transform)


def test_a_transform_that_holds_tensors_does_not_come_back():
    settings = {"transform": gf.chain(gf.adam({"a": torch.ones(1, 1)})).settings()}
    with pytest.raises(InputError, match="Adam cannot be made from a store's settings"):
        runs.rebuild(settings)


def made(transform, **model):
    return {
        "model": {"fingerprint": "f", **model},
        "layers": {"include": [], "exclude": []},
        "transform": gf.chain(transform).settings(),
    }


def test_what_was_made_alike_is_compared():
    plain, unit = made(gf.project(4)), made(gf.chain(gf.project(4), gf.unit_normalize()))
    runs.refuse_mismatch(plain, plain, "it")
    runs.refuse_mismatch(plain, unit, "it")
    runs.refuse_mismatch(unit, unit, "it")
    runs.refuse_mismatch({**plain, "tokenizer": {"fingerprint": "t"}}, plain, "it")
    runs.refuse_mismatch(made(gf.project(4), path="here"), made(gf.project(4), path="there"), "it")
    with pytest.raises(InputError, match="it was made with unit norm, which cannot be undone"):
        runs.refuse_mismatch(unit, plain, "it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"fingerprint": "g"}}, "model is f there and g here"),
        ({"model": {"fingerprint": "g", "path": "p"}}, r"model is f there and p \(fingerprint g\) here"),
        ({"layers": {"include": [], "exclude": ["*"]}}, r"layers.exclude.0 is nothing there and \* here"),
        (
            {"transform": gf.chain(gf.project(5)).settings()},
            "chain.0.projection is rademacher:4x4 there and rademacher:5x5 here",
        ),
        ({"tokenizer": {"fingerprint": "u"}}, "tokenizer is t there and u here"),
    ],
)
def test_what_was_made_otherwise_is_refused_with_both_values(change, words):
    stored = {**made(gf.project(4)), "tokenizer": {"fingerprint": "t"}}
    with pytest.raises(InputError, match=f"it was made differently, .*{words}.*make it again"):
        runs.refuse_mismatch(stored, {**stored, **change}, "it")


def test_what_describes_a_run_changes_with_all_that_rows_depend_on(documents):
    def described(model, data=documents, transform=None, **options):
        return runs.describe(gf.Subject(model, **options), data, transform)

    model = make_model()
    variants = [
        described(model),
        described(make_model(seed=1)),
        described(model, documents.select(range(7))),
        described(model, transform=gf.project(4)),
        described(model, transform=gf.project(4, seed=1)),
        described(model, loss=gf.causal_lm_loss(model, "sum")),
        described(model, view=View(include=["*mlp*"])),
        described(model, view=View(exclude=["*mlp*"])),
    ]
    assert all(a != b for i, a in enumerate(variants) for b in variants[:i])
    assert described(model) == described(make_model(), loss=gf.causal_lm_loss(model))


def test_settings_come_back_from_json():
    settings = {
        "gradfn": "0.1.0",
        "model": {"path": "m", "fingerprint": "f", "own": 1},
        "loss": {"name": "causal_lm", "reference": {"fingerprint": "r"}},
        "query": {"path": "q", "loss": {"criterion": "kl"}},
        "checkpoints": [{"path": None, "weight": 0.5, "settings": {"query": "self"}}],
        "mine": {"a": None},
    }
    made = runs.Provenance.of(settings)
    assert made.loss.reference.fingerprint == "r"
    assert made.query.loss.criterion == "kl"
    assert made.checkpoints[0].settings.query == "self"
    assert (made.model.further, made.further) == ({"own": 1}, {"mine": {"a": None}})
    del settings["checkpoints"][0]["path"]
    assert made.settings() == json.loads(json.dumps(made.settings())) == settings


def test_what_is_merged_adds_to_each_group_or_replaces():
    made = runs.Provenance.of({"model": {"fingerprint": "a"}, "method": {"norm": "none"}, "query": "self"})
    more = made.merged({"model": {"path": "p"}, "method": {"file": "f"}, "query": {"path": "q"}})
    assert more.settings() == {
        "model": {"fingerprint": "a", "path": "p"}, "method": {"norm": "none", "file": "f"},
        "query": {"path": "q"},
    }  # fmt: skip
    assert made.merged(None) == made


def test_a_request_is_recorded_and_never_compared(llama, documents, tmp_path):
    asked = [{"request": {"command": "build", "options": {"seed": seed}}} for seed in (1, 2)]
    first, again = (gf.build(tmp_path, llama, documents, gf.project(4), settings=one) for one in asked)
    assert (first.resumed, again.resumed) == (0, 8)
    with gf.open_store(tmp_path) as store:
        assert "request" not in store.settings
        made = runs.Provenance.of(store)
    assert made.request == asked[0]["request"]
    assert runs.compare(made, replace(made, request=None)) == {}


def test_a_curvature_and_a_unit_norm_end_a_chain():
    H = {"a": Spectrum(None, torch.eye(4), torch.ones(2, 2))}
    behind = gf.chain(gf.project(4), gf.precondition(H, -0.5), gf.unit_normalize())
    made = runs.Provenance(transform=behind.settings())
    assert [stage["transform"] for stage in made.tail] == ["Precondition", "UnitNormalize"]
    assert made.without_tail().transform == gf.chain(gf.project(4)).settings()
    between = runs.Provenance(transform=gf.chain(gf.unit_normalize(), gf.project(4)).settings())
    assert between.tail == []
