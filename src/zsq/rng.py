"""Randomness as an argument: independent, named streams derived from one seed."""

import hashlib

import torch


def derived_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream `path` of `seed`; the same on every machine and Python version."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(seed: int, *path: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the stream `path` of `seed`, e.g. `rng_for(0, "synthesis", batch)`.

    Every batch and every unit has its own stream, so that a resumed run draws what an undisturbed one draws.
    """
    return torch.Generator(device).manual_seed(derived_seed(seed, *path))
