"""--precision and --attention of the commands that make gradients."""

import re

import h5py
import numpy as np
import pytest
import torch

from gradfn.cli import inputs
from gradfn.engine.precision import features_of
from gradfn.hf import load_model
from gradfn.store import open_store

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


def made_with(run):
    """What a run records of its model."""
    with open_store(run, "scores" if (run / "scores.h5").exists() else "store") as store:
        return store.settings["model"]


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][:, 0]


@pytest.fixture
def base(model, corpus):
    return ("--model", model, "--dataset", corpus)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels of the models that commands load."""
    seen, load = [], inputs.load_model

    def spied(*args, **options):
        seen.append(options["attention"])
        return load(*args, **options)

    monkeypatch.setattr(inputs, "load_model", spied)
    return seen


@pytest.mark.parametrize("command_name", ["score", "build", "reduce"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_reaches_the_model_and_is_recorded(ok, base, tmp_path, kernels, command_name, attention):
    ask = ASK if command_name == "score" else ()
    ok(command_name, tmp_path, *base, *ask, "--attention", attention)
    assert made_with(tmp_path)["attention"] == attention
    assert kernels == [attention]


def test_the_kernel_that_transformers_takes_is_recorded(store, model):
    assert made_with(store)["attention"] == load_model(model).config._attn_implementation == "sdpa"


def test_kernels_differ_by_rounding_alone(ok, base, tmp_path):
    for kernel in ("sdpa", "eager"):
        ok("score", tmp_path / kernel, *base, *ASK, "--attention", kernel, "--precision", "fp64")
    a, b = scores_of(tmp_path / "sdpa"), scores_of(tmp_path / "eager")
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_query_takes_the_stores_kernel_unless_told(ok, base, tmp_path, kernels):
    ok("build", tmp_path, *base, "--attention", "eager")
    ok("query", tmp_path, *ASK)
    ok("query", tmp_path, *ASK, "--attention", "sdpa")
    assert kernels == ["eager", "eager", "sdpa"]


def test_a_run_is_not_resumed_with_another_kernel(ok, command, base, tmp_path):
    ok("build", tmp_path, *base, "--attention", "eager")
    result = command("build", tmp_path, *base, "--attention", "sdpa")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert re.search("attention.*eager.*sdpa", result.err)


@pytest.mark.parametrize("arguments", [("score", *ASK), ("build", "RUN"), ("reduce", "RUN")])
def test_a_kernel_that_cannot_run_here_is_refused(command, base, tmp_path, arguments):
    arguments = [tmp_path / "run" if part == "RUN" else part for part in arguments]
    result = command(*arguments, *base, "--attention", "flash_attention_2", "--precision", "bf16")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "flash_attention_2 runs on CUDA in bf16 or fp16, not on cpu in bf16: use sdpa" in result.err
    assert not (tmp_path / "run").exists()


# --- tf32


def flags():
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision


@pytest.fixture
def bf16_units(monkeypatch):
    """Commands take this CPU for one with bf16 units."""
    known = inputs.products_of
    monkeypatch.setattr(inputs, "products_of", lambda *asked: known(*asked, features={"avx512_bf16"}))


@pytest.fixture
def during(monkeypatch):
    """How float32 matrices are multiplied in a layer, forward and backward, while commands run."""
    seen, handles, load = set(), [], inputs.load_model

    def note(module, args, y):
        if y.requires_grad:
            seen.add(("forward", *flags()))
            y.register_hook(lambda g: seen.add(("backward", *flags())))

    def watched(*args, **options):
        net = load(*args, **options)
        handles.append(net.model.layers[0].mlp.up_proj.register_forward_hook(note))
        return net

    monkeypatch.setattr(inputs, "load_model", watched)
    yield seen
    for handle in handles:
        handle.remove()


def test_tf32_is_set_for_the_time_of_the_gradients_and_recorded(ok, base, tmp_path, bf16_units, during):
    before = flags()
    for name, ask in (("score", ASK), ("build", ()), ("reduce", ())):
        during.clear()
        ok(name, tmp_path / name, *base, *ask, "--precision", "tf32")
        assert during == {("forward", "bf16", "bf16"), ("backward", "bf16", "bf16")}
        assert flags() == before
        made = made_with(tmp_path / name)
        assert (made["precision"], made["products"]) == ("tf32", "bf16")
    with h5py.File(tmp_path / "score" / "scores.h5") as file:
        assert file["scores"].dtype == np.float32


def test_a_query_takes_the_stores_products_unless_told(ok, base, tmp_path, bf16_units, during):
    ok("build", tmp_path, *base, "--precision", "tf32")
    for options, products in ((), "bf16"), (("--precision", "fp32"), "ieee"):
        during.clear()
        ok("query", tmp_path, *ASK, *options)
        assert during == {("forward", products, products), ("backward", products, products)}


def test_other_precisions_multiply_exactly(ok, base, tmp_path, during):
    ok("build", tmp_path, *base)
    assert during == {("forward", "ieee", "ieee"), ("backward", "ieee", "ieee")}
    assert "products" not in made_with(tmp_path)


@pytest.mark.skipif(
    bool(features_of(torch.device("cpu")) & {"amx_fp16", "amx_bf16", "avx512_bf16"}), reason="has units"
)
@pytest.mark.parametrize("name", ["score", "build", "reduce", "query"])
def test_tf32_without_units_is_refused(command, base, store, tmp_path, name):
    here = {"score": (*base, *ASK), "query": (store, *ASK)}.get(name, (tmp_path / "run", *base))
    result = command(name, *here, "--precision", "tf32")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "and cpu has none of them: use fp32" in result.err
    assert not (tmp_path / "run").exists()
