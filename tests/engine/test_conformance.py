"""Every kind of layer against the naive loop: a new kind joins by one line."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.linalg.kron import Kron
from gradfn.model.layers import Layer
from gradfn.model.params import call
from gradfn.model.sites import View, find_sites
from gradfn.statistics.moments import total
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.strategies import randomize
from gradfn.transforms import Compress, Project, adafactor, adam, chain, dot, project, unit_normalize
from gradfn.transforms.chain import Kronecker
from gradfn.transforms.joint import joint

EVERYTHING = View(include=["*"])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Attention(nn.Module):
    """Self-attention and attention to another sequence."""

    def __init__(self, **options):
        super().__init__()
        self.own = nn.MultiheadAttention(4, 2, **options)
        self.other = nn.MultiheadAttention(4, 2, kdim=options.pop("kdim", 3), vdim=5, **options)

    def forward(self, x):
        x = x if self.own.batch_first else x.movedim(-2, 0)
        x = self.own(x, x, x, need_weights=False)[0]
        x = self.other(x, x[..., :3], torch.cat([x, x[..., :1]], -1))[0]
        return x if self.own.batch_first else x.movedim(0, -2)


class Twice(nn.Module):
    """One module called two times in a forward."""

    def __init__(self, module, between=torch.tanh):
        super().__init__()
        self.module, self.between = module, between

    def forward(self, x):
        return self.module(self.between(self.module(x)))


class Tied(nn.Module):
    """An embedding whose weight is the output's too, and one of positions, the same for all examples."""

    def __init__(self):
        super().__init__()
        self.embed, self.place, self.head = (
            nn.Embedding(7, 4),
            nn.Embedding(9, 4),
            nn.Linear(4, 7, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids):
        places = self.place(torch.arange(ids.shape[-1])[None])
        return self.head(torch.tanh(self.embed(ids) + places))


class Flattened(nn.Module):
    """Positions of all examples as one axis, as the routers of mixtures have them."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 3)

    def forward(self, x):
        return self.map(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class Crossed(Flattened):
    """Positions first: the rows of one example are not next to one another."""

    def forward(self, x):
        return self.map(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).transpose(0, 1)


class Functional(nn.Module):
    """A weight used past its module, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.map, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(2, 3, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.map.weight) + self.shift.sum((0, 2))


class Bent(nn.Module):
    """A weight of three axes that no layer kind knows."""

    def __init__(self):
        super().__init__()
        self.tensor = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x):
        return torch.einsum("...i,oij,...j->...o", x, self.tensor, x)


@dataclass(frozen=True)
class Case:
    """A module, the shape of one example's input, whether a probe sees all of it, and its own precision."""

    make: object
    shape: tuple
    probed: bool = True
    tolerance: float = 1e-9


def gemma(width):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return GemmaRMSNorm(width)


def gemma_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(6, 4, padding_idx=0, embed_scale=2.0)


