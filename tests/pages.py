"""Pages of made-up scores, and what a parser sees in a page."""

from html.parser import HTMLParser

import torch

from gradfn.report.page import open_page_run
from gradfn.scores import Scores

VOID = {"meta", "input", "br", "link", "img"}
HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script><!--<script>",
    '"><img src=x onerror=window.pwned=1>',
    "' onfocus='window.pwned=1' autofocus='",
    "{{ 7*7 }}{% raw %}",
    "a\x1b[31mred\x00\u202egnp.exe\u2066\u2028\u2029\ud800",
    "javascript:window.pwned=1",
    "</style><style>*{background:url(http://127.0.0.1:9/x)}",
)


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.text = tag, attributes, parent, [], ""

    def all(self, tag=None):
        """The elements below this one, in order."""
        for child in self.children:
            if tag in (None, child.tag):
                yield child
            yield from child.all(tag)

    def of_class(self, name):
        return [one for one in self.all() if name in (one.attributes.get("class") or "").split()]

    @property
    def content(self):
        """All text, in order."""
        return "".join(part if isinstance(part, str) else part.content for part in self.parts)


class Reader(HTMLParser):
    """A tree of elements; raises where a tag is not closed."""

    def __init__(self):
        super().__init__()
        self.root = self.now = Element("root", {}, None)
        self.root.parts = []

    def handle_starttag(self, tag, attributes):
        one = Element(tag, dict(attributes), self.now)
        one.parts = []
        self.now.children.append(one)
        self.now.parts.append(one)
        if tag not in VOID:
            self.now = one

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.now.tag == tag, f"</{tag}> closes <{self.now.tag}>"
        self.now = self.now.parent

    def handle_data(self, data):
        self.now.parts.append(data)


def tree(html):
    reader = Reader()
    reader.feed(html)
    assert reader.now is reader.root
    return reader.root


def made_scores(rows=30, queries=3, dampings=("",), seed=0, blocks=0):
    """Scores of made-up rows; with blocks, shares of a model of two layers and as many heads."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(dampings), rows, queries
    names = [f"h.{layer}.attn.q[{head}]" for layer in range(2) for head in range(blocks)]
    shares = {name: torch.randn(shape, generator=draw) for name in names}
    values = sum(shares.values()) if shares else torch.randn(shape, generator=draw)
    ids = [f"row-{number}" for number in range(rows)]
    texts = [f"What is {number}?\u00a0→ it is {number}" for number in range(queries)]
    return Scores(values, ids, [f"q-{n}" for n in range(queries)], dampings, shares=shares, query_texts=texts)


def saved(folder, name, scores):
    """The run of scores, as a page reads it."""
    scores.save(folder / name)
    return open_page_run(folder / name)
