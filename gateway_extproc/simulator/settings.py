"""How one simulated pod is set up: what ``gateway-extproc pod`` and tests may choose, and what is allowed."""

from __future__ import annotations

from typing import Final

import msgspec

from . import clock
from .engine import GPUS, Gpu
from .jobs import MAX_ANSWER

#: The model of the demo.
DEFAULT_MODEL: Final = "your-model-name"
#: Tokens of an answer when neither the request nor the setting says.
DEFAULT_ANSWER: Final = 16
#: Most models and most adapters of one pod.
MAX_NAMES: Final = 64
#: Prompt and answer, in tokens, as ``/v1/models`` tells. Told only: a longer prompt is served too.
MAX_MODEL_LEN: Final = 131_072


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One pod. ``gpu`` is a profile, or the name of one of engine.GPUS; ``slots`` and ``kv_blocks`` override what it
    has, and it is ``speed`` times as fast. A stream's first token goes by itself, and then ``stream_interval`` at a
    time, as with vLLM's option of that name.

    ``name`` empty: ``pod-PORT``. ``loras`` are adapters of the first model, loaded at the start. ``path_prefix``
    stands before every path but ``/sim/``. ``api_key`` is asked for under ``/v1/``. ``max_tokens_default`` is the
    answer's length when the request does not say. ``tls_cert`` and ``tls_key`` are paths of PEM files.
    """

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    loras: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    gpu: str | Gpu = "instant"
    speed: float = 1.0
    stream_interval: int = 1
    slots: int | None = None
    kv_blocks: int | None = None
    seed: int = 0
    max_tokens_default: int = DEFAULT_ANSWER
    path_prefix: str = ""
    api_key: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError, with a message for whoever chose."""
        names = (*self.models, *self.loras)
        if not self.models or not all(names):
            raise ValueError("a pod needs a model, and no name may be empty")
        if len(set(names)) != len(names):
            raise ValueError("the names of models and adapters must differ from each other")
        if max(len(self.models), len(self.loras)) > MAX_NAMES:
            raise ValueError(f"a pod has at most {MAX_NAMES} models and {MAX_NAMES} adapters")
        if isinstance(self.gpu, str) and self.gpu not in GPUS:
            raise ValueError(f"unknown GPU profile '{self.gpu}'; known: {', '.join(GPUS)}")
        clock.checked(self.speed)
        if self.stream_interval < 1:
            raise ValueError("a stream's interval is at least one token")
        if self.slots is not None and self.slots < 1:
            raise ValueError("a pod needs at least one slot")
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise ValueError("a pod needs at least one KV block")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"no such port: {self.port}")
        if not 0 <= self.max_tokens_default <= MAX_ANSWER:
            raise ValueError(f"the default answer must have from 0 to {MAX_ANSWER} tokens")
        if self.path_prefix and (not self.path_prefix.startswith("/") or self.path_prefix.endswith("/")):
            raise ValueError("a path prefix begins with '/' and does not end with one")
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("a TLS key needs its certificate")

    def hardware(self) -> Gpu:
        """The profile with what is overridden."""
        gpu = GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu
        return Gpu(
            gpu.prefill,
            gpu.decode,
            gpu.slots if self.slots is None else self.slots,
            gpu.blocks if self.kv_blocks is None else self.kv_blocks,
        )
