"""Prompts to embeddings, by the text encoder that a session learned, if it learned one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from forgedit.model import Model
from forgedit.stages.encode import Prompt, encode_prompt, tokenize
from forgedit.weights import Weights

if TYPE_CHECKING:
    from forgedit.session import Session

log = logging.getLogger("forgedit")


class Prompts:
    """Encodes prompts. weights: both sides of the model's text encoder."""

    def __init__(self, model: Model, weights: Weights) -> None:
        self._model, self._weights = model, weights

    def tokens(self, prompt: str) -> tuple[Tensor, str]:
        """Ids [1, T] on the model's device, and the words cut, which are logged."""
        ids, cut = tokenize(prompt, self._model.tokenizer)
        if cut:
            log.warning("the prompt is longer than %d tokens; cut: %r", ids.shape[1], cut)
        return ids.to(self._model.alphas_cumprod.device), cut

    def embed(self, session: Session, prompt: str) -> Prompt:
        """By the session's own text encoder; each prompt is encoded once a session."""
        if prompt not in session.prompts:
            ids, cut = self.tokens(prompt)
            names = [name for name in session.tuned if name.startswith("text_encoder.")]
            self._weights.make_writable(names)
            for name in names:
                self._weights.working[name].copy_(session.tuned[name])
            session.prompts[prompt] = Prompt(encode_prompt(ids, self._model.text_encoder), cut)
            self._weights.restore(names)
        return session.prompts[prompt]
