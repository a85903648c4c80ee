"""One tuned photo: its embedding and its tuned weights; save and load."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from forgedit.apply import apply_weights, merged_weights
from forgedit.config import ChooseConfig, EditConfig, SweepConfig, TuneConfig
from forgedit.delta import check_delta, pack_weight, squared_distance, unpack_weight
from forgedit.errors import InputError, SessionError
from forgedit.lora import SavedLora, write_lora
from forgedit.progress import OnStep
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import Choice, climb, decide
from forgedit.quality.composite import keep_outside
from forgedit.session_file import read_session_file, write_session_file
from forgedit.stages.encode import Prompt
from forgedit.stages.photo import Photo, open_photo, restore_size

if TYPE_CHECKING:
    from forgedit.editor import Editor

SCALES = ":scales"  # ends the name of the scales that belong to a weight's values


@dataclass(frozen=True)
class Edit:
    """One edited picture.

    config, target: what was asked for
    image: RGB, the session's edited size; latents: [1, C, h, w] float32 on the CPU, scaled as the UNet sees them
    seconds: seconds by stage ('blend', 'forget', 'sample', 'decode')
    photo_size: width and height of the upright photo, pixels, None for image's own; opacity: L of that size, or None
    cut: the words of the target beyond the model's tokens, which it did not see; '' if none
    """

    image: Image.Image
    latents: Tensor
    config: EditConfig
    target: str
    seconds: dict[str, float]
    photo_size: tuple[int, int] | None = None
    opacity: Image.Image | None = None
    cut: str = ""

    def at_photo_size(self) -> Image.Image:
        """The picture at the photo's own size, by Lanczos: RGB, or RGBA with the photo's opacity if it has one."""
        return restore_size(self.image, self.photo_size or self.image.size, self.opacity)

    def keep_outside(self, photo: Photo, mask: ChangeMask, feather: int | None = None) -> Image.Image:
        """The picture at the photo's own size where the mask is, and the photo, byte for byte, everywhere else.

        photo: the one that was learned, as Editor.tune took it, read as open_photo says
        mask: Session.change_mask finds one, ChangeMask.given takes yours
        feather: pixels of the photo, inside the mask, over which it goes over into the edit; None for one pixel of the
            edited picture, as large as it is in the photo
        Raises: InputError for a photo of another size, or a mask that covers nothing or nearly everything
        """
        opened, size = open_photo(photo), self.photo_size or self.image.size
        if opened.size != size:
            raise InputError(
                "the photo has {} by {} pixels, the one that was learned had {} by {}; give that one".format(
                    *opened.size, *size
                )
            )
        if feather is None:
            feather = math.ceil(max(size[0] / self.image.width, size[1] / self.image.height))
        return keep_outside(opened, restore_size(self.image, size, None), mask.mask, feather)


@dataclass(frozen=True)
class SavedSession:
    """What Session.save wrote.

    path: of the file, num_bytes: its size; delta: how it holds the tuned weights
    relative_error: |restored - tuned| / |tuned - original|, Euclidean norms over all tuned values, in float64; 0 for
        fp32, which is restored bit for bit
    """

    path: Path
    delta: str
    num_bytes: int
    relative_error: float


@dataclass(frozen=True, eq=False)
class Session:
    """One learned photo, made by Editor.tune or Editor.load_session; belongs to that editor.

    source: the photo as edited, RGB at the model's size
    embedding: e_src, [1, T, D] float32
    tuned: tuned weights by name, prefixed 'unet.' or 'text_encoder.'; only tensors that were trained. In host memory if
        the device had no room for more (see way)
    caption, config: what was learned as the photo's prompt, and how
    losses: one per step, the step that stopped early included; stopped_early: whether there was one
    way: how it was computed, in words: mode and rows at once of the engine, or the plain path
    seconds: seconds by stage
    num_photos: learned together; source, photo_size and opacity are the first one's
    photo_size, opacity: of the upright photo, see Edit
    prompts: the prompts already encoded, filled by the editor
    """

    editor: Editor = field(repr=False)
    source: Image.Image
    caption: str
    config: TuneConfig
    embedding: Tensor = field(repr=False)
    tuned: dict[str, Tensor] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    stopped_early: bool
    seconds: dict[str, float]
    way: str = ""
    num_photos: int = 1
    photo_size: tuple[int, int] | None = None
    opacity: Image.Image | None = field(repr=False, default=None)
    prompts: dict[str, Prompt] = field(repr=False, default_factory=dict)

    def edit(
        self,
        target: str,
        config: EditConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> Edit:
        """Edit towards the target prompt.

        target, config, on_step, cancel, deadline_s, Raises: as Editor.edit says
        """
        return self.editor.edit(self, target, config, on_step, cancel, deadline_s)

    def sweep(
        self,
        target: str,
        config: SweepConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> Iterator[Edit]:
        """Yield each edit of the grid as it finishes; weights are merged once per strategy, see Editor.edits.

        target, on_step, cancel: as in edit; config: None takes the editor's defaults.sweep
        deadline_s: for the whole sweep, see Editor.edits
        Raises: as edit does, when an edit's turn comes; those yielded before stay good
        """
        config = config or self.editor.defaults.sweep
        yield from self.editor.edits(self, target, config.edits(), on_step, cancel, deadline_s)

    def choose(
        self,
        target: str,
        config: ChooseConfig | None = None,
        base: EditConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        mask: ChangeMask | None = None,
    ) -> Choice:
        """Find an edit towards the target prompt without anybody's eye: see quality.choose.

        config: the ladder and what is good enough; None takes the editor's defaults.choose
        base: what the ladder leaves open, such as guidance_scale; None takes defaults.edit
        mask: where the photo may change, of ChangeMask.given; None has it found for each edit
        target, on_step, cancel, Raises: as in edit; ModelError if the model has no scorer
        """
        defaults, scorer = self.editor.defaults, self.editor.model.scorer
        config = config or defaults.choose
        candidates = climb(self, target, config, base or defaults.edit, scorer, on_step, cancel, mask)
        return decide(list(candidates), config)

    def change_mask(self, edit: Edit) -> ChangeMask:
        """Where one of this session's edits changed the photo, for Edit.keep_outside. See Editor.change_mask"""
        return self.editor.change_mask(self, edit)

    def save(self, path: str | Path, delta: str = "fp32") -> SavedSession:
        """Write one safetensors file, atomically: the file at `path` is the old one or the whole new one.

        path: its folder must be there
        delta: how the tuned weights are stored, one of DELTA_FORMATS: 'fp32' edits bit-equally when loaded; 'fp16',
            'int8' and 'int4' are smaller and edit almost alike. The embedding stays float32.
        Metadata: format version, fingerprint of the base model, SHA-256 over everything else, caption, config, losses
        Raises: ValueError for an unknown delta, or for weights it cannot hold; OSError, with no partial file left
        """
        check_delta(delta)
        path = Path(path)
        tensors, relative_error = self._packed(delta)
        tensors["embedding"] = self.embedding.cpu().contiguous()
        tensors["source"] = torch.from_numpy(np.array(self.source))
        if self.opacity is not None:
            tensors["opacity"] = torch.from_numpy(np.array(self.opacity))
        record = {
            "caption": self.caption,
            "config": dataclasses.asdict(self.config),
            "losses": self.losses,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "way": self.way,
            "num_photos": self.num_photos,
            "photo_size": self.photo_size,
            "delta": delta,
        }
        num_bytes = write_session_file(path, tensors, record, self.editor.fingerprint)
        return SavedSession(path, delta, num_bytes, relative_error)

    def apply_to(
        self,
        unet: Any,
        text_encoder: Any = None,
        *,
        strategy: str = "none",
        keep: float = 0.0,
        check_base: bool = True,
    ) -> None:
        """Write the tuned weights, with forgetting, into a plain UNet2DConditionModel of yours, such as a pipe's.

        unet, text_encoder: modules of the base model, in any float dtype and layout, on any device; each weight is
            merged in the editor's dtype and then rounded once. A DreamBooth session needs the text encoder too
        strategy, keep: what is forgotten, as in EditConfig
        check_base: compare every weight that this session does not write with the base model's, rounded alike. Those it
            writes are not compared: it replaces them whole, so that another session or strategy of the same profile
            may follow on the same module
        Raises: ValueError for another architecture or another base model, weights that are quantised, offloaded or
            shared with the editor (Editor.from_pipe), an unknown strategy, or keep; no weight has been touched then
        """
        parts = {"unet": unet} if text_encoder is None else {"unet": unet, "text_encoder": text_encoder}
        apply_weights(parts, self.tuned, self.editor.originals(), strategy, keep, check_base)

    def export_lora(self, path: str | Path, rank: int, *, strategy: str = "none", keep: float = 0.0) -> SavedLora:
        """Write the tuned weights' change as a LoRA that diffusers' load_lora_weights reads, atomically.

        path: its folder must be there; rank: of every pair of matrices, 1 to the longest of the weights' shorter sides
        strategy, keep: what is forgotten, as in EditConfig; weights that are forgotten whole are not in the file
        The source embedding, without which there is no edit, goes into the metadata: lora.source_embedding reads it.
        Raises: ValueError for rank, strategy or keep, or a change that is not finite; OSError, with no partial file
        """
        words = {"caption": self.caption, "strategy": strategy, "keep": keep}
        originals = self.editor.originals()
        return write_lora(
            Path(path),
            rank,
            parts={"unet": self.editor.model.unet, "text_encoder": self.editor.model.text_encoder},
            merged=merged_weights(self.tuned, originals, strategy, keep),
            original={name: originals[name] for name in self.tuned},
            embedding=self.embedding,
            record=words | {"base_fingerprint": self.editor.fingerprint},
        )

    def _packed(self, delta: str) -> tuple[dict[str, Tensor], float]:
        """Tensors to store, on the CPU, and the relative error of what will be restored from them."""
        tensors: dict[str, Tensor] = {}
        wrong = change = torch.zeros((), dtype=torch.float64, device=self.embedding.device)
        originals = self.editor.originals()
        for name, tuned in self.tuned.items():
            original = originals[name]
            values, scales = pack_weight(tuned, original, delta)
            tensors[name] = values.cpu().contiguous()
            if scales is not None:
                tensors[name + SCALES] = scales.cpu()
                wrong = wrong + squared_distance(unpack_weight(values, scales, original, delta), tuned)
                change = change + squared_distance(tuned, original)
        return tensors, math.sqrt(wrong / change) if change else 0.0


