"""Run a command and draw what it printed as an SVG of a terminal.

    python docs/terminal.py "gradfn score --query ..." docs/score.svg [--width 100]

The command runs in a shell, with colours, as wide as the picture; its errors are not drawn.
"""

import argparse
import contextlib
import os
import pty
import subprocess
import sys
import termios
from io import StringIO

from rich.console import Console
from rich.text import Text


def draw(command: str, path: str, width: int) -> None:
    """Write the picture of a command and its output.

    Raises:
        CalledProcessError: the command fails.
    """
    printed = output_on_a_terminal(command, width)
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(printed.rstrip()))
    console.save_svg(path, title="gradfn")


def output_on_a_terminal(command: str, width: int) -> str:
    """What a command prints where it finds a terminal of a width; to a pipe it would print other tables."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (100, width))
    terminal = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color"}
    with subprocess.Popen(command, shell=True, stdout=theirs, env=terminal) as process:
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # that nothing more can come is an error on Linux
            while part := os.read(ours, 1 << 16):
                printed += part
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return printed.decode().replace("\r\n", "\n")


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("command")
    parser.add_argument("path")
    parser.add_argument("--width", type=int, default=100)
    asked = parser.parse_args()
    try:
        draw(asked.command, asked.path, asked.width)
    except subprocess.CalledProcessError as error:
        sys.exit(f"the command ended with status {error.returncode}: nothing was drawn")


if __name__ == "__main__":
    main()
