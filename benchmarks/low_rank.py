"""What stored factors of a low rank are worth beside a smaller projection of as many numbers, by their LDS.

    python benchmarks/low_rank.py --data FOLDER --out FOLDER

LoRIF (arXiv:2601.21929) stores `U [p, r]` and `V [p, r]` in place of a projected gradient `[p, p]` of a
layer, `2 p r` numbers. Here rows are such factors, the best of their rank, and queries stay whole. Scores
are inner products, and inner products behind the second moment of the whole projected rows, which is more
than a store of factors has. The case and its retrained models are verses-gpt of `benchmarks/lds.py`, whose
`--data` and `--out` it takes.
"""

import argparse
from pathlib import Path
from typing import Any

import lds as cases
import torch
from torch import Tensor

import gradfn as gf
from gradfn.evaluate.lds import lds_estimate
from gradfn.types import Blocks

SIDES, RANKS, DAMPINGS = (8, 11, 16, 23, 32), (1, 2, 4), (0.01, 0.1, 1.0)


def of_rank(blocks: Blocks, rank: int) -> Blocks:
    """Every matrix by the nearest of this rank."""
    nearest = {}
    for name, G in blocks.items():
        U, S, V = torch.linalg.svd(G.float(), full_matrices=False)
        nearest[name] = (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]
    return nearest


def scores_of(whole: Blocks, rows: Blocks, queries: Blocks) -> Tensor:
    """`[1 + dampings, rows, queries]`: inner products, and those behind the second moment of whole rows."""
    total = torch.zeros(())
    for name in whole:
        full, row, query = (blocks[name].flatten(1).double() for blocks in (whole, rows, queries))
        eigenvalues, basis = torch.linalg.eigh(full.T @ full / len(full))
        eigenvalues = eigenvalues.clamp_min(0)
        row, query = row @ basis, query @ basis
        inverses = [1 / (eigenvalues + damping * eigenvalues.mean()) for damping in DAMPINGS]
        powers = torch.stack([torch.ones_like(eigenvalues), *inverses])
        total = total + (row * powers[:, None]) @ query.T
    return total


def main() -> None:
    """Print a row a way of storing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="see benchmarks/lds.py")
    parser.add_argument("--out", type=Path, required=True, help="see benchmarks/lds.py")
    parser.add_argument("--models", type=int, default=3, help="trained on halves, whose scores are averaged")
    given = parser.parse_args()
    torch.set_num_threads(1)
    case = cases.CASES["verses-gpt"]
    rows, queries, truth = cases.ground_truth(
        "verses-gpt", case, case.read(given.data), given.out, seeding="shared"
    )
    cases.MODELS = given.models
    setting, (subsets, losses) = cases.setting_of(case, rows, queries), truth.targets()
    found: dict[tuple[int, str], Tensor] = {}
    for number in range(given.models):
        model = setting.at("halves", number)
        loss, _ = case.losses(model)
        for side in SIDES:
            both: list[Any] = [
                gf.collect(model, data, gf.project(side, seed=number), loss=loss, token_batch_size=4096)
                for data in (rows, queries)
            ]
            whole, asked = both
            stored = {(side * side, f"{side} x {side}"): whole}
            for rank in RANKS:
                if 2 * side * rank < side * side:
                    stored[2 * side * rank, f"{side} x {side} of rank {rank}"] = of_rank(whole, rank)
            for key, blocks in stored.items():
                found[key] = found.get(key, torch.zeros(())) + scores_of(whole, blocks, asked)
    print("| numbers a layer | stored | inner product | second moment |\n|---:|---|---:|---:|")
    for (numbers, name), scores in sorted(found.items()):
        values = [lds_estimate(one.float(), subsets, losses).value for one in scores]
        print(f"| {numbers} | {name} | {values[0]:.3f} | {max(values[1:]):.3f} |")


if __name__ == "__main__":
    main()
