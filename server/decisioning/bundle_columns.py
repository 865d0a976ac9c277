"""Temporary shim, replaced when the registry part lands."""

from server.registry.bundle import ModelColumns
from server.registry.bundle import columns as bundle_columns

__all__ = ["ModelColumns", "bundle_columns"]
