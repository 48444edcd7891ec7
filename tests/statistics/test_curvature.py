"""Curvatures against dense algebra on one example at a time, float64."""

import pytest
import torch
from tiny import language_model
from torch import nn
from torch.func import functional_call

from gradfn import InputError, View, chain, collect, fit, influence, project, score
from gradfn.linalg.rows import RowSpectrum
from gradfn.linalg.spectrum import Damping
from gradfn.model import params_of
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import blocks_of, find_sites
from gradfn.statistics import ekfac, eshampoo, kfac, mix, mixing_coefficient, second_moment, shampoo, tkfac
from gradfn.statistics.curvature import Curvature, dense_spectrum, product_spectrum
from gradfn.transforms import adam, unit_normalize
from gradfn.transforms.precondition import precondition

FOLDS = {
    "second_moment": second_moment, "kfac": kfac, "ekfac": ekfac, "shampoo": shampoo, "eshampoo": eshampoo,
    "tkfac": tkfac,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, conv: bool = False):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2, padding=1, stride=2) if conv else None
        self.first, self.last = nn.Linear(9 if conv else 4, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x if self.conv is None else self.conv(x).flatten(-2))))


def net_and_data(rows=6, conv=False, seed=0):
    torch.manual_seed(seed)
    net = Net(conv).double()
    shape = (2, 4) if conv else (4,)
    data = [{"x": torch.randn(shape).double(), "y": torch.tensor(i % 2)} for i in range(rows)]

    def loss(params, e):
        logits = functional_call(net, params, (e["x"][None],))[0]
        return nn.functional.cross_entropy(logits, e["y"])

    return net, data, loss


