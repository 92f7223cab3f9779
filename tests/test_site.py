"""The documentation's site: it builds without a warning, and has every option, every public name and no dead link."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grounded_diffusion.engine as engine
from grounded_diffusion.engine.cli import infer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.mark.slow
def test_no_link_leads_nowhere(site):
    for page in site.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:", "data:", "/")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_it_has_every_page(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "options", "api", "changelog"}
    assert pages <= {path.stem for path in site.glob("*.html")}
    assert not list(site.rglob("site.py"))


@pytest.mark.slow
def test_it_has_every_option(site):
    text = (site / "options.html").read_text(encoding="utf-8")
    options = re.findall(r"--[a-z-]+", infer.build_parser().format_help())
    assert [option for option in set(options) if option not in text] == []
    assert all(command in text for command in ("gd-dataset convert", "gd-train head", "gd-export", "gd-bench speed"))


@pytest.mark.slow
def test_it_has_every_public_name(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in engine.__all__ if f'id="{name.lower()}"' not in text] == []
    assert "min_area over max_area" in text  # of a docstring


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r'<(?:script|img)[^>]* src="https?:[^"]*|<link[^>]* rel="stylesheet"[^>]* href="http', text
        )
