import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import jacrev
from transformers.pytorch_utils import Conv1D

import gradfn as gf
from gradfn.engine.reference import naive_grads
from gradfn.exact.exact import (
    arnoldi,
    cg,
    fisher_product,
    gauss_newton_product,
    hessian_product,
    largest_eigenvalue,
    lissa,
    outputs_and_loss,
    params_of_blocks,
)
from gradfn.linalg.kron import Kron
from gradfn.model.params import call
from gradfn.testing import assert_blocks_close
from gradfn.testing.naive import naive_causal_lm_loss, recorded_shapes
from gradfn.testing.strategies import randomize, squared_error

EXACT = {"rtol": 1e-9, "atol": 1e-12}
NET = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
PARAMS = gf.model.params_of(NET)
LOSS = squared_error(NET)
SIZE = sum(p.numel() for p in PARAMS.values())


def rows_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [{"x": draw(3), "y": draw(2), "class": torch.tensor(i % 2)} for i in range(count)]


ROWS = rows_of(7)


def flat(v):
    return torch.cat([value.flatten(1) for value in v.values()], 1)


def unflat(matrix, like):
    parts = matrix.split([p.numel() for p in like.values()], 1)
    return {n: part.reshape(-1, *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


def dense(product, params):
    """The product's matrix, all columns asked for at once."""
    size = sum(p.numel() for p in params.values())
    return flat(product(unflat(torch.eye(size, dtype=torch.float64), params)))


def one(vector, params):
    return {name: value[0] for name, value in unflat(vector[None], params).items()}


def flat_params(params):
    return flat({name: p[None] for name, p in params.items()})[0]


def dense_fisher(loss, model, rows):
    g = flat(naive_grads(loss, model, rows))
    return g.T @ g / len(rows)


def dense_hessian(loss, params, rows):
    def mean(w):
        return sum(loss(one(w, params), row) for row in rows) / len(rows)

    return jacrev(jacrev(mean))(flat_params(params))


def outputs(params, example):
    return call(NET, params, example["x"])


def half_square(z, example):
    return (z - example["y"]).square().sum() / 2


def cross_entropy(z, example):
    return F.cross_entropy(z, example["class"])


def jacobians(function, params, rows):
    return [
        jacrev(lambda w, row=row: function(one(w, params), row).flatten())(flat_params(params))
        for row in rows
    ]


def randoms(count, params=PARAMS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in params.values())
    return unflat(torch.randn(count, size, generator=generator, dtype=torch.float64), params)


def as_product(matrix, like=PARAMS):
    return lambda v: unflat(flat(v) @ matrix.T, like)


H = dense_fisher(LOSS, NET, ROWS)


# --- products


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


def trainable_products():
    net, frozen = (randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0) for _ in range(2))
    net.requires_grad_(True)
    frozen.requires_grad_(False)
    for model in (net, frozen):
        loss, part = squared_error(model), {"2.weight": dict(model.named_parameters())["2.weight"]}
        made = {
            "fisher": fisher_product(loss, part, ROWS),
            "hessian": hessian_product(loss, part, ROWS),
            "gauss_newton": gauss_newton_product(
                lambda p, e, m=model: call(m, p, e["x"]), lambda z, e: (z - e["y"]).square().sum(), part, ROWS
            ),
        }
        yield part, made


@pytest.mark.parametrize("kind", ["fisher", "hessian", "gauss_newton"])
def test_no_graph_is_kept_of_a_model_that_is_trained(kind):
    """Its other parameters require gradients: the graph of all batches would be held."""
    given = []
    for part, made in trainable_products():
        product, v = made[kind], randoms(2, part)
        like = {name: value.requires_grad_(part[name].requires_grad) for name, value in v.items()}
        pairs = arnoldi(product, like, steps=3, keep=2)
        found = [
            product(like), cg(product, like, damping=3.0).x, pairs.vectors, pairs.solve(like),
            lissa([product], like, damping=3.0, steps=3).x,
        ]  # fmt: skip
        assert not any(value.requires_grad for result in found for value in result.values())
        assert not pairs.values.requires_grad
        given.append(torch.cat([flat(result) for result in found]))
    assert torch.equal(*given)


def test_vectors_keep_their_rows_and_none_are_none():
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
        (lambda p, e: outputs(p, e), r"shape \[2\], expected one number"),
    ],
)
def test_losses_that_have_no_product_are_refused(loss, match):
    with pytest.raises(gf.InputError, match=match):
        fisher_product(loss, PARAMS, ROWS)(randoms(2))


