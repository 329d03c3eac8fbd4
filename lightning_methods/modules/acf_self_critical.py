"""Sequence-level training of a captioner: the captions that it writes itself, rewarded by CIDEr-D."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lightning_methods._modes import evaluating
from lightning_methods.functional import DocumentFrequency, caption_mask, cider_d, self_critical_loss
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.functional._shapes import at_least_float32, check_shape

Baseline: TypeAlias = Literal["samples", "greedy"]
#: For each image its captions: padded ids (B, R, T), or lists of lists of ids.
References: TypeAlias = Tensor | Sequence[Sequence[Sequence[int]]]


class WritesCaptions(Protocol):
    """A model, of whatever kind, that writes captions for a batch's inputs, as `ACFCaptioner` does."""

    def sample(self, inputs: Any, num_samples: int, /) -> tuple[Tensor, Tensor]:
        """Drawn token ids and their log-probabilities, (B·n, T) both; the n samples of an image are neighbours."""

    def greedy(self, inputs: Any, /) -> tuple[Tensor, Tensor]:
        """The most probable token ids, (B, T'), and something else; needed for the baseline "greedy" alone."""


class SelfCriticalTerms(NamedTuple):
    """The loss, and rewards without gradients: of the samples (B·n,), and of the greedy captions (B,) if there are."""

    loss: Tensor
    reward: Tensor
    greedy_reward: Tensor | None


class SelfCriticalLoss(nn.Module):
    r"""The loss of captions that a model writes itself, for training on CIDEr-D after training on words.

    In a call the model samples n captions for each image. `cider_d` compares them with the image's references, and
    `self_critical_loss` makes the more probable those that get more than the baseline. Captions are token ids up to and
    with the end, which counts as a word, as in the authors' code. Scores are computed on the host, which waits for the
    samples.

    Args:
        document_frequency: Of the training captions as lists of ids that end in `end_id`: `document_frequency` of
            them, computed once.
        end_id: The token that ends a caption.
        num_samples: n captions for each image; at least 2 for the baseline "samples".
        baseline: What a sample has to beat. "samples": the mean reward of the image's other samples, as the authors
            have it. "greedy": the caption that the model would write, decoded in evaluation mode, as in Rennie et al.
        sigma: As in `cider_d`.

    Raises:
        ValueError: If an argument is out of its range, or the document frequencies are not of token ids.

    Source:
        Wang et al., "Adaptively Clustering Neighbor Elements for Image-Text Generation" (arXiv 2301.01955), and its
        code; "greedy": Rennie et al., "Self-critical Sequence Training for Image Captioning", CVPR 2017.

    Example:
        >>> import torch
        >>> from lightning_methods.functional import document_frequency
        >>> from lightning_methods.modules import ACFCaptioner
        >>> references = torch.tensor([[[1, 2, 9]], [[3, 9, 9]]])  # one for each of two images
        >>> model = ACFCaptioner(10, end_id=9, feature_dim=6, grid_size=(2, 2), embed_dim=8, num_heads=2)
        >>> loss = SelfCriticalLoss(document_frequency([[[1, 2, 9]], [[3, 9]]]), end_id=9)
        >>> loss(model, torch.randn(2, 4, 6), references).shape
        torch.Size([])
    """

    def __init__(
        self,
        document_frequency: DocumentFrequency,
        end_id: int,
        *,
        num_samples: int = 5,
        baseline: Baseline = "samples",
        sigma: float = 6.0,
    ) -> None:
        super().__init__()
        check_choice("baseline", baseline, Baseline)
        check_range("num_samples", num_samples, 2 if baseline == "samples" else 1, float("inf"))
        check_positive(sigma=sigma)
        ngram = next(iter(document_frequency.counts), ())
        if any(isinstance(token, str) for token in ngram):
            raise ValueError(f"`document_frequency` must be of captions as token ids, got the n-gram {ngram!r}")
        self.document_frequency = document_frequency
        self.end_id = end_id
        self.num_samples = num_samples
        self.baseline: Baseline = baseline
        self.sigma = sigma

    def forward(self, model: WritesCaptions, inputs: Any, references: References) -> Tensor:
        """The loss of a batch: `terms(...).loss`."""
        return self.terms(model, inputs, references).loss

    def terms(self, model: WritesCaptions, inputs: Any, references: References) -> SelfCriticalTerms:
        """The loss of a batch, and the rewards for a log.

        Args:
            model: What writes; only the log-probabilities of its samples get gradients.
            inputs: What it writes for, such as image features.
            references: Ids of the captions of each of B images, at least one: (B, R, T), or lists of lists. What stands
                behind the first `end_id` is not read.

        Raises:
            ValueError: If the model gives something else than n samples for each image that has references, or an
                image has none.
        """
        targets = [
            [self._caption(text) for text in texts]
            for texts in (references.tolist() if isinstance(references, Tensor) else references)
        ]
        tokens, logprobs = model.sample(inputs, self.num_samples)
        samples = [targets[row // self.num_samples] for row in range(self.num_samples * len(targets))]
        reward = self._reward("samples", tokens, samples).to(at_least_float32(logprobs)).to(logprobs.device)
        mask = caption_mask(tokens, self.end_id)
        if self.baseline == "samples":
            loss = self_critical_loss(logprobs, reward, mask, num_samples=self.num_samples)
            return SelfCriticalTerms(loss, reward, None)
        greedy = self._reward("greedy captions", _greedy(model, inputs), targets).to(reward)
        # Each sample and the greedy caption are a pair, of which the second counts as the baseline alone.
        loss = self_critical_loss(
            _paired(logprobs, torch.zeros_like(logprobs)),
            _paired(reward, greedy.repeat_interleave(self.num_samples)),
            _paired(mask, torch.zeros_like(mask)),
            num_samples=2,
        )
        return SelfCriticalTerms(loss, reward, greedy)

    def extra_repr(self) -> str:
        """The constructor's arguments, without the table."""
        return f"end_id={self.end_id}, num_samples={self.num_samples}, baseline={self.baseline!r}, sigma={self.sigma}"

    def _reward(self, name: str, tokens: Tensor, references: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        check_integer(name, tokens)
        check_shape(name, tokens, "rows, T", (len(references), None))
        captions = [self._caption(row) for row in tokens.tolist()]
        scores = cider_d(captions, references, document_frequency=self.document_frequency, sigma=self.sigma)
        return scores.per_item

    def _caption(self, row: Sequence[int]) -> list[int]:
        words = [int(token) for token in row]
        return words[: words.index(self.end_id) + 1] if self.end_id in words else words


def _greedy(model: WritesCaptions, inputs: Any) -> Tensor:
    with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
        return model.greedy(inputs)[0]


def _paired(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], 1).flatten(0, 1)
