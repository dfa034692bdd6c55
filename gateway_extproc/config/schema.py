"""The schema: every section and key of the configuration file, its type, default and meaning.

Owns what users may write. Promises that each field's form and
description are all there is to say of it: reading, printing and docs/configuration.md are made from them. Leaves out
what values must hold together (checks.py) and the records of users, teams and limits, which are core's
(core/directory.py); part.py describes their fields.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ..core.directory import Limits, Team, User
from .forms import (
    CLASS,
    DOLLARS,
    ENVOY_FILE,
    FILE,
    HEADER,
    HOST,
    LISTENER,
    METRICS,
    MODEL,
    NAME,
    NAMESPACE,
    NAMESPACED,
    ORIGIN,
    PREFIX,
    SECRET,
    SECRET_FILE,
    SOME,
    STORE_PREFIX,
    STRATEGY,
    URL,
    address,
    duration,
    or_empty,
    size,
    whole,
)
from .part import Part, about


class ServerTls(Part, frozen=True, kw_only=True):
    """A certificate to serve with."""

    cert_file: Annotated[str, about("The certificate chain, PEM.", FILE)]
    key_file: Annotated[str, about("Its private key, PEM.", FILE)]
    client_ca_file: Annotated[
        str, about("Where set, clients must show a certificate that one of these authorities signed.", or_empty(FILE))
    ] = ""


class Listen(Part, frozen=True, kw_only=True):
    """Where the gateway itself listens."""

    grpc: Annotated[
        str,
        about(
            "What Envoy connects to. Port 0 takes any free port. With `--workers N` it is the first one's: the others "
            "have the ports after it, or the socket's path with `-1`, `-2`, ….",
            address(any_port=True, socket=True),
        ),
    ] = "127.0.0.1:9002"
    http: Annotated[
        str,
        about("Health, metrics and administration. Any other host than this machine needs an admin token.", LISTENER),
    ] = "127.0.0.1:9090"
    transport: Annotated[
        Literal["h2", "grpc"],
        about(
            "What serves `grpc`. `h2`: this gateway's own HTTP/2 listener. `grpc`: grpc.aio, at several times the cost."
        ),
    ] = "h2"
    tls: Annotated[ServerTls | None, about("TLS for `grpc`.")] = None
    drain: Annotated[
        float,
        about(
            "How long answers in flight may take to end when the gateway stops, so that what they used is charged. "
            "Those that take longer go on, and are charged what was reserved. For where another gateway takes what is "
            "new meanwhile.",
            duration(0, 1800),
        ),
    ] = 0.0


class EnvoyTls(Part, frozen=True, kw_only=True):
    """The certificate that Envoy shows clients."""

    cert_file: Annotated[str, about("The certificate chain, PEM.", ENVOY_FILE)]
    key_file: Annotated[str, about("Its private key, PEM.", ENVOY_FILE)]


class GatewayTls(Part, frozen=True, kw_only=True):
    """How Envoy checks the gateway, where `listen.tls` is set."""

    ca_file: Annotated[str, about("The authorities that may sign the gateway's certificate, PEM.", ENVOY_FILE)]
    cert_file: Annotated[
        str, about("Envoy's own certificate, for `listen.tls.client_ca_file`.", or_empty(ENVOY_FILE))
    ] = ""
    key_file: Annotated[str, about("Its private key, PEM.", or_empty(ENVOY_FILE))] = ""


class Cors(Part, frozen=True, kw_only=True):
    """What browsers are told. Without this section they are told nothing, and only pages of the same origin may ask."""

    allow_origins: Annotated[tuple[str, ...], about("Origins whose pages may ask; `*` is any.", ORIGIN)]
    allow_headers: Annotated[
        tuple[str, ...], about("Request headers they may send. `*` does not cover `authorization`.", HEADER)
    ] = ("*", "authorization")
    max_age: Annotated[float, about("How long a browser may remember this.", duration(0, 7 * 86400))] = 86400.0


class Envoy(Part, frozen=True, kw_only=True):
    """What `gateway-extproc envoy` writes Envoy's bootstrap from. Of no effect where Envoy is configured otherwise."""

    listen: Annotated[str, about("Where clients connect.", LISTENER)] = "0.0.0.0:8888"
    admin: Annotated[str, about("Envoy's own admin page. It has no password: keep it local.", LISTENER)] = (
        "127.0.0.1:9901"
    )
    gateway: Annotated[
        str, about("The gateway's address as Envoy sees it. Empty: `listen.grpc`.", or_empty(address(socket=True)))
    ] = ""
    node: Annotated[str, about("The name by which Envoy introduces itself.", NAME)] = "envoy"
    tls: Annotated[EnvoyTls | None, about("TLS towards clients.")] = None
    gateway_tls: Annotated[GatewayTls | None, about("TLS towards the gateway.")] = None
    cors: Annotated[Cors | None, about("Answers to browsers on other origins.")] = None
    trusted_hops: Annotated[
        int, about("Proxies in front of Envoy whose `x-forwarded-for` is believed.", whole(0, 100))
    ] = 0
    message_timeout: Annotated[
        float | None,
        about(
            "How long Envoy waits for the gateway's word on a request, before it asks once more: longer than "
            "`store.timeout` and 1 s. "
            "Absent: computed.",
            duration(1.0, 600),
        ),
    ] = None
    max_heap: Annotated[int, about("Memory at which Envoy begins to refuse requests.", size(64 << 20, 256 << 30))] = (
        2 << 30
    )
    upstream_ca_file: Annotated[
        str,
        about(
            "Authorities for pods with `tls`, PEM. Empty: `/etc/ssl/certs/ca-certificates.crt`, where Debian, "
            "Alpine and Envoy's images keep the system's.",
            or_empty(ENVOY_FILE),
        ),
    ] = ""


