"""Errors a caller can act on; every one is a ForgeditError."""

from __future__ import annotations


class ForgeditError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(ForgeditError, ValueError):
    """A photo or prompt that cannot be edited; choose another."""


class ModelError(ForgeditError, RuntimeError):
    """A model folder that is missing, incomplete, pickled or of another shape; point to another folder."""


class SessionError(ForgeditError, ValueError):
    """A session file that is truncated, altered, of an unknown version or of another base model."""


class TuneDiverged(ForgeditError, RuntimeError):
    """The loss stopped being finite; lower the learning rate. The weights are back at the originals."""


class Cancelled(ForgeditError):
    """The caller's cancel event was set; the weights are back at the originals."""
