"""Curvatures depend on the rows alone, and what is made of them is dense linear algebra."""

from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from matrices import score

from gradfn.data import IGNORED
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.exact import cg, fisher_product, lissa, params_of_blocks
from gradfn.linalg.rows import RowSpectrum
from gradfn.linalg.spectrum import Damping, DampingKind
from gradfn.methods.inner_product import InnerProduct
from gradfn.model.losses import CausalLMLoss
from gradfn.model.params import params_of
from gradfn.model.sites import View, blocks_of, find_sites
from gradfn.statistics import ekfac, eshampoo, kfac, second_moment, shampoo, tkfac
from gradfn.statistics.curvature import dense_spectrum
from gradfn.statistics.fold import fit, sums_of
from gradfn.statistics.kfac import Corrected
from gradfn.statistics.moments import adam_moments, mean, total
from gradfn.testing import (
    assert_blocks_close,
    chain_difference,
    chains,
    dampings,
    naive_blocks,
    problems,
    spectra,
)
from gradfn.testing.strategies import shapes_of
from gradfn.transforms import Adam, chain, precondition, project, unit_normalize

KINDS = {"second_moment": second_moment, "kfac": kfac, "tkfac": tkfac, "shampoo": shampoo}
STAGES = ("project", "adam", "adafactor", "unit_normalize", "precondition")
kinds = st.sampled_from(sorted(KINDS))
powers = st.sampled_from([-1.0, -0.5])
SHAPES = {"a": (2, 3), "b": (4, 1)}


def supervised(problem):
    """Whether any row has something to learn from."""
    return any("labels" not in row or bool((row["labels"][1:] != IGNORED).any()) for row in problem.rows)


@st.composite
def fitting(draw, min_rows=2):
    """A problem with something to learn from, a fold, and the transform before it."""
    problem, kind = draw(problems(min_rows=min_rows)), draw(kinds)
    assume(supervised(problem))
    projected = kind == "second_moment" or draw(st.booleans())
    return problem, kind, project(3, seed=1) if projected else chain()


def dense(curvature):
    return {name: one.dense() for name, one in curvature.items()}


def tolerance(kind):
    """Of shampoo's roots: an eigenvalue of 1e-14 may be rounding, its root of 1e-7 is none."""
    return 1e-6 if kind == "shampoo" else 1e-9


def flat(blocks):
    return torch.cat([G.flatten(1) for G in blocks.values()], 1)


def damped(one, damping):
    """The matrix that is to be inverted, where the damping is one that adds."""
    H = one.dense()
    eye, level = torch.eye(len(H), dtype=torch.float64), damping.value * H.diagonal().mean()
    match damping.kind:
        case "relative" if level > 0:
            return H + level * eye
        case "absolute":
            return H + damping.value * eye
        case "factored" if level > 0:
            S, A = (Q @ torch.diag(v) @ Q.T for Q, v in zip((one.left, one.right), one.sides, strict=True))
            pi = (A.diagonal().mean() / S.diagonal().mean()).sqrt()
            left = S + level.sqrt() / pi * torch.eye(len(S), dtype=torch.float64)
            return torch.kron(left, A + pi * level.sqrt() * torch.eye(len(A), dtype=torch.float64))
    return None


def filtered(one, damping):
    """The damped inverse, where the damping is another one."""
    H = one.dense()
    eye, level = torch.eye(len(H), dtype=torch.float64), damping.value * H.diagonal().mean()
    match damping.kind:
        case "tikhonov" if level > 0:
            return H @ torch.linalg.inv(H @ H + level.square() * eye)
        case "truncated" if level > 0:
            return torch.linalg.pinv(H, atol=float(level), rtol=0.0, hermitian=True)
    return torch.zeros_like(H)


def powered(one, power, damping):
    """A power of a spectrum's matrix, without its eigenvalues where that can be done."""
    if (matrix := damped(one, damping)) is not None:
        if power == -1:
            return torch.linalg.inv(matrix)
        values, vectors = torch.linalg.eigh(matrix)  # an inverse has the large ones to few digits
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T
    matrix = filtered(one, damping)
    if power == -1:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    real = values > 1e-7 * values.amax()  # the root of a rounded zero is not small
    return vectors @ torch.diag(torch.where(real, values, 0.0).sqrt()) @ vectors.T


def multiplied(H, blocks, power, damping):
    """Every row times a power of H, by dense matrices."""
    return {name: (G.flatten(1) @ powered(H[name], power, damping)).view_as(G) for name, G in blocks.items()}


