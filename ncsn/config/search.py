"""The rungs and the space of a search, and variants of a config."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from ncsn.config.choices import ChoiceDomain, Domain, RangeDomain
from ncsn.config.problems import leaves, set_value
from ncsn.config.rules import checked
from ncsn.config.schema import Config
from ncsn.errors import ConfigError, Problem

EPSILON = "sampling.sampler.epsilon"
_SEARCHED = ("noise.", "network.", "loss.", "optimizer.", "train.", "sampling.sampler.", "sampling.guidance.")
_AND = ("data.dequantize", "data.horizontal_flip", "data.augmentation.")
# Not searched: where results and networks are, and what sets the length of training and sampling, equal for all trials.
_BUT = (
    "noise.num_levels",
    "train.num_images",
    "train.init_from",
    "train.continue_from",
    "train.checkpoint_every_images",
    "train.report_every_images",
    "train.keep_checkpoints",
    "sampling.guidance.checkpoint",
    "sampling.sampler.steps_per_level",
    "sampling.sampler.num_steps",
    "sampling.sampler.num_levels",
)
_SPREAD = 3.0  # the default space is from a third to three times a value
_EPSILON_FACTORS = (0.5, 1.0, 2.0)
_MOST_CORNERS = 128
_EXACT = 2**53  # from here on not every integer is a float


def searched_space(config: Config) -> dict[str, Domain]:
    """Dotted path -> domain of the search, by default that of the noise levels."""
    assert config.search is not None
    if config.search.space is not None:
        return config.search.space
    noise = {"noise.sigma_1": config.levels.sigma_1, "noise.sigma_L": config.levels.sigma_L}
    return {
        path: RangeDomain(kind="log", low=significant(value / _SPREAD), high=significant(value * _SPREAD))
        for path, value in noise.items()
    }


def rungs(config: Config) -> list[int]:
    """Training images at which trials are judged, ascending; the last is `train.num_images`."""
    assert config.search is not None
    return sorted({max(1, config.train.num_images // config.search.reduction_factor**power) for power in range(3)})


def setting(config: Config, path: str) -> Any:
    """The value at a dotted path; KeyError if there is none."""
    node: Any = config.model_dump(mode="json")
    for key in path.split("."):
        node = node[key]
    return node


def variant(config: Config, values: Mapping[str, Any]) -> Config:
    """The config without its search and with other values at some dotted paths; `ConfigError` if it is not valid.

    A sampler's epsilon keeps its ratio to sigma_L ** 2, its natural unit.
    """
    tree = config.model_dump(mode="json")
    tree["search"] = None
    for path, value in values.items():
        set_value(tree, path, value)
    sigma_L = tree["noise"]["sigma_L"]
    epsilon = tree["sampling"]["sampler"].get("epsilon")
    if epsilon is not None and EPSILON not in values and sigma_L != config.noise.sigma_L:
        ratio = sigma_L / config.noise.sigma_L
        # Not a power, which raises OverflowError; an infinite epsilon is refused like any other.
        tree["sampling"]["sampler"]["epsilon"] = significant(epsilon * ratio * ratio)
    return checked(tree)


def swept(config: Config, variant_: Config, *, with_own: bool) -> list[Config]:
    """A variant of the config with each epsilon of the search, ascending; `with_own` adds the variant's own."""
    search, own = config.search, getattr(variant_.sampling.sampler, "epsilon", None)
    assert search is not None
    if own is None:
        return [variant_]
    if search.epsilons is None:
        chosen = {significant(own * factor) for factor in _EPSILON_FACTORS} - {significant(own)} | {own}
    else:
        unit = variant_.levels.sigma_L**2
        chosen = {significant(ratio * unit) for ratio in search.epsilons} | ({own} if with_own else set())
    return [variant(variant_, {EPSILON: epsilon}) for epsilon in sorted(chosen)]


def significant(value: float, digits: int = 6) -> float:
    """The value rounded to significant digits, to be readable in a config."""
    return float(f"{value:.{digits}g}")


def space_problems(config: Config) -> list[Problem]:
    """What is wrong with the search space: paths, values, and combinations of values.

    With `noise: auto` the space is checked only when training has chosen the levels.
    """
    search = config.search
    if search is None or config.noise.kind == "auto":
        return []
    space, kind = searched_space(config), config.sampling.sampler.kind
    found = [problem for path in space for problem in _path_problems(config, path)]
    if search.epsilons is not None and not hasattr(config.sampling.sampler, "epsilon"):
        reason = f"sampling.sampler.kind = {kind} has no epsilon"
        found.append(Problem("search.epsilons", reason, "remove this setting"))
    if found:
        return found
    # The ends of every range and all choices: in combination, and if there are too many of these, alone first.
    ends: dict[str, Sequence[Any]] = {
        path: domain.values
        if isinstance(domain, ChoiceDomain)
        else [int(end) if end.is_integer() and end < _EXACT else end for end in (domain.low, domain.high)]
        for path, domain in space.items()
    }
    corners = [dict(zip(ends, values, strict=True)) for values in islice(product(*ends.values()), _MOST_CORNERS)]
    if math.prod(map(len, ends.values())) > _MOST_CORNERS:
        corners = [{path: value} for path, values in ends.items() for value in values] + corners
    for values in corners:
        try:
            variant(config, values)
        except ConfigError as error:
            shown = ", ".join(f"{path} = {value}" for path, value in values.items())
            why = "; ".join(map(str, error.problems))
            return [Problem("search.space", f"contains {shown}, which is not a valid config: {why}")]
    return []


def _path_problems(config: Config, path: str) -> Iterator[Problem]:
    searchable = [
        path
        for path, _ in leaves(config)
        if path.startswith((*_SEARCHED, *_AND)) and path not in (*_BUT, EPSILON) and not path.endswith(".kind")
    ]
    key, choices = f"search.space.{path}", f"search any of {', '.join(searchable)}"
    try:
        value = setting(config, path)
    except (KeyError, TypeError):
        close = difflib.get_close_matches(path, searchable, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield Problem(key, "no such setting", f"{hint}{choices}")
        return
    if path == EPSILON:
        reason = "needs no training, so each checkpoint is sampled with several values"
        yield Problem(key, reason, "use search.epsilons instead")
    elif path not in searchable or isinstance(value, dict):
        yield Problem(key, "cannot be searched", choices)
