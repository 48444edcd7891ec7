"""Every recipe against its definition, written with dense algebra on one example at a time, float64."""

import math
from dataclasses import replace

import pytest
import torch
from matrices import score
from tiny import language_model
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn import InputError, collect, project
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import gather
from gradfn.linalg.maps import random_map
from gradfn.linalg.spectrum import Damping
from gradfn.methods import RECIPES, Problem, over_checkpoints, recipe_named
from gradfn.methods.attribution import times_doubt
from gradfn.methods.exact_solve import PRECONDITIONED
from gradfn.methods.inner_product import InnerProduct, damping_names
from gradfn.methods.recipes import group_means, method_of
from gradfn.statistics import ekfac, eshampoo, kfac, second_moment, shampoo, tkfac
from gradfn.statistics.fold import fit
from gradfn.subject import Subject
from gradfn.transforms import adam, chain, compress, reseeded
from gradfn.transforms.joint import joint
from gradfn.transforms.projection import lenient, parse_projection
from gradfn.types import Rows


def problem(seed=0, **changes):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    generator = torch.Generator().manual_seed(9)
    data = [{"x": torch.randn(4, generator=generator).double(), "y": torch.tensor(i % 2)} for i in range(12)]

    def loss(params, e):
        z = functional_call(net, params, (e["x"][None],))
        return nn.functional.cross_entropy(z, e["y"][None])

    return Problem(Subject(net, loss), data[:9], data[9:], **changes)


def flat(blocks):
    return torch.cat([G.flatten(1) for G in blocks.values()], 1)


def sides(p, transform=None):
    return [
        collect(p.subject.model, part, transform or p.stage, loss=p.subject.loss)
        for part in (p.train, p.query)
    ]


def scores(name, p):
    return score(p.subject.model, p.train, p.query, method=RECIPES[name].method(p), loss=p.subject.loss)


def damped(H, c=0.1, power=-1.0):
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp_min(0)
    return vectors @ torch.diag((values + c * values.mean()) ** power) @ vectors.T


def second(rows):
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("name", ["grad_dot", "tracin"])
def test_inner_products(name):
    train, query = map(flat, sides(problem()))
    torch.testing.assert_close(scores(name, problem()), train @ query.T)


def test_cosines():
    train, query = map(flat, sides(problem()))
    torch.testing.assert_close(
        scores("grad_cosine", problem()), nn.functional.normalize(train) @ nn.functional.normalize(query).T
    )


def test_logra_block_by_block():
    p = problem(projection=project(2, "gaussian"))
    train, query = sides(p)
    expected = sum(
        train[n].flatten(1) @ damped(second(train[n].flatten(1))) @ query[n].flatten(1).T for n in train
    )
    torch.testing.assert_close(scores("logra", p), expected)


@pytest.mark.parametrize(
    ("name", "fold"),
    [("kfac", kfac), ("ekfac", ekfac), ("shampoo", shampoo), ("eshampoo", eshampoo), ("tkfac", tkfac)],
)
def test_influence_functions(name, fold):
    p = problem()
    train, query = sides(p)
    H = fit(fold(), p.subject.model, p.train, loss=p.subject.loss)
    expected = sum(train[n].flatten(1) @ damped(H[n].dense()) @ query[n].flatten(1).T for n in train)
    torch.testing.assert_close(scores(name, p), expected, rtol=1e-5, atol=1e-8)


def test_relatif():
    p = problem()
    train, query = sides(p)
    H = fit(ekfac(), p.subject.model, p.train, loss=p.subject.loss)
    inverse = {n: damped(H[n].dense()) for n in train}
    products = sum(train[n].flatten(1) @ inverse[n] @ query[n].flatten(1).T for n in train)
    norms = flat({n: train[n].flatten(1) @ inverse[n] for n in train}).norm(dim=1)
    torch.testing.assert_close(scores("relatif", p), products / norms[:, None])


def test_trackstar_mixes_and_normalises_both_sides():
    p = problem(projection=project(2), components=3)
    train, query = sides(p)
    R = {n: [second(side[n].flatten(1)) for side in (query, train)] for n in train}
    eigenvalues = [
        torch.cat([torch.linalg.eigvalsh(pair[i]) for pair in R.values()]).sort(descending=True).values
        for i in (0, 1)
    ]
    a = eigenvalues[1][2] / (eigenvalues[0][2] + eigenvalues[1][2])
    half = {n: damped(a * q + (1 - a) * t, power=-0.5) for n, (q, t) in R.items()}
    left, right = (
        nn.functional.normalize(flat({n: G.flatten(1) @ half[n] for n, G in side.items()}))
        for side in (train, query)
    )
    torch.testing.assert_close(scores("trackstar", p), left @ right.T)


