"""What a request will cost before it has run: tokens of the prompt and of the answer, learned from those that ended.

Owns the averages and their priors. All are exponential moving averages over finished requests, so they follow
a model's traffic and need no tokenizer. What is expected of an answer is learned for each user and model, and for each
model where the user is new. For answers that nobody read it also says how many tokens a number of bytes was. Leaves out
how an estimate is charged (core/account.py).
"""

from __future__ import annotations

from typing import Final

from .store import Reserve

#: Tokens per byte of prompt before anything was learned: about four bytes of English a token, the rule of thumb that
#: OpenAI gives for its tokenizers.
PRIOR_TOKENS_PER_BYTE: Final = 0.25
#: Tokens of an answer before anything was learned.
PRIOR_OUTPUT: Final = 128.0
#: Tokens per byte of an event stream before anything was learned: vLLM's chat completions take some 240 bytes for an
#: event, which carries one token.
PRIOR_TOKENS_PER_STREAMED_BYTE: Final = 1 / 240
#: Weight of the newest request in all averages: the last 20 or so requests decide.
GAIN: Final = 0.1
#: Most models remembered; the one learned least recently is dropped.
MODELS: Final = 4096
#: Most pairs of user and model, likewise: some 250 bytes each.
USERS: Final = 16_384


class Estimates:
    """Learned averages by model. Called from the event loop only."""

    __slots__ = ("_of_user", "_output", "_ratio", "_streamed")

    def __init__(self) -> None:
        self._ratio: dict[str, float] = {}
        self._output: dict[str, float] = {}
        #: With how much the next request weighs.
        self._of_user: dict[tuple[str, str], tuple[float, float]] = {}
        self._streamed: dict[str, float] = {}

    def prompt(self, model: str, prompt_bytes: int) -> int:
        """Expected tokens of a prompt of that many bytes; at least one."""
        return max(1, round(self._ratio.get(model, PRIOR_TOKENS_PER_BYTE) * prompt_bytes))

    def output(self, model: str, declared: int | None, answers: int, reserve: Reserve, user: str = "") -> int:
        """Expected tokens of ``answers`` answers, each capped by the ``declared`` maximum; with ``reserve: max`` that
        maximum itself where there is one. ``user`` "": nobody in particular."""
        known = self._of_user.get((user, model)) if user else None
        expected = self._output.get(model, PRIOR_OUTPUT) if known is None else known[0]
        if declared is not None:
            expected = declared if reserve == "max" else min(expected, declared)
        return round(expected) * answers

    def streamed(self, model: str, sent: int) -> int:
        """Expected tokens of output in ``sent`` bytes of an event stream."""
        return round(self._streamed.get(model, PRIOR_TOKENS_PER_STREAMED_BYTE) * sent)

    def learn(self, model: str, prompt_bytes: int, prompt: int, output: int | None, user: str = "") -> None:
        """A request of ``prompt_bytes`` really had these tokens; ``output`` per answer, None where none is
        generated."""
        if prompt_bytes > 0 and prompt > 0:
            self._update(self._ratio, model, prompt / prompt_bytes, PRIOR_TOKENS_PER_BYTE)
        if output is not None:
            if user:
                self._learn_user(model, output, user)
            self._update(self._output, model, float(output), PRIOR_OUTPUT)

    def _learn_user(self, model: str, output: int, user: str) -> None:
        """What was known of the model weighs as one request of the user: their own soon decide."""
        pairs, pair = self._of_user, (user, model)
        known, gain = pairs.pop(pair, (self._output.get(model, PRIOR_OUTPUT), 1 / 2))
        pairs[pair] = known + gain * (output - known), max(GAIN, gain / (1 + gain))
        if len(pairs) > USERS:
            del pairs[next(iter(pairs))]

    def learn_stream(self, model: str, sent: int, output: int) -> None:
        """An event stream of ``sent`` bytes really had ``output`` tokens."""
        if sent > 0 and output > 0:
            self._update(self._streamed, model, output / sent, PRIOR_TOKENS_PER_STREAMED_BYTE)

    @staticmethod
    def _update(table: dict[str, float], model: str, value: float, prior: float) -> None:
        known = table.pop(model, prior)
        table[model] = known + GAIN * (value - known)
        if len(table) > MODELS:
            del table[next(iter(table))]
