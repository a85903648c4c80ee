"""Models: the only place that imports diffusers and transformers."""

from forgedit.model.load import Model, load_model
from forgedit.model.pipe import model_from_pipe

__all__ = ["Model", "load_model", "model_from_pipe"]
