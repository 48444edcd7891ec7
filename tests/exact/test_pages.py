import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs"


NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "curvature", "methods"])
def test_the_code_of_a_page_runs_and_prints_what_it_says(capsys, name):
    """Words to the letter; numbers to a tenth, since iterations and rounding depend on the machine."""
    names, page = {}, (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for block, said in re.findall(r"```python\n(.*?)```\n\n?((?:    [^\n]*\n)*)", page, re.DOTALL):
        exec(block, names)
        printed, said = capsys.readouterr().out, re.sub("^    ", "", said, flags=re.MULTILINE)
        assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", said)
        numbers = [float(number) for number in re.findall(NUMBER, said)]
        assert [float(n) for n in re.findall(NUMBER, printed)] == pytest.approx(numbers, rel=0.1, abs=0.02)
    assert names
