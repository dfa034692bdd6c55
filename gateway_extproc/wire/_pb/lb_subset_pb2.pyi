# mypy: disable-error-code="type-arg"
from gateway_extproc.wire._pb import cluster_pb2 as _cluster_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Subset(_message.Message):
    __slots__ = ("fallback_policy", "subset_selectors", "subset_lb_policy")
    class LbSubsetFallbackPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NO_FALLBACK: _ClassVar[Subset.LbSubsetFallbackPolicy]
        ANY_ENDPOINT: _ClassVar[Subset.LbSubsetFallbackPolicy]
        DEFAULT_SUBSET: _ClassVar[Subset.LbSubsetFallbackPolicy]
    NO_FALLBACK: Subset.LbSubsetFallbackPolicy
    ANY_ENDPOINT: Subset.LbSubsetFallbackPolicy
    DEFAULT_SUBSET: Subset.LbSubsetFallbackPolicy
    class LbSubsetSelector(_message.Message):
        __slots__ = ("keys", "fallback_policy")
        class LbSubsetSelectorFallbackPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            NOT_DEFINED: _ClassVar[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy]
            NO_FALLBACK: _ClassVar[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy]
            ANY_ENDPOINT: _ClassVar[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy]
            DEFAULT_SUBSET: _ClassVar[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy]
            KEYS_SUBSET: _ClassVar[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy]
        NOT_DEFINED: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        NO_FALLBACK: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        ANY_ENDPOINT: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        DEFAULT_SUBSET: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        KEYS_SUBSET: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        KEYS_FIELD_NUMBER: _ClassVar[int]
        FALLBACK_POLICY_FIELD_NUMBER: _ClassVar[int]
        keys: _containers.RepeatedScalarFieldContainer[str]
        fallback_policy: Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy
        def __init__(self, keys: _Optional[_Iterable[str]] = ..., fallback_policy: _Optional[_Union[Subset.LbSubsetSelector.LbSubsetSelectorFallbackPolicy, str]] = ...) -> None: ...
    FALLBACK_POLICY_FIELD_NUMBER: _ClassVar[int]
    SUBSET_SELECTORS_FIELD_NUMBER: _ClassVar[int]
    SUBSET_LB_POLICY_FIELD_NUMBER: _ClassVar[int]
    fallback_policy: Subset.LbSubsetFallbackPolicy
    subset_selectors: _containers.RepeatedCompositeFieldContainer[Subset.LbSubsetSelector]
    subset_lb_policy: _cluster_pb2.LoadBalancingPolicy
    def __init__(self, fallback_policy: _Optional[_Union[Subset.LbSubsetFallbackPolicy, str]] = ..., subset_selectors: _Optional[_Iterable[_Union[Subset.LbSubsetSelector, _Mapping]]] = ..., subset_lb_policy: _Optional[_Union[_cluster_pb2.LoadBalancingPolicy, _Mapping]] = ...) -> None: ...