@given(st.data(), fitting(min_rows=3), st.integers(1, 30))
def test_batches_partitions_and_the_order_of_rows_change_nothing(data, fitted, budget):
    problem, kind, before = fitted
    common = {"transform": before, "loss": problem.loss}
    alone = fit(KINDS[kind](), problem.model, problem.rows, token_batch_size=1, **common)
    rows = data.draw(st.permutations(problem.rows))
    parts = data.draw(st.integers(1, len(alone)))
    other = fit(KINDS[kind](), problem.model, rows, partitions=parts, token_batch_size=budget, **common)
    assert (other.kind, other.rows) == (kind, len(rows))
    assert_blocks_close(dense(other), dense(alone), tolerance(kind))


@pytest.mark.parametrize("corrected", [ekfac, eshampoo])
@given(st.data(), problems(min_rows=3), st.integers(1, 30))
def test_corrected_eigenvalues_do_not_depend_on_batches(corrected, data, problem, budget):
    assume(supervised(problem))
    basis = fit(corrected().first, problem.model, problem.rows, loss=problem.loss)
    alone = fit(Corrected(basis), problem.model, problem.rows, loss=problem.loss, token_batch_size=1)
    rows, parts = data.draw(st.permutations(problem.rows)), data.draw(st.integers(1, len(basis)))
    other = fit(
        Corrected(basis), problem.model, rows, loss=problem.loss, partitions=parts, token_batch_size=budget
    )
    assert_blocks_close(dense(other), dense(alone))
    both = fit(corrected(), problem.model, problem.rows, loss=problem.loss, token_batch_size=budget)
    for name, one in both.items():
        plain = naive_blocks(problem.reference, problem.model, problem.rows)[name]
        torch.testing.assert_close(one.values.sum(), plain.square().sum() / len(plain))
        if all(values.diff().min() > 1e-5 * values.max() for values in basis[name].sides if len(values) > 1):
            assert_blocks_close(one.dense(), alone[name].dense(), 1e-6)


@given(st.data(), fitting(min_rows=2))
def test_the_sums_of_two_shards_merged_are_those_of_the_whole(data, fitted):
    problem, kind, before = fitted
    fold, at = KINDS[kind](), data.draw(st.integers(1, len(problem.rows) - 1))
    engine = probe_engine(problem.model, problem.loss, chain(before, fold.stage()))
    shards = [sums_of(fold, engine, part)[0] for part in (problem.rows[:at], problem.rows[at:])]
    whole = fit(fold, problem.model, problem.rows, before, loss=problem.loss)
    merged = fold.finalize(fold.merge(*shards))
    assert merged.rows == len(problem.rows)
    assert_blocks_close(dense(merged), dense(whole), tolerance(kind))


@given(problems(("mlp", "conv", "lm", "weighted_lm", "encoder"), min_rows=2), st.integers(1, 30), st.data())
def test_sums_in_the_backward_are_sums_over_rows(problem, budget, data):
    plain = naive_blocks(problem.reference, problem.model, problem.rows, View())
    before = data.draw(chains(shapes_of(plain), stages=STAGES, max_stages=3))
    fold = data.draw(st.sampled_from([mean(), total(), adam_moments(), shampoo()]))
    got = fit(fold, problem.model, problem.rows, before, loss=problem.loss, token_batch_size=budget)
    want = fold.finalize(fold.update(fold.init(), before(plain)))
    if isinstance(got, Adam):
        got, want = got.moments, want.moments
    elif fold == shampoo():
        got, want = dense(got), dense(want)
    assert_blocks_close(got, want, 1e-6)


@given(problems(min_rows=2), st.integers(1, 30))
def test_kfac_of_one_position_and_one_row_at_a_time(problem, budget):
    """`(T / N) E[g gᵀ] ⊗ E[x xᵀ]`: the trace is `sum |g|² sum |x|² / (T N)`, over all uses of a weight."""
    assume(supervised(problem))
    seen = {site.block: [] for site in find_sites(problem.model)}
    for row in problem.rows:
        for name, pairs in factors_of(problem, row).items():
            seen[name] += pairs
    fitted = fit(kfac(), problem.model, problem.rows, loss=problem.loss, token_batch_size=budget)
    for name, pairs in seen.items():
        x, g = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        want = torch.kron(g.T @ g, x.T @ x) / (len(x) * len(problem.rows))
        assert_blocks_close(fitted[name].dense(), want, 1e-9)


def factors_of(problem, row):
    """What every use of a layer takes in and its output's gradient, at the positions that count."""
    uses = []

    def use(module, args, y, site):
        y.retain_grad()
        uses.append((site, args[0].detach(), y))

    handles = [
        site.module.register_forward_hook(partial(use, site=site)) for site in find_sites(problem.model)
    ]
    params = {n: p.detach().clone().requires_grad_() for n, p in problem.model.named_parameters()}
    problem.reference(params, row).backward()
    for handle in handles:
        handle.remove()
    pairs = {site.block: [] for site in find_sites(problem.model)}
    for site, x, y in uses:
        g = torch.zeros_like(y) if y.grad is None else y.grad
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        if isinstance(problem.loss, CausalLMLoss):
            counted = torch.tensor([*(row["labels"][1:] != IGNORED).tolist(), False])
            x, g = x[counted], g[counted]
        x = torch.cat([x, x.new_ones(len(x), 1)], 1) if site.layer.bias else x
        pairs[site.block].append((x, g))
    return pairs


