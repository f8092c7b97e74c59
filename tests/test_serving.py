"""The page itself: built without a word to the network, and used in a browser as a person uses it."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from momatch.cli import main
from momatch.cli.serve.comparison import Choice
from momatch.cli.serve.page import build
from momatch.evaluation.report.plots import image_grid
from momatch.interop.load import load_any

gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra serve)")
gradio_client = pytest.importorskip("gradio_client", reason="it comes with gradio")
PATIENCE = 180  # seconds; a busy machine is slow
TEACHER = [
    "--network.channels", "8", "16", "--network.attention-levels", "--sampling-steps", "4",
    "--train.num-steps", "4", "--train.batch-size", "8", "--monitor.every", "0",
]  # fmt: skip
STUDENT = ["--train.num-steps", "4", "--train.batch-size", "8", "--monitor.every", "0"]
CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a student of two or three training steps; its teacher makes four calls."""
    runs = tmp_path_factory.mktemp("runs")
    teacher, student = str(runs / "teacher"), str(runs / "student")
    assert main(["train-teacher", "digits-teacher", "--out", teacher, *TEACHER]) == 0
    assert main(["distill", "digits-4", "--out", student, "--teacher", teacher, *STUDENT]) == 0
    return student


def test_the_page_is_built_and_tells_nobody():
    page = build([Choice("digits", load_any("digits"))])
    assert page.analytics_enabled is False and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    (draw,) = [f for f in page.fns.values() if f.api_name == "draw"]
    assert draw.concurrency_limit == 1 and draw.queue  # one computation at a time


class Page:
    """The page in a browser, by what a person does with it."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        browser.get(address)
        self.until(lambda: self.found("#draw"))

    def found(self, selector):
        shown = self.browser.find_elements("css selector", selector)
        return [element for element in shown if element.is_displayed()]

    def text(self, name):
        return " ".join(element.text for element in self.found(f"#{name}"))

    def until(self, condition):
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:  # the page changed under our hands
                pass
            time.sleep(0.2)
        raise AssertionError(f"not in {PATIENCE} s; the page says: {self.text('problem')!r}")

    def write(self, name, value):
        from selenium.webdriver.common.keys import Keys

        (field,) = self.found(f"#{name} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def choose(self, name, value):
        def pick():
            (option,) = self.found(f"[role=option][aria-label='{value}']")
            option.click()
            return True

        def pick_again():
            try:
                return pick()
            except ValueError:
                self.found(f"#{name} input")[0].click()
                return False

        self.until(pick_again)

    def draw(self):
        self.found("#draw")[0].click()

    def picture(self, name):
        """The picture that is shown, as (height, width) levels."""
        (image,) = self.until(lambda: self.found(f"#{name} img"))
        assert self.until(lambda: int(image.get_property("naturalWidth")))
        with urllib.request.urlopen(image.get_attribute("src")) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # no internet
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def server(run, tmp_path):
    """`momatch serve STUDENT digits` on a free port: its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nowhere = "http://127.0.0.1:9"  # a proxy, which must not stand between the page and itself
    environment = {
        **os.environ,
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
        "PYTHONUNBUFFERED": "1",
        **dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), nowhere),
    }
    command = [sys.executable, "-m", "momatch", "serve", run, "digits", "--port", str(port)]
    log = (tmp_path / "log").open("w+")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    signal.signal(signal.SIGINT, before)
    address, end = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    while f"Open {address}" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.2)
    yield address, process, tmp_path / "log"
    process.kill()
    process.wait()
    log.close()


