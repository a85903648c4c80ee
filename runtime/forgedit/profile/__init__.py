"""Where the time of an edit goes: traces, a table per op against the roofline, latencies, memory."""

from forgedit.profile.command import add_profile_flags, run_profile
from forgedit.profile.report import write_profile
from forgedit.profile.run import Profile, profile_edit

__all__ = ["Profile", "add_profile_flags", "profile_edit", "run_profile", "write_profile"]
