"""What PEFT adapters of every kind have trained, loaded from a folder."""

import pytest
import torch
import transformers
from tiny import make_model, make_tokenizer, save

import gradfn as gf
from gradfn.model.adapters import adapter_parameters
from gradfn.model.sites import find_sites

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of versions of its own
ON = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **ON),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **ON),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=2, total_step=10, **ON),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=2, **ON),
    "lokr": lambda: peft.LoKrConfig(r=2, **ON),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **ON),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=9, **ON),
    "modules": lambda: peft.LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"], **ON),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[3, 5], **ON),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "biases": lambda: peft.LoraConfig(r=2, bias="all", target_modules=["dense"]),
    "own_biases": lambda: peft.LoraConfig(r=2, bias="lora_only", target_modules=["dense"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_folder(kind, tmp_path):
    save(tmp_path / "base", make_model("gpt_neox" if "biases" in kind else "llama"), make_tokenizer())
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    made = peft.get_peft_model(base, KINDS[kind]()).eval()
    torch.manual_seed(1)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad and p.numel()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    loaded = gf.load_model(tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, made(ids).logits)
    assert {f"base_model.model.{name}" for name in adapter_parameters(loaded)} >= {*trained}
    assert {name for site in find_sites(loaded) for name in site.names} == adapter_parameters(loaded)
    rows = gf.collect(loaded, [{"input_ids": ids[0], "labels": ids[0]}])
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(name in adapter_parameters(loaded))
    loss = loaded(ids, labels=ids).loss
    grads = torch.autograd.grad(loss, [p for p in loaded.parameters() if p.requires_grad])
    want, got = (sum(float(g.square().sum()) for g in some) for some in (grads, rows.values()))
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("settings", ["all", "lora_only"])
def test_a_view_without_biases_has_none_of_an_adapters(settings):
    config = peft.LoraConfig(r=2, bias=settings, target_modules=["dense"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("gpt_neox"), config)
    whole, without = (
        {name for site in find_sites(model, gf.View(biases=both)) for name in site.names}
        for both in (True, False)
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == whole
    assert without == {name for name in whole if "lora_" in name}


@pytest.mark.parametrize(("made", "words"), [
    (lambda: peft.VeraConfig(r=2, **ON), "the kind VERA, whose layers share weights .*merge_and_unload"),
    (lambda: peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2), "the kind PROMPT_TUNING.*its base"),
    (lambda: peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2), "the kind PREFIX_TUNING.*its base"),
])  # fmt: skip
def test_adapters_that_are_no_weights_of_layers_are_refused_by_name(made, words, tmp_path):
    save(tmp_path / "base", make_model(), make_tokenizer())
    config = made()
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(gf.InputError, match=words):
        gf.load_model(tmp_path / "adapter")


def test_an_adapter_without_a_tokenizer_has_that_of_its_base_through_other_adapters(tmp_path):
    save(tmp_path / "base", make_model(), make_tokenizer())
    for folder, base in (("first", "base"), ("second", "first")):
        peft.LoraConfig(base_model_name_or_path=str(tmp_path / base), **ON).save_pretrained(tmp_path / folder)
    vocabulary = gf.load_tokenizer(tmp_path / "base").get_vocab()
    assert gf.load_tokenizer(tmp_path / "second").get_vocab() == vocabulary
