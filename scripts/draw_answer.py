#!/usr/bin/env python3
"""Draw the first page's picture: one image, what the frozen base says of it, and what it says when aligned.

    python scripts/draw_answer.py [--reward runs/demo/reward]

The picture is chosen by a rule, not by eye: of SCENES test scenes it is the first on which the base names an object
that is not there, and the aligned base names everything that is there and nothing else. How often the aligned answer
is better and how often worse is counted over all of these scenes and written beside the picture. The base is the
embedded world's, seed 0; the reward is what `bash scripts/demo.sh` leaves; the settings are the recommended ones
(`tita.decode.guidance.OWN`). Writes nbs/images/answer.svg, the same for a telephone (answer_narrow.svg, in which the
words stand below the image), and results/answer.json, which holds the same answer at other strengths, too, for the page
about λ.
"""
import argparse, base64, io
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape
from PIL import Image
from tita.core import TitaError, cli, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import OWN
from tita.models import load_vlm
from tita.show.plots import flow, reward_limit, reward_rgba, token_pieces
from tita.world.embedded import ASK, OBJECTS, load_models, make_scenes

ROOT = Path(__file__).resolve().parent.parent
SCENES, SEED = 200, 0
STRENGTHS = 0., .1, .2, .3, .4, .5, .6, .8, 1. # 1 is the reward alone
@dataclass
class Page:
    "Where things stand, in pixels."
    width: int
    image: int # side of the image
    left: int # up to the words
    top: int # down to the words
    marks: tuple # of the legend: right and down to its second part

WIDE = Page(860, 200, left=236, top=32, marks=(260, 0))
NARROW = Page(400, 150, left=18, top=194, marks=(0, 24))
SIZE, STEP = 15, 27 # pixels: of a letter, of a line
STYLE = """
text { font-family: "DejaVu Sans", Verdana, sans-serif; fill: #20242b }
.page { fill: #ffffff; stroke: #d5d9df }
.label { font-size: 12px; fill: #5b6470 }
.word { font-size: 15px }
.true { stroke: #00795a; stroke-width: 2.2 }
.false { stroke: #c44e00; stroke-width: 2.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaed }
  .page { fill: #16181d; stroke: #3a3f47 }
  .label { fill: #a3abb5 }
  .true { stroke: #45c79c }
  .false { stroke: #ff9d5c }
}"""

# What is shown

def named(output) -> list: # in the order in which they are said
    "Objects of the world that an answer names."
    return [text for text, _ in token_pieces(output.token_texts) if text in OBJECTS]

def invented(output, scene) -> set:
    return set(named(output)) - set(scene.objects)

def is_the_one(scene, plain, aligned) -> bool:
    "The rule."
    return bool(invented(plain, scene)) and set(named(aligned)) == set(scene.objects)

def decoder_of(reward: Path) -> AlignedDecoder:
    "The base, guided by a trained reward. Raises `TitaError` if there is none."
    if not (reward/"config.json").is_file():
        raise TitaError(f"{reward}: no reward; `bash scripts/demo.sh` trains one, or name another with --reward")
    base, _, processor = load_models()
    return AlignedDecoder(base, load_vlm(reward), processor, **OWN)

def described(decoder: AlignedDecoder, scenes: list, lam) -> list: # outputs
    "A description of each scene, with a strength for all or for each; at λ = 0 it is the base's, rewards and all."
    asked = [s.image for s in scenes], [ASK["caption"]] * len(scenes)
    return decoder.generate(*asked, max_new_tokens=64, temperature=0., lam=lam)

def at_strengths(decoder: AlignedDecoder, scene) -> list: # rows
    "One scene's description at each of STRENGTHS."
    outputs = described(decoder, [scene] * len(STRENGTHS), list(STRENGTHS))
    return [dict(lam=lam, tokens=o.token_texts, rewards=[round(float(r), 3) for r in o.rewards],
        invented=sorted(invented(o, scene))) for lam, o in zip(STRENGTHS, outputs)]

def counted(scenes, plain, aligned) -> dict: # what the caption tells
    "On how many of all scenes the aligned answer invents fewer and more objects than the base's, and how many in all."
    each = [(len(invented(p, s)), len(invented(a, s))) for s, p, a in zip(scenes, plain, aligned)]
    said = [sum(len(set(named(o))) for o in outs) for outs in (plain, aligned)]
    return dict(scenes=len(scenes), fewer=sum(a < p for p, a in each), more=sum(a > p for p, a in each),
        invented=[sum(pair[i] for pair in each) for i in (0, 1)], named=said)

# How it is drawn

def tag(name: str, text: str = "", **attributes) -> str:
    "An element; underscores in names of attributes are hyphens, `kind` is the class."
    given = {"class" if k == "kind" else k.replace("_", "-"): v for k, v in attributes.items()}
    written = "".join(f' {k}="{v:.1f}"' if isinstance(v, float) else f' {k}="{v}"' for k, v in given.items())
    return f"<{name}{written}>{escape(text)}</{name}>" if text else f"<{name}{written}/>"