CASES = {
    "linear": Case(lambda: nn.Linear(4, 3), (4,)),
    "linear, positions": Case(lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear, positions of two axes": Case(lambda: nn.Linear(4, 3), (2, 3, 4)),
    "hf conv1d": Case(lambda: Conv1D(3, 4), (5, 4)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d, same, circular": Case(
        lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 7)
    ),
    "conv2d": Case(lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0), bias=False), (3, 6, 5)),
    "conv2d, dilation": Case(lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2), (2, 6, 7)),
    "conv2d, groups": Case(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv2d, depthwise": Case(
        lambda: nn.Conv2d(3, 6, 2, groups=3, padding_mode="reflect", padding=1), (3, 4, 4)
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 3, 4, 3)),
    "embedding": Case(lambda: nn.Embedding(6, 4), ("ids", 5)),
    "embedding, padding": Case(lambda: nn.Embedding(6, 4, padding_idx=2), ("ids", 5)),
    "embedding, scaled": Case(gemma_embedding, ("ids", 5)),
    "layer norm": Case(lambda: nn.LayerNorm(4), (5, 4)),
    "layer norm, two axes": Case(lambda: nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    "rms norm": Case(lambda: nn.RMSNorm(4), (5, 4)),
    "rms norm, gemma": Case(lambda: gemma(4), (5, 4), tolerance=1e-5),
    "batch norm": Case(lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm, images": Case(lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "group norm": Case(lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": Case(lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "attention": Case(lambda: Attention(batch_first=True), (3, 4)),
    "attention, tokens first": Case(lambda: Attention(bias=False), (3, 4)),
    "transformer": Case(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (3, 4)),
    "called twice": Case(lambda: Twice(nn.Linear(4, 4)), (2, 4)),
    "conv called twice": Case(lambda: Twice(nn.Conv1d(3, 3, 3, padding=1)), (3, 5)),
    "norm called twice": Case(lambda: Twice(nn.LayerNorm(4)), (2, 4)),
    "tied": Case(Tied, ("ids", 5)),
    "flattened": Case(Flattened, (3, 4)),
    "rows crossed": Case(Crossed, (4, 4), probed=False),
    "functional": Case(Functional, (3, 4), probed=False),
    "transposed convolution": Case(lambda: nn.ConvTranspose1d(2, 3, 2), (2, 4), probed=False),
    "bilinear": Case(Bent, (2, 4), probed=False),
}


class SumOfSquares:
    """`sum f(x)²/2 + sum c f(x)` of one example, and of a batch in one forward."""

    def __init__(self, model):
        self.model = model

    def value(self, y, lead):
        y = y[0] if isinstance(y, tuple) else y
        weights = torch.linspace(-1, 1, y[0].numel() if lead else y.numel(), dtype=y.dtype)
        y = y.flatten(1) if lead else y.flatten()
        return (y.square() / 2 + y * weights).sum(-1)

    def __call__(self, params, example):
        return self.value(call(self.model, params, example["x"][None]), lead=True)[0]


class Batched(SumOfSquares):
    """With the batched form."""

    def batched(self, batch):
        y = self.model(batch["x"])
        return self.value(y, lead=True)


def problem(case, size=3, seed=0):
    model = randomize(CASES[case].make(), seed)
    generator = torch.Generator().manual_seed(seed)
    shape = CASES[case].shape
    if shape[0] == "ids":
        x = torch.randint(0, 6, (size, *shape[1:]), generator=generator)
    else:
        x = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    return model, {"x": x}, [{"x": x[b]} for b in range(size)]


def transforms(blocks):
    moments = {name: G.square().mean(0) + 0.01 for name, G in blocks.items()}
    return {
        "full": chain(),
        "projected": chain(project(2)),
        "left only": chain(Left()),
        "masks of sides, sjlt": chain(Project((3, 2), "mask"), Compress(2)),
        "sjlt and fjlt of sides": chain(Project((2, 2), "sjlt"), Project((1, 1), "fjlt")),
        "fjlt of the whole": chain(joint(), Compress(3, "fjlt"), unit_normalize()),
        "adam, projected, unit": chain(adam(moments), project(2, "gaussian"), unit_normalize()),
        "adafactor": chain(adafactor(moments)),
        "adafactor, dot": chain(adafactor(moments), dot({n: G[:2].clone() for n, G in blocks.items()})),
        "sum": total().stage(),
        "sum, adam and projected": chain(adam(moments), project(2), total().stage()),
        "sum of unit rows": chain(unit_normalize(), total().stage()),
        "cosine": chain(unit_normalize(), dot({n: G[:2].clone() for n, G in blocks.items()})),
    }


@dataclass(frozen=True)
class Left(Kronecker):
    """A projection of the left side alone."""

    def kron(self, spec):
        generator = torch.Generator().manual_seed(spec.shape[0])
        return Kron(torch.randn(2, spec.shape[0], generator=generator, dtype=spec.dtype), None)


@pytest.mark.parametrize("make_loss", [SumOfSquares, Batched])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_equals_the_naive_loop_under_every_kind_of_chain(case, make_loss):
    model, batch, rows = problem(case)
    loss = make_loss(model)
    want = naive_blocks(SumOfSquares(model), model, rows, EVERYTHING)
    assert {name for name, G in want.items() if bool((G == 0).all())} == set(), "every weight matters"
    for name, transform in transforms(want).items():
        engine = probe_engine(model, loss, transform, view=EVERYTHING)
        got = engine(batch).values
        try:
            assert_blocks_close(got, transform(want), CASES[case].tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        if make_loss is Batched or CASES[case].probed:
            assert all(site.probed for site in engine.sites) == CASES[case].probed


@pytest.mark.parametrize("case", CASES)
def test_factors_and_dense_blocks_give_the_same_scores(case, monkeypatch):
    model, batch, rows = problem(case)
    want = naive_blocks(SumOfSquares(model), model, rows, EVERYTHING)
    queries = {name: G[:2].clone() for name, G in want.items()}
    for unit in (False, True):
        transform = chain(*([unit_normalize()] if unit else []), dot(queries))
        for factors in (False, True):
            for site in find_sites(model, EVERYTHING):
                kind = type(site.layer)
                if factors and (site.layer.has_factors or kind.score is not Layer.score):
                    monkeypatch.setattr(kind, "prefers_factors", lambda *_: True)
                else:
                    monkeypatch.setattr(kind, "prefers_factors", lambda *_: False)
            got = probe_engine(model, Batched(model), transform, view=EVERYTHING)(batch).values
            assert_blocks_close(got, transform(want), CASES[case].tolerance)


@pytest.mark.parametrize("case", CASES)
def test_batches_do_not_matter(case):
    model, batch, rows = problem(case, size=4)
    whole = probe_engine(model, Batched(model), project(2), view=EVERYTHING)(batch).values
    for b, row in enumerate(rows):
        alone = probe_engine(model, Batched(model), project(2), view=EVERYTHING)(collate([row])).values
        assert_blocks_close(alone, {name: value[b : b + 1] for name, value in whole.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_statistics_in_half_precision_are_float32_and_close(case, dtype):
    model, batch, rows = problem(case)
    x = batch["x"].to(dtype) if batch["x"].is_floating_point() else batch["x"]
    exact = naive_blocks(SumOfSquares(model), model, rows, EVERYTHING)
    coarse = model.to(dtype)
    for transform in (chain(), project(2)):
        got = probe_engine(coarse, Batched(coarse), transform, view=EVERYTHING)({"x": x}).values
        for name, want in transform(exact).items():
            assert got[name].dtype == torch.float32
            flat, wanted = got[name].flatten().double(), want.flatten()
            assert float(torch.cosine_similarity(flat, wanted, 0)) > 0.97, name


@pytest.mark.parametrize("case", CASES)
def test_biases_may_be_left_out(case):
    model, batch, rows = problem(case)
    bare = View(include=["*"], biases=False)
    whole = naive_blocks(SumOfSquares(model), model, rows, EVERYTHING)
    biased = {site.block: site.layer.bias for site in find_sites(model, EVERYTHING)}
    want = {name: G[..., :-1] if biased[name] else G for name, G in whole.items()}
    for transform in (chain(), project(2), chain(unit_normalize(), dot({n: G[:2] for n, G in want.items()}))):
        got = probe_engine(model, Batched(model), transform, view=bare)(batch).values
        assert_blocks_close(got, transform(want), CASES[case].tolerance)
