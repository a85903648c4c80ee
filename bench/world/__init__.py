"""A small rendered world with ground truth: scenes, captions, true edits, and what is trained and measured on it."""
