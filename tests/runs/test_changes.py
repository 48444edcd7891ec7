"""What refusals say of rows and models that were changed since a run was made."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, save

import gradfn as gf
from gradfn.errors import InputError
from gradfn.runs.changes import changed_model

TEXTS = ["the first row of all", "the second row of all", "the third row"]


def documents(texts):
    tokens = [[ord(letter) % 50 for letter in text] for text in texts]
    return gf.make_documents(tokens, ids=[f"r{row}" for row in range(len(texts))], texts=texts)


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (
            [TEXTS[0], "the second row, of all", "the third row!"],
            "2 of the 3 rows there differ, first row 1, whose text is 'the second row of all' there and "
            "'the second row, of all' here",
        ),
        (TEXTS[:2], "1 of the 3 rows there differ, first row 2, whose id is 'r2' there and nothing here"),
    ],
)
def test_how_many_rows_were_changed_and_the_first_of_them(tmp_path, kind, finished, texts, words):
    net = make_model()

    def write(data):
        if kind == "store":
            return gf.build(tmp_path, net, data, gf.project(2))
        return gf.runs.score_run(tmp_path, net, data, documents(TEXTS[:1]), gf.grad_dot(gf.project(2)))

    write(documents(TEXTS))
    if not finished:
        (tmp_path / f"{kind}.h5").unlink()
    with pytest.raises(InputError) as caught:
        write(documents(texts))
    assert words in str(caught.value)
    assert "data is not the same" in str(caught.value)


def test_rows_of_which_only_labels_were_changed(tmp_path):
    net, data = make_model(), documents(TEXTS)
    gf.build(tmp_path, net, data, gf.project(2))
    data.labels[3] = -100
    with pytest.raises(
        InputError, match="the 3 rows there have the same ids, texts and lengths, so tokens or"
    ):
        gf.build(tmp_path, net, data, gf.project(2))


def test_the_first_part_of_a_model_that_was_changed(tmp_path):
    one, other = (save(tmp_path / name, make_model(), make_tokenizer()) for name in ("one", "other"))
    assert changed_model(str(one), str(other)) == ""
    assert changed_model(str(one), str(one)) == f"{one} has been changed since"
    assert changed_model(str(one), "no/such/model") == ""
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[3]
    weights[name] = (
        weights[name] + torch.eye(*weights[name].shape) if weights[name].ndim == 2 else weights[name] + 1
    )
    save_file(weights, other / "model.safetensors")
    assert changed_model(str(one), str(other)) == f"the first tensor that differs is {name}"
    weights[name] = weights[name][:1]
    save_file(weights, other / "model.safetensors")
    assert changed_model(str(one), str(other)).startswith(f"{name} has shape [")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "rms_norm_eps": 0.5, "transformers_version": "x"})
    )
    assert changed_model(str(one), str(other)) == "in config.json, rms_norm_eps is 1e-06 there and 0.5 here"