def lm_and_data(rows=16):
    model = language_model("gpt_neox")
    generator = torch.Generator().manual_seed(3)
    data = []
    for i in range(rows):
        ids = torch.randint(11, (4 + i % 3,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 2] = -100
        data.append({"input_ids": ids, "labels": labels})
    return model, data, causal_lm_loss(model)


def naive_blocks(model, data, loss, view=None):
    """Every example's dense gradient, block by block, `[rows, out, in]`."""
    sites, rows = find_sites(model, view or View()), []
    for example in data:
        params = {name: p.clone().requires_grad_() for name, p in params_of(model).items()}
        grads = torch.autograd.grad(loss(params, example), list(params.values()), materialize_grads=True)
        rows.append(blocks_of(sites, {n: g[None] for n, g in zip(params, grads, strict=True)}))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def naive_factors(model, data, loss):
    """Per example and block the factors `x [positions, in]` and `g [positions, out]` that are supervised."""
    sites = find_sites(model, View())
    out = {site.block: [] for site in sites}
    for example in data:
        kept = {}

        def hook(module, args, y, path=None, kept=kept):
            y.retain_grad()
            kept[path] = (args[0].detach(), y)

        handles = [
            site.module.register_forward_hook(lambda m, a, y, p=site.block: hook(m, a, y, p))
            for site in sites
        ]
        value = loss({n: p.clone().requires_grad_() for n, p in params_of(model).items()}, example)
        value.backward()
        for handle in handles:
            handle.remove()
        at = slice(None)
        if "labels" in example:
            at = torch.tensor([*(example["labels"][1:] != -100).tolist(), False])
        for site in sites:
            x, y = kept[site.block]
            g = y.grad
            if isinstance(site.module, nn.Conv1d):
                conv = site.module
                x = nn.functional.pad(x, (1, 1)).unfold(-1, 2, 2).movedim(1, 2).flatten(-2).flatten(0, 1)
                g = g.mT.flatten(0, 1)
                assert conv.stride == (2,)
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            x, g = (x[at], g[at]) if "labels" in example else (x, g)
            if site.layer.bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            out[site.block].append((x, g))
    return out


def naive(kind, model, data, loss, transform=None):
    """`{block: dense curvature}` from its definition."""
    G = naive_blocks(model, data, loss)
    G = transform(G) if transform else G
    N = len(data)
    if kind == "second_moment":
        return {n: sum(torch.outer(r.flatten(), r.flatten()) for r in rows) / N for n, rows in G.items()}
    if kind == "shampoo":
        return {
            n: torch.kron(root(sum(r @ r.T for r in rows) / N), root(sum(r.T @ r for r in rows) / N))
            for n, rows in G.items()
        }
    if kind == "eshampoo":
        return {
            n: measured(rows, sum(r @ r.T for r in rows), sum(r.T @ r for r in rows)) for n, rows in G.items()
        }
    dense = {}
    for name, pairs in naive_factors(model, data, loss).items():
        x, g = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        T = len(x)
        A, S = x.T @ x / T, g.T @ g / T
        if kind == "kfac":
            dense[name] = torch.kron(S, A) * T / N
        elif kind == "ekfac":
            dense[name] = measured(G[name], S, A)
        else:
            terms = [(x.T @ x, g.T @ g, len(x)) for x, g in pairs]
            right = sum(S.trace() * A / t for A, S, t in terms)
            left = sum(A.trace() * S / t for A, S, t in terms)
            both = sum(A.trace() * S.trace() / t for A, S, t in terms)
            dense[name] = torch.kron(left, right) / both / N
    return dense


def measured(rows, left, right):
    """The eigenvectors of two factors, with the mean square of the rows along each."""
    Q = torch.kron(*(torch.linalg.eigh(factor).eigenvectors for factor in (left, right)))
    values = sum((Q.T @ r.flatten()).square() for r in rows) / len(rows)
    return Q @ torch.diag(values) @ Q.T


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def tolerance(kind, expected):
    """The root of an eigenvalue that is rounding, 1e-17, is no rounding any more, 3e-9."""
    return {"rtol": 1e-9, "atol": float(expected.abs().max()) * (1e-7 if kind == "shampoo" else 1e-11)}


CASES = {
    "mlp": lambda: net_and_data(),
    "conv": lambda: net_and_data(conv=True),
    "lm": lm_and_data,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", FOLDS)
def test_equal_to_the_definition(kind, case):
    model, data, loss = CASES[case]()
    transform = project(3) if kind == "second_moment" else None
    fitted = fit(FOLDS[kind](), model, data, transform, loss=loss)
    assert (fitted.kind, fitted.rows) == (kind, len(data))
    for name, expected in naive(kind, model, data, loss, transform).items():
        torch.testing.assert_close(fitted[name].dense(), expected, **tolerance(kind, expected))


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("case", ["mlp", "lm"])
def test_batches_and_partitions_change_nothing(kind, case):
    model, data, loss = CASES[case]()
    transform = project(3) if kind == "second_moment" else None
    whole = fit(FOLDS[kind](), model, data, transform, loss=loss)
    blocks = len(whole)
    for size, partitions in ((1, 1), (13, 2), (8192, blocks)):
        other = fit(
            FOLDS[kind](), model, data, transform, loss=loss, token_batch_size=size, partitions=partitions
        )
        assert list(other) == list(whole)
        for name in whole:
            expected = whole[name].dense()
            torch.testing.assert_close(other[name].dense(), expected, **tolerance(kind, expected))


def test_kfac_of_projected_factors():
    model, data, loss = net_and_data()
    both = fit(kfac(), model, data, project(2), loss=loss)
    full = naive("kfac", model, data, loss)
    for site in find_sites(model, View()):
        kron = project(2).kron(site.spec).dense(site.spec.shape)
        torch.testing.assert_close(both[site.block].dense(), kron @ full[site.block] @ kron.T)


def test_kfac_is_the_fisher_where_inputs_and_gradients_are_independent():
    net = nn.Linear(2, 2, bias=False).double()
    xs, gs = torch.randn(3, 2).double(), torch.randn(4, 2).double()
    data = [{"x": x, "g": g} for x in xs for g in gs]

    def loss(params, e):
        return (functional_call(net, params, (e["x"][None],))[0] * e["g"]).sum()

    fitted = fit(kfac(), net, data, loss=loss)["root"].dense()
    exact = fit(second_moment(), net, data, loss=loss)["root"].dense()
    torch.testing.assert_close(fitted, exact)


@pytest.mark.parametrize("kind", ["ekfac", "eshampoo", "tkfac"])
def test_the_trace_is_the_fishers(kind):
    model, data, loss = net_and_data()
    fitted = fit(FOLDS[kind](), model, data, loss=loss)
    exact = fit(second_moment(), model, data, loss=loss)
    for name in fitted:
        torch.testing.assert_close(fitted[name].values.sum(), exact[name].values.sum())


def test_empirical_fisher_of_a_linear_softmax_model_in_closed_form():
    net = nn.Linear(3, 4, bias=False).double()
    xs, ys = torch.randn(7, 3).double(), torch.arange(7) % 4

    def loss(params, e):
        return nn.functional.cross_entropy(functional_call(net, params, (e["x"][None],)), e["y"][None])

    fitted = fit(second_moment(), net, [{"x": x, "y": y} for x, y in zip(xs, ys, strict=True)], loss=loss)
    errors = (xs @ net.weight.T).softmax(-1) - nn.functional.one_hot(ys, 4)
    rows = torch.einsum("bo,bi->boi", errors, xs).flatten(1)
    torch.testing.assert_close(fitted["root"].dense(), (rows.T @ rows / 7).detach())


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("damping", [0.1, Damping(0.01, "absolute"), Damping(0.5, "tikhonov")])
def test_preconditioned_rows(kind, power, damping):
    """`H^power g` with damping, compared with dense algebra; eigenvectors are never compared."""
    model, data, loss = net_and_data()
    transform = project(3) if kind == "second_moment" else chain()
    H = fit(FOLDS[kind](), model, data, transform, loss=loss)
    rows = collect(model, data, chain(transform, precondition(H, power, damping)), loss=loss)
    plain = transform(naive_blocks(model, data, loss))
    for name, dense in naive(kind, model, data, loss, transform if kind == "second_moment" else None).items():
        values, vectors = torch.linalg.eigh(dense)
        values = values.clamp_min(0)
        if isinstance(damping, float):
            inverse = 1 / (values + damping * values.mean())
        elif damping.kind == "absolute":
            inverse = 1 / (values + damping.value)
        else:
            inverse = values / (values**2 + (damping.value * values.mean()) ** 2)
        applied = plain[name].flatten(1) @ vectors @ torch.diag(inverse**-power) @ vectors.T
        torch.testing.assert_close(
            rows[name].flatten(1), applied, rtol=1e-6 if kind == "shampoo" else 1e-8, atol=1e-9
        )


def test_zero_and_one_by_one_blocks():
    zero = dense_spectrum(torch.zeros(1, 1).double())
    assert zero.power(-1.0, Damping(0.1)).tolist() == [[0.0]]
    one = dense_spectrum(torch.full((1, 1), 4.0).double())
    assert one.power(-0.5).tolist() == [[0.5]]


def test_rank_deficient_without_damping_is_the_pseudo_inverse():
    rows = torch.randn(2, 5).double()
    H = rows.T @ rows
    spectrum = dense_spectrum(H)
    filtered = spectrum.power(-1.0, Damping(1e-9, "truncated"))
    inverse = spectrum.apply(torch.eye(5).double()[:, None], filtered)[:, 0]
    torch.testing.assert_close(inverse, torch.linalg.pinv(H), rtol=1e-8, atol=1e-10)


def test_factored_damping():
    torch.manual_seed(0)
    S, A = (m @ m.T for m in (torch.randn(2, 2).double(), torch.randn(3, 3).double()))
    spectrum = product_spectrum(S, A)
    gamma = 0.3 * torch.kron(S, A).diagonal().mean()
    pi = ((A.trace() / 3) / (S.trace() / 2)).sqrt()
    damped = torch.kron(S + gamma.sqrt() / pi * torch.eye(2), A + pi * gamma.sqrt() * torch.eye(3))
    weights = spectrum.power(-1.0, Damping(0.3, "factored"))
    G = torch.randn(1, 2, 3).double()
    expected = torch.linalg.solve(damped, G.flatten())
    torch.testing.assert_close(spectrum.apply(G, weights).flatten(), expected)
    with pytest.raises(InputError, match="product of two factors"):
        dense_spectrum(A).power(-1.0, Damping(0.3, "factored"))


@pytest.mark.parametrize("kind", ["second_moment", "kfac"])
def test_mixing_is_linear_and_like_fitting_both(kind):
    model, data, loss = net_and_data(rows=8)
    a, b = (fit(FOLDS[kind](), model, part, loss=loss) for part in (data[:2], data[2:]))
    both = fit(FOLDS[kind](), model, data, loss=loss)
    mixed = mix(a, b, 0.25)
    assert mixed.rows == 8
    for name in both:
        torch.testing.assert_close(mixed[name].dense(), both[name].dense())


def test_mixing_refuses_two_eigenbases():
    model, data, loss = net_and_data()
    H = fit(ekfac(), model, data, loss=loss)
    with pytest.raises(InputError, match="two eigenbases"):
        mix(H, H, 0.5)
    with pytest.raises(InputError, match="do not mix"):
        mix(H, fit(kfac(), model, data, loss=loss), 0.5)


def values_of(*numbers):
    return Curvature("second_moment", {"a": dense_spectrum(torch.diag(torch.tensor(numbers).double()))}, 1)


def test_mixing_coefficient_and_its_edges():
    query, train = values_of(4.0, 3.0, 1.0), values_of(9.0, 1.0, 0.5)
    assert mixing_coefficient(query, train, 2) == pytest.approx(1.0 / (3.0 + 1.0))
    assert mixing_coefficient(query, train, 1000) == pytest.approx(0.5 / 1.5)
    assert mixing_coefficient(values_of(1.0, 0.0), values_of(1.0, 1.0), 2) == 1.0
    assert mixing_coefficient(values_of(0.0), values_of(0.0), 1) == 0.5
    with pytest.raises(InputError, match="1 or more"):
        mixing_coefficient(query, train, 0)


def test_only_projections_come_before_factors():
    model, data, loss = net_and_data()
    moments = {site.block: torch.ones(site.spec.shape) for site in find_sites(model, View())}
    with pytest.raises(InputError, match="cannot come before"):
        fit(kfac(), model, data, adam(moments), loss=loss)


def test_layers_without_factors_are_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()

    def loss(params, e):
        return functional_call(net, params, (e["x"][None],)).square().sum()

    with pytest.raises(InputError, match=r"^1 has no input and output gradient"):
        fit(kfac(), net, [{"x": torch.randn(3).double()}], loss=loss, view=View(include=("*",)))


@pytest.mark.parametrize("count", [0, 4])
def test_bad_partitions(count):
    model, data, loss = net_and_data()
    with pytest.raises(InputError, match=r"partitions of 2 blocks"):
        fit(kfac(), model, data, loss=loss, partitions=count)


def test_nothing_supervised():
    model, data, loss = lm_and_data()
    for example in data:
        example["labels"][:] = -100
    with pytest.raises(InputError, match=r"no position of .* is supervised"):
        fit(kfac(), model, data, loss=loss)


def test_sums_too_large_for_memory_are_refused_before_the_pass(monkeypatch):
    model, data, _ = net_and_data()
    monkeypatch.setattr(
        "gradfn.statistics.fold.state_bytes", lambda fold, engine: {"first": 3 << 40, "last": 1 << 40}
    )

    def never(*args):
        raise AssertionError("the pass was begun")

    with pytest.raises(InputError, match=r"4096\.0 GiB"):
        fit(kfac(), model, data, loss=never)


@pytest.mark.parametrize("live", [[1, 3], [], [0, 1, 2, 3, 4]])
def test_coordinates_without_anything_are_their_own_eigenvectors(live):
    matrix = torch.zeros(5, 5).double()
    rows = torch.randn(3, len(live)).double()
    for i, row in enumerate(live):
        matrix[row, live] = (rows.T @ rows)[i]
    spectrum = dense_spectrum(matrix)
    torch.testing.assert_close(spectrum.dense(), matrix)
    torch.testing.assert_close(spectrum.right.T @ spectrum.right, torch.eye(5).double())


@pytest.mark.parametrize("last", [project((2, 3)), project(2, "sjlt"), chain(project(2), unit_normalize())])
@pytest.mark.parametrize("make", [second_moment, shampoo])
def test_sums_of_what_a_stage_behind_an_elementwise_one_makes_narrower(make, last):
    net, data, loss = net_and_data()
    moments = {n: torch.rand(G.shape[1:]).double() + 1 for n, G in collect(net, data, loss=loss).items()}
    before, fold = chain(adam(moments), last), make()
    rows = collect(net, data, before, loss=loss)
    want = fold.finalize(fold.update(fold.init(), rows))
    got = fit(fold, net, data, before, loss=loss, token_batch_size=2)
    for name, one in want.items():
        torch.testing.assert_close(got[name].dense(), one.dense(), rtol=1e-6, atol=1e-9)


# --- fewer rows than numbers


@pytest.mark.parametrize("norm", ["none", "cosine", "relative"])
def test_fewer_rows_than_numbers_give_the_same_scores(norm, monkeypatch):
    model, data, loss = net_and_data()
    data, queries, common = data[:4], data[4:6], {"loss": loss}
    H = fit(second_moment(), model, data, project(3), **common)
    monkeypatch.setattr(type(second_moment()), "few_numbers", 1)
    few = fit(second_moment(), model, data, project(3), **common)
    assert {type(one) for one in few.values()} == {RowSpectrum}
    assert (few.kind, few.rows, list(few)) == (H.kind, H.rows, list(H))
    dampings = (Damping(0.1), Damping(1e-3, "truncated"), None)
    methods = [influence(made, project(3), damping=dampings, norm=norm) for made in (few, H)]
    one, other = (score(model, data, queries, method=method, **common).values for method in methods)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
    if norm == "none":
        one, other = (score(model, data, None, method=method, **common).values for method in methods)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_as_many_rows_as_numbers_are_summed(monkeypatch):
    monkeypatch.setattr(type(second_moment()), "few_numbers", 1)
    model, data, loss = net_and_data()
    many = fit(second_moment(), model, data * 9, project(2), loss=loss)
    parts = fit(second_moment(), model, data[:2], project(2), loss=loss, partitions=2)
    assert not any(isinstance(one, RowSpectrum) for H in (many, parts) for one in H.values())
