"""README and documentation: their code runs, the site builds without warnings and loads nothing from other hosts."""

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from PIL import Image

from bagel_rt.cli import app
from bagel_rt.models.bagel.settings import HYPERPARAMETERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"
CODE = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
NOT_RUN = {  # the reasons given on each page, in order
    "drop-in": ["needs the official modules", "needs the published weights", "needs the official modules"],
    "replicas": ["needs Ray and GPUs"],
    "server": ["needs a running server", "starts a server"],
}
PRINTED = {"README": "blue", "index": "star", "python": "cancelled"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads to show a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.addresses = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Record the address of a tag that loads something."""
        name = {"link": "href", "object": "data", "use": "href"}.get(tag, "src")
        if tag != "a" and dict(attributes).get(name):
            self.addresses.append(dict(attributes)[name])


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        assert not [a for a in Loaded(page).addresses if re.match(r"(https?:)?//", a)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_generated_parts_are_filled_in(site):
    for page in site.rglob("*.html"):
        assert "{{" not in page.read_text(encoding="utf-8"), f"{page}: unknown part, see docs/from_code.py"
    memory = (site / "troubleshooting" / "index.html").read_text(encoding="utf-8")
    assert "33.7 GB" in memory and "36.1 GB" in memory  # as the README says
    reference = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert "cfg_text_scale" in reference and ":class:" not in reference
    assert not list(site.rglob("*.py"))


def test_every_command_has_a_section():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"\n## {name}\n" in page and f"{{{{ help {name} }}}}" in page, name


def test_every_hyperparameter_has_an_example_image():
    page = (DOCS / "hyperparameters.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(DOCS / "hyperparameters.py"))["sheets"]()
    for name in {*HYPERPARAMETERS, *made}:
        assert f"\n### {name}\n" in page and f"(hyperparameters/{name}.webp)" in page, name
        with Image.open(DOCS / "hyperparameters" / f"{name}.webp") as sheet:
            assert sheet.width > 1000
        assert name in made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cfg_renorm_type", "cfg_img_scale", "negative_prompt", "top_p"])
def test_example_images_can_be_regenerated(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hyperparameters.py", name, "--timesteps", "2", "--output", str(tmp_path)])
    runpy.run_path(str(DOCS / "hyperparameters.py"), run_name="__main__")
    assert capsys.readouterr().out.split() == [name]
    with Image.open(tmp_path / f"{name}.webp") as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """Blocks run in order and share their names, as when they are pasted one after the other."""
    monkeypatch.chdir(tmp_path)
    reasons, names = [], {}
    for reason, block in CODE.findall(page.read_text(encoding="utf-8")):
        code = compile(block, page.name, "exec")
        if reason:
            reasons.append(reason)
        else:
            exec(code, names)
    assert reasons == NOT_RUN.get(page.stem, [])
    assert PRINTED.get(page.stem, "") in capsys.readouterr().out


def test_messages_on_the_page_exist():
    """The fixed parts of each message are in the source."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page[page.index("## Messages") : page.index("## Environment variables")]
    source = "".join(
        path.read_text(encoding="utf-8") for name in ("bagel_rt", "kernels") for path in (ROOT / name).rglob("*.py")
    )
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(messages) > 5
    for message in messages:
        assert message.removesuffix("...").strip() in source, message


def test_readme_is_short_and_its_links_exist():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 9000
    for target in LINK.findall(text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_a_drawn_diagram_is_what_its_program_draws():
    made = runpy.run_path(str(DOCS / "diagrams.py"))
    assert made["spans"](made["shared_style"]()) == (DOCS / "diagrams" / "spans.svg").read_text(encoding="utf-8")
