"""Versions of a registered model: their addresses, and which one is champion, by the gate or by hand.

MLflow cannot move an alias on condition that it still points where one has looked. So the tags of the versions are the
record, and the alias follows them. A promotion writes into the tag `promotion` the number after the highest that it has
seen, and then looks again. The champion is the version with the highest number that is not rolled back. Of two versions
with the same number, which did not see each other, the gate compares the later one with the champion: it follows, or
its tag goes. The next process that looks does that, so nothing is lost if one is killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ncsn.clock import utc_now
from ncsn.config.schema import SCHEME
from ncsn.errors import UserError, without_users
from ncsn.events import tell
from ncsn.runs.layout import INDEX
from ncsn.tracking.client import TrackingError, one_line
from ncsn.tracking.gate import Decision, Evidence, decide

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTION, PROMOTED_FROM, PROMOTED_BY = "promotion", "promoted_from", "promoted_by"
ROLLED_BACK = "rolled_back_at"
DECISION = "gate.decision"


@dataclass(frozen=True)
class Promotions:
    """The versions of a model as their tags record them."""

    tags: Mapping[str, Mapping[str, str]]  # of each version

    @property
    def champions(self) -> list[str]:
        """Present and earlier champions that are not rolled back, the present one last."""
        stand = [version for version, tags in self.tags.items() if self.number(version) and ROLLED_BACK not in tags]
        return sorted(stand, key=lambda version: (self.number(version), int(version)))

    @property
    def champion(self) -> str:
        """The champion; empty if there is none."""
        return self.champions[-1] if self.champions else ""

    def number(self, version: str) -> int:
        """The number of a version's promotion; 0 if it has none, or tags that somebody else wrote."""
        tags = self.tags[version]
        whole = {PROMOTED_FROM, PROMOTED_BY} <= tags.keys() and self.decision(version)
        return whole_number(tags.get(PROMOTION, "")) if whole else 0

    def decision(self, version: str) -> Decision | None:
        """The gate's last decision about a version."""
        written = self.tags[version].get(DECISION) if version else None
        return Decision.from_json(written) if written else None

    def decide(self, evidence: Evidence, version: str, champion: str) -> Decision:
        """The gate's decision about a version with this evidence."""
        known = self.decision(champion)
        return decide(evidence, version=version, champion=champion, of_champion=known.evidence if known else None)


def whole_number(tag: str) -> int:
    """The number in a tag, which anyone may have written; 0 for another text."""
    return int(tag) if re.fullmatch("[0-9]{1,18}", tag) else 0


def resolve_promotions(client: MlflowClient, name: str) -> Promotions:
    """Decide between promotions that did not see each other, and let the alias point to the champion."""
    while True:
        found = client.search_model_versions(f"name = '{name}'")
        promotions = Promotions({str(version.version): version.tags for version in found})
        champions, number = promotions.champions, promotions.number
        if pair := next((pair for pair in pairwise(champions) if number(pair[0]) == number(pair[1])), None):
            followed = {promotions.tags[version][PROMOTED_FROM] for version in champions}
            # The one that did not see the other, and the champion that it is to be compared with.
            late, other = pair if pair[1] in followed else reversed(pair)
            champion = other if champions[-1] in pair else champions[-1]
            by, decision = promotions.tags[late][PROMOTED_BY], promotions.decision(late)
            assert decision is not None, "it is written before the promotion"
            if by == "hand" or decision.evidence is None:
                decision = replace(decision, champion_version=champion)
            else:
                decision = promotions.decide(decision.evidence, late, champion)
            _write(client, name, promotions, late, decision, by=by)
            if not decision.promoted:
                client.delete_model_version_tag(name, late, PROMOTION)
        elif (champion := promotions.champion) in ("", before := aliased_version(client, name, CHAMPION)):
            return promotions
        else:
            client.set_registered_model_alias(name, CHAMPION, champion)
            back = ROLLED_BACK in promotions.tags.get(before, {})
            reason = f"rolled back from version {before}" if back else promotions.tags[champion].get("gate.reason", "")
            tell("promoted", model=name, version=champion, replaced=before, reason=reason)


def _write(
    client: MlflowClient, name: str, promotions: Promotions, version: str, decision: Decision, *, by: str
) -> None:
    """Write a decision and then, if it makes another version champion, the promotion."""
    tags: dict[str, str] = {}
    if decision.promoted and by:
        decision = replace(decision, number=1 + max(map(promotions.number, promotions.tags)))
        tags = {PROMOTED_FROM: decision.champion_version, PROMOTED_BY: by, "promoted_at": utc_now()}
        tags |= {PROMOTION: str(decision.number)}  # last: with it the version is champion
        if ROLLED_BACK in promotions.tags[version]:
            for key in (PROMOTION, ROLLED_BACK):
                client.delete_model_version_tag(name, version, key)
    gate = {
        DECISION: json.dumps(asdict(decision)),
        "gate.promoted": str(decision.promoted).lower(),
        "gate.reason": decision.reason,
    }
    for key, value in (gate | tags).items():
        client.set_model_version_tag(name, version, key, value)


