"""The site is read without a network: nothing is loaded from elsewhere, and every link leads to something."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import gradfn

ROOT = Path(__file__).parents[1]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Reader(HTMLParser):
    """What a page of the site loads, links to, and can be linked to by."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded, self.links, self.anchors = [], [], {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif name == "id":
                self.anchors.add(value)


def elsewhere(target):
    return re.match(r"(?:\w+:)?//", target) is not None


def wrong_in(site):
    """What pages load from elsewhere, and their links that lead nowhere."""
    pages = {page: Reader(page) for page in site.rglob("*.html")}
    wrong = []
    for page, read in pages.items():
        wrong += [f"{page.name} loads {target}" for target in read.loaded if elsewhere(target)]
        for target in [*read.links, *read.loaded]:
            if elsewhere(target) or target.startswith(("mailto:", "data:")):
                continue
            path, anchor = urldefrag(target)
            there = (page.parent / unquote(path)).resolve() if path not in ("", ".") else page
            known = there.is_file() and (there not in pages or unquote(anchor) in pages[there].anchors)
            wrong += [] if known else [f"{page.name} links to {target}"]
    for style in site.rglob("*.css"):
        found = re.findall(
            r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]*)", style.read_text(encoding="utf-8")
        )
        wrong += [f"{style.name} loads {target}" for target in found]
    return wrong


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed)
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        tmp_path / "site",
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    assert wrong_in(site) == []
    assert "var __index = {" in (site / "search/search_index.js").read_text(encoding="utf-8")[:20]
    sources = [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    assert {path.stem for path in sources} - {"index"} <= {path.stem for path in site.rglob("*.html")}
    top = (site / "api/gradfn.html").read_text(encoding="utf-8")
    rooms = {name for name in gradfn.__all__ if (site / f"api/{name}.html").exists()}
    assert {name for name in gradfn.__all__ if f"gf.{name}<" not in top} <= rooms
    assert "<math" in (site / "notebooks/02_verify_an_estimator.html").read_text(encoding="utf-8")


def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path / "a.html").write_text(
        '<script src="https://x.org/a.js"></script><img src="//x.org/a.png"><p id="here">'
        '<a href="#here">1</a><a href="#there">2</a><a href="b.html">3</a><a href="https://x.org">4</a>'
    )
    (tmp_path / "a.css").write_text("@font-face { src: url(https://x.org/a.woff) }")
    assert wrong_in(tmp_path) == [
        "a.html loads https://x.org/a.js",
        "a.html loads //x.org/a.png",
        "a.html links to #there",
        "a.html links to b.html",
        "a.css loads https://x.org/a.woff",
    ]
