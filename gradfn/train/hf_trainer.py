"""Gradients of rows collected while a Trainer of transformers, or TRL's SFTTrainer, trains.

The numbers of the rows travel in the batch: a column of the dataset that `remove_unused_columns` keeps, that
the collator hands on, and that is taken out before the model sees the batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gradfn.engine.contract import Segments
from gradfn.errors import InputError
from gradfn.model.losses import ModelLoss, shifted_labels, token_losses
from gradfn.model.tasks import task_of
from gradfn.runs.provenance import Provenance
from gradfn.train.parts import SMALL, RecordOptions
from gradfn.train.record import Recorder, recording, trained_model
from gradfn.types import Data

__all__ = ["record_trainer"]

ROWS, LENGTHS = "gradfn_rows", "gradfn_lengths"
"""What the batch has of its rows: their numbers, and their tokens where they are packed."""
CLOSE = {False: 1e-3, True: 3e-2}
"""How far the mean of the rows' losses may be from the trainer's loss: in float32, and in 16 bits."""
SAMPLE = 64
"""Rows of a dataset that its digest is made of."""


def record_trainer(
    trainer: Any, run: str | Path, data: Data | None = None, **options: Unpack[RecordOptions]
) -> None:
    """Make a Trainer write the gradient of every row that it visits to `RUN/store.h5`, while it trains.

    A row's gradient is that of its own loss, as `build` has it, whatever the batch, the accumulation and the
    scaling of losses. Of packed rows each document is a row, `3#0` the first document of row 3. Training
    that resumes from a checkpoint removes the rows of later steps first; see also `recording`.

    Args:
        trainer: a `Trainer` or TRL's `SFTTrainer`, before `train`.
        run: the run directory.
        data: the rows of the training dataset, for their names; None: the names are their numbers.
        options: see `RecordOptions`; the optimizer and the first step are the trainer's.

    Raises:
        InputError: a trainer whose rows or losses cannot be known, before training or at its first batch.

    >>> record_trainer(nn.Linear(1, 1), "run")
    Traceback (most recent call last):
    gradfn.errors.InputError: a Linear is no Trainer: give the trainer, before `train` is called
    """
    if not hasattr(trainer, "add_callback") or not hasattr(trainer, "compute_loss"):
        raise InputError(
            f"a {type(trainer).__name__} is no Trainer: give the trainer, before `train` is called"
        )
    _refuse(trainer)
    dataset = trainer.train_dataset
    model = trained_model(trainer.model)
    settings = Provenance.of(_settings(trainer, model)).merged(options.get("settings"))
    wanted: Any = {**options, "settings": settings}
    watch = _Watch(trainer, model, _task(model), partial(recording, model, run, data, **wanted))
    trainer.train_dataset = _numbered(dataset)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, ROWS, LENGTHS]
    trainer.data_collator = _Collator(trainer.data_collator)
    for name in ("compute_loss", "_prepare_inputs", "_clip_grad_norm", "train"):
        setattr(trainer, name, partial(getattr(watch, name.lstrip("_")), getattr(trainer, name)))
    trainer.add_callback(_callback(watch))


def _refuse(trainer: Any) -> None:
    """Refuse a trainer whose rows cannot be seen."""
    args = trainer.args
    saved = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    for wrong, says in (
        (args.torch_compile, "compiles the model: train without torch_compile"),
        (args.n_gpu > 1, "splits batches over GPUs with DataParallel: start one process for each GPU"),
        (saved, "checkpoints with use_reentrant=True, which hides forward passes: give use_reentrant=False"),
        (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, "shards the model: train with DDP"),
        (trainer.train_dataset is None, "has no train_dataset: give it one"),
        (hasattr(trainer, "_gradfn_watched"), "is recorded already: call this once for a trainer"),
    ):  # fmt: skip
        if wrong:
            raise InputError(f"the trainer {says} to record rows")
    trainer._gradfn_watched = True


# --- the numbers of rows


@dataclass(frozen=True, eq=False)
class _Rows(torch.utils.data.Dataset):
    """Examples with their numbers, of a dataset that has no columns."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _with_number(self.dataset[row], row)


