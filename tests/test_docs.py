"""The pages name what exists: links and anchors, names of the library, files. The index has every page."""

import ast
import html
import json
import math
import os
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
from rich.text import Text

import gradfn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"\b(?:gf|gradfn)(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^(?:from gradfn|import gradfn).*?(?:\(.*?\)|$)", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?<![\w./])(?:gradfn|tests|property_tests|benchmarks|notebooks|docs)/[\w./-]*\w/?")


def text_of(path: Path) -> str:
    """A page's text; of a notebook its cells, one under the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) + "\n" for cell in json.loads(text)["cells"])
    return text


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links, but for those to other sites."""
    targets = LINK.findall(FENCE.sub("", text_of(page)))
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def exists(name: str) -> bool:
    """Whether a dotted name, `gradfn.room.NAME` or `gf.room.NAME`, is that of something public."""
    thing = gradfn
    for part in name.split(".")[1:]:
        if isinstance(thing, ModuleType) and not hasattr(thing, part):
            try:
                thing = import_module(f"{thing.__name__}.{part}")
                continue
            except ModuleNotFoundError:
                return False
        if isinstance(thing, type) and part in getattr(thing, "__annotations__", {}):
            return True
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def imported(text: str) -> set[str]:
    """The dotted names that a text's imports from gradfn bind."""
    names = set()
    for statement in IMPORT.findall(text):
        for node in ast.walk(ast.parse(statement)):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and where.suffix == ".md":
            assert anchor in anchors(where), f"{page.name} links to {target}: no such heading"


def test_the_index_has_every_page_once():
    found = [target for target in links(DOCS / "index.md") if re.fullmatch(r"[\w-]+\.md", target)]
    assert sorted(found) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "index.md")


def test_every_picture_is_shown():
    shown = {Path(target).name for page in PAGES for target in links(page)}
    assert {path.name for path in DOCS.iterdir() if path.suffix in (".png", ".svg")} <= shown


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_names_of_the_library_exist(page):
    text = text_of(page)
    missing = {name for name in {*NAME.findall(text), *imported(text)} if not exists(name)}
    assert not missing, f"{page.name} names what is not there: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_files_exist(page):
    missing = {name for name in FILE.findall(text_of(page)) if not (ROOT / name).exists()}
    assert not missing, f"{page.name} names files that are not there: {', '.join(sorted(missing))}"


def test_the_checks_find_what_is_wrong():
    assert not exists("gf.no_such_name")
    assert not exists("gf.methods.Method")
    assert not exists("gradfn.no_such_room.name")
    assert exists("gf.methods.InnerProduct.against_itself")
    assert exists("gradfn.hf.optimizer_state.load_optimizer_state")
    assert imported("from gradfn.data import (\n    collate,\n    Documents,\n)\n") == {
        "gradfn.data.collate",
        "gradfn.data.Documents",
    }
    assert FILE.findall("see `gradfn/model/layers.py` and benchmarks/lds.py.") == [
        "gradfn/model/layers.py",
        "benchmarks/lds.py",
    ]


# A block that has one of these is not run, because it
LEFT_OUT = {
    "pip install": "installs gradfn, or downloads a model",
    "sbatch": "needs a cluster",
    "#SBATCH": "needs a cluster",
    "benchmarks/agree.py": "needs the peers in environments of their own",
    "from quanda": "needs quanda",
    "bridges.captum": "needs Captum",
    "from dattri": "downloads a benchmark",
    "from transformer_lens": "needs TransformerLens",
    "hooked": "needs an older TransformerLens",
    "import nnsight": "needs nnsight",
}
# A block that is run; what it prints (a bare block, or an indented one right below); a heading
PIECE = re.compile(r"^(?:```(\w*)\n(.*?)^```|(#+) [^\n]*|((?: {4}[^\n]*\n)+))", re.MULTILINE | re.DOTALL)
TIME = re.compile(r"\d[\d.,]* (?:s|ms|minutes|MiB|GiB)\b")


