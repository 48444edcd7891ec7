"""Files that earlier versions wrote are read: the numbers below are those that these versions printed."""

from pathlib import Path
from shutil import copytree

import pytest
import torch

from gradfn.errors import InputError
from gradfn.runs.curvatures import load_curvature, open_curvature
from gradfn.runs.gradients import open_gradients, read_gradients
from gradfn.runs.masks import load_mask
from gradfn.runs.provenance import Provenance, rebuild, refuse_mismatch
from gradfn.scores import Scores
from gradfn.store import open_writer
from gradfn.transforms import chain, project

OLD = Path(__file__).parent / "data" / "v1"
ROWS = [f"algeria-{what}" for what in ("government", "cities", "landscape", "heights", "economy", "money")]
FINGERPRINT = "297615811b8920b4"


def test_scores_of_two_dampings():
    scores = Scores.load(OLD / "scores")
    assert scores.dampings == ("0.1", "absolute:1")
    assert (scores.row_ids, scores.query_ids) == (ROWS, ["0", "1", "2"])
    assert scores.query_texts[0].startswith("The capital of Burundi is")
    assert scores.values.shape == (2, 6, 3)
    assert scores.values[0, :2].tolist() == [
        [-21.065574645996094, -18.652048110961914, 32.11982727050781],
        [67.69795227050781, 7.6393280029296875, -35.6048469543457],
    ]
    assert scores.values[1, 1].tolist() == [
        0.011468213051557541,
        -0.027370717376470566,
        -0.013621513731777668,
    ]
    assert scores.of_damping("0.1").top(1).rows[0].tolist() == [1]


def test_scores_are_saved_anew_in_the_layout_of_today(tmp_path):
    old = Scores.load(OLD / "scores")
    old.save(tmp_path)
    new = Scores.load(tmp_path)
    assert torch.equal(new.values, old.values)
    assert (new.query_ids, new.dampings, new.settings) == (old.query_ids, old.dampings, old.settings)


def test_a_store_of_tokens():
    with open_gradients(OLD / "tokens") as store:
        assert store.rows == 276
        gradients = read_gradients(store, 0, 2)["model.layers.0.self_attn.q_proj"]
        assert gradients.flatten().tolist() == pytest.approx([-1.9778297e-10, 1.7140843e-03], rel=1e-7)
        assert store.index_array("documents/id").tolist() == ROWS
        assert (store.read("rows/document")[-1], store.read("rows/position")[-1]) == (5, 46)
        assert rebuild(store) == chain(project(1))


def test_a_curvature_and_a_mask():
    H = load_curvature(OLD / "scores")
    assert (H.kind, H.rows, len(H), H.digest) == ("ekfac", 6, 21, "3c35db5c0bd203d8")
    mask = load_mask(OLD / "mask")
    chosen = [index.tolist() for index in mask.chosen["model.layers.0.self_attn.q_proj"]]
    assert chosen == [[33, 98], [10, 96]]


def test_what_they_were_made_of_is_compared():
    with open_curvature(OLD / "scores") as store:
        made = Provenance.of(store)
    assert made.model is not None
    assert (made.version, made.model.fingerprint, made.model.path) == ("0.1.0", FINGERPRINT, "model")
    refuse_mismatch(made, Provenance.of(Scores.load(OLD / "scores").settings), "the curvature")
    with (
        open_gradients(OLD / "tokens") as store,
        pytest.raises(InputError, match="tokens is True there"),
    ):
        refuse_mismatch(store, made, "the store")


@pytest.mark.parametrize("finished", [True, False])
def test_they_are_not_resumed(tmp_path, finished):
    run = copytree(OLD / "scores", tmp_path / "run")
    if not finished:
        (run / "scores.h5").unlink()
    settings = Scores.load(OLD / "scores").settings
    words = "by an older gradfn, in format 1, which can be read but not resumed in format 4: give `over"
    with pytest.raises(InputError, match=words), open_writer(run, "scores", settings, 6):
        pass
    with open_writer(run, "scores", settings, 6, overwrite="unlike") as writer:
        assert writer.done == []
