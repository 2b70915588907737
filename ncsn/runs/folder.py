"""The folder of a run: its paths, and the claim on its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml, to_yaml
from ncsn.errors import UserError

STEPS = ("ingest", "train", "sample", "evaluate", "register", "report")
RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")


class ForeignRun(UserError):
    """The name of a run belongs to another config."""


@dataclass(frozen=True)
class RunFolder:
    """URIs of everything that one run keeps."""

    root: str
    run: str

    @property
    def uri(self) -> str:
        """`<root>/runs/<run>`."""
        return storage.join(self.root, "runs", self.run)

    @property
    def config(self) -> str:
        """The experiment that owns this run name."""
        return storage.join(self.uri, "config.yaml")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints, managed by Ray Train."""
        return storage.join(self.uri, "checkpoints")

    @property
    def history(self) -> str:
        """The curves of training."""
        return storage.join(self.uri, "history.json")

    @property
    def previews(self) -> str:
        """Folder of the images that training made of itself."""
        return storage.join(self.uri, "previews")

    def preview(self, images_seen: int) -> str:
        """The preview at this many training images, a PNG file."""
        return storage.join(self.previews, f"images-{images_seen:09d}.png")

    @property
    def report(self) -> str:
        """Folder of the figures for people."""
        return storage.join(self.uri, "report")

    @property
    def evaluation(self) -> str:
        """Folder of the evaluation figures."""
        return storage.join(self.uri, "evaluation")

    @property
    def search(self) -> str:
        """Folder of a search and of what it found."""
        return storage.join(self.uri, "search")

    def samples(self, checkpoint_digest: str, sampler_digest: str) -> str:
        """Folder of the images that one sampler made from one checkpoint."""
        return storage.join(self.uri, "samples", checkpoint_digest, sampler_digest)

    def step(self, step: str, file: str) -> str:
        """A file that one step keeps: `result.json`, `progress.json` or `error.json`."""
        return storage.join(self.uri, "steps", step, file)


def run_folder(config: Config, run: str) -> RunFolder:
    """The folder of `run` below `config.storage.root`.

    Raises:
        UserError: for a name that cannot be a folder, a Ray job and an MLflow run at once.
    """
    if not RUN_PATTERN.fullmatch(run):
        raise UserError(
            "--run",
            "is not a valid name",
            hint="use 1 to 63 lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit",
            value=run,
        )
    return RunFolder(root=storage.absolute(config.storage.root), run=run)


def claim_run(config: Config, run: str) -> RunFolder:
    """Take the run name for this experiment, or find that it is this experiment's already.

    Raises:
        ForeignRun: if another config (in what decides the weights) uses the name; the message says what differs.
        UserError: for a name that no run can have.
    """
    folder = run_folder(config, run)
    if storage.publish_once(folder.config, to_yaml(config).encode()):
        return folder
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    require_owner(owner, config, run)
    return folder


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Refuse a config that would decide the weights of another's run otherwise.

    Raises:
        ForeignRun: naming the first settings that differ.
    """
    changed = changed_settings(owner, config)
    if changed:
        shown = "; ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in list(changed.items())[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ForeignRun(
            "--run", f"belongs to another config: {shown}{more}", hint="choose another --run NAME", value=run
        )
