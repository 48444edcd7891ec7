import pytest
import torch
from matrices import score
from tiny import language_model

from gradfn.data import make_documents
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.methods import grad_cosine, grad_dot
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.scoring import best, dots, rerank
from gradfn.model.sites import View
from gradfn.scores import TopK, extremes
from gradfn.statistics import ekfac, kfac, second_moment
from gradfn.statistics.fold import fit
from gradfn.testing import assert_blocks_close
from gradfn.testing.strategies import randomize, squared_error
from gradfn.transforms import chain, dot, project, unit_normalize
from gradfn.transforms.precondition import precondition

MODEL = randomize(torch.nn.Linear(2, 1), 0)
LOSS = squared_error(MODEL)
ROWS = [
    {"x": torch.randn(2, dtype=torch.float64), "y": torch.zeros(1, dtype=torch.float64)} for _ in range(5)
]


def test_scores_are_rows_by_queries_and_follow_the_given_queries():
    scores = score(MODEL, ROWS, ROWS[:2], method=grad_dot(), loss=LOSS)
    assert scores.shape == (5, 2)
    assert_blocks_close(score(MODEL, ROWS, ROWS[1:2], method=grad_dot(), loss=LOSS), scores[:, 1:])


def test_queries_may_have_another_loss():
    twice = score(MODEL, ROWS, ROWS, method=grad_dot(), loss=LOSS, query_loss=lambda p, e: 2 * LOSS(p, e))
    assert_blocks_close(twice, 2 * score(MODEL, ROWS, ROWS, method=grad_dot(), loss=LOSS))


def test_a_row_scores_itself_with_its_squared_norm():
    assert bool((score(MODEL, ROWS, ROWS, method=grad_dot(), loss=LOSS).diagonal() > 0).all())


def test_a_query_transform_that_gives_scores_is_refused():
    ending = dot({"root": torch.ones(1, 1, 3).double()})
    with pytest.raises(TypeError, match="must give blocks"):
        score(MODEL, ROWS, ROWS, method=InnerProduct(chain(), ending), loss=LOSS)


class Scaled(torch.nn.Module):
    """Sequences of ids through layers that score from the dense block, from the factors, and by ids."""

    def __init__(self):
        super().__init__()
        self.ids, self.long, self.wide = (
            torch.nn.Embedding(7, 3),
            torch.nn.Linear(3, 2),
            torch.nn.Linear(2, 40),
        )

    def forward(self, ids):
        return self.wide(self.long(self.ids(ids)).tanh()).cumsum(-2)


@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e-19, 1e18])
@pytest.mark.parametrize("method", [grad_cosine(), grad_cosine(project(2))])
def test_a_cosine_is_the_same_at_every_scale_of_the_gradient(scale, method):
    rows = [{"ids": torch.randint(0, 7, (5,)), "scale": torch.tensor(s)} for s in (1.0, scale, 1.0, scale)]
    found = []
    for dtype in (torch.float32, torch.float64):
        model = randomize(Scaled(), 0).to(dtype)
        weights = torch.linspace(-1, 2, 40, dtype=dtype)

        def loss(params, example, model=model, weights=weights, dtype=dtype):
            y = torch.func.functional_call(model, params, example["ids"][None])
            return (y * weights).sum() * example["scale"].to(dtype)

        view = View(include=["*"])
        found.append(score(model, rows, rows[:2], method=method, loss=loss, view=view).double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_globs_hold_on_both_sides():
    model = randomize(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), 0)
    loss = squared_error(model)
    parts = [
        score(model, ROWS, ROWS, method=grad_dot(), loss=loss, view=view)
        for view in (View(include=["0"]), View(exclude=["0"]))
    ]
    assert_blocks_close(parts[0] + parts[1], score(model, ROWS, ROWS, method=grad_dot(), loss=loss))


def test_progress_counts_the_training_rows():
    seen = []
    score(MODEL, ROWS, ROWS[:2], method=grad_cosine(), loss=LOSS, token_batch_size=2, progress=seen.append)
    assert sum(seen) == 5


