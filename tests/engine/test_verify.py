"""The engine compares its probes with plain autograd before it relies on them."""

import gc
from dataclasses import dataclass
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call
from transformers import T5Config, T5ForConditionalGeneration

from gradfn.data import collate
from gradfn.engine import verify
from gradfn.engine.check import equality
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect
from gradfn.engine.verify import unequal_blocks
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.model.params import call
from gradfn.model.sites import View
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.strategies import randomize
from gradfn.transforms import chain, dot, project, unit_normalize

EVERYTHING = View(include=["*"])


class Squares:
    """`sum c f(x)²` of one example, of a batch, or with a term of the weights alone."""

    def __init__(self, model, decay=0.0):
        self.model, self.decay = model, decay

    def value(self, y):
        return (y.square() * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).flatten(1).sum(1)

    def __call__(self, params, example):
        penalty = self.decay * sum(p.square().sum() for p in params.values()) if self.decay else 0.0
        return self.value(call(self.model, params, example["x"][None]))[0] + penalty


class Batched(Squares):
    """With the batched form."""

    def batched(self, batch):
        return self.value(self.model(batch["x"]))


class HandTied(nn.Module):
    """An embedding whose weight is used once more, by hand."""

    def __init__(self):
        super().__init__()
        self.ids, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.ids(x)).tanh() @ self.ids.weight.T


class Tripled(nn.Linear):
    """Not what its class says."""

    def forward(self, input):
        return F.linear(input, 3 * self.weight, self.bias)


class Pair(nn.Linear):
    """Not of one output."""

    def forward(self, input):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input), None


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """A norm over axis 1."""

    def forward(self, input):
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Activated(nn.BatchNorm2d):
    """A norm and an activation."""

    def forward(self, input):
        return super().forward(input).relu()


class OnAVector(nn.Module):
    """A layer that sees no example at all."""

    def __init__(self, size):
        super().__init__()
        self.start, self.shift, self.last = (
            nn.Parameter(torch.ones(size)),
            nn.Linear(size, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.last((x + self.shift(self.start)).tanh())


def shared_bias():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    return model


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))


def lstm():
    return First(nn.LSTM(4, 3, batch_first=True))


IMAGE, ROW, IDS = (2, 4, 4), (4,), "ids"
MODULES = {
    "tied by hand": (HandTied, IDS, {"ids"}),
    "a subclass of another product": (lambda: nn.Sequential(Tripled(4, 3), nn.Linear(3, 2)), ROW, {"0"}),
    "a tuple": (lambda: nn.Sequential(First(Pair(4, 3)), nn.Linear(3, 2)), ROW, {"0.inner"}),
    "weight norm": (
        weight_normed,
        ROW,
        {f"0.parametrizations.weight.original{i}" for i in (0, 1)} | {"0.bias"},
    ),
    "channels first": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), ChannelsFirstLayerNorm(3)), IMAGE, {"1"}),
    "an activation inside": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), Activated(3)), IMAGE, {"1"}),
    "bias shared alone": (shared_bias, ROW, {"0", "2"}),
    "on a vector of two": (lambda: OnAVector(2), ROW, {"shift", "start"}),
    "on a vector of four": (lambda: OnAVector(4), ROW, {"shift", "start"}),
    "recurrent": (lstm, (3, 4), {f"inner.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}),
    "norm over two axes": (lambda: nn.LayerNorm((3, 4)), (3, 4), set()),
    "norm of unbatched images": (lambda: nn.InstanceNorm2d(2, affine=True), IMAGE, set()),
    "sparse": (lambda: nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2)), IDS, set()),
}


def rows_for(shape, count=3):
    generator = torch.Generator().manual_seed(0)
    if shape == IDS:
        return [{"x": torch.randint(0, 6, (5,), generator=generator)} for _ in range(count)]
    return [{"x": torch.randn(shape, generator=generator, dtype=torch.float64)} for _ in range(count)]


@pytest.mark.parametrize("make_loss", [Squares, Batched])
@pytest.mark.parametrize("case", MODULES)
def test_what_a_probe_does_not_see_right_goes_through_vmap_grad(case, make_loss):
    make, shape, unseen = MODULES[case]
    model, rows = randomize(make(), 0), rows_for(shape)
    engine = probe_engine(model, make_loss(model), view=EVERYTHING)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(Squares(model), model, rows, EVERYTHING))
    found = {site.path for site in engine.sites if not site.probed}
    assert found == unseen or (make_loss is Squares and found <= unseen)


