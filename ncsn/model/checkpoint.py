"""A checkpoint: one folder, from which training resumes and samples are drawn; and the checkpoints of a run.

    weights.safetensors    network parameters and buffers
    ema.safetensors        EMA weights, which generate the images
    moments.safetensors    mean and covariance of the training images, from which some samplers start
    optimizer.safetensors  Adam's moments and step, keyed `<parameter>/<moment>`
    state.json             images_seen, EMA counter, digest of the dataset, classes; what the loss learns
    config.yaml            the experiment
    guide.safetensors      weights of the network that guides a saved model, with its config in guide_config.yaml
    checkpoint.json        format version and the SHA-256 of each file above; written last

Images need the files without weights.safetensors and optimizer.safetensors: a registered or saved model has these
alone.

No generator state is kept, because all randomness is a function of (seed, place in the image order).

Those of a run are `<run>/checkpoints/images-000000160/`. `resume-000000224/` is one between them, which only a resume
reads. There is at most one, until the next of any kind. `before-decay-000000128/` stays, for `train.continue_from`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save as tensors_to_bytes, save_file
from torch import Tensor, nn

from ncsn import storage
from ncsn.config import Config, changed_settings, explain_changes, from_yaml, to_yaml
from ncsn.config.load import NOT_OF_MODELS
from ncsn.core.images import DataMoments
from ncsn.core.networks.base import misfits
from ncsn.core.networks.layers import narrowed
from ncsn.core.training import TrainState
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.classes import Classes
from ncsn.runs.layout import BEFORE_DECAY, INDEX, RESUME, checkpoint_facts, checkpoint_names, resumable

FORMAT_VERSION = 1
SAMPLING_FILES = ("ema.safetensors", "moments.safetensors", "state.json", "config.yaml")
# Training resumes from these; those above are enough for images.
FILES = ("weights.safetensors", "optimizer.safetensors", *SAMPLING_FILES)
GUIDE = ("guide.safetensors", "guide_config.yaml")
NEWEST = 3  # of the checkpoints that stay whole where all are kept

_logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is damaged or belongs to something else."""


