import pytest
import torch
import torch.nn.functional as F
from exact_problems import (
    EXACT,
    LOSS,
    NET,
    PARAMS,
    ROWS,
    SIZE,
    TOKENS,
    WEIGHTED,
    H,
    dense,
    dense_fisher,
    dense_hessian,
    flat,
    flat_params,
    half_square,
    one,
    outputs,
    randoms,
    unflat,
)
from tiny import MeanOfTokens, classes_of, language_model
from torch import nn
from torch.func import jacrev

import gradfn as gf
from gradfn.exact import (
    fisher_product,
    gauss_newton_product,
    hessian_product,
    outputs_and_loss,
)
from gradfn.model.params import call
from gradfn.testing import assert_blocks_close
from gradfn.testing.naive import naive_causal_lm_loss, recorded_shapes
from gradfn.testing.strategies import randomize, squared_error


def cross_entropy(z, example):
    return F.cross_entropy(z, example["class"])


def jacobians(function, params, rows):
    return [
        jacrev(lambda w, row=row: function(one(w, params), row).flatten())(flat_params(params))
        for row in rows
    ]


@pytest.mark.parametrize("budget", [1, 3, 100, 8192])
@pytest.mark.parametrize("count", [1, 7])
def test_the_fisher_is_the_mean_of_outer_products_however_it_is_batched(count, budget):
    product = fisher_product(LOSS, PARAMS, ROWS[:count], token_batch_size=budget)
    torch.testing.assert_close(dense(product, PARAMS), dense_fisher(LOSS, NET, ROWS[:count]), **EXACT)


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_the_hessian_is_that_of_the_mean_loss_however_it_is_batched(budget):
    product = hessian_product(LOSS, PARAMS, ROWS, token_batch_size=budget)
    torch.testing.assert_close(dense(product, PARAMS), dense_hessian(LOSS, PARAMS, ROWS), **EXACT)


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_gauss_newton_of_the_squared_error_is_the_mean_of_j_t_j(budget):
    product = gauss_newton_product(outputs, half_square, PARAMS, ROWS, token_batch_size=budget)
    closed = sum(J.T @ J for J in jacobians(outputs, PARAMS, ROWS)) / len(ROWS)
    torch.testing.assert_close(dense(product, PARAMS), closed, **EXACT)


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_gauss_newton_of_cross_entropy_has_diag_p_minus_p_p_t_between_the_jacobians(budget):
    product = gauss_newton_product(outputs, cross_entropy, PARAMS, ROWS, token_batch_size=budget)
    closed = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for J, row in zip(jacobians(outputs, PARAMS, ROWS), ROWS, strict=True):
        p = outputs(PARAMS, row).softmax(0)
        closed += J.T @ (p.diag() - p.outer(p)) @ J / len(ROWS)
    torch.testing.assert_close(dense(product, PARAMS), closed, **EXACT)


def test_no_gradient_of_an_example_is_made():
    wide = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    params = gf.model.params_of(wide)
    product = fisher_product(squared_error(wide), params, ROWS)
    v = {name: torch.ones(2, *p.shape, dtype=p.dtype) for name, p in params.items()}
    with recorded_shapes() as shapes:
        product(v)
    assert (len(ROWS), 3) in shapes
    assert not {s for s in shapes if s[-2:] == (50, 3) and len(ROWS) in s}


def test_a_part_of_the_parameters_gives_that_part_of_the_matrix():
    part = {name: p for name, p in PARAMS.items() if name.startswith("2.")}
    size = sum(p.numel() for p in part.values())
    torch.testing.assert_close(dense(fisher_product(LOSS, part, ROWS), part), H[-size:, -size:], **EXACT)


def test_each_row_is_multiplied_alone_and_none_are_none():
    product = fisher_product(LOSS, PARAMS, ROWS)
    v = randoms(3)
    separately = torch.cat([flat(product({n: t[i : i + 1] for n, t in v.items()})) for i in range(3)])
    torch.testing.assert_close(flat(product(v)), separately, **EXACT)
    assert flat(product(randoms(0))).shape == (0, SIZE)


def test_code_that_depends_on_its_data_is_refused_in_batches_and_right_one_by_one():
    def loss(params, example):
        z = outputs(params, example)
        return z.square().sum() if bool(z[0] > 0) else LOSS(params, example)

    with pytest.raises(gf.InputError, match="one by one, token_batch_size=1"):
        fisher_product(loss, PARAMS, ROWS)(randoms(1))
    for product, matrix in (
        (fisher_product(loss, PARAMS, ROWS, token_batch_size=1), dense_fisher(loss, NET, ROWS)),
        (hessian_product(loss, PARAMS, ROWS, token_batch_size=1), dense_hessian(loss, PARAMS, ROWS)),
    ):
        torch.testing.assert_close(dense(product, PARAMS), matrix, **EXACT)


