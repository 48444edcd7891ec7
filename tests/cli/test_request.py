"""Requests: options are fields, declared once; what was given makes the same request again."""

import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import typer

from gradfn import statistics
from gradfn.cli import options, training
from gradfn.cli.app import app
from gradfn.cli.commands import COMMANDS, BuildRequest, LdsRequest, MaskFitRequest, ScoreRequest
from gradfn.cli.console import ARGUMENTS, OPTIONS
from gradfn.cli.request import Request, argument, command_line, flag, group, make, option, slots_of
from gradfn.errors import InputError
from gradfn.hf.models import ATTENTION, PRECISIONS
from gradfn.linalg.spectrum import Damping
from gradfn.runs.shards import Shard
from gradfn.train.spec import Training

REQUESTS = sorted(COMMANDS, key=lambda request: request.COMMAND)


def parsed(monkeypatch, *arguments):
    """The request that a command line makes."""
    seen = []
    monkeypatch.setattr(sys.modules["gradfn.cli.app"], "import_module", lambda _: Everything(seen))
    app([str(part) for part in arguments], prog_name="gradfn", standalone_mode=False)
    (request,) = seen
    return request


class Everything:
    """A module of which every function notes the request that it gets."""

    def __init__(self, seen):
        self.seen = seen

    def __getattr__(self, name):
        return self.seen.append


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda r: r.COMMAND)
def test_the_help_shows_every_option_once_in_a_panel(ok, request_type):
    panel, shown = None, []
    for line in ok(*request_type.COMMAND.split(), "--help").splitlines():
        if line.startswith("╭─ "):
            panel = line.strip("╭─╮ ")
        elif name := re.match(r"│ (?:-\w, )?([-[A-Z]\S*)", line):
            shown.append((panel, name[1].strip("[],.")))
    names = {slot.name: slot for slot in slots_of(request_type).values()}
    expected = {flag(name) for name, slot in names.items() if not slot.about.positional}
    options = [word for panel, word in shown if panel not in (ARGUMENTS, OPTIONS)]
    assert sorted(options) == sorted([*expected, "--config"])
    arguments = [word for panel, word in shown if panel == ARGUMENTS]
    assert len(arguments) == sum(slot.about.positional for slot in names.values())
    assert [word for panel, word in shown if panel == OPTIONS] == ["--help"]
    first = [word for panel, word in shown if panel == "Most used"]
    assert sorted(first) == sorted(map(flag, request_type.FIRST))


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda r: r.COMMAND)
def test_every_option_says_what_it_is(request_type):
    for slot in slots_of(request_type).values():
        assert slot.about.help[0].isupper() or slot.about.help[0] in "'01234cdglst", slot.about.help
        assert slot.about.help[-1] in ".'" or slot.about.help.endswith(": 10,20"), slot.about.help
        assert slot.panel
        assert not (isinstance(slot.type, str) and slot.about.parse is None), f"{slot.name} has no type"


def test_choices_are_the_librarys():
    assert set(get_args(options.Precision)) == {*PRECISIONS, "tf32"}
    assert set(get_args(options.Attention)) == set(ATTENTION)
    assert all(callable(getattr(statistics, kind)) for kind in get_args(options.Kind))
    for name in get_args(training.Optimizer):
        momentum = 0.95 if name == "muon" else 0.0
        for schedule in get_args(training.Schedule):
            assert Training(1, 1, 0.1, name, momentum=momentum, schedule=schedule).optimizer == name


def test_behind_the_door_there_are_values(monkeypatch):
    request = parsed(
        monkeypatch, "score", "run", "--damping", "0.1,truncated:1e-6", "--shard", "2/8", "--checkpoints",
        "a, b", "--checkpoint-weights", "1,2.5", "--csv", "t.csv", "--include", "a", "--include", "b",
        "--loss", "log-odds", "--top", "0", "--device", "cpu", "--self",
    )  # fmt: skip
    assert isinstance(request, ScoreRequest)
    assert request.run == "run"
    assert request.curvature.damping == (Damping(0.1), Damping(1e-6, "truncated"))
    assert request.output.shard == Shard(2, 8)
    assert request.method.checkpoints == ("a", "b")
    assert request.method.checkpoint_weights == (1.0, 2.5)
    assert request.table.csv == Path("t.csv")
    assert request.layers.include == ("a", "b")
    assert request.loss.criterion == "log_odds"
    assert request.table.top == 0
    assert request.model.device == "cpu"
    assert request.method.self_influence is True
    assert request.model.path is None
    assert make(MaskFitRequest, {"run": "m"}).keep == (128, 128)
    assert make(MaskFitRequest, {"run": "m", "keep": "64"}).keep == 64


