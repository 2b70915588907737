"""The settings, rungs and variants of a search, and what is wrong with its space."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from ncsn.config.choices import ChoiceDomain, Domain, LogDomain
from ncsn.config.problems import leaves, set_value
from ncsn.config.rules import checked
from ncsn.config.schema import Config
from ncsn.errors import ConfigError, Problem, UserError

EPSILON = "sampling.sampler.epsilon"
GUIDANCE = "sampling.guidance.weight"
_SEARCHED = ("noise.", "network.", "loss.", "optimizer.", "train.", "sampling.sampler.", "sampling.guidance.")
_AND = ("data.dequantize", "data.horizontal_flip", "data.augmentation.")
# Not searched: where results are kept, and what sets the length of training and sampling, equal for all trials.
_BUT = (
    "train.num_images",
    "train.checkpoint_every_images",
    "train.report_every_images",
    "train.keep_checkpoints",
    "train.keep_every_images",
    "train.ema.keep_every_images",
    "sampling.sampler.steps_per_level",
    "sampling.sampler.num_steps",
    "sampling.sampler.num_levels",
)
_SPREAD = 3.0  # the default space is from a third to three times a value
_EPSILON_FACTORS = (0.5, 1.0, 2.0)
_MOST_CORNERS = 128


def require_search(config: Config) -> None:
    """Refuse a config without a search."""
    if config.search is None:
        hint = "add this section, or pass --set search.num_trials=16 for a search with defaults"
        raise UserError("search", "missing", hint=hint)


def searched_space(config: Config) -> dict[str, Domain]:
    """Dotted path -> domain of the search, by default that of the noise levels."""
    assert config.search is not None
    if config.search.space is not None:
        return config.search.space
    noise = {"noise.sigma_1": config.levels.sigma_1, "noise.sigma_L": config.levels.sigma_L}
    return {
        path: LogDomain(kind="log", low=significant(value / _SPREAD), high=significant(value * _SPREAD))
        for path, value in noise.items()
    }


def rungs(config: Config) -> list[int]:
    """Training images at which trials are judged, ascending; the last is `train.num_images`."""
    search, last = config.search, config.train.num_images
    assert search is not None
    rung = search.first_rung_images or max(1, last // search.reduction_factor**2)
    found = []
    while rung < last:
        found.append(rung)
        rung *= search.reduction_factor
    return [*found, last]


def untrained_share(config: Config) -> float:
    """Share in [0, 1] of the initial weights in their moving average at the first rung."""
    return config.train.averaging.untrained_share(rungs(config)[0], batch_size=config.train.batch_size)


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
        tree["sampling"]["sampler"]["epsilon"] = significant(epsilon * (sigma_L / config.noise.sigma_L) ** 2)
    return checked(tree)


def swept(config: Config, variant_: Config, *, with_own: bool) -> list[Config]:
    """A variant of the config with each epsilon and weight of guidance of the search, ascending.

    `with_own` adds the variant's own epsilon and weight.
    """
    search, own = config.search, getattr(variant_.sampling.sampler, "epsilon", None)
    assert search is not None
    choices: dict[str, set[float]] = {}
    if own is not None and search.epsilons is None:
        choices[EPSILON] = {significant(own * factor) for factor in _EPSILON_FACTORS} - {significant(own)} | {own}
    elif own is not None and search.epsilons is not None:
        unit = variant_.levels.sigma_L**2
        choices[EPSILON] = {significant(ratio * unit) for ratio in search.epsilons} | ({own} if with_own else set())
    if search.guidance_weights is not None and (guidance := variant_.sampling.guidance) is not None:
        choices[GUIDANCE] = {*search.guidance_weights} | ({guidance.weight} if with_own else set())
    points = product(*(sorted(values) for values in choices.values()))
    return [variant(variant_, dict(zip(choices, point, strict=True))) if choices else variant_ for point in points]


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
    space = searched_space(config)
    found = [problem for path in space for problem in _path_problems(config, path)]
    if search.epsilons is not None and not hasattr(config.sampling.sampler, "epsilon"):
        kind = config.sampling.sampler.kind
        found.append(
            Problem("search.epsilons", f"sampling.sampler.kind = {kind} has no epsilon", "remove this setting")
        )
    if search.guidance_weights is not None and config.sampling.guidance is None:
        hint = "set it, such as to {kind: classifier_free}, or remove this setting"
        found.append(Problem("search.guidance_weights", "sampling.guidance is not set", hint))
    if search.guidance_weights is not None and GUIDANCE in space:
        found.append(Problem(f"search.space.{GUIDANCE}", "searched by search.guidance_weights too", "remove one"))
    if found:
        return found
    for values in _corners(space):
        try:
            variant(config, values)
        except ConfigError as error:
            shown = ", ".join(f"{path} = {value}" for path, value in values.items())
            why = "; ".join(map(str, error.problems))
            return [Problem("search.space", f"contains {shown}, which is not a valid config: {why}")]
    return []


def _path_problems(config: Config, path: str) -> Iterator[Problem]:
    key, choices = f"search.space.{path}", f"search any of {', '.join(_searchable(config))}"
    try:
        value = setting(config, path)
    except (KeyError, TypeError):
        close = difflib.get_close_matches(path, _searchable(config), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        yield Problem(key, "no such setting", f"{hint}{choices}")
        return
    if path == EPSILON:
        yield Problem(
            key, "needs no training, so each checkpoint is sampled with several values", "use search.epsilons instead"
        )
    elif path not in _searchable(config) or isinstance(value, dict):
        yield Problem(key, "cannot be searched", choices)


def _searchable(config: Config) -> list[str]:
    return [
        path
        for path, _ in leaves(config.model_dump(mode="json"))
        if path.startswith((*_SEARCHED, *_AND)) and path not in (*_BUT, EPSILON) and not path.endswith(".kind")
    ]


def _corners(space: Mapping[str, Domain]) -> Iterator[dict[str, Any]]:
    # The ends of every range and all choices: in combination, and if there are too many of these, alone first.
    ends = {path: _ends(domain) for path, domain in space.items()}
    if math.prod(map(len, ends.values())) > _MOST_CORNERS:
        yield from ({path: value} for path, values in ends.items() for value in values)
    for values in islice(product(*ends.values()), _MOST_CORNERS):
        yield dict(zip(ends, values, strict=True))


def _ends(domain: Domain) -> Sequence[Any]:
    if isinstance(domain, ChoiceDomain):
        return domain.values
    return [int(end) if end.is_integer() else end for end in (domain.low, domain.high)]