def test_errors_of_the_loss_itself_come_through():
    def loss(params, example):
        return params["0.weight"] @ example["x"][:2]

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
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


# --- language models

TOKENS = [
    {"input_ids": torch.tensor([1, 2, 3, 4, 5])},
    {"input_ids": torch.tensor([6, 7])},
    {"input_ids": torch.tensor([3, 1, 2])},
]
WEIGHTED = [
    {**row, "labels": torch.where(torch.arange(len(row["input_ids"])) < 2, -100, row["input_ids"]),
     "weight": torch.tensor(0.5 + i, dtype=torch.float64)} for i, row in enumerate(TOKENS)
]  # fmt: skip


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("criterion", ["cross_entropy", "log_odds"])
@pytest.mark.parametrize("rows", [TOKENS, WEIGHTED], ids=["plain", "weighted"])
def test_the_two_parts_of_a_language_models_loss_are_the_loss(rows, criterion, reduction):
    model = language_model("gpt_neox")
    params = gf.model.params_of(model)
    loss = gf.causal_lm_loss(model, reduction, criterion=criterion)
    made, of_outputs = outputs_and_loss(loss)
    for row in rows:
        torch.testing.assert_close(of_outputs(made(params, row), row), loss(params, row), **EXACT)


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


def test_the_kl_loss_does_not_split():
    model = language_model("llama")
    with pytest.raises(gf.InputError, match="two models' logits"):
        outputs_and_loss(gf.causal_lm_loss(model, criterion="kl", reference=language_model("llama")))


# --- conjugate gradients


def solved(matrix, b, damping):
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), flat(b).T).T


def residuals(matrix, x, b, damping):
    rest = flat(b) - flat(x) @ matrix.T - damping * flat(x)
    return rest.norm(dim=1) / flat(b).norm(dim=1)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_cg_is_the_dense_solve_for_every_row_also_where_h_is_singular(damping):
    assert int(torch.linalg.matrix_rank(H)) == len(ROWS) < SIZE
    b = randoms(4)
    found = cg(fisher_product(LOSS, PARAMS, ROWS), b, damping=damping, tolerance=1e-11)
    torch.testing.assert_close(flat(found.x), solved(H, b, damping), rtol=1e-8, atol=1e-9)
    assert found.converged.all()
    assert (found.residual <= 1e-11).all()
    assert (found.iterations <= 3 * SIZE).all()


def test_cg_of_one_row_of_data_takes_two_iterations():
    product = fisher_product(LOSS, PARAMS, ROWS[:1])
    b = randoms(1)
    found = cg(product, b, damping=0.1, tolerance=1e-9)
    assert found.iterations.tolist() == [2]  # two different eigenvalues
    torch.testing.assert_close(flat(found.x), solved(dense(product, PARAMS), b, 0.1), rtol=1e-8, atol=1e-9)


def test_each_right_hand_side_has_its_own_convergence():
    values, vectors = torch.linalg.eigh(H)
    easy, b = vectors[:, -1] * 3, flat(randoms(1))[0]
    rhs = unflat(torch.stack([easy, torch.zeros(SIZE, dtype=torch.float64), b]), PARAMS)
    asked = []

    def product(v):
        asked.append(len(next(iter(v.values()))))
        return as_product(H)(v)

    found = cg(product, rhs, damping=0.1, tolerance=1e-8)
    assert found.iterations[:2].tolist() == [1, 0]
    assert found.iterations[2] > 2
    assert asked == [2] + [1] * (int(found.iterations[2]) - 1) + [3]  # a converged row costs nothing more
    assert found.converged.all()
    assert found.residual[1] == 0
    assert not flat(found.x)[1].any()
    torch.testing.assert_close(flat(found.x)[0], easy / (values[-1] + 0.1), rtol=1e-7, atol=1e-9)
    alone = cg(product, unflat(b[None], PARAMS), damping=0.1, tolerance=1e-8)
    torch.testing.assert_close(flat(found.x)[2:], flat(alone.x), **EXACT)


def test_a_solve_for_nothing_asks_for_no_product():
    def never(v):
        raise AssertionError

    zero = {name: torch.zeros_like(v) for name, v in randoms(2).items()}
    for found in (cg(never, zero, damping=0.0), cg(never, randoms(0), damping=0.0)):
        assert not flat(found.x).any()
        assert found.converged.all()
        assert not found.iterations.any()
        assert not found.residual.any()


def test_what_has_not_converged_says_so_and_its_residual_is_the_true_one():
    b = randoms(2)
    found = cg(as_product(H), b, damping=1e-4, max_iterations=3)
    assert not found.converged.any()
    assert found.iterations.tolist() == [3, 3]
    torch.testing.assert_close(found.residual, residuals(H, found.x, b, 1e-4), **EXACT)


