"""The acceptance rules of this server: one file each, and the table that names them."""

from collections.abc import Mapping
from dataclasses import fields

from server.config import SamplingParams, SpeculationParams
from server.errors import ConfigError, InvalidRequestError
from server.sampling.acceptance.exact import ExactAcceptance
from server.sampling.acceptance.rule import AcceptanceRule, rule_parameters
from server.sampling.acceptance.typical import TypicalAcceptance

RULES: dict[str, AcceptanceRule] = {
    "exact": ExactAcceptance(),
    "typical": TypicalAcceptance(),
}
# What `auto` takes where nothing asks for the target's own distribution.
_DEFAULT_RULE = "typical"


def choose_rule(
    sampling: SamplingParams, speculation: SpeculationParams, server_default: str
) -> str:
    """Decide by which rule a request's drafts are verified.

    Greedy is always exact. A rule that the request names comes next. Otherwise a seed or
    log-probabilities, which both speak of the target's own distribution, make it exact, and what
    is left follows the server, whose `auto` is typical.
    """
    if sampling.is_greedy:
        return "exact"
    if speculation.acceptance != "auto":
        return speculation.acceptance
    if sampling.seed is not None or sampling.logprobs is not None:
        return "exact"
    return _DEFAULT_RULE if server_default == "auto" else server_default


def check_acceptance(name: str, options: Mapping[str, float]) -> None:
    """Check what a request says of acceptance.

    Raises:
        InvalidRequestError: If there is no such rule, or an option is wrong.
    """
    if name not in ("auto", *RULES):
        raise InvalidRequestError(
            f"speculation.acceptance is {name!r}; give one of {('auto', *RULES)}",
            "speculation.acceptance",
        )
    known = acceptance_options()
    for option in options:
        if option not in known:
            raise InvalidRequestError(
                f"speculation.{option} is no option of an acceptance rule; give one of {known}",
                f"speculation.{option}",
            )
    for rule in RULES.values():
        rule_parameters(rule, options)


def check_default(name: str) -> None:
    """Check the rule that a server is to take for requests without one.

    Raises:
        ConfigError: If there is no such rule.
    """
    if name not in ("auto", *RULES):
        raise ConfigError(f"acceptance is {name!r}; give one of {('auto', *RULES)}")


def acceptance_options() -> tuple[str, ...]:
    """Names of all rules' parameters."""
    names = (field.name for rule in RULES.values() for field in fields(rule.parameters))
    return tuple(dict.fromkeys(names))
