"""The record as larger sites keep it: MLflow's server on PostgreSQL, its artifacts in S3, both real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import yaml
from live_worker import DEAD, Worker, assert_once
from mlflow_server import Server, tracking_server
from ports import free_port

from ncsn import storage
from ncsn.tracking import live
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import step_run

MANIFEST = Path(__file__).parents[2] / "infra" / "base" / "mlflow" / "deployment.yaml"
PASSWORD = "p:a/s?s w@rd"
# Debian keeps PostgreSQL's programs off the PATH.
PROGRAMS = next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), Path("/usr/bin"))


def _manifest(container: str) -> dict[str, Any]:
    """A container of MLflow's pod."""
    pod = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]
    (found,) = (each for each in (*pod["initContainers"], *pod["containers"]) if each["name"] == container)
    return dict(found)


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The manifest's URI of an empty database, but for the host; the password is where the manifest gives it."""
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    owner = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    environment = {each["name"]: each.get("value") for each in _manifest("mlflow")["env"]}
    assert environment.keys() >= {"PGPASSWORD"}
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with tempfile.TemporaryDirectory(prefix="ncsn-postgresql-") as name:
        folder = Path(name)
        if owner:
            shutil.chown(folder, owner)
        data, password = folder / "data", folder / "password"
        password.write_text(PASSWORD)
        login = ["--username", "mlflow", "--pwfile", password, "--auth", "scram-sha-256"]
        create = [PROGRAMS / "initdb", "--pgdata", data, "--no-sync", *login]
        subprocess.run(create, check=True, capture_output=True, user=owner, cwd=folder)
        port = free_port()
        settings = f"-c fsync=off -c listen_addresses=127.0.0.1 -c port={port} -k {folder}"
        control = [PROGRAMS / "pg_ctl", "--pgdata", data, "--wait", "--silent", "--log", folder / "log"]
        subprocess.run([*control, "--options", settings, "start"], check=True, user=owner, cwd=folder)
        try:
            create = [PROGRAMS / "createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "mlflow"]
            subprocess.run([*create, "mlflow"], check=True)
            uri = str(environment["MLFLOW_BACKEND_STORE_URI"])
            assert "@postgres:5432/mlflow" in uri
            yield uri.replace("@postgres:5432/", f"@127.0.0.1:{port}/")
        finally:
            subprocess.run([*control, "stop"], check=True, user=owner, cwd=folder)


def test_a_schema_that_an_upgrade_replaced_comes_back(database: str, tmp_path: Path) -> None:
    """The scripts of MLflow's pod and of the CronJob, on tables as an upgrade leaves them."""
    (backups := tmp_path / "backups").mkdir()
    job = yaml.safe_load(MANIFEST.with_name("backup.yaml").read_text())["spec"]["jobTemplate"]["spec"]["template"]
    (backup,) = job["spec"]["containers"]
    server = {"PGHOST": "127.0.0.1", "PGPORT": str(sqlalchemy.make_url(database).port)}

    def run(container: dict[str, Any], **more: str) -> bool:
        named = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        script = container["args"][0].replace("/tmp/", f"{tmp_path}/").replace("/backups", str(backups))
        env = {**os.environ, **named, **server, **more, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        done = subprocess.run([*container["command"], script], env=env, capture_output=True, check=False)
        return done.returncode == 0

    def ask(query: str) -> list[Any]:
        engine = sqlalchemy.create_engine(database)
        with engine.begin() as connection:
            found = connection.execute(sqlalchemy.text(query))
            rows = list(found.scalars()) if found.returns_rows else []
        engine.dispose()
        return rows

    dump, tables = _manifest("dump"), "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    assert run(dump) and not list(backups.iterdir()), "of an empty database there is nothing to keep"
    ask("CREATE TABLE alembic_version AS SELECT 'old' AS version_num")
    assert run(dump)
    ask("UPDATE alembic_version SET version_num = 'new'; CREATE TABLE later (id int)")
    assert not run(dump, PGPORT=str(free_port())), "a server that does not answer is no empty database"
    assert run(dump) and run(backup)
    names = sorted(path.name for path in backups.iterdir())
    assert [name[:4] for name in names] == ["day-", "sche", "sche"] and names[1:] == [
        "schema-new.dump",
        "schema-old.dump",
    ]
    assert not run(backup, RESTORE="schema-none.dump")
    (today,) = backups.glob("day-*")
    kept = today.stat().st_mtime_ns
    assert not run(backup, RESTORE="") and today.stat().st_mtime_ns == kept, (
        "a variable that was empty overwrites nothing"
    )
    (backups / "schema-cut.dump").write_bytes((backups / "schema-old.dump").read_bytes()[:-200])
    assert not run(backup, RESTORE="schema-cut.dump")
    assert ask(tables) == ["alembic_version", "later"], "a restore that fails changes nothing"
    assert run(backup, RESTORE="schema-old.dump")
    assert ask(tables) == ["alembic_version"] and ask("SELECT version_num FROM alembic_version") == ["old"]


@pytest.fixture
def server(database: str, s3_root: str, tmp_path: Path) -> Iterator[Server]:
    for _ in range(2):  # of an empty database, and of a current one
        command = [sys.executable, "-m", *_manifest("upgrade-schema")["command"], database]
        subprocess.run(command, check=True, capture_output=True)
    with tracking_server(tmp_path, database=database, artifacts=f"{s3_root}/mlflow") as server:
        yield server


@pytest.mark.slow
def test_record_on_postgresql_with_artifacts_in_s3_survives_an_outage(server, s3_root, make_config, monkeypatch):
    monkeypatch.setattr(live, "SEND_EVERY", 0.1)
    config = make_config(f"tracking.uri={server.url}")
    with step_run(config, run="postgresql", step="train") as tracked:
        artifacts = f"{s3_root}/mlflow/{tracked.experiment_id}/{tracked.run_id}/artifacts"
        images = f"{artifacts}/images"
        worker = Worker(LiveMetrics(tracked.uri, tracked.run_id), tracked.folder, since=0)
        worker.train(range(20))
        server.kill()
        worker.train(range(20, 40))
        server.start()
        worker.train(range(40, 50))
        worker.save()
        worker.sink.close(seconds=120)
        lost = Worker(LiveMetrics(DEAD, tracked.run_id), tracked.folder, since=50)
        lost.train(range(50, 60))
        lost.save()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: live.send_missing(tracked.client, tracked.run_id, tracked.folder), range(4)))
        sent = storage.list_names(images)
        live.send_missing(tracked.client, tracked.run_id, tracked.folder)
    assert_once(tracked, 60, previews={49, 59})
    assert tracked.client.get_run(tracked.run_id).info.status == "FINISHED"
    assert storage.list_names(artifacts) == ["config.yaml", "images"]
    assert storage.list_names(images) == sent, "four at once may send a picture twice, but a later one sends none"
    with step_run(config, run="postgresql", step="train") as again:
        assert again.run_id == tracked.run_id
