"""The page in Chromium: what people do there, and what they do by mistake."""

from __future__ import annotations

import io
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_model
from tiny_unclip import tiny_unclip

from dalle1 import DallE

pytest.importorskip("gradio", reason="needs the extra web")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROMIUM is None:
    pytest.skip(f"needs one of {', '.join(BROWSERS)} on the PATH", allow_module_level=True)

MILLISECONDS = 300_000  # of a loaded machine: a step takes a fraction of a second on a quiet one
ROW_SECONDS = 0.2
ROWS_MAY_END = threading.Event()
ROWS_MAY_END.set()
RECORD_PREVIEWS = """() => {
  window.previews = new Set();
  new MutationObserver(() => {
    const image = document.querySelector('#preview img');
    if (image) window.previews.add(image.src);
  }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


class Redness:
    """A CLIP that scores how red an image is."""

    def score(self, _: str, images: list[Image.Image], __: int) -> torch.Tensor:
        return torch.tensor([image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images])

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(0)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page of a tiny model that is slow enough to be watched; yield its address."""
    from dalle1.web.page import build_page, launch_page
    from dalle1.web.sampling import Models

    model = tiny_model()

    def slow(prompt: str, on_row: Any, **options: Any) -> Any:
        def after_row(codes: torch.Tensor, rows: int) -> None:
            time.sleep(ROW_SECONDS)
            ROWS_MAY_END.wait(MILLISECONDS / 1000)
            on_row(codes, rows)

        return DallE.candidates(model, prompt, on_row=after_row, **options)

    model.candidates = slow  # type: ignore[assignment]
    models = Models("cpu", "fp32")
    unclip = tiny_unclip()
    unclip.options = replace(unclip.options, steps=2, prior_steps=2)
    models.loaded |= {"tiny": model, "unclip": unclip}
    models.loaded_clip = "redness", Redness()  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = build_page(models, ["tiny", "unclip"], "redness", tmp_path_factory.mktemp("samples"))
        yield launch_page(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Any, address: str) -> Iterator[Any]:
    """Yield a fresh profile, which must request nothing from elsewhere and run no script."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(MILLISECONDS)
    elsewhere: list[str] = []
    own = (address.rstrip("/"), "data:", "blob:")
    context.on("request", lambda r: r.url.startswith(own) or elsewhere.append(r.url))
    context.on("dialog", lambda dialog: elsewhere.append(dialog.message))
    yield context
    context.close()
    assert elsewhere == []


@pytest.fixture
def page(context: Any, address: str) -> Any:
    return opened(context, address)


def opened(context: Any, address: str) -> Any:
    """Open the page in a new tab, with 2 images to sample."""
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    fill(page, "#candidates input", "2")
    return page


def fill(page: Any, selector: str, text: str) -> None:
    page.fill(selector, text)
    page.press(selector, "Tab")


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([at, text]) => document.querySelector(at)?.innerText.includes(text)", arg=[selector, text]
    )


def wait_for_status(page: Any, text: str) -> None:
    wait_for_text(page, "#status", text)


def sample(page: Any, prompt: str | None = None) -> list[Image.Image]:
    """Press the button, wait, and return the images as a user would download them."""
    if prompt is not None:
        page.fill("#prompt textarea", prompt)
    page.click("#start")
    page.wait_for_selector("#cancel")
    page.wait_for_selector("#start")
    return images(page)


def images(page: Any) -> list[Image.Image]:
    page.wait_for_selector("#results img")
    sources = page.locator("#results .thumbnail-item img").evaluate_all(
        "all => all.map(i => i.src)"
    )
    return [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]


def error(page: Any) -> str:
    """Return the error that the page shows in one line, and close it."""
    page.wait_for_selector(".toast-body")
    text = page.inner_text(".toast-body").splitlines()[-1]
    page.locator(".toast-close").first.click()
    page.wait_for_selector(".toast-body", state="detached")
    return text


def test_type_sample_watch_and_sample_again(page: Any, tmp_path: Path) -> None:
    page.fill("#prompt textarea", "a blues")
    page.wait_for_selector("#suggestions label")
    assert "does not know 'blues'" in page.inner_text("#unknown")
    page.locator("#suggestions label", has_text="a blue").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a blue'")
    page.evaluate(RECORD_PREVIEWS)
    page.press("#prompt textarea", "Enter")
    wait_for_status(page, "2 images")
    first = images(page)
    assert page.evaluate("window.previews.size") > 1
    assert [image.info["prompt"] for image in first] == ["a blue"] * 2
    assert '"seed": 0' in first[0].info["settings"]

    page.click("#next-seed")
    page.wait_for_function("document.querySelectorAll('#history img').length == 2")
    second = images(page)
    assert '"seed": 1' in second[0].info["settings"]
    assert second[0].tobytes() != first[0].tobytes()

    page.screenshot(path=tmp_path / "sampled.png", full_page=True)
    page.reload()
    page.wait_for_function("document.querySelectorAll('#history img').length == 2")
    page.locator("#history img").last.click()
    page.wait_for_selector("#results img")
    assert images(page)[0].tobytes() == first[0].tobytes()
    assert page.input_value("#seed input") == "0"


def test_cancel_then_sample(page: Any) -> None:
    fill(page, "#candidates input", "64")
    ROWS_MAY_END.clear()  # so that the job is not over before the click
    page.click("#start")
    page.click("#cancel")
    wait_for_status(page, "Cancelling")
    ROWS_MAY_END.set()
    wait_for_status(page, "Cancelled")
    assert page.locator("#results img").count() == 0
    fill(page, "#candidates input", "2")
    assert len(sample(page)) == 2


def test_two_tabs_do_not_mix(page: Any, context: Any, address: str) -> None:
    other = opened(context, address)
    fill(other, "#seed input", "9")
    for tab, prompt in ((page, "a red"), (other, "a blue")):
        tab.fill("#prompt textarea", prompt)
        tab.click("#start")
    for tab, prompt, seed in ((other, "a blue", 9), (page, "a red", 0)):
        wait_for_status(tab, "2 images")
        for image in images(tab):
            assert image.info["prompt"] == prompt
            assert f'"seed": {seed},' in image.info["settings"]


def test_complete_and_inpaint_a_sample(page: Any, tmp_path: Path) -> None:
    sample(page, "a red")
    page.get_by_role("button", name="Complete it").click()
    page.wait_for_selector("#complete img")
    upper, lower = changes(sample(page))  # the slider is at one half
    assert upper < lower / 4

    page.get_by_role("button", name="Inpaint it").click()
    page.wait_for_selector("#inpaint canvas")
    page.click("#start")
    assert "nothing is painted" in error(page)
    paint_the_bottom(page)
    page.screenshot(path=tmp_path / "painted.png", full_page=True)
    upper, lower = changes(sample(page))
    assert upper < lower / 4


def changes(two: list[Image.Image]) -> tuple[float, float]:
    """Return how far two images differ in their upper quarter, and in the lower one."""
    first, second = (np.asarray(image, np.float32) for image in two)
    differences, quarter = np.abs(first - second), len(first) // 4
    return float(differences[:quarter].mean()), float(differences[-quarter:].mean())


def paint_the_bottom(page: Any) -> None:
    """Paint a stroke along the lower edge of the image in the editor, by the mouse."""
    canvas = page.locator("#inpaint canvas").last  # above the one that shows the background
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle, y = box["x"] + box["width"] / 2, box["y"] + 0.85 * box["height"]
    page.mouse.move(middle - 100, y)
    page.mouse.down()
    page.mouse.move(middle + 100, y, steps=5)
    page.mouse.up()


def test_the_inpainted_image_may_be_of_any_size(page: Any, tmp_path: Path) -> None:
    from dalle1.web.sample_tab import square

    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (10_000, 5_000), 200).save(tmp_path / "large.png")
    page.get_by_role("tab", name="Inpaint").click()
    open_in_editor(page, tmp_path / "text.png")
    assert "text.png is not a readable image" in error(page)
    open_in_editor(page, tmp_path / "large.png")
    page.wait_for_selector("#inpaint [aria-label='Brush Size']")
    page.click("#start")
    assert "nothing is painted" in error(page)
    # Its browser would show one this large as black.
    assert square(str(tmp_path / "large.png")).getcolors() == [(512 * 512, (200, 200, 200))]


def open_in_editor(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#inpaint-open")
    chooser.value.set_files(path)


def test_a_dalle_2_samples_varies_blends_and_edits(page: Any, tmp_path: Path) -> None:
    for name in ("cat", "sky"):
        Image.new("RGB", (40, 30), (200, 60, 60)).save(tmp_path / f"{name}.png")
    tab = page.get_by_role("tab", name="DALL·E 2")
    assert not tab.is_visible()
    fill(page, "#model input", "unclip")
    tab.wait_for()
    assert len(sample(page, "a red")) == 2
    page.get_by_role("button", name="Vary it").click()
    page.wait_for_selector("#unclip-image img")
    fill(page, "#unclip-steps input", "2")
    page.click("#vary")
    wait_for_text(page, "#unclip-status", "variations of 00: 4 images")
    assert page.locator("#unclip-results .thumbnail-item img").count() == 4

    page.set_input_files("#unclip-image input[type=file]", tmp_path / "cat.png")
    page.get_by_role("tab", name="Blend").click()
    page.click("#blend")
    assert "no image is open" in error(page)
    page.set_input_files("#other-end input[type=file]", tmp_path / "sky.png")
    page.wait_for_selector("#other-end img")
    page.click("#blend")
    wait_for_text(page, "#unclip-status", "cat to sky: 4 images")

    page.get_by_role("tab", name="Text diff").click()
    page.click("#edit")
    assert "prompt is empty" in error(page)
    page.fill("#after textarea", "a blue")
    page.press("#after textarea", "Enter")
    wait_for_text(page, "#unclip-status", "cat from nothing to a blue: 4 images")
    page.screenshot(path=tmp_path / "unclip.png", full_page=True)


def test_bad_input_gets_one_line(page: Any, tmp_path: Path) -> None:
    page.fill("#prompt textarea", "x" * 10_000)
    page.click("#start")
    assert "prompt has 10000 characters" in error(page)
    for selector, text, message in (
        ("#candidates input", "1000", "number of images is 1000, expected 1 to 64"),
        ("#seed input", "9" * 23, "seed is"),
        ("#guidance input", "-2", "guidance is -2"),
    ):
        before = page.input_value(selector)
        page.fill("#prompt textarea", "a red")
        fill(page, selector, text)
        page.click("#start")
        assert message in error(page)
        fill(page, selector, before)

    page.get_by_role("tab", name="Complete").click()
    page.click("#start")
    assert "no image is open" in error(page)
    (tmp_path / "text.png").write_text("not an image")
    page.set_input_files("#complete input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#complete img")
    page.click("#start")
    assert "text.png is not a readable image" in error(page)
    assert "Nothing was sampled" in page.inner_text("#status")

    fill(page, "#model input", "/no/such/<b>folder</b>")
    assert "no model at /no/such/<b>folder</b>" in error(page)


def test_large_images_and_markup_are_harmless(page: Any, tmp_path: Path) -> None:
    name = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.new("L", (10_000, 5_000), 200).save(name)
    page.get_by_role("tab", name="Complete").click()
    page.set_input_files("#complete input[type=file]", name)
    page.wait_for_selector("#complete img")
    prompt = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    assert sample(page, prompt)[0].info["prompt"] == prompt
    assert "'script'" in page.inner_text("#unknown")
    page.wait_for_selector("#history img")


def test_rerank(page: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.png" for name in ("blue", "red", "text")]
    for path, colour in zip(files, ((0, 0, 255), (255, 0, 0)), strict=False):
        Image.new("RGB", (32, 32), colour).save(path)
    files[2].write_text("not an image")
    page.get_by_role("tab", name="Rerank").click()
    page.set_input_files("#rank-files input[type=file]", files)
    page.wait_for_function("document.querySelectorAll('#rank-files .file').length == 3")
    page.fill("#rank-prompt textarea", "red")
    page.click("#rank")
    page.wait_for_selector("#ranked img")
    assert page.locator("#ranked .caption-label").all_inner_texts() == ["1.000", "0.000"]
    assert "1 of 3 files cannot be read" in error(page)


def test_look_inside(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 60, 60)).save(tmp_path / "red.png")
    page.get_by_role("tab", name="Look inside").click()
    page.click("#encode")
    assert "no image is open" in error(page)
    page.set_input_files("#inside-image input[type=file]", tmp_path / "red.png")
    page.wait_for_selector("#inside-image img")
    page.click("#encode")
    page.wait_for_selector("#codes img")
    page.wait_for_function("document.querySelector('#words').innerText.includes('Row 2, column 2')")
    assert re.search(r"\d\.\d\d on average", page.inner_text("#mean"))
    page.click("#seen img", position={"x": 60, "y": 60})
    page.wait_for_function("document.querySelector('#words').innerText.includes('Row 0, column 0')")
    page.screenshot(path=tmp_path / "inside.png", full_page=True)


def test_phone_and_keyboard(browser: Any, address: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    context.set_default_timeout(MILLISECONDS)
    page = opened(context, address)
    page.focus("#prompt textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a red")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "start"
    page.keyboard.press("Enter")
    wait_for_status(page, "2 images")
    assert images(page)[0].info["prompt"] == "a red"
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
