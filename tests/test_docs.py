"""The pages name what exists: links and anchors, names of the library, files. The index has every page."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

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


def test_the_api_reference_has_every_room():
    command = re.search(r"python -m pdoc .*", text_of(ROOT / "CONTRIBUTING.md"))
    assert command
    documented = set(gradfn.__all__) | {name.removeprefix("gradfn.") for name in command[0].split()}
    package = Path(gradfn.__file__).parent
    files = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {path.stem for path in files}
    assert rooms - {"__init__", "__main__", "cli", "memory", "random"} <= documented


# A block that has one of these is not run, because it
LEFT_OUT = {
    "pip install": "installs gradfn, or downloads a model",
    "sbatch": "needs a cluster",
    "#SBATCH": "needs a cluster",
    "benchmarks/agree.py": "needs the peers in environments of their own",
}
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_shell(block: str) -> None:
    """Run a block by bash; what it sets is there in the next block, as in a reader's shell."""
    keep = "export -p > .shell"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lines = f"touch .shell; . ./.shell\nset -aeuo pipefail\n{block}\n{keep}"
    subprocess.run(["bash", "-c", lines], check=True, env={**os.environ, "PATH": path})


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(text_of(page))], ids=lambda page: page.name
)
def test_a_page_runs_from_its_first_line(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__name__": page.stem}
    for language, block in BLOCK.findall(text_of(page)):
        if any(text in block for text in LEFT_OUT):
            continue
        if language == "sh":
            run_shell(block)
        else:
            exec(compile(block, page.name, "exec"), names)


def test_no_block_is_left_out_for_a_reason_that_is_gone():
    blocks = [block for page in PAGES for _, block in BLOCK.findall(text_of(page))]
    assert [text for text in LEFT_OUT if not any(text in block for block in blocks)] == []
