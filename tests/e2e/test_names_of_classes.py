"""Names of classes that would be paths, keys, markup or code go as text from images to every place that shows them."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from do import do
from experiments import tiny
from image_folders import Formats, files_below, put
from markdown_it import MarkdownIt
from ray import serve
from refused import refused
from served import ask

from components import publish_pictures
from ncsn.cli import app
from ncsn.config import Config, ConfigError, flatten, from_yaml, overrides_between, to_yaml
from ncsn.data.format import class_slug
from ncsn.data.sources import open_source
from ncsn.distributed.cluster import ray_cluster
from ncsn.model.checkpoint import load_checkpoint
from ncsn.report.pages import render
from ncsn.report.words import utility_sentence
from ncsn.runs.metrics import Estimate
from ncsn.runs.record import Outcome
from ncsn.serving import app as serving
from ncsn.tracking.client import client_at, tracking_uri

NAMES = sorted(
    (
        ' "); raise SystemExit("',
        "a/b",
        "a-b",
        "../../outside",
        "...",
        "x" * 255,
        "猫 😀 \u202e",
        "Food & Drink=20",
        'crack"><script>alert(1)</script>',
        "<img src=x onerror=alert(1)> &lt;",
        "a | b \\| c",
        "[x](javascript:alert(1)) ![y](z)",
        "``` ` *a* __b__ ~~c~~",
        "{{ 7 * 7 }}{% raw %}",
        "a.b={c: [d",
        "$\\frac{$ [/bold] \\",
        "--> <!-- '",
        "balanced",
        "null",
        "-rf *",
    )
)
EACH = dict.fromkeys(NAMES, 1)


class Elements(HTMLParser):
    """The names of elements of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.texts, self.given = set[str](), list[str](), set[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.given |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def in_table(markdown: str, title: str, *, column: int = 0) -> list[str]:
    """A column of the first table after a title, as a reader sees it; nothing of the page is HTML or a link."""
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown.partition(title)[2])
    marks = {child.type for token in parsed for child in token.children or ()}
    assert marks.isdisjoint({"html_inline", "link_open", "image", "em_open", "strong_open"})
    table = parsed[: [token.type for token in parsed].index("table_close")]
    pairs = [pair for pair in itertools.pairwise(table) if pair[0].type == "td_open"]
    cells = ["".join(child.content for child in token.children or ()) for _, token in pairs]
    return cells[column :: sum(token.type == "th_open" for token in table)]


