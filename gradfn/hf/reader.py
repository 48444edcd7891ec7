"""How the rows of a dataset, and single texts, become what a model reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from torch import nn

from gradfn.data import Corpus, Documents, Images, Pairs
from gradfn.errors import InputError
from gradfn.hf.chunks import chunked
from gradfn.hf.columns import with_labels
from gradfn.hf.hub import local
from gradfn.hf.images import load_images, processor_fingerprint
from gradfn.hf.masking import mask_tokens
from gradfn.hf.models import context_length
from gradfn.hf.texts import Columns, check_vocabulary, text_pair, text_query, tokenize, tokenize_pairs
from gradfn.hf.tokenizers import tokenizer_fingerprint, writes_numbers


@dataclass(frozen=True, eq=False)
class Reader:
    """Makes tokens of texts by a tokenizer, or pixels of images by a processor, as a model's task wants them.

    Args:
        model: whose context, vocabulary and labels count.
        task: "causal_lm", "masked_lm", "seq2seq_lm", "classification", "regression" or
            "image_classification".
        tokenizer: of texts.
        processor: of images, where the task is about these.
        masking: of `masking_of`, where the task is "masked_lm".
        special: whether texts get the tokenizer's special tokens.
    """

    model: nn.Module
    task: str
    tokenizer: Any = None
    processor: Any = None
    masking: Mapping[str, Any] | None = None
    special: bool = True

    @property
    def numbers(self) -> bool:
        """Whether tokens are written as their numbers, since the model has no tokenizer."""
        return writes_numbers(self.tokenizer)

    def settings(self) -> dict[str, Any]:
        """What a run records of it."""
        if self.processor is not None:
            return {"processor": {"fingerprint": processor_fingerprint(self.processor)}}
        masking = {} if self.masking is None else {"masking": dict(self.masking)}
        made = tokenizer_fingerprint(self.tokenizer) + ("" if self.special else ", no special tokens")
        return {"tokenizer": {"fingerprint": made}, **masking}

    def rows(
        self,
        rows: Any,
        columns: Columns,
        *,
        label_column: str | None = None,
        truncation: bool = False,
        chunk_length: int | None = None,
    ) -> Documents | Pairs:
        """The tokens of a dataset's texts, with what the model is to make of them.

        Args:
            rows: a dataset.
            columns: `text_column`, `prompt_column`, `completion_column` and `messages_column`, see
                `tokenize`.
            label_column: column with classes or numbers, which the task maps texts to.
            truncation: cut what is longer than the model's context.
            chunk_length: instead of this, cut texts into chunks of so many tokens, see `chunked`.

        Raises:
            InputError: columns that are not there or do not go with the task; tokens or token types that the
                model does not have; rows that are too long.
        """
        if self.task == "seq2seq_lm":
            if not self.special:
                raise InputError("pairs of inputs and outputs have their special tokens: leave them")
            return self._pairs(rows, columns, truncation)
        fit: Any = {"max_length": context_length(self.model), "truncation": truncation}
        if chunk_length is not None:
            self._check_chunks(chunk_length, columns)
            fit = {}
        docs = tokenize(rows, self.tokenizer, **columns, **fit, special_tokens=self.special)
        docs = docs if chunk_length is None else chunked(docs, chunk_length, self.tokenizer)
        self._check_tokens(docs)
        docs = self._masked(self._with_types(docs))
        if label_column is None:
            return docs
        config: Any = self.model.config
        classes = config.label2id if self.task == "classification" else None
        return with_labels(docs, rows, label_column, classes)

    def images(
        self, rows: Any, path: str, image_column: str | None = None, label_column: str | None = None
    ) -> Images:
        """The images of the dataset at a path, which their own paths are relative to; see `load_images`."""
        place = local(path)
        return load_images(
            rows, self.processor, self.model, image_column=image_column,
            label_column=label_column or "label", folder=place if place.is_dir() else place.parent,
        )  # fmt: skip

    def text(self, text: str, completion: str | None = None, *, truncation: bool = False) -> Corpus:
        """One text; with a completion, which alone is supervised.

        Raises:
            InputError: the task is not about single texts; see also `rows`.
        """
        fit: Any = {"max_length": context_length(self.model), "truncation": truncation}
        match self.task:
            case "causal_lm" | "masked_lm":
                docs = text_query(self.tokenizer, text, completion, **fit, special_tokens=self.special)
                self._check_tokens(docs)
                return self._masked(docs)
            case "seq2seq_lm" if completion is not None:
                pair = text_pair(self.tokenizer, text, completion, **fit)
                self._check_tokens(pair.inputs, pair.outputs)
                return pair
            case "seq2seq_lm":
                raise InputError("an input alone has no loss: give what the model said as `completion`")
            case task:
                raise InputError(f"a text has no label, which {task} needs: give a dataset of queries")

    def _check_chunks(self, chunk_length: int, columns: Columns) -> None:
        """Refuse chunks of rows that are not plain texts, and those that the model cannot read."""
        if columns.get("messages_column") or columns.get("completion_column"):
            raise InputError(
                "chats, and prompts with completions, are not cut into chunks: leave out `chunk_length`, or "
                "give a `text_column`"
            )
        context = context_length(self.model)
        if context is not None and chunk_length > context:
            raise InputError(
                f"chunks of {chunk_length:,} tokens are longer than the model's context of {context:,}: give "
                "a smaller `chunk_length`"
            )

    def _pairs(self, rows: Any, columns: Columns, truncation: bool) -> Pairs:
        """Inputs and outputs."""
        prompt, completion = (columns.get(key) for key in ("prompt_column", "completion_column"))
        if prompt is None or completion is None:
            raise InputError(
                "seq2seq-lm maps prompts to completions: give `prompt_column` and `completion_column`"
            )
        pairs = tokenize_pairs(
            rows, self.tokenizer, prompt_column=prompt, completion_column=completion,
            max_length=context_length(self.model), truncation=truncation,
        )  # fmt: skip
        self._check_tokens(pairs.inputs, pairs.outputs)
        return pairs

    def _masked(self, docs: Documents) -> Documents:
        """The documents with masked tokens, where the model is to tell these."""
        if self.masking is None:
            return docs
        special = list(self.tokenizer.all_special_ids)
        return mask_tokens(docs, self.masking["token"], special, self.masking["seed"])

    def _check_tokens(self, *parts: Documents) -> None:
        """Refuse tokens that the model does not have."""
        model: Any = self.model
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
        if size is not None:
            for docs in parts:
                check_vocabulary(docs, size)

    def _with_types(self, docs: Documents) -> Documents:
        """The documents with the types of their tokens only if the model reads any."""
        config: Any = self.model.config
        kinds = getattr(config, "type_vocab_size", None)
        reads = "token_type_ids" in signature(self.model.forward).parameters and kinds != 0
        if docs.token_types is None or not reads:
            return replace(docs, token_types=None)
        if self.task == "causal_lm":
            raise InputError(
                "token_type_ids are not given to a model of next tokens, and this one would read them: leave "
                "out the column token_type_ids"
            )
        if kinds is not None and (most := int(docs.token_types.max())) >= kinds:
            raise InputError(
                f"the dataset has token type {most}, and the model has {kinds}, numbered from 0: leave out "
                "the column token_type_ids"
            )
        return docs
