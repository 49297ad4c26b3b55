"The page in a real browser: drop, ask, both answers stream, controls, keyboard, links, code, keys, phone and dark."
import asyncio
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed: pip install 'tita[serve]'")
pytest.importorskip("gradio", reason="the page extra is not installed: pip install 'tita[page]'")
import torch
from tita.core import TitaError, data_url
from tita.decode.decoder import AlignedDecoder
from tita.serve.app import create_app
from tita.serve.loop import Loop
from tita.serve.page import Page, mount_page
from tita.serve.serve_cli import serving
from tita.world.embedded import load_models, make_scenes

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
BASE, REWARD, PROCESSOR = load_models()
DECODER = AlignedDecoder(BASE, REWARD, PROCESSOR, form="interpolate", lam=.8)
SCENES = make_scenes(4, seed=5)
QUESTION = "Describe the image."


class Closing:
    "Between app and browser: counts the streams of news, and holds back the word that one is closed, while told to."
    def __init__(self):
        self.streams, self.has_closed, self.may_tell = 0, False, True

    def around(self, app):
        async def handle(scope, receive, send):
            async def pass_on(message):
                if b"close_stream" in message.get("body", b""):
                    self.has_closed = True
                    while not self.may_tell:
                        await asyncio.sleep(.01)
                await send(message)
            is_stream = scope.get("path", "").endswith("/queue/data")
            self.streams += is_stream
            try:
                await app(scope, receive, pass_on)
            finally:
                self.streams -= is_stream
        return handle