def pass_gate(client: MlflowClient, *, name: str, version: str, evidence: Evidence, ask: bool = False) -> Decision:
    """Make the version `challenger`, and `champion` if it may replace the present one; if `ask`, leave that to people.

    The decision becomes tags of the version. With the same evidence again, the recorded decision is returned and
    nothing changes; interrupted at any point and called again, it completes what it began.
    """
    promotions = resolve_promotions(client, name)
    recorded = promotions.decision(version)
    if (
        recorded is not None
        and recorded.evidence == evidence
        and (not recorded.promoted or recorded.number == promotions.number(version))  # else it was interrupted
        and (ask or not recorded.waits)
    ):
        return recorded
    client.set_registered_model_alias(name, CHALLENGER, version)
    decision = promotions.decide(evidence, version, promotions.champion)
    if promotions.champion == version:
        decision = replace(decision, number=promotions.number(version))
    elif ask and decision.promoted:
        reason = f"{decision.reason}; it waits for `ncsn promote {name} --version {version}`"
        decision = replace(decision, promoted=False, waits=True, reason=reason)
    _write(client, name, promotions, version, decision, by="gate" if promotions.champion != version else "")
    return resolve_promotions(client, name).decision(version) or decision


@dataclass(frozen=True)
class AliasChange:
    """What `ncsn promote` did."""

    model: str
    version: str  # the champion now
    replaced: str  # the champion before, perhaps the same; empty if there was none
    reason: str


def promote_version(client: MlflowClient, name: str, *, version: str | None = None, force: bool = False) -> AliasChange:
    """Ask the gate again about a registered version, the challenger if None, and make it champion if it may.

    With `force` it becomes champion whatever the gate says.
    """
    with named(f"models:/{name}"):
        challenger = aliased_version(client, name, CHALLENGER)
    chosen = version or challenger
    if not chosen:
        raise UserError(f"models:/{name}@{CHALLENGER}", "there is no challenger", hint="name the version: --version N")
    promotions = resolve_promotions(client, name)
    if chosen not in promotions.tags:
        raise UserError(f"models:/{name}/{chosen}", "there is no such version")
    champion = promotions.champion
    if champion == chosen:
        return AliasChange(name, chosen, chosen, "it is the champion already")
    recorded = promotions.decision(chosen)
    if recorded is not None and recorded.evidence is not None:
        decision = promotions.decide(recorded.evidence, chosen, champion)
    else:
        reason = "it has no measurement with an uncertainty on record; evaluate and register its run again"
        decision = Decision(False, reason, None, champion)
    by = "gate"
    if force and not decision.promoted:
        by = "hand"
        decision = replace(decision, promoted=True, reason=f"promoted by hand although {decision.reason}")
    if decision.promoted:
        _write(client, name, promotions, chosen, decision, by=by)
        decision = resolve_promotions(client, name).decision(chosen) or decision
    if not decision.promoted:
        reason, hint = f"not promoted: {decision.reason}", "--force promotes it anyway"
        raise UserError(f"models:/{name}/{chosen}", reason, hint=hint)
    return AliasChange(name, chosen, champion, decision.reason)


def roll_back(client: MlflowClient, name: str) -> AliasChange:
    """Make the champion before the present one champion again; completes a rollback that was interrupted."""
    with named(f"models:/{name}"):
        replaced = aliased_version(client, name, CHAMPION)
    promotions = resolve_promotions(client, name)
    if ROLLED_BACK in promotions.tags.get(replaced, {}):
        champion = promotions.champion
    else:
        *earlier, replaced = promotions.champions or [""]
        if not earlier:
            what = f"version {replaced} is the first champion" if replaced else "there is no champion"
            hint = f"choose one with `ncsn promote {name} --version N`"
            raise UserError(f"models:/{name}@{CHAMPION}", f"{what}, so there is none to go back to", hint=hint)
        client.set_model_version_tag(name, replaced, ROLLED_BACK, utc_now())
        champion = resolve_promotions(client, name).champion
    return AliasChange(name, champion, replaced, f"rolled back from version {replaced}")


@contextmanager
def named(address: str) -> Iterator[None]:
    """Name this address where the registry has no such model, version or alias."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(address, one_line(error)) from None
        raise


def resolve_version(client: MlflowClient, address: str) -> ModelVersion:
    """The version that an address names: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or without the scheme."""
    match = re.fullmatch(r"(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))", address.removeprefix(SCHEME))
    if match is None:
        raise UserError(address, "not a model version", hint=f"use {SCHEME}NAME@{CHAMPION} or {SCHEME}NAME/VERSION")
    name, version, alias = match["name"], match["version"], match["alias"]
    with named(f"{SCHEME}{match[0]}"):
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)


def aliased_version(client: MlflowClient, name: str, alias: str) -> str:
    """The version that an alias points to; empty if there is none."""
    return str(client.get_registered_model(name).aliases.get(alias, ""))


def fetch_files(uri: str, version: ModelVersion, into: Path) -> Path:
    """Download the checkpoint of a version from the server at `uri` into an existing folder."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        # The source is the artifacts' own address: a name would be looked up in MLflow's global registry.
        source = f"{str(version.source).rstrip('/')}/artifacts"
        folder = Path(download_artifacts(source, dst_path=str(into), tracking_uri=uri))
        (folder / INDEX).stat()
    except (MlflowException, OSError) as error:
        reason = f"{without_users(uri)} gives no checkpoint of ncsn at {version.source}: {one_line(error)}"
        hint = "restore its files; only a version of `ncsn register` has them"
        raise TrackingError(f"{SCHEME}{version.name}/{version.version}", reason, hint=hint) from error
    return folder
