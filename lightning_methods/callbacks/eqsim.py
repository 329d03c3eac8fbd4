"""EqSim: opposite changes of an image-text pair should move the similarity by the same amount."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_methods.attach import AddressLike, Method, Ramp, Step, address
from lightning_methods.attach._lightning import LightningModule, Trainer
from lightning_methods.attach.address import AnyAddress, describe
from lightning_methods.functional import EqSimTerms, eqsim_sample_close
from lightning_methods.functional._eqsim_criterion import Hinge
from lightning_methods.functional._gather import gather_batch
from lightning_methods.functional._logits import sum_to_one, upcast
from lightning_methods.functional.eqsim import ItmActivation
from lightning_methods.modules import EqSimLoss
from lightning_methods.modules.eqsim import Mode

_CONSISTENCY = ("cyclic", "cross_modal", "in_modal")
_DEFAULT_SCALE = 1 / 0.07
#: Spaced out, runs with neighbouring seeds do not share their draws, some steps apart.
_SEED_SPACING = 2**20


class EqSim(Method):
    r"""Adds EqSim to the loss of the image-text model that it is attached to.

    After the module's own step it reads one of three: embeddings of both kinds (`image` and `text`), a matrix of
    similarities (`similarity`), or the match scores of a fusion model (`scores`). The maths is in
    `lightning_methods.functional.eqsim_close_far_loss` and its neighbours. It regularises a retrieval loss, which the
    module brings, and cannot replace it: equal similarities everywhere fulfil it.

    Modes, and their terms in the log (raw; `eqsim/loss` is the weighted sum):

    - "close_far": `close` and `far`, the variant that was released. Each sample is compared with hard partners from the
      batch, drawn by the logits. On steps that are logged, `gap` is the mean of |a − b| + |c − d| over them;
    - "close_only": `close`;
    - "all_pairs": each two samples of the batch, `all_pairs`;
    - "itm": match scores, `itm`;
    - "cross_modal", "in_modal": CyCLIP's penalties on cosines, to compare with; "cyclic": their sum. Of the settings
      below they read `weight` and `normalize` alone.

    With several processes the embeddings are gathered, each rank's own first; the last batch may be shorter on some
    ranks. Their numbers are read on the host, once a step; with one process nothing waits for the device.

    Args:
        image: Address of the image embeddings, (B, D).
        text: Address of the text embeddings, (B, D); row i belongs to row i of the images.
        similarity: Or address of a matrix (B, B), images as rows, matched pairs on the diagonal; in mode "all_pairs"
            also (B, G), further texts behind. It is taken as it is, and nothing is gathered.
        scores: Or four addresses, with mode "itm": s00 (N,) of the matched pairs, and s01, s10, s11 (N, M) or (N,) as
            in `functional.eqsim_itm_loss`.
        ids: Address of integers (B,), such as the number of the image. Two samples of one id are no mismatch: they make
            no close pair, no far pair and none of all pairs. Not in the authors' code.
        logit_scale: Multiplier of the cosines, or its address, e.g. `"module.logit_scale"`. None: 1/0.07, with a
            warning.
        log_scale: Whether `logit_scale` is the logarithm, which is what CLIP learns.
        mode: See above.
        weight: w ≥ 0 of all terms. As in the authors' code it is not applied to what `relative` and `positive_reg`
            give; with `positive_reg` the logged terms are weighted already.
        activation: "softmax": scores are the softmax of an image's logits over all texts; None: cosines. In mode "itm"
            all of `functional.eqsim_itm_loss`.
        num_samples: K, partners on each side. A batch that has fewer gives what it has, with one warning.
        margin: As in `functional.eqsim_quad_loss`, in squared units of the scores.
        far_margin: As in `functional.eqsim_close_far_loss`.
        far_scale: As there.
        text_side: As in `functional.eqsim_quad_loss`, like all that follow to `eps`.
        image_side: As above.
        group_side: As above.
        hinge: As above.
        positive_reg: As above.
        relative: As above.
        eps: As above.
        normalize: Divide embeddings by their length; one of length 0 stays 0.
        gather: Compare within the batches of all processes together.
        gather_grad: Gradients come back from all ranks, and "all_pairs" takes all pairs of the joined batch, so that
            the number of processes does not matter. False, as released: other ranks' rows are constants (a loss that
            is the same on W ranks then has 1/W of its gradient), and "all_pairs" takes the pairs of the own batch.
        warmup_steps: Optimizer steps until full weight; 0: full from the first on.
        task_weight: Weight of the module's own loss.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If the addresses are not those of one of the three, or do not go with the mode; if an argument is
            out of its range; at the first step if shapes disagree, or if `similarity` are probabilities and their
            softmax would be taken.

    Source:
        Wang et al., "Equivariant Similarity for Vision-Language Foundation Models", ICCV 2023 (arXiv 2303.14465). The
        formulas are those of the authors' code; `ids` and `gather_grad=True` are ours.

    Example:
        >>> EqSim("module.image_encoder", "module.text_encoder", logit_scale="module.scale", activation=None)
        EqSim(image='module.image_encoder', text='module.text_encoder', logit_scale='module.scale', activation=None)
    """

    def __init__(
        self,
        image: AddressLike | None = None,
        text: AddressLike | None = None,
        *,
        similarity: AddressLike | None = None,
        scores: Sequence[AddressLike] | None = None,
        ids: AddressLike | None = None,
        logit_scale: float | AddressLike | None = None,
        log_scale: bool = False,
        mode: Mode = "close_far",
        weight: float = 0.5,
        activation: ItmActivation | None = "softmax",
        num_samples: int = 4,
        margin: float = 0.1,
        far_margin: float = 0.0,
        far_scale: float = 1.0,
        text_side: bool = True,
        image_side: bool = True,
        group_side: bool = False,
        hinge: Hinge = "mean",
        positive_reg: bool = False,
        relative: bool = False,
        eps: float = 0.0,
        normalize: bool = True,
        gather: bool = True,
        gather_grad: bool = True,
        warmup_steps: int = 0,
        task_weight: float = 1.0,
        log: bool | Literal["epoch"] = True,
        name: str = "eqsim",
    ) -> None:
        # `positive_reg` adds what has no weight: then w is inside of the terms.
        inside, outside = (weight, 1.0) if positive_reg else (1.0, weight)
        super().__init__(
            name=name,
            weights=_weights(mode, outside, relative),
            ramp=Ramp(warmup_steps, unit="step") if warmup_steps else None,
            task_weight=task_weight,
            log=log,
        )
        self.image = _parsed(image)
        self.text = _parsed(text)
        self.similarity = _parsed(similarity)
        self.scores = None if scores is None else [address(where) for where in scores]
        self.ids = _parsed(ids)
        self.logit_scale = logit_scale if isinstance(logit_scale, (int, float)) else _parsed(logit_scale)
        self.log_scale = log_scale
        self.mode = mode
        self.weight = weight
        self.num_samples = num_samples
        self.gather = gather
        self.gather_grad = gather_grad
        self.warmup_steps = warmup_steps
        criterion: dict[str, Any] = {
            "activation": activation,
            "margin": margin,
            "far_margin": far_margin,
            "far_scale": far_scale,
            "text_side": text_side,
            "image_side": image_side,
            "group_side": group_side,
            "hinge": hinge,
            "positive_reg": positive_reg,
            "relative": relative,
            "eps": eps,
            "normalize": normalize,
        }
        vars(self).update(criterion)  # `repr` looks for an argument under its name
        self._loss = EqSimLoss(mode, num_samples=num_samples, weight=inside, **criterion)
        self._check_sources()
        self._check_scale()
        if mode == "itm":
            self.exact_over_ranks = activation != "linear" and (margin == 0 or hinge == "pair")
        else:  # the draws of two ranks are not those of one
            self.exact_over_ranks = not self._loss.draws and similarity is None and gather and gather_grad
        self._seed = 0
        self._draws = 0
        self._warned = False
        self._looked = False
        self._probabilities: Tensor | None = None

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The terms of this step's embeddings, similarities or scores."""
        if self.scores is not None:
            terms = self._loss.match(*self._match_scores(step))
        elif self.similarity is not None:
            matrix = self._matrix(step)
            terms = self._terms(step, matrix, matrix, len(matrix), self._ids(step, len(matrix)))
        else:
            terms = self._of_embeddings(step)
        return {"close": terms.close, "far": terms.far} if self.mode == "close_far" else {_term(self.mode): terms.total}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and notes the seed of the draws."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._looked, self._probabilities = False, None
        self._seed = torch.initial_seed()  # draws of our own: the module's random numbers stay those without EqSim
        if self.image is not None and self.logit_scale is None and self._needs_scale:
            rank_zero_warn(f"{self!r} has no `logit_scale`, so it multiplies cosines by 1/0.07.")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called between a step and its gradients: looks at the first matrix, the one time that it waits for it."""
        suspect, self._probabilities = self._probabilities, None
        if suspect is not None and suspect:
            raise ValueError(
                f"Expected logits as `similarity` at {self.similarity!r}, but every row is positive and sums to 1: "
                f"these are probabilities, of which the softmax would be taken. Name the values before it, or set "
                f"activation=None."
            )

    def state_dict(self) -> dict[str, Any]:
        """How far the draws are; and the settings, for a warning if a run is resumed with others."""
        return {**super().state_dict(), "seed": self._seed, "draws": self._draws, "settings": repr(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; says if the settings have changed."""
        super().load_state_dict(state_dict)
        self._seed, self._draws = state_dict["seed"], state_dict["draws"]
        if state_dict["settings"] != repr(self):
            rank_zero_warn(f"Resuming with {self!r}, but the checkpoint was written with {state_dict['settings']}.")

    # From embeddings to terms

    def _of_embeddings(self, step: Step) -> EqSimTerms:
        image, text = self._embeddings(step)
        ids = self._ids(step, len(image))
        anchors = len(image)
        if self.gather:
            gathered = gather_batch(image, text, *([] if ids is None else [ids]), gather_grad=self.gather_grad)
            image, text = gathered[:2]
            ids = None if ids is None else gathered[2]
        if self.mode in _CONSISTENCY:
            return self._loss(image, text, 1.0)  # type: ignore[no-any-return]
        cosines = self._loss.similarities(image, text)
        logits = cosines * self._scale(step) if self._needs_scale else cosines
        scores = cosines if self._loss.activation is None else logits
        if self.mode == "all_pairs" and self.gather_grad:
            anchors = len(image)
        return self._terms(step, scores, logits, anchors, ids)

    def _terms(self, step: Step, scores: Tensor, logits: Tensor, anchors: int, ids: Tensor | None) -> EqSimTerms:
        exclude = None if ids is None else ids[:, None] == ids
        if not self._loss.draws:
            return self._loss.terms(scores, None, anchors, exclude)
        close_index = self._draw(step, logits, anchors, exclude)
        if step.logs and close_index.numel():
            step.note({"gap": _gap(scores if self._loss.activation is None else scores.softmax(1), close_index)})
        return self._loss.terms(scores, close_index, anchors, exclude)

    def _draw(self, step: Step, logits: Tensor, anchors: int, exclude: Tensor | None) -> Tensor:
        number = min(self.num_samples, len(logits) - 1)
        if number < self.num_samples and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self!r}: a batch of {len(logits)} has {len(logits) - 1} other samples, fewer than "
                f"num_samples={self.num_samples}; {number} are drawn."
            )
        # A function of seed, draw and rank alone: a run that is resumed needs the number of draws, on every rank.
        trainer = step.trainer
        seed = self._seed * _SEED_SPACING + self._draws * trainer.world_size + trainer.global_rank
        self._draws += 1
        if number == 0:
            return torch.empty(anchors, 0, dtype=torch.long, device=logits.device)
        generator = torch.Generator(logits.device).manual_seed(seed % 2**63)
        return eqsim_sample_close(logits, num_samples=number, num_anchors=anchors, exclude=exclude, generator=generator)

    # Reading, and saying what is wrong

    def _embeddings(self, step: Step) -> tuple[Tensor, Tensor]:
        image, text = self._read(step, "image", "embeddings (B, D)"), self._read(step, "text", "embeddings (B, D)")
        if image.shape != text.shape:
            raise ValueError(
                f"Expected one text for each image, in embeddings of one shape, but `image` at {self.image!r} is "
                f"{list(image.shape)} and `text` at {self.text!r} is {list(text.shape)}."
            )
        image, text = upcast(image, text)
        return image, text

    def _matrix(self, step: Step) -> Tensor:
        matrix = self._read(step, "similarity", "a matrix (B, B), images as rows")
        rows, columns = matrix.shape
        if columns < rows or (columns > rows and self.mode != "all_pairs"):
            raise ValueError(
                f"Expected `similarity` at {self.similarity!r} to be (B, B), images as rows, or in mode 'all_pairs' "
                f"(B, G) with more texts, but got {list(matrix.shape)}."
            )
        takes_softmax = self._loss.activation == "softmax" and self.mode not in _CONSISTENCY
        if takes_softmax and not self._looked and rows > 2:  # fewer may be so by chance
            self._looked, self._probabilities = True, sum_to_one(matrix.detach())
        return upcast(matrix)[0]

    def _read(self, step: Step, argument: str, expected: str) -> Tensor:
        where = getattr(self, argument)
        value = step[where]
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            raise ValueError(f"Expected `{argument}` at {where!r} to be {expected}, but got {describe(value)}.")
        return value

    def _match_scores(self, step: Step) -> list[Tensor]:
        found = [step[where] for where in self.scores or ()]
        tensors = all(isinstance(value, Tensor) and value.is_floating_point() for value in found)
        s00, *others = (value.shape if tensors else () for value in found)
        if not tensors or len(s00) != 1 or len(set(others)) > 1 or others[0][:1] != s00 or len(others[0]) > 2:
            shown = ", ".join(
                f"{where!r}: {describe(value)}" for where, value in zip(self.scores or (), found, strict=True)
            )
            raise ValueError(f"Expected `scores` to be s00 (N,), and s01, s10, s11 (N, M) or (N,), but got {shown}.")
        return found

    def _ids(self, step: Step, size: int) -> Tensor | None:
        if self.ids is None:
            return None
        ids = step[self.ids]
        if not isinstance(ids, Tensor) or ids.shape != (size,) or ids.is_floating_point():
            raise ValueError(f"Expected `ids` at {self.ids!r} to be integers ({size},), but got {describe(ids)}.")
        return ids

    def _scale(self, step: Step) -> float | Tensor:
        where = self.logit_scale
        if where is None:
            return _DEFAULT_SCALE
        if isinstance(where, (int, float)):
            return math.exp(where) if self.log_scale else where
        value = step[where]
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"Expected `logit_scale` at {where!r} to be a Tensor of one number, but got {describe(value)}."
            )
        scale = upcast(value.reshape(()))[0]
        return scale.exp() if self.log_scale else scale

    @property
    def _needs_scale(self) -> bool:
        return self._loss.draws or (self.mode == "all_pairs" and self._loss.activation is not None)

    def _check_sources(self) -> None:
        given = [name for name in ("image", "text", "similarity", "scores") if getattr(self, name) is not None]
        if given not in (["image", "text"], ["similarity"], ["scores"]):
            found = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise ValueError(f"Expected `image` and `text`, or `similarity`, or `scores`, but got {found}.")
        if self.scores is not None and len(self.scores) != 4:
            raise ValueError(f"Expected four addresses as `scores`, s00, s01, s10 and s11, but got {self.scores!r}.")
        if (self.mode == "itm") != (self.scores is not None):
            raise ValueError(f"Expected `scores` with mode 'itm', and only there, but got `mode` {self.mode!r}.")
        if self.similarity is not None and self.mode in ("cyclic", "in_modal"):
            raise ValueError(f"`mode` {self.mode!r} compares images with images: give `image` and `text`.")
        if self.ids is not None and self.mode in ("itm", *_CONSISTENCY):
            raise ValueError(f"`mode` {self.mode!r} makes no use of `ids`.")

    def _check_scale(self) -> None:
        if self.logit_scale is None:
            if self.log_scale:
                raise ValueError("`log_scale` says that `logit_scale` is a logarithm, but there is no `logit_scale`.")
        elif self.image is None:
            raise ValueError(
                "`logit_scale` multiplies cosines of `image` and `text`; other values are taken as they are."
            )
        elif isinstance(self.logit_scale, (int, float)) and not self.log_scale and not self.logit_scale > 0:
            raise ValueError(f"Expected `logit_scale` to be positive, but got {self.logit_scale}.")


def _parsed(where: AddressLike | None) -> AnyAddress | None:
    return None if where is None else address(where)


def _term(mode: Mode) -> str:
    return "close" if mode in ("close_far", "close_only") else mode


def _weights(mode: Mode, weight: float, relative: bool) -> dict[str, float]:
    """Of the terms of a mode; `relative` takes the weight off the criterion."""
    criterion = 1.0 if relative and mode not in _CONSISTENCY else weight
    return {"close": criterion, "far": weight} if mode == "close_far" else {_term(mode): criterion}


@torch.no_grad()
def _gap(scores: Tensor, close_index: Tensor) -> Tensor:
    """Mean of |a − b| + |c − d| over the close quadruples."""
    anchors = len(close_index)
    matched = scores.diagonal()
    p = matched[:anchors, None] - matched[close_index]
    e = scores[:anchors].gather(1, close_index) - scores.T[:anchors].gather(1, close_index)
    return 2 * torch.maximum(p.abs(), e.abs()).mean()  # |p − e| + |p + e|
