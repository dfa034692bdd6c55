"""The APIs that read and do not write: embeddings, rerank, score and classify.

Owns their request fields and answers as vLLM serves them. Promises vectors and scores that depend on the seed, the
model and the texts only, and usage without completion tokens. Leaves out what a real model would make of the texts.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import xxhash

from .jobs import MAX_INPUTS, Answer, Inputs, Job, Rejected, at_least_one, decode, inputs

encode = msgspec.json.encode
#: Numbers in an embedding when the request does not say.
DIMENSIONS: Final = 16
#: Most numbers in an embedding; above the largest of today's models.
MAX_DIMENSIONS: Final = 8192
#: Labels that a classification chooses from.
LABELS: Final = ("LABEL_0", "LABEL_1")


class _Pooling(Job):
    """A job whose answer is computed from its prompts. Each prompt is one text, or one pair of texts."""

    generates = False

    def keys(self) -> list[int]:
        """A number for each prompt, to draw its vector or score with."""
        base = xxhash.xxh3_64_intdigest(self.model.encode())
        return [xxhash.xxh3_64_intdigest(prompt, seed=base) for prompt in self.prompts]

    def body(self, answer: Answer, prefix: str, **content: Any) -> bytes:
        """What all these answers have in common, around ``content``."""
        common = {"id": prefix + answer.id, "created": answer.created, "model": self.model}
        usage = {} if answer.usage is None else {"usage": answer.usage.openai()}
        return encode(common | content | usage)


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    model: str
    input: Inputs
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"


class Embedding(_Pooling):
    dimensions = DIMENSIONS
    packed = False

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, EmbeddingRequest)
        dimensions = DIMENSIONS if asked.dimensions is None else asked.dimensions
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise Rejected(f"'dimensions' must be from 1 to {MAX_DIMENSIONS}.", param="dimensions")
        job = cls(asked.model, inputs(asked.input, "input", MAX_INPUTS))
        job.dimensions, job.packed = dimensions, asked.encoding_format == "base64"
        return job

    def plain(self, answer: Answer) -> bytes:
        data = []
        for index, key in enumerate(self.keys()):
            vector: list[float] | str = answer.voice.vector(key, self.dimensions)
            if self.packed:  # Little-endian 32-bit floats: what OpenAI's own client asks for and unpacks.
                vector = base64.b64encode(struct.pack(f"<{self.dimensions}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        return self.body(answer, "embd-", object="list", data=data)


class RerankRequest(msgspec.Struct, kw_only=True):
    model: str
    query: str
    documents: list[str]
    top_n: int | None = None


class Rerank(_Pooling):
    documents: list[str]
    top: int | None = None

    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, RerankRequest)
        job = cls(asked.model, _pairs([asked.query], asked.documents, "documents"))
        job.documents, job.top = asked.documents, at_least_one(asked.top_n, "top_n")
        return job

    def plain(self, answer: Answer) -> bytes:
        scores = [answer.voice.score(key) for key in self.keys()]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top]
        results = [
            {"index": index, "document": {"text": self.documents[index]}, "relevance_score": scores[index]}
            for index in best
        ]
        return self.body(answer, "rerank-", results=results)


class ScoreRequest(msgspec.Struct, kw_only=True):
    model: str
    text_1: str | list[str]
    text_2: str | list[str]


class Score(_Pooling):
    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, ScoreRequest)
        return cls(asked.model, _pairs(_listed(asked.text_1), _listed(asked.text_2), "text_2"))

    def plain(self, answer: Answer) -> bytes:
        scores = [answer.voice.score(key) for key in self.keys()]
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return self.body(answer, "score-", object="list", data=data)


class ClassifyRequest(msgspec.Struct, kw_only=True):
    model: str
    input: Inputs


class Classify(_Pooling):
    @classmethod
    def read(cls, body: bytes) -> Job:
        asked = decode(body, ClassifyRequest)
        return cls(asked.model, inputs(asked.input, "input", MAX_INPUTS))

    def plain(self, answer: Answer) -> bytes:
        data = []
        for index, key in enumerate(self.keys()):
            score = answer.voice.score(key)
            label = LABELS[score >= 0.5]
            data.append({"index": index, "label": label, "probs": [1 - score, score], "num_classes": len(LABELS)})
        return self.body(answer, "classify-", object="list", data=data)


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _pairs(first: list[str], second: list[str], param: str) -> list[bytes]:
    """Each pair as one prompt; a single first text goes with every second one. Raises Rejected."""
    if not second or len(second) > MAX_INPUTS:
        raise Rejected(f"'{param}' must hold from 1 to {MAX_INPUTS} texts.", param=param)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise Rejected("Either one text against any number of texts, or as many as there are of those.", param=param)
    return [f"{left}\n{right}".encode() for left, right in zip(first, second, strict=True)]


#: The reader of each path.
READERS: Final[dict[str, Callable[[bytes], Job]]] = {
    "/v1/embeddings": Embedding.read,
    "/v1/rerank": Rerank.read,
    "/v1/score": Score.read,
    "/v1/classify": Classify.read,
}
