"""What the training notebooks cannot show: exactness against TRL, processes that are killed, command lines."""
import copy, json, os, signal, subprocess, sys, time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import pytest, torch
from PIL import Image
from datasets import Dataset, Features, Image as ImageFeature, List, Value
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil)
from trl import DPOConfig, DPOTrainer
from tita.train.dpo import PrefixSharedDPOConfig, PrefixSharedDPOTrainer
from tita.world.embedded import make_scenes, tiny_pair

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = "what is it ?", "is there a red square in this image ?", "say"
ANSWERS = "a red square", "it is blue", "yes", "no there is none in it at all", "blue"
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")


class ImageQwen(Qwen2_5_VLProcessor):
    "Qwen2.5-VL's processor without its video part, which needs torchvision."
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()


def word_tokenizer(words, special=(), **tokens):
    "A tokenizer that knows these words and splits at blanks."
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=tokens["unk_token"]))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tok, **tokens)


def tiny_qwen():
    words = SPECIAL + sorted(set(" ".join((*QUESTIONS, *ANSWERS, "user assistant")).split()))
    tok = word_tokenizer(words, SPECIAL, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
    named = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    torch.manual_seed(0)
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48,
        fullatt_block_indexes=[1], window_size=56)
    text = dict(vocab_size=len(words), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2]))
    config = Qwen2_5_VLConfig(**{k: words.index(v) for k, v in named.items()}, tie_word_embeddings=False,
        vision_config=vision, text_config=text)
    return Qwen2_5_VLForConditionalGeneration(config).float().eval(), ImageQwen(images, tok, chat_template=TEMPLATE)


def tiny_llava():
    _, model, processor = tiny_pair()
    return model, processor


def rows(n_images=3, questions=2):
    "Pairs about images of several sizes; the first image has one question more than the last."
    images = [s.image.resize(size) for s, size in zip(make_scenes(n_images, seed=9), [(56, 56), (84, 56), (28, 84)])]
    asked = [(i, QUESTIONS[k]) for i in range(n_images)
        for k in range(questions + (i == 0) - (i == n_images - 1))]
    def pair(k, i, question):
        chosen, rejected = ANSWERS[(i + k) % 5], ANSWERS[(i + k + 1 + k % 3) % 5]
        said = dict(prompt=("user", question), chosen=("assistant", chosen), rejected=("assistant", rejected))
        return dict(images=[images[i]]) | {name: [dict(role=who, content=text)] for name, (who, text) in said.items()}
    return [pair(k, i, q) for k, (i, q) in enumerate(asked)]


def as_dataset(pairs):
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(ImageFeature()), prompt=message, chosen=message, rejected=message)
    return Dataset.from_dict({k: [r[k] for r in pairs] for k in pairs[0]}, features=features)


def loss_and_gradient(trainer):
    "Of all rows in one batch."
    if "prompt_ids" in trainer.train_dataset.column_names:
        batch = trainer.data_collator(list(trainer.train_dataset))
    else:
        batch = trainer.data_collator([dict(r) for r in trainer.train_dataset])
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, metrics


def moved(model, scale=0.02):
    "The same model a little elsewhere, so that a policy differs from its reference."
    policy = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return policy


ADAPTER = dict(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)


def freeze_tower(model):
    for n, p in model.named_parameters():
        p.requires_grad_("vision_tower" not in n and not ("visual" in n and "merger" not in n))


