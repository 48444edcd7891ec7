"""Where results are printed, and help in panels."""

import inspect
import os
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

ARGUMENTS, FIRST, OPTIONS = "Arguments", "Most used", "Options"
PANELS = (ARGUMENTS, FIRST, "Data", "Query", "Method", "Model", "Gradients", "Curvature")
"""What the help shows first, in this order."""


Spoken = Literal["out", "err", "nowhere"]
SPOKEN: ContextVar[Spoken] = ContextVar("SPOKEN", default="out")
"""Where a command says what it does: on stderr where stdout is for a table, nowhere if it is to be quiet."""


def console() -> "Console":
    """Where results are printed; other programs get a line a row."""
    from gradfn.report.tables import Piped

    return _console() if _stream().isatty() else _console(Piped)


def _stream() -> Any:
    return sys.stderr if SPOKEN.get() == "err" else sys.stdout


def _console(kind: Any = None) -> "Console":
    """A console of 100 columns where there is no terminal."""
    from rich.console import Console

    width = None if _stream().isatty() or "COLUMNS" in os.environ else 100
    quiet = SPOKEN.get() == "nowhere"
    how: dict[str, Any] = {"highlight": False, "soft_wrap": False, "emoji": False, "quiet": quiet}
    return (kind or Console)(file=_stream(), width=width, **how)


class Command(TyperCommand):
    """A command whose help is in panels."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage; that an argument may stand in a file makes it no option."""
        arguments = (one for one in self.params if one.param_type_name == "argument")
        return ["[OPTIONS]", *(str(one.metavar) for one in arguments)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help; Typer's own loads Markdown and syntax highlighting, and takes twice the time."""
        formatter.write(_help(self, ctx, {}))


class Group(TyperGroup):
    """Commands whose help is in panels."""

    def listed(self, ctx: Any) -> Iterable[tuple[str, str, str]]:
        """The panel, name and description of each command."""
        raise NotImplementedError

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help; see `Command`."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for panel, name, text in self.listed(ctx):
            panels.setdefault(panel, []).append((name, _paragraphs(text)[0]))
        formatter.write(_help(self, ctx, panels))


def _help(command: Any, ctx: Any, commands: dict[str, list[tuple[str, str]]]) -> str:
    """Usage, description, and a panel for each kind of commands, arguments and options."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels = dict(commands)
    for one in command.get_params(ctx):
        panel = ARGUMENTS if one.param_type_name == "argument" else one.rich_help_panel or OPTIONS
        panels.setdefault(panel, []).append((_spelled(one), one.help or ""))
    out = _console()
    with out.capture() as capture:
        out.print(Text("\n\n".join([command.get_usage(ctx), *_paragraphs(command.help or "")]) + "\n"))
        for title in sorted(
            panels, key=lambda title: PANELS.index(title) if title in PANELS else len(PANELS)
        ):
            grid = Table.grid(padding=(0, 2), expand=True)
            grid.add_column(no_wrap=True)
            grid.add_column(ratio=1)
            for name, text in panels[title]:
                grid.add_row(Text(name, style="bold cyan"), Text(text))
            out.print(Panel(grid, title=Text(title, style="bold"), title_align="left", border_style="dim"))
    return capture.get()


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a description."""
    return [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]


def _spelled(one: Any) -> str:
    """An option as it is typed, by its first name, and what follows it."""
    if one.param_type_name == "argument":
        return one.metavar
    short = [name for name in one.opts if not name.startswith("--")]
    names = ", ".join([*short, next(name for name in one.opts if name.startswith("--"))])
    return names if one.is_flag or one.metavar is None else f"{names} {one.metavar}"
