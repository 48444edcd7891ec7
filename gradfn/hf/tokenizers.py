"""Tokenizers: loading them, their fingerprint, and one for models that have none."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from gradfn.errors import InputError
from gradfn.hf.locate import has_no_tokenizer, load_pretrained, locate_tokenizer

_PLACES = ("_file", "_path", "_config")
"""How the settings of a tokenizer end that say where it lies."""
NUMBERS = "numbers"
"""The name of `number_tokenizer`."""


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    vocabulary: int | None = None,
) -> Any:
    """The tokenizer of a model: from its folder, from inside its GGUF file, or from the hub.

    Args:
        path, revision: as for `load_model`.
        trust_remote_code: run Python code that comes with the tokenizer.
        vocabulary: how many tokens the model has. A folder without a tokenizer then gives
            `number_tokenizer`; with None it is refused.

    Raises:
        InputError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if vocabulary is not None and has_no_tokenizer(path):
        return number_tokenizer(vocabulary)
    source, options = locate_tokenizer(path, revision)
    options["trust_remote_code"] = trust_remote_code
    tokenizer = load_pretrained("tokenizer", path, AutoTokenizer.from_pretrained, source, **options)
    if len(tokenizer) == 0:
        raise InputError(
            f"the tokenizer of {path} has no tokens: save it there with tokenizer.save_pretrained"
        )
    return tokenizer


@contextmanager
def no_panic() -> Iterator[None]:
    """Refuse texts in which a tokenizer's regular expressions give up, whose panic is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"the tokenizer cannot split the texts ({str(error)[:80]}): mend the expressions in its "
            "tokenizer.json"
        ) from error


def number_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for models without one (of music, say): tokens are written as their numbers.

    Raises:
        InputError: when called, for a word that is not the number of a token.

    >>> number_tokenizer(100)("60 64 67")["input_ids"], number_tokenizer(100).decode([60, 64])
    ([60, 64, 67], '60 64')
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {str(token): token for token in range(vocabulary)}

    class Numbers(PreTrainedTokenizerFast):
        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            both = (side for side in (text, options.get("text_target")) if side is not None)
            texts = [one for side in both for one in ([side] if isinstance(side, str) else side)]
            for word in (word for one in texts for word in one.split()):
                if word not in known:
                    raise InputError(
                        f"{word!r} is not the number of one of the {vocabulary:,} tokens of the model, which "
                        "has no tokenizer: write texts as numbers of tokens, like '12 7 30', or save the "
                        "model's tokenizer beside it"
                    )
            return super().__call__(text, *args, **options)

    words = Tokenizer(models.WordLevel(known))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return Numbers(tokenizer_object=words, name_or_path=NUMBERS)


def writes_numbers(tokenizer: Any) -> bool:
    """Whether it is a `number_tokenizer`."""
    return getattr(tokenizer, "name_or_path", None) == NUMBERS


def probe_word(tokenizer: Any) -> str:
    """A word that the tokenizer knows, to see what it adds to words. Its alphabet may be that of proteins."""
    if writes_numbers(tokenizer):
        return "0"
    tokens = (token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids)
    words = chain("a", map(tokenizer.decode, tokens))
    return next((word for word in words if tokenizer(word, add_special_tokens=False)["input_ids"]), "a")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of everything that decides which tokens a text or a chat becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        given = {key: value for key, value in tokenizer.init_kwargs.items() if not key.endswith(_PLACES)}
        settings: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer("a b").input_ids, given]
    else:
        settings = json.loads(backend.to_str())
        # Calls change truncation and padding, and the decoder only decides how tokens become text.
        settings.update(truncation=None, padding=None, decoder=None)
    how = [getattr(tokenizer, name, None) for name in ("chat_template", "split_special_tokens")]
    text = json.dumps([settings, how], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
