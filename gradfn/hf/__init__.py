"""What comes from the Hugging Face libraries: models, tokenizers and rows of data."""

from gradfn.hf.chunks import chunked
from gradfn.hf.columns import with_labels, with_weights
from gradfn.hf.datasets import load_rows, row_names
from gradfn.hf.images import load_images, load_processor, processor_fingerprint
from gradfn.hf.masking import mask_tokens
from gradfn.hf.models import check_device, context_length, load_model
from gradfn.hf.optimizer_state import load_optimizer_state
from gradfn.hf.quantised import multiply_exactly
from gradfn.hf.scored import scorer, with_scores
from gradfn.hf.sharded import load_sharded
from gradfn.hf.texts import check_vocabulary, text_pair, text_query, tokenize, tokenize_pairs
from gradfn.hf.tokenizers import load_tokenizer, number_tokenizer, tokenizer_fingerprint

__all__ = [
    "check_device",
    "check_vocabulary",
    "chunked",
    "context_length",
    "load_images",
    "load_model",
    "load_optimizer_state",
    "load_processor",
    "load_rows",
    "load_sharded",
    "load_tokenizer",
    "mask_tokens",
    "multiply_exactly",
    "number_tokenizer",
    "processor_fingerprint",
    "row_names",
    "scorer",
    "text_pair",
    "text_query",
    "tokenize",
    "tokenize_pairs",
    "tokenizer_fingerprint",
    "with_labels",
    "with_scores",
    "with_weights",
]
