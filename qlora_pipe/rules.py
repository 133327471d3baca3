"""Which configurations are left to each matrix by the user's rules, and which matrices decide together.

Works on names and configurations alone, so that a plan, an allocation, its re-check and the frontier all ask here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from qlora_pipe.architectures import linear_name, place_of
from qlora_pipe.config_rules import BitsRule, Rule, Selector, Tie
from qlora_pipe.errors import ConfigError
from quant.storage import Choice

Offered = Mapping[str, Sequence[Choice]]
Groups = tuple[tuple[str, ...], ...]

_NAMED = 4
"""Members of a group, or kinds of them, that a message names."""


@dataclass(frozen=True)
class Narrowed:
    """What is left to each matrix.

    Attributes:
        choices: by module name, in the order offered; the same for all members of a group.
        ties: disjoint groups of two or more names, in the order of the model.
        matched: the names that each rule is for.
    """

    choices: dict[str, tuple[Choice, ...]]
    ties: Groups
    matched: Groups


def narrow(offered: Offered, rules: Sequence[Rule], ties: Sequence[Tie]) -> Narrowed:
    """Apply the user's rules, then the user's ties, to what every matrix (in the order of the model) is offered.

    Raises ConfigError, naming rule or tie and matrix, where one is for no matrix or leaves one without a choice.
    """
    return restrict(offered, rules, tie_groups(tuple(offered), ties))


def restrict(offered: Offered, rules: Sequence[Rule], groups: Groups) -> Narrowed:
    """The same from groups as `tie_groups` returns them."""
    choices = {name: tuple(given) for name, given in offered.items()}
    matched = tuple(_matching(tuple(offered), rule, _called(number, rule)) for number, rule in enumerate(rules))
    for number, (rule, names) in enumerate(zip(rules, matched, strict=True)):
        for name in names:
            left = tuple(choice for choice in choices[name] if allows(rule, choice))
            if not left:
                earlier = ", ".join(
                    f"decompose.rules.{other}" for other, taken in enumerate(matched[:number]) if name in taken
                )
                since = f" after {earlier}" if earlier else ""
                raise ConfigError(
                    f"{_called(number, rule)} leaves {name} without a configuration: it may take "
                    f"{_told(choices[name])}{since}; relax the rule, or offer what it asks for"
                )
            choices[name] = left
    for group in groups:
        choices |= _common(choices, group, matched)
    return Narrowed(choices, groups, matched)


def allows(rule: Rule, choice: Choice) -> bool:
    """Whether a matrix that `rule` is for may take `choice`."""
    if not (rule.min_bits or 0) <= choice.bits <= (rule.max_bits or choice.bits):
        return False
    exact = ((rule.bits, choice.bits), (rule.block_size, choice.block_size), (rule.rank, choice.rank))
    return all(wanted is None or wanted == found for wanted, found in exact)


def tie_groups(names: Sequence[str], ties: Sequence[Tie]) -> Groups:
    """Disjoint groups of two or more of `names` that take the same configuration; ties that share a matrix merge.

    Raises ConfigError for a pattern that matches nothing.
    """
    team = {name: [name] for name in names}
    for number, tie in enumerate(ties):
        for members in _members(names, tie, number):
            merged = list(dict.fromkeys(name for member in members for name in team[member]))
            team.update(dict.fromkeys(merged, merged))
    order = {name: position for position, name in enumerate(names)}
    found = {id(members): members for members in team.values() if len(members) > 1}
    return tuple(tuple(sorted(members, key=order.__getitem__)) for members in found.values())


def _members(names: Sequence[str], tie: Tie, number: int) -> Iterator[list[str]]:
    if isinstance(tie, str):
        found = [name for name in names if fnmatchcase(name, tie)]
        if not found:
            raise ConfigError(
                f"decompose.ties.{number}: no matrix is called {tie!r}; names are such as {names[0]}, and * stands for "
                "anything"
            )
        yield found
        return
    for layer in sorted({place_of(name)[0] for name in names}):
        yield [linear_name(layer, role) for role in tie]


def bits_of(names: Sequence[str], bits: int, rules: Sequence[BitsRule]) -> dict[str, int]:
    """Code width of every matrix of the integer model: that of the last rule that is for it, else `bits`.

    Raises ConfigError, naming the rule, where one is for no matrix.
    """
    found = dict.fromkeys(names, bits)
    for number, rule in enumerate(rules):
        found |= dict.fromkeys(_matching(names, rule, f"compact.rules.{number} {rule}"), rule.bits)
    return found


def _matching(names: Sequence[str], rule: Selector, called: str) -> tuple[str, ...]:
    """The matrices a rule is for; raises ConfigError if there are none, or a layer does not exist."""
    places = {name: place_of(name) for name in names}
    count = 1 + max(layer for layer, _ in places.values())
    for layer in rule.layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"{called}: there is no layer {layer}, the model has {count}; correct its layers")
    layers = None if rule.layers is None else {layer % count for layer in rule.layers}
    found = tuple(
        name
        for name, (layer, role) in places.items()
        if (layers is None or layer in layers)
        and (rule.roles is None or role in rule.roles)
        and (rule.name is None or fnmatchcase(name, rule.name))
    )
    if not found:
        raise ConfigError(
            f"{called} is for no matrix: none of the names, such as {names[0]}, fits its layers, roles and name "
            "together; correct or remove it"
        )
    return found


def _common(choices: Offered, group: Sequence[str], matched: Groups) -> dict[str, tuple[Choice, ...]]:
    """Tied matrices may take only what all of them can; raises ConfigError if that is nothing."""
    kinds: dict[tuple[Choice, ...], str] = {}
    for name in group:
        kinds.setdefault(tuple(choices[name]), name)
    first, *others = kinds
    shared = set(first).intersection(*others)
    left = tuple(choice for choice in first if choice in shared)
    if left:
        return dict.fromkeys(group, left)
    reasons = []
    for kind, name in list(kinds.items())[:_NAMED]:
        applied = [f"decompose.rules.{number}" for number, names in enumerate(matched) if name in names]
        because = f" ({', '.join(applied)})" if applied else ""
        reasons.append(f"{name} may take {_told(kind)}{because}")
    raise ConfigError(
        f"decompose.ties: {_some(group)} are tied but have no configuration in common: {'; '.join(reasons)}. Offer "
        "more block_sizes or ranks, change the rules, or untie them"
    )


def _called(number: int, rule: Rule) -> str:
    return f"decompose.rules.{number} {rule}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _told(choices: Sequence[Choice]) -> str:
    """`bits 2/3, block_size 32, rank 0/16`, and what else differs between `choices`."""
    rows = [asdict(choice) for choice in choices]
    values = {key: dict.fromkeys(str(row[key]) for row in rows) for key in rows[0]}
    told = [key for key, found in values.items() if key in ("bits", "block_size", "rank") or len(found) > 1]
    return ", ".join(f"{key} {'/'.join(values[key])}" for key in told)
