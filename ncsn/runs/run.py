"""A run: the config that a command has for it, the config that its name belongs to, and the inputs of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.config import Config, changed_settings, decay_begins, explain_changes, from_yaml, to_yaml
from ncsn.errors import UserError
from ncsn.runs.layout import BEFORE_DECAY, INDEX, RUN_PATTERN, RunFolder, folder_name, run_folder
from ncsn.runs.record import ForeignRun, read_finished
from ncsn.runs.results import SelectResult, TrainResult
from ncsn.runs.steps import OWN, STEP_TABLE

_LEVELS = {"noise.sigma_1", "noise.sigma_L", "noise.num_levels"}


@dataclass
class Run:
    """A run, and the config that a command has for it. Its name belongs to the first config that claims it."""

    config: Config
    name: str
    checkpoint: str | None = None  # URI, if that of an address is meant instead of the run's own
    claimed: bool = False

    def __post_init__(self) -> None:
        self.folder = run_folder(self.config, self.name)

    def claim(self) -> None:
        """Claim the name, once; `ForeignRun` if it belongs to a config that trains other weights."""
        if self.claimed:
            return
        storage.make_store(self.folder.root)
        text, place = to_yaml(self.config), self.folder.config
        if not storage.publish_once(place, text.encode()) and (owner := storage.read_text(place)) != text:
            require_owner(from_yaml(owner, origin=place), self.config, self.name)
        storage.write_bytes(self.folder.begun, b"")
        self.claimed = True

    @property
    def owner(self) -> Config:
        """The config that the name belongs to."""
        return from_yaml(storage.read_text(self.folder.config), origin=self.folder.config)

    def alone(self) -> AbstractContextManager[object]:
        """A lock, so that one process at a time trains the run; `UserError` if another one does."""
        # The kernel frees it when its process ends, however it ends. A store that is not local has none.
        if not storage.is_local(self.folder.uri):
            return nullcontext()
        storage.make_store(self.folder.root)
        path = Path(self.folder.uri) / ".lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(path, is_singleton=True).acquire(timeout=0)  # which this process may have already
        except Timeout:
            hint = "wait for it, or choose another --run NAME"
            raise UserError("--run", "running in another process", hint=hint, value=self.name) from None


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Raise `ForeignRun`, with the first settings that differ, if the two configs train different weights."""
    if changed := changed_settings(owner, config):
        hint = "choose another --run NAME"
        if owner.noise.training.kind == "lognormal" and changed.keys() <= _LEVELS:
            hint += ", or sample at other levels with sampling.levels"
        if changed.keys() <= {"train.num_images", "optimizer.decay_images"}:
            train = config.train.model_copy(update={"continue_from": run})
            with suppress(UserError):  # it has no state for that
                state_to_continue(config.model_copy(update={"train": train}))
                hint += f", with train.continue_from={run} to begin where the learning rate of this one fell"
        raise ForeignRun("--run", f"belongs to another config: {explain_changes(changed)}", hint=hint, value=run)


def state_to_continue(config: Config) -> str:
    """URI of the checkpoint that `train.continue_from` means; `UserError` if there is none, or not for this config."""
    key, run, length = "train.continue_from", str(config.train.continue_from), config.train.num_images
    folder = RunFolder(storage.absolute(config.storage.root), run)
    if not (RUN_PATTERN.fullmatch(run) and storage.exists(folder.config)):
        raise UserError(key, f"no run of this name in {folder.root}", hint="`ncsn ls` lists them", value=run)
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    seen = decay_begins(owner) or 0
    state = storage.join(folder.checkpoints, folder_name(seen, BEFORE_DECAY))
    if not storage.exists(storage.join(state, INDEX)):
        where = f"at {seen:,} images" if seen else f"none, of {owner.optimizer.decay} decay and {owner.loss.kind} loss"
        hint = "train it up to there, or use train.init_from" if seen else "use train.init_from"
        raise UserError(key, f"has no checkpoint where a linear decay begins: {where}", hint=hint, value=run)
    free = (key, "name", "train.num_images", "optimizer.decay_images", "train.ema.")
    changed = {path: each for path, each in changed_settings(owner, config).items() if not path.startswith(free)}
    if (old := owner.train.averaging) != (new := config.train.averaging):  # which may depend on the length
        changed["train.ema"] = (vars(old), vars(new))
    if changed:
        reason = f"was trained with another config: {explain_changes(changed)}"
        raise UserError(key, reason, hint="change the length alone", value=run)
    if (begins := decay_begins(config) or 0) < seen:
        reason = f"the decay begins at {begins:,} images, before the state of {run!r}, at {seen:,}"
        raise UserError("train.num_images", reason, hint="raise it, or lower optimizer.decay_images", value=length)
    return state


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """URIs of the inputs of a step: as given, else from the run; those on demand only if given."""
    declared = STEP_TABLE[step]
    on_demand = {name: source for name, source in declared.on_demand.items() if given.get(name)}
    found = {}
    for name, source in {**declared.inputs, **on_demand}.items():
        uri = given.get(name)
        if uri and uri != OWN:
            found[name] = storage.absolute(uri)
            continue
        earlier = source.result.step
        finished = read_finished(folder, earlier)
        if finished is None:
            reason = f"{step} needs the {source.what}, and run {folder.run!r} has none yet"
            hint = f"run `ncsn {earlier}` with the same options first, or pass --{name} URI"
            raise UserError(f"--{name}", reason, hint=hint)
        found[name] = str(finished.values[source.field])
        if source.selectable and not uri:
            found[name] = default_checkpoint(folder, last=found[name])
    return found


def default_checkpoint(folder: RunFolder, *, last: str) -> str:
    """The checkpoint that `ncsn select` chose since training reached the `last` one of the run, else that one."""
    trained = read_finished(folder, TrainResult.step)
    chosen = read_finished(folder, SelectResult.step)
    if trained is None or chosen is None:
        return last
    uri = str(chosen.values["checkpoint"])
    current = trained.values["checkpoint"] == last and trained.finished_at <= chosen.finished_at
    return uri if current and storage.exists(uri) else last
