"""What metagradients cost, in units of the training that they go through, as a Markdown table.

    python benchmarks/through.py --queries 1 4 16 50 --slots all 10 --rounds 3 --peer PEER/bin/python

A GPT-NeoX with random weights (2 layers x width 64, vocabulary 512) learns 64 rows of 64 random tokens in 5
epochs of batches of 8, AdamW with eps 1e-6 and eps_root 1e-10. Without the latter bergson's scores are NaN:
the root of a second moment of 0 has no derivative, which gradfn takes for 0. A side is a process of its own;
the sides take turns. `cost` is the processor time of a metagradient, its own forward passes included, over
that of the training in the same process; `slots` are the states that are kept. PEER is an environment with
bergson, whose magic is given the same model, rows and order, with all states saved to disk; it goes back once
a query. "over peer" is gradfn's processor time over bergson's, both with their training, in the same rounds;
`cosine` is that between both scores. Peak memory is over what is resident before.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LAYERS, WIDTH, VOCABULARY, TOKENS, ROWS, BATCH, EPOCHS, RATE = 2, 64, 512, 64, 64, 8, 5, 1e-3
EPS, EPS_ROOT = 1e-6, 1e-10


def prepare(folder: Path, queries: int) -> None:
    """The model, the rows and the queries that all sides are given."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from gradfn.train import Training
    from gradfn.train.course import Course

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=4 * WIDTH, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(folder / "model")
    rows, asked = torch.randint(VOCABULARY, (ROWS, TOKENS)), torch.randint(VOCABULARY, (queries, TOKENS))
    course = Course(lambda p, e: p["w"], [{}] * ROWS, Training(EPOCHS, BATCH, RATE))
    order = torch.stack([torch.from_numpy(own) for _, own in course.batches()])
    torch.save({"rows": rows, "queries": asked, "order": order}, folder / "data.pt")


def ours(folder: Path, queries: int, slots: int | None) -> dict[str, Any]:
    import gradfn as gf
    from gradfn.data import make_documents
    from gradfn.model.params import params_of
    from gradfn.train import Replay, Training, metagradient
    from gradfn.train.course import Course

    data = torch.load(folder / "data.pt", weights_only=True)
    model = gf.load_model(folder / "model")
    rows, asked = (make_documents(data[name].tolist()) for name in ("rows", "queries"))
    course = Course(gf.causal_lm_loss(model), rows, Training(EPOCHS, BATCH, RATE, eps=EPS, eps_root=EPS_ROOT))
    start = {name: value.clone() for name, value in params_of(model).items()}

    def train() -> None:
        for _ in course.steps(course.start(start)):
            pass

    train()  # what is found out once
    training, before = timed(train), peak()
    found: list[Any] = []
    cost = timed(
        lambda: found.append(
            metagradient(course, start, asked.select(range(queries)), replay=Replay(slots=slots))
        )
    )
    values = found[0].values.T.tolist()
    return {"training": training, "cost": cost, "peak": peak() - before, "values": values}