def _with_number(example: Any, row: int) -> dict[str, Any]:
    if not isinstance(example, Mapping):
        raise InputError(
            f"the training dataset has a {type(example).__name__} for an example, with which no number can "
            "travel: make each example a dict"
        )
    return {**example, ROWS: row}


def _numbered(dataset: Any) -> Any:
    """The dataset with the number of each row in it.

    Raises:
        InputError: a stream that does not count its rows.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        # A transform of the format would not see the column; `map` of indices reads no other column.
        return dataset.add_column(ROWS, range(len(dataset)))  # pyright: ignore[reportArgumentType]
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_with_number, with_indices=True)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"a {type(dataset).__name__} does not tell the numbers of its rows: give one with a length, "
            "or an IterableDataset of the datasets library"
        )
    return _Rows(dataset)


def _settings(trainer: Any, model: nn.Module) -> dict[str, Any]:
    """What a trainer knows of the rows: which they are, the seed, the loss, where model and tokenizer are."""
    config, smoothing = getattr(model, "config", None), trainer.args.label_smoothing_factor
    paths = {
        "model": getattr(config, "_name_or_path", None),
        "tokenizer": getattr(trainer.processing_class, "name_or_path", None),
    }
    loss = {
        "name": _task(model),
        "reduction": "mean",
        "criterion": "cross_entropy",
        "label_smoothing": smoothing,
    }
    trained = {"seed": trainer.args.seed, "rows": _digest(trainer.train_dataset)}
    return {
        "trainer": trained,
        "loss": loss,
        **{name: {"path": path} for name, path in paths.items() if path},
    }


def _digest(dataset: Any) -> str:
    """16 hex digits that tell a dataset from others: of its length and up to 64 of its rows."""
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    rows = sorted({count * number // SAMPLE for number in range(SAMPLE)}) if count else []
    digest = hashlib.sha256(str(count).encode())
    for row in rows:
        digest.update(repr(dataset[row]).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Collator:
    """The trainer's collator, which hands the numbers of the rows on."""

    inner: Callable[[list[Any]], Any]

    def __call__(self, features: list[Any]) -> Any:
        numbers = [feature.get(ROWS) for feature in features]
        plain = [{k: v for k, v in feature.items() if k != ROWS} for feature in features]
        batch = self.inner(plain)
        if None in numbers:  # an evaluation
            return batch
        batch[ROWS] = torch.tensor([int(number) for number in numbers])
        ids = batch.get("input_ids")
        packed = any("seq_lengths" in feature for feature in features)
        if ids is not None and (packed or len(ids) != len(features)):
            lengths = [list(f.get("seq_lengths") or [len(f["input_ids"])]) for f in plain]
            width = max(map(len, lengths))
            batch[LENGTHS] = torch.tensor([[*own, *[0] * (width - len(own))] for own in lengths])
        return batch


# --- the trainer's own methods


@dataclass(frozen=True, eq=False)
class _Visit:
    """The rows of a batch: their numbers, names, and where they are if they are packed."""

    rows: list[int]
    names: list[str] | None = None
    lengths: list[int] | None = None
    segments: Segments | None = None