def test_the_residual_is_measured_also_where_rounding_stops_the_iteration():
    b = {name: v.float() for name, v in randoms(1).items()}
    found = cg(as_product(H.float()), b, damping=1e-3, tolerance=1e-12)
    assert not found.converged.any()
    torch.testing.assert_close(found.residual, residuals(H.float(), found.x, b, 1e-3), rtol=0.5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_preconditioner_changes_the_number_of_iterations_alone(rows):
    b, damping = randoms(rows), 1e-3
    scales = torch.logspace(-2, 2, SIZE, dtype=torch.float64)
    A = H + scales.diag()
    plain = cg(as_product(A), b, damping=damping, tolerance=1e-10)
    jacobi = cg(
        as_product(A), b, damping=damping, tolerance=1e-10, preconditioner=as_product((1 / A.diag()).diag())
    )
    perfect = cg(
        as_product(A), b, damping=damping, tolerance=1e-10,
        preconditioner=as_product(torch.linalg.inv(A + damping * torch.eye(SIZE, dtype=torch.float64))),
    )  # fmt: skip
    for found in (plain, jacobi, perfect):
        assert found.converged.all()
        torch.testing.assert_close(flat(found.x), solved(A, b, damping), rtol=1e-6, atol=1e-9)
    assert (perfect.iterations <= 2).all()
    assert (perfect.iterations < jacobi.iterations).all()
    assert (jacobi.iterations < plain.iterations).all()


def test_a_matrix_that_is_not_positive_definite_is_refused_until_it_is_damped():
    indefinite = dense_hessian(LOSS, PARAMS, ROWS)
    lowest = -float(torch.linalg.eigvalsh(indefinite)[0])
    assert lowest > 0
    product, b = hessian_product(LOSS, PARAMS, ROWS), randoms(2)
    with pytest.raises(gf.InputError, match=r"H \+ damping I is not positive definite .*more damping"):
        cg(product, b, damping=0.0, max_iterations=1000)
    found = cg(product, b, damping=2 * lowest, tolerance=1e-10)
    torch.testing.assert_close(flat(found.x), solved(indefinite, b, 2 * lowest), rtol=1e-7, atol=1e-9)
    with pytest.raises(gf.InputError, match="preconditioner is not positive definite"):
        cg(product, b, damping=2 * lowest, preconditioner=lambda v: {n: -t for n, t in v.items()})


@pytest.mark.parametrize("solve", [cg, lambda product, b, **o: lissa([product], b, steps=2, **o)])
def test_bad_input_of_a_solve_is_refused(solve):
    b = randoms(1)
    with pytest.raises(gf.InputError, match="damping must be a number of 0 or more"):
        solve(as_product(H), b, damping=-1.0)
    with pytest.raises(gf.InputError, match="tolerance must be above 0"):
        solve(as_product(H), b, damping=1.0, tolerance=0.0)
    with pytest.raises(gf.InputError, match="right-hand side is NaN"):
        solve(as_product(H), {n: v / 0 for n, v in b.items()}, damping=1.0)
    with pytest.raises(gf.InputError, match="product gave NaN"):
        solve(lambda v: {n: t * torch.nan for n, t in v.items()}, b, damping=1.0)
    with pytest.raises(gf.InputError, match=r"b\[None\]"):
        solve(as_product(H), PARAMS, damping=1.0)


# --- LiSSA


@pytest.mark.parametrize("scale", [None, 2.0])
def test_lissa_of_one_product_is_the_dense_solve_to_its_tolerance(scale):
    b, product = randoms(3), fisher_product(LOSS, PARAMS, ROWS)
    scale = scale if scale is None else scale * float(torch.linalg.eigvalsh(H)[-1])
    b["2.bias"][1], b["2.weight"][1], b["0.weight"][1], b["0.bias"][1] = 0, 0, 0, 0
    found = lissa([product], b, damping=50.0, steps=150, scale=scale, tolerance=1e-9)
    assert found.converged.all()
    assert found.iterations.tolist() == [150, 0, 150]
    want = solved(H, b, 50.0)
    # A residual of r |b| bounds the error by r |b| / damping.
    assert ((flat(found.x) - want).norm(dim=1) <= 1e-9 / 50 * flat(b).norm(dim=1)).all()


def test_a_step_of_lissa_is_the_formula():
    b, parts = randoms(2), [ROWS[:3], ROWS[3:6]]
    matrices = [dense_fisher(LOSS, NET, part) for part in parts]
    found = lissa([fisher_product(LOSS, PARAMS, part) for part in parts], b, damping=0.5, steps=5, scale=90.0)
    x, rhs = torch.zeros_like(flat(b)), flat(b)
    for step in range(5):
        x = x + (rhs - x @ matrices[step % 2] - 0.5 * x) / 90
    torch.testing.assert_close(flat(found.x), x, **EXACT)
    assert not found.converged.any()
    torch.testing.assert_close(found.residual, residuals(sum(matrices) / 2, found.x, b, 0.5), **EXACT)


def test_lissa_that_diverges_is_refused_and_slow_lissa_says_so():
    largest = float(torch.linalg.eigvalsh(H)[-1])
    with pytest.raises(gf.InputError, match=r"diverges .*larger scale"):
        lissa([as_product(H)], randoms(1), damping=0.0, steps=10_000, scale=largest / 3)
    found = lissa([as_product(H)], randoms(1), damping=1e-6, steps=5)
    assert not found.converged.any()
    assert (found.residual < 1).all()


def test_lissa_needs_products_and_a_scale():
    with pytest.raises(gf.InputError, match="at least one product"):
        lissa([], randoms(1), damping=1.0, steps=1)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(gf.InputError, match="scale must be a number above 0"):
            lissa([as_product(H)], randoms(1), damping=1.0, steps=1, scale=scale)
    with pytest.raises(gf.InputError, match="scale must be a number above 0"):
        lissa([as_product(H * 0)], randoms(1), damping=0.0, steps=1)


def test_power_iteration_finds_the_largest_eigenvalue_in_magnitude():
    values = torch.linalg.eigvalsh(H)
    found = largest_eigenvalue(as_product(H), PARAMS_AS_VECTOR, iterations=200)
    assert found == pytest.approx(float(values[-1]), rel=1e-9)
    assert largest_eigenvalue(as_product(-H), PARAMS_AS_VECTOR, iterations=200) == pytest.approx(-found)
    assert largest_eigenvalue(as_product(H), PARAMS_AS_VECTOR, iterations=5) <= found
    assert largest_eigenvalue(as_product(H * 0), PARAMS_AS_VECTOR) == 0


PARAMS_AS_VECTOR = {name: p[None] for name, p in PARAMS.items()}


# --- low rank


def test_arnoldi_finds_the_largest_eigenpairs():
    matrix = dense_hessian(LOSS, PARAMS, ROWS)
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:4]
    found = arnoldi(hessian_product(LOSS, PARAMS, ROWS), PARAMS_AS_VECTOR, steps=SIZE, keep=4)
    torch.testing.assert_close(found.values, values[order], rtol=1e-8, atol=1e-8)
    U = flat(found.vectors)
    torch.testing.assert_close(
        (U @ vectors[:, order]).abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6
    )
    b = randoms(2)
    want = flat(b) @ U.T @ (1 / (values[order] + 0.1)).diag() @ U
    torch.testing.assert_close(flat(found.solve(b, damping=0.1)), want, rtol=1e-6, atol=1e-9)


