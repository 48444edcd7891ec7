"""`gradfn rerun`: the command that made a run, again."""

from pathlib import Path
from typing import Any

from gradfn.cli.app import runner
from gradfn.cli.commands import COMMANDS, RerunRequest
from gradfn.cli.console import console
from gradfn.cli.request import Request, checked, command_line, make
from gradfn.cli.values import found_method
from gradfn.errors import InputError
from gradfn.report.tables import facts
from gradfn.runs.shards import shard_run
from gradfn.store import open_part, requests_of

DROPPED = ("overwrite", "csv", "jsonl", "parquet")
"""What is not done twice."""


def recorded_request(run: str) -> tuple[type[Request], dict[str, Any]]:
    """The command that made a run, and what it was given.

    Raises:
        InputError: there is no such run, it has no record, or several commands wrote to it.
    """
    found = requests_of(run)
    if not found:
        raise InputError(
            f"{run} does not record the command that made it, since an older gradfn or a Python program "
            "wrote it: give that command yourself"
        )
    commands = {request["command"]: kind for kind, request in found.items()}
    if len(commands) > 1:
        files = " and ".join(f"{kind}.h5 is of gradfn {command}" for command, kind in commands.items())
        raise InputError(f"several commands wrote to {run} ({files}): give one of these files")
    (name,) = commands
    kind = next((one for one in COMMANDS if name == one.COMMAND), None)
    if kind is None:
        raise InputError(f"{run} was made by gradfn {name}, which is no command of this gradfn")
    request = found[kind.WRITES] if kind.WRITES in found else next(iter(found.values()))
    return kind, checked(kind, request["given"], f"the record of {run}")


def run_rerun(request: RerunRequest) -> None:
    """Read what was asked, say it, and do it."""
    kind, recorded = recorded_request(request.run)
    given = {name: value for name, value in recorded.items() if name not in DROPPED}
    if request.into is not None:
        given["run"] = request.into
    if "record" in given:
        raise InputError(
            f"the command that made {request.run} writes to two runs, {given['run']} and {given['record']}: "
            f"give the command that gradfn info {request.run} --command shows"
        )
    made: Any = make(kind, given)
    lines = [("command", command_line(kind, given))]
    if _is_complete(shard_run(made.run, made.output.shard), kind.WRITES):
        lines.append(("complete", "this run has all its rows, and nothing is computed again"))
    console().print(facts(lines))
    _refuse_unseen(request, made)
    runner(kind)(made)


def _is_complete(run: Path, kind: str) -> bool:
    """Whether a run has all its rows, in files that can be opened."""
    try:
        open_part(run, kind)
    except InputError:
        return False
    return True


def _refuse_unseen(request: RerunRequest, made: Any) -> None:
    """Refuse a record, perhaps from somebody else, that runs code unasked or writes to another place.

    Raises:
        InputError: naming what to read first, and to give again.
    """
    if made.given.get("trust_remote_code") and not request.trust_remote_code:
        raise InputError(
            f"the command that made {request.run} runs code that comes with its model: read that, and give "
            "--trust-remote-code again"
        )
    method = made.given.get("method", "")
    if ":" in method and found_method(request.method or "") != method:
        raise InputError(
            f"the command that made {request.run} runs the file of its method: read it, and give --method "
            f"{method} again"
        )
    own = Path(request.run).parent if Path(request.run).is_file() else Path(request.run)
    written = {Path(made.run).resolve(), shard_run(made.run, made.output.shard).resolve()}
    if request.into is None and own.resolve() not in written:
        raise InputError(
            f"the command that made {request.run} writes to {made.run}: give the run to write, --into "
            f"{request.run} for this one"
        )
