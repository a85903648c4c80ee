"""Edit one photo by text: learn it, then forget what the edit must change."""

import logging

from forgedit.config import STRATEGIES, ChooseConfig, Defaults, EditConfig, SweepConfig, TuneConfig
from forgedit.editor import Editor
from forgedit.errors import (
    Cancelled,
    DeadlineExceeded,
    EditDiverged,
    ForgeditError,
    InputError,
    ModelError,
    SessionError,
    TuneDiverged,
)
from forgedit.lora import SavedLora
from forgedit.progress import StepEvent
from forgedit.quality.choose import Candidate, Choice, Evidence
from forgedit.session import Edit, SavedSession, Session

__all__ = [
    "STRATEGIES",
    "Cancelled",
    "Candidate",
    "Choice",
    "ChooseConfig",
    "DeadlineExceeded",
    "Defaults",
    "Edit",
    "EditConfig",
    "EditDiverged",
    "Editor",
    "Evidence",
    "ForgeditError",
    "InputError",
    "ModelError",
    "SavedLora",
    "SavedSession",
    "Session",
    "SessionError",
    "StepEvent",
    "SweepConfig",
    "TuneConfig",
    "TuneDiverged",
]

logging.getLogger("forgedit").addHandler(logging.NullHandler())
