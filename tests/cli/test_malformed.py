"""Three hundred broken inputs: each is one sentence with status 2, and no run is begun."""

import pytest
from malformed import Given, malformed

NUMBER = 300
SAMPLE = range(0, NUMBER, 7)


@pytest.mark.parametrize("number", [
    pytest.param(number, marks=() if number in SAMPLE else pytest.mark.slow) for number in range(NUMBER)
])  # fmt: skip
def test_what_is_malformed_is_refused_in_one_sentence(command, model, corpus, store, tmp_path, number):
    case = malformed(number, Given(model, corpus, store), tmp_path)
    result = command(*case.arguments)
    assert result.status == 2 or (result.status == 0 and not case.surely), (case.what, result)
    if result.status:
        assert result.err.startswith("gradfn: "), (case.what, result.err)
        assert result.err.count("\n") == 1, (case.what, result.err)
        assert "gradfn's fault" not in result.err, (case.what, result.err)
        assert not [*(tmp_path / "run").rglob("*")], case.what
