"""What may change or go without notice. Beside it stands Editor.tune's others, marked likewise."""

from forgedit.experimental.frames import EditedFrames, edit_frames

__all__ = ["EditedFrames", "edit_frames"]
