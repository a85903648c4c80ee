"""The stages of one edit: plain functions, tensors and one config in, a small frozen dataclass out."""
