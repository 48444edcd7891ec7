import numpy as np
import pytest
import torch
from tiny import make_model

import gradfn as gf
from gradfn.errors import InputError
from gradfn.runs import curvatures as hessians
from gradfn.runs.curvatures import open_curvature
from gradfn.runs.provenance import refuse_mismatch
from gradfn.statistics import ekfac, kfac, mixing_coefficient, second_moment


@pytest.fixture(scope="module")
def llama():
    return make_model().requires_grad_(False)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 300, size).tolist() for size in (5, 3, 9, 1, 4, 7, 2, 6)]
    return gf.make_documents(rows)


KINDS = {"second_moment": second_moment, "kfac": kfac, "ekfac": ekfac}


@pytest.mark.parametrize("kind", KINDS)
def test_a_curvature_comes_back_as_it_was_fitted(llama, documents, tmp_path, kind):
    transform = gf.project(3)
    fitted = gf.hessian(tmp_path, llama, documents, KINDS[kind](), transform)
    loaded = gf.runs.load_curvature(tmp_path)
    assert (loaded.kind, loaded.rows, loaded.digest) == (kind, 8, fitted.digest)
    for name, one in fitted.items():
        torch.testing.assert_close(loaded[name].dense(), one.dense())
        assert (loaded[name].sides is None) == (one.sides is None)


def test_a_curvature_that_is_there_is_not_fitted_again(llama, documents, tmp_path, monkeypatch):
    first = gf.hessian(tmp_path, llama, documents, second_moment(), gf.project(3))
    with pytest.raises(InputError, match="transform"):
        gf.hessian(tmp_path, llama, documents, second_moment(), gf.project(4))
    monkeypatch.setattr(hessians, "fit", None)
    again = gf.hessian(tmp_path, llama, documents, second_moment(), gf.project(3))
    assert again.digest == first.digest


def test_labels_of_the_model_make_another_curvature(llama, documents, tmp_path):
    made = [
        gf.hessian(
            tmp_path / str(i), llama, documents, second_moment(), gf.project(3), labels=labels, seed=seed
        )
        for i, (labels, seed) in enumerate([("data", 0), ("model", 0), ("model", 0), ("model", 1)])
    ]
    assert made[1].digest == made[2].digest
    assert len({one.digest for one in made}) == 3


def test_a_mix_says_how_its_rows_were_read(llama, documents, tmp_path):
    how = {"masking": {"seed": 0}, "processor": {"fingerprint": "ab"}}
    for name in "qt":
        gf.hessian(tmp_path / name, llama, documents, second_moment(), gf.project(3), settings=how)
    gf.runs.mix_runs(tmp_path / "m", tmp_path / "q", tmp_path / "t", coefficient=0.5)
    with open_curvature(tmp_path / "m") as store:
        made = store.settings
    refuse_mismatch(made, made, "it")
    for key, other in (("masking", {"seed": 1}), ("processor", {"fingerprint": "cd"})):
        with pytest.raises(InputError, match=f"was made differently.*{key}"):
            refuse_mismatch(made, {**made, key: other}, "it")


def test_mixed_runs(llama, documents, tmp_path):
    for name, part in (("q", documents.select([0, 1])), ("t", documents.select([2, 4, 5]))):
        gf.hessian(tmp_path / name, llama, part, second_moment(), gf.project(3))
    mixed, weight = gf.runs.mix_runs(tmp_path / "m", tmp_path / "q", tmp_path / "t", components=5)
    q, t = (gf.runs.load_curvature(tmp_path / name) for name in "qt")
    assert weight == mixing_coefficient(q, t, 5)
    for name, one in gf.runs.load_curvature(tmp_path / "m").items():
        expected = weight * q[name].dense() + (1 - weight) * t[name].dense()
        torch.testing.assert_close(one.dense(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    fixed, _ = gf.runs.mix_runs(tmp_path / "half", tmp_path / "q", tmp_path / "t", coefficient=0.5)
    assert fixed.digest != mixed.digest
    gf.hessian(tmp_path / "other", llama, documents, second_moment(), gf.project(2))
    with pytest.raises(InputError, match="made differently"):
        gf.runs.mix_runs(tmp_path / "no", tmp_path / "q", tmp_path / "other")


def test_a_shard_has_sums_and_the_whole_a_curvature(llama, documents, tmp_path):
    asked = tmp_path / "run", llama, documents, second_moment(), gf.project(3)
    with pytest.raises(
        InputError, match="a shard has sums and no curvature: write them with `hessian_shard`"
    ):
        gf.hessian(*asked, shard=gf.runs.Shard(1, 2))
    with pytest.raises(InputError, match=r"sums are of a shard: give `shard=Shard\(I, N\)`"):
        gf.runs.hessian_shard(*asked)
    with pytest.raises(TypeError, match="overwrites"):
        gf.hessian(*asked, overwrites=True)
    assert not (tmp_path / "run").exists()
