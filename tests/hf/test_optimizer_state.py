import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import language_model
from torch import nn
from transformers.optimization import Adafactor as HFAdafactor

import gradfn as gf
from gradfn.errors import InputError
from gradfn.hf.optimizer_state import _NORM_PATTERNS, _decayed, _Moment, _sides, load_optimizer_state
from gradfn.model.sites import blocks_of, find_sites
from gradfn.testing import assert_blocks_close
from gradfn.testing.strategies import randomize
from gradfn.transforms.normalize import Adafactor, Adam

EVERYTHING = gf.View(include=["*"])


class Mixed(nn.Module):
    """An embedding, a convolution in groups, attention, a norm, a tied linear layer and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(4, 6, (2, 3), groups=2)
        self.attn = nn.MultiheadAttention(6, 2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight
        self.cube = nn.Parameter(torch.randn(2, 3, 4))
        self.grid = nn.Parameter(torch.randn(5, 3))


def mixture():
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=8,
    )  # fmt: skip
    return randomize(transformers.MixtralForCausalLM(config), 0)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double(),
    "gpt2": lambda: language_model("gpt2"),
    "llama": lambda: language_model("llama"),
    "mixture": mixture,
    "mixed": lambda: Mixed().double(),
}
HF = {"scale_parameter": False, "relative_step": False, "lr": 1.0, "clip_threshold": 1e9}
TORCH = {"lr": 1e-6, "eps": (None, 1e6), "d": 1e9}  # so that the step is 1e6 * 1e-6 long
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1.0, betas=(0.0, 0.9), eps=0.05),
    "adamw": partial(torch.optim.AdamW, lr=1.0, betas=(0.0, 0.99), weight_decay=0.0),
    "amsgrad": partial(torch.optim.Adam, lr=1.0, betas=(0.0, 0.5), amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1.0, eps=0.01),
    "centered": partial(torch.optim.RMSprop, lr=1.0, centered=True, alpha=0.5),
    "transformers' adafactor": partial(HFAdafactor, **HF),
    "torch's adafactor": partial(torch.optim.Adafactor, **TORCH),
    "torch's adafactor on its floors": partial(torch.optim.Adafactor, **TORCH | {"eps": (0.6, 1e6)}),
}


def by_name(model):
    """One group, in the model's order."""
    return list(model.parameters())


def by_trainer(model):
    """The groups that transformers' Trainer makes."""
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    return [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == whether]}
        for whether in (True, False)
    ]


def train(model, optimizer, steps=3):
    """Take steps along random gradients of different sizes; the last gradients and the last steps by name."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number, p in enumerate(model.parameters()):
            scale = torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.1 * number
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return grads, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def save(optimizer, path):
    torch.save(optimizer.state_dict(), path)
    return path


def assert_scales(transform, model, view, grads, steps, tolerance=1e-8):
    """Assert that the transform makes the optimizer's steps of its gradients."""
    sites = find_sites(model, view)
    rows = [blocks_of(sites, {name: G[None] for name, G in named.items()}) for named in (grads, steps)]
    assert_blocks_close(transform(rows[0]), rows[1], tolerance)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("family", MODELS)
def test_the_scaled_gradient_is_the_step_that_the_optimizer_took(tmp_path, family, kind):
    model = MODELS[family]()
    optimizer = OPTIMIZERS[kind](by_name(model))
    grads, steps = train(model, optimizer)
    transform = load_optimizer_state(save(optimizer, tmp_path / "state.pt"), model, EVERYTHING)
    assert_scales(transform, model, EVERYTHING, grads, steps)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]
)
@pytest.mark.parametrize("family", ["mlp", "gpt2", "llama"])
def test_adams_moment_is_corrected_for_its_bias_by_parameter_name(tmp_path, family, optimizer_class):
    model = MODELS[family]()
    optimizer = optimizer_class(by_trainer(model), betas=(0.9, 0.8), eps=0.03)
    v = {name: 0.0 for name, _ in model.named_parameters()}
    grads = {}
    for _ in range(4):
        grads, _ = train(model, optimizer, steps=1)
        v = {name: 0.8 * v[name] + 0.2 * G.square() for name, G in grads.items()}
    expected = {name: G / ((v[name] / (1 - 0.8**4)).sqrt() + 0.03) for name, G in grads.items()}
    transform = load_optimizer_state(save(optimizer, tmp_path / "state.pth"), model, EVERYTHING)
    assert_scales(transform, model, EVERYTHING, grads, expected)


