#!/usr/bin/env python3
"""What makes a reward good, in the embedded world: the baselines on one scored set; reward sizes against noise levels; what each reward is worth.

    python scripts/study_reward.py                     seed 0, in runs/study_reward/, writes results/study_reward.{json,md,png}
    python scripts/study_reward.py --scenes 40 --test 20 --out /tmp/x --runs /tmp/y    a quick look

What is there is not computed again: killed and started again, it goes on. Explained in nbs/studies/83_reward_study.ipynb.
"""
import argparse, copy, json, os
from pathlib import Path
os.environ.setdefault("DS_ACCELERATOR", "cpu")
from tita.core import cli, progress, run_info, set_seed, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.eval.evaluation import evaluate, scene_questions
from tita.data.answers import generate_answers
from tita.eval.metrics import bootstrap, score
from tita.models import load_vlm
from tita.studies.stages import probe_rows
from tita.show.plots import count_text
from tita.show.report import results_table
from tita.studies.reward_study import baseline_sets, draw_grid, grid_cell, own_measures, score_answers, steered, train_baselines
from tita.world.embedded import ASK, OBJECTS, load_models, make_scenes, tiny_model
from tita.studies.world_models import distill, save_model

ROOT = Path(__file__).resolve().parent.parent
KINDS = "caption", "pope_random", "pope_popular", "pope_adversarial"
SHOWN = "pope_random_accuracy", "pope_popular_accuracy", "pope_adversarial_accuracy", "chair_i", "chair_s", "recall"
TITLES = dict(base="large model", before="small model before training", sft="SFT on the best answer", rejection_sampling="rejection sampling", steerlm="SteerLM", dpo="DPO on scored pairs")
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
        self.config = dict(learning_rate=args.learning_rate, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, lr_scheduler_type="linear", warmup_steps=.1, weight_decay=0., logging_steps=5, report_to="none")

    def score(self, name, *models, rows=None, **settings):
        "Scores of one system on the test scenes."
        return score(evaluate(AlignedDecoder(*models, processor=self.processor, **settings), rows or self.test, None, self.runs/"test"/f"{name}.jsonl", chunk=2048, desc=name, max_new_tokens=48), OBJECTS, n=self.args.test)

    def guided(self, name, reward, ref):
        return self.score(name, self.base, reward, ref=ref, form="ratio", lam=self.args.lam, bound=self.args.bound)

def baselines(s: Study) -> dict:
    "One scored set, four methods: what each answers by itself, and what each brings as a reward."
    answers = generate_answers(s.reward, s.processor, s.rows, s.images, views=("clean",), out=s.runs/"scored.jsonl", n=4, temperature=1.2, seed=s.args.seed, max_new_tokens=48)
    sets = baseline_sets(score_answers(answers, s.scenes))
    trained = train_baselines(s.reward, s.processor, sets, s.images, s.runs/"baselines", beta=s.args.beta, seed=s.args.seed, **s.config)
    alone = dict(before=s.score("before", s.reward)) | {k: s.score(k, m, rows=steered(s.test) if k == "steerlm" else None) for k, m in trained.items()}
    guiding = dict(base=s.score("base", s.base)) | {k: s.guided(f"{k}_guides", m, s.reward) for k, m in trained.items() if k != "steerlm"}
    return dict(rows={k: len(v) for k, v in sets.items()}, alone=bootstrap(alone, "before")["systems"], guiding=bootstrap(guiding, "base")["systems"])

def sizes(s: Study) -> dict:
    "Rewards of three sizes: a smaller one distilled here, the committed one, and a copy of the base."
    folder, small = s.runs/"small", tiny_model(32, 1, seed=s.args.seed + 70)
    if not (folder/"distill.json").exists():
        small.model.vision_tower.load_state_dict(s.base.model.vision_tower.state_dict())
        told = distill(s.base, small, s.args.seed, steps=s.args.distill_steps, scenes=s.args.distill_scenes, gate=9.)
        save_model(small.eval(), folder, s.runs/"tower.safetensors")
        write_json(folder/"distill.json", told)
    return dict(small=load_vlm(folder, device="cpu"), medium=s.reward, large=copy.deepcopy(s.base))

def grid(s: Study) -> list:
    "Every size with every noise level: its own measures, and what comes out aligned."
    shown = make_scenes(s.args.valid, s.args.seed, "valid")
    asked = [dict(question_id=str(i), image=str(i), text=ASK["caption"]) for i in range(len(shown))]
    said = generate_answers(s.base, s.processor, asked, {str(i): x.image for i, x in enumerate(shown)}, views=("clean",), out=s.runs/"captions.jsonl", max_new_tokens=48)
    captions = [dict(image=shown[int(r["image"])].image, prompt=r["text"], answer=r["answer"]) for r in said]
    cells, results = [], dict(base=s.score("base", s.base))
    for size, model in sizes(s).items():
        for view in VIEWS:
            name = f"{size}_{view}"
            trained, held, n = grid_cell(model, s.processor, s.rows, s.images, s.runs/"grid"/name, view, seed=s.args.seed, beta=s.args.grid_beta, **s.config)
            results[name] = s.guided(name, trained, model)
            cells.append(dict(name=name, size=size, view=view, parameters=sum(p.numel() for p in model.parameters()), pairs=n, held=len(held)) | own_measures(trained, model, s.processor, held, s.images, captions, [shown[int(r["image"])].objects for r in said]))
    done = bootstrap(results, "base")["systems"]
    return [dict(name="base") | done["base"]] + [c | done[c["name"]] for c in cells]

