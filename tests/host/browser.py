"""ComfyUI's own page in a headless Chromium, looked at and clicked as a person does."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import ConsoleMessage, Locator, Page, sync_playwright

from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME

OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
TOLERATED = {
    "what a person who comes for the first time has not saved yet": r"404 .*/(user\.css|api/userdata\b.*)$",
    "the page's own order of starting": r"^ComfyApp graph accessed before initialization",
    "models of the graph that the page starts with": r"huggingface\.co/Comfy-Org/z_image_turbo/",
    "English help, which is asked for under its language first": r"404 .*/docs/\w+/en\.md$",
    "who made a missing node, which the page asks the registry": r"api\.comfy\.org/.*Content Security Policy",
}
TIMEOUT_MS = 120_000  # for a busy machine
VIEW = {"width": 1280, "height": 720}
MARGIN = 30  # around the graph in its picture, in the graph's units

_OPEN = "window.app?.canvas?.graph?.nodes.some(node => node.type.startsWith('TCD'))"
_DRAWN = """() => {
    const shown = app.graph.nodes.filter(node => ["SaveImage", "PreviewImage"].includes(node.type))
    return shown.length && shown.every(node => node.imgs?.length && node.imgs.every(image => image.naturalWidth))
}"""
_SHOWN = """() => app.graph.nodes.flatMap(node => (node.imgs ?? []).map(image =>
    ({node: node.id, type: node.type, width: image.naturalWidth, height: image.naturalHeight})))"""
_SHRINK = """size => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (["width", "height"].includes(widget.name)) widget.value = Math.min(widget.value, size) }"""
_SELECT = """type => {
    const node = app.graph.nodes.find(node => node.type === type)
    app.canvas.selectNode(node)
    app.canvas.setDirty(true, true)
}"""
_TITLES = """() => app.graph.nodes.map(({type, title, inputs}) => ({type, title,
    inputs: Object.fromEntries(inputs.map(slot => [slot.name, slot.label ?? slot.localized_name]))}))"""
_FRAME = """margin => {
    const boxes = app.graph.nodes.map(node => node.boundingRect)
    const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])) - margin)
    const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(box => box[i] + box[i + 2])) + margin)
    Object.assign(app.canvas.ds, {scale: 1, offset: [-left, -top]})
    app.canvas.show_info = false
    app.canvas.setDirty(true, true)
    return {width: Math.ceil(right - left), height: Math.ceil(bottom - top)}
}"""
_GRAPH_ALONE = "body * { visibility: hidden } #graph-canvas, .isolate, .isolate * { visibility: visible }"


class Frontend:
    """A page of a host that is open; `errors` are what its console said of them, but for those of TOLERATED."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.add_init_script("localStorage.clear(); sessionStorage.clear()")  # else it opens what was open before
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))

    def open_address(self, template: str) -> None:
        """Open the page at the address that asks it for one of the pack's templates."""
        self.page.goto(f"{self.url}/?template={template}&source={PACK_NAME}")
        self.page.wait_for_function(_OPEN)

    def open_templates(self) -> Locator:
        """Open the template browser at the pack's own part, and return what it shows."""
        self.page.get_by_test_id("side-toolbar").get_by_label("Templates").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(PACK_NAME).click()
        return dialog.get_by_test_id("template-workflows-content")

    def served(self, name: str) -> Any:
        """Return one of the pack's templates as the host serves it."""
        address = f"/api/workflow_templates/{PACK_NAME}/{name}.json"
        return self.page.evaluate("async address => (await fetch(address)).json()", address)

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow as its file is opened."""
        self.page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'test')", workflow)

    def graph(self) -> dict[str, Any]:
        """Return the graph as the page would save it."""
        saved: dict[str, Any] = self.page.evaluate("app.graph.serialize()")
        return saved

    def titles(self) -> list[dict[str, Any]]:
        """Return {"type", "title", "inputs": {name: label}} of each node, as the page writes them on it."""
        found: list[dict[str, Any]] = self.page.evaluate(_TITLES)
        return found

    def prompt(self) -> dict[str, Any]:
        """Return the prompt that the page would send, {node id: {"class_type", "inputs"}}."""
        prompt = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {node: {key: value[key] for key in ("class_type", "inputs")} for node, value in prompt.items()}

    def shrink(self, size: int = 64) -> None:
        """Type a smaller width and height where the graph has larger ones."""
        self.page.evaluate(_SHRINK, size)

    def close_dialogs(self) -> None:
        while self.page.get_by_role("dialog").count():
            self.page.keyboard.press("Escape")

    def run(self) -> list[dict[str, Any]]:
        """Press Run, wait, and return the pictures in the graph; raises AssertionError with an error's headline."""
        self.press_run()
        self.page.wait_for_function(f"document.querySelector('[data-testid=error-overlay]') || ({_DRAWN})()")
        assert not self.complaint(), self.complaint()
        shown: list[dict[str, Any]] = self.page.evaluate(_SHOWN)
        return shown

    def press_run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def complaint(self) -> str:
        """Return the text of the box that says what is wrong, "" where there is none."""
        box = self.page.get_by_test_id("error-overlay")
        return box.inner_text() if box.count() else ""

    def details(self) -> str:
        """Wait for the box that says what is wrong, press its View details, and return the panel's text."""
        self.page.get_by_test_id("error-overlay-see-errors").click()
        panel = self.page.get_by_test_id("properties-panel")
        panel.get_by_test_id("errors-summary-hero").wait_for()
        return panel.inner_text()

    def replace_node(self) -> str:
        """Open the box that says what is wrong, take its offer for a missing node, and return the panel's text."""
        offer = self.details()
        self.page.get_by_test_id("properties-panel").get_by_role("button", name="Replace Node").click()
        return offer

    def help_page(self, node_type: str) -> str:
        """Select a node of a type, press its info button, and return the panel's text."""
        self.page.evaluate(_SELECT, node_type)
        self.page.get_by_test_id("info-button").click()
        page = self.page.get_by_test_id("properties-panel").locator(".node-help-content")
        page.locator("h1").wait_for()
        return page.inner_text()

    def photograph(self, path: Path, width: int) -> None:
        """Write a picture of the whole graph, and of nothing else, in that many pixels across."""
        self.page.set_viewport_size(self.page.evaluate(_FRAME, MARGIN))
        self.page.evaluate(_FRAME, MARGIN)
        self.page.wait_for_timeout(1000)  # it draws when it finds the time
        picture = Image.open(io.BytesIO(self.page.screenshot(style=_GRAPH_ALONE))).convert("RGB")
        height = round(picture.height * width / picture.width)
        picture.resize((width, height), Image.Resampling.LANCZOS).save(path, quality=80, optimize=True)
        self.page.set_viewport_size(VIEW)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type != "error":
            return
        line = f"{message.text} {message.location.get('url', '')}"
        if not any(re.search(pattern, line) for pattern in TOLERATED.values()):
            self.errors.append(line)


@contextmanager
def open_browser(chromium: Path, url: str) -> Iterator[Frontend]:
    """Start Chromium with one empty page for a host, and end it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        try:
            context = browser.new_context(viewport=VIEW, locale="en-US")
            yield Frontend(context.new_page(), url)
        finally:
            browser.close()
