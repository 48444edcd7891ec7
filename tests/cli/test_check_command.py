import re
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from tiny import DOCUMENTS, write_jsonl

from gradfn.cli import check as module
from gradfn.cli import inputs
from gradfn.engine.check import BlockError, Difference, Noise
from gradfn.engine.precision import features_of
from gradfn.hf import load_model

FEW = ("--split", "train[:4]")


def numbers(out, first):
    """The numbers of the line that starts with these words."""
    line = next(line for line in out.splitlines() if line.startswith(first))
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*(?:e[-+]\d+)?", line[len(first) :])]


def test_the_shares_add_up_to_the_models_parameters(ok, model):
    out = ok("check", model)
    whole = sum(p.numel() for p in load_model(model).parameters())
    assert numbers(out, "all parameters") == [whole, 100.0]
    parts = [numbers(out, name) for name in ("by probe", "not attributed")]
    assert sum(part[0] for part in parts) == whole
    rows = re.findall(r"^  \S+(?: x \d+)? +([\d,]+) +\S+%$", out, re.MULTILINE)
    assert sum(int(n.replace(",", "")) for n in rows) == whole
    assert "model.layers.*.self_attn.q_proj x 2 " in out
    assert "LM head: left out by default" in out


def test_random_tokens_stand_in_for_a_dataset(ok, model):
    out = ok("check", model)
    assert "12 rows" in out
    assert "at random, 4 to 128 each" in out
    assert re.search(r"equal to \d\.\de-\d+ in all 14 blocks", " ".join(out.split()))
    assert "advice  fine: " in out
    assert "against fp32" not in out


def test_a_dataset_and_a_lower_precision(ok, model, corpus):
    out = ok("check", model, "--dataset", corpus, *FEW, "--precision", "bf16", "--attention", "eager")
    assert "bf16, eager attention" in out
    assert "the first 4 rows" in out
    assert "is to be seen with --precision fp32" in " ".join(out.split())
    cosine, worst, error, worst_error = numbers(out, "bf16 against fp32")[:4]
    assert worst <= cosine < 1
    assert 1e-3 < error <= worst_error < 1
    assert re.search(r"^bf16 against fp32 .* doc-\w+ *$", out, re.MULTILINE)


def test_include_takes_everything(ok, model):
    out = ok("check", model, "--include", "*")
    assert "not attributed" not in out
    assert "norm: probe" in out