class StoreConfig(Part, frozen=True, kw_only=True):
    """The Redis or Valkey that counts limits. Without `url` or `url_file` the gateway counts in its own memory: right
    for a single gateway only."""

    url: Annotated[
        str,
        about(
            "`redis://[user:password@]host:port/0`, or `unix:///path` for a socket, "
            "`redis+sentinel://[user:password@]host:26379,host:26379/master/0` for the master that Sentinels name, "
            "`redis+cluster://[user:password@]host:port,host:port` for a cluster. `rediss` instead of `redis` is TLS.",
            URL,
        ),
    ] = ""
    url_file: Annotated[str, about("A file that holds the URL, instead of `url`.", SECRET_FILE)] = ""
    timeout: Annotated[
        float,
        about("How long a request waits for the store before `limits.on_store_failure` decides.", duration(0.001, 10)),
    ] = 0.25
    prefix: Annotated[str, about("What every key in the store begins with.", STORE_PREFIX)] = "gw:"


class Auth(Part, frozen=True, kw_only=True):
    """Whether clients need a key."""

    mode: Annotated[
        Literal["none", "optional", "required"],
        about(
            "`none`: keys are not checked. `optional`: a key that begins with `sk-gw-` is checked, any other value "
            "passes through. `required`: only known keys get in."
        ),
    ] = "optional"


class Admin(Part, frozen=True, kw_only=True):
    """Who may administer. With no token the admin side serves this machine only and asks for none."""

    token: Annotated[str, about("The admin token.", SECRET)] = ""
    token_file: Annotated[str, about("A file that holds the token, instead of `token`.", SECRET_FILE)] = ""


#: Which pods count, where nothing else is said.
POD_SELECTOR: Final = "model.aibrix.ai/name"


class PodTls(Part, frozen=True, kw_only=True):
    """TLS towards a pod. `tls: true` takes the defaults."""

    ca_file: Annotated[
        str, about("Authorities that may sign its certificate, PEM. Empty: the system's.", or_empty(FILE))
    ] = ""
    server_name: Annotated[
        str,
        about(
            "The name its certificate must have. Empty: the host in `address` or `dns`.",
            or_empty(HOST),
        ),
    ] = ""
    verify: Annotated[bool, about("Whether the certificate is checked at all.")] = True


