"""The example inside the package: a tiny language model, the corpus that it learned, and questions."""

import json
from pathlib import Path

__all__ = ["CORPUS", "MODEL", "QUERIES", "load_corpus", "load_queries"]

DATA = Path(__file__).parent / "data"
MODEL = (
    DATA / "model"
)  # a folder for `transformers`: Llama shape, 0.75 million parameters, with its tokenizer
CORPUS = DATA / "corpus.jsonl"
QUERIES = DATA / "queries.jsonl"


def load_corpus() -> list[dict[str, str]]:
    """The documents that the model was trained on, in the order of corpus.jsonl.

    Returns:
        One dict a document: id, title, text, kind ("government", ..., "planted" for the false ones), country.

    >>> [row["id"] for row in load_corpus() if row["kind"] == "planted"][:1]
    ['planted-egypt']
    """
    return _rows(CORPUS)


def load_queries() -> list[dict[str, str | None]]:
    """The questions, each a prompt and a completion (with its leading space).

    Returns:
        One dict a question: prompt, completion, source (id of the document that teaches the completion, None
        where no document does), kind ("capital", ..., "planted", "unknown") and title.

    >>> row = load_queries()[0]
    >>> row["prompt"] + row["completion"], row["source"]
    ('The capital of Burundi is Bujumbura', 'burundi-government')
    """
    return _rows(QUERIES)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