def test_arnoldi_of_all_steps_is_the_dense_inverse():
    matrix = H + torch.eye(SIZE, dtype=torch.float64)
    found = arnoldi(as_product(matrix), PARAMS_AS_VECTOR, steps=SIZE, keep=SIZE)
    b = randoms(2)
    small = flat(found.vectors)
    inside = flat(b) @ small.T @ small
    torch.testing.assert_close(
        flat(found.solve(b)), torch.linalg.solve(matrix, inside.T).T, rtol=1e-8, atol=1e-9
    )


def test_arnoldi_stops_where_the_space_is_exhausted():
    asked = []

    def product(v):
        asked.append(1)
        return as_product(H)(v)

    found = arnoldi(product, PARAMS_AS_VECTOR, steps=SIZE, keep=len(ROWS))
    assert len(asked) <= len(ROWS) + 2
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(H).flip(0)[: len(ROWS)], rtol=1e-8, atol=1e-8
    )
    nothing = arnoldi(as_product(H * 0), PARAMS_AS_VECTOR, steps=5, keep=3)
    assert nothing.values.tolist() == [0]
    with pytest.raises(gf.InputError, match="keep fewer, or give more damping"):
        nothing.solve(randoms(1))
    assert flat(nothing.solve(randoms(1), damping=1.0)).shape == (1, SIZE)


@pytest.mark.parametrize("keep", [0, 4])
def test_arnoldi_keeps_between_one_and_all(keep):
    with pytest.raises(gf.InputError, match="between 1 and the 3 steps"):
        arnoldi(as_product(H), PARAMS_AS_VECTOR, steps=3, keep=keep)


