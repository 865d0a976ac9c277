"""The example catalog and its seed bundle, as they ship."""

from __future__ import annotations

from functools import cache

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from training.fit import MODELS_FOLDER


@cache
def catalog() -> Catalog:
    """Compile the example catalog once."""
    return compile_catalog(load_catalog((MODELS_FOLDER / "catalog.yaml").read_text(encoding="utf-8")))


@cache
def bundle() -> bytes:
    """Read the shipped bundle."""
    return (MODELS_FOLDER / "bundle.binpb").read_bytes()
