"""``python -m gateway_extproc.chart [--check]``: what the Helm chart has of the gateway's own code.

Owns two files of charts/gateway-extproc. ``values.schema.json`` is what Helm holds values against: for ``config`` it is
made from the configuration's schema, so that a misspelled key is refused before anything is installed.
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
    quantities = _map(_TEXT_OR_NUMBER)
    resources = _object({"requests": quantities, "limits": quantities, "claims": _LIST})
    account = _object({"create": _BOOL, "name": _TEXT, "annotations": _TEXTS})
    image = _object({
        "repository": _SOME, "tag": _TEXT, "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
        "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    })  # fmt: skip
    placement = {"nodeSelector": _TEXTS, "tolerations": _LIST, "affinity": _ANY_OBJECT, "priorityClassName": _TEXT}
    namespaces = {"type": "array", "items": _NAMESPACE, "uniqueItems": True}
    port = {"type": "integer", "minimum": 1, "maximum": 65535}
    definitions: dict[str, Schema] = {}
    config = _part(Config, definitions)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Made by `python -m gateway_extproc.chart`; do not edit.",
        "title": "Values of the chart gateway-extproc",
        **_object({
            "nameOverride": _TEXT,
            "fullnameOverride": _TEXT,
            "image": image,
            "imagePullSecrets": _LIST,
            "config": config,
            "namespaces": namespaces,
            "listenAddress": _SOME,
            "replicas": _COUNT,
            "autoscaling": _object({
                "enabled": _BOOL, "minReplicas": _POSITIVE, "maxReplicas": _POSITIVE,
                "targetCPUUtilizationPercentage": _POSITIVE,
            }),
            "podDisruptionBudget": _object({
                "enabled": _BOOL,
                "maxUnavailable": {"anyOf": [_COUNT, {"type": "string", "pattern": "^[0-9]{1,3}%$"}]},
            }),
            "resources": resources,
            "podAnnotations": _TEXTS,
            "podLabels": _TEXTS,
            **placement,
            "topologySpreadConstraints": _LIST,
            "extraEnv": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            "extraVolumes": _LIST,
            "extraVolumeMounts": _LIST,
            "serviceAccount": account,
            "rbac": _object({"create": _BOOL}),
            "controller": _object({
                "mode": {"enum": ["deployment", "serve", "none"]}, "replicas": _COUNT, "resources": resources,
                "serviceAccount": account,
            }),
            "gateway": _object({
                "create": _BOOL, "name": _TEXT, "namespace": _TEXT, "className": _TEXT, "controllerName": _SOME,
                "annotations": _TEXTS, "port": port, "tls": _object({"secretName": _TEXT, "port": port}),
                "routeNamespaces": namespaces, "parametersRef": _ANY_OBJECT, "clientTraffic": _ANY_OBJECT,
                "messageTimeoutSeconds": {"type": "integer", "minimum": 0, "maximum": 600},
            }),
            "accessLog": _object({"enabled": _BOOL}),
            "store": _object({"url": _TEXT, "existingSecret": _TEXT, "key": _SOME}),
            "valkey": _object({
                "enabled": _BOOL, "image": image, "maxMemory": {"type": "string", "pattern": "^[1-9][0-9]*(kb|mb|gb)$"},
                "persistence": _object({
                    "enabled": _BOOL, "size": _SOME, "storageClassName": _TEXT,
                    "accessModes": {"type": "array", "items": _SOME, "minItems": 1},
                    "whenDeleted": {"enum": ["Delete", "Retain"]},
                }),
                "resources": resources,
                **placement,
            }),
            "existingSecret": _TEXT,
            "networkPolicy": _object({"enabled": _BOOL, "envoyNamespace": _NAMESPACE, "adminFrom": _LIST}),
            "serviceMonitor": _object({"enabled": _BOOL, "interval": _SOME, "labels": _TEXTS}),
            # What Helm gives every chart that is another's dependency.
            "global": _ANY_OBJECT,
        }),
        "definitions": definitions,
    }  # fmt: skip


_BOOL: Final[Schema] = {"type": "boolean"}
_TEXT: Final[Schema] = {"type": "string"}
_SOME: Final[Schema] = {"type": "string", "minLength": 1}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_POSITIVE: Final[Schema] = {"type": "integer", "minimum": 1}
_LIST: Final[Schema] = {"type": "array"}
_ANY_OBJECT: Final[Schema] = {"type": "object"}
_TEXT_OR_NUMBER: Final[Schema] = {"type": ["string", "number"]}
#: RFC 1123 section 2.1, as in config/forms.py.
_NAMESPACE: Final[Schema] = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}


def _object(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    found: Schema = {"type": "object", "additionalProperties": False, "properties": dict(properties)}
    return found | ({"required": [*required]} if required else {})


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


_TEXTS: Final = _map(_TEXT)


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
