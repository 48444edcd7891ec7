"""One of several processes that hold a model together, each with rows of its own; see its test."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

import gradfn as gf
from gradfn.model.spread import is_spread, own_part


def rows(sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 250, (size,), generator=generator)} for size in sizes]


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gathered(model):
    """The bytes of weights that are whole now, beside this process's shards."""
    return bytes_of(p for p in model.parameters() if not is_spread(p) and p.untyped_storage().size())


def main(folder):
    rank, count = dist.get_rank(), dist.get_world_size()
    data = rows((5, 21, 9, 9, 14, 3))
    parts = [data[:5], data[5:], []]  # the last of three processes has no rows
    whole, model = gf.load_model(folder, precision="fp64"), gf.hf.load_sharded(folder, precision="fp64")
    peaks, blocks = [], [bytes_of(layer.parameters()) for layer in whole.model.layers]
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: peaks.append(gathered(model)))

    # A process holds 1/N of every weight, and while a block runs forward that block and the final norm.
    total = bytes_of(whole.parameters())
    assert (
        bytes_of(own_part(p) for p in model.parameters())
        <= total / count + 8 * len([*whole.parameters()]) * 24
    )
    with gf.model.in_turns(model):
        assert gf.model.model_fingerprint(model) == gf.model.model_fingerprint(whole)
        loss = gf.causal_lm_loss(model)
        assert loss.fused_head
        everything = gf.View(include=["*"])  # the embedding and the head too, which are sharded by themselves
        for transform, view in ((None, None), (gf.project(4), None), (gf.project(4), everything)):
            if mine := parts[rank]:
                got = gf.collect(model, mine, transform, loss=loss, view=view, token_batch_size=30)
                want = gf.collect(whole, mine, transform, view=view, token_batch_size=30)
                for name, block in want.items():
                    torch.testing.assert_close(got[name], block, rtol=1e-9, atol=1e-9)
    norm = bytes_of(whole.model.norm.parameters())
    assert peaks
    assert max(peaks) <= max(blocks) + norm, (peaks, blocks, norm)
    assert gathered(model) == 0

    # A probe that is wrong is found, in whichever process: the layer uses its weight twice.
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: F.linear(x, layer.weight) + F.linear(x.square(), layer.weight)
    with gf.model.in_turns(model):
        try:
            gf.collect(model, data[:2], loss=gf.causal_lm_loss(model), view=gf.View(include=["*.up_proj"]))
        except gf.InputError as error:
            assert "layers.0.mlp.up_proj takes its whole weight, and the model is sharded" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a wrong probe was not found")
    print(f"process {rank} of {count} is done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(sys.argv[1])
    dist.destroy_process_group()