def cell(c: dict, digits: int = 1) -> str:
    return f"{c['value']:.{digits}f} [{c['low']:.{digits}f}, {c['high']:.{digits}f}]"

def report(found: dict, args) -> str:
    "Markdown of both parts."
    part, cells, run = found["baselines"], [c for c in found["grid"] if c["name"] != "base"], found["run"]
    head = "| reward | noise | pairs | CHAIR_i ↓ | POPE adversarial ↑ | held-out pairs, chosen ahead | AUC of token rewards |\n|---|---|---|---|---|---|---|\n"
    base = found["grid"][0]
    rows = f"| none (base alone) | | | {cell(base['chair_i'])} | {cell(base['pope_adversarial_accuracy'])} | | |\n"
    rows += "".join(f"| {count_text(c['parameters'])} | t = {c['view'].rpartition('-')[2]} | {c['pairs']} | {cell(c['chair_i'])} | {cell(c['pope_adversarial_accuracy'])} | {cell(c['pair_accuracy'])} | {cell(c['auc'], 2)} |\n" for c in cells)
    mid = next(c for c in cells if c["size"] == "medium" and c["view"] == VIEWS[-1])
    lengths = "".join(f"| {'fewer than ' + str(b['high']) if b['low'] is None else str(b['low']) + ' or more' if b['high'] is None else str(b['low']) if b['high'] - b['low'] == 1 else str(b['low']) + ' to ' + str(b['high'] - 1)} | {b['pairs']} | {b['margin']:.2f} | {b['accuracy']:.0f} |\n" for b in mid["by_length"])
    made = f"Made by `python scripts/study_reward.py` ({', '.join(f'{k} {v}' for k, v in found['settings'].items() if k not in ('out', 'runs'))}), commit {(run['commit'] or 'unknown')[:12]}. In brackets 95% bootstrap intervals over scenes."
    return "\n\n".join(["# What makes a reward good", made, "## One scored set, four methods",
        f"Four answers of the small model to each of {found['questions']} questions, drawn at temperature 1.2. The scores are made from what is in the pictures: **this uses labels**, as mllm-dpo's judge does. Rows to train on: {', '.join(f'{TITLES[k]} {v}' for k, v in part['rows'].items())}. "
        "Each model starts from the small model before training. The intervals in the tables are of paired differences, bold where clear of zero.",
        "What the trained model answers by itself, against the small model before training:", results_table({"systems": part["alone"]}, SHOWN, reference={k: "before" for k in part["alone"]}, titles=TITLES),
        f"What it brings as a reward of the frozen large model (bounded ratio, λ = {args.lam:g}, ±{args.bound:g} nats). SteerLM wants another prompt than its base and is left out:", results_table({"systems": part["guiding"]}, SHOWN, reference={k: "base" for k in part["guiding"]}, titles=TITLES),
        "## Three sizes, three noise levels", "No labels: the reward's own answers to clean images are preferred to those to noised ones. The smallest is distilled from the base for this study, the middle one is the committed reward, the largest is a copy of the base.",
        "![sizes and noise](study_reward.png)", head + rows, "## Is it only length?", f"The middle reward at t = {VIEWS[-1].rpartition('-')[2]}, held-out pairs:",
        "| chosen longer by, tokens | pairs | mean margin, nats | chosen ahead, % |\n|---|---|---|---|\n" + lengths]) + "\n"

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(seed=0, scenes=400, presence=8, test=400, valid=200, epochs=2, batch=64, distill_steps=900, distill_scenes=1500).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in dict(learning_rate=3e-4, beta=.1, grid_beta=1., lam=1., bound=1.).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    p.add_argument("--out", type=Path, default=ROOT/"results")
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"study_reward")
    args = p.parse_args()
    s = Study(args)
    found = dict(settings={k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items() if k not in ("out", "runs")}, questions=len(s.rows), baselines=baselines(s), grid=grid(s), run=run_info())
    write_json(args.out/"study_reward.json", found)
    cells = [c for c in found["grid"] if c["name"] != "base"]
    (args.out/"study_reward.png").write_bytes(draw_grid(cells, base={k: c["value"] for k, c in found["grid"][0].items() if isinstance(c, dict)}).png())
    print(write_text(args.out/"study_reward.md", report(found, args)))

if __name__ == "__main__":
    main()