class KubernetesDiscovery(Part, frozen=True, kw_only=True):
    """Pods that Kubernetes has. Needs the right to list and watch them and, by a kubeconfig, the extra
    `gateway-extproc[kubernetes]`."""

    namespaces: Annotated[
        tuple[str, ...], about("Where to look. Empty: in every namespace, which takes a ClusterRole.", NAMESPACE)
    ] = ()
    selector: Annotated[str, about("Labels of the pods, in the form that `kubectl -l` takes.", SOME)] = POD_SELECTOR
    pool: Annotated[
        str,
        about(
            "An InferencePool (`inference.networking.k8s.io/v1`), whose pods and ports count instead of `namespaces` "
            "and `selector`.",
            or_empty(NAMESPACED),
        ),
    ] = ""
    kubeconfig: Annotated[
        str,
        about(
            "How to reach the cluster. Empty: as the pod that the gateway is, or else by `KUBECONFIG` or "
            "`~/.kube/config`.",
            or_empty(FILE),
        ),
    ] = ""
    api_key: Annotated[str, about("The key that all these pods want. It replaces what the client sent.", SECRET)] = ""
    api_key_file: Annotated[str, about("A file that holds the key, instead of `api_key`.", SECRET_FILE)] = ""
    tls: Annotated[PodTls | None, about("Whether, and how, to speak TLS to all these pods.", switch=True)] = None


class ControllerConfig(Part, frozen=True, kw_only=True):
    """Routes for Envoy Gateway, written to Kubernetes by `gateway-extproc controller`."""

    gateway: Annotated[str, about("The Gateway that models are routed on.", NAMESPACED)]
    namespaces: Annotated[
        tuple[str, ...], about("Where the models' workloads are. Empty: in every namespace.", NAMESPACE)
    ] = ()
    serve: Annotated[
        bool, about("Whether `gateway-extproc serve` does the same besides. One of all processes does it at a time.")
    ] = False
    kubeconfig: Annotated[str, about("How to reach the cluster, as in `discovery.kubernetes`.", or_empty(FILE))] = ""


class Discovery(Part, frozen=True, kw_only=True):
    """How pods are found and watched."""

    poll: Annotated[float, about("Time between two looks at a pod.", duration(0.05, 60))] = 1.0
    timeout: Annotated[float, about("How long a pod may take to answer such a look.", duration(0.01, 60))] = 1.0
    dns_refresh: Annotated[float, about("Time between two look-ups of a name in `pods`.", duration(0.1, 3600))] = 1.0
    dns_servers: Annotated[tuple[str, ...], about("Name servers to ask. Empty: the system's.", address(ip=True))] = ()
    kubernetes: Annotated[
        KubernetesDiscovery | None,
        about("Pods that Kubernetes has, besides those in `pods`. `true`: with the defaults.", switch=True),
    ] = None


class Routing(Part, frozen=True, kw_only=True):
    """How a pod is chosen."""

    default: Annotated[str, about("The strategy of models and requests that name none.", STRATEGY)] = "least-request"
    expose: Annotated[bool, about("Whether answers carry `routing-strategy` and `target-pod`, the pod's name.")] = False
    strategies: Annotated[
        dict[str, str],
        about(
            "Strategies of your own, such as `{nearest: my_package.routing:Nearest}` "
            "([how to write one](routing.md#a-strategy-of-your-own)). Installed packages may bring further ones.",
            CLASS,
        ),
    ] = msgspec.field(default_factory=dict)
    picker: Annotated[
        Literal["auto", "always"],
        about(
            "Whether proxies take the gateway for the endpoint picker of an InferencePool. `auto`: those that send "
            "bodies `FULL_DUPLEX_STREAMED`, and have not their routes from the gateway. `always`: in other modes too, "
            "and those that do not say how they send bodies."
        ),
    ] = "auto"
    picked: Annotated[
        int,
        about(
            "How many endpoints such a proxy is told, first choice first, at most one more than the model's `retries`. "
            "More than one only where it reads a list: Envoy's `override_host` does, its `ORIGINAL_DST` does not.",
            whole(1, 11),
        ),
    ] = 1


