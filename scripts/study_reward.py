#!/usr/bin/env python3
"""What makes a reward good, in the embedded world: the baselines on one scored set; reward sizes against noise levels;
what each reward is worth.

    python scripts/study_reward.py             seed 0, in runs/study_reward/, writes results/study_reward.{json,md,png}
    python scripts/study_reward.py --scenes 40 --test 20 --out /tmp/x --runs /tmp/y            a quick look

What is there is not computed again: killed and started again, it goes on. Explained in
nbs/studies/83_reward_study.ipynb.
"""
import argparse, copy, os
from pathlib import Path
os.environ.setdefault("DS_ACCELERATOR", "cpu")
from tita.core import cli, run_info, set_seed, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.eval.evaluation import evaluate, scene_questions
from tita.data.answers import generate_answers
from tita.eval.metrics import bootstrap, score
from tita.studies.own_reward import own_reward, teacher_answers
from tita.studies.stages import further_rows, probe_rows
from tita.show.plots import count_text
from tita.show.report import results_table
from tita.studies.reward_study import baseline_sets, draw_grid, grid_cell, own_measures, score_answers, steered
from tita.studies.reward_study import train_baselines
from tita.world.embedded import ASK, OBJECTS, load_models, make_scenes, narrow_reward

ROOT = Path(__file__).resolve().parent.parent
KINDS = "caption", "pope_random", "pope_popular", "pope_adversarial"
SHOWN = "pope_random_accuracy", "pope_popular_accuracy", "pope_adversarial_accuracy", "chair_i", "chair_s", "recall"
TITLES = dict(
    base="large model", before="small model before training", sft="SFT on the best answer",
    rejection_sampling="rejection sampling", steerlm="SteerLM", dpo="DPO on scored pairs")
VIEWS = "diffusion-300", "diffusion-500", "diffusion-800"

class Study:
    "What both parts need: models, questions, and a memory of answers."
    def __init__(self, args):
        set_seed(args.seed)
        self.args, self.runs = args, args.runs/f"seed{args.seed}"
        self.images = self.runs/"images"
        self.base, self.reward, self.processor = load_models(args.seed)
        self.scenes = make_scenes(args.scenes, args.seed, "train")
        self.rows = probe_rows(self.scenes, self.images, presence=args.presence, written=False, seed=args.seed)
        self.test = scene_questions(make_scenes(args.test, args.seed, "test"), KINDS)
        course = dict(learning_rate=args.learning_rate, lr_scheduler_type="linear", warmup_steps=.1, weight_decay=0.)
        kept = dict(logging_steps=5, report_to="none")
        self.config = dict(num_train_epochs=args.epochs, per_device_train_batch_size=args.batch) | course | kept

    def score(self, name, *models, rows=None, **settings):
        "Scores of one system on the test scenes."
        decoder = AlignedDecoder(*models, processor=self.processor, **settings)
        kept = dict(out=self.runs/"test"/f"{name}.jsonl", chunk=2048, desc=name)
        said = evaluate(decoder, rows or self.test, None, max_new_tokens=48, **kept)
        return score(said, OBJECTS, n=self.args.test)

    def guided(self, name, reward, ref):
        how = dict(form="ratio", lam=self.args.lam, bound=self.args.bound)
        return self.score(name, self.base, reward, ref=ref, **how)

def baselines(s: Study) -> dict:
    "One scored set, four methods: what each answers by itself, and what each brings as a reward."
    drawn = dict(views=("clean",), n=4, temperature=1.2, seed=s.args.seed, max_new_tokens=48)
    answers = generate_answers(s.reward, s.processor, s.rows, s.images, out=s.runs/"scored.jsonl", **drawn)
    sets = baseline_sets(score_answers(answers, s.scenes))
    config = dict(s.config, beta=s.args.beta, seed=s.args.seed)
    trained = train_baselines(s.reward, s.processor, sets, s.images, s.runs/"baselines", **config)
    alone, guiding = dict(before=s.score("before", s.reward)), dict(base=s.score("base", s.base))
    for name, model in trained.items():
        steers = name == "steerlm"
        alone[name] = s.score(name, model, rows=steered(s.test) if steers else None)
        if not steers:
            guiding[name] = s.guided(f"{name}_guides", model, s.reward)
    rows = {k: len(v) for k, v in sets.items()}
    return dict(rows=rows, alone=bootstrap(alone, "before")["systems"], guiding=bootstrap(guiding, "base")["systems"])

