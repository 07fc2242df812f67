"""Declares the options of a command: which dataclasses they come from, and what each of them is."""

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

from server.cli.values import POSITIONAL, REPEATED, has_marker


@dataclass(frozen=True, slots=True)
class Settings:
    """A dataclass whose fields are options of a command.

    Attributes:
        kind: The dataclass; it checks its values on construction.
        only: Fields that are options; None makes options of all.
        without: Fields that are no options and keep their default.
        defaults: Values by field that stand in for the dataclass's defaults, also for fields that
            are no options.
    """

    kind: type
    only: Collection[str] | None = None
    without: Collection[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, "Option"]:
        """The options, by field."""
        hints = get_type_hints(self.kind, include_extras=True)
        documented = _documented(self.kind)
        names = set(hints if self.only is None else self.only) - set(self.without)
        found: dict[str, Option] = {}
        for item in fields(self.kind):
            if item.name in names:
                if item.name not in documented:
                    raise ValueError(f"{self.kind.__name__} documents no attribute {item.name}")
                default = self.defaults.get(item.name, _default(item))
                help_text = documented[item.name]
                found[item.name] = Option(item.name, hints[item.name], default, help_text)
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """An option whose value chooses the dataclass that has the further options.

    Options that only other dataclasses have are errors on the command line and in a file; in the
    environment they are ignored. A field that several dataclasses have is one option.

    Attributes:
        option: Name of the option, written like a field's.
        help: What the option chooses.
        kinds: Dataclass by value of the option.
        default: Value if the option is not given; None makes it a required option.
    """

    option: str
    help: str
    kinds: Mapping[str, type]
    default: str | None = None

    def chooser(self) -> "Option":
        """The option that chooses."""
        hint: Any = Literal[tuple(self.kinds)]
        default = MISSING if self.default is None else self.default
        return Option(self.option, hint, default, self.help)

    def options(self, chosen: str) -> dict[str, "Option"]:
        """The further options for a value of the option, by field."""
        return Settings(self.kinds[chosen]).options()

    def owners(self) -> dict[str, tuple[str, ...]]:
        """Values of the option for which there is each of the further options."""
        owners: dict[str, tuple[str, ...]] = {}
        for chosen in self.kinds:
            for name in self.options(chosen):
                owners[name] = (*owners.get(name, ()), chosen)
        return owners

    def shared(self, name: str, owners: tuple[str, ...]) -> "Option":
        """One of the further options; if its owners have different defaults, its help says which.

        Such an option has the default None.
        """
        options = {chosen: self.options(chosen)[name] for chosen in owners}
        first = options[owners[0]]
        if all(option.default == first.default for option in options.values()):
            return first
        defaults = ", ".join(
            f"{option.default} with {chosen}"
            for chosen, option in options.items()
            if option.default is not None
        )
        return replace(first, default=None, help=f"{first.help} [default: {defaults}]")


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command.

    Attributes:
        name: As it is typed.
        summary: One line of help.
        run: Called with one keyword argument for each member of `settings`.
        settings: Where options come from, by the name of the argument that gets the dataclass.
        environment: What names of environment variables begin with, without the underscore that
            follows; None reads none.
    """

    name: str
    summary: str
    run: Callable[..., Any]
    settings: Mapping[str, Settings | Choice] = field(default_factory=dict)
    environment: str | None = None

    def groups(self) -> list[tuple[str, list["Option"]]]:
        """All options once, with the titles that help shows them under."""
        groups: list[tuple[str, list[Option]]] = []
        for member in self.settings.values():
            if isinstance(member, Settings):
                title = (member.kind.__doc__ or "").partition("\n")[0].rstrip(".")
                groups.append((title, [*member.options().values()]))
                continue
            chooser, owners = member.chooser(), member.owners()
            groups.append((member.help.rstrip("."), [chooser]))
            for shared in dict.fromkeys(owners.values()):
                own = [member.shared(name, shared) for name in owners if owners[name] == shared]
                groups.append((f"With {chooser.flag} {' or '.join(shared)}", own))
        return groups

    def options(self) -> dict[str, "Option"]:
        """All options, by name."""
        return {option.name: option for _, options in self.groups() for option in options}


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: The field's.
        hint: Type of the value, with its markers.
        default: MISSING if the option is required.
        help: What it means.
    """

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def key(self) -> str:
        """Name in a TOML file."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        """Name on the command line; of a positional argument that in the help."""
        return self.name.upper() if self.is_positional else f"--{self.key}"

    @property
    def is_positional(self) -> bool:
        """Whether the command line has the value without a name."""
        return has_marker(self.hint, POSITIONAL)

    @property
    def is_repeated(self) -> bool:
        """Whether the command line may have the option several times."""
        return has_marker(self.hint, REPEATED)

    def variable(self, prefix: str | None) -> str | None:
        """Name of the environment variable, if the command reads any."""
        return None if prefix is None or self.is_positional else f"{prefix}_{self.name.upper()}"


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _documented(kind: type) -> dict[str, str]:
    """Help by field, from the docstrings of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        text = inspect.cleandoc(each.__doc__ or "") + "\n"
        section = re.search(r"^Attributes:\n((?:(?: +\S.*)?\n)+)", text, re.MULTILINE)
        if section is not None:
            parts = re.split(r"^(\w+): ", textwrap.dedent(section[1]), flags=re.MULTILINE)
            texts = (" ".join(part.replace("`", "").split()) for part in parts[2::2])
            found |= zip(parts[1::2], texts, strict=True)
    return found