@pytest.mark.parametrize("kind", ["adam", "transformers' adafactor", "torch's adafactor"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_and_the_default_view_have_their_part_of_the_moments(tmp_path, family, kind):
    model = MODELS[family]()
    optimizer = OPTIMIZERS[kind](by_trainer(model))
    grads, steps = train(model, optimizer)
    path = save(optimizer, tmp_path / "state.bin")
    for view in (None, gf.View(heads=True)):
        assert_scales(load_optimizer_state(path, model, view), model, view, grads, steps)


@pytest.mark.parametrize("kind", ["transformers' adafactor", "torch's adafactor"])
def test_adafactor_stays_two_vectors_where_its_estimates_have_rank_1(tmp_path, kind):
    kinds = {}
    for family in ("llama", "gpt2"):  # without and with biases
        model = MODELS[family]()
        optimizer = OPTIMIZERS[kind](by_name(model))
        train(model, optimizer)
        view = EVERYTHING if family == "llama" else None
        kinds[family] = load_optimizer_state(save(optimizer, tmp_path / f"{family}.pt"), model, view)
    assert isinstance(kinds["gpt2"], Adam)
    assert isinstance(kinds["llama"], Adafactor)
    assert {
        side.ndim for sides in (kinds["llama"].rows, kinds["llama"].columns) for side in sides.values()
    } == {1}


def test_the_means_are_those_of_the_block_where_the_weight_is_stored_transposed():
    site = find_sites(language_model("gpt2"), gf.View(include=["*.c_attn"]))[0]
    site = replace(site, layer=replace(site.layer, bias=False))
    row, col = torch.rand(8).double() + 0.1, torch.rand(24).double() + 0.1
    means = _sides(site, _Moment(0.0, row=row, col=col))
    assert means is not None
    expected = site.layer.block((row[:, None] * col)[None], None)[0]
    assert_blocks_close(means[0][:, None] * means[1] / means[0].mean(), expected, 1e-12)


def test_a_row_that_was_never_trained_keeps_adafactor_finite(tmp_path):
    model = nn.Embedding(3, 2)
    for number, optimizer in enumerate(
        [HFAdafactor(model.parameters(), **HF), torch.optim.Adafactor(model.parameters())]
    ):
        model.weight.grad = torch.tensor([[0.1, 0.2], [0.0, 0.0], [0.3, 0.1]])
        optimizer.step()
        transform = load_optimizer_state(save(optimizer, tmp_path / f"{number}.pt"), model, EVERYTHING)
        scaled = transform({"root": model.weight.grad[None]})["root"][0]
        assert bool(scaled.isfinite().all())
        assert scaled[1].tolist() == [0.0, 0.0]


def test_the_trainers_own_checkpoint_is_read_by_name(tmp_path):
    pytest.importorskip("accelerate")
    for family in ("gpt2", "llama"):
        model = language_model(family).float().train()
        rows = [
            {"input_ids": torch.tensor([1, 2, 3, n]), "labels": torch.tensor([1, 2, 3, n])} for n in range(4)
        ]
        options = transformers.TrainingArguments(
            tmp_path / family, max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2, weight_decay=0.1, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows)
        trainer.train()
        state = {name: trainer.optimizer.optimizer.state[p] for name, p in model.named_parameters()}
        grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        expected = {
            name: G / ((state[name]["exp_avg_sq"] / (1 - 0.999**2)).sqrt() + 1e-8)
            for name, G in grads.items()
        }
        folder = tmp_path / family / "checkpoint-2"
        for path in (folder, folder / "optimizer.pt"):
            transform = load_optimizer_state(path, model, EVERYTHING)
            assert_scales(transform, model, EVERYTHING, grads, expected, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixture", "mixed", "t5"])
def test_what_a_trainer_decays_is_what_the_installed_one_says(family):
    sizes = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    model = transformers.T5Model(transformers.T5Config(**sizes)) if family == "t5" else MODELS[family]()
    assert set(transformers.Trainer.get_decay_parameter_names(None, model)) & dict(
        model.named_parameters()
    ).keys() == _decayed(model, ("bias", *_NORM_PATTERNS))


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "_orig_mod.{}"])
def test_names_in_the_file_beat_any_order(tmp_path, wrap):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).double()
    named = [(wrap.format(name), p) for name, p in model.named_parameters()][::-1]
    optimizer = OPTIMIZERS["adam"](named)
    grads, steps = train(model, optimizer)
    path = save(optimizer, tmp_path / "state.pt")
    assert_scales(load_optimizer_state(path, model), model, None, grads, steps)


