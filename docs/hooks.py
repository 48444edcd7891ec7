"""What `mkdocs build` does with the pages of the repository; mkdocs.yml names this file.

Pages are written for their places in the repository. On the site, the README is the home page, notebooks are
pages, and every room has a page of the API. Links between files of the repository are translated here.
"""

import ast
import json
import posixpath
import re
from base64 import b64decode
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]  # pages that are not in docs/
PLACES = {"README.md": "index.md", "docs/index.md": "pages.md", "LICENSE": "LICENSE.txt"}
NOT_DOCUMENTED = {"__init__", "__main__", "cli", "memory", "random"}
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\[[^\]]*\]\()(?!\w+:)([^)#\s]+)")
DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n)(?:^[ ]*\S.*(?:\n|\Z))*", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


class Doctests(griffe.Extension):
    """Show the examples of docstrings as code."""

    def on_instance(self, *, obj: griffe.Object, **options: object) -> None:
        if obj.docstring:
            text = obj.docstring.value + "\n"
            obj.docstring.value = DOCTEST.sub(lambda lines: f"```pycon\n{lines[0].rstrip()}\n```\n", text)


def place_of(source: str) -> str:
    """Where a file of the repository is on the site."""
    return PLACES.get(source) or re.sub(r"\.ipynb$", ".md", source.removeprefix("docs/"))


def source_of(place: str) -> str:
    """The file of the repository of which a page of the site is made."""
    sources = [
        *OUTSIDE,
        *PLACES,
        *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")),
    ]
    return {place_of(source): source for source in sources}.get(place, f"docs/{place}")


def rooms() -> list[str]:
    """The rooms of the package, which are the pages of the API."""
    package = ROOT / "gradfn"
    found = [
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    return sorted(set(found) - NOT_DOCUMENTED)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the navigation from docs/index.md: a heading is a section, and a link in it a page."""
    nav: list[dict] = [{"Home": place_of("README.md")}, {"All pages": place_of("docs/index.md")}]
    for section in (ROOT / "docs/index.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, text = section.split("\n", 1)
        targets = [posixpath.normpath(f"docs/{target}") for _, target in LINK.findall(text)]
        nav.append({title: [place_of(target) for target in targets if target not in OUTSIDE]})
        if title == "Reference":
            nav[-1][title].append({"API": ["api/gradfn.md", *(f"api/{room}.md" for room in rooms())]})
    nav.append({"Project": [place_of(source) for source in OUTSIDE[1:3]]})
    config.nav = nav
    config.theme.static_templates.discard("404.html")  # its links are right at the root of a server alone
    config.mdx_configs["toc"]["slugify"] = anchor_of
    return config


def anchor_of(heading: str, separator: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, or not there under their name on the site."""
    if index := files.get_file_from_path("index.md"):
        files.remove(index)
    texts = {
        place_of(source): (ROOT / source).read_text(encoding="utf-8")
        for source in [*OUTSIDE, "docs/index.md"]
    }
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        texts |= page_of(json.loads(notebook.read_text(encoding="utf-8")), f"notebooks/{notebook.stem}")
    texts |= {f"api/{room}.md": page_of_room(room) for room in rooms()}
    texts["api/gradfn.md"] = top_level()
    for place, content in texts.items():
        files.append(File.generated(config, place, content=content))
    return files


def page_of(notebook: dict, place: str) -> dict[str, str | bytes]:
    """The page of a notebook, and its pictures."""
    text, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        text.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            printed += "".join(output.get("text", []))
            if "image/png" in data:
                name = f"{place}-{len(pictures) + 1}.png"
                pictures[name] = b64decode(data["image/png"])
                text.append(f"![What the cell above draws]({posixpath.basename(name)})")
            else:
                printed += "".join(data.get("text/plain", []))
        if printed:
            text.append(f'<div class="output" markdown="1">\n\n```text\n{printed.rstrip()}\n```\n\n</div>')
    return {f"{place}.md": "\n\n".join(text) + "\n", **pictures}


def exported(room: str) -> dict[str, str]:
    """The public names of a room that is a folder, and where each is defined."""
    init = ROOT / f"gradfn/{room}/__init__.py"
    if not init.exists():
        return {}
    places, tree = {}, ast.parse(init.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            places |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    listed = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.dump(node)
    ]
    names = ast.literal_eval(listed[0]) if listed else []
    return {name: places.get(name, f"gradfn.{room}.{name}") for name in names}


def page_of_room(room: str) -> str:
    """The page of a room: its public names, or what its file defines."""
    names = exported(room)
    if not names:
        return f"# gradfn.{room}\n\n::: gradfn.{room}\n"
    about = ast.get_docstring(ast.parse((ROOT / f"gradfn/{room}/__init__.py").read_text(encoding="utf-8")))
    own = {name: path for name, path in names.items() if path.startswith(f"gradfn.{room}.")}
    entries = [
        f"::: {path}\n    options:\n      show_root_heading: true\n      heading: gradfn.{room}.{name}\n"
        for name, path in own.items()
    ]
    others = [f"[`{path}`][{path}]" for name, path in names.items() if name not in own]
    also = f"It also has {', '.join(others)}.\n" if others else ""
    return "\n".join([f"# gradfn.{room}\n\n{about}\n", also, *entries])


def top_level() -> str:
    """The names of `gradfn` itself, each a link to the room that has it."""
    stub = ast.parse((ROOT / "gradfn/__init__.pyi").read_text(encoding="utf-8"))
    rows = []
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            room, places = node.module, exported(node.module)
            names = [
                f"[`gf.{alias.name}`][{places.get(alias.name, f'gradfn.{room}.{alias.name}')}]"
                for alias in node.names
            ]
            rows.append(f"| [`gradfn.{room}`]({room}.md) | {', '.join(names)} |")
    head = "# gradfn\n\nThe names that most programs use, after `import gradfn as gf`, by their rooms.\n"
    return "\n".join([head, "| room | names |", "|---|---|", *rows, ""])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    folder = posixpath.dirname(source_of(here))

    def translated(link: re.Match) -> str:
        target = place_of(posixpath.normpath(posixpath.join(folder, link[2])))
        return link[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(translated, part) for part in parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show formulas as MathML, which browsers draw without a script."""

    def drawn(formula: re.Match) -> str:
        text = formula[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(text, display="block" if formula[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)
