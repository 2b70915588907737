"""What both backends promise: create, adopt, refuse, stop, lost, lease, log. Launchers are processes of their own."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_nodes import RayNodes
from remote_places import KubeRayCluster, Place, RayHead
from tcp_proxy import TcpProxy

pytestmark = pytest.mark.timeout(600)

both = pytest.mark.parametrize("place", ["kuberay", pytest.param("ray-jobs", marks=pytest.mark.slow)], indirect=True)

COUNTED = [f"line {n}" for n in range(10)]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "kuberay":
        emulation = request.getfixturevalue("emulation")
        emulation.operator.second = 100  # what failed stays
        yield KubeRayCluster(tmp_path, {"backend": "kuberay"}, emulation)
        return
    nodes: RayNodes = request.getfixturevalue("ray_head")
    with TcpProxy(nodes.dashboard) as proxy:
        compute = {"backend": "ray-jobs", "ray_jobs": {"address": proxy.url}}
        yield RayHead(tmp_path, compute, nodes, proxy)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A name that no other test has: one Ray head serves them all."""
    return re.sub(r"[^a-z]+", "-", request.node.originalname.removeprefix("test_"))[:24].strip("-")


def waiting(release: Path) -> str:
    """Code that says it runs, waits until the file is there, and counts to nine."""
    return (
        "import pathlib, time\nprint('running', flush=True)\n"
        f"while not pathlib.Path({str(release)!r}).exists(): time.sleep(0.05)\n"
        "for n in range(10): print('line', n, flush=True)"
    )


@both
def test_a_step_runs_with_its_lease_and_shows_and_keeps_its_log(place: Place, run: str) -> None:
    """The lease is renewed while it runs, and the command is told where it is."""
    code = (
        "import pathlib, sys, time\n"
        "assert sys.argv[1] == '--lease'\n"
        "seen = set()\n"
        "while len(seen) < 3:\n"
        "    seen |= {each.stat().st_mtime_ns for each in pathlib.Path(sys.argv[2]).glob('[!.]*')}\n"
        "    time.sleep(0.02)\n"
        "print('renewed', sys.argv[2])"
    )
    launcher = place.launch(run, code)
    assert launcher.ended() == 0, launcher.said
    line = f"renewed {place.step_folder(run)}/lease"
    assert launcher.said.count(line) == 1
    assert place.log(run).splitlines()[-1] == line
    assert (place.running(run), place.attempts(run)) == ([], 1)


