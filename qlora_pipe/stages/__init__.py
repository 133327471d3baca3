"""Thin stages: which modules, in which order, into which files. No arithmetic lives here."""
