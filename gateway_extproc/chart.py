"""``python -m gateway_extproc.chart [--check]``: what the Helm chart has of the gateway's own code.

Owns three files of charts/gateway-extproc. ``values.schema.json`` is what Helm holds values against: for ``config`` it
is made from the configuration's schema, so that a misspelled key is refused before anything is installed.
``files/bounds.json`` has what no JSON Schema can say of it: how long durations may be, and how large sizes.
``files/answers.json`` has the answers that Envoy gives where the gateway gives none, and what its filters must be told,
which bootstrap.py has for an Envoy of our own. Promises the same text for the same code. Leaves out what the other
values mean (values.yaml) and what is made of them (the templates). ``--check`` writes nothing and exits 1 where a file
is not current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final

import msgspec

from . import bootstrap
from .config.checks import NAMESPACES
from .config.forms import NAME
from .config.part import RECORDS, settings
from .config.schema import Config
from .core import refusal
from .core.refusal import Refusal
from .wire.access_log import NAMESPACE
from .wire.extproc import RESPONSE_ATTRIBUTES

#: The chart, in a checkout.
CHART: Final = Path(__file__).parents[1] / "charts" / "gateway-extproc"
#: Stands for ``limits.max_body_bytes`` where the templates know it.
_MOST: Final = 999_999_999_999
_MOST_NAME: Final = "MAX_BODY_BYTES"
#: The like for the name that Envoy Gateway gives the cluster of gateways.
_CLUSTER: Final = "GATEWAY_CLUSTER"

Schema = dict[str, Any]


def files() -> Mapping[str, str]:
    """Each file's path in the chart, and its text."""
    return {
        "values.schema.json": _json(values_schema()),
        "files/bounds.json": _json(_bounds(Config)),
        "files/answers.json": _json(answers()),
    }


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# --- answers that Envoy gives itself ---------------------------------------------------------------------------------


def answers() -> dict[str, Any]:
    """What Envoy Gateway's objects say. ``overrides`` are by status, the first that matches holds."""
    return {
        "undecided": _answer(bootstrap.AWAY),
        "unknown-url": _answer(bootstrap.UNKNOWN_URL),
        "overrides": [
            {"codes": codes, **_answer(refused)}
            for codes, refused in (
                ([413], refusal.request_too_large(_MOST)),
                ([408, 504], refusal.upstream_timeout()),
                ([502, 503], refusal.upstream_unavailable()),
                ([500], refusal.internal_error()),
                ([404], bootstrap.UNKNOWN_URL),
                ([400, 403, 405, 411, 426, 431, 501], bootstrap.INVALID),
            )
        ],
        "attributes": list(RESPONSE_ATTRIBUTES),
        "namespace": NAMESPACE,
        "usage_filters": bootstrap.usage_filters(),
        "access_log": bootstrap.access_log(_CLUSTER),
    }


def _answer(refused: Refusal) -> dict[str, Any]:
    """A refusal as Envoy's objects have it. Envoy looks at the path to tell in whose form."""
    forms = [_literal(refused.body(anthropic=anthropic)) for anthropic in (True, False)]
    return {
        "status": refused.status,
        "headers": [{"name": name, "value": value} for name, value in refused.headers().items()],
        "body": f"%CEL(request.path.contains('/v1/messages') ? {forms[0]} : {forms[1]})%",
    }


def _literal(body: bytes) -> str:
    """A body as text in CEL, in a format string of Envoy's."""
    text = body.decode().replace(str(_MOST), _MOST_NAME)
    assert not {"'", "\\", "%"} & set(text), text
    return f"'{text}'"


# --- values ----------------------------------------------------------------------------------------------------------


