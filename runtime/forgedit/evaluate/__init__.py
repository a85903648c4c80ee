"""Measuring: other methods on the same model, protocols, and tables with intervals."""