def compare(build, tmp_path, lora=False, share="image", tower=False, **settings):
    model, processor = build()
    policy = moved(model)
    usual = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], per_device_train_batch_size=8)
    usual |= settings
    ours_model, ref = copy.deepcopy(policy), None if lora else model
    given = dict(train_dataset=as_dataset(rows()), processing_class=processor)
    given["peft_config"] = LoraConfig(**ADAPTER) if lora else None
    if not tower:
        freeze_tower(policy)
    args = DPOConfig(str(tmp_path / "trl"), max_length=None, **usual)
    trl = DPOTrainer(model=policy, ref_model=copy.deepcopy(ref), args=args, **given)
    theirs = loss_and_gradient(trl)
    args = PrefixSharedDPOConfig(str(tmp_path / "ours"), share=share, freeze_vision=not tower, **usual)
    ours = PrefixSharedDPOTrainer(model=ours_model, ref_model=copy.deepcopy(ref), args=args, **given)
    if lora:
        ours.model.load_state_dict(trl.model.state_dict())
    mine = loss_and_gradient(ours)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert mine[1].keys() == theirs[1].keys()
    scale = max(g.abs().max() for g in theirs[1].values())
    for name, grad in theirs[1].items():
        torch.testing.assert_close(mine[1][name], grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")
    names = "rewards/margins rewards/accuracies logps/chosen logps/rejected entropy mean_token_accuracy"
    for key in names.split():
        assert mine[2][key] == pytest.approx(theirs[2][key], rel=1e-4, abs=1e-5), key
    return ours


@pytest.mark.parametrize("build", [tiny_llava, tiny_qwen])
@pytest.mark.parametrize("lora", [False, True])
def test_equals_trl(build, lora, tmp_path):
    compare(build, tmp_path, lora)


@pytest.mark.parametrize("settings", [dict(share="pair"), dict(share="none"), dict(tower=True),
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]), dict(loss_type=["ipo"]),
    dict(loss_type=["sigmoid_norm", "hinge"]), dict(use_weighting=True), dict(ld_alpha=0.5),
    dict(f_divergence_type="js_divergence"), dict(gradient_checkpointing=True)], ids=str)
def test_settings_equal_trl(settings, tmp_path):
    compare(tiny_llava, tmp_path, **settings)


def test_tower_of_patches_is_cached(tmp_path):
    "Qwen2.5-VL's tower gives the patches of all images in one row; they are told apart by the grid."
    ours = compare(tiny_qwen, tmp_path)
    assert not ours.cache.kept  # the merger is trained, and it is part of the tower's forward
    args = PrefixSharedDPOConfig(str(tmp_path / "frozen"), freeze_projector=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[])
    frozen = PrefixSharedDPOTrainer(model=tiny_qwen()[0], args=args, ref_model=tiny_qwen()[0],
        train_dataset=as_dataset(rows()), processing_class=ours.processing_class)
    calls = frozen.cache.calls
    assert frozen.cache.complete(3) or frozen.ref_model is not None
    first = loss_and_gradient(frozen)
    again = loss_and_gradient(frozen)
    assert first[0] == pytest.approx(again[0], rel=1e-6)
    assert frozen.cache.complete(3) and frozen.cache.calls <= calls + 1


# ---- processes