def theirs(folder: Path, queries: int) -> dict[str, Any]:
    import torchopt  # pyright: ignore[reportMissingImports]
    from bergson.magic.data_stream import DataStream  # pyright: ignore[reportMissingImports]
    from bergson.magic.trainer import BackwardState, Trainer  # pyright: ignore[reportMissingImports]
    from bergson.utils import weighted_causal_lm_ce  # pyright: ignore[reportMissingImports]
    from datasets import Dataset
    from torchopt.pytree import tree_iter  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    data = torch.load(folder / "data.pt", weights_only=True)
    order = data["order"].flatten()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    model.loss_function = weighted_causal_lm_ce
    dataset = Dataset.from_dict({"input_ids": data["rows"][order].tolist()})

    def whole(count: int, save: Path | None) -> tuple[Any, Any, Any]:
        stream = DataStream(dataset, BATCH)
        stream.requires_grad = False
        optimizer = torchopt.adamw(RATE, eps=EPS, eps_root=EPS_ROOT, weight_decay=0.0)
        trainer, state = Trainer.initialize(copy_of(model), optimizer)
        mode = "final" if save is None else "all"
        return trainer, stream, trainer.train(state, stream, inplace=True, save_dir=save, save_mode=mode)

    whole(0, None)
    training, before, scores = timed(lambda: whole(0, None)), peak(), []

    def back() -> None:
        save = folder / "states"
        trainer, stream, state = whole(queries, save)
        end = state.to("cpu").detach_()
        stream.requires_grad = True
        for query in data["queries"][:queries]:
            state = end.to("cpu")
            with state.activate(trainer.model) as params:
                leaves = {name: value.requires_grad_() for name, value in params.items()}
                loss = trainer.model(input_ids=query[None], labels=query[None]).loss
                slopes = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))
            zeros = [torch.zeros_like(leaf) for leaf in tree_iter(state.opt_state)
                     if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]  # fmt: skip
            first = BackwardState(slopes, zeros, torch.zeros_like(stream.weights))
            made = trainer.backward(str(save), stream, first, state.detach_(), inplace=True, cleanup=False,
                                    save_mode="all")  # fmt: skip
            scores.append(torch.zeros(ROWS).index_add(0, order, -made.weight_grads.detach()).tolist())

    cost = timed(back)
    return {"training": training, "cost": cost, "peak": peak() - before, "values": scores}


def copy_of(model: Any) -> Any:
    from copy import deepcopy

    return deepcopy(model).eval().requires_grad_(True)


def timed(function: Any) -> float:
    """Processor seconds."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(python: str, folder: Path, side: str, queries: int, slots: str) -> dict[str, Any]:
    command = [python, __file__, "--side", side, "--folder", str(folder), "--queries", str(queries)]
    done = subprocess.run([*command, "--slots", slots], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 4, 16, 50])
    parser.add_argument("--slots", nargs="+", default=["all", "10"], help="states that are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="the Python of an environment with bergson")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.side is not None:
        (queries,), slots = given.queries, given.slots[0]
        if given.side == "theirs":
            found = theirs(given.folder, queries)
        else:
            found = ours(given.folder, queries, None if slots == "all" else int(slots))
        print(json.dumps(found))
        return
    print("| queries | slots | cost, trainings | peak, MiB | over peer | peer's cost, trainings | cosine |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for queries in given.queries:
        sides = [("ours", slots) for slots in given.slots] + ([("theirs", "all")] if given.peer else [])
        seen: dict[tuple[str, str], list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(given.rounds):
            for side in sides:
                with tempfile.TemporaryDirectory() as folder:
                    prepare(Path(folder), max(given.queries))
                    python = given.peer if side[0] == "theirs" else sys.executable
                    seen[side].append(child(python, Path(folder), side[0], queries, side[1]))
        for side in sides[: len(given.slots)]:
            print(line(queries, side[1], seen[side], seen.get(("theirs", "all"))), flush=True)


def line(queries: int, slots: str, own: list[dict[str, Any]], peers: list[dict[str, Any]] | None) -> str:
    def median(numbers: Any) -> float:
        return statistics.median(list(numbers))

    cost, memory = median(one["cost"] / one["training"] for one in own), median(one["peak"] for one in own)
    if peers is None:
        return f"| {queries} | {slots} | {cost:.1f} | {memory:.0f} | | | |"
    ratio = median(one["cost"] / peer["cost"] for one, peer in zip(own, peers, strict=True))
    theirs = median(peer["cost"] / peer["training"] for peer in peers)
    a, b = (torch.tensor(made[0]["values"]).flatten().double() for made in (own, peers))
    cosine = float(a @ b / (a.norm() * b.norm()))
    return f"| {queries} | {slots} | {cost:.1f} | {memory:.0f} | {ratio:.2f} | {theirs:.1f} | {cosine:.6f} |"


if __name__ == "__main__":
    main()
