"""A session at the terminal: a text is asked for, answered, and the next one is asked for."""

import sys
from collections.abc import Callable
from contextlib import suppress

from gradfn.cli.app import report
from gradfn.errors import InputError

PROMPT, ARROW = "query> ", "=>"
HOW = f"type a text, or a prompt {ARROW} its completion; Ctrl-D ends"


def at_a_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def converse(answer: Callable[[str, str | None], object]) -> None:
    """Ask for texts until Ctrl-D, and answer each; a text that is refused is told why.

    Args:
        answer: called with a text and what follows it, or None.
    """
    with suppress(ImportError):  # not on every system; with it, input() has arrow keys and a history
        import readline  # noqa: F401
    while True:
        try:
            text = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # what is typed is dropped
            print()
            continue
        prompt, arrow, completion = text.partition(f" {ARROW} ")
        if not text.strip():
            continue
        try:
            answer(prompt, f" {completion.strip()}" if arrow else None)
        except InputError as error:
            report(error)
