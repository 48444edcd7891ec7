"""The Typer application: a command for every request, and how errors are told."""

import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import typer

import gradfn
from gradfn.cli.commands import COMMANDS, CURVATURE, TRUTH, spelled
from gradfn.cli.console import SPOKEN, Command, Group
from gradfn.cli.request import Request, flag, flag_of, slots_of, takes
from gradfn.cli.values import STDOUT
from gradfn.errors import InputError, LostFileError, StorageError
from gradfn.watch import WATCH

GROUPS = {
    "mask": (CURVATURE, "Selective masks of gradients."),
    "evaluate": (TRUTH, "Tell what scores are worth."),
}


class Commands(Group):
    """The commands of the requests, of which only the one that is asked for is made."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        outer = (self.name,) if self.name in GROUPS else ()
        words = {tuple(request.COMMAND.split()): request for request in COMMANDS}
        self.requests = {name[-1]: request for name, request in words.items() if name[:-1] == outer}
        self.commands = {**dict.fromkeys(self.requests), **self.commands}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name."""
        request = self.requests.get(cmd_name)
        if request is None:
            return super().get_command(ctx, cmd_name)
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name, cls=Command, help=request.__doc__)(takes(request, runner(request)))
        return typer.main.get_command(alone)

    def listed(self, ctx: Any) -> Iterator[tuple[str, str, str]]:
        """The panel, name and description of each command."""
        for name, group in self.commands.items():
            if (request := self.requests.get(name)) is None:
                yield GROUPS[name][0], name, group.help
            else:
                yield "Commands" if self.name in GROUPS else COMMANDS[request][0], name, request.__doc__ or ""


app = typer.Typer(
    name="gradfn",
    cls=Commands,
    help="Which training examples made the model do this? Start with `gradfn score`: without arguments it "
    "shows an example. Options may be spelled with - or _, and may stand in a file that --config names; "
    "--debug shows the traceback of an error.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": flag_of},
)
for _name, (_, _help) in GROUPS.items():
    app.add_typer(typer.Typer(help=_help, cls=Commands, rich_markup_mode=None), name=_name, cls=Commands)

FLAGS = {
    "with `overwrite=True`": "with --overwrite",
    "give `overwrite=True`": "add --overwrite",
    "`merge_run`": "gradfn merge",
    "`mask_run` wrote a mask": "gradfn mask fit made a mask",
    "build, score_run, hessian_shard or retrain": "build, score, hessian or retrain",
    "`gf.project(16)`": "--projection-dim 16",
    "`gf.project(32)`": "--projection-dim 32",
    "`normalize=gf.hf.load_optimizer_state(...)`": "--optimizer-state",
    "leave out `normalize`": "leave out --optimizer-state",
    "`slots`": "--replay-slots",
    "`window`": "--steps",
    "make them with `brittleness_subsets`": "make them with gradfn retrain --remove-top K --scores RUN",
    "subsets of `brittleness_subsets`": "that gradfn retrain --remove-top makes",
    "`controls`": "--controls",
    "`components`": "--target-downweight-components",
    "without `shard`": "without --shard",
    "end the transform in `unit_normalize()`": "add --unit-normalize",
    "`View(tokens=False)`": "--by example",
    "without a projection, a unit norm and a curvature": "with --projection none, and without "
    "--unit-normalize and --hessian-path",
    "the same data and queries": "the same --dataset and --query",
    "the same data, queries and tokenizer": "the same --dataset, --query, columns and tokenizer",
}
"""What messages of the library say, and how the command line says it."""

