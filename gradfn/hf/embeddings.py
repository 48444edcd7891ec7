"""Embeddings of texts by a model from a local folder: what their meaning alone would find."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.hf.hub import local
from gradfn.hf.locate import load_pretrained, locate_model
from gradfn.hf.models import PRECISIONS, context_length
from gradfn.hf.tokenizers import load_tokenizer
from gradfn.watch import WATCH

BATCH_TOKENS = 4096


def check_embedder(path: str | Path) -> None:
    """Refuse, before any work, what is no folder of a model.

    Raises:
        InputError: there is no such folder, or no model in it.
    """
    if not local(path).is_dir():
        raise InputError(f"no folder {path} with an embedding model: give one that save_pretrained wrote")
    locate_model(path)


def embeddings(
    path: str | Path,
    texts: Sequence[str],
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Float[Tensor, "texts width"]:
    """The mean over a text's tokens of a model's last states, with norm 1; 0 for a text without a token.

    A batch holds texts of one length, so there is no padding, and no text changes the embedding of another.
    Texts that are longer than the model's context are cut.

    Args:
        path: a folder of a model that `transformers.AutoModel` loads, with its tokenizer.
        texts: what to embed.
        precision, device: of the model, see `load_model`.

    Raises:
        InputError: there is no such model, or it is an encoder-decoder.
    """
    import transformers

    check_embedder(path)
    source, options = locate_model(path)
    options |= {"dtype": PRECISIONS[precision], "trust_remote_code": False}
    model: Any = load_pretrained("model", path, transformers.AutoModel.from_pretrained, source, **options)
    model = model.to(device).eval().requires_grad_(False)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{path} maps texts to texts, and has no states of one: give an encoder, or a decoder"
        )
    tokenizer, most = load_tokenizer(path), context_length(model)
    ids = [tokens[:most] for tokens in tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []
    found = torch.zeros(len(texts), int(model.config.hidden_size), dtype=PRECISIONS[precision])
    by_length = dict[int, list[int]]()
    for text, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(text)
    with torch.no_grad(), WATCH.get()("embeddings", sum(map(len, ids)), "tokens") as progress:
        for length, rows in sorted(by_length.items()):
            size = max(1, BATCH_TOKENS // max(length, 1))
            for start in range(0, len(rows) if length else 0, size):
                part = rows[start : start + size]
                tokens = torch.tensor([ids[text] for text in part], device=device)
                states = model(input_ids=tokens).last_hidden_state
                found[part] = torch.nn.functional.normalize(states.mean(1), dim=1).to(found)
                progress(length * len(part))
    return found