@pytest.mark.parametrize(("rows", "queries"), [
    ({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}),
    ({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, {"a": torch.ones(1, 2)}),
    ({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}),
])  # fmt: skip
def test_rows_and_queries_of_different_blocks_are_refused(rows, queries):
    with pytest.raises(InputError, match="same"):
        dots(rows, queries)


@pytest.mark.parametrize("method", [grad_dot(), grad_cosine()])
@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("budget", [1, 2, 100])
def test_the_best_rows_are_those_of_the_whole_matrix(method, k, budget):
    rows = [*ROWS, *ROWS[:2]]
    want = extremes([score(MODEL, rows, ROWS[:3], method=method, loss=LOSS)], k)
    got = best(MODEL, rows, ROWS[:3], k, method=method, loss=LOSS, token_batch_size=budget)
    for ours, theirs in zip(got, want, strict=True):
        # The last two rows are the first two again, and in other batches the last bit of a cosine may differ.
        assert torch.equal(ours.rows % len(ROWS), theirs.rows % len(ROWS))
        assert_blocks_close(ours.scores, theirs.scores)


@pytest.mark.parametrize("budget", [1, 8, 100])
def test_the_best_tokens_are_those_of_the_whole_matrix(budget):
    model, view = language_model("gpt2"), View(tokens=True)
    data = make_documents([[1, 2], [3, 4, 5, 6], [], [7, 8, 9], [1, 2]])
    options = {"method": grad_dot(), "view": view, "token_batch_size": budget}
    want = extremes([score(model, data, data.select([1, 3]), **options)], 4)
    for ours, theirs in zip(best(model, data, data.select([1, 3]), 4, **options), want, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        assert_blocks_close(ours.scores, theirs.scores)


@pytest.mark.parametrize("method", [grad_dot(), grad_cosine()])
def test_the_shares_of_the_blocks_sum_to_the_score(method):
    model = randomize(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), 0)
    loss = squared_error(model)
    shares = score(model, ROWS, ROWS[:2], method=method, loss=loss, by_block=True)
    assert list(shares) == ["0", "1"]
    assert_blocks_close(shares["0"] + shares["1"], score(model, ROWS, ROWS[:2], method=method, loss=loss))


@pytest.mark.parametrize(("change", "message"), [
    ({"k": 0}, "top must be 1 or more"),
    ({"train": []}, "no rows"),
    ({"view": View(tokens=True)}, "view them by example"),
])  # fmt: skip
def test_best_rows_that_cannot_be_are_refused(change, message):
    options = {"train": ROWS, "k": 1, "view": None} | change
    with pytest.raises(InputError, match=message):
        best(MODEL, options["train"], ROWS, options["k"], method=grad_dot(), loss=LOSS, view=options["view"])


class TestCurvature:
    """A method with a curvature against its definition: preconditioned dense rows."""

    @pytest.fixture
    def case(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()

        def loss(params, e):
            z = torch.func.functional_call(net, params, (e["x"][None],))
            return torch.nn.functional.cross_entropy(z, e["y"][None])

        data = [{"x": torch.randn(4).double(), "y": torch.tensor(i % 2)} for i in range(9)]
        return net, loss, data[:6], data[6:]

    @pytest.mark.parametrize("kind", [kfac, ekfac, second_moment])
    @pytest.mark.parametrize("norm", ["none", "cosine", "relative"])
    def test_equal_to_preconditioned_rows(self, case, kind, norm):
        net, loss, train, query = case
        H = fit(kind(), net, train, loss=loss)
        dampings = (Damping(0.1), Damping(0.01, "absolute"), Damping(1.0))
        got = score(net, train, query, method=InnerProduct(chain(), chain(), H, dampings, norm), loss=loss)
        assert got.shape == (6, 9)
        rows, queries = (collect(net, part, loss=loss) for part in (train, query))
        for i, damping in enumerate(dampings):
            if norm == "cosine":
                both = chain(precondition(H, -0.5, damping), unit_normalize())
                expected = dots(both(rows), both(queries))
            else:
                inverse = precondition(H, -1.0, damping)
                expected = dots(rows, inverse(queries))
                if norm == "relative":
                    flat = torch.cat([G.flatten(1) for G in inverse(rows).values()], 1)
                    expected = expected / flat.norm(dim=1)[:, None]
            torch.testing.assert_close(got[:, 3 * i : 3 * i + 3], expected, rtol=1e-8, atol=1e-10)

    def test_one_side_is_both_sides(self, case):
        net, loss, train, query = case
        H = fit(ekfac(), net, train, loss=loss)
        rows, queries = (collect(net, part, loss=loss) for part in (train, query))
        half = precondition(H, -0.5)
        one = score(net, train, query, method=InnerProduct(chain(), chain(), H), loss=loss)
        torch.testing.assert_close(one, dots(half(rows), half(queries)))

    def test_shares_by_block_sum_to_the_score(self, case):
        net, loss, train, query = case
        H = fit(kfac(), net, train, loss=loss)
        method = InnerProduct(chain(), chain(), H, (Damping(0.1), Damping(1.0)), "cosine")
        shares = score(net, train, query, method=method, loss=loss, by_block=True)
        torch.testing.assert_close(sum(shares.values()), score(net, train, query, method=method, loss=loss))

    def test_a_zero_query_scores_zero(self, case):
        net, loss, train, _ = case
        H = fit(kfac(), net, train, loss=loss)
        zero = {
            name: torch.zeros(1, *G.shape[1:]).double() for name, G in collect(net, train, loss=loss).items()
        }
        for norm in ("none", "cosine", "relative"):
            scorer = InnerProduct(chain(), chain(), H, norm=norm).against(zero)
            assert not scorer(collect(net, train, loss=loss)).any()

    def test_dampings_without_a_curvature_are_refused(self):
        with pytest.raises(InputError, match="several dampings need a curvature"):
            InnerProduct(chain(), chain(), damping=(Damping(0.1), Damping(1.0)))
        with pytest.raises(InputError, match="one damping or more"):
            InnerProduct(chain(), chain(), damping=())

    @pytest.mark.parametrize("kind", [None, ekfac, second_moment])
    def test_self_influence(self, case, kind):
        net, loss, train, _ = case
        H = None if kind is None else fit(kind(), net, train, loss=loss)
        dampings = (Damping(0.1),) if H is None else (Damping(0.1), Damping(1.0))
        scorer = InnerProduct(chain(), chain(), H, dampings).against_itself()
        got = collect(net, train, scorer, loss=loss)
        rows = collect(net, train, loss=loss)
        for i, damping in enumerate(dampings):
            there = rows if H is None else precondition(H, -1.0, damping)(rows)
            torch.testing.assert_close(got[:, i], dots(rows, there).diagonal())


def test_candidates_are_ranked_by_the_full_method():
    model = language_model("llama")
    data = make_documents([[i % 11, (3 * i + 1) % 11, (i * i) % 11, 5] for i in range(12)])
    method, queries = grad_cosine(), data.select([1, 3, 4])
    every = score(model, data, queries, method=method)
    first = best(model, data, queries, 4, method=grad_dot(project(2)))
    got = rerank(first, model, data, queries, 3, method=method)
    for query in range(3):
        own = torch.cat([found.rows[query] for found in first]).unique()
        for found, descending in zip(got, (True, False), strict=True):
            order = every[own, query].argsort(descending=descending)[:3]
            assert found.rows[query].tolist() == own[order].tolist()
            torch.testing.assert_close(found.scores[query], every[own[order], query])


def test_all_rows_as_candidates_are_the_whole_ranking():
    candidates = TopK(torch.zeros(2, 5), torch.arange(5).expand(2, -1))
    got = rerank((candidates, candidates), MODEL, ROWS, ROWS[:2], 5, method=grad_dot(), loss=LOSS)
    for found, want in zip(got, best(MODEL, ROWS, ROWS[:2], 5, method=grad_dot(), loss=LOSS), strict=True):
        assert found.rows.tolist() == want.rows.tolist()


def test_a_query_with_fewer_candidates_has_places_without_a_row():
    one = TopK(torch.zeros(2, 2), torch.tensor([[3, -1], [0, 1]]))
    nothing = TopK(torch.zeros(2, 1), torch.tensor([[-1], [-1]]))
    proponents, opponents = rerank((one, nothing), MODEL, ROWS, ROWS[:2], 4, method=grad_dot(), loss=LOSS)
    assert proponents.rows[0].tolist() == opponents.rows[0].tolist() == [3, -1]
    assert (proponents.scores[0, 1], opponents.scores[0, 1]) == (-torch.inf, torch.inf)
    assert sorted(proponents.rows[1].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([[0, 1]], {}, "candidates are of 1 queries, and these have 2 scores a row"),
        ([[-1], [-1]], {}, "no candidate to rank"),
        ([[0], [1]], {"view": View(tokens=True)}, "not by token"),
    ],
)
def test_candidates_that_cannot_be_ranked_are_refused(rows, options, words):
    found = TopK(torch.zeros(len(rows), len(rows[0])), torch.tensor(rows))
    with pytest.raises(InputError, match=words):
        rerank((found, found), MODEL, ROWS, ROWS[:2], 1, method=grad_dot(), loss=LOSS, **options)
