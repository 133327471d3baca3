"""Numerics of structure: coupled groups, scores, selection, slicing, the kept-index record, scattering.

Depends on torch only. Nothing here reads files, logs, or chooses a device.
"""