def values_schema() -> Schema:
    """What values may be."""
    quantities = _map(_QUANTITY)
    resources = _object({"requests": quantities, "limits": quantities, "claims": _OBJECTS})
    account = _values({"create": _BOOL, "name": _OBJECT, "annotations": _ANNOTATIONS})
    image = _values({
        "repository": _text("[a-z0-9][a-zA-Z0-9._:/-]*"), "tag": _text("|[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}"),
        "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]}, "digest": _text("|sha256:[0-9a-f]{64}"),
    })  # fmt: skip
    placement = {
        "nodeSelector": _LABELS, "tolerations": _OBJECTS, "affinity": _ANY_OBJECT, "priorityClassName": _OBJECT,
    }  # fmt: skip
    namespaces = {"type": "array", "items": _NAMESPACE, "uniqueItems": True, "maxItems": NAMESPACES}
    port = {"type": "integer", "minimum": 1, "maximum": 65535}
    definitions: dict[str, Schema] = {}
    config = _part(Config, definitions)
    every = _values({
        "nameOverride": _text(f"|{_LABEL}"),
        # Leaves room for the longest suffix, -controller, in a label's 63 characters.
        "fullnameOverride": _text(f"|{_SERVICE}", 48),
        "image": image,
        "imagePullSecrets": _NAMED,
        "config": config,
        "namespaces": namespaces,
        "listenAddress": {"enum": ["0.0.0.0", "[::]"]},
        "replicas": _COUNT,
        "autoscaling": _values({
            "enabled": _BOOL, "minReplicas": _POSITIVE, "maxReplicas": _POSITIVE,
            "targetCPUUtilizationPercentage": _POSITIVE,
        }),
        # Not 0: a node that must go would never be free of its pods.
        "podDisruptionBudget": _values({
            "enabled": _BOOL, "maxUnavailable": {"anyOf": [_POSITIVE, _text("[1-9][0-9]?%")]},
        }),
        "resources": resources,
        "podAnnotations": _ANNOTATIONS,
        "podLabels": _LABELS,
        **placement,
        "topologySpreadConstraints": _OBJECTS,
        "extraEnv": _NAMED,
        "extraVolumes": _NAMED,
        "extraVolumeMounts": _NAMED,
        "serviceAccount": account,
        "rbac": _values({"create": _BOOL}),
        "controller": _values({
            "mode": {"enum": ["deployment", "serve", "none"]}, "replicas": _COUNT, "resources": resources,
            "serviceAccount": account,
        }),
        "gateway": _values({
            # The name is a label's value, too.
            "create": _BOOL, "name": _text(f"|{_SUBDOMAIN}", 63), "namespace": _text(f"|{_LABEL}"),
            "className": _OBJECT, "controllerName": _SOME, "annotations": _ANNOTATIONS, "port": port,
            "tls": _values({"secretName": _OBJECT, "port": port}), "routeNamespaces": namespaces,
            "parametersRef": _ANY_OBJECT, "clientTraffic": _ANY_OBJECT,
            "messageTimeoutSeconds": {"type": "integer", "minimum": 0, "maximum": 600},
        }),
        "accessLog": _values({
            "enabled": _BOOL, "listeners": {"type": "array", "items": _text(_SUBDOMAIN, 253), "uniqueItems": True},
        }),
        "store": _values({
            "url": _text(r"|(unix|rediss?(\+(sentinel|cluster))?)://\S+"), "existingSecret": _OBJECT,
            "key": _text("[a-zA-Z0-9._-]+"),
        }),
        "valkey": _values({
            "enabled": _BOOL, "image": image, "maxMemory": _text("[1-9][0-9]{0,8}(kb|mb|gb)"),
            "persistence": _values({
                "enabled": _BOOL, "size": _text("[1-9][0-9]{0,14}([kMGTP]|[KMGTP]i)?"), "storageClassName": _OBJECT,
                # One: there is one pod.
                "accessModes": {
                    "type": "array", "minItems": 1, "maxItems": 1,
                    "items": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]},
                },
                "whenDeleted": {"enum": ["Delete", "Retain"]},
            }),
            "resources": resources,
            **placement,
        }),
        "existingSecret": _OBJECT,
        "networkPolicy": _values({"enabled": _BOOL, "envoyNamespace": _NAMESPACE, "adminFrom": _OBJECTS}),
        "serviceMonitor": _values({
            # As Prometheus reads durations, in one unit.
            "enabled": _BOOL, "interval": _text("[1-9][0-9]{0,8}(ms|s|m|h)"), "labels": _LABELS,
        }),
    })  # fmt: skip
    # What Helm gives every chart that is another's dependency.
    every["properties"]["global"] = _ANY_OBJECT
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Made by `python -m gateway_extproc.chart`; do not edit.",
        "title": "Values of the chart gateway-extproc",
        **every,
        "definitions": definitions,
    }


def _text(pattern: str, most: int | None = None) -> Schema:
    """Text that a pattern matches whole."""
    found: Schema = {"type": "string", "pattern": f"^({pattern})$"}
    return found if most is None else found | {"maxLength": most}


