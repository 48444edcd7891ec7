"""How gradfn is built, in numbers, beside an earlier revision and other packages, as a Markdown table.

    python benchmarks/house.py [PACKAGE ...] [--against REV]

PACKAGE is the name of an installed package, or a path to its folder. Files are parsed; nothing is imported.

* code: lines with a token that is no comment and not in a docstring (a statement that is a string).
* body of a function: all lines from its first statement after the docstring to its last.
* private functions: `_name` on the top level of a file. A caller is another place in the file that names it.
* rooms: files and folders on the top level. A room imports another where one of its files does, at load time
  or in a function, but not for types alone. Only rooms of ROOMS can go against its order.
* import cycles: files that import themselves by way of others at load time, and files between two of these.
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

ROOMS = (
    "types", "errors", "random", "memory", "data", "store", "linalg", "model", "subject", "scores",
    "transforms", "engine", "statistics", "exact", "methods", "runs", "hf", "train", "evaluate", "report",
    "testing", "example", "cli",
)  # fmt: skip
"""The rooms of gradfn in order: each imports only from those before it."""

ROOT = Path(__file__).resolve().parent.parent
LONG, MANY, SHORT = 500, 8, 3  # lines of a file; arguments; lines of a body
SILENT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_text(node: ast.AST) -> bool:
    """Whether a statement is a string and nothing else."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def lines_of(*statements: ast.AST) -> range:
    return range(getattr(statements[0], "lineno", 1), getattr(statements[-1], "end_lineno", 1) + 1)


def body_of(function: Function) -> int:
    body = function.body[is_text(function.body[0]) :]
    return len(lines_of(*body)) if body else 0


def arguments_of(function: Function) -> int:
    """The arguments that have a name, without self and cls."""
    named = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return sum(argument.arg not in ("self", "cls") for argument in named)


def references(tree: ast.AST, name: str) -> int:
    """How often a tree has a name, alone or behind a dot."""
    return sum(name == getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree))


def running(node: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    """The nodes that run: none under `if TYPE_CHECKING`, and with `at_load` none in functions."""
    for child in ast.iter_child_nodes(node):
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not typing and not (at_load and isinstance(child, Function | ast.Lambda)):
            yield from (child, *running(child, at_load))


class File:
    """One file of a package, by the name of its module."""

    def __init__(self, package: str, path: PurePosixPath, text: str):
        parts = [package, *path.with_suffix("").parts]
        self.folder, self.room = parts[:-1], parts[1]
        self.name = ".".join(parts[:-1] if path.stem == "__init__" else parts)
        self.length, self.tree = len(text.splitlines()), ast.parse(text)
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, Function)]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        spans = [range(t.start[0], t.end[0] + 1) for t in tokens if tokenize.tok_name[t.type] not in SILENT]
        self.docstrings = {n for node in ast.walk(self.tree) if is_text(node) for n in lines_of(node)}
        self.code = {n for span in spans for n in span} - self.docstrings

    def private(self) -> list[tuple[int, int]]:
        """Of every private function: its callers, and the lines of its body."""
        top = [node for node in self.tree.body if isinstance(node, Function)]
        own = [f for f in top if f.name.startswith("_") and not f.name.startswith("__")]
        return [(references(self.tree, f.name) - references(f, f.name), body_of(f)) for f in own]

    def imports(self, at_load: bool) -> Iterator[tuple[str, str]]:
        """What is imported: a module, and a name in it (or nothing)."""
        for node in running(self.tree, at_load):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = self.folder[: len(self.folder) - node.level + 1] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                yield from ((module, alias.name) for alias in node.names)


