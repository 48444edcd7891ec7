"""A page of scores: one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradfn.errors import InputError
from gradfn.evaluate.scored import refuse_other_data, sides_of
from gradfn.report.gathering import Budget, Gathered
from gradfn.report.page_runs import Beside, PageRun, open_page_run
from gradfn.report.page_values import Page
from gradfn.report.pictures import Scatter
from gradfn.report.rendering import render
from gradfn.store.file import disk_errors

__all__ = ["Beside", "PageRun", "open_page_run", "write_page"]

LIMIT = 3_000_000
"""Bytes of a page."""


def write_page(
    runs: Sequence[PageRun],
    path: str | Path,
    *,
    top: int = 10,
    scatters: Sequence[Scatter] = (),
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write scores as one HTML file of less than 3 MB, which needs no network and no server.

    Args:
        runs: of the same rows and queries; the first is shown, the others beside it.
        path: the file.
        top: proponents and opponents that every query lists without scripts.
        scatters: predicted and real changes.
        command: that makes the page again.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        InputError: no runs, runs of other rows or queries, a file that is there.
        StorageError: the disk is full or failed; an old file is kept.

    >>> import tempfile
    >>> import torch
    >>> from gradfn.scores import Scores
    >>> folder = tempfile.mkdtemp()
    >>> _ = Scores(torch.tensor([[[3.0], [-1.0]]]), ["a", "b"], ["q"], query_texts=["Who?"]).save(folder)
    >>> page = write_page([open_page_run(folder)], folder + "/page.html").read_text()
    >>> "Who?" in page, "<script src" in page
    (True, False)
    """
    path = Path(path)
    check_page(path, overwrite)
    html = page_html(runs, top=top, scatters=scatters, command=command)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        unfinished.write_text(html, encoding="utf-8")
        unfinished.replace(path)
    return path


def check_page(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, a page that could not be written.

    Raises:
        InputError: it is there already, or is a folder, or there is no folder for it.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file, such as {path}/page.html")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: give `overwrite=True`, or another name")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the page: make it, or give another name")


def empty_page(title: str, rows: int, notes: Sequence[str] = ()) -> str:
    """The HTML of a page with nothing but a box to ask a query, for a server.

    Args:
        title, rows: of what is asked.
        notes: why a query has no answer.
    """
    data: dict[str, Any] = dict.fromkeys(("rows", "ids", "texts", "labels", "sources", "bm25", "runs"), ())
    data |= {"columns": {}, "predicted": {}, "own": False, "images": False, "depth": None, "heat": None}
    return render(
        Page(title, False, False, True, rows, (), (), notes, (), None, "", (), (), "", data), forms=True
    )


def page_html(
    runs: Sequence[PageRun], *, top: int = 10, scatters: Sequence[Scatter] = (), command: str = "",
    asking: bool = False,
) -> str:  # fmt: skip
    """The HTML of `write_page`; of less than 3 MB.

    Args:
        asking: whether it has a box to ask a query, for a server.

    Raises:
        InputError: see `write_page`.
    """
    if top < 1:
        raise InputError(f"`top` must be 1 or more, not {top}")
    if not runs:
        raise InputError("there is no run to show: give one at least")
    for run in runs[1:]:
        refuse_other_data(sides_of(run.scores), runs[0].scores, run.scores.name, runs[0].scores.name)
    budget = Budget()
    for _ in range(12):
        page = Gathered(runs, budget, top).page(scatters, command, asking)
        html = render(page, forms=asking)
        if len(html.encode()) < LIMIT:
            return html
        budget, top = budget.smaller(), max(top * 4 // 5, 1)
    raise InputError("these runs do not fit on a page: give fewer runs, or score fewer queries")
