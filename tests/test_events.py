"""Events reach a real HTTP server that fails at times, signed, in order and once, and hold up nobody."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature
from requests.structures import CaseInsensitiveDict
from webhook import CUT, Receiver, receiver

from ncsn.events import announced, tell


@pytest.fixture
def sent() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    """A process that ends right after `code`."""
    code = f"from ncsn import events\nfrom ncsn.events import announced, tell\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)


def test_an_event_is_sent_again_until_it_is_taken_in_order_and_signed_as_mlflow_signs(sent: Receiver) -> None:
    sent.answers = [503, CUT]
    before = int(time.time())
    tell("started", run="digits", root="s3://b/p", step="")
    tell("finished", run="digits", root="s3://b/p")
    first, second = sent.wait_for(2)
    assert [first["event"], second["event"]] == ["started", "finished"] and first["id"] != second["id"]
    assert first.keys() == {"id", "event", "time", "run", "root"}
    assert len(sent.tries) == 4
    for headers, body in sent.tries:
        identity, now = headers["x-ncsn-delivery-id"], headers["x-ncsn-timestamp"]
        assert identity == json.loads(body)["id"] and before <= int(now) <= time.time()
        assert headers["x-ncsn-signature"] == _generate_hmac_signature("of the test", identity, now, body)
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text()
    (example,) = re.findall(r"```python\n(import base64.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)  # what the page tells receivers to do
    for text, genuine in ((body, True), (f"{body} ", False)):
        assert names["genuine"](CaseInsensitiveDict(headers), text.encode(), "of the test") is genuine


def test_what_is_refused_is_not_sent_again_and_the_address_stays_secret(sent, caplog) -> None:
    sent.answers = [410, 302, 503]
    with caplog.at_level(logging.WARNING):
        for run in ("refused", "redirected", "taken"):
            tell("started", run=run)
        assert [event["run"] for event in sent.wait_for(1)] == ["taken"]
    assert len(sent.tries) == 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 3 and not any("hidden" in line for line in said)


def test_a_step_does_not_wait_for_the_receiver(sent: Receiver) -> None:
    sent.answering.clear()
    with pytest.raises(OSError, match="no space"), announced("digits", root="/store", step="train"):
        raise OSError("no space\nleft")
    assert sent.tries == []
    sent.answering.set()
    started, failed = sent.wait_for(2)
    assert (started["event"], started["step"]) == ("started", "train")
    assert (failed["event"], failed["status"], failed["reason"]) == ("failed", "FAILED", "no space")


def test_the_last_events_of_a_process_are_sent_but_a_receiver_that_does_not_answer_holds_up_nothing(sent) -> None:
    sent.answers = [503]
    done = in_a_process("with announced('digits', root='/store'):\n    raise SystemExit(143)")
    assert done.returncode == 143
    assert [event["event"] for event in sent.taken] == ["started", "failed"]
    assert sent.taken[1]["status"] == "KILLED"
    sent.answering.clear()
    done = in_a_process("events.END_SECONDS = 0.2\ntell('started', run='digits')")
    assert done.returncode == 0 and len(sent.tries) == 3
    assert len(done.stderr.splitlines()) == 1 and "hidden" not in done.stderr