def test_trak_over_checkpoints():
    """Means over checkpoints of the scores in one joint projection, and of `1 - p`."""
    expected, doubts, made = [], [], []
    for seed in (0, 1):
        p = problem(seed, projection=project(2), damping=(Damping(0.01),))
        net = p.subject.model

        def log_odds(params, e, net=net):
            p = functional_call(net, params, (e["x"][None],)).softmax(-1)[0, e["y"]]
            return -(p / (1 - p)).log()

        p = Problem(
            Subject(p.subject.model, log_odds), p.train, p.query, projection=p.projection, damping=p.damping
        )
        train, query = map(flat, sides(p))
        expected.append(train @ damped(second(train), 0.01) @ query.T)
        chances = torch.stack([net(e["x"]).softmax(-1)[e["y"]] for e in p.train])
        doubts.append((1 - chances).detach())

        method = RECIPES["trak"].method(p)
        queries = collect(p.subject.model, p.query, method.query_transform, loss=p.subject.loss)
        made.append(gather(probe_engine(p.subject.model, p.subject.loss, method.against(queries)), p.train))
    whole = torch.stack(expected).mean(0) * torch.stack(doubts).mean(0)[:, None]
    torch.testing.assert_close(RECIPES["trak"].combine(made, [0.5, 0.5]), whole.float(), check_dtype=False)


def test_a_row_that_the_model_is_sure_of_keeps_its_score():
    """1 - p = exp(-110) is no number of float32, and the product is one."""
    sure = Rows(torch.tensor([[1e20]]), torch.tensor([-110.0]))
    expected = torch.tensor([[1e20 * math.exp(-110)]])
    torch.testing.assert_close(times_doubt([sure, sure], [0.5, 0.5]), expected, rtol=1e-5, atol=0.0)


def test_checkpoints_have_projections_of_their_own():
    """The mean over checkpoints of `<P_m g, P_m q>`, where only the first P is that of the seed."""
    parts = [problem(seed, projection=project(2, seed=5)) for seed in (0, 1, 2)]
    subjects = [p.subject for p in parts]
    joined = over_checkpoints(
        "grad_dot", subjects, parts[0].train, parts[0].query, projection=project(2, seed=5)
    )
    expected, maps = [], [reseeded(project(2, seed=5), number) for number in range(3)]
    for p, P in zip(parts, maps, strict=True):
        train, query = map(flat, sides(p, P))
        expected.append(train @ query.T)
    assert maps[0] == chain(project(2, seed=5))
    assert len({stage.seed for one in maps for stage in one.stages}) == 3
    p = parts[0]
    made = gf.score(subjects[0], p.train, p.query, method=joined).matrix
    torch.testing.assert_close(made, torch.stack(expected).mean(0).float(), check_dtype=False)


def test_projections_of_their_own_average_out():
    """32 checkpoints that are the same model: the error of the mean falls like that of 32 projections."""
    p = problem()
    train, query = map(flat, sides(p))
    asked = ([p.subject] * 32, p.train, p.query)
    errors = [
        (gf.score(p.subject, p.train, p.query, method=method).matrix - train @ query.T).norm()
        for method in (
            over_checkpoints("grad_dot", *asked, projection=project(1)),
            gf.grad_dot(project(1)),
        )
    ]
    assert errors[0] < errors[1] / 3


def test_trak_with_a_projection_of_the_whole_gradient():
    p = problem(projection=chain(joint(), compress(7, "sjlt")))
    train, query = map(flat, sides(problem()))
    name, width = "all", train.shape[1]
    sketch = random_map("sjlt", 0, name, "flat", (7, width)).dense(torch.float64)
    train, query = train @ sketch.T, query @ sketch.T
    torch.testing.assert_close(scores("trak", p), train @ damped(second(train)) @ query.T)


def test_less_normalises_training_rows_alone_and_takes_the_best_group():
    p = problem()
    moments = {n: G.square().mean(0) for n, G in sides(p)[0].items()}
    p = problem(normalize=adam(moments), projection=project(2))
    train = flat(sides(p)[0])
    query = sides(p, chain(p.projection))[1]
    groups, names = group_means(query, ["a", "b", "a"])
    assert names == ["a", "b"]
    method = RECIPES["less"].method(p)

    got = gather(probe_engine(p.subject.model, p.subject.loss, method.against(groups)), p.train)
    rows = torch.stack([(query["0"][[0, 2]].mean(0)), query["0"][1]]).flatten(1)
    torch.testing.assert_close(groups["0"].flatten(1), rows)
    cosines = nn.functional.normalize(train) @ nn.functional.normalize(flat(groups)).T
    torch.testing.assert_close(RECIPES["less"].combine([got], [2.0]), 2 * cosines.amax(1, keepdim=True))


def test_datainf():
    p = problem()
    train, query = sides(p)
    expected = 0
    for name in train:
        rows, asked = train[name].flatten(1), query[name].flatten(1)
        c = 0.1 * rows.square().mean()
        inverse = sum(torch.linalg.inv(c * torch.eye(rows.shape[1]) + torch.outer(g, g)) for g in rows) / len(
            rows
        )
        expected = expected + rows @ inverse @ asked.T
    torch.testing.assert_close(scores("datainf", p), expected)