@dataclass(eq=False)
class _Watch:
    """What a recorded trainer does at each of its methods."""

    trainer: Any
    model: nn.Module
    task: str
    open: partial[Any]
    recorder: Recorder | None = None
    epoch: int = 0
    factor: float = 1.0
    _numbers: Tensor | None = None
    _lengths: Tensor | None = None
    _divisor: int | None = None
    _unmixed: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)

    def begin(self, step: int) -> None:
        """Open the run when training begins, at this step."""
        self._stack = ExitStack()
        options: dict[str, Any] = {"start": step}
        if self.open.keywords.get("normalize", "none") != "none":
            options["optimizer"] = self.trainer.optimizer
        self.recorder = self._stack.enter_context(self.open(**options))

    def train(self, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Train; what was recorded before an error is kept."""
        with self._closing():
            return original(*args, **named)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        else:
            state = self.trainer.state
            if self.recorder is not None and state.global_step < state.max_steps:
                self.recorder.end = f"stopped after step {state.global_step}"
            self._stack.close()
        finally:
            self.recorder = None

    @property
    def recorded(self) -> Recorder:
        """The recorder, while training runs."""
        assert self.recorder is not None
        return self.recorder

    def end_step(self, step: int) -> None:
        """Record a step, of which the optimizer has made all that it makes."""
        skipped = bool(self.trainer.accelerator.optimizer_step_was_skipped)
        self.recorded.number = step
        self.recorded.step(epoch=self.epoch, factor=self.factor, skipped=skipped)
        self.factor = 1.0

    def prepare_inputs(self, original: Callable[..., Any], inputs: Any) -> Any:
        """Take the numbers of the rows out of the batch."""
        if isinstance(inputs, MutableMapping):
            self._numbers, self._lengths = inputs.pop(ROWS, None), inputs.pop(LENGTHS, None)
        return original(inputs)

    def clip_grad_norm(self, original: Callable[..., Any], model: nn.Module) -> Any:
        """Notice what clipping multiplies the gradient by."""
        norm = original(model)
        size = float(norm)
        self.factor = min(1.0, self.trainer.args.max_grad_norm / (size + 1e-6)) if size == size else 1.0
        return norm

    def compute_loss(
        self,
        original: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss, which the recorder is told of in training."""
        call = partial(original, model, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if self.recorder is None or not (self.model.training and torch.is_grad_enabled()):
            return call(inputs)
        visit, labels = self._visit(inputs), inputs.get("labels")
        if visit.segments is not None and not self._unmixed:
            _refuse_mixing(self.model, inputs, visit)
            self._unmixed = True
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda *call: _keep(seen, call[-1]))
        try:
            with self.recorder.tapped.forward(len(visit.rows), visit.segments):
                result = call(inputs)
        finally:
            handle.remove()
        loss = result[0] if return_outputs else result
        sums, counts = self._own_losses(seen[0], {**inputs, "labels": labels}, visit.segments)
        total = self._total(float(loss.detach()), sums, counts, num_items_in_batch)
        own = sums / counts.clamp_min(1)
        self.recorder.loss(
            loss, visit.rows, counts=counts, total=total, losses=own, names=visit.names, lengths=visit.lengths
        )
        return result

    def _visit(self, inputs: Mapping[str, Any]) -> _Visit:
        if self._numbers is None:
            raise InputError(
                "a batch does not say which rows it has: give the trainer its dataset as `train_dataset`, "
                "and let it make the loader and the batches"
            )
        rows: list[int] = self._numbers.tolist()
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if self._lengths is None:
            sizes = None if mask is None or mask.ndim != 2 else mask.sum(1).tolist()
            whole = [ids.shape[1]] * len(rows) if ids is not None and ids.ndim == 2 else None
            return _Visit(rows, lengths=sizes or whole)
        by_row = [[size for size in own if size] for own in self._lengths.tolist()]
        sizes = [size for own in by_row for size in own]
        assert ids is not None
        if sum(sizes) > ids.numel() or (len(ids) == len(rows) > 1):
            raise InputError(
                f"a batch of shape {list(ids.shape)} does not hold its {len(sizes)} packed rows one after "
                "the other: train without packing, or with padding_free=True"
            )
        numbers = [row for row, own in zip(rows, by_row, strict=True) for _ in own]
        names = [
            f"{row}#{part}" if len(own) > 1 else str(row)
            for row, own in zip(rows, by_row, strict=True)
            for part in range(len(own))
        ]
        return _Visit(numbers, names, sizes, Segments.of(sizes, ids.numel(), ids.device))

    @torch.no_grad()
    def _own_losses(
        self, outputs: Any, batch: Mapping[str, Any], segments: Segments | None
    ) -> tuple[Tensor, Tensor]:
        """The sum of each row's losses, and how many there are: of its tokens, or one of the row."""
        if getattr(outputs, "log_probs", None) is not None:  # TRL's, without logits
            losses, mask = -outputs.log_probs.float(), outputs.label_mask
        elif getattr(outputs, "logits", None) is None or batch["labels"] is None:
            raise InputError(
                "the model gives no logits, or its batches no labels, so the loss of each row is not known: "
                "train without a fused loss, such as use_liger_kernel"
            )
        elif self.task in ("classification", "regression", "image_classification"):
            task: Any = self.task
            losses = ModelLoss(self.model, task).of_logits(outputs.logits, batch)
            return losses.float(), torch.ones_like(losses)
        else:
            labels = shifted_labels(batch["labels"]) if self.task == "causal_lm" else batch["labels"]
            smoothing = self.trainer.args.label_smoothing_factor
            rows = [
                token_losses(logits, own, label_smoothing=smoothing)
                for logits, own in zip(outputs.logits, labels, strict=True)
            ]
            losses, mask = torch.stack(rows), labels != -100
        if segments is not None:
            missing = segments.tokens // len(losses) - losses.shape[1]  # the first or last position has none
            losses, mask = (nn.functional.pad(v, (missing, 0)) for v in (losses, mask))
            losses, mask = segments.cut(losses, "the loss"), segments.cut(mask, "the loss")
        return (losses * mask).sum(-1), mask.sum(-1)

    def _total(self, loss: float, sums: Tensor, counts: Tensor, items: Any) -> float:
        """What the trainer divided the sum of the rows' losses by: one of the counts that it knows.

        Raises:
            InputError: by none of them, so it is another loss.
        """
        processes = max(1, self.trainer.args.world_size)
        whole = None if items is None else float(items)
        known = [float(counts.sum()), *([] if whole is None else [whole, whole / processes])]
        sum_, low = float(sums.sum()), self.trainer.accelerator.mixed_precision != "no"
        low = low or next(self.model.parameters()).dtype in SMALL
        if sum_ != sum_ or loss != loss:  # the training diverged: its rows will be marked
            return known[0]
        fits = [n for n, count in enumerate(known) if abs(loss * count - sum_) <= CLOSE[low] * abs(sum_)]
        if not fits and self._divisor is None:
            raise InputError(
                f"the trainer's loss is {loss:.4f} and the mean of its rows' losses "
                f"{sum_ / max(known[0], 1):.4f}: train with the model's own loss, without "
                "compute_loss_func, dft or an auxiliary loss"
            )
        if fits and self._divisor not in fits:
            self._divisor = fits[-1] if whole is not None else fits[0]
        assert self._divisor is not None
        return known[self._divisor]


def _keep(seen: list[Any], outputs: Any) -> None:
    if torch.is_grad_enabled():
        seen.append(outputs)


def _task(model: nn.Module) -> str:
    """The task that the class of the model says."""
    config: Any = getattr(model, "config", None)
    task = task_of([type(model).__name__], config.to_dict() if hasattr(config, "to_dict") else {})
    if task is None:
        raise InputError(
            f"the name {type(model).__name__} does not say what the model is for, so the loss of a row is "
            "not known: train a model with a head of transformers, or record a loop of your own with "
            "`recording`"
        )
    return task


@torch.no_grad()
def _refuse_mixing(model: nn.Module, inputs: Mapping[str, Any], visit: _Visit) -> None:
    """Refuse a model in which the last document of a packed row sees those before it."""
    assert visit.lengths is not None
    if len(visit.lengths) < 2:
        return
    end, size = sum(visit.lengths), visit.lengths[-1]
    named = {name: inputs[name] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
    alone = {name: value.reshape(1, -1)[:, end - size : end] for name, value in named.items()}
    skipped = (*named, "labels", "num_items_in_batch")
    more = {name: value for name, value in inputs.items() if name not in skipped}
    was = model.training
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices) if was else nullcontext():
        model.eval()
        try:
            packed = model(**named, **more).logits.flatten(0, 1)[None, end - size : end]
            own = model(**alone, use_cache=False).logits
        finally:
            model.train(was)
    far = float((packed - own).norm() / own.norm())
    low = own.dtype in SMALL
    if not far <= (0.1 if low else 1e-3):
        raise InputError(
            f"attention mixes the documents of a packed row (the logits of one differ by {far:.1%} from its "
            "own), so none has a gradient of its own: train without packing, or attend by position_ids"
        )


def _callback(watch: _Watch) -> Any:
    """Tells the recorder of the trainer's steps."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.begin(state.global_step)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.epoch = int(state.epoch or 0)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.recorded.substep()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.end_step(state.global_step - 1)
            self._flush(control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._flush(control)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.recorded.flush()  # the wish of a callback that came after this one

        def _flush(self, control: Any) -> None:
            if control.should_save:
                watch.recorded.flush()

    return Recording()