def sizes(s: Study) -> dict:
    "Rewards of three sizes: a smaller one distilled here, the committed one, and a copy of the base."
    folder, small = s.runs/"small", narrow_reward(s.base, s.args.seed + 20, hidden=32, layers=1)
    shown = make_scenes(s.args.distill_scenes, s.args.seed + 1000, "train")
    asked = probe_rows(shown, s.images, "teach", seed=s.args.seed)
    said = teacher_answers(s.base, s.processor, asked, s.images, folder, further_rows, s.args.seed)
    small, _ = own_reward(s.base, small, s.processor, said, s.images, folder/"before", s.args.distill_steps)
    return dict(small=small, medium=s.reward, large=copy.deepcopy(s.base))

def captions_of(s: Study) -> tuple: # rows with image, prompt and answer; what is in each image
    "What the base says of validation scenes: the token rewards should see what it invents."
    shown = make_scenes(s.args.valid, s.args.seed, "valid")
    asked = [dict(question_id=str(i), image=str(i), text=ASK["caption"]) for i in range(len(shown))]
    images = {str(i): scene.image for i, scene in enumerate(shown)}
    kept = dict(views=("clean",), out=s.runs/"captions.jsonl", max_new_tokens=48)
    said = generate_answers(s.base, s.processor, asked, images, **kept)
    captions = [dict(image=images[r["image"]], prompt=r["text"], answer=r["answer"]) for r in said]
    return captions, [shown[int(r["image"])].objects for r in said]

def grid(s: Study) -> list:
    "Every size with every noise level: its own measures, and what comes out aligned."
    captions, truths = captions_of(s)
    config = dict(s.config, seed=s.args.seed, beta=s.args.grid_beta)
    cells, results = [], dict(base=s.score("base", s.base))
    for size, model in sizes(s).items():
        for view in VIEWS:
            name = f"{size}_{view}"
            trained, held, n = grid_cell(model, s.processor, s.rows, s.images, s.runs/"grid"/name, view, **config)
            results[name] = s.guided(name, trained, model)
            counts = dict(parameters=sum(p.numel() for p in model.parameters()), pairs=n, held=len(held))
            own = own_measures(trained, model, s.processor, held, s.images, captions, truths)
            cells.append(dict(name=name, size=size, view=view) | counts | own)
    done = bootstrap(results, "base")["systems"]
    return [dict(name="base") | done["base"]] + [c | done[c["name"]] for c in cells]

def cell(c: dict, digits: int = 1) -> str:
    return f"{c['value']:.{digits}f} [{c['low']:.{digits}f}, {c['high']:.{digits}f}]"

def table_head(head: list) -> str:
    return "| " + " | ".join(head) + " |\n" + "|" + "---|" * len(head) + "\n"

def steps_of(view: str) -> str:
    return view.rpartition("-")[2]

def grid_table(found: dict) -> str:
    head = ["reward", "noise", "pairs", "CHAIR_i ↓", "POPE adversarial ↑", "held-out pairs, chosen ahead",
            "AUC of token rewards"]
    base, *cells = found["grid"]
    text = table_head(head)
    text += f"| none (base alone) | | | {cell(base['chair_i'])} | {cell(base['pope_adversarial_accuracy'])} | | |\n"
    for c in cells:
        scores = [cell(c[m]) for m in ("chair_i", "pope_adversarial_accuracy", "pair_accuracy")] + [cell(c["auc"], 2)]
        row = [count_text(c["parameters"]), f"t = {steps_of(c['view'])}", c["pairs"], *scores]
        text += "| " + " | ".join(map(str, row)) + " |\n"
    return text