@pytest.mark.parametrize("kind", ["fisher", "hessian", "gauss_newton"])
def test_where_padding_changes_a_row_products_are_those_of_unpadded_rows(kind):
    model, rows = randomize(MeanOfTokens(), 0), classes_of([5, 9, 33, 9])
    params, loss = gf.model.params_of(model), gf.model_loss(model, "classification")

    def made(params, row):
        return call(model, params, input_ids=row["input_ids"][None]).logits[0]

    def product(size):
        if kind == "gauss_newton":
            cross = lambda z, row: F.cross_entropy(z, row["labels"])  # noqa: E731
            return gauss_newton_product(made, cross, params, rows, token_batch_size=size)
        of_loss = fisher_product if kind == "fisher" else hessian_product
        return of_loss(loss, params, rows, token_batch_size=size)

    v = randoms(2, params)
    torch.testing.assert_close(flat(product(8192)(v)), flat(product(1)(v)), **EXACT)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda p, e: NoForwardMode.apply(LOSS(p, e)), "without forward mode .*eager"),
        (lambda p, e: F.dropout(outputs(p, e)).sum(), r"random .*model\.eval\(\)"),
        (lambda p, e: outputs(p, e), r"one number an example, not of shape \[2\]: reduce it"),
        (lambda p, e: (LOSS(p, e), 1), "a tensor, and not a tuple"),
        (lambda p, e: F.linear(e["x"], torch.ones(1, len(e["x"])).double()).sum(), "depend on its `params`"),
    ],
)
def test_losses_that_have_no_product_are_refused(loss, match):
    with pytest.raises(gf.InputError, match=match):
        fisher_product(loss, PARAMS, ROWS)(randoms(2))


def test_errors_of_the_loss_itself_come_through():
    def loss(params, example):
        return params["0.weight"] @ example["x"][:2]

    with pytest.raises(RuntimeError, match="size mismatch"):
        fisher_product(loss, PARAMS, ROWS)(randoms(1))


def test_bad_vectors_and_data_are_refused():
    product = fisher_product(LOSS, PARAMS, ROWS)
    with pytest.raises(gf.InputError, match=r"differ in 2\.weight"):
        product({name: v for name, v in randoms(1).items() if name != "2.weight"})
    with pytest.raises(gf.InputError, match=r"expected \['k', 4, 3\].* v\[None\]"):
        product(PARAMS)
    with pytest.raises(gf.InputError, match=r"\[1, 2\] rows"):
        product({**randoms(1), "2.bias": randoms(2)["2.bias"]})
    with pytest.raises(gf.InputError, match="at least one example"):
        fisher_product(LOSS, PARAMS, [])
    with pytest.raises(gf.InputError, match="at least 1 token"):
        fisher_product(LOSS, PARAMS, ROWS, token_batch_size=0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "phi3"])
def test_products_of_language_models_are_those_of_the_naive_gradients(family):
    model = language_model(family)  # with PyTorch's fused attention, which has no forward mode
    params, loss = gf.model.params_of(model), gf.causal_lm_loss(model)
    rows = [{**row, "labels": row["input_ids"]} for row in TOKENS]
    v = randoms(2, params)
    fisher = flat(v) @ dense_fisher(naive_causal_lm_loss(model), model, rows)
    tolerance = 1e-6 if family in ("llama", "phi3") else 1e-12  # their norms compute in float32
    assert_blocks_close(flat(fisher_product(loss, params, TOKENS)(v)), fisher, tolerance)
    alone = fisher_product(loss, params, TOKENS, token_batch_size=1)
    assert_blocks_close(flat(alone(v)), fisher, tolerance)


def test_gauss_newton_of_a_language_model_is_that_of_its_supervised_positions():
    model = language_model("gpt_neox")
    params = {n: p for n, p in gf.model.params_of(model).items() if "attention" in n or "norm" in n}
    product = gauss_newton_product(*outputs_and_loss(gf.causal_lm_loss(model)), params, WEIGHTED)
    v = flat(randoms(2, params))
    want = torch.zeros_like(v)
    for row in WEIGHTED:
        ids, supervised = row["input_ids"][None], range(1, len(row["input_ids"]) - 1)
        weight = row["weight"] / max(1, len(supervised)) / len(WEIGHTED)

        def logits(w, ids=ids):
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                return call(model, one(w, params), input_ids=ids, use_cache=False).logits[0]

        J, z = jacrev(logits)(flat_params(params)), logits(flat_params(params))
        for t in supervised:
            p = z[t].softmax(0)
            want += weight * (v @ J[t].T @ (p.diag() - p.outer(p)) @ J[t])
    torch.testing.assert_close(flat(product(unflat(v, params))), want, **EXACT)