def test_a_state_dict_keyed_by_names_is_read(tmp_path):
    model = MODELS["mlp"]()
    optimizer = OPTIMIZERS["adam"](by_name(model))
    grads, steps = train(model, optimizer)
    content, names = optimizer.state_dict(), list(grads)
    content["state"] = {names[key]: state for key, state in content["state"].items()}
    content["param_groups"][0]["params"] = names
    torch.save(content, tmp_path / "optimizer.bin")
    assert_scales(load_optimizer_state(tmp_path, model), model, None, grads, steps)


@pytest.mark.parametrize("form", ["{}.exp_avg_sq", "exp_avg_sq.{}", "{}"])
def test_safetensors_hold_moments_as_they_are(tmp_path, form):
    model = MODELS["mixed"]()
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    v = {name: torch.rand_like(G) for name, G in grads.items()}
    other = {} if form == "{}" else {f"{name}.exp_avg": -G for name, G in grads.items()}
    # Tied weights may be saved by either name.
    saved = {form.format(name.replace("embed.weight", "head.weight")): G for name, G in v.items()}
    save_file(saved | other, tmp_path / "v.safetensors")
    expected = {name: G / (v[name].sqrt() + 1e-8) for name, G in grads.items()}
    transform = load_optimizer_state(tmp_path / "v.safetensors", model, EVERYTHING)
    assert_scales(transform, model, EVERYTHING, grads, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_adapters_alone_may_have_been_trained(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(language_model("llama"), config).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["adam"]([{"params": trained}, {"params": []}])
    grads, steps = train(model, optimizer)
    model.requires_grad_(False)  # as the command line loads it
    path = save(optimizer, tmp_path / "state.pt")
    assert_scales(load_optimizer_state(path, model), model, None, grads, steps)


def small():
    """A model, an optimizer that has trained it, and its state_dict."""
    model = MODELS["mlp"]()
    optimizer = OPTIMIZERS["adam"](by_name(model))
    train(model, optimizer)
    return model, optimizer, optimizer.state_dict()


def twins():
    """A model whose two orders agree in shapes: a norm's scale, named so, and a vector."""
    model = nn.Module()
    model.norm, model.gain = nn.Module(), nn.Module()
    model.norm.weight, model.gain.weight = (
        nn.Parameter(torch.ones(3).double()),
        nn.Parameter(torch.ones(3).double()),
    )
    return model


def test_two_orders_of_one_shape_are_refused_but_for_a_trainers_folder(tmp_path):
    model = twins()
    optimizer = OPTIMIZERS["adam"](by_trainer(model))
    grads, steps = train(model, optimizer)
    save(optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"whether state 0 belongs to norm\.weight or to gain\.weight"):
        load_optimizer_state(tmp_path, model, EVERYTHING)
    (tmp_path / "trainer_state.json").write_text(json.dumps({}))
    assert_scales(load_optimizer_state(tmp_path, model, EVERYTHING), model, EVERYTHING, grads, steps)


def _nothing(content):
    content["state"] = {}


def _without_params(content):
    del content["param_groups"][0]["params"]


def _without_state(content):
    del content["state"][2]


def _misshapen(content):
    content["state"][0]["exp_avg_sq"] = torch.ones(3, 5)


def _momentum(content):
    content["state"] = {key: {"momentum_buffer": torch.ones(3, 4)} for key in content["state"]}


def _quantised(content):
    for key, state in content["state"].items():
        content["state"][key] = {"step": 1, "state1": state["exp_avg"], "state2": state["exp_avg_sq"].byte()}


def _sparse(content):
    content["state"][0]["exp_avg_sq"] = content["state"][0]["exp_avg_sq"].to_sparse()


def _negative(content):
    content["state"][0]["exp_avg_sq"][0, 0] = -1.0


def _infinite(content):
    content["state"][0]["exp_avg_sq"][0, 0] = float("inf")


def _zero(content):
    content["param_groups"][0]["eps"] = 0.0
    content["state"][0]["exp_avg_sq"][0, 0] = 0.0


def _no_step(content):
    del content["state"][0]["step"]


def _no_betas(content):
    del content["param_groups"][0]["betas"]


def _untrained(content):
    content["state"][0]["step"] = torch.tensor(0.0)


def _two_eps(content):
    group = content["param_groups"][0]
    content["param_groups"] = [group | {"params": [0, 1]}, group | {"params": [2], "eps": 1.0}]


def _one_more(content):
    content["param_groups"][0]["params"].append(3)


def _list(content):
    content["state"] = []


def _states_that_are_lists(content):
    content["state"] = {key: [] for key in content["state"]}


def _moments_that_are_lists(content):
    content["state"][0]["exp_avg_sq"] = content["state"][0]["exp_avg_sq"].tolist()


def _too_few_names(content):
    content["param_groups"][0]["param_names"] = ["0.weight"]


def _groups_by_name(content):
    content["param_groups"] = {"all": content["param_groups"][0]}


def _other(content):
    del content["param_groups"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nothing, r"no second moment of parameter 0, only nothing"),
        (_without_params, r"has a group without params"),
        (_without_state, r"has no state of 2\.weight, which was frozen"),
        (_misshapen, r"second moment of 0\.weight has shape \(3, 5\), the parameter \(3, 4\)"),
        (_momentum, r"no second moment of parameter 0, only momentum_buffer"),
        (_quantised, r"a sparse or quantised state of parameter 0"),
        (_sparse, r"a sparse or quantised state of parameter 0"),
        (_negative, r"negative or non-finite numbers for 0\.weight"),
        (_infinite, r"negative or non-finite numbers for 0\.weight"),
        (_zero, r"the second moment of 0 has zeros and the optimizer an eps of 0"),
        (_no_step, r"has no step for 0\.weight"),
        (_no_betas, r"has no betas for 0\.weight"),
        (_untrained, r"has 0\.weight before its first step"),
        (_two_eps, r"trained with eps 0\.05 and 1\.0, expected one"),
        (_one_more, r"the state of 4 parameters and no names, the model 3 parameters"),
        (_list, r"has a state that is no dict of one a parameter: save optimizer\.state_dict\(\) as"),
        (_states_that_are_lists, r"has a state that is no dict of one a parameter"),
        (_moments_that_are_lists, r"has no tensors for parameter 0: save optimizer\.state_dict\(\) as it is"),
        (_too_few_names, r"has 1 param_names for 3 params: save optimizer\.state_dict\(\) as it is"),
        (_groups_by_name, r"has a group without params"),
        (_other, r"not an optimizer's state_dict with state and param_groups, but holds state"),
    ],
)
def test_what_is_no_second_moment_of_this_model_is_refused(tmp_path, change, message):
    model, _, content = small()
    change(content)
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        load_optimizer_state(tmp_path / "state.pt", model)