# --- blocks


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "net",
    [
        NET,
        Shared(),
        nn.Sequential(nn.Linear(3, 4, bias=False), Conv1D(2, 4)),
        nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=2), nn.GroupNorm(2, 6), nn.Embedding(5, 3)),
    ],
    ids=["linear", "shared", "transposed", "others"],
)
def test_params_of_blocks_undoes_blocks_of(net):
    sites = gf.model.find_sites(net, gf.View(include=["*"]))
    v = randoms(3, gf.model.params_of(net))
    assert {name for site in sites for name in site.names} == v.keys()
    back = params_of_blocks(sites, gf.model.blocks_of(sites, v))
    assert back.keys() == v.keys()
    for name, value in v.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)


def test_parts_of_parameters_have_no_way_back_and_are_named():
    model = language_model("llama")
    view = gf.View(include=["*q_proj"], heads=True)
    sites = gf.model.find_sites(model, view)
    with pytest.raises(gf.InputError, match=r"layers\.0\.self_attn\.q_proj\[0\].*no heads"):
        params_of_blocks(sites, gf.model.blocks_of(sites, randoms(1, gf.model.params_of(model))))
    attention = nn.MultiheadAttention(4, 2)
    sites = gf.model.find_sites(attention)
    with pytest.raises(gf.InputError, match=r"in_proj\[q\]"):
        params_of_blocks(sites, gf.model.blocks_of(sites, randoms(1, gf.model.params_of(attention))))
    with pytest.raises(gf.InputError, match="no block 2"):
        params_of_blocks(gf.model.find_sites(NET), {"0": torch.zeros(1, 4, 4)})


def test_influence_by_cg_is_dense_algebra_and_the_dot_of_blocks():
    query, damping = rows_of(3, seed=5), 0.05
    train, queries = naive_grads(LOSS, NET, ROWS), naive_grads(LOSS, NET, query)
    want = flat(train) @ solved(H, queries, damping).T
    found = cg(fisher_product(LOSS, PARAMS, ROWS), queries, damping=damping, tolerance=1e-11)
    torch.testing.assert_close(flat(train) @ flat(found.x).T, want, rtol=1e-8, atol=1e-9)
    sites = gf.model.find_sites(NET)
    scores = gf.collect(NET, ROWS, gf.dot(gf.model.blocks_of(sites, found.x)), loss=LOSS)
    torch.testing.assert_close(scores, want, rtol=1e-8, atol=1e-9)


def test_a_preconditioner_of_blocks_serves_the_solve_over_parameters():
    damping, sites = 1e-3, gf.model.find_sites(NET)
    product = gauss_newton_product(outputs, half_square, PARAMS, rows_of(40))
    factors = {}
    for path, x, out in (("0", lambda row: row["x"], 4), ("2", lambda row: NET[1](NET[0](row["x"])), 2)):
        inputs = torch.stack([torch.cat([x(row), torch.ones(1).double()]) for row in rows_of(40)]).detach()
        right = inputs.T @ inputs / 40 + damping * torch.eye(inputs.shape[1]).double()
        factors[path] = Kron(torch.ones(out).double(), right).inverse()

    def preconditioner(v):
        blocks = gf.model.blocks_of(sites, v)
        return params_of_blocks(sites, {name: factors[name](G) for name, G in blocks.items()})

    b = randoms(2)
    plain = cg(product, b, damping=damping, tolerance=1e-9)
    faster = cg(product, b, damping=damping, tolerance=1e-9, preconditioner=preconditioner)
    assert plain.converged.all()
    assert faster.converged.all()
    torch.testing.assert_close(flat(faster.x), flat(plain.x), rtol=1e-5, atol=1e-6)
    assert (faster.iterations < plain.iterations).all()


# --- the page

PAGES = Path(__file__).parents[2] / "docs"
NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "curvature", "methods"])
def test_the_code_of_a_page_runs_and_prints_what_it_says(capsys, name):
    """Words to the letter; numbers to a tenth, since iterations and rounding depend on the machine."""
    names, page = {}, (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for block, said in re.findall(r"```python\n(.*?)```\n\n?((?:    [^\n]*\n)*)", page, re.DOTALL):
        exec(block, names)
        printed, said = capsys.readouterr().out, re.sub("^    ", "", said, flags=re.MULTILINE)
        assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", said)
        numbers = [float(number) for number in re.findall(NUMBER, said)]
        assert [float(n) for n in re.findall(NUMBER, printed)] == pytest.approx(numbers, rel=0.1, abs=0.02)
    assert names