@both
def test_another_attempt_adopts_what_a_killed_launcher_left(place: Place, run: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = place.launch(run, waiting(go))
    first.until("running")
    first.kill()
    first.communicate()
    second = place.launch(run, waiting(go))
    second.until("running")
    go.touch()
    assert second.ended() == 0, second.said
    assert place.attempts(run) == 1
    assert place.log(run).splitlines()[-11:] == ["running", *COUNTED]


@both
def test_launchers_at_once_start_one_job_and_other_work_is_refused(place: Place, run: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    launchers = [place.launch(run, waiting(go)) for _ in range(2)]
    for launcher in launchers:
        launcher.until("running")
    (name,) = place.running(run)
    assert re.fullmatch(rf"ncsn-{run}-train-[0-9a-f]{{8}}", name)
    other = place.launch(run, "print('something else')")
    assert other.ended() == 1
    assert other.said[-1].startswith(f"UserError: {name}: ")
    assert place.running(run) == [name]
    go.touch()
    codes = [launcher.ended() for launcher in launchers]
    # The first that sees the end of a RayJob deletes it. The other may find it gone, and the step reads its result.
    succeeded = [launcher for launcher, code in zip(launchers, codes, strict=True) if code == 0]
    lost = [launcher for launcher in launchers if launcher.said[-1].startswith("RemoteLost: ")]
    assert len(succeeded) >= 1
    assert len(succeeded) + len(lost) == len(launchers), [launcher.said for launcher in launchers]
    for launcher in succeeded:
        assert [line for line in launcher.said if line.startswith("line")] == COUNTED
    assert place.log(run).splitlines()[-10:] == COUNTED
    assert place.attempts(run) == 1


@both
def test_a_failure_is_one_line_and_does_not_block_the_next_attempt(place: Place, run: str, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    code = (
        f"import pathlib\nprint('starting', flush=True)\nif not pathlib.Path({str(fixed)!r}).exists():\n"
        "    raise ValueError('no such data')\nprint('done')"
    )
    first = place.launch(run, code)
    assert first.ended() == 1
    kind, failure = first.said[-1].split(": ", 1)
    assert kind == "RemoteFailure"
    assert re.search(rf"ncsn-{run}-train-\w{{8}} .*ValueError: no such data; log {place.step_folder(run)}", failure)
    before = place.attempts(run)
    fixed.touch()
    second = place.launch(run, code)
    assert second.ended() == 0, second.said
    assert place.attempts(run) == before + 1
    assert place.log(run).splitlines()[-2:] == ["starting", "done"]
    assert "Traceback" not in place.log(run), "the log is that of the last attempt"


@both
def test_an_outage_stops_nothing_and_the_log_is_shown_once_and_whole(
    place: Place, run: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    go = tmp_path / "go"
    launcher = place.launch(run, waiting(go))
    launcher.until("running")
    (lease,) = (place.step_folder(run) / "lease").glob("[!.]*")
    with place.outage():
        launcher.until(".*unavailable.*")
        before = lease.stat().st_mtime_ns
        eventually(lambda: lease.stat().st_mtime_ns != before, "the lease in the store is renewed all the same")
    go.touch()
    assert launcher.ended() == 0, launcher.said
    assert [line for line in launcher.said if line in ("running", *COUNTED)] == ["running", *COUNTED]
    assert place.log(run).splitlines()[-11:] == ["running", *COUNTED]
    assert place.attempts(run) == 1


@both
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_job(
    place: Place, run: str, tmp_path: Path, eventually: Callable[..., None], number: signal.Signals, code: int
) -> None:
    run = f"{run[:18]}-{code}"
    launcher = place.launch(run, waiting(tmp_path / "never"))
    launcher.until("running")
    launcher.send_signal(number)
    assert launcher.ended() in (code, -number), launcher.said
    eventually(lambda: not place.running(run), "the job has ended")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["ray-jobs"], indirect=True)  # of RayJobs test_launchers.py tells
def test_only_the_launcher_that_made_it_stops_a_ray_job(
    place: Place, run: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    first, second = (place.launch(run, waiting(tmp_path / "never")) for _ in range(2))
    for launcher in (first, second):
        launcher.until("running")
    made, attached = (first, second) if any(" submitted " in line for line in first.said) else (second, first)
    attached.send_signal(signal.SIGTERM)
    assert attached.ended() == 143, attached.said
    assert len(place.running(run)) == 1
    made.send_signal(signal.SIGINT)
    assert made.ended() in (130, -signal.SIGINT), made.said
    eventually(lambda: not place.running(run), "the job has ended")


@both
def test_stop_ends_the_jobs_of_a_run(place: Place, run: str, tmp_path: Path) -> None:
    launcher = place.launch(run, waiting(tmp_path / "never"))
    launcher.until("running")
    names = place.running(run)
    assert place.stop("another") == []
    assert place.stop(run) == names
    assert launcher.ended() == 1
    assert re.match(rf"Remote(Failure|Lost): \w+( job)? {names[0]} was ", launcher.said[-1])
    assert place.stop(run) == []


@both
def test_a_job_that_is_gone_is_lost(place: Place, run: str, tmp_path: Path) -> None:
    launcher = place.launch(run, waiting(tmp_path / "never"))
    launcher.until("running")
    place.lose(run)
    assert launcher.ended() == 1
    assert launcher.said[-1].startswith("RemoteLost: ")