class Package:
    def __init__(self, title: str, name: str, texts: Mapping[PurePosixPath, str]):
        self.title, self.name, self.stub = title, name, texts.get(PurePosixPath("__init__.pyi"))
        self.all = [File(name, path, text) for path, text in texts.items() if path.suffix == ".py"]
        self.files = {file.name: file for file in self.all}

    def targets(self, file: File, at_load: bool) -> set[str]:
        """The files of the package that a file imports."""
        pairs = ((f"{module}.{name}", module) for module, name in file.imports(at_load))
        return {next((one for one in pair if one in self.files), file.name) for pair in pairs} - {file.name}

    def edges(self) -> set[tuple[str, str]]:
        pairs = {(f.room, self.files[to].room) for f in self.all for to in self.targets(f, at_load=False)}
        return {(one, to) for one, to in pairs if one != to and "__init__" not in (one, to)}

    def against_order(self) -> list[str]:
        known = (edge for edge in self.edges() if {*edge} <= {*ROOMS})
        return sorted(f"{one} -> {to}" for one, to in known if ROOMS.index(one) < ROOMS.index(to))

    def in_cycles(self) -> list[str]:
        """What is left when files that import nothing, or that nothing imports, are taken away in turn."""
        left, before = {file.name: self.targets(file, at_load=True) for file in self.all}, -1
        while len(left) != before:
            before, needed = len(left), {to for needs in left.values() for to in needs}
            left = {name: needs & left.keys() for name, needs in left.items() if name in needed}
            left = {name: needs for name, needs in left.items() if needs & left.keys()}
        return sorted(left)

    def exported(self) -> int:
        """The names of `__all__`, or else those that the top level imports; a stub goes first."""
        body = ast.parse(self.stub).body if self.stub else self.files[self.name].tree.body
        taken = [a.asname or a.name for n in body if isinstance(n, ast.ImportFrom) for a in n.names]
        assigned = [n for n in body if isinstance(n, ast.Assign)]
        lists = [n.value for n in assigned if ast.unparse(n.targets[0]) == "__all__"]
        return len(ast.literal_eval(lists[0]) if lists else taken)

    def column(self) -> dict[str, str]:
        bodies = sorted(body_of(f) for file in self.all for f in file.functions)
        middle, high = (bodies[len(bodies) * percent // 100] for percent in (50, 95))
        arguments = [arguments_of(f) for file in self.all for f in file.functions]
        private = [pair for file in self.all for pair in file.private()]
        once = [lines for callers, lines in private if callers == 1]
        rooms, ours = {file.room for file in self.all} - {"__init__"}, self.name == "gradfn"
        counts = {
            "lines of code": [sum(len(file.code) for file in self.all)],
            "lines of docstrings": [sum(len(file.docstrings) for file in self.all)],
            "lines of code in cli/": [sum(len(file.code) for file in self.all if file.room == "cli")],
            f"files; over {LONG} lines": [len(self.all), sum(file.length > LONG for file in self.all)],
            "body of a function: p50; p95; largest": [middle, high, bodies[-1]],
            f"most arguments; functions with over {MANY}": [max(arguments), sum(n > MANY for n in arguments)],
            "private functions; with one caller": [len(private), len(once)],
            f"of these, bodies of {SHORT} lines or fewer": [sum(lines <= SHORT for lines in once)],
            "names in `__init__`": [self.exported()],
            "rooms; not in ROOMS": [len(rooms), *([len(rooms - {*ROOMS})] if ours else [])],
            "imports of rooms; against": [len(self.edges()), *([len(self.against_order())] if ours else [])],
            "files in import cycles": [len(self.in_cycles())],
        }
        cells = {row: "; ".join(f"{number:,}" for number in numbers) for row, numbers in counts.items()}
        return {"": self.title, "---": "---:", **cells}


def read_folder(name: str) -> Package:
    """The package of this name, or in this folder."""
    spec = None if Path(name).is_dir() else find_spec(name)
    place = (Path(spec.origin).parent if spec and spec.origin else Path(name)).resolve()
    paths = sorted(path for path in place.rglob("*.py*") if path.suffix in (".py", ".pyi"))
    if not paths:
        raise SystemExit(f"no package {name!r}: give a path to its folder, or install it")
    texts = {PurePosixPath(path.relative_to(place).as_posix()): path.read_text("utf-8") for path in paths}
    return Package(place.name, place.name, texts)


def read_revision(revision: str) -> Package:
    """gradfn as it is at a git revision."""
    done = subprocess.run(["git", "archive", revision, "gradfn"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise SystemExit(f"no gradfn at revision {revision!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = {PurePosixPath(one.name): archive.extractfile(one) for one in archive if ".py" in one.name}
        texts = {path.relative_to("gradfn"): file.read().decode() for path, file in files.items() if file}
    return Package(f"gradfn at {revision}", "gradfn", texts)


def main() -> None:
    parser = argparse.ArgumentParser(description="How gradfn is built, in numbers.")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="a folder, or an installed package")
    parser.add_argument("--against", nargs=1, default=[], metavar="REV", help="a git revision of gradfn")
    options = parser.parse_args()
    ours, earlier = read_folder(str(ROOT / "gradfn")), map(read_revision, options.against)
    columns = [one.column() for one in (ours, *earlier, *map(read_folder, options.packages))]
    for row in columns[0]:
        print("|", " | ".join([row, *(column[row] for column in columns)]), "|")
    against, cycles = (", ".join(found) or "none" for found in (ours.against_order(), ours.in_cycles()))
    print(f"\nagainst the order: {against}\nin import cycles: {cycles}")


if __name__ == "__main__":
    main()
