"""What comes from the Hugging Face libraries: models, tokenizers and rows of data."""

from gradfn.hf.datasets import load_rows, text_query, tokenize
from gradfn.hf.models import (
    context_length,
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)

__all__ = [
    "context_length",
    "load_model",
    "load_rows",
    "load_tokenizer",
    "text_query",
    "tokenize",
    "tokenizer_fingerprint",
]