def _object(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    found: Schema = {"type": "object", "additionalProperties": False, "properties": dict(properties)}
    return found | ({"required": [*required]} if required else {})


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _values(properties: Mapping[str, Schema]) -> Schema:
    """Values that all have a default: who takes one away with null is told."""
    return _object(properties, [*properties])


_BOOL: Final[Schema] = {"type": "boolean"}
_TEXT: Final[Schema] = {"type": "string"}
_SOME: Final[Schema] = {"type": "string", "minLength": 1}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 10_000}
_POSITIVE: Final[Schema] = _COUNT | {"minimum": 1}
_OBJECTS: Final[Schema] = {"type": "array", "items": {"type": "object"}}
_NAMED: Final[Schema] = {
    "type": "array", "items": {"type": "object", "properties": {"name": _SOME}, "required": ["name"]}
}  # fmt: skip
_ANY_OBJECT: Final[Schema] = {"type": "object"}
#: Names of Kubernetes' objects (RFC 1123 section 2.1), and of its Services (RFC 1035 section 2.3.1).
_LABEL: Final = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SUBDOMAIN: Final = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
_SERVICE: Final = "[a-z]([a-z0-9-]*[a-z0-9])?"
_NAMESPACE: Final = _text(_LABEL)
_OBJECT: Final = _text(f"|{_SUBDOMAIN}", 253)
#: Labels, and annotations, whose values may be anything.
_KEY: Final = _text(rf"({_SUBDOMAIN}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?", 253)
_LABELS: Final[Schema] = _map(_text("|[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")) | {"propertyNames": _KEY}
_ANNOTATIONS: Final[Schema] = _map(_TEXT) | {"propertyNames": _KEY}
#: As Kubernetes reads it (apimachinery, pkg/api/resource), without signs; as text or as a number.
_QUANTITY: Final[Schema] = {
    "anyOf": [
        _text(r"[0-9]+(\.[0-9]*)?([munkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?", 24),
        {"type": "number", "minimum": 0, "maximum": 1e15},
    ]
}


def _part(part: type[msgspec.Struct], definitions: dict[str, Schema]) -> Schema:
    """A part of the configuration, each once."""
    name = part.__name__
    if name not in definitions:
        definitions[name] = {}  # a place, should it be in itself
        properties: dict[str, Schema] = {}
        for setting in settings(part):
            value = {**setting.form.schema} if setting.part is None else _part(setting.part, definitions)
            if setting.switch:
                value = {"anyOf": [value, _BOOL]}
            if setting.many == "[]":
                value = {"type": "array", "items": value}
            elif setting.many:
                value = {"type": "object", "propertyNames": NAME.schema, "additionalProperties": value}
            if setting.optional or setting.part is not None:
                value = {"anyOf": [value, {"type": "null"}]}
            properties[setting.name] = {"description": setting.doc, **value}
        required = [setting.name for setting in settings(part) if setting.required]
        prose = RECORDS.get(part) or " ".join(cleandoc(part.__doc__ or "").split())
        definitions[name] = {"description": prose, **_object(properties, required)}
    return {"$ref": f"#/definitions/{name}"}


def _bounds(part: type[msgspec.Struct]) -> dict[str, Any]:
    """The bounds of durations and sizes in a part of the configuration, where there are any. ``*`` is each of a list or
    of a mapping by name."""
    found: dict[str, Any] = {}
    for setting in settings(part):
        inner: dict[str, Any] = {}
        if setting.part is not None:
            inner = _bounds(setting.part)
        elif setting.form.bounds is not None:
            least, most = setting.form.bounds
            inner = {"least": least, "most": most, "kind": setting.form.kind}
        if inner:
            found[setting.name] = {"*": inner} if setting.many else inner
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway_extproc.chart")
    parser.add_argument("--check", action="store_true", help="whether the files are current; write nothing")
    check = parser.parse_args(arguments).check
    old = [path for path, text in files().items() if not _is(CHART / path, text)]
    for path in old:
        if not check:
            (CHART / path).parent.mkdir(parents=True, exist_ok=True)
            (CHART / path).write_text(files()[path], encoding="utf-8")
        else:
            print(f"{path} is not current: run python -m gateway_extproc.chart", file=sys.stderr)
    return 1 if check and old else 0


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