@pytest.mark.slow
def test_a_student_and_its_teacher_in_a_browser(server, run, browser):
    address, process, log = server
    page = Page(browser, address)
    page.choose("label", "3")
    page.write("num", 4)
    page.write("steps", 2)
    page.draw()
    label = {"label": torch.full((4,), 3)}
    teacher = load_any(run.removesuffix("student") + "teacher")
    for name, model, steps in (("own", load_any(run), 2), ("teacher", teacher, 4)):
        expected = image_grid(model.sample(4, steps, label, seed=0), 2)
        assert np.abs(page.picture(name).astype(int) - expected).max() <= 1  # processes may round otherwise
        said = page.until(lambda name=name: re.search(r"a picture", page.text(f"{name}-caption")))
        assert re.search(rf"{steps} steps, [\d.]+ m?s a picture", said.string)
    assert re.search(r"The student (was|took) [\d.]+ times as", page.until(lambda: page.text("ratio")))
    assert not page.found("#guidance")

    page.write("steps", 17)
    page.draw()
    said = page.until(lambda: page.text("problem"))
    assert said == "steps must be 1 to 16 for a student, got 17; this one was trained for 4 steps"
    assert not page.found("#own img") and not page.found("#teacher img")

    page.choose("run", "digits")
    assert page.until(lambda: page.found("#guidance")) and not page.found("#with-teacher")
    assert page.until(lambda: not page.text("problem")) and not page.found("#teacher")
    page.write("num", 9)
    page.write("steps", 1)
    page.write("seed", 5)
    page.draw()
    expected = image_grid(load_any("digits").sample(9, 1, {"label": torch.arange(9)}, seed=5), 3)
    assert np.abs(page.picture("own").astype(int) - expected).max() <= 1
    assert re.search(r"1 step, [\d.]+ m?s a picture", page.until(lambda: page.text("own-caption")))

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    outside = {
        url for url in urls if not url.startswith((address, "data:", "blob:", "chrome:", "chrome-untrusted:"))
    }
    assert address in urls and not outside  # nothing comes from elsewhere

    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0 and "stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_strangers_get_pictures_and_nothing_else(server, run, tmp_path):
    address, process, log = server
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody may read this")
    for path in (str(secret), f"{run}/config.json", f"{run}/student/model.json", "/etc/passwd"):
        for asked in (
            f"/gradio_api/file={path}",
            f"/file={path}",
            f"/gradio_api/file=.{'/..' * 12}{path}",
            f"/gradio_api/file={urllib.parse.quote(path, safe='')}",
            f"/static/{'../' * 12}{path[1:]}",
            f"/assets/{'%2e%2e/' * 12}{path[1:]}",
            f"/gradio_api/proxy=http://127.0.0.1:1{path}",
            f"/{path}",
        ):
            status, body = requested(address, asked)
            assert 400 <= status < 500, (asked, status, body[:200])
            assert b"nobody may read this" not in body and b"root:" not in body and b'"kind"' not in body

    def draw(seed, label="3", prompt="", num=4):
        client = gradio_client.Client(address, verbose=False, download_files=False)
        return client.predict("digits", num, 1, seed, label, prompt, 0, False, api_name="/draw")

    def problem(found):
        return found[-1]["value"] if isinstance(found[-1], dict) else found[-1]

    for bad in ({"seed": -1}, {"seed": 1e300}, {"seed": 0, "num": 10**9}):
        assert 'class="sentence"' in problem(draw(**bad))
    for label in ("../../etc/passwd", "<script>alert(1)</script>"):  # what no page sends: gradio refuses it
        with pytest.raises(gradio_client.exceptions.AppError):
            draw(0, label)
    assert draw(0, prompt="a" * 2**20)[0]  # a prompt of 1 MB, to a model that takes none

    with ThreadPoolExecutor(20) as clients:
        found = list(clients.map(draw, range(20)))
    model, label = load_any("digits"), {"label": torch.full((4,), 3)}
    for seed, shown in enumerate(found):
        image = shown[0]["value"] if "value" in shown[0] else shown[0]
        with urllib.request.urlopen(image["url"]) as answer:
            levels = np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))
        expected = image_grid(model.sample(4, 1, label, seed=seed), 2)
        assert np.abs(levels.astype(int) - expected).max() <= 1, seed  # each gets its own
    assert process.poll() is None
    said = log.read_text()
    assert said.count("Traceback") == said.count("gradio.exceptions.Error") == 2  # gradio writes these down


def requested(address, path):
    """The status and body of a GET of exactly that path, which no client made tidy first."""
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()