def test_auto_is_a_device_that_is_here():
    import torch

    found = make(BuildRequest, {"run": "r"}).model.device
    assert found == ("cuda" if torch.cuda.is_available() else "cpu")
    assert make(BuildRequest, {"run": "r", "device": "cuda:3"}).model.device == "cuda:3"


def test_what_was_given_is_kept_in_its_order_and_makes_the_command_again(monkeypatch):
    words = ["score", "--top", "5", "a run", "--query", "it's \"so\"", "--model", "-odd", "--self",
             "--include", "*mlp*", "--include", "x", "--label_smoothing", "0.1"]  # fmt: skip
    request = parsed(monkeypatch, *words)
    assert request.given == {
        "top": 5, "run": "a run", "query": "it's \"so\"", "model": "-odd", "self": True,
        "include": ["*mlp*", "x"], "label_smoothing": 0.1,
    }  # fmt: skip
    assert list(request.given)[:3] == ["top", "query", "model"]
    line = command_line(ScoreRequest, request.given)
    assert line.startswith("gradfn score 'a run' --top 5 --query ")
    again = parsed(monkeypatch, *shlex.split(line)[1:])
    assert again == request
    assert again.given == request.given


def test_arguments_that_look_like_options_stand_behind_two_dashes(monkeypatch):
    line = command_line(LdsRequest, {"truth": "-t", "runs": ["a", "-b"], "seed": -1})
    assert line == "gradfn evaluate lds --seed=-1 -- -t a -b"
    request = parsed(monkeypatch, *shlex.split(line)[1:])
    assert (request.truth, request.runs, request.seed) == (("-t",), ("a", "-b"), -1)


def test_requests_compare_by_their_values_and_not_by_what_was_given():
    assert make(BuildRequest, {"run": "r", "seed": 0}) == make(BuildRequest, {"run": "r"})
    assert make(BuildRequest, {"run": "r", "seed": 1}) != make(BuildRequest, {"run": "r"})


@dataclass(frozen=True)
class Nouns:
    PANEL: ClassVar[str] = "Nouns"
    colour: str = option("red", "Of it.")
    size: int | None = option(None, "Of it.", name="width")


@dataclass(frozen=True, kw_only=True)
class Thing(Request):
    COMMAND: ClassVar[str] = "thing"
    name: str = argument("What it is called.")
    nouns: Nouns = group(Nouns, colour=None)
    more: Any = option("1,2", "Numbers.", parse=lambda text: [int(part) for part in text.split(",")])


def test_a_group_may_lack_an_option_and_a_default_is_parsed():
    assert list(slots_of(Thing)) == ["name", "quiet", "width", "more"]
    made = make(Thing, {"name": "x", "width": 3})
    assert made == Thing(name="x", nouns=Nouns("red", 3), more=[1, 2])
    with pytest.raises(InputError, match="Missing argument 'name': see gradfn thing --help"):
        make(Thing, {})


def test_an_option_stands_in_one_group_only():
    @dataclass(frozen=True, kw_only=True)
    class Twice(Request):
        one: Nouns = group(Nouns)
        other: Nouns = group(Nouns)

    with pytest.raises(AssertionError, match="Twice has an option twice"):
        slots_of(Twice)


def test_no_field_of_a_request_is_left_out_of_the_command_line():
    for request in COMMANDS:
        for one in fields(request):
            assert one.name == "given" or {"option", "group"} & set(one.metadata), (request, one.name)


def test_choices_take_hyphens_and_underscores(monkeypatch):
    for spelled in ("image-classification", "image_classification"):
        assert parsed(monkeypatch, "build", "r", "--task", spelled).model.task == "image_classification"


def test_every_command_is_typers():
    top = typer.main.get_command(app)
    for request in COMMANDS:
        *outer, name = request.COMMAND.split()
        there = top.get_command(None, outer[0]) if outer else top
        assert name in there.list_commands(None)
        names = {parameter.name for parameter in there.get_command(None, name).params}
        assert names == {*slots_of(request), "config"}
