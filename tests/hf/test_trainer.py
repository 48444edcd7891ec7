import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from recorded import contents, read
from torch import nn

import gradfn as gf
from gradfn.errors import InputError
from gradfn.testing.strategies import randomize
from gradfn.train import record_trainer

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")
LENGTHS = (8, 3, 5, 6, 4, 7, 8, 2, 6, 5)


@pytest.fixture(autouse=True)
def _quiet():
    """Warnings of the trainers' own are not errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def causal_lm(kind="gpt2", seed=0):
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=32, n_positions=32, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return randomize(transformers.GPT2LMHeadModel(config), seed).float()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return randomize(transformers.LlamaForCausalLM(config), seed).float()


def token_rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 32, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [row if n % 3 else [-100] * (len(row) // 2) + row[len(row) // 2 :] for n, row in enumerate(ids)]
    return ids, labels


def dataset():
    ids, labels = token_rows()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "note": ["unused"] * len(ids)})


def documents():
    ids, labels = token_rows()
    return gf.make_documents(ids, labels)


def collate(features):
    width = max(len(f["input_ids"]) for f in features)

    def padded(key, value):
        return torch.tensor([[*f[key], *[value] * (width - len(f[key]))] for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def make_trainer(folder, model, rows=None, collator=collate, callbacks=(), **settings):
    settings = {
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        **settings,
    }
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no", **settings},
    )  # fmt: skip
    return transformers.Trainer(
        model, args, train_dataset=dataset() if rows is None else rows, data_collator=collator,
        eval_dataset=dataset(), callbacks=[*callbacks],
    )  # fmt: skip


def assert_first_step(run, expected, tolerance=1e-4):
    """The rows of the first step are those of `build`; returns all that was recorded."""
    found = read(run)
    first = found["visits/step"] == 0
    rows = found["visits/row"][first]
    for name in (name for name in found if name.startswith("gradients/")):
        wanted = expected[name.removeprefix("gradients/")].numpy()
        assert np.abs(found[name][first] - wanted[rows]).max() <= tolerance * np.abs(wanted).max(), name
    return found


def once_in_every_epoch(found):
    visits = sorted(zip(found["visits/epoch"].tolist(), found["visits/row"].tolist(), strict=True))
    return visits == [(epoch, row) for epoch in range(2) for row in range(len(LENGTHS))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length",
         "max_grad_norm": 0.1},
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True, "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["plain", "accumulation", "length grouping", "smoothing", "checkpointing", "bf16 and evaluation"],
)  # fmt: skip
def test_rows_of_a_trainer_are_those_of_build(tmp_path, settings):
    model = causal_lm()
    loss = gf.causal_lm_loss(model, label_smoothing=settings.get("label_smoothing_factor", 0.0))
    expected = gf.collect(model, documents(), gf.project(4), loss=loss)
    plain = make_trainer(tmp_path / "plain", deepcopy(model), **settings)
    plain.train()
    trainer = make_trainer(tmp_path / "out", model, **settings)
    record_trainer(trainer, tmp_path / "run", transform=gf.project(4))
    trainer.train()
    found = assert_first_step(tmp_path / "run", expected, 3e-2 if "bf16" in settings else 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), model.parameters(), strict=True))
    assert once_in_every_epoch(found)
    assert found["rows/length"].tolist() == [LENGTHS[row] for row in found["visits/row"]]
    assert (found["visits/factor"] < 1).all() == ("max_grad_norm" in settings)
    with gf.open_store(tmp_path / "run") as store:
        assert store.index_array("visits/end").tolist() == ["complete"]


def test_a_trainer_that_stops_early_is_marked_and_one_that_resumes_has_the_same_bytes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    def train(run, out, callbacks=(), resume=None, **more):
        trainer = make_trainer(tmp_path / out, causal_lm(), callbacks=callbacks, **settings, **more)
        record_trainer(trainer, tmp_path / run, transform=gf.project(4))
        trainer.train(resume_from_checkpoint=resume)
        with gf.open_store(tmp_path / run) as store:
            return store.index_array("visits/end").tolist()

    assert train("whole", "whole-out") == ["complete"]
    assert train("part", "part-out", [Stops()]) == ["stopped after step 3"]
    with pytest.raises(InputError, match=r"trainer\.seed is 42 there and 7 here"):
        train("part", "part-out", resume=str(tmp_path / "part-out/checkpoint-2"), seed=7)
    assert train("part", "part-out", resume=str(tmp_path / "part-out/checkpoint-2")) == ["complete"]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert read(tmp_path / "whole", "visits/step").max() == 7


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    trainer = make_trainer(tmp_path / "out", causal_lm("llama"), max_steps=5)
    record_trainer(trainer, tmp_path / "run", gf.data.make_documents(*token_rows()), transform=gf.project(4))
    trainer.train()
    found = read(tmp_path / "run")
    assert found["visits/epoch"].tolist() == [0] * 10 + [1] * 3
    assert found["visits/step"].max() == 4


def test_a_skipped_step_and_the_optimizers_state(tmp_path, monkeypatch):
    model = causal_lm()
    expected = gf.collect(model, documents())
    trainer = make_trainer(tmp_path / "out", model, max_steps=4, lr_scheduler_type="constant")
    record_trainer(trainer, tmp_path / "run", normalize="before")

    class Skips(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            trainer.accelerator.__class__.optimizer_step_was_skipped = state.global_step == 1

    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", False)
    trainer.add_callback(Skips())
    trainer.train()
    found = assert_first_step(tmp_path / "run", expected)  # without a state yet
    assert found["visits/skipped"].tolist() == [step == 1 for step in found["visits/step"]]
    assert found["visits/scaled"].tolist() == [step > 0 for step in found["visits/step"]]
    name = next(name for name in found if name.startswith("gradients/"))
    later = np.abs(found[name][found["visits/step"] == 2]).max()
    assert later > 10 * np.abs(found[name][found["visits/step"] == 0]).max()


def test_classifiers_and_masked_models(tmp_path):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    ids, _ = token_rows()
    masked = [[t if n == 1 else -100 for n, t in enumerate(row)] for row in ids]
    for name, own, task in (
        ("BertForSequenceClassification", [n % 3 for n in range(len(ids))], "classification"),
        ("BertForMaskedLM", masked, "masked_lm"),
    ):
        model = randomize(getattr(transformers, name)(config), 0).float()

        def collator(features, task=task):
            batch = collate([{**f, "labels": f["input_ids"]} for f in features])
            if task == "classification":
                return {**batch, "labels": torch.tensor([f["labels"] for f in features])}
            return {**batch, "labels": collate(features)["labels"]}

        rows = [
            {"input_ids": torch.tensor(i), "labels": torch.tensor(l), "attention_mask": torch.ones(len(i))}
            for i, l in zip(ids, own, strict=True)
        ]
        expected = gf.collect(model, rows, gf.project(4), loss=gf.model_loss(model, task))
        data = datasets.Dataset.from_dict({"input_ids": ids, "labels": own})
        trainer = make_trainer(tmp_path / "o", model, data, collator, gradient_accumulation_steps=2)
        record_trainer(trainer, tmp_path / name, transform=gf.project(4))
        trainer.train()
        assert once_in_every_epoch(assert_first_step(tmp_path / name, expected))


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_rows_without_padding_are_those_of_each_document(tmp_path, kind):
    model = causal_lm(kind)
    expected = gf.collect(model, documents(), gf.project(4))
    collator = transformers.DataCollatorWithFlattening()
    trainer = make_trainer(tmp_path / "out", model, collator=collator, gradient_accumulation_steps=2)
    record_trainer(trainer, tmp_path / "run", transform=gf.project(4))
    trainer.train()
    found = assert_first_step(tmp_path / "run", expected)
    assert once_in_every_epoch(found)
    assert found["rows/length"].tolist() == [LENGTHS[row] for row in found["visits/row"]]


def test_attention_that_mixes_documents_is_refused(tmp_path):
    def mixing(features):
        batch = transformers.DataCollatorWithFlattening()(features)
        count = batch["input_ids"].numel()
        return {**batch, "position_ids": torch.arange(count)[None]}

    trainer = make_trainer(tmp_path / "out", causal_lm(), collator=mixing)
    record_trainer(trainer, tmp_path / "run", transform=gf.project(4))
    with pytest.raises(InputError, match="attention mixes the documents of a packed row"):
        trainer.train()


def test_adapters_have_the_names_of_build(tmp_path):
    peft = pytest.importorskip("peft")
    causal_lm("llama").save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(gf.load_model(tmp_path / "base").requires_grad_(True), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = gf.collect(gf.load_model(tmp_path / "adapter"), documents())
    trainer = make_trainer(tmp_path / "out", adapted, gradient_accumulation_steps=2)
    record_trainer(trainer, tmp_path / "run")
    trainer.train()
    found = assert_first_step(tmp_path / "run", expected)
    assert {name for name in found if "gradients/" in name} == {f"gradients/{name}" for name in expected}
    assert any("lora_A" in name for name in expected)


def test_what_cannot_be_recorded_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from dataset()

    made = make_trainer(tmp_path / "out", causal_lm())
    made.args.torch_compile = True
    with pytest.raises(InputError, match="train without torch_compile to record rows"):
        record_trainer(made, tmp_path / "run")
    with pytest.raises(InputError, match="a Stream does not tell the numbers of its rows"):
        record_trainer(make_trainer(tmp_path / "out", causal_lm(), Stream(), max_steps=2), tmp_path / "run")
    made = make_trainer(tmp_path / "out", causal_lm())
    record_trainer(made, tmp_path / "run", transform=gf.project(4))
    with pytest.raises(InputError, match="is recorded already"):
        record_trainer(made, tmp_path / "run")
    made.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(InputError, match=r"the trainer's loss is .* and the mean of its rows' losses"):
        made.train()
    assert not isinstance(made.model, nn.DataParallel)


def test_a_stream_of_the_datasets_library_numbers_its_rows(tmp_path):
    model = causal_lm()
    expected = gf.collect(model, documents(), gf.project(4))
    rows = dataset().to_iterable_dataset()
    trainer = make_trainer(tmp_path / "out", model, rows, max_steps=4)
    record_trainer(trainer, tmp_path / "run", transform=gf.project(4))
    trainer.train()
    found = assert_first_step(tmp_path / "run", expected)
    assert found["visits/row"][:10].tolist() == [*range(10)]


@pytest.mark.slow
def test_commands_read_what_a_trainer_recorded(tmp_path, monkeypatch, capsys):
    from tiny import DOCUMENTS, QUERIES, make_model, make_tokenizer, save, write_jsonl

    from gradfn.cli import main

    def run(*words):
        monkeypatch.setattr("sys.argv", ["gradfn", *map(str, words)])
        main()
        return capsys.readouterr().out

    folder = save(tmp_path / "model", make_model(), make_tokenizer())
    model, tokenizer = gf.load_model(folder).requires_grad_(True), gf.load_tokenizer(folder)
    data = gf.tokenize(gf.load_rows(str(write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)), "train"), tokenizer)
    trainer = make_trainer(tmp_path / "out", model, list(data), gf.data.collate, max_steps=3)
    record_trainer(trainer, tmp_path / "run", data, transform=gf.project(4))
    trainer.train()
    queries = write_jsonl(tmp_path / "queries.jsonl", QUERIES)
    assert "9, 188 tokens" in run("info", tmp_path / "run")
    asked = run(
        "query", tmp_path / "run", "--query", queries, "--tokenizer", folder
    )  # the model that it began with
    assert "doc-" in asked
    scored = run("score", tmp_path / "scores", "--model", folder, "--dataset", tmp_path / "rows.jsonl",
                 "--query-path", tmp_path / "run", "--projection", "rademacher:4x4")  # fmt: skip
    assert "9 queries" in scored
    run("verify", tmp_path / "run")


def sft_trainer(folder, model, rows, **settings):
    trl = pytest.importorskip("trl", reason="needs TRL")
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<s>"
    settings = {"per_device_train_batch_size": 3, "num_train_epochs": 1, "max_length": 32, **settings}
    args = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_strategy="no", bf16=False, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"padding_free": True, "max_length": None},
        {"packing": True, "gradient_accumulation_steps": 2},
        pytest.param(
            {"packing": True, "packing_strategy": "wrapped", "max_length": 8}, marks=pytest.mark.slow
        ),
    ],
    ids=["padded", "padding-free", "packed", "wrapped"],
)
def test_rows_of_an_sft_trainer_are_those_of_build(tmp_path, settings):
    model = causal_lm("llama")
    ids, _ = token_rows()
    trainer = sft_trainer(tmp_path / "out", model, datasets.Dataset.from_dict({"input_ids": ids}), **settings)
    packed = trainer.train_dataset[:]
    pieces = {}
    for row, tokens in enumerate(packed["input_ids"]):
        sizes = packed["seq_lengths"][row] if "seq_lengths" in packed else [len(tokens)]
        for part, size in enumerate(sizes):
            pieces[f"{row}#{part}" if len(sizes) > 1 else str(row)] = tokens[:size]
            tokens = tokens[size:]
    expected = gf.collect(model, gf.make_documents(list(pieces.values())), gf.project(4))
    record_trainer(trainer, tmp_path / "run", transform=gf.project(4))
    trainer.train()
    found = read(tmp_path / "run")
    assert sorted(found["rows/id"].tolist()) == sorted(pieces)
    if "packing" not in settings:
        assert sorted(pieces.values()) == sorted(ids)
    first = found["visits/step"] == 0
    order = [list(pieces).index(name) for name in found["rows/id"][first]]
    for name in (name for name in found if name.startswith("gradients/")):
        wanted = expected[name.removeprefix("gradients/")].numpy()
        assert np.abs(found[name][first] - wanted[order]).max() <= 1e-4 * np.abs(wanted).max(), name
