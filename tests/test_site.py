"""The zoo's page: its figures by hand, and in a real Chromium what a visitor does."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from node_packages import node_modules
from PIL import Image
from run_records import PLAIN, write_run
from torch import Tensor, nn

from hub import build_site
from hub.build_site import SOURCE, SiteConfig, class_order, gain, main, predict
from recipes.studies.report.records import write_record
from tffd_zoo.data import ImageSpec, open_source
from tffd_zoo.model_card import Twin
from tffd_zoo.models import Release, releases
from tffd_zoo.recipe import vary
from tffd_zoo.run_record import RunRecord

STUDENT, TWIN = "tffd_resnet20.c100", "tffd_resnet20.ce_c100"


@pytest.fixture(scope="module")
def entries() -> dict[str, Release]:
    return {entry.name: entry for entry in releases()}


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Soft blobs of colour: something that a network is sure enough of."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(entries: dict[str, Release], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each of CIFAR-100's classes, to train and to test."""
    folder = tmp_path_factory.mktemp("images")
    for number, label in enumerate(entries[STUDENT].label_names):
        for split in ("train", "test"):
            (folder / split / label).mkdir(parents=True)
            for copy in range(2):
                picture(2 * number + copy).save(folder / split / label / f"{copy}.png")
    return folder


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    folder = tmp_path_factory.mktemp("site")
    return SiteConfig((STUDENT, TWIN), to=folder / "page", data=str(data), cache=folder / "cache", timings=2)


@pytest.fixture(scope="module")
def site(config: SiteConfig, entries: dict[str, Release]) -> Path:
    """The page of two students. The second one's measurements are the first one's, which saves half of the time."""
    node_modules()
    main(SiteConfig((STUDENT,), to=config.to, data=config.data, cache=config.cache, timings=2))
    places = [config.cache / f"{name}-{entries[name].sha256[:8]}" for name in (STUDENT, TWIN)]
    shutil.copytree(*places)
    main(config)
    return config.to


def zoo(site: Path) -> list[dict[str, Any]]:
    text = (site / "zoo.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("const ZOO = ").removesuffix(";\n"))["students"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_classes_that_are_confused_stand_together() -> None:
    confusion = torch.zeros(6, 6, dtype=torch.int64)
    for one, two in ((0, 3), (3, 5), (1, 4), (4, 2)):  # two chains: 0 3 5 and 1 4 2
        confusion[one, two] = 9
    order = class_order(confusion).tolist()
    assert {frozenset(order[:3]), frozenset(order[3:])} == {frozenset({0, 3, 5}), frozenset({1, 4, 2})}


class Always(nn.Module):
    """Is sure of class 1, whatever it sees: with e^2 against nine ones."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([0.0, 2.0] + [0.0] * 8).expand(len(images), -1)


def test_confusion_and_calibration_by_hand() -> None:
    source = open_source("digits", "test")
    confusion, bins = predict(Always(), source, ImageSpec((3, 8, 8)))
    ones = int((source.labels == 1).sum())
    assert confusion.sum(dim=0).tolist() == [0, len(source)] + [0] * 8
    assert confusion[1, 1] == ones
    confidence = np.exp(2) / (np.exp(2) + 9)  # 0.451: the seventh of fifteen bins
    assert bins[6].tolist() == pytest.approx([len(source), ones, confidence * len(source)])
    assert bins.sum(dim=0).tolist() == pytest.approx(bins[6].tolist())


def test_the_gain_is_paired_over_seeds_where_there_are_records(entries: dict[str, Release], tmp_path: Path) -> None:
    ours, theirs = entries[STUDENT], entries[TWIN]
    twin = Twin(TWIN, theirs.recipe, theirs.metrics.to_json())
    one = gain(ours, twin, tmp_path)
    difference = ours.metrics.result.top1 - theirs.metrics.result.top1
    assert one == {"mean": pytest.approx(difference), "pairs": 1, "low": None, "high": None}
    for entry, top1 in ((ours, (60.0, 62.0)), (theirs, (61.0, 61.0))):
        name, epochs = entry.recipe["name"], entry.recipe["optim"]["epochs"]
        for seed, value in enumerate(top1):
            run = RunRecord.read(write_run(tmp_path / "runs", vary(PLAIN, name, optim={"epochs": epochs}), seed, value))
            last = {"kind": "eval", "step": 9, "epoch": epochs, "train": {}, "top1": value}
            write_record(replace(run, metrics=(last,)), tmp_path / f"{name}-s{seed}.json")
    # differences -1 and 1: mean 0, standard deviation sqrt 2, t(1) 12.706 over sqrt 2
    several = gain(ours, twin, tmp_path)
    assert several == {
        "mean": pytest.approx(0),
        "pairs": 2,
        "low": pytest.approx(-12.706, abs=1e-3),
        "high": pytest.approx(12.706, abs=1e-3),
    }
    assert gain(theirs, None, tmp_path) is None


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_page_has_the_figures_of_the_manifest(site: Path, entries: dict[str, Release]) -> None:
    for student in zoo(site):
        entry = entries[student["name"]]
        assert (student["top1"], student["ece"]) == (entry.metrics.result.top1, entry.metrics.result.ece)
        assert sum(student["confusion"]) == 200
        assert (site / student["model"]).is_file()
        for stage in student["stages"][STUDENT]:
            assert (site / student["folder"] / stage["salient"]["file"]).is_file()


def test_what_is_measured_is_not_measured_again(
    site: Path, config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_site, "deploy", None)
    main(config)
    assert len(zoo(site)) == 2


def test_the_page_asks_nobody_else() -> None:
    for path in SOURCE.glob("*.*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//cdn|@import", text), path


def test_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else than a page"):
        main(SiteConfig((STUDENT,), to=tmp_path))
    with pytest.raises(ValueError, match=r"no release tffd_resnet21; there are .*tffd_resnet20\.c100"):
        main(SiteConfig(("tffd_resnet21",), to=tmp_path / "new"))


# --- in a browser -----------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(site: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-prefers-reduced-motion",  # what scrolls cannot be clicked
        "--window-size=1200,900",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def until(browser: Any, script: str, seconds: float = 60) -> Any:
    """What `script` returns as soon as that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda found: found.execute_script(script))