def line(x: float, y: float, width: float, kind: str) -> str:
    return tag("line", kind=kind, x1=float(x), y1=float(y), x2=float(x + width), y2=float(y))

def word(text: str, x: float, y: float, width: float, scene) -> list:
    "A word; objects are underlined where they are there, struck out where they are not."
    kind = "" if text not in OBJECTS else "true" if text in scene.objects else "false"
    drawn = [tag("text", text, kind="word", x=float(x + 2), y=float(y), textLength=float(width - 4))]
    if kind:
        drawn.append(line(x + 2, y + (4.5 if kind == "true" else -5), width - 4, kind))
    return drawn

def ground(reward: float, limit: float, x: float, y: float, width: float, height: float, **look) -> str:
    "A colour to lie under something."
    *rgb, opacity = reward_rgba(reward, limit)
    color = "#" + "".join(f"{c:02x}" for c in rgb)
    return tag("rect", x=float(x), y=float(y), width=float(width), height=float(height), fill=color,
        fill_opacity=f"{opacity:.2f}", **look)

def answer(label: str, output, scene, page: Page, y: float, limit: float) -> tuple: # elements, the y below them
    "A label, and below it the words on the colours of their rewards."
    pieces, drawn = token_pieces(output.token_texts), [tag("text", label, kind="label", x=page.left, y=float(y))]
    places = flow(pieces, page.width - page.left - 24, SIZE, pad=2)
    for (text, _), (dx, row, width), reward in zip(pieces, places, output.rewards):
        at = page.left + dx, y + STEP * (row + 1)
        drawn.append(ground(float(reward), limit, at[0], at[1] - 15.5, width, 22., rx=3))
        drawn += word(text, *at, width, scene)
    return drawn, y + STEP * (places[-1][1] + 1)

def legend(page: Page, y: float, limit: float) -> list:
    "What colours and lines say."
    steps, wide = 33, 132
    drawn = [ground(limit * (2 * i / (steps - 1) - 1), limit, page.left + i * wide / steps, y - 10, wide / steps, 12.)
             for i in range(steps)]
    x = page.left + wide + 10
    drawn.append(tag("text", f"reward of a token, −{limit:.1f} to +{limit:.1f} nats", kind="label", x=x, y=float(y)))
    x, y = (x if page is WIDE else page.left) + page.marks[0], y + page.marks[1]
    for dx, kind, told in ((0, "true", "there"), (85, "false", "invented")):
        drawn.append(line(x + dx, y - 4 if kind == "false" else y + 1, 22, kind))
        drawn.append(tag("text", told, kind="label", x=x + dx + 28, y=float(y)))
    return drawn

def picture(scene, side: int) -> str:
    "The scene, pixel by pixel, inside the file."
    out = io.BytesIO()
    scene.image.resize((400, 400), Image.NEAREST).quantize(64).save(out, "PNG", optimize=True)
    data = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return tag("image", x=18, y=18, width=side, height=side, href=data)

def drawing(scene, plain, aligned, page: Page = WIDE) -> str: # SVG
    limit = reward_limit([*plain.rewards, *aligned.rewards])
    first, y = answer("The frozen model: “Describe the image.”", plain, scene, page, float(page.top), limit)
    second, y = answer("The same model, aligned while it writes:", aligned, scene, page, y + 34, limit)
    height = max(y + 50 + page.marks[1], 236)
    sheet = tag("rect", kind="page", x=.5, y=.5, width=page.width - 1, height=float(height - 1), rx=10)
    told = f"The base says: {plain.text} Aligned it says: {aligned.text} In the image are: {', '.join(scene.objects)}."
    body = [tag("title", told), f"<style>{STYLE}</style>", sheet, picture(scene, page.image), *first, *second]
    body += legend(page, height - 20 - page.marks[1], limit)
    size = f'viewBox="0 0 {page.width} {height:.0f}" width="{page.width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, *body, "</svg>"]) + "\n"

@cli
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reward", type=Path, default=ROOT/"runs/demo/reward", help="folder of the reward after DPO")
    decoder, scenes = decoder_of(parser.parse_args().reward), make_scenes(SCENES, SEED)
    answers = scenes, *(described(decoder, scenes, lam) for lam in (0., OWN["lam"]))
    chosen = next((i for i, row in enumerate(zip(*answers)) if is_the_one(*row)), None)
    if chosen is None:
        raise TitaError(f"none of {SCENES} scenes fits the rule; this reward does not help its base")
    for name, page in dict(answer=WIDE, answer_narrow=NARROW).items():
        write_text(ROOT/f"nbs/images/{name}.svg", drawing(*(part[chosen] for part in answers), page))
    facts = counted(*answers) | dict(seed=SEED, chosen=chosen, settings=OWN)
    facts |= dict(strengths=at_strengths(decoder, scenes[chosen]), run=run_info())
    write_json(ROOT/"results/answer.json", facts)
    print({k: v for k, v in facts.items() if k not in ("run", "strengths")})

if __name__ == "__main__":
    main()
