"""What happens to the state of an update rule when another rule goes on with it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from megatron_ext.optim.rules import Rule


class StateChange(NamedTuple):
    """A kind of state of one parameter that a resumed run does not go on with, or begins anew."""

    name: str
    """Of the parameter."""
    rule: str
    """That updates it now."""
    kind: str
    what: str
    """``dropped``: saved, but of no use to the rule; ``begins at zero``: kept by the rule, but not saved."""

    @classmethod
    def between(cls, name: str, rule: Rule, saved: Collection[str]) -> Iterator["StateChange"]:
        """Changes of one parameter whose saved state has the kinds ``saved``. A state that never took a step begins without change."""
        kept = rule.kept(saved)
        yield from (cls(name, rule.name, kind, "dropped") for kind in sorted(set(saved) - kept))
        fresh = {kind for together in rule.state for kind in together} - kept if saved else set()
        yield from (cls(name, rule.name, kind, "begins at zero") for kind in sorted(fresh))


def describe_changes(changes: Iterable[StateChange]) -> list[str]:
    """A line for each rule and set of kinds: what it does with saved state, and of how many parameters."""
    of_parameters: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for change in changes:
        of_parameters[change.name, change.rule, change.what].append(change.kind)
    counts = Counter((rule, what, ", ".join(kinds)) for (_, rule, what), kinds in of_parameters.items())
    return [f"{rule}: {kinds} of {count} parameters {what}" for (rule, what, kinds), count in counts.items()]
