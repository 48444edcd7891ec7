"""The README's Python runs as it stands there, and its two commands are the ones that CI runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["library", "any module"])
def test_python_of_the_readme_runs(block, capsys):
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    scores = names["scores"]
    assert scores.matrix.ndim == 2  # pyright: ignore[reportAttributeAccessIssue]
    if "tokenizer" in names:
        assert "burundi" in capsys.readouterr().out


def test_the_two_commands_are_marked_for_ci():
    for marker, last in (("run", "gradfn score"), ("test", "pytest -n 2")):
        found = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)\n```\n<!-- end -->", README, re.DOTALL)
        assert found
        assert found[1].splitlines()[-1] == last
