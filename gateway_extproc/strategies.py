"""Strategies by third parties: what to write them with.

All that a plug-in may import from this package, and what it may rely on: the names below keep their meaning, and
nothing is taken from them. docs/routing.md has an example, and says how a plug-in gets into a gateway.
"""

from __future__ import annotations

from .core.load import Metrics
from .core.strategies.plugin import Pod, Strategy
from .core.strategies.strategy import Asked, Need, least

__all__ = ["Asked", "Metrics", "Need", "Pod", "Strategy", "least"]