def wait_for(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(.02)


@contextmanager
def served(keys=(), step=0., closing=None, **kwargs):
    "A server with its page: the page's address, and its loop. A step takes `step` seconds more than it needs."
    loop = Loop(DECODER, slots=4)
    app = create_app(loop, keys=keys)
    mount_page(app, {f"scene-{i}": s.image for i, s in enumerate(SCENES)})
    if closing:
        app.add_middleware(closing.around)
    if step:
        quick = loop.engine.step
        loop.engine.step = lambda: (time.sleep(step), quick())[1]
    with serving(app, **kwargs) as url:
        yield url.replace("/v1", "/page/"), loop


def own(scene, decoder=DECODER, n=64):
    return decoder.generate(scene.image, QUESTION, n, temperature=0.)[0].text


def test_gradio_fetches_no_address():
    app = create_app(Loop(DECODER, slots=2))
    blocks = Page(app.state.service).blocks()
    for block in blocks.blocks.values():
        with pytest.raises(TitaError, match="not its address"):
            asyncio.run(block.async_move_resource_to_block_cache("http://127.0.0.1:1/x.png"))


def test_only_who_has_the_key_sees_the_page():
    import httpx
    with served(keys=("a-key",)) as (url, _):
        refused = httpx.get(url)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(url.replace("/page/", "/v1/models")).headers.get("www-authenticate") is None
        assert httpx.get(url, auth=("anybody", "a-key")).status_code == 200
        assert httpx.get(url, auth=("a-key", "")).status_code == 401


# In the browser.

@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium on PATH: apt-get install chromium")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, **how):
    "A page that says nothing wrong and asks nobody else."
    with browser.new_context(**how) as context:
        page, wrong = context.new_page(), []
        page.set_default_timeout(60_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("requestfailed", lambda r: wrong.append(f"{r.url} {r.failure}") if "ABORTED" not in r.failure else None)
        page.on("request", lambda r: wrong.append(r.url) if is_elsewhere(r.url, url) else None)
        page.goto(url)
        page.wait_for_selector("#question textarea")
        yield page
        assert not wrong


def is_elsewhere(url, home):
    return urlsplit(url).scheme.startswith("http") and urlsplit(url).netloc != urlsplit(home).netloc


DROP = """([url, selector]) => fetch(url).then(r => r.blob()).then(blob => {
  const data = new DataTransfer();
  data.items.add(new File([blob], "scene.png", {type: "image/png"}));
  const at = document.querySelector(selector);
  for (const kind of ["dragenter", "dragover", "drop"])
    at.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
})"""

WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => window.seen.push([...document.querySelectorAll(".tita-answer")].map(
    a => [a.querySelectorAll(".tita-word").length, a.querySelector("[aria-busy]") !== null]))).observe(
    document.querySelector("#talk"), {childList: true, subtree: true});
}"""


def drop(page, scene):
    page.evaluate(DROP, [data_url(scene.image), "#image button"])
    page.wait_for_selector("#image img")


def ask(page, question=QUESTION):
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    answer_to(page, question)


def answer_to(page, question):
    "Wait for its beginning."
    last = "[...document.querySelectorAll('.tita-turn h2')].at(-1)"
    page.wait_for_function(f"q => {last}?.textContent === q", arg=question)


def answers(page):
    "What both models said to the last question, when both are done."
    page.wait_for_function("""() => {
        const last = [...document.querySelectorAll('.tita-turn')].at(-1);
        return last && last.querySelectorAll('.tita-words').length === 2 && !last.querySelector('[aria-busy]')}""")
    return [t.strip() for t in page.locator(".tita-turn").last.locator(".tita-words").all_text_contents()]


def set_slider(page, label, value):
    field = page.get_by_role("slider", name=label)
    field.fill(str(value))


@pytest.mark.slow
def test_drop_ask_and_move_a_slider(chromium):
    said = ((s, own(s, DECODER.alone()), own(s)) for s in SCENES)
    scene, base, aligned = next(s for s in said if s[1] != s[2])
    with served(step=.03) as (url, loop), opened(chromium, url) as page:
        drop(page, scene)
        page.evaluate(WATCH)
        ask(page)
        assert answers(page) == [base, aligned]
        seen = [s for s in page.evaluate("window.seen") if len(s) == 2]
        assert any(all(words > 0 and is_busy for words, is_busy in s) for s in seen), seen
        set_slider(page, "strength", 0)
        page.wait_for_function("""() => {
            const [a, b] = [...document.querySelectorAll('.tita-words')].slice(-2);
            return !a.ariaBusy && !b.ariaBusy && a.textContent === b.textContent}""")
        assert answers(page) == [base, base] and page.locator(".tita-turn").count() == 1
        ask(page, "Is there a car in the image?")
        answers(page)
        assert page.locator(".tita-turn").count() == 2
    assert not loop.running and not loop.waiting


@pytest.mark.slow
def test_words_tell_what_they_are_worth(chromium):
    with served() as (url, _), opened(chromium, url) as page:
        page.locator(".tita-examples button").nth(1).click()
        page.wait_for_selector("#image img")
        ask(page)
        answers(page)
        first, second = (page.locator(".tita-answer").last.locator(".tita-word").nth(i) for i in (0, 1))
        about = page.locator(".tita-answer").last.locator(".tita-about")
        first.hover()
        assert first.text_content().strip() in about.text_content() and "nats" in about.text_content()
        assert about.locator(".tita-row").count() == 5
        page.locator(".tita-answer").last.locator(".tita-word").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == second.text_content()
        assert second.text_content().strip() in about.locator("p b").first.text_content()
        assert about.locator("[data-is-said=true] span").text_content() == second.text_content().strip()
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.nextElementSibling") is None


def copied(page, name):
    page.locator(f"#{name} button[aria-label*=opy]").first.click()
    return page.evaluate("navigator.clipboard.readText()")


@pytest.mark.slow
def test_a_link_and_the_code_say_the_same_again(chromium):
    with served() as (url, _):
        with opened(chromium, url, permissions=["clipboard-read", "clipboard-write"]) as page:
            drop(page, SCENES[2])
            set_slider(page, "strength", .7)
            ask(page)
            want = answers(page)
            page.get_by_text("The same again").click()
            link = page.locator("#link textarea, #link input").first.input_value()
            curl, python = (copied(page, name) for name in ("curl", "python"))
        with opened(chromium, link) as page:
            assert answers(page) == want
            assert page.get_by_role("slider", name="strength").input_value() == "0.7"
            assert page.locator("#image img").count() == 1
        env = dict(os.environ, PYTHONPATH=str(ROOT))
        said = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, env=env)
        assert said.stdout.splitlines() == [f"tita-base {want[0]}", f"tita {want[1]}"], said.stderr
        said = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
        assert want[1] in said.stdout, said.stderr


@pytest.mark.slow
def test_what_people_say_is_no_html(chromium):
    odd = "<img src=x onerror='window.was_run = 1'> & \"it\" `$(touch x)`"
    with served() as (url, _), opened(chromium, url) as page:
        ask(page, odd)
        answers(page)
        assert page.locator(".tita-turn h2").text_content() == odd
        page.goto(f"{url}?{urlencode(dict(q='a', lam=odd))}")
        page.get_by_text("the link is damaged").wait_for()
        page.wait_for_timeout(200)
        assert page.evaluate("window.was_run") is None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(chromium, scheme, width):
    "No sideways scrolling, and every word has a contrast of at least 4.5 on its colour."
    how = dict(viewport=dict(width=width, height=800), color_scheme=scheme)
    with served() as (url, _), opened(chromium, url, **how) as page:
        page.locator(".tita-examples button").first.click()
        page.wait_for_selector("#image img")
        ask(page)
        answers(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
  const rgba = text => (([r, g, b, a = 1]) => [r, g, b, a])(text.match(/[\\d.]+/g).map(Number));
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
  const light = c => c.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4).reduce(
    (sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  return Math.min(...[...document.querySelectorAll(".tita-word")].map(word => {
    const ground = rgba(getComputedStyle(word.closest(".tita-answer")).backgroundColor);
    const behind = over(rgba(getComputedStyle(word).backgroundColor), ground);
    const [a, b] = [behind, rgba(getComputedStyle(word).color).slice(0, 3)].map(light).sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  }));
}"""


