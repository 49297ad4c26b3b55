"tita-data as processes: kills, resumed runs, a judge that misbehaves, files of 200 MB, TRL, Ray."
import importlib.util, json, multiprocessing, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
from PIL import Image
sys.path.insert(0, str(Path(__file__).resolve().parent))
from judge import judge
from ray_head import ray_head, workers

ROOT, CANARY = Path(__file__).resolve().parent.parent, "sk-canary-7d20c4a91e55"
MAIN = "from tita.data.data_cli import main; main()"
VIEWS = "clean", "diffusion-800"


def env(**kw):
    return {**os.environ, "PYTHONPATH": str(ROOT), "TITA_PROGRESS": "0", **kw}
def start(*args, **kw):
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", MAIN, *map(str, args)], **said, env=env(**kw))


def tita_data(*args, code=0, **kw):
    "Run a command to its end; what it said. There is no time limit: a loaded machine is no failure."
    p = start(*args, **kw)
    out, err = p.communicate()
    assert p.returncode == code, f"exit code {p.returncode}\n{out}\n{err}"
    assert "Traceback" not in err and CANARY not in out + err
    return out + err


def inside(*args, code=0):
    "The same command in this process, where being one does not matter: no time for imports."
    from typer.testing import CliRunner
    from tita.data.data_cli import app
    r = CliRunner().invoke(app, [str(a) for a in args])
    assert r.exit_code == code, f"exit code {r.exit_code}\n{r.output}\n{r.exception!r}"
    return r.output


def rows_of(path):
    "Whole lines of a file."
    return [json.loads(l) for l in Path(path).read_bytes().split(b"\n")[:-1]] if Path(path).exists() else []


def key(r):
    return r["question_id"], r["view"], r.get("sample", 0)
def by_key(rows):
    return {key(r): r for r in rows}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder with 40 images, 120 questions (one image is damaged) and a tiny model that has learned nothing."
    from tita.world.embedded import make_scenes, tiny_model, tiny_processor
    root = tmp_path_factory.mktemp("world")
    (root/"images").mkdir()
    with open(root/"questions.jsonl", "w") as f:
        for i, scene in enumerate(make_scenes(40, seed=8)):
            scene.image.save(root/f"images/{i}.png")
            for k, q in enumerate(scene.questions[:3]):
                f.write(json.dumps(dict(question_id=f"{i}-{k}", image=f"{i}.png", text=q.text)) + "\n")
    (root/"images/7.png").write_bytes((root/"images/7.png").read_bytes()[:200])
    tiny_model(64, 2).save_pretrained(root/"model")
    tiny_processor().save_pretrained(root/"model")
    return root


def generating(world, out):
    model = "--model", world/"model", "--max-new-tokens", 4
    return "generate", world/"questions.jsonl", "--images", world/"images", *model, "--out", out


def generate(world, out, *more, code=0):
    return inside(*generating(world, out), *more, code=code)


## Killed and started again

def test_twenty_kills_lose_and_repeat_nothing(world, tmp_path):
    import threading, torch
    from tqdm import tqdm
    from tita.data.answers import generate_answers
    from tita.models import load_processor, load_vlm
    from tita.data.sources import read_questions
    torch.set_num_threads(1)
    fork, rng = multiprocessing.get_context("fork"), random.Random()
    model, processor = load_vlm(world/"model", dtype="float32"), load_processor(world/"model")
    questions = read_questions(world/"questions.jsonl")

    def answer(out):
        "Sampled answers in small batches, in a process that has nothing to import any more."
        sys.stderr = open(os.devnull, "w")
        tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with forks, and a killed one may hold it
        asked = questions, world/"images", VIEWS, out
        generate_answers(model, processor, *asked, n=2, temperature=1.2, batch_size=3, max_new_tokens=4, seed=5)

    def size(out):
        return out.stat().st_size if out.exists() else 0
    def run(out, more=None):
        "Kill it a moment after it has written so many bytes more, if it is not done: was it killed?"
        p, goal = fork.Process(target=answer, args=(out,)), size(out) + (more or 0)
        p.start()
        if more is not None:
            while p.is_alive() and size(out) < goal:
                time.sleep(.001)
            time.sleep(rng.uniform(0, .01))
        if killed := more is not None and p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
        p.join()
        assert killed or p.exitcode == 0
        return killed

    def check(out):
        rows, failed = rows_of(out), rows_of(out.with_suffix(".errors.jsonl"))
        assert len(rows) == len(by_key(rows)) == 39 * 3 * 2 * 2 and by_key(rows) == by_key(whole)
        assert len(failed) == len(by_key(failed)) == 3 * 2 * 2
        assert {r["image"] for r in failed} == {"7.png"} and "damaged" in failed[0]["error"]

    run(tmp_path/"whole.jsonl")
    whole = rows_of(tmp_path/"whole.jsonl")
    check(tmp_path/"whole.jsonl")
    kills, sizes, files = 0, set(), [tmp_path/"killed0.jsonl"]
    while kills < 20: # at moments that depend on what is on the disk, not on how fast the machine is today
        if run(files[-1], rng.uniform(0, 1) * size(tmp_path/"whole.jsonl") / 20):
            kills += 1
            sizes.add(len(rows_of(files[-1])))
        else:
            files.append(tmp_path/f"killed{len(files)}.jsonl")
    if files[-1].exists():
        run(files[-1])
    for out in filter(Path.exists, files):
        check(out)
    assert len(sizes) > 3, sizes