class LimitsConfig(Part, frozen=True, kw_only=True):
    """Bounds on requests, and what holds for users without a record."""

    max_body_bytes: Annotated[int, about("Largest request body; larger ones get 413.", size(1 << 10, 1 << 30))] = (
        32 << 20
    )
    on_store_failure: Annotated[
        Literal["local", "refuse", "admit"],
        about(
            "While the store is away. `local`: each gateway enforces its share of the limits. `refuse`: requests that "
            "have a limit get 503. `admit`: all pass."
        ),
    ] = "local"
    reserve: Annotated[
        Literal["expected", "max"],
        about(
            "Tokens of output set aside when a request is admitted, until the answer tells. `expected`: what was "
            "learned. `max`: the maximum that the request declares."
        ),
    ] = "expected"
    unknown_price: Annotated[
        Literal["refuse", "free"],
        about(
            "What a budget in dollars makes of a model without a price. `refuse`: 403 `price_unknown`. `free`: its "
            "tokens cost nothing."
        ),
    ] = "refuse"
    default: Annotated[
        Limits | None, about("Limits of a named user without a record in `users`. Absent: no limits.")
    ] = None
    bodies_in_memory: Annotated[
        int, about("Request bodies held at once, all together. At least `max_body_bytes`.", size(1 << 20, 256 << 30))
    ] = 128 << 20


class PodConfig(Part, frozen=True, kw_only=True):
    """A model server, or all those behind a name. Each entry has exactly one of `address` and `dns`."""

    address: Annotated[
        str, about("The pod's address, such as `10.0.0.7:8000` or `[fd00::7]:8000`.", or_empty(address()))
    ] = ""
    dns: Annotated[str, about("A name, each of whose addresses is a pod.", or_empty(address(ip=False)))] = ""
    name: Annotated[
        str,
        about(
            "What logs, metrics and `target-pod` call it. Empty: `pod-1`, `pod-2`, …, or after the name in `dns`.",
            or_empty(NAME),
        ),
    ] = ""
    models: Annotated[
        tuple[str, ...] | None, about("The models it serves, for servers that do not tell. Absent: it is asked.", MODEL)
    ] = None
    api_key: Annotated[str, about("The key that the pod wants. It replaces what the client sent.", SECRET)] = ""
    api_key_file: Annotated[str, about("A file that holds the key, instead of `api_key`.", SECRET_FILE)] = ""
    tls: Annotated[PodTls | None, about("Whether, and how, to speak TLS to it.", switch=True)] = None
    path_prefix: Annotated[str, about("What its paths begin with: `/x` for `/x/v1/models`.", or_empty(PREFIX))] = ""
    metrics: Annotated[
        str,
        about(
            "Where it tells how busy it is, after `path_prefix`. `true`: at `/metrics`, or, as TensorRT-LLM, at "
            "`/prometheus/metrics`. `false`: it is not asked.",
            METRICS,
        ),
    ] = "true"


class ModelConfig(Part, frozen=True, kw_only=True):
    """Settings of one model, by its real name. Models without an entry have the defaults."""

    strategy: Annotated[
        str,
        about(
            "How its pods are chosen. Empty: `routing.default`.",
            or_empty(STRATEGY),
        ),
    ] = ""
    lock_strategy: Annotated[bool, about("Whether the `routing-strategy` header of its requests is ignored.")] = False
    aliases: Annotated[
        tuple[str, ...],
        about(
            "Other names that clients may ask for. They see the name that they sent; all settings go by the real one.",
            MODEL,
        ),
    ] = ()
    split: Annotated[
        dict[str, int],
        about(
            "Models that serve this name, each with a weight, such as `{llama-8b: 9, llama-8b-next: 1}`. A session, or "
            "else a user, stays with one of them.",
            whole(1, 1_000_000),
        ),
    ] = msgspec.field(default_factory=dict)
    fallback: Annotated[
        str, about("The model that serves while none of this one's pods is ready. Empty: none.", or_empty(MODEL))
    ] = ""
    timeout: Annotated[
        float, about("How long a pod may be silent: to the first byte, and between bytes.", duration(0.01, 86400))
    ] = 300.0
    first_byte_timeout: Annotated[
        float | None,
        about(
            "How long a stream may wait for a pod to begin its answer: then the next pod is asked. Absent: `timeout`, "
            "and no other pod. Answers that are not streamed always wait for `timeout`.",
            duration(0.01, 86400),
        ),
    ] = None
    retries: Annotated[int, about("Further pods tried when one fails before it answers.", whole(0, 10))] = 2
    saturation: Annotated[
        int | None,
        about(
            "Requests that a pod has at once, of each process of the gateway. While all pods have that many, further "
            "ones wait. Absent: no bound, and nobody waits.",
            whole(1, 1_000_000),
        ),
    ] = None
    queue_size: Annotated[int, about("Requests that wait at most; further ones get 503.", whole(0, 100_000))] = 1000
    queue_wait: Annotated[
        float,
        about(
            "How long a request waits at most before it gets 503. More than 10 s needs a longer "
            "`envoy.message_timeout`: where that is computed, Envoy's bootstrap must be made anew.",
            duration(0.01, 600),
        ),
    ] = 10.0
    limits: Annotated[Limits | None, about("Limits of all its requests together, whoever asks.")] = None


