import pytest
import torch
from exact_problems import (
    EXACT,
    LOSS,
    NET,
    PARAMS,
    ROWS,
    SIZE,
    H,
    dense,
    dense_fisher,
    dense_hessian,
    flat,
    half_square,
    outputs,
    randoms,
    rows_of,
    unflat,
)
from torch import nn

import gradfn as gf
from gradfn.engine.reference import naive_grads
from gradfn.exact import (
    arnoldi,
    cg,
    fisher_product,
    gauss_newton_product,
    hessian_product,
    largest_eigenvalue,
    lissa,
    params_of_blocks,
)
from gradfn.linalg.kron import Kron
from gradfn.model.params import call
from gradfn.testing.strategies import randomize, squared_error


def as_product(matrix, like=PARAMS):
    return lambda v: unflat(flat(v) @ matrix.T, like)


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
def test_no_graph_of_a_model_that_is_trained_stays(kind):
    """Its other parameters require gradients: the graph of all batches would be held."""
    given = []
    for part, made in trainable_products():
        product, v = made[kind], randoms(2, part)
        like = {name: value.requires_grad_(part[name].requires_grad) for name, value in v.items()}
        pairs = arnoldi(product, like, steps=3, rank=2)
        found = [
            product(like), cg(product, like, damping=3.0).x, pairs.vectors, pairs.solve(like),
            lissa([product], like, damping=3.0, steps=3).x,
        ]  # fmt: skip
        assert not any(value.requires_grad for result in found for value in result.values())
        assert not pairs.values.requires_grad
        given.append(torch.cat([flat(result) for result in found]))
    assert torch.equal(*given)


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


def test_arnoldi_finds_the_largest_eigenpairs():
    matrix = dense_hessian(LOSS, PARAMS, ROWS)
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:4]
    found = arnoldi(hessian_product(LOSS, PARAMS, ROWS), PARAMS_AS_VECTOR, steps=SIZE, rank=4)
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
    found = arnoldi(as_product(matrix), PARAMS_AS_VECTOR, steps=SIZE, rank=SIZE)
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

    found = arnoldi(product, PARAMS_AS_VECTOR, steps=SIZE, rank=len(ROWS))
    assert len(asked) <= len(ROWS) + 2
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(H).flip(0)[: len(ROWS)], rtol=1e-8, atol=1e-8
    )
    nothing = arnoldi(as_product(H * 0), PARAMS_AS_VECTOR, steps=5, rank=3)
    assert nothing.values.tolist() == [0]
    with pytest.raises(gf.InputError, match="lower rank, or more damping"):
        nothing.solve(randoms(1))
    assert flat(nothing.solve(randoms(1), damping=1.0)).shape == (1, SIZE)


@pytest.mark.parametrize("rank", [0, 4])
def test_arnoldi_gives_between_one_and_all_pairs(rank):
    with pytest.raises(gf.InputError, match="between 1 and the 3 steps"):
        arnoldi(as_product(H), PARAMS_AS_VECTOR, steps=3, rank=rank)


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