def test_a_curvature_that_was_fitted_before_is_taken():
    p = problem()
    H = fit(ekfac(), p.subject.model, p.query, loss=p.subject.loss)
    given = problem(curvature=H)
    train, query = sides(p)
    expected = sum(train[n].flatten(1) @ damped(H[n].dense()) @ query[n].flatten(1).T for n in train)
    torch.testing.assert_close(scores("kfac", given), expected)
    torch.testing.assert_close(scores("ekfac", given), expected)


def test_several_dampings_at_once():
    several = scores("ekfac", problem(damping=(Damping(0.1), Damping(1.0))))
    torch.testing.assert_close(several[:, 3:], scores("ekfac", problem(damping=(Damping(1.0),))))


def test_one_of_your_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import gradfn as gf\n"
        "from gradfn.statistics import kfac\n"
        "from gradfn.methods import influence, Recipe\n"
        "def mine(problem):\n"
        "    return influence(problem.fit(kfac()), problem.stage, damping=problem.damping)\n"
        "full = Recipe(mine, projection='none')\n"
    )
    p = problem()
    for name in ("mine", "full"):
        method = recipe_named(f"{path}:{name}").method(p)
        assert isinstance(method, InnerProduct)
        torch.testing.assert_close(
            score(p.subject.model, p.train, p.query, method=method, loss=p.subject.loss), scores("kfac", p)
        )
    assert recipe_named(f"{path}:full").projection == "none"
    with pytest.raises(InputError, match="has no recipe other"):
        recipe_named(f"{path}:other")


def test_trak_refuses_weights_without_a_mean():
    rows = Rows(torch.ones(2, 1), torch.zeros(2))
    with pytest.raises(InputError, match="sum above 0"):
        RECIPES["trak"].combine([rows, rows], [1.0, -1.0])


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"no method 'best': choose grad_dot, .*FILE\.py:NAME"):
        recipe_named("best")
    with pytest.raises(InputError, match=r"no file nowhere\.py"):
        recipe_named("nowhere.py:mine")


def test_the_damping_of_datainf_divides_the_scores_until_it_is_as_large_as_a_block():
    def scaled(damping):
        return damping * scores("datainf", problem(damping=(Damping(damping),)))

    torch.testing.assert_close(scaled(1e-6), scaled(1e-4), rtol=1e-3, atol=1e-3 * scaled(1e-4).abs().max())
    train, query = sides(problem())
    plain = sum(train[n].flatten(1) @ query[n].flatten(1).T / train[n].square().mean() for n in train)
    torch.testing.assert_close(scaled(1e8), plain, rtol=1e-4, atol=0.0)
    assert not torch.allclose(scaled(1e-4), plain, rtol=0.1)


def test_datainf_takes_one_relative_damping():
    for damping in ((Damping(0.1), Damping(1.0)), (Damping(0.1, "absolute"),)):
        with pytest.raises(InputError, match="one relative damping"):
            scores("datainf", problem(damping=damping))


def test_shampoo_second_moment_and_labels_of_the_model():
    """Drawn labels need a loss whose labels are known."""
    with pytest.raises(InputError, match="labels are drawn"):
        scores("ekfac", problem(labels="model"))
    assert second_moment().gives_curvature


OF_TRAININGS = ("source", "inrun", "magic")


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name not in ("trak", "lissa", *PRECONDITIONED, *OF_TRAININGS)]
)
def test_a_method_by_its_name(name):
    p = problem()
    p = replace(p, projection=lenient(parse_projection(RECIPES[name].projection)))
    got = gf.score(p.subject, p.train, p.query, method=name)
    made = RECIPES[name].method(p)
    expected = gf.score(p.subject, p.train, p.query, method=made).values
    if name == "less":
        expected = expected.amax(2, keepdim=True)
    torch.testing.assert_close(got.values, expected)
    assert got.dampings == damping_names(made)


def test_names_that_cannot_be_taken():
    p, rows = problem(), {"root": torch.zeros(1, 2)}
    for asked, query, words in (
        ("ekfak", p.query, "no method 'ekfak': choose grad_dot"),
        ("ekfac", rows, "takes queries and not their gradients"),
        ("source", p.query, "make it with gf.methods.source"),
    ):
        with pytest.raises(InputError, match=words):
            method_of(asked, p.subject, p.train, query)
    model = language_model("llama")
    with pytest.raises(InputError, match="trak takes the loss log_odds and not cross_entropy"):
        method_of("trak", gf.Subject(model), [], [])
    whole = gf.causal_lm_loss(model, "sum", criterion="log_odds")
    with pytest.raises(InputError, match="take a loss with the mean over tokens"):
        method_of("trak", gf.Subject(model, whole), [], [])
