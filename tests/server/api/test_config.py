import pytest

from server.api.config import ApiConfig, ServerConfig
from server.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"served_model_name": ""}, "served_model_name is empty"),
        ({"api_key": ""}, "api_key is empty"),
        ({"max_request_bytes": 0}, "max_request_bytes is 0"),
    ],
)
def test_wrong_application_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ApiConfig(**fields)  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": -1}, "port is -1"),
        ({"port": 65536}, "port is 65536"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"drain_s": -1.0}, r"drain_s is -1\.0"),
        ({"drain_s": float("nan")}, "drain_s is nan"),
    ],
)
def test_wrong_process_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**fields)  # type: ignore[arg-type]  # any field


def test_the_api_key_is_not_shown() -> None:
    assert "secret" not in repr(ApiConfig(api_key="secret"))
