"""Unbiased multiple-instance learning for any module that scores the instances of bags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_methods._modes import evaluating
from lightning_methods.attach import AddressLike, Method, Ramp, Step, address
from lightning_methods.attach._lightning import LightningModule, Trainer
from lightning_methods.attach.address import Address, AnyAddress, describe
from lightning_methods.attach.capture import resolve
from lightning_methods.attach.data_pass import training_batches
from lightning_methods.callbacks._umil_bags import VIEWS, Bags, as_logits, named, read_bags
from lightning_methods.functional import (
    snippet_cell_index,
    snippet_similarity,
    umil_detector_loss,
    umil_invariance_loss,
)
from lightning_methods.functional._gather import gather_batch
from lightning_methods.functional._logits import check_choice, check_range
from lightning_methods.functional.umil_pairs import Similarity
from lightning_methods.modules import ClusterHead, SnippetDivision
from lightning_methods.modules.umil import HeadKind

History: TypeAlias = Literal["train", "pass"]
Update: TypeAlias = Literal["joint", "heads"]


class UMIL(Method):
    r"""Adds UMIL to a detector that is trained on bags, such as videos with one label for all of their snippets.

    From `start_epoch - history_warmup` on, every snippet's score is remembered in each epoch. From `start_epoch` on,
    the snippets whose scores have been steady are confident and the others ambiguous, divided anew after each epoch,
    and after the module's own step the terms of `lightning_methods.functional.umil_invariance_loss` are added, times
    the ramp min(1, (epoch − start_epoch + 1) / ramp_epochs). A second head, `modules.ClusterHead`, trains with the
    module; it is needed in training only. Two epochs have to be remembered first, so that the terms begin in epoch 2 at
    the earliest, counted from 0.

    Logs `umil/similar_pairs`, the share of pairs of snippets in the batch that count as alike (from the first epoch on,
    so that `similarity_threshold` can be mended before it matters); once it acts the raw terms `umil/cluster`,
    `umil/compat`, `umil/compat_confident`, `umil/confident`, `umil/variance`, their weighted sum `umil/loss` and
    `umil/ramp`; after each epoch `umil/ambiguous_fraction` and `umil/pseudo_abnormal_fraction`, both of the snippets of
    abnormal bags, and `umil/threshold_normal` and `umil/threshold_abnormal`.

    Args:
        features: Address of the snippets' features, (B, K, D) or (B · K, D). The cluster head reads them, with its
            gradient: `"module.head@input"` names those that a detector's head received.
        logits: Address of the detector's outputs: (B, K, 2) or (B · K, 2) with class 1 abnormal, or one logit a
            snippet, (B, K), (B, K, 1) or (B · K, 1).
        bag_labels: Address of the bags' labels, (B,), above 0 for abnormal.
        bag_ids: Address of the bags' numbers in the training data, integers (B,) in [0, `num_videos`).
        in_features: Width D of the features, which the cluster head is made for.
        frame_index: Address of the middle frame of each snippet, integers (B, K), where snippets are drawn anew in
            each epoch: a snippet is then of cell ⌊frame · cells / total_frames⌋ of its video. None: snippet k is of
            cell k.
        total_frames: Address of the frames of each bag's video, integers (B,); given with `frame_index`.
        strong_features: Address of the features of a second, strongly augmented view, as `features`.
        strong_logits: Its outputs, as `logits`; both are given or neither.
        logits_are_probabilities: `logits` are probabilities: of both classes, or of class 1.
        head: Address of the detector's head (`"module.head"`), a module that makes outputs of features; needed for
            `update="heads"` only. Or a function of the step that returns a callable.
        inputs: Address in the batch of what the module's `forward` is called with; read for `history="pass"` only.
        num_videos: Number of bags in the training data; None takes the length of the training loader's dataset.
        cells_per_video: Cells of each video, one number or one for each, as `UCFCrimeDataModule(...).cells_per_video`
            gives them; None takes K. Without `frame_index`, K.
        start_epoch: First epoch in which the terms act.
        history_warmup: Epochs before it in which scores are remembered already.
        history: `"train"`: the scores of the training steps, at no cost, with the noise of augmentation and dropout in
            them. `"pass"`: those of an extra pass over the training data after each epoch in eval mode, as the authors
            do; `logits` must be reachable from the module's `forward`.
        update: `"joint"`: the terms train the whole module. `"heads"`: only the detector's head and the cluster head.
        add_detector_terms: Add the other parts of the authors' detector loss, `functional.umil_detector_loss`, from the
            first epoch on: all but the MIL term, which is the module's own. See there for the danger of the margin.
        cluster_head: `"linear"` or `"cosine"`, see `modules.ClusterHead`.
        ramp_epochs: Epochs until full weight; 0 is full weight from `start_epoch` on.
        gather: Pairs are formed over the batches of all ranks; without it, within that of each.
        ratio: Share of the snippets of each prediction that is confident, in [0, 1).
        similarity_threshold: Cosine from which on two snippets are alike. The most sensitive setting: it has to fit the
            features.
        mode: `"cosine"`, or `"rank"`: alike if the `topk` largest features are the same ones.
        topk: For `"rank"`.
        threshold: Confidence from which on the weak view teaches the strong one, in the detector terms.
        cluster_threshold: The same for the cluster head.
        weight_cluster: Weight of the term, like all that follow.
        weight_compat: As above.
        weight_compat_confident: As above.
        weight_confident: As above.
        weight_variance: As above.
        weight_by_confidence: Weigh the cross-entropy of each confident snippet by its own confidence.
        weight_margin: Of the detector terms, like all that follow.
        weight_consistency: As above.
        weight_cluster_consistency: As above.
        weight_smooth: As above.
        weight_sparse: As above.
        weight_detector_cluster: As above.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If an argument is out of its range; at the first step if shapes disagree, or (on a CPU) a bag's
            number is out of its range; at an epoch's end if a bag came with two labels.

    Source:
        Lv et al., "Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly Detection", CVPR 2023 (arXiv
        2303.12369). One pass with all terms is that of the authors' earlier code; `start_epoch` is ours (30 of 40
        there), and so is `history="train"`.

    Example:
        >>> UMIL("module.head@input", in_features=512, start_epoch=30)
        UMIL(features='module.head@input', in_features=512, start_epoch=30)
    """

    #: Those of the detector's loss.
    unramped = frozenset({"margin", "consistency", "cluster_consistency", "smooth", "sparse", "detector_cluster"})

    def __init__(
        self,
        features: AddressLike = "batch.features",
        logits: AddressLike = "module",
        bag_labels: AddressLike = "batch.label",
        bag_ids: AddressLike = "batch.vid",
        *,
        in_features: int,
        frame_index: AddressLike | None = None,
        total_frames: AddressLike | None = None,
        strong_features: AddressLike | None = None,
        strong_logits: AddressLike | None = None,
        logits_are_probabilities: bool = False,
        head: AddressLike | None = None,
        inputs: AddressLike = "batch.features",
        num_videos: int | None = None,
        cells_per_video: int | Sequence[int] | Tensor | None = None,
        start_epoch: int = 10,
        history_warmup: int = 5,
        history: History = "train",
        update: Update = "joint",
        add_detector_terms: bool = False,
        cluster_head: HeadKind = "linear",
        ramp_epochs: int = 0,
        gather: bool = False,
        ratio: float = 0.3,
        similarity_threshold: float = 0.7,
        mode: Similarity = "cosine",
        topk: int = 2,
        threshold: float = 0.8,
        cluster_threshold: float = 0.8,
        weight_cluster: float = 1.0,
        weight_compat: float = 1.0,
        weight_compat_confident: float = 1.0,
        weight_confident: float = 1.0,
        weight_variance: float = 0.0,
        weight_by_confidence: bool = False,
        weight_margin: float = 1.0,
        weight_consistency: float = 1.0,
        weight_cluster_consistency: float = 1.0,
        weight_smooth: float = 0.01,
        weight_sparse: float = 0.001,
        weight_detector_cluster: float = 0.01,
        log: bool | Literal["epoch"] = True,
        name: str = "umil",
    ) -> None:
        weights = {
            "cluster": weight_cluster,
            "compat": weight_compat,
            "compat_confident": weight_compat_confident,
            "confident": weight_confident,
            "variance": weight_variance,
        }
        detector = {
            "margin": weight_margin,
            "consistency": weight_consistency,
            "cluster_consistency": weight_cluster_consistency,
            "smooth": weight_smooth,
            "sparse": weight_sparse,
            "detector_cluster": weight_detector_cluster,
        }
        self.features, self.logits = address(features), address(logits)
        self.bag_labels, self.bag_ids = address(bag_labels), address(bag_ids)
        self.frame_index, self.total_frames = _both("frame_index", frame_index, "total_frames", total_frames)
        self.strong_features, self.strong_logits = _both(
            "strong_features", strong_features, "strong_logits", strong_logits
        )
        self.head = None if head is None else address(head)
        self.inputs = address(inputs)
        self.in_features = in_features
        self.logits_are_probabilities = logits_are_probabilities
        self.num_videos = num_videos
        self.cells_per_video = cells_per_video.tolist() if isinstance(cells_per_video, Tensor) else cells_per_video
        self.start_epoch = start_epoch
        self.history_warmup = history_warmup
        self.history = history
        self.update = update
        self.add_detector_terms = add_detector_terms
        self.cluster_head: HeadKind = cluster_head
        self.ramp_epochs = ramp_epochs
        self.gather = gather
        self.ratio = ratio
        self.similarity_threshold = similarity_threshold
        self.mode: Similarity = mode
        self.topk = topk
        self.threshold = threshold
        self.cluster_threshold = cluster_threshold
        self.weight_by_confidence = weight_by_confidence
        self._check_settings()
        super().__init__(
            name=name,
            weights=weights | (detector if add_detector_terms else {}),
            ramp=Ramp(ramp_epochs, start=start_epoch),
            log=log,
        )
        # The pairs of a joined batch are those of all ranks.
        self.exact_over_ranks = gather
        self._division: SnippetDivision | None = None
        self._each: int | None = None  # cells of a video, if all have as many

    def helpers(self) -> Mapping[str, nn.Module]:
        """The cluster head."""
        return {"cluster_head": ClusterHead(self.in_features, kind=self.cluster_head)}

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Remembers the step's scores, and gives the terms that act in this epoch."""
        self.did_something = True  # it watches before it acts
        if self.history == "pass" and self._division is None:
            step[self.inputs]  # a wrong address is told now rather than after some epochs
        bags = self._bags(step)
        division, cells = self._cells(step, bags)
        if step.logs:
            step.note({"similar_pairs": self._similar_pairs(bags)})
        if self.history == "train" and step.epoch >= self._first_remembered:
            division.update(bags.ids, cells, bags.scores, bags.labels)
        terms = self._detector_terms(bags) if self.add_detector_terms else {}
        if step.epoch >= self.start_epoch and division.ready:
            terms |= self._invariance_terms(step, bags, *division.look_up(bags.ids, cells))
        return terms

    def end_epoch(self) -> None:
        """The epoch's scores become one observation of each snippet, and the snippets are divided anew."""
        run, epoch = self._step, self._open_epoch
        if run is None or epoch is None or epoch < self._first_remembered or not self.active:
            return
        if self.history == "pass":
            self._remember_all(run.trainer, run.module)
        if self._division is None:  # the epoch had no step
            return
        try:
            figures = self._division.end_epoch()
        except ValueError as error:
            labels, ids = named("bag_labels", self.bag_labels), named("bag_ids", self.bag_ids)
            raise ValueError(f"{ids}, {labels}: {error}.") from None
        if figures is not None and self.log_terms:
            logged = {f"{self.name}/{key}": value for key, value in figures._asdict().items()}
            run.module.log_dict(logged, batch_size=1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and says so if the training is too short."""
        super().setup(trainer, pl_module, stage)
        first = max(self.start_epoch, self._first_remembered + 2)
        if stage == "fit" and self.active and 0 <= (trainer.max_epochs or -1) <= first:
            rank_zero_warn(
                f"{self!r} would start in epoch {first}, counted from 0, but the Trainer has "
                f"max_epochs={trainer.max_epochs}: lower `start_epoch`, or train for longer."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before training, after everything is restored: moves what was restored to the device."""
        if self._division is not None:
            self._division.to(trainer.strategy.root_device)
        super().on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The history of all ranks, with that of an interrupted epoch, and the division."""
        return {**super().state_dict(), "division": None if self._division is None else self._division.shared_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: If `num_videos` is another number than in the run that is restored.
        """
        super().load_state_dict(state_dict)
        self._division, saved = None, state_dict["division"]
        if saved is None:
            return
        sizes = saved["history.num_cells"].tolist()
        if self.num_videos not in (None, len(sizes)):
            raise ValueError(f"Expected `num_videos` as in the run that is restored, {len(sizes)}: {self!r}.")
        self._make_division(sizes, torch.device("cpu")).load_shared_state(saved)

    # What it reads

    @property
    def _first_remembered(self) -> int:
        return max(0, self.start_epoch - self.history_warmup)

    def _bags(self, step: Step, *, weak_only: bool = False) -> Bags:
        asked = ("bag_labels", "bag_ids", *VIEWS[0], *(() if weak_only else VIEWS[1]))
        where = {name: found for name in asked if (found := getattr(self, name)) is not None}
        return read_bags(step, where, width=self.in_features, probabilities=self.logits_are_probabilities)

    def _cells(self, step: Step, bags: Bags) -> tuple[SnippetDivision, Tensor]:
        """The division, made for the first bags that come, and the cells (B, K) of these in their videos."""
        count, _, snippets, _ = bags.features.shape
        division = self._division
        if division is None:
            division = self._make_division(self._grid(step.trainer, snippets), bags.ids.device)
        try:
            num_cells = division.history.of_videos(division.history.num_cells, bags.ids)
        except ValueError as error:
            raise ValueError(f"{named('bag_ids', self.bag_ids)}: {error}.") from None
        if self.frame_index is None or self.total_frames is None:
            if snippets != self._each:
                raise ValueError(
                    f"Expected {self._each or 'as many'} snippets a bag at {self.features!r}, one for each cell of its "
                    f"video, but got {snippets}. Where they are drawn anew each time, `frame_index` tells their cells."
                )
            return division, torch.arange(snippets, device=bags.ids.device).expand(count, -1)
        cells = snippet_cell_index(step[self.frame_index], step[self.total_frames], num_cells)
        if cells.shape != (count, snippets):
            raise ValueError(
                f"Expected {named('frame_index', self.frame_index)} to be {[count, snippets]}, a frame for each "
                f"snippet at {self.features!r}, but got {list(cells.shape)}."
            )
        return division, torch.minimum(cells, num_cells[:, None] - 1)

    def _grid(self, trainer: Trainer, snippets: int) -> list[int]:
        """The number of cells of each video."""
        cells = snippets if self.cells_per_video is None else self.cells_per_video
        if isinstance(cells, Sequence):
            return list(cells)
        videos = self.num_videos
        if videos is None:
            try:
                videos = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]  # if it has one
            except (AttributeError, TypeError):
                raise ValueError(
                    f"Expected `num_videos`, since the training dataloader has no dataset of known length: {self!r}."
                ) from None
        return [cells] * videos

    def _make_division(self, sizes: list[int], device: torch.device) -> SnippetDivision:
        self._division = SnippetDivision(torch.tensor(sizes), ratio=self.ratio).to(device)
        self._each = sizes[0] if len(set(sizes)) == 1 else None
        return self._division

    def _remember_all(self, trainer: Trainer, module: LightningModule) -> None:
        """Scores the training data as the module is now."""
        with evaluating(module):
            for batch in training_batches(trainer, module):
                with self.probe(self.inputs, batch=batch) as step:
                    bags = self._bags(step, weak_only=True)
                    division, cells = self._cells(step, bags)
                    division.update(bags.ids, cells, bags.scores, bags.labels)

    # What it adds

    def _invariance_terms(self, step: Step, bags: Bags, ambiguous: Tensor, pseudo_labels: Tensor) -> dict[str, Tensor]:
        features, logits = bags.features, bags.logits
        if self.update == "heads" and self.head is not None:
            features, logits = features.detach(), self._logits_of_frozen(step, bags, self.head)
        parts = (logits, self._clusters(features), features.detach(), ambiguous, pseudo_labels)
        terms = umil_invariance_loss(
            *(gather_batch(*parts) if self.gather else parts),
            weight_by_confidence=self.weight_by_confidence,
            similarity_threshold=self.similarity_threshold,
            mode=self.mode,
            topk=self.topk,
        )._asdict()
        del terms["total"]
        return terms

    def _detector_terms(self, bags: Bags) -> dict[str, Tensor]:
        parts = (bags.logits, self._clusters(bags.features), bags.features.detach(), bags.labels)
        loss = umil_detector_loss(
            *(gather_batch(*parts) if self.gather else parts),
            threshold=self.threshold,
            cluster_threshold=self.cluster_threshold,
            similarity_threshold=self.similarity_threshold,
        )
        return {name: getattr(loss, name.removeprefix("detector_")) for name in self.unramped}

    def _clusters(self, features: Tensor) -> Tensor:
        """The cluster head in its own precision: under autocast or not, float32 if the module is."""
        head = self._built_helpers()["cluster_head"]
        clusters: Tensor = head(features.to(next(head.parameters()).dtype))
        return clusters

    def _logits_of_frozen(self, step: Step, bags: Bags, where: AnyAddress) -> Tensor:
        """The detector's head on features that take no gradient, in the shape in which the module gives them."""
        head: Any = resolve(step.module, where) if isinstance(where, Address) else step[where]
        if not callable(head):
            raise ValueError(f"Expected {named('head', where)} to be a module, but it is {describe(head)}.")
        logits = []
        for view, (of_features, _) in enumerate(VIEWS[: bags.features.shape[1]]):
            with step.forward_context():
                outputs = head(step[getattr(self, of_features)].detach())
            what = f"what {named('head', where)} makes of {named(of_features, getattr(self, of_features))}"
            logits.append(as_logits(what, outputs, bags.features[:, view], self.logits_are_probabilities))
        return torch.stack(logits, 1)

    def _similar_pairs(self, bags: Bags) -> Tensor:
        features = bags.features[:, 0].flatten(0, 1)
        similarity = snippet_similarity(features, mode=self.mode, threshold=self.similarity_threshold, topk=self.topk)
        count = len(features)
        return ((similarity > 0).sum() - count) / max(count * (count - 1), 1)

    def _check_settings(self) -> None:
        check_choice("history", self.history, History)
        check_choice("update", self.update, Update)
        check_choice("mode", self.mode, Similarity)
        check_choice("cluster_head", self.cluster_head, HeadKind)
        check_range("in_features", self.in_features, 1, math.inf)
        for name in ("start_epoch", "history_warmup", "ramp_epochs"):
            check_range(name, getattr(self, name), 0, math.inf)
        check_range("similarity_threshold", self.similarity_threshold, -1, 1)
        check_range("threshold", self.threshold, 0, 1)
        check_range("cluster_threshold", self.cluster_threshold, 0, 1)
        if self.update == "heads" and self.head is None:
            raise ValueError("Expected `head`, the address of the detector's head, with update='heads', but got None.")
        SnippetDivision(torch.ones(1, dtype=torch.long), ratio=self.ratio)  # for the error of `ratio`
        if isinstance(self.cells_per_video, Sequence) and self.num_videos not in (None, len(self.cells_per_video)):
            raise ValueError(
                f"Expected `cells_per_video` to have a number for each of `num_videos`, {self.num_videos}, but it has "
                f"{len(self.cells_per_video)}."
            )


def _both(
    first: str, one: AddressLike | None, second: str, other: AddressLike | None
) -> tuple[AnyAddress | None, AnyAddress | None]:
    """Two addresses that are given together or not at all."""
    if (one is None) != (other is None):
        raise ValueError(f"Expected `{first}` and `{second}` both or neither, but got {one!r} and {other!r}.")
    return (None, None) if one is None or other is None else (address(one), address(other))