def range_of(b: dict) -> str:
    "A bin of differences in length."
    if b["low"] is None:
        return f"fewer than {b['high']}"
    if b["high"] is None:
        return f"{b['low']} or more"
    return str(b["low"]) if b["high"] - b["low"] == 1 else f"{b['low']} to {b['high'] - 1}"

def length_table(cells: list) -> str:
    middle = next(c for c in cells if c.get("size") == "medium" and c["view"] == VIEWS[-1])
    text = table_head(["chosen longer by, tokens", "pairs", "mean margin, nats", "chosen ahead, %"])
    for b in middle["by_length"]:
        text += f"| {range_of(b)} | {b['pairs']} | {b['margin']:.2f} | {b['accuracy']:.0f} |\n"
    return text

TEXT = """\
# What makes a reward good

Made by `python scripts/study_reward.py` ({settings}), commit {commit:.12}. In brackets 95% bootstrap intervals over \
scenes.

## One scored set, four methods

Four answers of the small model to each of {questions} questions, drawn at temperature 1.2. The scores are made from \
what is in the pictures: **this uses labels**, as mllm-dpo's judge does. Rows to train on: {rows}. \
Each model starts from the small model before training. The intervals in the tables are of paired differences, bold \
where clear of zero.

What the trained model answers by itself, against the small model before training:

{alone}

What it brings as a reward of the frozen large model (bounded ratio, λ = {lam:g}, ±{bound:g} nats). SteerLM wants \
another prompt than its base and is left out:

{guiding}

## Three sizes, three noise levels

No labels: the reward's own answers to clean images are preferred to those to noised ones. The smallest is distilled \
from the base for this study, the middle one is the committed reward, the largest is a copy of the base.

![sizes and noise](study_reward.png)

{grid}

## Is it only length?

The middle reward at t = {steps}, held-out pairs:

{lengths}
"""

def report(found: dict, args) -> str:
    "Markdown of both parts."
    part = found["baselines"]
    def compared(name, reference):
        systems = part[name]
        return results_table({"systems": systems}, SHOWN, reference=dict.fromkeys(systems, reference), titles=TITLES)
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items() if k not in ("out", "runs"))
    rows = ", ".join(f"{TITLES[k]} {v}" for k, v in part["rows"].items())
    return TEXT.format(
        settings=settings, commit=found["run"]["commit"] or "unknown", questions=found["questions"], rows=rows,
        alone=compared("alone", "before"), guiding=compared("guiding", "base"), lam=args.lam, bound=args.bound,
        grid=grid_table(found), steps=steps_of(VIEWS[-1]), lengths=length_table(found["grid"]))

WHOLE = dict(
    seed=0, scenes=400, presence=8, test=400, valid=200, epochs=2, batch=64, distill_steps=900, distill_scenes=1500)
FRACTIONS = dict(learning_rate=3e-4, beta=.1, grid_beta=1., lam=1., bound=1.)

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, options in ((int, WHOLE), (float, FRACTIONS)):
        for name, value in options.items():
            p.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    p.add_argument("--out", type=Path, default=ROOT/"results")
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"study_reward")
    args = p.parse_args()
    s = Study(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "runs")}
    found = dict(settings=settings, questions=len(s.rows), baselines=baselines(s), grid=grid(s), run=run_info())
    write_json(args.out/"study_reward.json", found)
    base, *cells = found["grid"]
    figure = draw_grid(cells, base={k: c["value"] for k, c in base.items() if isinstance(c, dict)})
    (args.out/"study_reward.png").write_bytes(figure.png())
    print(write_text(args.out/"study_reward.md", report(found, args)))

if __name__ == "__main__":
    main()
