"""Requests: what a command is asked, as a frozen dataclass whose fields are its options.

    @dataclass(frozen=True)
    class TableOptions:
        PANEL: ClassVar[str] = "Output"
        top: int = option(3, "Proponents and opponents to show of each query.")

    @dataclass(frozen=True, kw_only=True)
    class ScoreRequest(Request):
        \"\"\"Show which training rows made the model do this.\"\"\"
        run: str | None = argument("The run directory to write.", default=None)
        table: TableOptions = group(TableOptions)

A field says once what its option's type, default, help and panel are. `make` is the only door: it takes
options by name, from the command line, from a file of `--config` or from what a run recorded, and parses them
to values.
"""

import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import typer

from gradfn.errors import InputError

R = TypeVar("R", bound="Request")
Given = Mapping[str, Any]
"""Options by name, as text, number, True or a list of texts: what the user gave, in this order."""
CONFIG = "A .toml or .json file with options by name; what stands on the command line is taken instead."
MOST_USED, OUTPUT = "Most used", "Output"


def found(text: str) -> str:
    """A path that is read: absolute where there is such a file, else (a text, a name on a hub) as it is.

    >>> found("no such file")
    'no such file'
    """
    return os.path.abspath(text) if os.path.exists(text) else text


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field beside its type.

    Args:
        help: one sentence.
        panel: where the help shows it; None: the panel of its group.
        name: of the option, where it is not that of the field.
        parse: from text to the value; a default that is a text is parsed too.
        commas: whether the text is several values with commas between, which a file may give as a list.
        shown: what the help says of the default, where it is not the value.
        file: what makes a path in it absolute, so that it can be found again: `found`, say.
        short: a second spelling, of one letter.
        positional: whether it is an argument.
        metavar: what the help calls an argument.
        type: of the option, where a request takes fewer values than the field's type has.
    """

    help: str
    panel: str | None = None
    name: str | None = None
    parse: Callable[[str], Any] | None = None
    commas: bool = False
    shown: str | None = None
    file: Callable[[str], str] | None = None
    short: str | None = None
    positional: bool = False
    metavar: str | None = None
    type: Any = None


def option(default: Any, help: str, **how: Any) -> Any:
    """A field that is an option; see `Option`."""
    return field(default=default, metadata={"option": Option(help, **how)})


def argument(help: str, default: Any = MISSING, **how: Any) -> Any:
    """A field that is a positional argument, required unless it has a default."""
    return field(default=default, metadata={"option": Option(help, positional=True, **how)})


def group(kind: Any, **changes: Any) -> Any:
    """A field of a request that holds a group of options.

    Args:
        kind: the dataclass of the group.
        changes: by field of the group, an `option` or `argument` to have instead; None: no such option here.
    """
    return field(default_factory=kind, metadata={"group": (kind, changes)})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command is asked.

    Args:
        given: what the user gave, by option name.
    """

    COMMAND: ClassVar[str] = ""
    """Its words on the command line."""
    PANEL: ClassVar[str] = OUTPUT
    FIRST: ClassVar[tuple[str, ...]] = ()
    """The options that most people need first."""
    WRITES: ClassVar[str] = ""
    """The kind of store that it writes to its run."""

    quiet: bool = option(False, "Print nothing but errors.", panel=OUTPUT)
    given: Given = field(default_factory=dict, compare=False, repr=False)

    @property
    def sharded(self) -> bool:
        """Whether its model is to be sharded over processes."""
        return bool(self.given.get("fsdp"))

    def gave(self, *names: str) -> str | None:
        """The first of these options that the user gave, as it is spelled."""
        return next((flag(name) for name in names if name in self.given), None)

    def record(self) -> dict[str, Any]:
        """What a run records of it, with paths that can be found from anywhere."""
        slots = slots_of(type(self))
        given = {name: slots[name].anchored(value) for name, value in self.given.items()}
        return {"request": {"command": self.COMMAND, "given": given}}


@dataclass(frozen=True)
class Slot:
    """An option of a request: its name, and the field where its value goes."""

    name: str
    owner: str | None
    field: str
    type: Any
    default: Any
    about: Option
    panel: str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, of others nothing."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def many(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.type) is tuple and self.about.parse is None

    @property
    def plain(self) -> Any:
        """Its type on the command line."""
        return list[str] if self.many else str if self.about.parse else self.type

    def value(self, given: Any) -> Any:
        """The value of what is given."""
        if self.about.parse is not None and isinstance(given, str):
            return self.about.parse(given)
        return tuple(given) if isinstance(given, list) else given

    def anchored(self, given: Any) -> Any:
        """What is given, with paths that can be found from anywhere."""
        if (file := self.about.file) is None or not isinstance(given, str | list):
            return given
        if isinstance(given, list):
            return [file(part) for part in given]
        return ",".join(file(part.strip()) for part in given.split(",")) if self.about.commas else file(given)

    def help(self) -> str:
        """Its sentence, then its choices and its default in brackets."""
        default = self.about.shown
        if default is None and not any(self.default is nothing for nothing in (MISSING, None, False)):
            default = flag_of(str(self.default)) if self.choices else str(self.default)
        shown = f"default: {default}" if default not in (None, "()") else ""
        brackets = "; ".join(filter(None, (", ".join(map(flag_of, self.choices)), shown)))
        return f"{self.about.help} [{brackets}]" if brackets else self.about.help


