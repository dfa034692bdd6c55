"""Addresses: one canonical form, and what is none."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.address import is_ip, is_loopback, join_address, split_address

#: Whatever looks like an address.
LIKE_ADDRESSES = st.text() | st.text(alphabet="abfz019.:[]%-_A ") | st.text(alphabet="0123456789.:").map("{}:80".format)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.7:8000", "10.0.0.7", 8000),
        ("[FD00:0::0007]:0", "fd00::7", 0),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("Pod-1.example.COM:65535", "pod-1.example.com", 65535),
        ("my_pod:1", "my_pod", 1),
    ],
)
def test_an_address_has_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.7", "expected host:port"),
        (":80", "expected host:port"),
        ("a:65536", "expected a port from 0 to 65535"),
        ("a:08", "expected a port from 0 to 65535"),
        ("a:٣", "expected a port from 0 to 65535"),
        ("[::1:80", "expected an IPv6 address between the brackets"),
        ("[10.0.0.7]:80", "expected an IPv6 address between the brackets"),
        ("::1:80", "expected host:port (an IPv6 address stands in brackets, as in [::1]:8000)"),
        ("256.0.0.1:80", "expected host:port, with an IP address or a host name"),
        ("a..b:80", "expected host:port, with an IP address or a host name"),
        ("-a:80", "expected host:port, with an IP address or a host name"),
        (f"{'a' * 64}:80", "expected host:port, with an IP address or a host name"),
        (f"{'a.' * 127}:80", "expected host:port, with an IP address or a host name"),
    ],
)
def test_what_is_no_address_says_what_was_expected(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        split_address(text)


@given(LIKE_ADDRESSES)
def test_any_text_is_an_address_that_keeps_its_form_or_none(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert split_address(join_address(host, port)) == (host, port)
    assert is_loopback(host) <= (is_ip(host) or host == "localhost")


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_and_port_come_back_as_they_went(ip: ipaddress.IPv4Address, port: int) -> None:
    assert split_address(join_address(str(ip), port)) == (str(ip), port)
    assert is_ip(str(ip))
    assert is_loopback(str(ip)) is ip.is_loopback


@pytest.mark.parametrize("host", ["localhost", "a", "fade.cafe", "pod-1.example.com", "1.a", "10.0.0.7.example"])
def test_a_name_is_no_ip_address_whatever_its_letters(host: str) -> None:
    assert not is_ip(host)
