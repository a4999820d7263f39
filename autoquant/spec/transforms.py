"""What transforms of a layer's input are called: in spaces, in recipes, and in words."""

from __future__ import annotations

BLOCKS: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
"""How many channels a block may have that is rotated."""
UNROTATED: tuple[int, ...] = (0,)
"""The blocks of a layer whose input is not rotated."""
UNSMOOTHED: tuple[float, ...] = (0.0,)
"""The exponents of a layer whose input stays as it is."""


def rotation_text(block: int) -> str:
    """Return what a recipe calls the rotation of blocks of so many channels."""
    return f"hadamard_{block}"


def is_rotation(text: str) -> bool:
    """Return whether a recipe's transform is meant to be a rotation: of any block."""
    return text.startswith("hadamard")


def rotated_block(text: str) -> int | None:
    """Return the block of ``rotation_text``; None where the text is no such thing."""
    return next((block for block in BLOCKS if text == rotation_text(block)), None)


def describe_transform(text: str) -> str:
    """Return a recipe's transform in words: factors are a letter for each channel."""
    return text if is_rotation(text) else "smoothed"
