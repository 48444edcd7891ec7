"""The page on verification: its code runs, and prints what it says."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_of_the_page_runs_and_prints_what_it_says(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert printed
    assert printed in PAGE
