"""Models: the only place that imports diffusers and transformers."""

from forgedit.model.load import Model, load_model

__all__ = ["Model", "load_model"]
