"""Artifacts on disk: layouts, streaming readers and writers, manifests and the content-addressed store."""