def test_a_penalty_on_the_weights_is_a_second_use_of_them():
    model, rows = randomize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0), rows_for(ROW)
    engine = probe_engine(model, Squares(model, decay=0.1))
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(engine.loss, model, rows))
    assert not any(site.probed for site in engine.sites)


def test_a_norm_that_sees_no_batch_axis_is_not_taken_for_one_that_does():
    model = randomize(nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, affine=True), nn.Tanh()), 0)
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)

    def loss(params, example):
        return (functional_call(model, params, example["x"]) * weights).sum()

    rows = rows_for(IMAGE)
    engine = probe_engine(model, loss, view=EVERYTHING)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(loss, model, rows, EVERYTHING))


def test_a_loss_that_looks_at_its_values_is_taken_one_example_at_a_time():
    model, rows = randomize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0), rows_for(ROW)

    def loss(params, example):
        y = functional_call(model, params, example["x"]).sum()
        return y.square() if example["x"].sum() > 0 else y

    engine = probe_engine(model, loss)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(loss, model, rows))
    assert all(site.probed for site in engine.sites)


class NextToken:
    """Cross-entropy of the next token of a model of ids."""

    def __init__(self, model):
        self.model = model

    def value(self, logits, labels):
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(-1)

    def __call__(self, params, example):
        logits = call(self.model, params, example["input_ids"][None])
        return self.value(logits, example["labels"][None])[0]

    def batched(self, batch):
        return self.value(self.model(batch["input_ids"]), batch["labels"])


class Placed(nn.Module):
    """Positions are looked up once, for all examples."""

    def __init__(self):
        super().__init__()
        self.ids, self.places = nn.Embedding(13, 6), nn.Embedding(16, 6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 13)

    def forward(self, ids):
        h = self.ids(ids) + self.places(torch.arange(ids.shape[-1]))
        return self.head(self.inner(h).tanh().cumsum(-2))


class Routed(nn.Module):
    """Every token goes to one of three layers."""

    def __init__(self):
        super().__init__()
        self.ids, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, ids):
        h = self.ids(ids)
        flat, out = h.reshape(-1, 6), torch.zeros(ids.numel(), 6, dtype=h.dtype)
        for number, expert in enumerate(self.experts):
            mine = (ids.flatten() % 3 == number).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(flat[mine]))
        return self.head(out.tanh().view(h.shape) + h)


def document(*ids, supervised=None):
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[supervised or len(ids) :] = -100
    return {"input_ids": ids, "labels": labels}


def test_positions_of_all_examples_are_nobodys():
    model, view = randomize(Placed(), 0), View(include=["places"])
    rows = [document(*range(4)), document(*range(8), supervised=2)]
    rows += [document(*range(i, i + 8)) for i in range(5)]
    got = collect(model, rows, loss=NextToken(model), view=view, token_batch_size=24)
    assert_blocks_close(got, naive_blocks(NextToken(model), model, rows, view))


@pytest.mark.parametrize(
    "rows",
    [
        [document(0, 3, 6, 1, 2, 5), document(1, 4, 7, 0, 8, 2)],  # three and one, one and three, two and two
        [document(0, 1, 1, 2, 2, 2), document(4, 4, 1, 2, 2, 2)],  # an expert has one token in all
        [document(1, 1, 1, 2, 2, 2), document(4, 4, 1, 2, 2, 2)],  # an expert has none
    ],
)
def test_experts_that_are_modules_of_their_own(rows):
    model = randomize(Routed(), 0)
    engine = probe_engine(model, NextToken(model))
    engine(collate([document(0, 3, 1, 4, 2, 5), document(6, 1, 9, 7, 5, 8)]))  # two tokens each for everyone
    for one in (engine, probe_engine(model, NextToken(model))):
        assert_blocks_close(one(collate(rows)).values, naive_blocks(NextToken(model), model, rows))