@dataclass
class Block:
    """Code of a page, and the lines that the page shows of what it prints."""

    language: str
    code: str
    shown: list[str]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that are run; a ```text block is the output of something else."""
    found, end, text = [], 0, text_of(page)
    for piece in PIECE.finditer(text):
        language, fenced, heading, indented = piece.groups()
        if language in ("sh", "python"):
            found.append(Block(language, fenced, []))
        elif heading:
            found.append(Block("", "", []))
        elif found and (language == "" or (indented and not text[end : piece.start()].strip())):
            found[-1].shown += dedent(fenced or indented).splitlines()
        end = piece.end()
    return [block for block in found if block.language]


def same_word(shown: str, printed: str) -> bool:
    """Whether two words are equal; two numbers may differ by what another machine's rounding changes."""
    numbers = [word.strip("()%,:").replace(",", "") for word in (shown, printed)]
    try:
        return math.isclose(*map(float, numbers), rel_tol=0.05)
    except ValueError:
        return shown == printed


def same_lines(shown: list[str], printed: list[str]) -> bool:
    """Whether these lines were printed: spaces and times may differ, and a line `...` is any lines."""
    if not shown:
        return not printed
    if shown[0].strip() == "...":
        return any(same_lines(shown[1:], printed[start:]) for start in range(len(printed) + 1))
    if not printed:
        return False
    words = [TIME.sub("TIME", lines[0]).split() for lines in (shown, printed)]
    alike = len(words[0]) == len(words[1]) and all(map(same_word, *words))
    return alike and same_lines(shown[1:], printed[1:])


def run_shell(block: str) -> str:
    """What a block prints on a terminal; what it sets is there in the next one, as in a reader's shell."""
    on_a_terminal = runpy.run_path(str(DOCS / "terminal.py"))["output_on_a_terminal"]
    lines = f"touch .shell; . ./.shell\nset -aeuo pipefail\n{block}\nexport -p > .shell"
    return Text.from_ansi(on_a_terminal(shlex.join(["bash", "-c", lines]), 100)).plain.replace(f"{ROOT}/", "")


def run_python(block: str, names: dict[str, object]) -> str:
    """What a block prints."""
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(block, str(names["__name__"]), "exec"), names)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # in lightning
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    names, stale = {"__name__": page.stem}, []
    for block in blocks_of(page):
        if any(text in block.code for text in LEFT_OUT):
            continue
        printed = run_shell(block.code) if block.language == "sh" else run_python(block.code, names)
        shown, lines = (
            [line for line in lines if line.strip()] for lines in (block.shown, printed.splitlines())
        )
        if shown and not same_lines(shown, lines):
            stale.append("\n".join([block.code, "prints", *lines]))
    assert not stale, f"{page.name} shows other outputs: " + "\n\n".join(stale)


@pytest.mark.slow
def test_the_picture_shows_what_its_command_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = re.search(r"terminal\.py '(.*)' docs/score\.svg", text_of(ROOT / "CONTRIBUTING.md"))
    assert command
    runpy.run_path(str(DOCS / "terminal.py"))["draw"](command[1], str(tmp_path / "score.svg"), 100)
    shown, printed = (
        [html.unescape(line) for line in re.findall(r"<text[^>]*>([^<]*)</text>", text_of(path))]
        for path in (DOCS / "score.svg", tmp_path / "score.svg")
    )
    assert same_lines(shown, printed), "\n".join(printed)


def test_a_stale_output_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ngradfn score\n```\n\n```\nscore  +0.1489  a\n...\ndone in 3.1 s\n```\n\n```text\nx\n```\n\n"
        "```python\n1\n```\n\n    indented\n\nwords\n\n    a formula\n\n## Heading\n\n```\nof nothing\n```\n"
    )
    shell, python = blocks_of(page)
    assert shell.shown == ["score  +0.1489  a", "...", "done in 3.1 s"]
    assert python.shown == ["indented"]
    assert same_lines(shell.shown, ["score +0.1490 a", "more", "done in 70 s"])
    assert same_lines(shell.shown, ["score +0.1489 a", "done in 3.1 s"])
    assert not same_lines(shell.shown, ["task  x", "score +0.1489 a", "done in 3.1 s"])
    assert not same_lines(shell.shown, ["score +0.1589 a", "done in 3.1 s"])
    assert not same_lines(shell.shown, ["score +0.1489 b", "done in 3.1 s"])
    assert not same_lines(shell.shown, ["score +0.1489 a", "done in 3.1 s", "more"])


def test_no_block_is_left_out_for_a_reason_that_is_gone():
    blocks = [block.code for page in PAGES for block in blocks_of(page)]
    assert [text for text in LEFT_OUT if not any(text in block for block in blocks)] == []