def flag_of(name: str) -> str:
    """A name as options and choices spell it.

    >>> flag_of("projection_dim")
    'projection-dim'
    """
    return name.replace("_", "-")


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{flag_of(name)}"


@cache
def slots_of(request: type[Request]) -> dict[str, Slot]:
    """The options of a request by name, arguments first."""
    slots = [slot for one in fields(request) for slot in _slots(request, one)]
    slots.sort(key=lambda slot: not slot.about.positional)
    named = {slot.name: slot for slot in slots}
    assert len(named) == len(slots), f"{request.__name__} has an option twice"
    return named


def _slots(request: type[Request], one: Field[Any]) -> Iterator[Slot]:
    if "option" in one.metadata:
        yield _slot(one, one, None, request.PANEL)
    elif "group" in one.metadata:
        kind, changes = one.metadata["group"]
        unknown = set(changes) - {inner.name for inner in fields(kind)}
        assert not unknown, f"{kind.__name__} has no {unknown}"
        for inner in fields(kind):
            if (changed := changes.get(inner.name, inner)) is not None:
                yield _slot(inner, changed, one.name, kind.PANEL)


def _slot(one: Field[Any], changed: Field[Any], owner: str | None, panel: str) -> Slot:
    about: Option = changed.metadata["option"]
    kind = about.type or one.type
    if not isinstance(kind, str) and NoneType in get_args(kind):  # of what is slow to import it is a text
        kind = next(part for part in get_args(kind) if part is not NoneType)
    return Slot(about.name or one.name, owner, one.name, kind, changed.default, about, about.panel or panel)


def make(request: type[R], given: Given) -> R:
    """The request of what is given.

    Args:
        given: checked values by option name, see `Given`.

    Raises:
        InputError: an argument is missing, or a text is empty or not what its option takes.
    """
    values: dict[str | None, dict[str, Any]] = {None: {}}
    for name, slot in slots_of(request).items():
        if slot.required and name not in given:
            raise InputError(f"Missing argument {name!r}: see gradfn {request.COMMAND} --help")
        text = given.get(name)
        if not slot.about.positional and "" in [text, *(text if isinstance(text, list) else [])]:
            raise InputError(f"{flag(name)} is empty: give a value, or leave it out")
        if isinstance(text, int) and abs(text) >= 2**62:
            raise InputError(f"{flag(name)} {text} is no number of this machine: give one below {2**62}")
        values.setdefault(slot.owner, {})[slot.field] = slot.value(given.get(name, slot.default))
    kinds = {one.name: one.metadata["group"][0] for one in fields(request) if "group" in one.metadata}
    groups = {name: kind(**values.get(name, {})) for name, kind in kinds.items()}
    return request(**values[None], **groups, given=dict(given))


def command_line(request: type[Request], given: Given) -> str:
    """The command that gives these options, quoted for a shell.

    >>> command_line(Request, {})
    'gradfn'
    """
    parts = {name: list(map(str, v)) if isinstance(v, list) else [str(v)] for name, v in given.items()}
    places = [name for name, slot in slots_of(request).items() if slot.about.positional and name in given]
    arguments, options = [part for name in places for part in parts.pop(name)], []
    for name, values in parts.items():
        if given[name] is True:
            options.append(flag(name))
        else:
            for part in values:
                options += [f"{flag(name)}={part}"] if part.startswith("-") else [flag(name), part]
    dashed = any(part.startswith("-") for part in arguments)
    words = [*options, "--", *arguments] if dashed else [*arguments, *options]
    return " ".join(map(_quoted, ["gradfn", *request.COMMAND.split(), *words]))


def _quoted(word: str) -> str:
    """A word for a shell; letters that cannot be printed are written as their numbers.

    >>> print(_quoted("a b"), _quoted("it's\\x1b[2J"))
    'a b' $'it\\'s\\u001b[2J'
    """
    if word.isprintable():
        return shlex.quote(word)
    letters = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    return "$'" + "".join(c if c.isprintable() and c not in letters else letters.get(c) or _numbered(c)
                          for c in word) + "'"  # fmt: skip


