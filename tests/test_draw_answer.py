"The first page's picture: the rule that chooses it, and that it shows what its file of facts says."
import json, sys
import xml.etree.ElementTree as tree
from pathlib import Path
from types import SimpleNamespace

import pytest
from tita.core import TitaError
from tita.world.embedded import make_scenes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import draw_answer

SVG = "{http://www.w3.org/2000/svg}"
FACTS = json.loads((ROOT/"results/answer.json").read_text())
SCENE = make_scenes(FACTS["chosen"] + 1, FACTS["seed"])[-1]

def said(*objects):
    "An output that names these objects."
    tokens = [t for o in objects for t in (" a", f" {o}", " ,")]
    return SimpleNamespace(token_texts=tokens, rewards=[.1 * i for i in range(len(tokens))], text="".join(tokens))

@pytest.mark.parametrize("plain, aligned, fits", [
    (["fish"], [], True), (["fish"], ["star"], False), ([], [], False), (["star", "fish"], [], True)])
def test_rule(plain, aligned, fits):
    "The base invents something; the aligned answer names what is there, no more."
    there = SCENE.objects
    assert not {"fish", "star"} & set(there)
    assert draw_answer.is_the_one(SCENE, said(*there, *plain), said(*there, *aligned)) == fits
    assert not draw_answer.is_the_one(SCENE, said(*there, *plain), said(*there[1:], *aligned))

def test_both_directions_are_counted():
    there = SCENE.objects
    plain = [said(*there, "fish"), said(*there), said(*there)]
    aligned = [said(*there), said(*there, "star", "fish"), said(*there)]
    found = draw_answer.counted([SCENE] * 3, plain, aligned)
    assert (found["fewer"], found["more"], found["invented"]) == (1, 1, [1, 2])
    assert found["named"] == [3 * len(there) + 1, 3 * len(there) + 2]

@pytest.mark.parametrize("page", [draw_answer.WIDE, draw_answer.NARROW], ids=["wide", "narrow"])
def test_drawing_marks_what_is_there_and_what_is_not(page):
    plain, aligned = said(*SCENE.objects, "fish"), said(*SCENE.objects)
    drawn = tree.fromstring(draw_answer.drawing(SCENE, plain, aligned, page))
    ends = [float(t.get("x")) + float(t.get("textLength", 0)) for t in drawn.iter(f"{SVG}text")]
    assert max(ends) < page.width
    words = [t.text for t in drawn.iter(f"{SVG}text") if t.get("class") == "word"]
    assert words == [t.strip() for o in (plain, aligned) for t in o.token_texts]
    kinds = [line.get("class") for line in drawn.iter(f"{SVG}line")]
    in_legend = 1
    assert kinds.count("true") == 2 * len(SCENE.objects) + in_legend
    assert kinds.count("false") == 1 + in_legend

@pytest.mark.parametrize("name", ["answer", "answer_narrow"])
def test_the_picture_shows_what_the_facts_say(name):
    path = ROOT/f"nbs/images/{name}.svg"
    assert path.stat().st_size < 80_000
    words = [t.text for t in tree.parse(path).iter(f"{SVG}text") if t.get("class") == "word"]
    rows = {row["lam"]: row for row in FACTS["strengths"]}
    shown = [rows[lam]["tokens"] for lam in (0, FACTS["settings"]["lam"])]
    assert words == [text for tokens in shown for text, _ in draw_answer.token_pieces(tokens)]
    assert rows[0]["invented"] and not rows[FACTS["settings"]["lam"]]["invented"]

def test_without_a_reward_it_says_what_to_do(tmp_path):
    with pytest.raises(TitaError, match="demo.sh. trains one"):
        draw_answer.decoder_of(tmp_path)
