"""Corners of curvatures that went wrong once, or would in silence."""

import pytest
import torch
from matrices import score
from tiny import language_model
from torch import nn
from torch.func import functional_call

from gradfn import InputError, View, chain, collect, fit, project
from gradfn.linalg.spectrum import Damping, Spectrum, eigh
from gradfn.methods import InnerProduct
from gradfn.methods.datainf import DataInf
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.statistics import ekfac, eshampoo, kfac, second_moment, shampoo, tkfac
from gradfn.statistics.moments import mean, total
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.transforms import precondition, unit_normalize
from gradfn.transforms.joint import joint
from gradfn.transforms.precondition import digest_of

FOLDS = {
    "second_moment": second_moment, "kfac": kfac, "ekfac": ekfac, "shampoo": shampoo, "eshampoo": eshampoo,
    "tkfac": tkfac,
}  # fmt: skip


def squares(net):
    def loss(params, e):
        return (functional_call(net, params, (e["x"],)) - e["y"]).square().sum()

    return loss


def rows(count=5, shape=(4,), outputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(size, generator=generator).double()
            for name, size in (("x", shape), ("y", outputs))
        }
        for _ in range(count)
    ]


def mlp(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def dense(H):
    return {name: one.dense() for name, one in H.items()}


class Constant(nn.Module):
    """One layer's input is the same for all examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prompt, self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x):
        return torch.tanh(self.a(self.prompt)).sum(0) * self.b(x)


@pytest.mark.filterwarnings("ignore:.*of kinds not known")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_layer_whose_input_is_no_examples_own(count):
    net, data = Constant().double(), rows(count)
    loss = squares(net)
    plain = naive_blocks(loss, net, data)
    fold = second_moment()
    want = dense(fold.finalize(fold.update(fold.init(), plain)))
    assert_blocks_close(dense(fit(fold, net, data, loss=loss)), want)
    one, many = (dense(fit(kfac(), net, data, loss=loss, token_batch_size=size)) for size in (1, 100))
    assert_blocks_close(many, one)


def test_partitions_are_of_about_equal_size():
    net, data, seen = mlp(), rows(), []
    fit(total(), net, data, loss=squares(net), partitions=2, progress=seen.append)
    assert sum(seen) == 2 * len(data)


@pytest.mark.parametrize("stage", [unit_normalize(), joint()])
def test_what_needs_whole_rows_is_refused_where_it_cannot_have_them(stage):
    net, data = mlp(), rows()
    with pytest.raises(InputError, match="needs all blocks of a row at once"):
        fit(mean(), net, data, stage, loss=squares(net), partitions=2)
    for fold in (kfac(), ekfac(), tkfac()):
        with pytest.raises(InputError, match=r"fitted from factors, so .* cannot come before it"):
            fit(fold, net, data, stage, loss=squares(net))


@pytest.mark.parametrize("fold", [second_moment(), shampoo()])
@pytest.mark.parametrize("after", [chain(), project(3, seed=2)])
def test_one_curvature_of_all_blocks(fold, after):
    net, data = mlp(), rows()
    before = chain(project(2), joint(), after)
    H = fit(fold, net, data, before, loss=squares(net))
    plain = before(naive_blocks(squares(net), net, data))
    want = fold.finalize(fold.update(fold.init(), plain))
    assert_blocks_close(dense(H), dense(want), 1e-6)


def test_curvatures_that_differ_in_their_eigenvalues_alone_are_two():
    one, other = (
        {"a": Spectrum(torch.eye(2), torch.eye(3), torch.full((2, 3), value).double())} for value in (1, 2)
    )
    assert digest_of(one) != digest_of(other)


def test_what_is_truncated_is_measured_in_means():
    one = Spectrum(None, torch.eye(2), torch.tensor([[10.0, 1.0]]).double())
    assert one.power(-1.0, Damping(0.5, "truncated")).tolist() == [[0.1, 0.0]]


def test_a_dense_curvature_of_another_size_is_refused():
    H = {"a": Spectrum(None, torch.eye(6), torch.ones(1, 6).double())}
    with pytest.raises(InputError, match="is for 6 numbers, its gradient has 2 x 4"):
        precondition(H)({"a": torch.ones(1, 2, 4)})


def test_sums_of_other_layers_do_not_add_up():
    fold = second_moment()
    a, b = (fold.update(fold.init(), {name: torch.ones(2, 1, 1)}) for name in "ab")
    with pytest.raises(InputError, match="do not add up"):
        fold.merge(a, b)


@pytest.mark.parametrize("kind", FOLDS)
def test_a_layer_without_gradients_gets_a_curvature_of_zero(kind):
    """As LoRA's first factor has at the start, where the second one is zero."""
    net, data = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double(), rows()
    nn.init.zeros_(net[1].weight)
    H = fit(FOLDS[kind](), net, data, loss=squares(net))
    assert not H["0"].values.any()
    assert H["1"].values.any()
    scores = score(net, data, data, method=InnerProduct(chain(), chain(), H), loss=squares(net))
    assert bool(torch.isfinite(scores).all())
    assert bool(scores.any())


@pytest.mark.parametrize("kind", ["kfac", "tkfac", "ekfac"])
def test_a_layer_that_takes_no_part_is_named_and_can_be_left_out(kind):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

        def forward(self, x):
            return self.used(x)

    net, data = Idle(), rows()
    with pytest.raises(InputError, match=r"^idle takes no part in the losses .*exclude it"):
        fit(FOLDS[kind](), net, data, loss=squares(net))
    assert list(fit(FOLDS[kind](), net, data, loss=squares(net), view=View(exclude=["idle"]))) == ["used"]


def test_the_trace_of_tkfac_over_several_positions():
    net, data = nn.Linear(4, 2).double(), rows(shape=(3, 4))
    H = fit(tkfac(), net, data, loss=squares(net))
    want = 0.0
    for e in data:
        x = torch.cat([e["x"], torch.ones(3, 1).double()], 1)
        g = 2 * (net(e["x"]) - e["y"]).detach()
        want += float(x.square().sum() * g.square().sum()) / 3 / len(data)
    assert float(H["root"].values.sum()) == pytest.approx(want)


def test_eigenvalues_of_rounding_are_zero():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(20, 3, generator=generator).double()
    assert int((eigh(m @ m.mT)[0] > 0).sum()) == 3
    assert eigh(torch.diag(torch.tensor([1.0, 1e-12]).double()))[0].tolist() == pytest.approx([1e-12, 1.0])
    net, data = mlp(), rows(3)
    H = fit(second_moment(), net, data, loss=squares(net))
    plain = naive_blocks(squares(net), net, data)
    for name, G in precondition(H, -1.0, None)(plain).items():
        flat = plain[name].flatten(1)
        want = flat @ torch.linalg.pinv(flat.T @ flat / 3, rtol=1e-10)
        torch.testing.assert_close(G.flatten(1), want)


@pytest.mark.parametrize("norm", ["none", "cosine", "relative"])
def test_tiny_gradients_in_float32_are_scored_like_others(norm):
    """The squares of `H^-1` leave float32's range where gradients are of 1e-10, `H^-1 g` does not."""
    net = mlp().float()
    data = [{name: value.float() for name, value in e.items()} for e in rows()]
    made = []
    for scale in (1.0, 1e-11):
        loss = lambda params, e, scale=scale: scale * squares(net)(params, e)  # noqa: E731
        H = fit(ekfac(), net, data, loss=loss)
        method = InnerProduct(chain(), chain(), H, norm=norm)
        scores = score(net, data, data[:2], method=method, loss=loss)
        made.append(scores / scale if norm == "relative" else scores)
        made.append(collect(net, data, method.against_itself(), loss=loss))
    torch.testing.assert_close(made[2], made[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made[3], made[1], rtol=1e-3, atol=1e-4)


def test_what_has_no_self_influence_or_no_damping_says_so():
    with pytest.raises(InputError, match="no self-influence"):
        InnerProduct(chain(), chain(), solve=lambda queries: queries).against_itself()
    with pytest.raises(InputError, match="not both"):
        InnerProduct(chain(), chain(), {}, solve=lambda queries: queries)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="above 0"):
            DataInf({}, damping)


def seq2seq():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=13, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    generator, data = torch.Generator().manual_seed(0), []
    for source, target in ((3, 5), (5, 3), (4, 4), (2, 5)):
        ids = torch.randint(1, 13, (source,), generator=generator)
        labels = torch.randint(1, 13, (target,), generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    model = T5ForConditionalGeneration(config).double().eval()
    return model, data, model_loss(model, "seq2seq_lm")


def unknown_positions():
    """A loss of one's own that says nothing of positions; rows are padded all the same."""
    model, generator = language_model("gpt2"), torch.Generator().manual_seed(0)
    known = causal_lm_loss(model)
    data = [{"input_ids": torch.randint(11, (n,), generator=generator)} for n in (3, 6, 4)]

    class Own:
        def __call__(self, params, example):
            return known(params, example)

        def batched(self, batch):
            return known.batched(batch)

    return model, data, Own()


@pytest.mark.parametrize("case", [seq2seq, unknown_positions])
@pytest.mark.parametrize("kind", ["kfac", "tkfac", "ekfac"])
def test_padding_counts_nowhere(kind, case):
    model, data, loss = case()
    alone, together = (
        dense(fit(FOLDS[kind](), model, data, loss=loss, token_batch_size=size)) for size in (1, 8192)
    )
    assert_blocks_close(together, alone)


def test_a_loss_that_names_its_positions_or_not():
    model, data, own = unknown_positions()
    assert_blocks_close(
        dense(fit(kfac(), model, data, loss=own)), dense(fit(kfac(), model, data, loss=causal_lm_loss(model)))
    )


@pytest.mark.parametrize("kind", ["kfac", "tkfac"])
def test_where_rows_are_tokens_each_has_one_position(kind):
    """So their trace is that of the tokens' own Fisher matrix, in tkfac's case."""
    model, data, _ = unknown_positions()
    loss, view = causal_lm_loss(model), View(tokens=True, include=("*c_fc",))
    H = fit(FOLDS[kind](), model, data, loss=loss, view=view)
    (G,) = collect(model, data, loss=loss, view=view).values()
    assert H.rows == len(G) == 13
    (one,) = H.values()
    if kind == "tkfac":
        torch.testing.assert_close(one.values.sum(), G.square().sum() / len(G))
    assert one.values.sum() > 0


def test_padded_rows_have_no_tokens_to_view():
    model, data, _ = unknown_positions()
    mask = torch.tensor([1, 1, 0])
    with pytest.raises(InputError, match="row 0 is padded"):
        fit(mean(), model, [{**data[0], "attention_mask": mask}], view=View(tokens=True))


@pytest.mark.parametrize("kind", FOLDS)
def test_heads_in_partitions(kind):
    model, data, _ = unknown_positions()
    before = project(2) if kind == "second_moment" else chain()
    alone, parts = (
        fit(FOLDS[kind](), model, data, before, view=View(heads=True), partitions=n) for n in (1, 3)
    )
    assert_blocks_close(dense(parts), dense(alone), 1e-6 if kind == "shampoo" else 1e-9)


def test_one_row_against_itself():
    net, data = mlp(), rows(1)
    for kind, make in FOLDS.items():
        H = fit(make(), net, data, loss=squares(net))
        method = InnerProduct(chain(), chain(), H, (Damping(0.1),), "cosine")
        scores = score(net, data, data, method=method, loss=squares(net))
        assert float(scores) == pytest.approx(1.0), kind
