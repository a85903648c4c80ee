"""Errors a caller can act on; every one is a ForgeditError."""

from __future__ import annotations


class ForgeditError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(ForgeditError, ValueError):
    """A photo or prompt that cannot be edited; choose another."""


class ModelError(ForgeditError, RuntimeError):
    """A model that is missing, incomplete, pickled or of another kind; point to another, or do what the error says."""


class SessionError(ForgeditError, ValueError):
    """A session file that is truncated, altered, of an unknown version or of another base model."""


class TuneDiverged(ForgeditError, RuntimeError):
    """The loss, or what was learned, stopped being finite; lower the rates. The weights are the originals again."""


class EditDiverged(ForgeditError, RuntimeError):
    """The latents stopped being finite; lower the strength or the guidance. The weights are the originals again."""


class DeadlineExceeded(ForgeditError, RuntimeError):
    """The job cannot be done within the seconds allowed; give more, or ask for less. Nothing was started."""


class Cancelled(ForgeditError):
    """The caller's cancel event was set; the weights are the originals again."""
