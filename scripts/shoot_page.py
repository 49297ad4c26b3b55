#!/usr/bin/env python3
"""Pictures of the page for the docs, taken in a real browser on the embedded pair.

    python scripts/shoot_page.py OUT    writes OUT/light.png, OUT/dark.png, OUT/phone.png

Needs the extra `page`, playwright (pip) and chromium (apt).
"""
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tita.decode.ask import load_decoder
from tita.serve.app import create_app
from tita.serve.loop import Loop
from tita.serve.page import mount_page
from tita.serve.serve_cli import serving
from tita.world.embedded import make_scenes

DONE = "() => document.querySelectorAll('.tita-words').length === 2 && !document.querySelector('[aria-busy]')"
LOOKS = dict(light=(1180, 970, "light"), dark=(1180, 970, "dark"), phone=(390, 1500, "light"))


def shoot(browser, url: str, to: Path, width: int, height: int, scheme: str):
    "One picture: an example is asked about, and a word tells what it is worth."
    with browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(url)
        page.locator(".tita-examples button").nth(2).click()
        page.wait_for_selector("#image img")
        page.fill("#question textarea", "Describe the image.")
        page.press("#question textarea", "Enter")
        page.wait_for_function(DONE)
        words = page.locator(".tita-answer").last.locator(".tita-changed")
        words.first.hover()
        page.wait_for_timeout(300)
        page.screenshot(path=to)


def main():
    to = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/page")
    to.mkdir(parents=True, exist_ok=True)
    app = create_app(Loop(load_decoder(lam=.8, form="interpolate"), slots=4))
    mount_page(app, {f"scene-{i}": s.image for i, s in enumerate(make_scenes(8, seed=5), 1)})
    with serving(app) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, look in LOOKS.items():
            shoot(browser, url.replace("/v1", "/page/"), to/f"{name}.png", *look)
        browser.close()


if __name__ == "__main__":
    main()
