"""The attention backends by name.

A new one is a file with a factory and a line in the table. Entries are names and not imports: some
members lie in rooms above this one, and most are never needed. A backend outside of this tree needs
no entry: its factory itself is a name, like `my_package.attention:MyBackend`.
"""

import pkgutil
from collections.abc import Callable
from types import MappingProxyType

from server.attention.backend import AttentionBackend
from server.errors import ConfigError
from server.kv.kv_cache import KVCache

# Makes a backend for a cache; raises a `ConfigError` if it cannot attend there.
AttentionFactory = Callable[[KVCache], AttentionBackend]

ATTENTION_BACKENDS = MappingProxyType(
    {
        "sdpa": "server.attention.sdpa:SDPABackend",
        "cpu": "server.cpu.tree_attention:create",
    }
)


def create_attention(name: str, kv_cache: KVCache) -> AttentionBackend:
    """Make an attention backend.

    Args:
        name: A key of `ATTENTION_BACKENDS`, or a factory as `module:attribute`.
        kv_cache: What it reads and writes.

    Raises:
        ConfigError: If there is no such backend, or it cannot attend with this cache on this
            machine.
    """
    path = ATTENTION_BACKENDS.get(name, name)
    if ":" not in path:
        raise ConfigError(
            f"attention is {name!r}; give one of {sorted(ATTENTION_BACKENDS)} or a factory as "
            "'module:attribute'"
        )
    try:
        factory: AttentionFactory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"attention is {name!r}, which cannot be imported: {error}") from error
    return factory(kv_cache)
