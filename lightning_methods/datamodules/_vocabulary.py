"""Words of captions as numbers, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

UNKNOWN = "UNK"


class Vocabulary:
    """The words that occur often enough, numbered from 1; then a word for all others, [MASK] and [END].

    0 is the start of a caption, and what stands behind its end. Words are numbered by falling count, and
    alphabetically where counts are equal, so the same captions always give the same numbers.

    Args:
        captions: Captions as lists of words.
        min_count: How often a word must occur.

    Raises:
        ValueError: No word occurs so often, or `min_count` is below 1.

    Example:
        >>> words = Vocabulary([["a", "cat"], ["a", "dog"], ["a", "cat"]], min_count=2)
        >>> words.encode(["a", "red", "cat"])
        [1, 3, 2]
        >>> words.decode([1, 2, words.end, 1])
        'a cat'
    """

    start = 0

    def __init__(self, captions: Iterable[Sequence[str]], min_count: int = 5) -> None:
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts = Counter(word for caption in captions for word in caption)
        kept = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        if not kept:
            raise ValueError(f"no word of the captions occurs min_count = {min_count} times")
        self.words = [*kept, UNKNOWN]
        self._number = {word: number for number, word in enumerate(kept, start=1)}
        self.unknown = len(kept) + 1
        self.mask, self.end = len(kept) + 2, len(kept) + 3

    def __len__(self) -> int:
        """How many numbers there are, 0 included."""
        return self.end + 1

    def encode(self, words: Iterable[str]) -> list[int]:
        """Numbers of words."""
        return [self._number.get(word, self.unknown) for word in words]

    def decode(self, numbers: Sequence[int] | Tensor) -> str:
        """The words up to [END], or to the first number that is no word's."""
        words = []
        for number in numbers:
            if not 1 <= int(number) <= len(self.words):
                break
            words.append(self.words[int(number) - 1])
        return " ".join(words)
