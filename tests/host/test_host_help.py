"""Help pages and tooltips that the browser shows for the nodes, in English, Chinese and Japanese."""

import re
import urllib.request
from typing import Any

import pytest

from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME, ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK

LANGUAGES = ("zh", "ja")  # English texts are in the nodes themselves; the browser shows them without a translation
DOCS = PACK / "nodes" / "web" / "docs"
PAPER = "https://arxiv.org/abs/2402.19159"
SYNTAX = set("@{}|")  # the browser's translator reads these as commands
SYMBOLS = {  # the paper's symbol for each input or output name, or for one of a single node
    "eta": "gamma",
    "steps": "N",
    "cfg": "omega",
    "strength_model": "theta",
    "timesteps": "tau_N",
    "scheduler": "tau_n",
    "denoise": "t",
    "TCDSigmas.model": "t",
    "TCDLoraLoader.model": "f_theta",
    "TCDLoraModelLoader.model": "f_theta",
    "TCDDistill.model": "f_phi",
    "TCDDistill.target_time": "s",
    "TCDDistill.guidance_min": "omega",
    "TCDDistill.guidance_max": "omega",
    "TCDSamplingSetup.model": "f_theta",
    "TCDSamplingSetup.MODEL": "gamma",
    "TCDSamplingSetup.SIGMAS": "tau_n",
}
GREEK = {"gamma": "γ", "omega": "ω", "phi": "φ", "theta": "θ", "tau": "τ"}
CHINESE_OR_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nodes(server: ComfyServer) -> dict[str, Any]:
    """The pack's nodes by id, as the host describes them to the browser."""
    module = f"custom_nodes.{PACK_NAME}"
    return {name: info for name, info in server.get("/object_info").items() if info["python_module"] == module}