class PriceConfig(Part, frozen=True, kw_only=True):
    """What a model's tokens cost, in dollars per million."""

    input: Annotated[float, about("Tokens of the prompt.", DOLLARS)]
    output: Annotated[float, about("Tokens of the answer.", DOLLARS)]
    cached_input: Annotated[
        float | None, about("Tokens of the prompt that the pod had cached. Absent: as `input`.", DOLLARS)
    ] = None


class Usage(Part, frozen=True, kw_only=True):
    """Where the tokens that a request used are read, and how long sums of them are kept."""

    source: Annotated[
        Literal["body", "access_log"],
        about(
            "`body`: by the gateway, in the answers. `access_log`: by Envoy's filters, whose findings come with its "
            "access log: no message for each token of a stream. Envoy's bootstrap must be made anew."
        ),
    ] = "body"
    keep: Annotated[
        float, about("How long the sums of an hour are kept, for `/admin/usage`.", duration(3600, 366 * 86400))
    ] = 35 * 86400.0


class Logging(Part, frozen=True, kw_only=True):
    """What the gateway writes on stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], about("Less than this is left out.")] = "info"
    successes: Annotated[bool, about("Whether requests that went well get a line, too.")] = False


class Config(Part, frozen=True, kw_only=True):
    """All sections. Each may be left out."""

    listen: Annotated[Listen, about("Where the gateway listens.")] = Listen()
    envoy: Annotated[Envoy, about("What Envoy's bootstrap is written from.")] = Envoy()
    store: Annotated[StoreConfig, about("What counts limits.")] = StoreConfig()
    auth: Annotated[Auth, about("Whether clients need a key.")] = Auth()
    admin: Annotated[Admin, about("Who may administer.")] = Admin()
    discovery: Annotated[Discovery, about("How pods are found and watched.")] = Discovery()
    controller: Annotated[ControllerConfig | None, about("Routes for Envoy Gateway. Absent: none.")] = None
    routing: Annotated[Routing, about("How a pod is chosen.")] = Routing()
    limits: Annotated[LimitsConfig, about("Bounds on requests, and users without a record.")] = LimitsConfig()
    users: Annotated[tuple[User, ...], about("Who may use what, and how much.")] = ()
    teams: Annotated[tuple[Team, ...], about("Limits that several users share.")] = ()
    pods: Annotated[tuple[PodConfig, ...], about("The model servers.")] = ()
    models: Annotated[dict[str, ModelConfig], about("Settings of single models.")] = msgspec.field(default_factory=dict)
    prices: Annotated[
        dict[str, PriceConfig],
        about(
            "Prices by model: its name, or a pattern such as `llama-*`. The name comes first, then the longest "
            "pattern. Budgets in dollars need them."
        ),
    ] = msgspec.field(default_factory=dict)
    usage: Annotated[Usage, about("Where usage is read.")] = Usage()
    logging: Annotated[Logging, about("What is logged.")] = Logging()

    @property
    def longest_wait(self) -> float:
        """Seconds that a request waits at most for its turn at a pod; 0 where none does."""
        return max([model.queue_wait for model in self.models.values() if model.saturation is not None], default=0.0)
