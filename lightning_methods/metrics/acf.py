"""Caption metrics that merge over ranks before they are computed: document frequencies need the whole corpus."""

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_methods.functional import DocumentFrequency, bleu, caption_tokens, cider_d
from lightning_methods.functional._logits import check_positive, check_range

#: A caption: raw text, or tokens that are strings or integers.
Caption: TypeAlias = str | Sequence[Hashable] | Tensor
Tokenizer: TypeAlias = Callable[[str], Sequence[str]]


class _CaptionMetric(Metric):
    """Keeps captions as lines of JSON in bytes, which are gathered, moved and merged like any other state."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    lines: list[Tensor]

    def __init__(self, tokenizer: Tokenizer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(self, candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> None:
        """Add captions of some images.

        Args:
            candidates: One caption an image. Strings are split by the tokenizer; lists and tensors are tokens already.
            references: For each image its reference captions, at least one.

        Raises:
            ValueError: If their numbers differ.
        """
        if isinstance(candidates, str) or len(candidates) != len(references):
            found = f"{len(candidates)} and {len(references)}"
            raise ValueError(f"`candidates` and `references` must hold as many items, got {found}")
        items = [
            [self._tokens(candidate), [self._tokens(text) for text in texts]]
            for candidate, texts in zip(candidates, references, strict=True)
        ]
        written = "".join(json.dumps(item) + "\n" for item in items).encode()
        self.lines.append(torch.tensor(list(written), dtype=torch.uint8, device=self.device))

    def _tokens(self, text: Caption) -> list[Hashable]:
        if isinstance(text, Tensor):
            return text.tolist()
        return list(self.tokenizer(text)) if isinstance(text, str) else list(text)

    def _corpus(self) -> tuple[list[list[Hashable]], list[list[list[Hashable]]]]:
        written = bytes(dim_zero_cat(self.lines).tolist()).decode() if len(self.lines) else ""
        items = [json.loads(line) for line in written.splitlines()]
        if not items:
            raise ValueError(f"{type(self).__name__} has no captions: call update first")
        return [item[0] for item in items], [item[1] for item in items]

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if not len(self.lines):  # a rank without data gathers an empty state of the right dtype
            self.lines = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super()._sync_dist(*args, **kwargs)


class CiderD(_CaptionMetric):
    """`cider_d` of all captions together. Papers print 100 times this number.

    Args:
        document_frequency: Of a corpus; None: of the evaluated references, of all ranks.
        n: As in `cider_d`.
        sigma: As in `cider_d`.
        tokenizer: Splits strings into tokens; see `caption_tokens`.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> metric = CiderD()
        >>> metric.update(["A red bus.", "Two dogs."], [["a red bus"], ["a dog"]])
        >>> metric.compute()
        tensor(3.7500)
    """

    def __init__(
        self,
        document_frequency: DocumentFrequency | None = None,
        n: int = 4,
        sigma: float = 6.0,
        tokenizer: Tokenizer = caption_tokens,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_range("n", n, 1, float("inf"))
        check_positive(sigma=sigma)
        self.document_frequency = document_frequency
        self.n = n
        self.sigma = sigma

    def compute(self) -> Tensor:
        """The mean over the images."""
        result = cider_d(*self._corpus(), document_frequency=self.document_frequency, n=self.n, sigma=self.sigma)
        return result.score.float().to(self.device)


class CaptionBLEU(_CaptionMetric):
    """`bleu` of all captions together.

    Args:
        n: Highest order, 1 to 4.
        tokenizer: Splits strings into tokens; see `caption_tokens`.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `n` leaves its range.

    Example:
        >>> metric = CaptionBLEU(n=2)
        >>> metric.update(["The cat sat."], [["the cat sat down"]])
        >>> metric.compute()
        {'bleu_1': tensor(0.7165), 'bleu_2': tensor(0.7165)}
    """

    def __init__(self, n: int = 4, tokenizer: Tokenizer = caption_tokens, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        check_range("n", n, 1, 4)
        self.n = n

    def compute(self) -> dict[str, Tensor]:
        """`bleu_1` to `bleu_n`, in [0, 1]."""
        scores = bleu(*self._corpus(), n=self.n)
        return {f"bleu_{order}": score.float().to(self.device) for order, score in enumerate(scores[: self.n], 1)}
