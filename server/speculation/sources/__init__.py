"""The draft sources of this server: one file each, and the table that names them."""

from server.speculation.source import DraftSource, MakeSource, SourceContext
from server.speculation.sources.lookup import make_lookup
from server.speculation.sources.medusa import make_medusa
from server.speculation.sources.mtp import make_mtp

# In the order in which proposals are merged and usage names them.
SOURCES: dict[str, MakeSource] = {
    "medusa": make_medusa,
    "mtp": make_mtp,
    "lookup": make_lookup,
}


def make_sources(context: SourceContext) -> list[DraftSource]:
    """The sources that this server has."""
    made = (make(context) for make in SOURCES.values())
    return [source for source in made if source is not None]