class DamagedError(CheckpointError):
    """A checkpoint with a file that is missing, cut short or altered; the one before it may be whole."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(origin, f"is damaged: {reason}")
        self.reason = reason


def verify(folder: Path, *, needs: Iterable[str] = SAMPLING_FILES) -> set[str]:
    """Check that every file is there and unchanged; their names.

    Raises:
        DamagedError: naming the file that is not.
    """
    if not (folder / INDEX).is_file():
        raise DamagedError(str(folder), f"{INDEX} is missing")
    try:
        index = json.loads((folder / INDEX).read_text())
        version, listed = index["version"], dict[str, str](index.get("sha256", ()))
        inside = all(re.fullmatch(r"[\w.]{1,100}", name) for name in listed)
    except (ValueError, TypeError, LookupError, RecursionError):  # no text, no JSON, or that of something else
        raise DamagedError(str(folder), f"{INDEX} is no index of a checkpoint") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(str(folder), f"has format version {version!r}; this program reads {FORMAT_VERSION}")
    if not inside:
        raise DamagedError(str(folder), f"{INDEX} names files of other folders")
    for name in dict.fromkeys((*needs, *listed)):
        if not (folder / name).is_file():
            raise DamagedError(str(folder), f"{name} is missing")
        if sha256(folder / name) != listed.get(name):
            raise DamagedError(str(folder), f"{name} differs from its checksum")
    return set(listed)


def thin(uri: str) -> None:
    """Reduce a checkpoint in the store to what images need; at every moment it is whole."""
    place = storage.join(uri, INDEX)
    index = storage.read_json(place)
    kept = {name: checksum for name, checksum in index["sha256"].items() if name in SAMPLING_FILES}
    storage.write_text(place, json.dumps({"version": FORMAT_VERSION, "sha256": kept}, indent=1))
    for name in storage.list_names(uri):
        if name not in (INDEX, *SAMPLING_FILES):
            storage.delete(storage.join(uri, name))


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """The input of image generation, and where it comes from."""

    config: Config
    network: nn.Module  # with EMA weights, in eval mode
    moments: DataMoments  # of the training images
    classes: Classes | None = None  # of a network with `data.num_classes`
    guide: TrainedNetwork | None = None  # of autoguidance, if it is kept with the network
    images_seen: int = 0
    dataset_digest: str = ""
    digest: str = ""  # first 16 hex digits of the SHA-256 of the EMA weights

    @cached_property
    def halved(self) -> nn.Module:
        """A copy for evaluations under autocast to bfloat16, which would cast the same weights each time."""
        network = copy.deepcopy(self.network)
        for layer in narrowed(network).values():
            layer.to(torch.bfloat16)
        return network


def snapshot(
    *, config: Config, state: TrainState, moments: DataMoments, dataset_digest: str, classes: Classes | None = None
) -> Callable[[Path], None]:
    """Copy the state, so that training can go on while it is written; a function that does that.

    It writes the complete checkpoint into an existing, empty folder.
    """
    facts: dict[str, Any] = {
        "images_seen": state.images_seen,
        "ema_updates": state.ema.num_updates,
        "dataset_digest": dataset_digest,
    }
    if classes is not None:
        facts["classes"] = asdict(classes)
    if state.uncertainty is not None:
        facts["uncertainty"] = {name: value.tolist() for name, value in state.uncertainty.named_parameters()}
    tensors = {
        "weights.safetensors": _copies(state.network.state_dict()),
        "ema.safetensors": _copies(state.ema.weights),
        "moments.safetensors": moment_tensors(moments),
        "optimizer.safetensors": _copies(
            {
                f"{name}/{key}": value
                for name, parameter in state.trained()
                for key, value in state.optimizer.state.get(parameter, {}).items()
            }
        ),
    }
    texts = {"state.json": json.dumps(facts), "config.yaml": to_yaml(config, without=NOT_OF_MODELS)}

    return partial(write_files, tensors=tensors, texts=texts)


def restore(folder: Path, *, config: Config | None, state: TrainState, dataset_digest: str) -> None:
    """Restore everything into `state`, strictly; `config` is None if it is known that it fits.

    Raises:
        CheckpointError: if a file is missing or damaged, or the config or the images were others.
    """
    verify(folder, needs=FILES)
    if config is not None:
        saved = _given(folder / "config.yaml", str(folder))
        require_same_training(saved, config, origin=str(folder))
    facts = json.loads((folder / "state.json").read_text())
    if facts["dataset_digest"] != dataset_digest:
        reason = f"was trained on the dataset {facts['dataset_digest']}, not {dataset_digest}: the images have changed"
        raise CheckpointError(str(folder), reason, hint="restore them, or start another --run NAME")
    _load_strictly(state.network, load_file(folder / "weights.safetensors"), origin=str(folder))
    state.ema.restore(load_file(folder / "ema.safetensors"), num_updates=int(facts["ema_updates"]))
    trained = dict(state.trained())
    for path, moment in load_file(folder / "optimizer.safetensors").items():
        name, _, key = path.rpartition("/")
        parameter = trained[name]
        # Fused Adam needs moments with the memory format of their parameters; its step is a number.
        like = torch.empty_like(parameter) if moment.shape == parameter.shape else torch.empty_like(moment)
        state.optimizer.state[parameter][key] = like.to(parameter.device).copy_(moment)
    state.images_seen = int(facts["images_seen"])
    if state.uncertainty is not None:
        with torch.no_grad():
            for name, learned in state.uncertainty.named_parameters():
                learned.copy_(torch.tensor(facts["uncertainty"][name]))


def load_checkpoint(uri: str, *, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the EMA weights and the config of the checkpoint at `uri`.

    Raises:
        CheckpointError: There is no whole checkpoint, or it does not fit the network of its config.
    """
    try:
        with storage.local_copy(uri) as folder:
            verify(folder)
            config = _given(folder / "config.yaml", uri)
            facts = checkpoint_facts(folder, uri)
            weights = load_file(folder / "ema.safetensors")
            moments = moments_of(load_file(folder / "moments.safetensors"))
            digest = sha256(folder / "ema.safetensors")[:16]
            guide = None
            if (folder / GUIDE[0]).exists():
                other = _given(folder / GUIDE[1], uri)
                worse = network_from_weights(other, load_file(folder / GUIDE[0]), origin=f"{uri}, {GUIDE[0]}")
                guide = TrainedNetwork(config=other, network=worse.to(device), moments=moments)
            known, seen = facts.get("classes"), int(facts["images_seen"])
            classes = None if known is None else Classes(tuple(known["names"]), tuple(known["counts"]))
    except FileNotFoundError:
        raise CheckpointError(uri, "no such checkpoint") from None
    except UserError:
        raise
    except (SafetensorError, storage.UnreadableError, LookupError, TypeError, ValueError) as error:  # of others
        raise DamagedError(uri, f"a file is not as ncsn writes it: {error!r}") from error
    network = network_from_weights(config, weights, origin=uri).to(device)
    return TrainedNetwork(
        config=config,
        network=network,
        moments=moments,
        classes=classes,
        guide=guide if guide is None else replace(guide, classes=classes),
        images_seen=seen,
        dataset_digest=facts["dataset_digest"],
        digest=digest,
    )