def test_an_interrupted_command_says_how_to_go_on_and_resumes(world, tmp_path):
    out = tmp_path/"a.jsonl"
    p = start(*generating(world, out), "--batch-size", 1)
    while len(rows_of(out)) < 3 and p.poll() is None:
        time.sleep(.01)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate()
    done = rows_of(out)
    assert p.returncode == 130 and "run the same command again to resume" in err and "Traceback" not in err
    with open(out, "ab") as f:
        f.write(b'{"question_id": "torn')  # what a kill or a full disk leaves
    told = generate(world, out, "--batch-size", 1, code=1)
    assert f"{len(done)} were there already, 6 failed" in told and "a.errors.jsonl" in told
    assert rows_of(out)[:len(done)] == done and len(by_key(rows_of(out))) == len(rows_of(out)) == 39 * 3 * 2
    assert "234 were there already" in generate(world, out, "--batch-size", 1, code=1)


def test_two_processes_do_not_write_to_one_file(world, tmp_path):
    from tita.core import JsonlWriter
    with JsonlWriter(tmp_path/"a.jsonl"):
        assert "another process is writing to it" in generate(world, tmp_path/"a.jsonl", code=2)


def test_shards_make_the_whole(world, tmp_path):
    from typer.testing import CliRunner
    from tita.data.data_cli import app
    for i in range(2):
        CliRunner().invoke(app, [*map(str, generating(world, tmp_path/f"{i}.jsonl")), "--shard", f"{i}/2"])
    generate(world, tmp_path/"all.jsonl", code=1)
    shards = [rows_of(tmp_path/f"{i}.jsonl") for i in range(2)]
    both = sum(shards, [])
    assert all(shards) and len(both) == len(by_key(both)) and by_key(both) == by_key(rows_of(tmp_path/"all.jsonl"))


## Bad input

WHOLE = '{"image": "0.png", "text": "What?"}'
TWICE = '{"question_id": 1, "image": "0.png", "text": "What?"}\n{"question_id": 1, "image": "1.png", "text": "What?"}\n'
BAD_FILES = {
    WHOLE + '\n{"image": "0.png", "text"\n': ":2: not JSON",
    '{"image": "0.png"}\n': ":1: no key 'text'",
    '{"text": "What?"}\n': ":1: no key 'image'",
    TWICE: ":2: question_id 1 is there twice",
    "": "the file is empty",
    f'[{WHOLE},\n{{"image": ]': ":2: after record 1: not JSON",
    f"[{WHOLE},": ":1: the JSON array breaks off here, after record 1",
    "[1]": ":1: record 1 is of type int",
    "[]": "the array is empty",
    f'[{WHOLE}, {{"image": "1.png"}}]': ":1: record 2: no key 'text'",
    '{"image": ["0.png"], "text": "What?"}': ":1: image is a list",
    '"text"': "a row is a JSON object",
}


@pytest.mark.parametrize("text, told", BAD_FILES.items())
def test_a_bad_question_file_names_its_line(world, tmp_path, text, told):
    file = tmp_path/"q.jsonl"
    file.write_text(text)
    check = "check", file, world/"images"
    ask = "generate", file, "--images", world/"images", "--model", "none", "--out", tmp_path/"a.jsonl"
    for args in check, ask:
        p = start(*args)
        said = "".join(p.communicate())
        assert p.returncode in (1, 2) and str(file) in said and "Traceback" not in said
        line = told.split(":")[1] if told.startswith(":") else ""
        assert told.split(": ", 1)[-1] in said and line in said, said