ROWS = "return [...document.querySelectorAll('#table tbody th')].map(cell => cell.textContent)"
ANSWERS = """
const items = [...document.querySelectorAll('#answers li')];
return items.length && items.map(item => [item.dataset.class, parseFloat(item.querySelector('.number').textContent)]);
"""
KEPT = """
const has = kept => [".onnx", ".wasm"].every(end => kept.some(({ url }) => url.endsWith(end)));
return caches.keys().then(([name]) => name && caches.open(name).then(cache => cache.keys()).then(has));
"""


def test_a_visitor_classifies_sorts_filters_and_comes_back_without_network(
    site: Path, entries: dict[str, Release], server: http.server.ThreadingHTTPServer, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(f"http://127.0.0.1:{server.server_port}/")

    # the class of a picture that PyTorch is sure of is PyTorch's, the probabilities are those of the int8 file
    model = timm.create_model(STUDENT if zoo(site)[0]["name"] == STUDENT else TWIN, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    pictures = [picture(seed, 57, 40) for seed in range(16)]
    with torch.inference_mode():
        logits = model(torch.stack([transform(each) for each in pictures]))
    surest = int(logits.topk(2).values.diff().argmin())  # the second less the first
    image, expected = pictures[surest], logits[surest].argmax()
    image.save(tmp_path / "picture.png")
    browser.find_element("id", "file").send_keys(str(tmp_path / "picture.png"))
    answers = until(browser, ANSWERS)
    assert answers[0][0] == model.pretrained_cfg["label_names"][expected]
    session = onnxruntime.InferenceSession(site / zoo(site)[0]["model"])
    (probabilities,) = session.run(None, {"images": np.asarray(image)[None]})[0]
    assert [share for _, share in answers] == pytest.approx(sorted(100 * probabilities, reverse=True)[:5], abs=1)

    # sorted by accuracy, then the other way round, by keyboard; by name; filtered
    top1 = {name: entry.metrics.result.top1 for name, entry in entries.items()}
    best, second = sorted((STUDENT, TWIN), key=lambda name: top1[name], reverse=True)
    assert browser.execute_script(ROWS) == [best, second]
    header = browser.find_element("css selector", "[data-key=top1] button")
    header.send_keys(Keys.ENTER)
    assert browser.execute_script(ROWS) == [second, best]
    assert browser.find_element("css selector", "[data-key=top1]").get_attribute("aria-sort") == "ascending"
    browser.find_element("css selector", "[data-key=name] button").click()
    assert browser.execute_script(ROWS) == [STUDENT, TWIN]
    browser.find_element("id", "filter-value").send_keys(f"{(top1[best] + top1[second]) / 2:.2f}")
    assert browser.execute_script(ROWS) == [best]
    assert browser.find_element("id", "count").text == "1 of 2 students"

    # a row leads to its student, whose charts and pictures are there
    browser.find_element("css selector", "#table tbody a").click()
    until(browser, f"return document.getElementById('student-name').textContent === '{best}'")
    assert len(browser.find_elements("css selector", "#student-panel svg")) == 2
    assert browser.find_elements("css selector", "#student-panel .stage img")

    # nothing went elsewhere, and nothing was complained about
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(re.match(r"(http://127\.0\.0\.1:\d+/|blob:|data:)", url) for url in loaded)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []

    # on a phone's screen nothing sticks out
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360

    # without network it opens again, and still classifies
    until(browser, KEPT)
    server.shutdown()
    server.socket.close()
    browser.refresh()
    assert len(browser.execute_script(ROWS)) == 2
    browser.find_element("id", "file").send_keys(str(tmp_path / "picture.png"))
    assert until(browser, ANSWERS)[0][0] == answers[0][0]