def _numbered(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"


# --- the command line


def takes(request: type[Request], run: Callable[[Any], None]) -> Callable[..., None]:
    """A function with the parameters that Typer makes the command of."""

    def callback(ctx: Any, **_: Any) -> None:
        given, slots = {}, slots_of(request)
        for (
            name,
            value,
        ) in ctx.params.items():  # options in the order in which they were given, then arguments
            if name in slots and value is not None and value is not False and value not in ((), []):
                given[name] = list(value) if isinstance(value, list | tuple) else value
        config = {} if (path := ctx.params.get("config")) is None else read_config(request, Path(path))
        run(make(request, {**given, **{name: v for name, v in config.items() if name not in given}}))

    config = typer.Option("--config", help=CONFIG, rich_help_panel=OUTPUT, show_default=False, metavar="FILE")
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
        *(_parameter(request, slot) for slot in slots_of(request).values()),
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[str | None, config]),
    ]
    # The parser reads the signature and the annotations, not the code.
    callback.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    callback.__annotations__ = {one.name: one.annotation for one in parameters}
    return callback


METAVARS: Mapping[Any, str | None] = {str: "TEXT", int: "N", float: "X", list[str]: "GLOB", bool: None}


def _parameter(request: type[Request], slot: Slot) -> inspect.Parameter:
    kind, about = slot.plain, slot.about
    how: dict[str, Any] = {"help": slot.help(), "show_default": False}
    if about.positional:
        name = (about.metavar or slot.name).upper() + ("..." if slot.many else "")
        info = typer.Argument(metavar=name if slot.required else f"[{name}]", **how)
    else:
        panel = MOST_USED if slot.name in request.FIRST else slot.panel
        metavar = "FILE" if about.parse is Path else METAVARS.get(kind, "NAME")
        names = [flag(slot.name), *filter(None, [about.short])]
        info = typer.Option(*names, rich_help_panel=panel, metavar=metavar, **how)
    default, kind = (False, bool) if kind is bool else (None, kind | None)
    annotation: Any = Annotated[kind, info]
    return inspect.Parameter(
        slot.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


# --- options that stand in a file, or in what a run recorded


def read_config(request: type[Request], path: Path) -> dict[str, Any]:
    """The options in a file, by name and as the command line would give them.

    Raises:
        InputError: no such file, not TOML or JSON; see also `checked`.
    """
    import tomllib

    if path.suffix not in (".toml", ".json"):
        raise InputError(f"--config {path} is no .toml and no .json: give a file with one of these endings")
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_pairs)
    except OSError as error:
        raise InputError(f"cannot read --config {path} ({error.strerror}): give a file of options") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path} cannot be read as {path.suffix[1:]} ({error}): mend it") from error
    if not isinstance(table, dict):
        raise InputError(f'--config {path} is no table of options: write {{"top": 5}}, say')
    return checked(request, table, str(path))


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return dict(pairs)


def checked(request: type[Request], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options in a table, by name and as the command line would give them.

    Raises:
        InputError: an option that the command does not have or that stands there twice, or a value that is
            not of its option's type.
    """
    given, slots = {}, slots_of(request)
    names = {flag_of(name): name for name in slots}
    for key, value in table.items():
        if (spelled := flag_of(key)) not in names:
            near = get_close_matches(spelled, names, 1, 0.0)[0]
            raise InputError(
                f"{where} has {key!r}, which is no option of gradfn {request.COMMAND}: did you mean {near!r}?"
            )
        if (name := names[spelled]) in given:
            raise InputError(f"{where} gives {flag(name)} twice, once as {key!r}: leave one of them out")
        given[name] = _plain(slots[name], value)
        if given[name] is None:
            shown = "a table" if isinstance(value, dict) else repr(value)
            raise InputError(
                f"{key} in {where} is {shown}, and {flag(name)} takes {_expected(slots[name])}: give that"
            )
    return {name: value for name, value in given.items() if value is not False}


def _plain(slot: Slot, value: Any) -> Any:
    """A value as the command line would give it; None where it is not of the option's type."""
    if isinstance(value, list):
        parts = [_text(part) for part in value]
        if None in parts or not parts or not (slot.many or slot.about.commas):
            return None
        return parts if slot.many else ",".join(filter(None, parts))
    if slot.choices:
        return next((c for c in slot.choices if flag_of(c) == flag_of(str(value))), None)
    if slot.plain in (bool, int):
        return value if type(value) is slot.plain else None
    if slot.plain is float:
        return float(value) if type(value) in (int, float) else None
    text = value if isinstance(value, str) else _text(value) if slot.about.parse else None
    return [text] if slot.many and text is not None else text


def _text(value: Any) -> str | None:
    """What a number or a text is on the command line."""
    return str(value) if isinstance(value, str) or type(value) in (int, float) else None


def _expected(slot: Slot) -> str:
    if slot.choices:
        return f"one of {', '.join(map(flag_of, slot.choices))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", list[str]: "texts"}
    return words.get(slot.plain, "a text, or a list of them" if slot.about.commas else "a text")