def test_every_bad_image_is_a_failed_row_and_the_rest_goes_on(world, tmp_path):
    outside = tmp_path/"outside.png"
    outside.write_bytes((world/"images/1.png").read_bytes())
    images = tmp_path/"images"
    images.mkdir()
    (images/"good.jpg").write_bytes((world/"images/1.png").read_bytes())
    (images/"link.png").symlink_to(outside)
    (images/"text.png").write_text("no")
    Image.open(outside).convert("RGB").save(images/"cut.jpg")
    (images/"cut.jpg").write_bytes((images/"cut.jpg").read_bytes()[:-200])
    names = ["good", "good.png", "gone.png", "../outside.png", str(outside), "link.png", "cut.jpg", "text.png"]
    rows = [dict(question_id=i, image=n, text="Is there a cup in the image?") for i, n in enumerate(names)]
    lines = b"\r\n".join(json.dumps(r).encode() for r in rows)
    (tmp_path/"q.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n\r\n")
    made = "--model", world/"model", "--out", tmp_path/"a.jsonl", "--max-new-tokens", 2
    told = inside("generate", tmp_path/"q.jsonl", "--images", images, *made, code=1)
    assert all(f"{tmp_path/'q.jsonl'}:{n + 1}: " in told for n in range(2, 8))
    assert "q.jsonl:7: cut.jpg: the image is damaged" in told
    assert {r["question_id"] for r in rows_of(tmp_path/"a.jsonl")} == {0, 1}
    why = {r["question_id"]: r["error"] for r in rows_of(tmp_path/"a.errors.jsonl")}
    assert why.keys() == set(range(2, 8)) and all("leaves its folder" in why[i] for i in (3, 4, 5))
    assert "is not in" in why[2] and "damaged" in why[6] and "not an image" in why[7]
    told = inside("check", tmp_path/"q.jsonl", images, code=1)
    assert "rows 8  images 8  found 2  missing 1  unreadable 1  truncated 1  escapes 3" in told
    assert f"{tmp_path/'q.jsonl'}:7: truncated" in told


def test_mistakes_are_told_in_one_line(world, tmp_path):
    q = world/"questions.jsonl"
    ask = "generate", q, "--images", world/"images", "--out", tmp_path/"a.jsonl"
    server = "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"
    mistakes = {
        "no such folder": (*ask, "--model", tmp_path/"none"),
        "none of clean": (*ask, "--model", "m", "--view", "fog"),
        "use 'pixel-diffusion-800'": (*ask, "--model", "m", *server, "--view", "diffusion-800"),
        "no record of ocr_vqa": ("questions", q, "--out", tmp_path/"x"),
        "no key 'answer'": ("pairs", q, "--images", world/"images", "--out", tmp_path/"x"),
    }
    for told, args in mistakes.items():
        err = inside(*args, code=2)
        assert told in err and err.strip().splitlines()[-1].startswith("error: ")


## The same seed, the same file

def conversations(n):
    "LLaVA's mix in small: OCR-VQA, TextVQA and text."
    asked = "Who is the author of this book?", "What is the title?", "What type of book is this?"
    short = "Answer the question using a single word or phrase."
    for i in range(n):
        talk = []
        for q in asked:
            talk += [{"from": "human", "value": f"<image>\n{q}\n{short}"}, {"from": "gpt", "value": f"A {i}"}]
        yield {"id": f"{i:09}", "image": f"ocr_vqa/images/{i:09}.jpg", "conversations": talk}
        yield {"id": f"t{i}", "image": f"textvqa/train_images/{i:016x}.jpg", "conversations": talk[:2]}
        yield {"id": f"s{i}", "conversations": talk[:4]}


def test_questions_are_the_same_bytes_for_the_same_seed(tmp_path):
    (tmp_path/"mix.json").write_text(json.dumps(list(conversations(300))))
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        sources = "--source", "ocr_vqa=50", "--source", "textvqa=70"
        tita_data("questions", tmp_path/"mix.json", "--out", tmp_path/name, *sources, "--seed", seed)
    a, b, c = ((tmp_path/n).read_bytes() for n in "abc")
    assert a == b != c and len(a.splitlines()) == 50 * 2 + 70


def sevas_join(chosen, rejected):
    "What SeVa's step 3 does with two lists of (image, question, answer) in the same order, before it samples down."
    pairs = []
    for (image, question, good), (_, _, bad) in zip(chosen, rejected):
        if good != bad:
            good, bad = (text.replace("</s>", "").replace("\n", "") for text in (good, bad))
            pairs.append({"chosen": good, "reject": bad, "question": question, "image_id": image + ".jpg"})
    return pairs


