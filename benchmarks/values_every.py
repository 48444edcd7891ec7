"""What values of every N-th step alone say of the values of all steps, as a Markdown table.

    python benchmarks/values_every.py [--epochs 4] [--queries 8]

The model of the example inside gradfn is trained from new weights (AdamW, batches of 16, learning rate 1e-3,
linear schedule), and its rows are valued at every step for the first queries. The table compares the rows'
totals over every N-th step with those over all steps: Spearman's correlation over rows, the mean over
queries, and the share of rows that were in one of these steps.
"""

import argparse

import torch

import gradfn as gf
from gradfn import example
from gradfn.evaluate.correlation import correlation
from gradfn.hf.models import new_model
from gradfn.model.params import params_of
from gradfn.train import InRunTotals, Training
from gradfn.train.course import Course, Valuing
from gradfn.train.watched import fast_values

EVERY = (1, 2, 4, 8, 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--queries", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = new_model(example.MODEL, "causal_lm"), gf.load_tokenizer(example.MODEL)
    rows = gf.tokenize(gf.load_rows(example.CORPUS), tokenizer)
    asked = gf.load_rows(example.QUERIES, f"train[:{given.queries}]")
    queries = gf.tokenize(asked, tokenizer, prompt_column="prompt", completion_column="completion")
    loss = gf.causal_lm_loss(model)
    training = Training(given.epochs, 16, 1e-3, schedule="linear")
    course = Course(loss, rows, training, valuing=Valuing(queries, loss))
    fold = InRunTotals(rows.ids, queries.ids)
    states = {every: fold.init() for every in EVERY}
    with fast_values(course, model) as course:
        for number, taken in enumerate(course.steps(course.start(params_of(model)))):
            for every in EVERY:
                if number % every == 0:
                    numbers, values = torch.from_numpy(taken.rows), torch.from_numpy(taken.values)
                    states[every] = fold.update(states[every], numbers, values)
    print("| valued steps | Spearman's correlation with all | rows that were in one |\n|---|---:|---:|")
    whole = states[1].values
    for every, state in states.items():
        alike = float(correlation(state.values, whole).mean())
        met = float((state.visits > 0).double().mean())
        print(f"| every {every} | {alike:.2f} | {met:.0%} |", flush=True)


if __name__ == "__main__":
    main()