def read_session(editor: Editor, path: Path) -> Session:
    """Read and check a session file: readable, version, base, payload, and names and shapes the editor has.

    Raises: SessionError saying which check failed; OSError if there is no such file
    """
    tensors, record = read_session_file(path, editor.fingerprint)
    try:
        return _unpacked(editor, tensors, record)
    except KeyError as error:
        raise SessionError(f"{str(path)!r} lacks {error}, which every session has") from error
    except (TypeError, ValueError) as error:
        raise SessionError(f"{str(path)!r} cannot be read: {error}") from error


def _unpacked(editor: Editor, tensors: dict[str, Tensor], record: dict[str, Any]) -> Session:
    source, embedding = tensors.pop("source"), tensors.pop("embedding")
    opacity = tensors.pop("opacity", None)
    tuned, originals = {}, editor.originals()
    for name in [name for name in tensors if not name.endswith(SCALES)]:
        if name not in originals:
            raise ValueError(f"it holds {name!r}, which the model lacks")
        try:
            parts = tensors[name], tensors.get(name + SCALES)
            tuned[name] = unpack_weight(*parts, originals[name], record["delta"])
        except ValueError as error:
            raise ValueError(f"{name!r} is not what the format says: {error}") from error
    return Session(
        editor=editor,
        source=Image.fromarray(source.numpy()),
        caption=record["caption"],
        config=TuneConfig(**record["config"]),
        embedding=embedding.to(editor.model.alphas_cumprod.device),
        tuned=tuned,
        losses=tuple(record["losses"]),
        stopped_early=record["stopped_early"],
        seconds=record["seconds"],
        way=record.get("way", ""),  # files of before it was noted
        num_photos=record.get("num_photos", 1),  # likewise
        photo_size=tuple(size) if (size := record["photo_size"]) else None,
        opacity=None if opacity is None else Image.fromarray(opacity.numpy()),
    )
