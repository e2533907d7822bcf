"""Families that transformers does not have."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, Any] = {}
