"""What video classifiers are judged by when still evidence misleads: SCUBA, SCUFO and the contrasted accuracy."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassRecall
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice
from lightning_methods.functional.stillmix_scores import is_right

Kind: TypeAlias = Literal["scuba", "scufo"]

_NAMES = ("scuba", "scufo", "contrasted")


class _PairCounts(Metric):
    """How many pairs there were and how many of them counted, in states of one shape that add up over ranks."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    n: Tensor
    scuba: Tensor
    scufo: Tensor
    contrasted: Tensor

    def __init__(self, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("n", *_NAMES):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _count(self, place: tuple[int, ...], scuba_preds: Tensor, scufo_preds: Tensor | None, target: Tensor) -> None:
        scuba = is_right("scuba_preds", scuba_preds, target)
        scufo = torch.zeros_like(scuba) if scufo_preds is None else is_right("scufo_preds", scufo_preds, target)
        self.n[place] += len(target)
        self.scuba[place] += scuba.sum()
        self.scufo[place] += scufo.sum()
        self.contrasted[place] += (scuba & ~scufo).sum()

    def _shares(self) -> dict[str, Tensor]:
        if not bool(self.n.all()):
            rank_zero_warn(f"{type(self).__name__} has seen no pair where its values are NaN.", UserWarning)
        return {name: getattr(self, name) / self.n for name in _NAMES}


class ContrastedAccuracy(_PairCounts):
    """`functional.contrasted_accuracy` over the batches of an epoch, for SCUBA clips that come with their twins.

    `compute` gives a dict with "scuba", "scufo" and "contrasted", each in [0, 1]; NaN before the first pair, with a
    warning. Under a distributed sampler the last samples may count twice; `PairedContrastedAccuracy` sorts them out.

    Args:
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ContrastedAccuracy()
        >>> metric.update(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 2, 3]))
        >>> metric.compute()
        {'scuba': tensor(0.7500), 'scufo': tensor(0.2500), 'contrasted': tensor(0.5000)}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__((), **kwargs)

    def update(self, scuba_preds: Tensor, scufo_preds: Tensor, target: Tensor) -> None:
        """Count a batch of pairs: class indices (B,) or scores (B, K), and class indices (B,).

        Raises:
            ValueError: If shapes or dtypes do not fit.
        """
        self._count((), scuba_preds, scufo_preds, target)

    def compute(self) -> dict[str, Tensor]:
        """The three shares."""
        return self._shares()


class StaticBiasReport(_PairCounts):
    """`ContrastedAccuracy` for several kinds of background, the plain mean over them, and accuracy on other sets.

    `compute` gives a flat dict, ready for `log_dict`: "KIND/scuba", "KIND/scufo" and "KIND/contrasted" for each kind,
    the same under "mean", and "SET/accuracy" for each set whose clips have no twins.

    Args:
        backgrounds: Names of the kinds, such as "places365", "vqgan" and "stripes".
        plain: Names of sets without twins, such as "iid" and "conflicting".
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If there is no background, a name twice, or "mean" among them.

    Example:
        >>> import torch
        >>> metric = StaticBiasReport(["places365", "stripes"])
        >>> metric.update("stripes", torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0, 1]))
        >>> metric.update("places365", torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 1]))
        >>> {name: float(value) for name, value in metric.compute().items() if name.endswith("contrasted")}
        {'places365/contrasted': 1.0, 'stripes/contrasted': 0.5, 'mean/contrasted': 0.75}
    """

    def __init__(self, backgrounds: Sequence[str], plain: Sequence[str] = (), **kwargs: Any) -> None:
        names = [*backgrounds, *plain]
        if not backgrounds or len(set(names)) != len(names) or "mean" in names:
            raise ValueError(
                f'`backgrounds` and `plain` must be distinct names, none of them "mean", at least one a background, '
                f"got {names}"
            )
        super().__init__((len(names),), **kwargs)
        self.backgrounds, self.plain = list(backgrounds), list(plain)

    def update(self, background: str, scuba_preds: Tensor, scufo_preds: Tensor | None, target: Tensor) -> None:
        """Count a batch of pairs on one kind of background, as in `ContrastedAccuracy`, or of clips of a plain set.

        Args:
            background: Name of the kind, or of the plain set.
            scuba_preds: Class indices (B,) or scores (B, K) of the clips.
            scufo_preds: The same of their twins; None for a plain set.
            target: Class indices (B,).

        Raises:
            ValueError: If the name is unknown, twins are missing or too much, or shapes or dtypes do not fit.
        """
        names = self.backgrounds + self.plain
        if background not in names:
            raise ValueError(f"`background` must be one of {names}, got {background!r}")
        if (scufo_preds is None) != (background in self.plain):
            raise ValueError(f"`scufo_preds` must be None for the sets {self.plain} and for no other: {background!r}")
        self._count((names.index(background),), scuba_preds, scufo_preds, target)

    def compute(self) -> dict[str, Tensor]:
        """The shares by background and name."""
        shares = self._shares()
        of_each = {
            f"{background}/{name}": shares[name][place]
            for place, background in enumerate(self.backgrounds)
            for name in _NAMES
        }
        pairs = len(self.backgrounds)
        of_all = {f"mean/{name}": shares[name][:pairs].mean() for name in _NAMES}
        return of_each | of_all | {f"{name}/accuracy": shares["scuba"][pairs + i] for i, name in enumerate(self.plain)}


class PairedContrastedAccuracy(Metric):
    """The contrasted accuracy when SCUBA clips and their twins come from separate loaders.

    Clips are paired by the name of the video, its "__k" included. `compute` drops samples that were seen twice, as the
    padding of a distributed sampler makes them be, and gives a dict: "scuba" and "scufo" over all the clips of a kind,
    "contrasted" over pairs, and "unpaired_scuba" and "unpaired_scufo", how many clips had no twin.

    Args:
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PairedContrastedAccuracy()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), ["swim__0", "run__0"], kind="scuba")
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 0]), ["run__0", "swim__0"], kind="scufo")
        >>> metric.update(torch.tensor([1]), torch.tensor([0]), ["swim__1"], kind="scufo")
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
        {'scuba': 1.0, 'scufo': 0.67, 'contrasted': 0.0, 'unpaired_scuba': 0.0, 'unpaired_scufo': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")  # (n, 4): is it SCUFO, id, target, is it right

    def update(self, preds: Tensor, target: Tensor, ids: Tensor | Sequence[str], *, kind: Kind) -> None:
        """Keep a batch.

        Args:
            preds: Class indices (B,) or scores (B, K).
            target: Class indices (B,).
            ids: What tells the videos apart: names, or integers (B,). A clip and its twin have the same.
            kind: "scuba" or "scufo".

        Raises:
            ValueError: If shapes, dtypes or options do not fit.
        """
        check_choice("kind", kind, Kind)
        right = is_right("preds", preds, target)
        numbers = _numbered(ids).to(right.device)
        if numbers.shape != right.shape:
            raise ValueError(f"`ids` must be {len(right)}, one for each target, got shape {tuple(numbers.shape)}")
        kinds = torch.full_like(numbers, kind == "scufo")
        self.rows.append(torch.stack([kinds, numbers, target.long(), right.long()], 1))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merges ranks. One without a batch takes part with rows of none, in the shape that the others have."""
        if not self.rows:
            self.rows = [torch.zeros(0, 4, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The shares and counts.

        Raises:
            ValueError: If a clip and its twin have different targets, or a clip seen twice has two.
        """
        rows = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, 4, dtype=torch.int64)
        scuba, scufo = (_by_id(rows[rows[:, 0] == kind, 1:]) for kind in (0, 1))
        pairs = scuba.keys() & scufo.keys()
        for number in pairs:
            if scuba[number][0] != scufo[number][0]:
                found = f"{scuba[number][0]} and {scufo[number][0]}"
                raise ValueError(f"a SCUBA clip and its twin must have the same target, got {found} for one id")
        contrasted = [scuba[number][1] and not scufo[number][1] for number in pairs]
        shares = {
            "scuba": [right for _, right in scuba.values()],
            "scufo": [right for _, right in scufo.values()],
            "contrasted": contrasted,
        }
        if not pairs:
            rank_zero_warn("PairedContrastedAccuracy has seen no pair: its contrasted accuracy is NaN.", UserWarning)
        counts = {"unpaired_scuba": len(scuba) - len(pairs), "unpaired_scufo": len(scufo) - len(pairs)}
        return {
            **{name: torch.tensor(right, device=self.device).float().mean() for name, right in shares.items()},
            **{name: torch.tensor(count, device=self.device) for name, count in counts.items()},
        }


class MeanClassAccuracy(MulticlassRecall):
    """Mean over the classes of the share of a class's samples that are recognised: recall, macro-averaged.

    Args:
        num_classes: K.
        kwargs: Of `torchmetrics.classification.MulticlassRecall`.

    Example:
        >>> import torch
        >>> metric = MeanClassAccuracy(num_classes=2)
        >>> metric.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, average="macro", **kwargs)


def _numbered(ids: Tensor | Sequence[str]) -> Tensor:
    """Integers as they are; names as the first 63 bits of a hash, which the ranks of a run can exchange."""
    if isinstance(ids, Tensor):
        check_integer("ids", ids)
        return ids.long()
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)


def _by_id(rows: Tensor) -> dict[int, tuple[int, int]]:
    """Target and whether it was right, of each id; the first time that it was seen counts."""
    found: dict[int, tuple[int, int]] = {}
    for number, target, right in rows.tolist():
        if found.setdefault(number, (target, right))[0] != target:
            raise ValueError(
                f"a clip that is seen twice must have the same target, got {found[number][0]} and {target}"
            )
    return found
