"""quanda's metrics of gradfn's scores: an explainer that a metric or a benchmark takes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.bridges.supervised import Load, Options, attributed, package, rows_of
from gradfn.methods import Attribution, grad_dot


class Explainer:
    """An explainer of quanda whose explanations are gradfn's scores, `[queries, rows]`; positive = proponent.

    Give the class itself where quanda makes explainers (`explainer_cls=Explainer, expl_kwargs={"method":
    "ekfac"}`), or what it `explain`s to the `update` of a metric. To isinstance it is a `quanda.Explainer`.

    Args:
        model: a classifier; a model of transformers too, whose rows are mappings.
        train_dataset: tuples `(input, label)`, or mappings with `labels`.
        task: taken because quanda gives it; the rows say what they are.
        checkpoints: as everywhere in quanda, the last one is loaded into the model.
        checkpoints_load_func: loads one, `f(model, checkpoint)`; None: quanda's own, of a state dict.
        method: its name or what it is, see `gf.score`; a method by its name is fitted once.
        loss_fn: of outputs and labels; None: cross-entropy, or what the model of transformers is for.
        options: `view`, `token_batch_size`; see `Subject`.

    Raises:
        InputError: quanda is not installed, or the method is one that is fitted to queries.

    Source: Bareeva et al., Quanda, arXiv:2410.07158.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification", "text_classification", "causal_lm"]

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = "image_classification",
        checkpoints: Any = None,
        checkpoints_load_func: Load | None = None,
        *,
        method: Attribution | str = grad_dot(),  # noqa: B008
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Unpack[Options],
    ):
        package("quanda").Explainer.register(type(self))
        common = package("quanda.utils.common")
        self.model, self.train_dataset, self.task = model, train_dataset, task
        self.checkpoints = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints or [])
        self.checkpoints_load_func = checkpoints_load_func or common.get_load_state_dict_func(
            common.resolve_device(model)
        )
        self.load_last_checkpoint()
        if loss_fn is None and not hasattr(model, "config"):
            loss_fn = F.cross_entropy
        self._attributed = attributed(model, train_dataset, loss_fn, method, **options)

    def explain(self, test_data: Any, targets: Any = None) -> Float[Tensor, "queries rows"]:
        """The score of every training row for every query.

        Args:
            test_data: a batch of inputs; or a mapping of batches.
            targets: their labels; None: those in the mapping.
        """
        if isinstance(test_data, Mapping):
            labels = {} if targets is None else {"labels": torch.as_tensor(targets)}
            return self._attributed.scores(rows_of({**test_data, **labels}))
        return self._attributed.scores(rows_of((test_data, torch.as_tensor(targets))))

    def self_influence(self, batch_size: int = 32) -> Float[Tensor, " rows"]:
        """The score of every training row for itself; the batch size is gradfn's own."""
        return self._attributed.self_influence()

    def load_last_checkpoint(self) -> None:
        """Load the last of the checkpoints, where there are any."""
        if self.checkpoints:
            self.checkpoints_load_func(self.model, self.checkpoints[-1])
