"""One of two processes that train a tiny model together, or the one that does it alone; see its test."""

import os
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradfn as gf


def collate(features):
    return {key: torch.tensor([f[key] for f in features]) for key in ("input_ids", "labels")}


def main(run, size):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32, (10, 6), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (n % 4) + row[n % 4 :]} for n, row in enumerate(ids)]
    args = TrainingArguments(f"{run}-{os.environ.get('RANK', 0)}-out", per_device_train_batch_size=size,
                             num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True,
                             save_strategy="no", logging_strategy="no", learning_rate=1e-2)  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate)
    gf.train.record_trainer(trainer, run, transform=gf.project(4))
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