def test_sevas_own_files_give_sevas_pairs(world, tmp_path):
    images = tmp_path/"images"
    images.mkdir()
    for i in range(35):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(images/f"{i}.jpg")
    rng = random.Random(3)
    said = ["Yes", "No", "No</s>", "a red\nbus", "a red bus", "", " two  buses</s>", "two buses"]
    asked = [(f"{i // 2}", f"What is in picture {i}?") for i in range(70)]
    sides = [[(image, q, rng.choice(said)) for image, q in asked] for _ in range(2)]
    for name, side in zip(("base", "noise"), sides):
        rows = [{"question": q, "answer": a, "image_id": image} for image, q, a in side]
        (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = f"clean={tmp_path}/base.jsonl", f"diffusion-500={tmp_path}/noise.jsonl"
    how = "--rejected", "diffusion-500", "--like", "seva"
    inside("pairs", *files, *how, "--images", images, "--out", tmp_path/"set")
    ours, theirs = json.loads((tmp_path/"set/seva.json").read_text()), sevas_join(*sides)
    assert any(p["chosen"] == p["reject"] for p in theirs) and ours == [p for p in theirs if p["chosen"] != p["reject"]]


## Judges and servers

def test_no_row_is_lost_to_a_bad_judge(world, tmp_path, monkeypatch):
    asked = [dict(question_id=q, image=f"{q % 5}.png", text="Describe the image.", view="clean") for q in range(24)]
    asked[11]["text"] = "Is this forbidden?"
    rows = [q | dict(sample=s, answer="a cup " * (s + 1) + str(q["question_id"])) for q in asked for s in range(4)]
    (tmp_path/"answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with judge(.6) as url:
        files = tmp_path/"answers.jsonl", "--images", world/"images", "--out", tmp_path/"scores.jsonl"
        run = ["annotate", *files, "--model", "judge", "--base-url", url, "--retries", 3, "--pause", .01]
        p = start(*run, OPENAI_API_KEY=CANARY)
        while len(rows_of(tmp_path/"scores.jsonl")) < 4 and p.poll() is None:
            time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        p.communicate()
        scores = tmp_path/"scores.jsonl"
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        for _ in range(8):
            told = inside(*run, code=1)
            assert CANARY not in told
            done, failed = rows_of(scores), rows_of(tmp_path/"scores.errors.jsonl")
            assert len(done) + len(failed) == 24, told
            assert not {r["question_id"] for r in done} & {r["question_id"] for r in failed}, told
            if len(failed) == 1:
                break
    assert [r["question_id"] for r in failed] == [11] and len({r["question_id"] for r in done}) == len(done) == 23
    assert [f["reason"] for f in failed[0]["failures"]] and "refused" in failed[0]["error"]
    reasons = " ".join(f["reason"] for r in done + failed for f in r.get("failures", []))
    kinds = "429", "500", "no connection", "refused", "JSON", "less than or equal to 4"
    assert sum(word in reasons for word in kinds) >= 4, reasons  # the judge errs at random
    assert all(a["scores"]["correctness"] == len(a["answer"]) % 5 for r in done for a in r["answers"])
    assert all(json.loads(r["answer"]) for r in done)
    assert not any(CANARY in f.read_text() for f in tmp_path.glob("*.json*"))


def test_a_server_answers_like_a_local_model_and_resumes(world, tmp_path):
    with judge(.3) as url:
        files = world/"questions.jsonl", "--images", world/"images", "--out", tmp_path/"a.jsonl"
        views = "--view", "clean", "--view", "pixel-diffusion-800", "--view", "none"
        run = ["generate", *files, "--engine", "openai", "--model", "m", "--base-url", url, *views]
        for _ in range(6):
            inside(*run, code=1)
            failed = rows_of(tmp_path/"a.errors.jsonl")
            if {r["image"] for r in failed} == {"7.png"}:
                break
    rows = rows_of(tmp_path/"a.jsonl")
    assert len(rows) == len(by_key(rows)) == 39 * 3 * 2 + 40 * 3 and len(failed) == 6


def test_no_server(world, tmp_path):
    files = world/"questions.jsonl", "--images", world/"images", "--out", tmp_path/"a.jsonl"
    server = "--engine", "openai", "--model", "m", "--base-url", "http://127.0.0.1:9/v1"
    told = inside("generate", *files, *server, "--view", "clean", code=2)
    assert "no connection to http://127.0.0.1:9/v1 (ConnectError); is the server running" in told


def test_what_cannot_be_fused_is_recorded_and_the_rest_goes_on(world, tmp_path):
    asked = [dict(question_id=q, image=f"{q}.png", text="Describe the image.") for q in range(6)]
    asked[3]["text"] = "Is this forbidden?"
    views = "clean", "flip", "diffusion-800"
    rows = [q | dict(view=v, answer=f"{v} {q['question_id']}") for q in asked for v in views]
    (tmp_path/"answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = "--method", "fused", "--fuse", "clean", "--fuse", "flip", "--model", "fuser"
    run = ["pairs", tmp_path/"answers.jsonl", "--images", world/"images", *how, "--out", tmp_path/"set"]
    with judge() as url:
        assert "1 questions could not be fused" in inside(*run, "--base-url", url, code=1)
    pairs, failed = rows_of(tmp_path/"set/pairs.jsonl"), rows_of(tmp_path/"set/fused.errors.jsonl")
    assert {p["question_id"] for p in pairs} == {0, 1, 2, 4, 5} and {p["chosen"] for p in pairs} <= {"yes", "no"}
    assert "refused" in failed[0]["error"] and [r["question_id"] for r in failed] == [3]
    assert "fuser" in (tmp_path/"set/README.md").read_text()


def test_without_ray_its_engine_says_what_to_install(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    assert "pip install 'ray[data]'" in generate(world, tmp_path/"a.jsonl", "--engine", "ray", code=2)


## What comes out is what others take in

@pytest.mark.parametrize("embed", [True, False])
def test_datasets_reads_what_we_write(world, tmp_path, embed):
    rows = [r for r in map(json.loads, (world/"questions.jsonl").read_text().splitlines()) if r["image"] != "7.png"]
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = "--to", "parquet", "--images", world/"images", *(["--embed"] if embed else [])
    inside("convert", tmp_path/"q.jsonl", tmp_path/"q.parquet", *how)
    import datasets
    parquet, cache = str(tmp_path/"q.parquet"), str(tmp_path/"cache")
    data = datasets.load_dataset("parquet", data_files=parquet, cache_dir=cache, split="train")
    with Image.open(world/"images"/rows[5]["image"]) as im:
        assert data[5]["picture"].convert("RGB").tobytes() == im.convert("RGB").tobytes()
    bytes_inside = data.cast_column("picture", datasets.Image(decode=False))[5]["picture"]["bytes"]
    assert bool(bytes_inside) == embed
    assert "rows 117  images 39  found 39" in inside("check", tmp_path/"q.parquet", world/"images")
    inside("convert", tmp_path/"q.parquet", tmp_path/"back.jsonl", "--to", "jsonl")
    assert rows_of(tmp_path/"back.jsonl") == rows
    model = "--model", world/"model", "--view", "none", "--max-new-tokens", 1
    inside("generate", tmp_path/"q.parquet", "--images", world/"images", *model, "--out", tmp_path/"a.jsonl")
    assert len(rows_of(tmp_path/"a.jsonl")) == 117


def test_trl_trains_on_the_folder(world, tmp_path):
    generate(world, tmp_path/"answers.jsonl", code=1)
    inside("pairs", tmp_path/"answers.jsonl", "--images", world/"images", "--out", tmp_path/"set", "--limit", 8)
    import torch
    from datasets import load_from_disk
    from trl import DPOConfig, DPOTrainer
    from tita.models import load_processor, load_vlm
    model, ref = load_vlm(world/"model", dtype="float32"), load_vlm(world/"model", dtype="float32")
    before = model.lm_head.weight.clone()
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None)
    quiet = dict(report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True)
    steps = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3)
    args = DPOConfig(str(tmp_path/"run"), **plain, **quiet, **steps)
    data, processor = load_from_disk(tmp_path/"set/trl"), load_processor(world/"model")
    trainer = DPOTrainer(model, ref, args, train_dataset=data, processing_class=processor)
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight.cpu())
    assert abs(trainer.state.log_history[0]["loss"] - .6931) < .01


## Whatever is written can be trained on

PAIR = dict(prompt="Is there a cup in the image?", chosen="yes", rejected="no")


def pair_files(world, root):
    "A pair file of every kind: what `tita-data` writes, and what each project publishes."
    rows = [PAIR | dict(question_id=f"q{i}", image=f"{i}.png", source="seva:clean>diffusion-800") for i in (1, 2)]
    (root/"ours.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for to in ("jsonl", "seva", "mllm", "trl", "parquet"):
        inside("convert", root/"ours.jsonl", root/f"made.{to}", "--to", to, "--images", world/"images")
    embedded = "--to", "parquet", "--images", world/"images", "--embed"
    inside("convert", root/"ours.jsonl", root/"embedded.parquet", *embedded)
    answers = [dict(question_id=r["question_id"], image=r["image"], text=r["prompt"], view=v, answer=a)
               for r in rows for v, a in (("clean", "yes"), ("diffusion-800", "no"))]
    (root/"answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in answers))
    inside("pairs", root/"answers.jsonl", "--images", world/"images", "--out", root/"set")
    asked = {"from": "human", "value": f"<image>\n{PAIR['prompt']}"}
    good, bad = ({"from": "gpt", "value": v} for v in ("yes", "no"))
    seva = [dict(chosen="yes", reject="no", question=PAIR["prompt"], image_id=f"{i}.jpg") for i in (1, 2)]
    talk = dict(question=str(asked), chosen=good, rejected=str([asked, bad]))
    mllm = [dict(id=i, image=f"scigraph/{i}.png") | talk for i in (1, 2)]
    (root/"seva_array.json").write_text(json.dumps(seva))
    (root/"seva_lines.json").write_text("\n".join(map(json.dumps, seva)))
    (root/"mllm_published.json").write_text(json.dumps(mllm, indent=1))
    import datasets
    say = lambda role, text: [{"role": role, "content": text}]
    talk = dict(prompt=say("user", PAIR["prompt"]), chosen=say("assistant", "yes"), rejected=say("assistant", "no"))
    trl = [dict(images=[str(world/f"images/{i}.png")]) | talk for i in (1, 2)]
    said = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features({"images": [datasets.Image()], "prompt": said, "chosen": said, "rejected": said})
    datasets.Dataset.from_list(trl, features=features).to_parquet(root/"trl.parquet")
    made = ["made.jsonl", "made.seva", "made.mllm", "made.trl", "made.parquet", "embedded.parquet"]
    sets = ["set/pairs.jsonl", "set/seva.json", "set/mllm_dpo.json", "set/trl"]
    published = ["seva_array.json", "seva_lines.json", "mllm_published.json", "trl.parquet"]
    return [root/n for n in ("ours.jsonl", *made, *sets, *published)]


def shown(image):
    "The pixels of a row's image, which is a path or what `datasets` has inside."
    import io
    with Image.open(io.BytesIO(image["bytes"]) if isinstance(image, dict) else image) as im:
        return im.convert("RGB").tobytes()


def test_every_pair_file_can_be_trained_on(world, tmp_path):
    from tita.preferences import read_pairs
    pixels = [shown(world/f"images/{i}.png") for i in (1, 2)]
    for file in pair_files(world, tmp_path):
        wrong = []
        rows = list(read_pairs(file, world/"images", wrong))
        assert not wrong and [{k: r[k] for k in PAIR} for r in rows] == [PAIR] * 2, file
        assert [shown(r["image"]) for r in rows] == pixels, file
        assert all(r["source"].startswith(f"{file}:") and "question_id" in r for r in rows), file


def conversation_files(world, root):
    "Files of answers of every kind."
    scores = dict(helpfulness=4, correctness=4, coherence=4, complexity=1, verbosity=1)
    said = [dict(sample=k, answer=a, scores=scores | {"helpfulness": 4 - k}) for k, a in enumerate(("yes", "no"))]
    answers = [dict(view="clean", model="m") | a for a in said]
    asked = [dict(question_id=f"q{i}", image=f"{i}.png", text=PAIR["prompt"]) for i in (1, 2)]
    scored = [q | dict(model="judge", answers=answers) for q in asked]
    (root/"scored.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scored))
    for to in ("sft", "rejection", "steerlm"):
        inside("convert", root/"scored.jsonl", root/f"{to}.json", "--to", to, "--images", world/"images")
    rows = [q | dict(view="clean", answer="yes") for q in asked]
    (root/"answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    inside("convert", root/"answers.jsonl", root/"llava.json", "--to", "llava")
    return [root/n for n in ("sft.json", "rejection.json", "steerlm.json", "answers.jsonl", "llava.json")]


def test_every_file_of_answers_can_be_trained_on(world, tmp_path):
    from tita.preferences import read_conversations
    for file in conversation_files(world, tmp_path):
        wrong = []
        rows = list(read_conversations(file, world/"images", wrong))
        said = ["yes", "no"] * 2 if file.stem == "steerlm" else ["yes"] * 2
        assert not wrong and [r["answer"] for r in rows] == said, file
        assert all(r["prompt"].startswith(PAIR["prompt"]) and Path(r["image"]).is_file() for r in rows), file


def test_one_bad_row_costs_no_file(world, tmp_path, capsys):
    from tita.preferences import read_pairs
    good = PAIR | {"image": "1.png"}
    changes = {"rejected": ""}, {"chosen": "no"}, {"image": "gone.png"}, {"image": "../model/config.json"}
    rows = [good, *(good | c for c in changes), {"prompt": "?"}]
    broken = ["{broken", json.dumps(good)[:-1] + ', "x": ' + "[" * 3000, '"text"']
    (tmp_path/"p.jsonl").write_text("\n".join([*map(json.dumps, rows), *broken, json.dumps(good)]))
    assert len(list(read_pairs(tmp_path/"p.jsonl", world/"images"))) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in told] == [str(n) for n in range(2, 10)], told
    reasons = ("rejected is empty", "are equal", "is not in", "leaves its folder", "no key 'chosen'", "not JSON",
               "nested", "a row is a JSON object")
    for line, why in zip(told, reasons):
        assert f"left out: {why}" in line or why in line


PEAK = """# the greatest memory of this process in MB; ru_maxrss would count that of the process which started it
import sys
from pathlib import Path
from tita.data.data_cli import main
def peak():
    try: return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
    except OSError: import resource; return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
try: main()
finally: print("peak", peak(), file=sys.stderr)"""

@pytest.mark.slow
def test_a_200_mb_array_needs_little_memory(tmp_path):
    record = next(conversations(1))
    text = json.dumps(record["conversations"])
    n = 0
    with open(tmp_path/"mix.json", "w") as f:
        f.write("[")
        while f.tell() < 200e6:
            for _ in range(1000):
                folder = "ocr_vqa/images", "textvqa/train_images", "gqa/images"
                image = f"{folder[n % 3]}/{n % 100}.jpg"
                f.write(f'{", " if n else ""}{{"id": "{n}", "image": "{image}", "conversations": {text}}}')
                n += 1
        f.write("]")
    (tmp_path/"images").mkdir()
    for i in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path/f"images/{i}.jpg")
    mix = tmp_path/"mix.json"
    for args in ["questions", mix, "--out", tmp_path/"q.jsonl"], ["check", mix, tmp_path/"images"]:
        r = subprocess.run([sys.executable, "-c", PEAK, *map(str, args)], capture_output=True, text=True, env=env())
        assert r.returncode == 0 and int(r.stderr.split()[-1]) < 400, r.stdout[-300:] + r.stderr[-2000:]
    assert len(rows_of(tmp_path/"q.jsonl")) == 4000 * 2 + 8000 * 2
    assert f"rows {3 * n}  images 300  found 300  missing 0" in r.stdout


with_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: 'tita[ray]'")


@pytest.fixture(scope="module")
def cluster():
    "A cluster on this machine: the process at its head, and the environment of who uses it."
    with ray_head(28421) as (head, address):
        yield head, {"RAY_ADDRESS": address}


@pytest.mark.slow
@with_ray
def test_two_ray_actors_answer_like_one_process(world, cluster, tmp_path):
    "Also when one of them is killed in the middle: another takes its place, and every row is there exactly once."
    generate(world, tmp_path/"one.jsonl", code=1)
    wanted, (head, place) = by_key(rows_of(tmp_path/"one.jsonl")), cluster
    for out, kill in (tmp_path/"two.jsonl", False), (tmp_path/"killed.jsonl", True):
        ray = "--engine", "ray", "--actors", 2, "--batch-size", 1
        p = start(*generating(world, out), *ray, **place)
        while kill and len(rows_of(out)) < 30:
            assert p.poll() is None, p.communicate()
            time.sleep(.01)
        if kill:
            workers(head, "MapWorker")[0].kill()
            assert len(rows_of(out)) < len(wanted), "it was killed too late"
        told = "".join(p.communicate())
        assert p.returncode == 1 and "Traceback" not in told, told
        rows = rows_of(out)
        assert len(rows) == len(wanted) == 39 * 3 * 2 and by_key(rows) == wanted, told
        assert len(rows_of(out.with_suffix(".errors.jsonl"))) == 6, told


## The run notebook

def run_notebook(out, **parameters):
    flat = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    script = sys.executable, "scripts/run_notebook.py", "nbs/runs/prepare_data.ipynb", str(out/"prepare_data.ipynb")
    run = dict(cwd=ROOT, env=env(), capture_output=True, text=True)
    return subprocess.run([*script, "-p", "out", str(out), *flat], **run)


@pytest.mark.slow
def test_run_notebook_with_a_model_in_this_process(world, tmp_path):
    for _ in range(2):
        asked = dict(questions=world/"questions.jsonl", images=world/"images")
        r = run_notebook(tmp_path, **asked, model=world/"model", max_new_tokens=6)
        assert r.returncode == 0, r.stdout + r.stderr
    sets = json.loads((tmp_path/"metrics.json").read_text())["sets"]
    assert sets.keys() == {"seva", "consensus", "hard"} and sets["hard"]["pairs"] > 0
    assert all((tmp_path/name/"README.md").exists() for name in sets if sets[name]["report"]["pairs"])


@pytest.mark.slow
def test_run_notebook_with_a_server(world, tmp_path):
    with judge() as url:
        asked = dict(questions=world/"questions.jsonl", images=world/"images")
        server = dict(engine="openai", base_url=url, model="m", judge="m")
        r = run_notebook(tmp_path, **asked, **server, samples=2, judge_questions=10)
        assert r.returncode == 0, r.stdout + r.stderr
    sets = json.loads((tmp_path/"metrics.json").read_text())["sets"]
    assert sets["seva"]["report"]["joined"] == 117 and len(rows_of(tmp_path/"scores.jsonl")) > 5


## Other models than LLaVA

def ends(tokenizer):
    "The ids that a language model's configuration wants."
    return {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("pad", "bos", "eos")}


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def llava_next(processor):
    "Images of several sizes, each in patches of its own number."
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    tok, grid = processor.tokenizer, [[32, 64], [64, 32], [64, 64]]
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=16, projection_dim=32)
    text = LlamaConfig(vocab_size=len(tok), **SMALL, num_key_value_heads=4, **ends(tok))
    seen = dict(image_token_id=processor.image_token_id, vision_feature_layer=-1, image_grid_pinpoints=grid)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision, text_config=text, **seen))
    crop = {"height": 32, "width": 32}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop, image_grid_pinpoints=grid)
    patches = dict(patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    said = dict(chat_template=processor.chat_template, image_token="<image>")
    return model.eval(), LlavaNextProcessor(images, tok, **patches, **said)


def qwen2_vl(processor):
    "Images as flat patches with a grid; rotary positions in three directions."
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    tok, image = processor.tokenizer, processor.image_token_id
    turning = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.}
    text = dict(vocab_size=len(tok), **SMALL, num_key_value_heads=4, **ends(tok), rope_parameters=turning)
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2)
    patches = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    marks = dict(image_token_id=image, video_token_id=3, vision_start_token_id=5, vision_end_token_id=6)
    config = Qwen2VLConfig(vision_config=vision | patches, text_config=text, **marks)
    model = Qwen2VLForConditionalGeneration(config)
    return model.eval(), FlatPatches(processor, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112))


