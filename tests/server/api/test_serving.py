import socket

import pytest

from server.api.config import ServerConfig
from server.api.serving import listen
from server.errors import ConfigError


def test_port_0_takes_a_free_port() -> None:
    with listen(ServerConfig(port=0)) as taken:
        host, port = taken.getsockname()
    assert host == "127.0.0.1"
    assert port > 0


def test_a_taken_port_is_refused_with_the_address() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            listen(ServerConfig(port=port))


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose another --host or --port"):
        listen(ServerConfig(host="203.0.113.7", port=0))