def test_it_fits_in_eighty_columns(ok, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("gradfn.report.tables.Piped", Console)
    out = ok("check", model)
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^  model\.layers\.\*\.post_attention_layernorm x 2 +\d+ ", out, re.MULTILINE)


def test_a_precision_that_is_too_noisy_gets_a_remedy_that_was_measured(ok, model, monkeypatch):
    def measured(subject, documents, transform, *, reference=None, **_):
        if reference is None:  # fp32
            return Noise(Difference(1.0, 1.0, 0.0, 0.0, 0), None)
        model = subject.model
        eager = model.config._attn_implementation == "eager"
        batching = Difference(1.0, 0.95 if eager else 0.9, 0.0, 0.0, 0)
        assert model.dtype == torch.bfloat16
        return Noise(batching, Difference(1.0, 0.98, 0.0, 0.0, 0))

    monkeypatch.setattr(module, "noise", measured)
    out = " ".join(ok("check", model, "--precision", "bf16").split())
    assert "use --precision fp32: the worst row keeps a cosine of 1.000000 there, and of 0.900000" in out


def test_an_attention_that_helps_is_advised_by_its_option(ok, model, monkeypatch):
    def measured(subject, documents, transform, *, reference=None, **_):
        worst = 0.995 if subject.model.config._attn_implementation == "eager" else 0.9
        return Noise(Difference(1.0, worst, 0.0, 0.0, 0), None)

    monkeypatch.setattr(module, "noise", measured)
    out = " ".join(ok("check", model, "--attention", "sdpa").split())
    assert "use --attention eager: the worst row keeps a cosine of 0.995000 there" in out


def flags():
    """How PyTorch multiplies and convolves float32 matrices on the CPU."""
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision


@pytest.fixture
def bf16_units(monkeypatch):
    """Commands take this CPU for one with bf16 units, which no flag needs, only speed and rounding."""
    known = inputs.products_of
    monkeypatch.setattr(inputs, "products_of", lambda *asked: known(*asked, features={"avx512_bf16"}))


def test_tf32_multiplies_on_the_units_of_this_cpu_or_is_refused(command, model):
    result = command("check", model, "--precision", "tf32")
    if features_of(torch.device("cpu")) & {"amx_fp16", "amx_bf16", "avx512_bf16"}:
        assert result.status == 0
    else:
        assert (result.status, result.out) == (2, "")
        assert re.search(r"tf32 multiplies on .*, and cpu has none of them: use fp32\n$", result.err)
        assert result.err.count("\n") == 1


def test_tf32_is_compared_with_fp32_and_its_rounding_is_told(ok, model, bf16_units, monkeypatch):
    seen, known = [], module.noise
    before = flags()

    def spied(subject, documents, transform, *, reference, inside, **options):
        assert reference is subject

        @contextmanager
        def watched():
            with inside():
                seen.append(flags())
                yield

        return known(subject, documents, transform, reference=reference, inside=watched, **options)

    monkeypatch.setattr(module, "noise", spied)
    out = " ".join(ok("check", model, "--precision", "tf32").split())
    assert set(seen) == {("bf16", "bf16")}
    assert flags() == before
    assert "tf32 (bf16 products), sdpa attention" in out
    assert "tf32 rounds both factors of a product to 1 part in 128" in out
    assert "tf32 against fp32" in out


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "flash"], "'flash' is not one of 'sdpa', 'eager'"),
        (
            ["--attention", "flash_attention_2"],
            "flash_attention_2 runs on CUDA in bf16 or fp16, not on cpu in",
        ),
        (["--token-batch-size", "0"], "--token-batch-size must be 1 or more"),
        (["--precision", "int3"], "int3.*see gradfn check --help"),
        (["--include", "nothing.like.it"], "--include nothing.like.it matches no layer"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "classification"], "give --label-column"),
        (["--task", "seq2seq_lm"], "random tokens are for causal-lm only: give --dataset"),
        (["--device", "nonsense"], "use --device cpu"),
        (["--split", "train[:3]"], "--split is about a dataset: give one with --dataset"),
        (["--text-column", "body"], "--text-column is about a dataset"),
        (["--truncation"], "--truncation is about a dataset"),
    ],
)
def test_bad_input_is_one_sentence(command, model, arguments, words):
    result = command("check", model, *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert re.search(words, result.err), result.err


def test_no_model(command):
    result = command("check", "no/such/model")
    assert result.status == 2
    assert "check the path" in result.err
    assert command("check").status == 2


def test_rows_with_nothing_to_predict_are_refused(command, model, tmp_path):
    data = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}, {"text": ""}])
    result = command("check", model, "--dataset", data)
    assert (result.status, result.out) == (2, "")
    assert "nothing to predict" in result.err


def test_rows_of_one_length_are_told(ok, model, tmp_path):
    data = write_jsonl(tmp_path / "same.jsonl", [{"text": DOCUMENTS[0]["text"]}] * 2)
    assert "of one length, so padding is not tried" in " ".join(ok("check", model, "--dataset", data).split())


@pytest.mark.parametrize(
    ("precision", "words"), [("fp32", "with --precision fp64"), ("fp64", "please tell us")]
)
def test_an_engine_that_is_wrong_is_told(command, model, monkeypatch, precision, words):
    worst = BlockError("model.layers.0.mlp.up_proj", 0.25, 0.96875)
    monkeypatch.setattr(module, "equality", lambda *_: (worst, BlockError("b", 0.0, 1.0)))
    result = command("check", model, "--precision", precision)
    assert result.status == 1
    out = " ".join(result.out.split())
    assert (
        "the worst of 2 blocks is model.layers.0.mlp.up_proj: relative error 2.5e-01, cosine 0.968750" in out
    )
    assert words in out