class Interleaved(nn.Module):
    """Sees the sum of a short sequence, and of a long one every place, the examples' side by side."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        if x.shape[1] < 3:
            return self.inner(x.sum(1))
        return self.inner(x.movedim(1, 0).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).sum(0)


def test_a_probe_is_not_used_for_calls_of_a_kind_that_was_not_verified():
    model, generator = Interleaved().double(), torch.Generator().manual_seed(0)
    short, long = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (2, 4))
    loss = Batched(model)
    engine = probe_engine(model, loss)
    for x in (short, long):
        assert_blocks_close(engine({"x": x}).values, naive_blocks(loss, model, [{"x": row} for row in x]))


@pytest.mark.parametrize("lengths", [((4, 6), (8, 2)), ((3, 4), (8, 4)), ((4, 4), (4, 4)), ((2, 4), (8, 8))])
def test_biases_of_distances_are_of_all_examples(lengths):
    config = T5Config(
        vocab_size=13, d_model=8, d_kv=4, d_ff=9, num_layers=1, num_decoder_layers=1, num_heads=2,
        relative_attention_num_buckets=6, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = randomize(T5ForConditionalGeneration(config), 0)
    loss, generator = model_loss(model, "seq2seq_lm", "sum"), torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(1, 13, (n,), generator=generator), "attention_mask": torch.ones(n).long(),
         "labels": torch.randint(1, 13, (m,), generator=generator)}
        for n, m in lengths
    ]  # fmt: skip
    engine = probe_engine(model, loss, view=EVERYTHING)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(loss, model, rows, EVERYTHING), 1e-8)


def test_rows_without_a_gradient_verify_nothing_so_the_engine_verifies_again():
    model = randomize(Placed(), 0)
    view = View(include=["places"])
    engine = probe_engine(model, NextToken(model), view=view)
    silent = [{**document(*range(4)), "labels": torch.full((4,), -100)} for _ in range(2)]
    for _ in range(5):
        engine(collate(silent))
    rows = [document(*range(4)), document(*range(4, 8))]
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(engine.loss, model, rows, view))


def test_padded_tokens_without_a_mask_get_one():
    rows = [{"input_ids": torch.tensor([3])}, {"input_ids": torch.tensor([7, 8])}]
    assert collate(rows)["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert "attention_mask" not in collate([rows[1], rows[1]])
    model = language_model("gpt_neox")
    errors = equality(probe_engine(model, causal_lm_loss(model)), rows)
    assert max(error.error for error in errors) < 1e-9


def test_labels_below_zero_are_refused():
    model = language_model("gpt_neox")
    row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, -1, 3])}
    with pytest.raises(InputError, match="label below 0"):
        collect(model, [row], loss=causal_lm_loss(model))


def test_the_engine_verifies_with_rows_that_have_a_supervised_token():
    ids = torch.arange(12).view(4, 3)
    labels = ids.clone()
    labels[[0, 2]] = -100
    assert verify.two_rows({"input_ids": ids, "labels": labels})["input_ids"].tolist() == [
        [3, 4, 5],
        [9, 10, 11],
    ]
    assert verify.two_rows({"x": ids})["x"].tolist() == ids[:2].tolist()
    assert verify.two_rows({"x": ids[:1]})["x"].tolist() == ids[:1].tolist()


def test_long_rows_are_cut_to_the_tokens_around_their_first_label():
    ids = torch.arange(300).view(3, 100)
    labels = ids.clone()
    labels[0, :70], labels[1, :20] = -100, -100  # positions 69 and 19 are the first with a target
    seen = verify.two_rows({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    assert seen["input_ids"][:, 0].tolist() == [61, 111]
    assert (seen["labels"] == -100).sum(1).tolist() == [9, 9]
    assert {value.shape for value in seen.values()} == {(2, verify.VERIFY_TOKENS)}
    labels[:, :99] = -100
    assert verify.two_rows({"input_ids": ids, "labels": labels})["labels"][:, -1].tolist() == [99, 199]
    labels[:] = ids
    assert verify.two_rows({"input_ids": ids, "labels": labels})["input_ids"][:, 0].tolist() == [0, 100]


def test_only_the_end_of_long_rows_is_learned_and_positions_are_still_seen_to_be_nobodys():
    model, view = randomize(Placed(), 0), View(include=["places", "inner"])
    model.places = randomize(nn.Embedding(40, 6), 1)
    rows = [document(*(i % 13 for i in range(start, start + 40))) for start in range(3)]
    for row in rows:
        row["labels"][:30] = -100
    engine = probe_engine(model, NextToken(model), view=view)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(engine.loss, model, rows, view))
    assert [site.path for site in engine.sites if not site.probed] == ["places"]


@pytest.mark.parametrize("backend", ["mkldnn", "cuda"])
def test_how_far_a_gradient_may_move_depends_on_how_matrices_are_multiplied(backend):
    products = getattr(torch.backends, backend).matmul
    exact, before = verify.tolerance([torch.float32]), products.fp32_precision
    assert verify.tolerance([torch.float64]) < exact < verify.tolerance([torch.bfloat16, torch.float32])
    try:
        products.fp32_precision = "tf32"
        assert exact < verify.tolerance([torch.float32]) < verify.tolerance([torch.bfloat16])
    finally:
        products.fp32_precision = before


def test_memory_that_runs_out_is_not_taken_for_a_module_of_another_kind():
    class Full(nn.Linear):
        def forward(self, input):
            raise torch.OutOfMemoryError("no memory")

    model = randomize(Full(4, 2), 0)
    for loss in (Squares(model), Batched(model)):
        engine = probe_engine(model, loss)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            engine(collate(rows_for(ROW)))
        assert all(site.probed for site in engine.sites)
        assert not engine.facts.singly


@dataclass(frozen=True)
class Penalised:
    """`sum c f(x)²` and a penalty, of which everything is said by the fields."""

    model: nn.Module
    decay: float

    def __call__(self, params, example):
        return Squares(self.model, self.decay)(params, example)


def comparisons_of(engine, batch, monkeypatch):
    """How often an engine compares its probes when it runs."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "gradfn.engine.engine.unequal_blocks",
            lambda *args: (calls.append(args), unequal_blocks(*args))[1],
        )
        engine(batch)
    return len(calls)