def _given(file: Path, uri: str) -> Config:
    return from_yaml(file.read_text(), origin=storage.join(uri, file.name), without=NOT_OF_MODELS)


def save_network(trained: TrainedNetwork, folder: Path) -> None:
    """Write what images need as a checkpoint into an existing, empty folder."""
    facts: dict[str, Any] = {"images_seen": trained.images_seen, "dataset_digest": trained.dataset_digest}
    if trained.classes is not None:
        facts["classes"] = asdict(trained.classes)
    tensors = {
        "ema.safetensors": plain_weights(trained.network),
        "moments.safetensors": moment_tensors(trained.moments),
    }
    texts = {"state.json": json.dumps(facts), "config.yaml": to_yaml(trained.config, without=NOT_OF_MODELS)}
    if trained.guide is not None:
        tensors[GUIDE[0]] = plain_weights(trained.guide.network)
        texts[GUIDE[1]] = to_yaml(trained.guide.config, without=NOT_OF_MODELS)
    write_files(folder, tensors, texts)


def write_files(folder: Path, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Write these files into an existing, empty folder, and their checksums, with which they are complete."""
    for name, each in tensors.items():
        save_file(each, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text)
    index = {"version": FORMAT_VERSION, "sha256": {name: sha256(folder / name) for name in (*tensors, *texts)}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def weights_digest(network: nn.Module) -> str:
    """The digest of a network's weights that a checkpoint with these EMA weights has."""
    return hashlib.sha256(tensors_to_bytes(plain_weights(network))).hexdigest()[:16]


def network_from_weights(config: Config, weights: Mapping[str, Tensor], *, origin: str) -> nn.Module:
    """The network of `config` with these parameters, in eval mode; buffers come from the config."""
    with torch.device("meta"):  # without memory: a config may ask for any
        expected = dict(build.network(config).named_parameters())
    if found := misfits(weights, expected):
        raise CheckpointError(origin, f"does not fit this network: tensors {found}")
    network = build.network(config)
    parameters = dict(network.named_parameters())
    buffers = {name: tensor for name, tensor in network.state_dict().items() if name not in parameters}
    _load_strictly(network, {**buffers, **weights}, origin=origin)
    return network.eval().requires_grad_(False)


def require_same_training(saved: Config, wanted: Config, *, origin: str) -> Config:
    """`wanted` with the checkpoint's noise levels, which it may leave to the images, and length; refuses another."""
    if changed := changed_settings(saved, wanted):
        raise CheckpointError(origin, f"was trained with another config: {explain_changes(changed)}")
    train = wanted.train.model_copy(update={"num_images": saved.train.num_images})
    return wanted.model_copy(update={"noise": saved.noise, "train": train})


def _load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    if found := misfits(tensors, network.state_dict()):
        raise CheckpointError(origin, f"does not fit this network: tensors {found}")
    network.load_state_dict(dict(tensors), strict=True)


def moments_of(tensors: Mapping[str, Tensor]) -> DataMoments:
    """Inverse of `moment_tensors`."""
    return DataMoments(tensors["mean"], tensors["directions"], tensors["variances"], float(tensors["rest"]))


def moment_tensors(moments: DataMoments) -> dict[str, Tensor]:
    """The moments by name, as a file keeps them."""
    return {name: torch.as_tensor(value).contiguous() for name, value in vars(moments).items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()
    }


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters as a file keeps them: contiguous, on the CPU."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in network.named_parameters()}


@dataclass(eq=False)
class CheckpointStore:
    """Publishes checkpoints in a thread, and finds the newest whole one."""

    uri: str  # folder of the checkpoints
    _: KW_ONLY
    # How many of the newest stay, or None for all. With `all` the `NEWEST` stay whole, and the older ones keep what
    # images need.
    keep: int | Literal["all"] | None = None
    notes: list[str] = field(default_factory=list, init=False)  # about damaged checkpoints, for people
    _thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "checkpoint"), init=False)
    _pending: Future[None] | None = field(default=None, init=False)

    def names(self) -> Iterator[str]:
        """Complete checkpoints, the newest first, without one that is only to resume from."""
        return (name for name in resumable(self.uri) if not name.startswith(RESUME))

    def newest(self) -> str | None:
        """The newest whole checkpoint. Damaged ones are deleted with a warning: training makes them again.

        For one process at a time, before it publishes.
        """
        if storage.is_local(self.uri):
            storage.remove_scratch(self.uri)
        damaged, found = list[str](), None
        for name in resumable(self.uri):
            with self.open(name) as folder:
                try:
                    files = verify(folder)
                except DamagedError as damage:
                    damaged.append(f"checkpoint {name} is damaged ({damage.reason})")
                    storage.delete(storage.join(self.uri, name))
                    continue
            if files >= set(FILES):  # others have what images need alone
                found = name
                break
        for what in damaged:
            self.notes.append(f"{what}: training resumed from {found or 'the start'}")
            _logger.warning(self.notes[-1])
        return found

    def open(self, name: str) -> AbstractContextManager[Path]:
        """Context manager: the checkpoint as a local folder."""
        return storage.local_copy(storage.join(self.uri, name))

    def publish(self, write: Callable[[Path], None], *, name: str) -> None:
        """Begin to store what `write` writes into an empty local folder.

        Waits for the checkpoint before, so that a slow store does not fill this machine's memory, and raises its error.
        """
        self.wait()
        self._pending = self._thread.submit(self._store, write, name)

    def wait(self) -> None:
        """Wait until everything is stored. Raises what went wrong; the checkpoints before are still there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _store(self, write: Callable[[Path], None], name: str) -> None:
        target = storage.join(self.uri, name)
        with storage.scratch_folder(self.uri) as folder:
            write(folder)
            storage.delete(target)  # the rest of an upload that was cut short
            storage.publish_folder(folder, target, marker=INDEX)
        if name.startswith(BEFORE_DECAY):
            return
        for old in checkpoint_names(self.uri):
            if old.startswith(RESUME) and old != name:
                storage.delete(storage.join(self.uri, old))
        if self.keep is None or name.startswith(RESUME):
            return
        # The rest of an upload that was cut short does not count. A newer one is overwritten later.
        folders = checkpoint_names(self.uri)
        kept = set(islice(self.names(), NEWEST if self.keep == "all" else self.keep))
        for old in folders[: folders.index(name)]:
            if old in kept:
                continue
            uri = storage.join(self.uri, old)
            if self.keep != "all" or not storage.exists(storage.join(uri, INDEX)):
                storage.delete(uri)
            elif storage.exists(storage.join(uri, "optimizer.safetensors")):
                thin(uri)
