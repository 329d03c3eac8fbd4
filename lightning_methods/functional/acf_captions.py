"""How captions are judged: CIDEr-D and BLEU, with the numbers of the usual COCO evaluation of tokenised text.

Written from the formulas; nothing but the standard library and torch is needed. Texts are lists or tensors of tokens,
or strings whose tokens stand between blanks. For raw text see `caption_tokens`.

Sources: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015; Papineni et al., "BLEU",
ACL 2002; details as in pycocoevalcap 1.2, whose results these are.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._logits import check_positive, check_range

Text: TypeAlias = str | Sequence[Hashable] | Tensor
NGram: TypeAlias = tuple[Hashable, ...]

#: Endings that the Penn Treebank's rules make tokens of their own.
_CLITICS = r"'(?:s|re|ve|ll|d|m)\b"
#: What the tokeniser of the COCO evaluation splits off and drops. Hyphens and points inside words and numbers stay.
_PUNCTUATION = re.compile(
    rf"--|\.\.\.|''|``|[`(){{}}\[\]?!;\"]|[,:](?!\d)|\.(?=\s|$)|(?<!\w)-|-(?!\w)|'(?!\w)|(?<!\w)(?!{_CLITICS})'"
)


class DocumentFrequency(NamedTuple):
    """In the references of how many images each n-gram occurs, and the number of images."""

    counts: Mapping[NGram, int]
    num_images: int

    def __deepcopy__(self, _memo: object) -> "DocumentFrequency":
        return self  # copies of modules and metrics share the table, which has millions of entries


class CiderResult(NamedTuple):
    """Mean over the items, and the items' own scores (items,); float64, and papers print 100 times these."""

    score: Tensor
    per_item: Tensor


class BleuResult(NamedTuple):
    """Corpus scores in [0, 1], float64; NaN above the order that was asked for."""

    bleu_1: Tensor
    bleu_2: Tensor
    bleu_3: Tensor
    bleu_4: Tensor


def caption_tokens(text: str) -> list[str]:
    """Tokens of a raw caption: lower case, without punctuation.

    Approximates the Penn Treebank tokeniser of the COCO evaluation, which needs Java: scores of raw text can differ
    from that evaluation's in the third digit.

    Args:
        text: A caption.

    Example:
        >>> caption_tokens("A man's dog (brown) doesn't move...  It is well-fed, 3.5 years old.")
        ['a', 'man', "'s", 'dog', 'brown', 'does', "n't", 'move', 'it', 'is', 'well-fed', '3.5', 'years', 'old']
    """
    text = re.sub(rf"(n't\b|{_CLITICS})", r" \1", text.lower())
    return _PUNCTUATION.sub(" ", text.replace("n't", "n\0t")).replace("\0", "'").split()


def document_frequency(references: Sequence[Sequence[Text]], *, n: int = 4) -> DocumentFrequency:
    """In how many images' references each n-gram of 1 to n tokens occurs, for `cider_d`.

    Args:
        references: For each image its reference captions.
        n: Longest n-gram, at least 1.

    Raises:
        ValueError: If `n` < 1.

    Example:
        >>> document_frequency([["a dog", "the dog"], ["a cat"]], n=1).counts[("a",)]
        2
    """
    check_range("n", n, 1, math.inf)
    counts: Counter[NGram] = Counter()
    for texts in references:
        counts.update(set().union(*(_ngrams(_tokens(text), n) for text in texts)))
    return DocumentFrequency(counts, len(references))


def cider_d(
    candidates: Sequence[Text],
    references: Sequence[Sequence[Text]],
    *,
    document_frequency: DocumentFrequency | None = None,
    n: int = 4,
    sigma: float = 6.0,
) -> CiderResult:
    r"""CIDEr-D: similarity of a caption to references in n-grams that are rare among images.

    An n-gram's weight is its count times $\log N - \log \max(1, df)$. For each order and reference the similarity is
    $\sum_g \min(c_g, r_g) r_g / (|c| |r|) \cdot \exp(-\Delta^2 / 2\sigma^2)$ with the difference Δ of the numbers of
    bigrams (0 where a norm is 0); the score is ten times the mean over orders and references. With a single image every
    weight, and so the score, is 0.

    Args:
        candidates: One caption an image: tokens, or a string of tokens.
        references: For each image its reference captions, at least one.
        document_frequency: Of a corpus; None: of these references. See the function of that name.
        n: Longest n-gram, at least 1.
        sigma: σ > 0.

    Raises:
        ValueError: If the numbers of candidates and references differ or are 0, an image has no reference, or an
            argument is out of its range.

    Example:
        >>> cider_d(["a red bus", "two dogs"], [["a red bus"], ["a dog"]]).per_item
        tensor([7.5000, 0.0000], dtype=torch.float64)
    """
    _check_pairs(candidates, references)
    check_range("n", n, 1, math.inf)
    check_positive(sigma=sigma)
    table = document_frequency or _document_frequency(references, n=n)
    if table.num_images < 1:
        raise ValueError(f"`document_frequency` must be of at least one image, got {table.num_images}")
    scores = []
    last: Sequence[Text] | None = None
    for candidate, texts in zip(candidates, references, strict=True):
        own = _Weighted(_tokens(candidate), table, n)
        if texts is not last:  # several candidates of an image may share its references
            last, weighted = texts, [_Weighted(_tokens(text), table, n) for text in texts]
        similarities = [own.similarity(other, sigma) for other in weighted]
        scores.append(10 * math.fsum(similarities) / (n * len(texts)))
    per_item = torch.tensor(scores, dtype=torch.float64)
    return CiderResult(per_item.mean(), per_item)


