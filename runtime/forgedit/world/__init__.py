"""A small rendered world with ground truth: scenes, captions, true edits, and a judge that counts."""