def pictures_of(names: list[str]) -> dict[str, list[bytes]]:
    draw = np.random.default_rng(0)
    return {name: [Formats.image(draw.integers(0, 256, (8, 8), np.uint8)) for _ in range(6)] for name in names}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on a Parquet file of these classes, which asks for images of each by name."""
    folder = tmp_path_factory.mktemp("names")
    rows = [(png, name) for name, pngs in pictures_of(NAMES).items() for png in pngs]
    pngs, words = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": pa.array(pngs), "label": pa.array(words)}), folder / "images.parquet")
    of_classes = (
        f"data.num_classes={len(NAMES)}",
        f"sampling.label={json.dumps(EACH, ensure_ascii=False)}",
        "sampling.batch_size=20",
    )
    short = ("train.num_images=16", "train.checkpoint_every_images=16", "train.report_every_images=16")
    place = ("data.source=parquet", f"data.root={folder / 'images.parquet'}")
    return tiny(folder / "store", *place, *of_classes, *short, "noise={num_levels: 2, sigma_L: 0.1}")


@pytest.fixture(scope="module")
def results(config: Config) -> dict[str, Any]:
    """Of the steps of a run."""
    found: dict[str, Any] = {}
    with ray_cluster(config):
        for step in ("ingest", "train", "sample", "evaluate", "register", "report"):
            found[step] = do(step, config, "mine")
    return found


def test_folder_and_parquet_give_the_names(config: Config, tmp_path: Path) -> None:
    assert open_source(config.data).class_names == tuple(NAMES)
    files = {name: pngs for name, pngs in pictures_of(NAMES).items() if "/" not in name and not name.startswith(".")}
    root = put(
        tmp_path, {f"{name}/{number}.png": png for name, pngs in files.items() for number, png in enumerate(pngs)}
    )
    data = config.data.model_copy(update={"source": "image_folder", "root": root})
    assert open_source(data).class_names == tuple(files)


def test_names_stay_text_on_card_report_and_pages_of_kfp(
    config: Config, results: dict[str, Any], tmp_path: Path
) -> None:
    client = client_at(tracking_uri(config))
    card = client.get_model_version(results["register"].model, results["register"].version).description
    code = card.partition("```python\n")[2].partition("```\n\n")[0]
    labels = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Dict)]
    assert [ast.literal_eval(each)["label"] for each in labels] == [NAMES[0]]
    assert set(in_table(card, "## Classes")) < {name[:30].strip() for name in NAMES}
    report = Elements(Path(results["report"].uri).read_text())
    assert "script" not in report.tags and "onerror" not in report.given
    assert {name[:30] for name in NAMES} <= set(report.texts)
    gain = Estimate(2.0, 1.0, 3.0)
    for name in NAMES:
        said = utility_sentence("helps", gain, {name: gain}, used=1, wanted=1)
        publish_pictures(SimpleNamespace(path=tmp_path / "page.html"), {said: b"png"})
        shown = Elements((tmp_path / "page.html").read_text())
        assert shown.tags == {"meta", "figure", "img", "figcaption"} and said in shown.texts
        page = render(
            "run_page.md.j2", run="r", outcome=Outcome("FINISHED"), steps={"train": name}, places={}, notes=[said]
        )
        assert in_table(page, "FINISHED", column=1) == [name.strip()]


def test_mlflow_has_a_mapping_by_class_as_one_value(config: Config, results: dict[str, Any]) -> None:
    client = client_at(tracking_uri(config))
    runs = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id])
    steps = {run.data.tags.get("ncsn.step"): run.data for run in runs}
    for data in steps.values():
        assert data.params == {path: str(value) for path, value in flatten(config).items()}
        assert ast.literal_eval(data.params["sampling.label"]) == EACH
    slugs = {name.rpartition("/")[2] for name in steps["evaluate"].metrics if "class_agreement_n1/" in name}
    assert slugs == {class_slug(number, NAMES) for number in range(len(NAMES))}


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_an_export_by_class_has_safe_paths_and_gives_the_names_back(config, results, tmp_path, form: str) -> None:
    asked = [word for name in NAMES for word in ("--class", f"{name}=2")]
    place = ["--run", "mine", "--out", str(tmp_path / "out" / "here")]
    config_file = tmp_path / "config.yaml"
    config_file.write_text(to_yaml(config))
    words = [sys.executable, "-m", "ncsn", "export", "--config", str(config_file), *place, "--format", form, "--json"]
    done = subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == dict.fromkeys(NAMES, 2)
    out = tmp_path / "out" / "here"
    assert files_below(tmp_path) == ["config.yaml", *(f"out/here/{name}" for name in files_below(out))]
    slugs = [class_slug(number, NAMES) for number in range(len(NAMES))]
    data = config.data.model_copy(update={"source": "image_folder" if form == "png" else form, "root": str(out)})
    if form == "png":
        folders = sorted(path.name for path in out.iterdir() if path.is_dir())
        assert folders == slugs and [len(list((out / name).iterdir())) for name in folders] == [2] * len(NAMES)
        assert json.loads((out / "classes.json").read_text()) == dict(zip(slugs, NAMES, strict=True))
        members = {name: (out / name).read_bytes() for name in files_below(out)}
        packed = put(
            tmp_path / "packed", {"export.tar": Formats.tar({f"./{name}": each for name, each in members.items()})}
        )
        assert open_source(data.model_copy(update={"root": packed})).class_names == tuple(NAMES)
    else:
        assert {path.name for path in out.glob("*.parquet")} == {f"{slug}-000000.parquet" for slug in slugs}
    assert sorted(open_source(data).class_names) == NAMES
    assert in_table((out / "README.md").read_text(), "## Images") == [name.strip() for name in NAMES]


def test_what_is_set_or_asked_over_http_is_the_class_or_refused(config, results, monkeypatch) -> None:
    trained = load_checkpoint(results["train"].checkpoint)
    monkeypatch.setattr(serving, "resolve", lambda *_, **__: SimpleNamespace(name="models:/m/1"))
    monkeypatch.setattr(serving, "load_guided", lambda *_, **__: trained)
    handle = serve.run(serving.build({"model": "models:/m@champion"}), _local_testing_mode=True)
    assert json.loads(ask(handle, "GET", "/health").body)["classes"] == NAMES
    text = to_yaml(config)
    for number, name in enumerate(NAMES):
        for label in (name, {name: 1}, str(number)):
            body = json.dumps({"class": label, "number": 1, "format": "npz"}).encode()
            assert ask(handle, "POST", "/images", body).status_code == 200, label
        quoted = json.dumps(name, ensure_ascii=False)
        found = from_yaml(text, overrides=[f"sampling.label={quoted}", f"export.classes={{{quoted}: 3}}"])
        assert (found.sampling.label, found.export.classes) == (name, {name: 3})
        more = from_yaml(text, overrides=[f"export.classes={{{quoted}: 4}}"])
        assert from_yaml(to_yaml(found), overrides=overrides_between(found, more)) == more
        for override in (f"sampling.label={name}", f"export.classes.{name}=3"):
            with suppress(ConfigError):
                found = from_yaml(text, overrides=[override])
                known = (str(found.sampling.label), *found.export.classes)
                assert name.strip(' "') in {each.strip(' "') for each in known}, "quotes are YAML's"
    for label in ("9" * 5000, "no such", ""):
        answer = ask(handle, "POST", "/images", json.dumps({"class": label}).encode())
        assert (answer.status_code, len(bytes(answer.body).splitlines())) == (400, 1)
    for quota in ("x=", "=3", "x=-1", f"x={'9' * 5000}"):
        done = CliRunner().invoke(app, ["export", config.storage.root + "/runs/mine", "--class", quota])
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.stderr
    for name in ("9" * 255, "no such"):
        with refused("export.classes"):
            do("export", from_yaml(text, overrides=[f"export.classes={{{name}: 3}}"]), "mine")