def bleu(candidates: Sequence[Text], references: Sequence[Sequence[Text]], *, n: int = 4) -> BleuResult:
    r"""Corpus BLEU of the orders 1 to n, with the closest reference's length.

    Counts are clipped by their maximum over the references and summed over the corpus; an order's precision is
    $(\mathrm{correct} + 10^{-15}) / (\mathrm{guessed} + 10^{-9})$. Of the references' lengths the closest counts,
    of two equally close ones the shorter.

    Args:
        candidates: One caption an item: tokens, or a string of tokens.
        references: For each item its reference captions, at least one.
        n: Highest order, 1 to 4.

    Raises:
        ValueError: If the numbers of candidates and references differ or are 0, an item has no reference, or `n` leaves
            its range.

    Example:
        >>> bleu(["the cat sat"], [["the cat sat down"]], n=2).bleu_1
        tensor(0.7165, dtype=torch.float64)
    """
    _check_pairs(candidates, references)
    check_range("n", n, 1, 4)
    correct, guessed = [0] * n, [0] * n
    length = closest = 0
    for candidate, texts in zip(candidates, references, strict=True):
        tokens, others = _tokens(candidate), [_tokens(text) for text in texts]
        limits: Counter[NGram] = Counter()
        for other in others:
            limits |= _ngrams(other, n)
        for ngram, count in _ngrams(tokens, n).items():
            correct[len(ngram) - 1] += min(count, limits[ngram])
            guessed[len(ngram) - 1] += count
        length += len(tokens)
        closest += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [math.nan] * 4, 1.0
    for order in range(n):
        product *= (correct[order] + 1e-15) / (guessed[order] + 1e-9)
        scores[order] = brevity * product ** (1 / (order + 1))
    return BleuResult(*torch.tensor(scores, dtype=torch.float64))


_document_frequency = document_frequency  # `cider_d` has an argument of the same name


class _Weighted:
    """A text as weighted n-grams, by order."""

    def __init__(self, tokens: Sequence[Hashable], table: DocumentFrequency, n: int) -> None:
        self.bigrams = max(0, len(tokens) - 1)
        images = math.log(table.num_images)
        self.orders: list[dict[NGram, float]] = [{} for _ in range(n)]
        for ngram, count in _ngrams(tokens, n).items():
            self.orders[len(ngram) - 1][ngram] = count * (images - math.log(max(1, table.counts.get(ngram, 0))))
        self.norms = [math.sqrt(math.fsum(weight**2 for weight in order.values())) for order in self.orders]

    def similarity(self, reference: "_Weighted", sigma: float) -> float:
        """Sum over the orders."""
        total = 0.0
        for own, other, norm in zip(
            self.orders,
            reference.orders,
            (a * b for a, b in zip(self.norms, reference.norms, strict=True)),
            strict=True,
        ):
            if norm:
                total += math.fsum(min(own[g], other[g]) * other[g] for g in own.keys() & other.keys()) / norm
        return total * math.exp(-((self.bigrams - reference.bigrams) ** 2) / (2 * sigma**2))


def _tokens(text: Text) -> Sequence[Hashable]:
    if isinstance(text, Tensor):  # its own elements are all different keys
        return text.tolist()
    return text.split() if isinstance(text, str) else text


def _ngrams(tokens: Sequence[Hashable], n: int) -> Counter[NGram]:
    return Counter(
        tuple(tokens[start : start + order]) for order in range(1, n + 1) for start in range(len(tokens) - order + 1)
    )


def _check_pairs(candidates: Sequence[Any], references: Sequence[Sequence[Any]]) -> None:
    if isinstance(candidates, str) or len(candidates) != len(references) or not len(candidates):
        found = repr(candidates) if isinstance(candidates, str) else f"{len(candidates)} and {len(references)}"
        raise ValueError(f"`candidates` and `references` must hold as many items, at least one, got {found}")
    for item, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"`references` must hold a list of captions for each item, got {texts!r} for item {item}")