class FlatPatches:
    "Qwen's own processor wants torchvision for videos; this is what generation needs of it."
    def __init__(self, processor, image_processor):
        self.tokenizer, self.chat_template = processor.tokenizer, processor.chat_template
        self.apply_chat_template, self.image = processor.apply_chat_template, processor.image_token_id
        self.image_token, self.image_processor = "<image>", image_processor

    def __call__(self, text, images, return_tensors="pt", padding=False, add_special_tokens=True):
        import torch
        text = [text] if isinstance(text, str) else list(text)
        seen = self.image_processor(images if isinstance(images, list) else [images], return_tensors="pt")
        tokens = iter("<image>" * int(grid.prod() // 4) for grid in seen["image_grid_thw"])
        parts = [t.split("<image>") for t in text]
        text = ["".join(p + (next(tokens) if i + 1 < len(t) else "") for i, p in enumerate(t)) for t in parts]
        out = self.tokenizer(text, return_tensors="pt", padding=padding, add_special_tokens=add_special_tokens)
        return dict(out, **seen, mm_token_type_ids=(out["input_ids"] == self.image).int())


@pytest.mark.parametrize("build", [llava_next, qwen2_vl])
def test_features_computed_once_answer_like_pixels(build):
    import torch
    from tita.data import answers as g
    from tita.world.embedded import make_scenes, tiny_processor
    torch.manual_seed(0)
    model, processor = build(tiny_processor())
    sizes = (80, 80), (160, 60), (40, 100), (90, 90)
    images = {f"{i}.png": s.image.resize(size) for i, (s, size) in enumerate(zip(make_scenes(4), sizes))}
    questions = [dict(question_id=f"{n}-{k}", image=n, text=t) for n in images
                 for k, t in enumerate(("Is there a boat in the image?", "Describe the image."))]
    shared = g.generate_answers(model, processor, questions, images, (*VIEWS, "none"), max_new_tokens=6, batch_size=6)
    alone = []
    for q in questions: # a question at a time shares nothing
        alone += g.generate_answers(model, processor, [q], images, (*VIEWS, "none"), max_new_tokens=6, batch_size=1)
    assert shared == alone and len(shared) == 24
