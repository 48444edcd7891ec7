"""What a release is made of: one version everywhere, and every file of the package in the wheel."""

import re
import tomllib
from pathlib import Path

import gradfn

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    version = re.escape(gradfn.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.search(rf"^## {version} \((\d{{4}}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert released, f"CHANGELOG.md has no heading '## {gradfn.__version__} (date)'"
    assert re.search(rf"^version: {version}$", citation, re.MULTILINE)
    assert f'date-released: "{released[1]}"' in citation


def test_every_file_of_the_package_is_in_the_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = ROOT / "gradfn"
    packed = {
        path
        for name, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*name.split(".")).glob(pattern)
        if path.is_file() and path.suffix != ".py"
    }
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == packed
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
