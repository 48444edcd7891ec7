"""Commands whose model is sharded over the processes that torchrun started (`--fsdp`)."""

import ctypes
import sys
from typing import Any

from gradfn.cli.commands import ModelRequest, ScoreRequest
from gradfn.cli.console import SPOKEN
from gradfn.cli.inputs import checked, load_subject, with_example, with_task
from gradfn.errors import InputError
from gradfn.report.progress import QUIET

M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 20
"""glibc's name of the size from which on memory is mapped, and that size."""
WHOLE = {
    **dict.fromkeys(
        ("cg", "lissa", "ekfac_cg", "astra"),
        "multiplies with the curvature itself, which takes whole weights",
    ),
    "magic": "goes back through a training, which takes whole weights",
    "source": "scores several checkpoints",
    "inrun": "shows what a training measured, for which there is no model to load",
}
"""Methods that do not run under `--fsdp`, and why."""


def check_sharded(made: Any) -> None:
    """Refuse what a sharded model cannot do, before anything is loaded.

    Raises:
        InputError: a task other than causal-lm; a loss or a method that takes whole weights, or several
            models.
    """
    if not isinstance(made, ModelRequest):
        return  # which is refused as the work of one process
    task = "causal_lm" if made.model.path is None else with_task(made).model.task
    if task != "causal_lm":
        raise InputError(f"--fsdp shards models of the task causal-lm, and this is {task}: leave it out")
    if "kl" in (made.loss.criterion, made.query_loss):
        raise InputError(
            "kl runs a second model, and --fsdp shards one: leave out --fsdp, or take another loss"
        )
    if not isinstance(made, ScoreRequest):
        return
    name = made.method.name or ""
    if name in WHOLE:
        raise InputError(f"{name} {WHOLE[name]}: leave out --fsdp, or choose another --method")
    if option := made.gave("training", "checkpoints"):
        raise InputError(f"{option} is of several models, and --fsdp shards one: leave one of them out")


def hold_shard(made: ModelRequest) -> None:
    """Load this process's shard of the model for the others, and say nothing of it."""
    silent, spoken = QUIET.set(True), SPOKEN.set("nowhere")
    try:
        if isinstance(made, ScoreRequest) and made.model.path is None and made.data.dataset is None:
            made = with_example(made)
        load_subject(checked(made, "a model is sharded for rows"))
    finally:
        QUIET.reset(silent)
        SPOKEN.reset(spoken)


def return_memory() -> None:
    """Have glibc give large blocks of freed memory back, those of weights say, and not keep them in its heap.

    It learns to keep blocks as large as those that were freed before; a fixed threshold is not learned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