def test_a_model_is_verified_once_for_all_engines_of_a_loss(monkeypatch):
    model, batch = randomize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0), collate(rows_for(ROW))

    def count(loss, batch=batch, **of):
        return comparisons_of(probe_engine(model, loss, **of), batch, monkeypatch)

    assert count(Penalised(model, 0.0)) == 1
    assert count(Penalised(model, 0.0)) == count(Penalised(model, 0.0), transform=project(2)) == 0
    assert count(Penalised(model, 0.1)) == 1  # another loss
    assert count(Penalised(model, 0.0), batch=batch | {"y": torch.ones(3)}) == 1  # other batches
    assert count(Penalised(model, 0.0), view=View(include=["0"])) == 1  # other weights
    changing = Squares(model)
    assert count(changing) == count(changing) == 1  # it may have another decay by now
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    assert count(Penalised(model, 0.0)) == 1
    model[1] = randomize(Tripled(3, 2), 0)
    engine, rows = probe_engine(model, Penalised(model, 0.0)), rows_for(ROW)
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(Squares(model), model, rows))


@dataclass(frozen=True)
class Listed(Penalised):
    """With a field that may be filled later."""

    more: list


def test_a_loss_with_a_field_that_can_change_is_verified_each_time(monkeypatch):
    model, batch = randomize(nn.Sequential(nn.Linear(4, 3)), 0), collate(rows_for(ROW))
    loss = Listed(model, 0.0, [])
    assert [comparisons_of(probe_engine(model, loss), batch, monkeypatch) for _ in "ab"] == [1, 1]


def test_attention_that_vmap_has_no_rule_for_gives_no_warning():
    model = randomize(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 0)
    rows = rows_for((3, 4))
    got = probe_engine(model, Squares(model))(collate(rows)).values
    assert isinstance(got, dict)
    expected = naive_blocks(Squares(model), model, rows)
    assert_blocks_close({name: got[name] for name in expected}, expected)


class Twice(nn.Module):
    """The same layer twice where the input is long."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        y = self.inner(x).tanh()
        return self.inner(y) if x.shape[-2] > 2 else y


def test_engines_share_the_facts_about_a_model():
    model = randomize(Twice(), 0)
    short, long = ([{"x": x} for x in torch.randn(2, n, 3, dtype=torch.float64)] for n in (2, 4))
    queries = {"inner": torch.randn(2, 3, 4, dtype=torch.float64)}
    cosine = chain(unit_normalize(), dot(queries))  # norms are not linear: a sum over calls must wait
    first, second = (probe_engine(model, Penalised(model, 0.0), cosine) for _ in "ab")
    second(collate(short))
    first(collate(long))  # its module is called twice
    for engine, rows in ((second, long), (first, short), (second, short)):
        expected = cosine(naive_blocks(Squares(model), model, rows))
        torch.testing.assert_close(engine(collate(rows)).values, expected, rtol=1e-9, atol=1e-12)


def test_the_facts_about_a_model_are_freed_with_it():
    model = randomize(nn.Sequential(nn.Linear(4, 3)), 0)
    probe_engine(model, Penalised(model, 0.0))(collate(rows_for(ROW)))
    assert model in verify._FACTS
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


class Faint(nn.Module):
    """A layer whose share of the output is as small as asked, beside one that is not attributed."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen, self.beside = size, Tripled(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.size * self.seen(x) + self.beside(x)


@pytest.mark.parametrize(("size", "probed"), [(1e-3, False), (1e-17, True)])
def test_a_gradient_that_is_rounding_next_to_weights_left_out_is_not_compared(size, probed):
    model = randomize(Faint(size), 0).double()
    engine = probe_engine(model, Squares(model), view=View(include=["seen"]))
    engine(collate([{"x": row["x"].double()} for row in rows_for(ROW)]))
    assert [site.probed for site in engine.sites] == [probed]