@pytest.mark.slow
def test_what_is_asked_while_the_stream_closes_is_answered(chromium):
    "Gradio alone loses it: the server has closed the stream, and the browser does not know yet."
    closing, late = Closing(), "Is there a bus in the image?"
    with served(closing=closing) as (url, _), opened(chromium, url) as page:
        ask(page)
        answers(page)
        wait_for(lambda: closing.streams == 0)
        closing.has_closed = closing.may_tell = False
        ask(page, "Is there a car in the image?")
        answers(page)
        wait_for(lambda: closing.has_closed)
        with page.expect_event("requestfinished", lambda r: "/queue/join" in r.url):
            page.fill("#question textarea", late)
            page.press("#question textarea", "Enter")
        page.evaluate("new Promise(requestAnimationFrame)")
        closing.may_tell = True
        answer_to(page, late)
        answers(page)
        assert page.locator(".tita-turn").count() == 3
        wait_for(lambda: closing.streams == 0)


@pytest.mark.slow
def test_neither_key_nor_question_is_in_the_log(chromium, tmp_path):
    "Of tita-serve --page as a process, whose end is clean though the page is open."
    key, word = "sk-canary-51c2f8", "xylophonecanary"
    command = [sys.executable, "-c", "from tita.serve.serve_cli import main; main()", "--port", "0", "--page"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), TITA_API_KEYS=key, TITA_PROGRESS="0")
    with open(tmp_path/"log", "w") as log:
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    try:
        said = [p.stdout.readline() for _ in range(2)]
        url = said[1].split()[-1]
        with opened(chromium, url, http_credentials=dict(username="anybody", password=key)) as page:
            ask(page, f"Is there a {word}?")
            assert all(answers(page))
            page.goto(f"{url}?{urlencode(dict(q=word, lam=7))}")
            page.locator(".tita-error").first.wait_for()
            p.terminate()
            assert p.wait() == 0
    finally:
        p.kill()
        p.wait()
    text = "".join(said) + p.stdout.read() + (tmp_path/"log").read_text()
    assert '"event": "request"' in text and key not in text and word not in text


@pytest.mark.slow
def test_the_server_ends_though_a_page_is_open(chromium):
    "Else it would wait for the page, as long as it waits for answers."
    with chromium.new_context() as context:
        page = context.new_page()
        with served(drain=3600.) as (url, _):
            page.goto(url)
            page.wait_for_selector("#question textarea")
