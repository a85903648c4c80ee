"""forgedit calibrate: from marked edits to the ladder and the thresholds that an edit is chosen by."""