def _inputs(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = (info["input"].get(group, {}) for group in ("required", "optional"))
    return {name: spec[1] for group in groups for name, spec in group.items()}


def test_everything_is_explained(nodes: dict[str, Any]) -> None:
    assert nodes
    for info in nodes.values():
        assert info["display_name"]
        assert info["description"]
        assert all(info["output_tooltips"])
        for options in _inputs(info).values():
            assert options["tooltip"]


def _is_named(symbol: str, text: str) -> bool:
    """Whether a text contains a symbol as a word of its own: N is neither in Note nor in tau_N."""
    return re.search(rf"(?<![A-Za-z0-9_]){symbol}(?![A-Za-z0-9_])", text) is not None


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_tooltips_name_the_symbols_of_the_paper(
    nodes: dict[str, Any], translations: dict[str, Any], language: str
) -> None:
    met = set()
    for node, info in nodes.items():
        tooltips = {name: options["tooltip"] for name, options in _inputs(info).items()}
        tooltips |= dict(zip(info["output_name"], info["output_tooltips"], strict=True))
        if language != "en":
            found = translations[language]["nodeDefs"][node]
            translated = [each["tooltip"] for part in ("inputs", "outputs") for each in found[part].values()]
            tooltips = dict(zip(tooltips, translated, strict=True))
        for name, tooltip in tooltips.items():
            for key in {name, f"{node}.{name}"} & SYMBOLS.keys():
                met.add(key)
                symbol = SYMBOLS[key]
                if language != "en":
                    symbol = re.sub("|".join(GREEK), lambda found: GREEK[found[0]], symbol)
                assert _is_named(symbol, tooltip), (key, symbol, tooltip)
    assert met == SYMBOLS.keys(), "a name in SYMBOLS that no node has"


@pytest.mark.parametrize("page", ["{node}.md", *(f"{{node}}/{language}.md" for language in LANGUAGES)])
def test_each_node_has_a_help_page(server: ComfyServer, nodes: dict[str, Any], page: str) -> None:
    for node, info in nodes.items():
        url = f"{server.url}/extensions/{PACK_NAME}/docs/{page.format(node=node)}"
        with urllib.request.urlopen(url) as answer:
            assert "text/html" not in answer.headers["Content-Type"], "the browser treats HTML as a missing page"
            text = answer.read().decode("utf-8")
        assert text.startswith("# ")
        assert PAPER in text
        for name, options in _inputs(info).items():
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            if "min" in options:
                _, _, _, span, default, *_ = row.split("|")
                assert [float(number) for number in re.findall(r"-?\d+", span)] == [options["min"], options["max"]]
                assert float(default) == options["default"]
        for name in info["output_name"]:
            assert re.search(rf"^\| {name} \|", text, re.MULTILINE)
        assert (CHINESE_OR_JAPANESE.search(text) is None) == (page == "{node}.md")


def test_the_page_about_the_graph_has_each_input_and_the_same_presets(nodes: dict[str, Any]) -> None:
    page = (PACK / "docs" / "graph.md").read_text(encoding="utf-8")
    rows = page.split("## Inputs")[1].split("\n## ")[0].splitlines()
    named = [name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(_inputs(nodes["TCDDistill"]))
    presets = page.split("## Presets\n\n")[1].split("\n\n")[0]
    assert f"{presets}\n\n" in (DOCS / "TCDDistill.md").read_text(encoding="utf-8")


def test_every_help_page_belongs_to_a_node(nodes: dict[str, Any]) -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    assert pages == {f"{node}{end}" for node in nodes for end in (".md", *(f"/{each}.md" for each in LANGUAGES))}


@pytest.fixture(scope="module")
def translations(server: ComfyServer) -> dict[str, Any]:
    return dict(server.get("/i18n"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_node_input_and_output_is_translated(
    nodes: dict[str, Any], translations: dict[str, Any], language: str
) -> None:
    found = translations[language]["nodeDefs"]
    assert set(found) & set(nodes) == set(nodes)
    for node, info in nodes.items():
        translated = found[node]
        assert set(translated) == {"display_name", "description", "inputs", "outputs"}
        assert list(translated["inputs"]) == list(_inputs(info)), "exactly the inputs of the node"
        assert list(translated["outputs"]) == [str(i) for i in range(len(info["output"]))]
        assert CHINESE_OR_JAPANESE.search(translated["description"])
        for each in (*translated["inputs"].values(), *translated["outputs"].values()):
            assert set(each) == {"name", "tooltip"}
            assert each["name"]
            assert CHINESE_OR_JAPANESE.search(each["tooltip"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_translation_is_read_as_a_command(
    nodes: dict[str, Any], translations: dict[str, Any], language: str
) -> None:
    def texts(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else [text for each in value.values() for text in texts(each)]

    found = translations[language]["nodeDefs"]
    assert not SYNTAX & set("".join(text for node in nodes for text in texts(found[node])))


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_names_survive_translation(
    nodes: dict[str, Any], translations: dict[str, Any], language: str
) -> None:
    # Numbers and identifiers are the same in each language: 999,759,499,259; 0.3; SamplerCustom; models/loras.
    kept = re.compile(r"\d+(?:[.,]\d+)*|SamplerCustom\w*|sgm_uniform|models/\w+|\beta\b|\bcfg\b")

    def words(text: str) -> set[str]:
        return set(kept.findall(text)) - {"0", "1", "1.0"}  # these may be added or dropped in translation

    for node, info in nodes.items():
        found = translations[language]["nodeDefs"][node]
        assert words(info["description"]) <= words(found["description"])
        for name, options in _inputs(info).items():
            assert words(options["tooltip"]) <= words(found["inputs"][name]["tooltip"]), (node, name)
        for i, tooltip in enumerate(info["output_tooltips"]):
            assert words(tooltip) <= words(found["outputs"][str(i)]["tooltip"]), (node, i)


def test_only_help_pages_are_served_to_the_browser() -> None:
    assert {path.suffix for path in (PACK / "nodes" / "web").rglob("*") if path.is_file()} == {".md"}
