"""A compiler for language-model weights under a memory budget."""

__version__ = "0.1.0"