def test_another_models_shape_is_refused_where_the_file_has_names_too(tmp_path):
    model, _, _ = small()
    save_file({"0.weight": torch.ones(4, 3)}, tmp_path / "v.safetensors")
    with pytest.raises(
        InputError, match=r"second moment of 0\.weight has shape \(4, 3\), the parameter \(3, 4\)"
    ):
        load_optimizer_state(tmp_path / "v.safetensors", model)
    save_file({"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)}, tmp_path / "v.safetensors")
    with pytest.raises(InputError, match=r"has no state of 2\.weight"):
        load_optimizer_state(tmp_path / "v.safetensors", model)


def test_a_layer_without_state_may_be_left_out(tmp_path):
    model, _, content = small()
    _without_state(content)
    torch.save(content, tmp_path / "state.pt")
    assert load_optimizer_state(tmp_path / "state.pt", model, gf.View(exclude=["2"])).moments.keys() == {"0"}


@pytest.mark.parametrize(("group", "words"), [
    ({"eps": -1.0}, "has eps -1 for .*, expected 0 or more"),
    ({"eps": float("nan")}, "has eps nan for .*, expected 0 or more"),
    ({"betas": (0.9, 1.0)}, "has beta2 1 for .*, expected less than 1"),
    ({"betas": "0.9,0.999"}, "has betas '0.9,0.999' for .*, expected several"),
    ({"betas": 0.9}, "has betas 0.9 for .*, expected several"),
    ({"betas": (0.9,)}, "has no betas for .*, expected a number"),
    ({"amsgrad": True}, "has no max_exp_avg_sq of .*: save optimizer.state_dict"),
])  # fmt: skip
def test_settings_that_no_optimizer_has(tmp_path, group, words):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0].update(group)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match=words):
        load_optimizer_state(tmp_path / "state.pt", model)
