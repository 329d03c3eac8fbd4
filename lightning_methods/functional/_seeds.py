"""Random numbers that follow from where they are used, so that no generator's state has to be kept."""

import hashlib

import torch


def seeded(*place: int | str) -> torch.Generator:
    """A generator on the CPU for a place such as ("stillmix", seed, rank, step): neighbouring places share nothing."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