_PATHS = {
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}
_CLOSED = {errno.EPIPE, errno.EBADF}
MADE = {
    "the command that made it": "{}", "its command": "{}", "their commands": "their commands ({}, say)"
}  # fmt: skip
"""How messages of the library speak of commands, and how the command line does where it knows them."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

UsageError: Any = typer.BadParameter.__base__
"""What the parser raises; typer has it from click, or from a copy of click inside, and does not export it."""


def report(error: Exception) -> int:
    """Tell an error in one sentence; the exit status: 2 is the user's input, 1 is ours or the disk's."""
    from gradfn.report.words import clean

    print(f"gradfn: {clean(_sentence(error))}", file=sys.stderr)
    path = isinstance(error, OSError) and not isinstance(error, StorageError) and error.errno in _PATHS
    return 2 if path or isinstance(error, InputError | UsageError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "gradfn"  # pyright: ignore
        return f"{error.format_message().rstrip('.')}: see {command} --help"  # pyright: ignore
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, InputError | StorageError) or full:
        text = _with_flags(str(error.strerror if isinstance(error, OSError) and error.strerror else error))
        return _with_command(text, error)
    if isinstance(error, OSError) and error.errno in _PATHS:
        name = str(error.filename)
        shown = name if len(name) < 80 else f"{name[:60]}..."
        return f"{shown} cannot be used as a path ({error.strerror}): check it and its permissions"
    if isinstance(error, OSError) and error.errno in _CLOSED:
        return f"nothing can be written to the output ({error.strerror}): leave it open, or give --csv FILE"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return f"out of memory ({str(error) or 'RAM'}): lower --token-batch-size, or --projection-dim"
    return f"{type(error).__name__}: {error} (gradfn's fault: run again with --debug and tell us)"


def _with_command(text: str, error: BaseException | None) -> str:
    """A message in which the command that makes a file is spelled, where a file beside it records this."""
    while error is not None and not isinstance(error, LostFileError):
        error = error.__cause__
    phrase = next((phrase for phrase in MADE if phrase in text), None)
    if error is None or phrase is None:
        return text
    from gradfn.store.reader import request_beside

    if not (request := request_beside(error.path)):
        return text
    if shard := re.search(r" \(--shard (\d+/\d+)\)", text):
        text = text.replace(shard[0], "")
        request = {**request, "given": {**request["given"], "shard": shard[1]}}
    return text.replace(phrase, MADE[phrase].format(spelled(request, error.path)))


def _with_flags(text: str) -> str:
    """A message of the library, in which arguments are named as the command line spells them."""
    text = re.sub(r"`shard=Shard\((\w+), (\w+)\)`", r"--shard \1/\2", text)
    for argument, option in FLAGS.items():
        text = text.replace(argument, option)
    named = (slots_of(request).values() for request in COMMANDS)
    names = "|".join(sorted({slot.name for slots in named for slot in slots if not slot.about.positional}))
    value = r"[A-Z]\w*\([^()]*\)"  # such as Adam(eps=1e-08), whose eps is no option
    pattern = rf"{value}|(?<![\w'\"/.`-])(`?)({names})(?:=('[^']*'|[\w.:+]+))?`?(?![\w'\"=`])"
    return re.sub(pattern, _flagged, text)


def _flagged(match: re.Match[str]) -> str:
    """An argument that the library names, as an option; a plain word stays, which needs not be one."""
    quote, name, value = match.groups()
    if name is None or (value is None and not quote and "_" not in name):
        return match[0]
    return flag(name) if value in (None, "True") else f"{flag(name)} {value.strip(chr(39))}"


def _version(wanted: bool) -> bool:
    if wanted:
        print(gradfn.__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    # The first lines of a command say the same.
    warnings.filterwarnings("ignore", message=".* of the weight matrices of .* are left out")


def torch_threads(number: int) -> None:
    """Use so many threads of the CPU."""
    if number < 1:
        raise InputError(f"--threads must be 1 or more, not {number}")
    import torch

    torch.set_num_threads(number)


LOADING_AFTER_S = 1.0
"""Of loading that takes no longer nothing is said."""


@contextmanager
def _loading(quiet: bool) -> Iterator[None]:
    """Say after a second that libraries are being loaded, which may take many more."""
    said = "gradfn: loading PyTorch and what goes with it"
    timer = threading.Timer(LOADING_AFTER_S, print, [said], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _processes(made: Any, command: Callable[[Any], None]) -> None:
    """Run a command in this one of the processes that torchrun started."""
    from gradfn.cli.together import run_together
    from gradfn.runs.processes import started

    processes = started()
    if processes is None and made.sharded:
        raise InputError(
            "--fsdp shards the model over processes, and this is the only one: start several with torchrun "
            f"--nproc-per-node N -m gradfn {made.COMMAND} ..."
        )
    command(made) if processes is None else run_together(made, command, processes)


def runner(request: type[Request]) -> Callable[[Any], None]:
    """What runs a request; its file is loaded when it does."""
    file, function = COMMANDS[request][1].split(":")

    def run(made: Any) -> None:
        tables = made.table.paths.values() if hasattr(made, "table") else ()
        with _loading(made.quiet):
            from gradfn.report.progress import QUIET, progress_bar

            command = getattr(import_module(f"gradfn.cli.{file}"), function)
        if (threads := getattr(getattr(made, "model", None), "threads", None)) is not None:
            torch_threads(threads)
        QUIET.set(made.quiet)
        WATCH.set(progress_bar)
        SPOKEN.set("nowhere" if made.quiet else "err" if STDOUT in tables else "out")
        try:
            together = "LOCAL_RANK" in os.environ or made.sharded
            _processes(made, command) if together else command(made)
        except KeyboardInterrupt as stop:  # typer makes status 130 of it, without a word
            print(f"gradfn: stopped; {stop}" if str(stop) else "gradfn: stopped", file=sys.stderr)
            raise

    return run