@pytest.mark.parametrize("kind", get_args(DampingKind))
@given(st.data(), st.sampled_from([0.03, 0.3, 1.7]), powers)
def test_powers_are_dense_algebra_for_every_damping(kind, data, value, power):
    damping, products = Damping(value, kind), True if kind == "factored" else None
    H = data.draw(spectra(SHAPES, products=products))
    torch.manual_seed(0)
    # The root of Tikhonov's filter is steep at 0: rounding of 1e-16 in an eigenvalue is 1e-8 in it.
    close = 1e-4 if (kind, power) == ("tikhonov", -0.5) else 1e-6
    G = {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    assert_blocks_close(precondition(H, power, damping)(G), multiplied(H, G, power, damping), close)


@given(spectra(SHAPES, products=True), st.one_of(st.none(), dampings(factored=True)))
def test_half_a_power_twice_is_the_whole_and_may_stand_on_either_side(H, damping):
    a, b = (
        {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    half, whole = precondition(H, -0.5, damping), precondition(H, -1.0, damping)
    assert_blocks_close(half(half(a)), whole(a), 1e-9)
    assert_blocks_close(flat(half(a)) @ flat(half(b)).T, flat(a) @ flat(whole(b)).T, 1e-9)


@given(spectra(SHAPES))
def test_the_pseudo_inverse_is_one(H):
    """`H H⁺ H = H` and `H⁺ H H⁺ = H⁺`: no eigenvalue of rounding is inverted."""
    for name, one in H.items():
        G = torch.eye(len(one.dense()), dtype=torch.float64).view(-1, *SHAPES[name])
        plus = flat(precondition(H, -1.0, None)({name: G}))
        assert_blocks_close(one.dense() @ plus @ one.dense(), one.dense(), 1e-7)
        assert_blocks_close(plus @ one.dense() @ plus, plus, 1e-7)


@given(st.data(), problems(min_rows=2), st.integers(1, 30), st.booleans())
def test_chains_with_curvatures_are_lowered_to_the_same(data, problem, budget, scored):
    plain = naive_blocks(problem.reference, problem.model, problem.rows)
    first = data.draw(st.sampled_from([chain(), project(3), chain(project(2), unit_normalize())]))
    H = data.draw(spectra(shapes_of(first(plain))))
    power, damping = data.draw(powers), data.draw(dampings())
    last = data.draw(st.sampled_from([chain(), project(2, seed=5), unit_normalize()]))
    made = chain(first, precondition(H, power, damping), last)
    common = {"loss": problem.loss, "token_batch_size": budget}
    if scored:
        got = score(
            problem.model,
            problem.rows,
            problem.rows[:1],
            method=InnerProduct(made, made),
            by_block=True,
            **common,
        )
    else:
        got = collect(problem.model, problem.rows, made, **common)

    def dense(blocks):
        want = last(multiplied(H, first(blocks), power, damping))
        return {name: G.flatten(1) @ G[:1].flatten(1).T for name, G in want.items()} if scored else want

    # Nearly singular curvatures make rounding of any size: it is told from what is wrong by noise.
    assert not (wrong := chain_difference(got, dense, plain, 1e-6)), wrong


@given(st.data(), fitting(), st.sampled_from(["none", "cosine", "relative"]))
def test_scores_are_what_dense_algebra_makes_of_the_rows(data, fitted, norm):
    problem, kind, before = fitted
    H = fit(KINDS[kind](), problem.model, problem.rows, before, loss=problem.loss)
    several = tuple(data.draw(st.lists(dampings(factored=kind != "second_moment"), min_size=1, max_size=3)))
    method = InnerProduct(before, before, H, several, norm)
    rows = before(naive_blocks(problem.reference, problem.model, problem.rows))
    expected = []
    for damping in several:
        whole, half = (multiplied(H, rows, power, damping) for power in (-1.0, -0.5))
        if norm == "cosine":
            units = unit_normalize()(half)
            expected.append(flat(units) @ flat(units).T)
        else:
            scale = flat(whole).norm(dim=1, keepdim=True) if norm == "relative" else 1
            expected.append((flat(rows) @ flat(whole).T / scale).nan_to_num(nan=0.0))
    got = score(problem.model, problem.rows, problem.rows, method=method, loss=problem.loss)
    assert_blocks_close(got, torch.cat(expected, 1), 1e-6)


@given(st.data(), fitting(), st.booleans())
def test_self_influence_is_the_score_against_oneself(data, fitted, given):
    problem, kind, before = fitted
    H = fit(KINDS[kind](), problem.model, problem.rows, before, loss=problem.loss) if given else None
    several = tuple(data.draw(st.lists(dampings(), min_size=1, max_size=3))) if given else (None,)
    method = InnerProduct(before, before, H, several)
    own = collect(problem.model, problem.rows, method.against_itself(), loss=problem.loss)
    scores = score(problem.model, problem.rows, problem.rows, method=method, loss=problem.loss)
    rows = len(problem.rows)
    assert_blocks_close(own, torch.stack([part.diagonal() for part in scores.split(rows, 1)], 1), 1e-9)


@given(st.data(), fitting())
def test_cosines_in_a_curvature_lie_in_the_unit_interval_and_are_1_with_oneself(data, fitted):
    problem, kind, before = fitted
    H = fit(KINDS[kind](), problem.model, problem.rows, before, loss=problem.loss)
    damping = data.draw(dampings())
    method = InnerProduct(before, before, H, (damping,), "cosine")
    cosines = score(problem.model, problem.rows, problem.rows, method=method, loss=problem.loss)
    assert bool((cosines.abs() <= 1 + 1e-9).all())
    assert_blocks_close(cosines, cosines.T)
    rows = before(naive_blocks(problem.reference, problem.model, problem.rows))
    sizes, raw = (flat(part).norm(dim=1) for part in (precondition(H, -0.5, damping)(rows), rows))
    zero = sizes == 0
    sure = zero | (
        raw > 1e-12 * flat(naive_blocks(problem.reference, problem.model, problem.rows)).norm(dim=1)
    )
    assert_blocks_close(
        cosines.diagonal()[sure], (~zero).double()[sure]
    )  # else it is the cosine of roundings


@given(problems(min_rows=2), st.sampled_from([second_moment, shampoo, mean]))
def test_what_needs_all_blocks_of_a_row_is_not_fitted_in_parts(problem, fold):
    if len(find_sites(problem.model)) > 1:
        with pytest.raises(InputError, match="needs all blocks of a row at once"):
            fit(fold(), problem.model, problem.rows, unit_normalize(), loss=problem.loss, partitions=2)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 6), st.integers(0, 99), powers, dampings())
def test_few_rows_have_the_powers_of_their_dense_matrix(n, more, rank, seed, power, damping):
    """`f(1/n FᵀF)` by the n x n matrix; rows may depend on each other, and be zero."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(min(n, rank), n + more, generator=generator, dtype=torch.float64)
    F = torch.randn(n, len(wide), generator=generator, dtype=torch.float64) @ wide
    G = torch.cat([F, torch.randn(3, n + more, generator=generator, dtype=torch.float64)])[:, None]
    one, dense = RowSpectrum(F), dense_spectrum(F.T @ F / n)
    assume(int((one.values > 0).sum()) == int((dense.values > 0).sum()))  # one at the bound of rounding
    close = 1e-4 if damping.kind == "tikhonov" and power == -0.5 else 1e-7
    want = dense.apply(G, dense.power(power, damping))
    assert_blocks_close(one.apply(G, one.power(power, damping)), want, close)
    assert_blocks_close(one.dense(), F.T @ F / n, 1e-9)


@given(problems(("mlp",), min_rows=2), st.sampled_from([0.3, 3.0]), st.integers(1, 3))
def test_solves_that_ekfac_preconditions_are_dense_solves(problem, damping, count):
    """Conjugate gradients end there; steps are as near as their residual over the damping."""
    sites, rows = find_sites(problem.model), problem.rows
    H = fit(ekfac(), problem.model, rows, loss=problem.loss)
    inverse = precondition(H, -1.0, Damping(damping, "absolute"))
    every = params_of(problem.model)
    params = {name: every[name] for site in sites for name in site.names}
    product = fisher_product(problem.reference, params, rows)
    plain = naive_blocks(problem.reference, problem.model, rows)
    b = params_of_blocks(sites, {name: G[:count] for name, G in plain.items()})
    common = {"damping": damping, "tolerance": 1e-11,
              "preconditioner": lambda v: params_of_blocks(sites, inverse(blocks_of(sites, v)))}  # fmt: skip
    F = flat(plain)
    added = damping * torch.eye(F.shape[1], dtype=torch.float64)
    want = torch.linalg.solve(F.T @ F / len(F) + added, F[:count].T).T
    solved = cg(product, b, max_iterations=300, **common)
    assert bool(solved.converged.all())
    assert_blocks_close(flat(blocks_of(sites, solved.x)), want, 1e-8)
    for steps in (1, 8):
        found = lissa([product], b, steps=steps, **common)
        off = (flat(blocks_of(sites, found.x)) - want).norm(dim=1)
        assert bool((off <= found.residual * F[:count].norm(dim=1) / damping + 1e-9).all())
