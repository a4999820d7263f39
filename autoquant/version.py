"""The version of this release: a study begun by another one is not gone on with in silence."""

__version__ = "0.1.0"
