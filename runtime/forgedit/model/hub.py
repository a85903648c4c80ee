"""Names on the Hugging Face hub: a copy in the local cache first; else the network, if it answers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from forgedit.errors import ModelError
from forgedit.model.pickled import PICKLED

log = logging.getLogger("forgedit")

ANSWER_SECONDS = 5.0  # for the hub's first answer: a download would retry for minutes where there is no network
UNWANTED = (*(f"*{suffix}" for suffix in PICKLED), "*.fp16.*", "*.non_ema.*", "*.msgpack", "*.h5", "*.onnx*")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can be a hub's `owner/name`, as the hub's own rules are, and is not named like weights."""
    if isinstance(name, Path) or name.count("/") != 1 or Path(name).suffix.lower() in (".safetensors", *PICKLED):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch(name: str, wanted: tuple[str, ...], is_whole: Callable[[Path], bool]) -> Path:
    """The local folder with a hub repository's files.

    wanted: patterns of the files to download, pickled ones never
    is_whole: whether a cached folder holds all that is needed; if so the network is not asked
    Raises: ModelError, naming the command that would help, where there is neither a whole copy nor a network
    """
    cached = _cached(name)
    if cached is not None and is_whole(cached):
        return cached
    missing = f"there is no folder {name!r}, nor a whole copy of a hub repository of that name in the local cache"
    command = f"`hf download {name} --local-dir DIR`"
    try:
        HfApi().model_info(name, timeout=ANSWER_SECONDS)
        log.warning("downloading %s from the hub", name)
        with _no_bars():
            folder = Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{missing}, and the hub shows none: check the name; if it is gated, `hf auth login`, then {command} "
            "and give DIR"
        ) from error
    except (HTTPError, OSError) as error:  # HTTPError: the base of what the hub's client raises without a network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{missing}, and asking the hub failed ({reason}): where there is a network run {command}, bring DIR "
            "here and give it"
        ) from error
    if not is_whole(folder):
        raise ModelError(
            f"the hub's {name} does not have every part as safetensors; pickled weights are refused, and were not "
            f"fetched: run {command} and give DIR, then the error says how to convert them"
        )
    return folder


def _cached(name: str) -> Path | None:
    """The folder of a repository in the local cache, whatever of it is there."""
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns="no file"))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars from the hub's client: a library prints nothing. Its setting is put back."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