TRAIN = "from tita.train.recipes import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny model with its processor, eight images, and 24 pairs about them."
    root = tmp_path_factory.mktemp("train")
    (root / "images").mkdir()
    model, processor = tiny_llava()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    lines = []
    for i, s in enumerate(make_scenes(8, seed=4)):
        s.image.save(root / "images" / f"{i}.png")
        for k, q in enumerate(s.questions[1:4]):
            answers = dict(chosen=q.answer, rejected="no" if q.answer == "yes" else "yes")
            row = dict(question_id=f"{i}-{k}", image=f"{i}.png", prompt=q.text, source="test") | answers
            lines.append(json.dumps(row))
    (root / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return root


def flags(folder, out, *more):
    data = f"--model_name_or_path {folder}/model --pairs {folder}/pairs.jsonl --images {folder}/images"
    usual = f"--output_dir {folder}/{out} --logging_steps 1 --report_to none --learning_rate 1e-3"
    return ["dpo", *data.split(), *usual.split(), *map(str, more)]


def start(argv, launcher=(), **env):
    command = [*launcher, "tita-train"] if launcher else [sys.executable, "-c", TRAIN]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    usual = dict(OMP_NUM_THREADS="1", TITA_PROGRESS="0", HF_HUB_OFFLINE="1", PATH=path)
    return subprocess.Popen([*command, *argv], env={**os.environ, **usual, **env}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, timeout=600):
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


def weights(folder):
    return load_file(folder / "model.safetensors")


def losses(folder):
    return [h["loss"] for h in json.loads((folder / "metrics.json").read_text())["history"]]


def wait_for(path, process, timeout=3600):
    end = time.time() + timeout
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()[0]
        time.sleep(0.02)


def test_killed_and_resumed_equals_undisturbed(folder):
    many = "--per_device_train_batch_size 4 --num_train_epochs 12 --save_steps 10 --chosen_weight 0.03".split()
    code, text = finish(start(flags(folder, "whole", *many)))
    assert code == 0, text
    process = start(flags(folder, "killed", *many))
    wait_for(folder / "killed" / "checkpoint-20" / "complete.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "killed" / "metrics.json").exists()
    (folder / "killed" / "checkpoint-999").mkdir()  # one that was being written
    code, text = finish(start(flags(folder, "killed", *many)))
    assert code == 2 and "not empty" in text and "--resume" in text and "Traceback" not in text
    code, text = finish(start(flags(folder, "killed", *many, "--beta", 0.2, "--resume")))
    assert code == 2 and "other settings: beta" in text
    code, text = finish(start(flags(folder, "killed", *many, "--resume")))
    assert code == 0, text
    assert losses(folder / "killed") == pytest.approx(losses(folder / "whole"), abs=1e-7)
    assert len(losses(folder / "whole")) == 72
    one, other = weights(folder / "whole"), weights(folder / "killed")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-7)
    code, text = finish(start(flags(folder, "killed", *many, "--resume")))
    assert code == 0, text  # finished: nothing to do


def tiny_llama(words):
    "The configuration of a language model that does not see."
    from transformers import LlamaConfig
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(vocab_size=words, **size)


def test_command_line_tells_mistakes(folder, capsys):
    "One line each, exit code 2, no traceback."
    from tita.train.recipes import main
    (folder / "no_image.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "equal.jsonl").write_text('{"image": "0.png", "prompt": "?", "chosen": "a", "rejected": "a"}\n')
    (folder / "text.jsonl").write_text('{"image": "none.png", "prompt": "?", "chosen": "a", "rejected": "b"}\n')
    (folder / "images" / "none.png").write_text("no image")
    text_only = folder / "text_only"
    tiny_llava()[1].save_pretrained(text_only)
    from transformers import LlamaForCausalLM
    LlamaForCausalLM(tiny_llama(32)).save_pretrained(text_only)
    cases = {("--pairs", folder / "no_image.jsonl"): "no_image.jsonl:1: no image",
        ("--pairs", folder / "empty.jsonl"): "no pairs",
        ("--pairs", folder / "equal.jsonl"): "chosen and rejected are equal",
        ("--pairs", folder / "text.jsonl"): "none.png: not an image",
        ("--model_name_or_path", text_only): "text_only",
        ("--model_name_or_path", folder / "images"): "no processor here",
        ("--learning_rat", "1"): "learning_rat",
        ("--max_length", "30"): "24 of 24 rows are longer than 30 tokens",
        ("--loss_type", "sigmoid", "--loss_weights", "1", "2"): "loss_weights",
        ("--attn_implementation", "flash_attention_2"): "flash"}
    for i, (flag, why) in enumerate(cases.items()):
        with pytest.raises(SystemExit) as exit:
            main(flags(folder, f"bad{i}", *flag))
        text = capsys.readouterr().err
        assert exit.value.code == 2 and why in text and "error: " in text, (flag, text)


def test_attention_is_measured_once_and_kept_in_the_metrics(folder):
    "Where it is asked for the first batch is timed with what this machine has; a named one is not questioned."
    from tita.train.recipes import main, parse
    out = folder / "measured"
    main(flags(folder, "measured", "--max_steps", "1", "--measure_attention", "true"))
    assert json.loads((out / "metrics.json").read_text())["attention_seconds"]["sdpa"] > 0
    asked, named = ("--measure_attention", "true"), ("--attn_implementation", "sdpa")
    for more, wanted in (((), torch.cuda.is_available()), (asked, True), (asked + named, False)):
        assert parse("dpo", [str(a) for a in flags(folder, "named", *more)[1:]])[1].measure_attention == wanted


@pytest.mark.slow
def test_flex_attention_where_it_is_faster(tmp_path, monkeypatch):
    "When its time is less trees attend with FlexAttention, which gives SDPA's loss. A CPU runs its forward alone."
    import tita.train.dpo
    from tita.train.training_runs import plain_model
    model, processor = tiny_llava()
    def make(**kw):
        args = PrefixSharedDPOConfig(str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8, **kw)
        return PrefixSharedDPOTrainer(copy.deepcopy(model), args=args, train_dataset=rows(), processing_class=processor)
    def loss(trainer):
        batch = trainer.data_collator(list(trainer.get_train_dataloader().dataset))
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()
    plain = make()
    wanted = loss(plain)
    kind = lambda t: t.model.config.text_config._attn_implementation
    monkeypatch.setattr(tita.train.dpo, "attention_seconds", lambda *args: dict(sdpa=2., flex_attention=1.))
    flex = make(measure_attention=True)
    found = loss(flex)
    assert abs(found - wanted) <= 1e-5 * abs(wanted) and kind(plain) == "sdpa" and kind(flex) == "flex_attention"
    assert flex.model.config.vision_config._attn_implementation == "sdpa"
    assert plain_model(flex).config.text_config._attn_implementation == "sdpa"


def test_processors_and_models_that_do_not_see(tmp_path):
    "A tokenizer without the image token, and a model without a vision tower."
    from tita.core import TitaError
    from tita.train.recipes import train_dpo
    model, processor = tiny_llava()
    pairs = [dict(image=Image.new("RGB", (8, 8)), prompt="?", chosen="yes", rejected="no")]
    settings = dict(output_dir=tmp_path / "run", max_steps=1, report_to="none", use_cpu=True, overwrite=True)
    words = [w for w in processor.tokenizer.get_vocab() if w != "<image>"]
    blind = copy.deepcopy(processor)
    blind.tokenizer = word_tokenizer(words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    with pytest.raises(TitaError, match="does not know the image token '<image>'"):
        train_dpo(model, blind, pairs, **settings)
    from transformers import LlamaForCausalLM
    text = LlamaForCausalLM(tiny_llama(len(words) + 1))
    with pytest.raises(TitaError, match="no vision tower"):
        train_dpo(text, processor, pairs, **settings)
    with pytest.raises(TitaError, match="no processor"):
        train_dpo(model, processor.tokenizer, pairs, **settings)
    with pytest.raises(TitaError, match="no pairs|empty"):
        train_dpo(model, processor, [], **settings)


# what the seeds' scripts say: method, and settings by their names here
SEVA = dict(learning_rate=2e-6, beta=0.1, num_train_epochs=2, per_device_train_batch_size=16,
    lr_scheduler_type="cosine", warmup_steps=0, lora_r=1024, lora_alpha=2048, freeze_projector=True,
    freeze_vision=True, deepspeed="zero3",
    max_length=2048)
TITA = SEVA | dict(per_device_train_batch_size=8, use_peft=False, freeze_projector=False, deepspeed="zero3_offload",
    lora_r=None, lora_alpha=None)
MLLM = dict(learning_rate=4e-4, projector_lr=2e-5, num_train_epochs=3, lora_r=128, lora_alpha=256, freeze_vision=True,
    freeze_projector=False, deepspeed="zero3")
PUBLISHED = dict(tita=("dpo", TITA), seva_7b_diffusion500=("dpo", SEVA), seva_7b_diffusion800=("dpo", SEVA),
    mllm_dpo_13b=("dpo", MLLM | dict(learning_rate=5e-5, beta=0.1)), mllm_sft_13b=("sft", MLLM),
    mllm_rejection_sampling_13b=("sft", MLLM), mllm_steerlm_13b=("sft", MLLM))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name, tmp_path):
    "Each YAML is read by tita-train as it stands (but for what only a GPU has), and says what was published."
    import yaml
    from tita.train.recipes import parse
    method, wanted = PUBLISHED[name]
    there = yaml.safe_load((ROOT / f"scripts/params/train/{name}.yaml").read_text())
    assert (ROOT / there["deepspeed"]).exists() and Path(there.pop("deepspeed")).stem == wanted["deepspeed"]
    assert there["bf16"] and there["gradient_checkpointing"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(there | dict(bf16=False, tf32=False)))
    given = ["--config", str(tmp_path / "p.yaml"), "--pairs", "a.jsonl", "--images", "images"]
    data, args, model = parse(method, given)
    for key, value in wanted.items():
        if key != "deepspeed" and value is not None:
            assert getattr(args, key, getattr(model, key, None)) == value, key
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert batch == wanted.get("per_device_train_batch_size", 32)
    assert data.chat_template == "v1" and model.use_peft == wanted.get("use_peft", True)


JOB = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4",
    SLURM_CPUS_PER_TASK="32", SLURM_RESTART_COUNT="1")
STARTED = dict(
    deepspeed=("run_dpo.sh", dict(LAUNCHER="deepspeed"),
        "deepspeed --include localhost:0,1,2,3 --no_python tita-train dpo"),
    torchrun=("run_dpo.sh", dict(LAUNCHER="torchrun", GPUS="2,3"),
        "torchrun --standalone --nproc_per_node 2 --no-python tita-train dpo"),
    accelerate=("run_dpo.sh", dict(LAUNCHER="accelerate", METHOD="sft"),
        "accelerate launch --multi_gpu --num_processes 4 --no_python tita-train sft"),
    cpu=("run_dpo.sh", dict(DS_ACCELERATOR="cpu", GPUS="0,1"),
        "deepspeed --num_accelerators 2 --no_python tita-train dpo"),
    slurm=("slurm_dpo.sh", JOB, "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc_per_node 4 --rdzv_id 7 "
        "--rdzv_backend c10d --rdzv_endpoint node1:29500 --no-python tita-train dpo"))


@pytest.mark.parametrize("script,env,wanted", STARTED.values(), ids=STARTED)
def test_launchers(script, env, wanted, tmp_path):
    "What the scripts start, with programs that only say how they were called."
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts/params/train").mkdir(parents=True)
    (tmp_path / "scripts/params/train/tita.yaml").write_text("")
    (tmp_path / "scripts" / script).write_text((ROOT / "scripts" / script).read_text())
    for name in ("deepspeed", "torchrun", "accelerate", "srun", "tita-train"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "pictures").mkdir()
    for p in (tmp_path / "bin").iterdir():
        p.chmod(0o755)
    def command(**more):
        usual = dict(PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", PAIRS="pairs.jsonl", IMAGES="pictures")
        argv = ["bash", tmp_path / "scripts" / script, "--beta", "0.2"]
        return subprocess.run(argv, env=usual | env | more, capture_output=True, text=True)
    run = command()
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(wanted)
    assert "--config scripts/params/train/tita.yaml --pairs pairs.jsonl --images pictures" in run.stdout
    assert "--beta 0.2" in run.stdout and ("--resume" in run.stdout) == (script == "slurm_dpo.sh")
    if script == "run_dpo.sh":
        missing = command(PAIRS="none.jsonl")
        assert missing.returncode == 2 and "none.jsonl is missing" in missing.stderr
        assert command(LAUNCHER="mpi").returncode == 2


@pytest.mark.parametrize("mode", ["P", "CMYK", "I;16", "LA", "1"])
def test_images_of_odd_modes_train(mode, tmp_path):
    model, processor = tiny_llava()
    base = Image.new("L", (60, 40), 90)
    image = Image.new("I;16", (60, 40), 30000) if mode == "I;16" else base.convert(mode)
    file = tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    image.save(file)
    from tita.train.recipes import train_dpo
    asked = dict(prompt="Is there a ball in the image?", chosen="yes", rejected="no")
    pairs = [asked | dict(image=im) for im in (str(file), image)]
    _, history = train_dpo(model, processor, pairs, output_dir=tmp_path / "run", max_steps=1, logging_steps=1,
        report_to="none", use_cpu=True)
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_turned_and_animated_images(tmp_path):
    "An EXIF rotation is applied, and of an animation the first frame is seen."
    from tita.train.images import ImageStore
    _, processor = tiny_llava()
    store = ImageStore(processor)
    scene = make_scenes(1, seed=8)[0].image
    exif = scene.getexif()
    exif[0x0112] = 6
    scene.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    scene.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", scene.size)], lossless=True)
    sources = scene, str(tmp_path / "turned.png"), str(tmp_path / "moving.webp")
    clean, turned, moving = (store.inputs([store.add(x)])["pixel_values"] for x in sources)
    torch.testing.assert_close(turned, clean)
    torch.testing.assert_close(moving, clean)


def test_no_space_left(folder, tmp_path):
    "On a small file system: a clear error, and what is left is not taken for a checkpoint."
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        argv = flags(folder, "unused", "--save_steps", 1, "--max_steps", 4)
        argv[argv.index("--output_dir") + 1] = str(small / "run")
        code, text = finish(start(argv))
        assert code == 2 and "no space left" in text and "Traceback" not in text, text[-3000:]
        from tita.train.training_runs import last_checkpoint
        last = last_checkpoint(small / "run")
        assert last is None or Path(last, "model.safetensors").stat().st_size > 1e6
        assert not (small / "run" / "metrics.json").exists()
    finally:
        subprocess.run(["umount", small])
