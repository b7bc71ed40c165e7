"""ComfyUI's own page in headless Chromium, read and clicked as a user does."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import ConsoleMessage, Locator, Page, sync_playwright
from stand_ins import StandIns

from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME, ComfyServer

OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
TOLERATED = {
    "files that a new user has not saved yet": r"404 .*/(user\.css|api/userdata\b.*)$",
    "a known startup order of the page": r"^ComfyApp graph accessed before initialization",
    "models of the graph that the page opens first": r"huggingface\.co/Comfy-Org/z_image_turbo/",
    "English help, which is first requested as a translation": r"404 .*/docs/\w+/en\.md$",
    "a missing node's author, requested from the registry": r"api\.comfy\.org/.*Content Security Policy",
}
TIMEOUT_MS = 120_000  # long enough for a busy machine
VIEW = {"width": 1280, "height": 720}
MARGIN = 30  # around the graph in its screenshot, in graph units

_OPEN = "window.app?.canvas?.graph?.nodes.some(node => node.type.startsWith('TCD'))"
_DRAWN = """() => {
    const shown = app.graph.nodes.filter(node => ["SaveImage", "SaveAnimatedWEBP", "PreviewImage"].includes(node.type))
    return shown.length && shown.every(node => node.imgs?.length && node.imgs.every(image => image.naturalWidth))
}"""
_SHOWN = """() => app.graph.nodes.flatMap(node => (node.imgs ?? []).map(image =>
    ({node: node.id, type: node.type, width: image.naturalWidth, height: image.naturalHeight})))"""
_SET_WIDGETS = """values => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    widget.value = values[node.type]?.[widget.name] ?? widget.value }"""
_SELECT = """type => {
    const node = app.graph.nodes.find(node => node.type === type)
    app.canvas.selectNode(node)
    app.canvas.setDirty(true, true)
}"""
_TITLES = """() => app.graph.nodes.map(({type, title, inputs}) => ({type, title,
    inputs: Object.fromEntries(inputs.map(slot => [slot.name, slot.label ?? slot.localized_name]))}))"""
_PREVIEW = """type => {
    const node = app.graph.nodes.find(node => node.type === type)
    return node.imgs?.length && node.widgets.find(widget => widget.name === "$$node-text-preview")?.value
}"""
_SHOW = """outputs => { for (const [node, output] of Object.entries(outputs))
    app.api.dispatchCustomEvent("executed", {node, display_node: node, output}) }"""
_VIEW = "() => ({scale: app.canvas.ds.scale, offset: [...app.canvas.ds.offset]})"
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
    """An open page of a host; `errors` are the errors on its console, except those in TOLERATED."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.add_init_script("localStorage.clear(); sessionStorage.clear()")  # otherwise it opens the previous workflow
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))

    def open_address(self, template: str) -> None:
        """Open the page with the URL that selects one of the pack's templates."""
        self.page.goto(f"{self.url}/?template={template}&source={PACK_NAME}")
        self.page.wait_for_function(_OPEN)

    def open_templates(self) -> Locator:
        """Open the template browser at the pack's section, and return what it shows."""
        self.page.get_by_test_id("side-toolbar").get_by_label("Templates").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(PACK_NAME).click()
        return dialog.get_by_test_id("template-workflows-content")

    def served(self, name: str) -> Any:
        """Return one of the pack's templates as the host serves it."""
        address = f"/api/workflow_templates/{PACK_NAME}/{name}.json"
        return self.page.evaluate("async address => (await fetch(address)).json()", address)

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow in the way that its file would be opened."""
        self.page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'test')", workflow)

    def graph(self) -> dict[str, Any]:
        """Return the graph as the page would save it."""
        saved: dict[str, Any] = self.page.evaluate("app.graph.serialize()")
        return saved

    def titles(self) -> list[dict[str, Any]]:
        """Return {"type", "title", "inputs": {name: label}} of each node, as displayed."""
        found: list[dict[str, Any]] = self.page.evaluate(_TITLES)
        return found

    def prompt(self) -> dict[str, Any]:
        """Return the prompt that the page would send, {node id: {"class_type", "inputs"}}."""
        prompt = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {node: {key: value[key] for key in ("class_type", "inputs")} for node, value in prompt.items()}

    def set_widgets(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Set widgets of all nodes of a type, {type: {name: value}}."""
        self.page.evaluate(_SET_WIDGETS, values)

    def close_dialogs(self) -> None:
        while self.page.get_by_role("dialog").count():
            self.page.keyboard.press("Escape")

    def run(self) -> list[dict[str, Any]]:
        """Press Run, wait, and return the images in the graph; raises AssertionError with the headline of an error."""
        self.press_run()
        self.wait_for_pictures()
        shown: list[dict[str, Any]] = self.page.evaluate(_SHOWN)
        return shown

    def press_run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def cancel_run(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").click()

    def wait_for_pictures(self, timeout_ms: int = TIMEOUT_MS) -> None:
        """Wait until each node that shows pictures has them; raises AssertionError with the headline of an error."""
        finished = f"document.querySelector('[data-testid=error-overlay]') || ({_DRAWN})()"
        self.page.wait_for_function(finished, timeout=timeout_ms)
        assert not self.complaint(), self.complaint()

    def wait_for_preview(self, node_type: str) -> str:
        """Wait until a node that runs shows a preview picture, and return its line of text."""
        text: str = self.page.wait_for_function(_PREVIEW, arg=node_type).json_value()
        return text

    def show(self, outputs: Mapping[str, Any]) -> None:
        """Show the outputs of another run, {node id: output} as in the host's history."""
        self.page.evaluate(_SHOW, outputs)
        self.page.wait_for_function(_DRAWN)

    def complaint(self) -> str:
        """Return the text of the error box, or "" if there is none."""
        box = self.page.get_by_test_id("error-overlay")
        return box.inner_text() if box.count() else ""

    def details(self) -> str:
        """Wait for the error box, press its View details, and return the panel's text."""
        self.page.get_by_test_id("error-overlay-see-errors").click()
        panel = self.page.get_by_test_id("properties-panel")
        panel.get_by_test_id("errors-summary-hero").wait_for()
        return panel.inner_text()

    def replace_node(self) -> str:
        """Open the error box, accept its replacement of a missing node, and return the panel's text."""
        offer = self.details()
        self.page.get_by_test_id("properties-panel").get_by_role("button", name="Replace Node").click()
        return offer

    def help_page(self, node_type: str) -> str:
        """Select a node of this type, press its info button, and return the panel's text."""
        self.page.evaluate(_SELECT, node_type)
        self.page.get_by_test_id("info-button").click()
        page = self.page.get_by_test_id("properties-panel").locator(".node-help-content")
        page.locator("h1").wait_for()
        return page.inner_text()

    def photograph(self, path: Path, width: int) -> None:
        """Save a screenshot of the complete graph alone, with this width in pixels."""
        view = self.page.evaluate(_VIEW)
        self.page.set_viewport_size(self.page.evaluate(_FRAME, MARGIN))
        self.page.evaluate(_FRAME, MARGIN)
        self.page.wait_for_timeout(1000)  # the page draws asynchronously
        picture = Image.open(io.BytesIO(self.page.screenshot(style=_GRAPH_ALONE))).convert("RGB")
        height = round(picture.height * width / picture.width)
        picture.resize((width, height), Image.Resampling.LANCZOS).save(path, quality=80, optimize=True)
        self.page.set_viewport_size(VIEW)
        self.page.evaluate("view => Object.assign(app.canvas.ds, view)", view)  # what is out of sight is not drawn

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type != "error":
            return
        line = f"{message.text} {message.location.get('url', '')}"
        if not any(re.search(pattern, line) for pattern in TOLERATED.values()):
            self.errors.append(line)


@contextmanager
def open_browser(chromium: Path, url: str) -> Iterator[Frontend]:
    """Yield a Chromium with one empty page for a host, and close it afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        try:
            context = browser.new_context(viewport=VIEW, locale="en-US")
            yield Frontend(context.new_page(), url)
        finally:
            browser.close()


@contextmanager
def open_page(
    chromium: Path, server: ComfyServer, stand_ins: StandIns, workflows: Mapping[str, Any], first: str
) -> Iterator[Frontend]:
    """Yield the page with the workflow `first` open; every file that a workflow names exists before it asks for lists.

    Those of the first are provided last, because both official TCD LoRAs have the same name.
    """
    for workflow in workflows.values():
        stand_ins.provide(workflow)
    server.post("/settings/Comfy.TutorialCompleted", True)
    with open_browser(chromium, server.url) as frontend:
        stand_ins.provide(workflows[first])
        frontend.open_address(first)
        yield frontend
