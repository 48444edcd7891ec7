"""Run a command and draw what it printed as an SVG of a terminal.

    python docs/terminal.py "gradfn score --query ..." docs/score.svg [--width 100]

The command runs in a shell, with colours, as wide as the picture; its errors are not drawn.
"""

import argparse
import os
import subprocess
import sys
from io import StringIO

from rich.console import Console
from rich.text import Text


def draw(command: str, path: str, width: int) -> None:
    """Write the picture of a command and its output.

    Raises:
        CalledProcessError: the command fails.
    """
    terminal = {"FORCE_COLOR": "1", "COLUMNS": str(width), "TERM": "xterm-256color"}
    ran = subprocess.run(
        command, shell=True, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **terminal}
    )
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(ran.stdout.rstrip()))
    console.save_svg(path, title="gradfn")


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
