"""One of several processes: an SGD step of TRL's DPOTrainer and of ours under DeepSpeed, for two families, with and
without LoRA. With a rate of 1 the step is the gradient.

    torchrun --nproc_per_node 2 tests/zero_worker.py STAGE FOLDER   writes FOLDER/STAGE.json: how far they are apart
"""
import copy, json, os, sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed, torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer
from tita.train.dpo import PrefixSharedDPOConfig, PrefixSharedDPOTrainer
from test_train import ADAPTER, as_dataset, freeze_tower, moved, rows, tiny_llava, tiny_qwen

stage, folder = sys.argv[1], Path(sys.argv[2])
zero = dict(zero_optimization=dict(stage=int(stage[-1])), zero_allow_untested_optimizer=True, train_batch_size="auto",
    train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto", gradient_clipping="auto")
usual = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], per_device_train_batch_size=3,
    max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, optim="sgd",
    train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False)


class Keep(TrainerCallback):
    "All weights of the engine's model, put together, before and after."
    def __init__(self):
        self.weights = []
    def look(self, model):
        module = getattr(model, "module", model)
        found = {}
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([p]):
                found[name.replace("_checkpoint_wrapped_module.", "")] = p.detach().float().clone()
        self.weights.append(found)
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.look(model)
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.look(model)


def step(kind, build, lora):
    "One step; loss, margin, and the gradient of each weight."
    unset_hf_deepspeed_config()  # of the step before: under ZeRO-3 models would be born in parts
    model, processor = build()
    policy = moved(model)
    keep = Keep()
    torch.manual_seed(0)
    freeze_tower(policy)
    settings = usual | dict(output_dir=str(folder / kind), deepspeed=copy.deepcopy(zero))
    given = dict(model=policy, ref_model=None if lora else copy.deepcopy(model), train_dataset=as_dataset(rows()))
    given |= dict(processing_class=processor, peft_config=LoraConfig(**ADAPTER) if lora else None, callbacks=[keep])
    if kind == "trl":
        trainer = DPOTrainer(args=DPOConfig(max_length=None, **settings), **given)
    else:
        trainer = PrefixSharedDPOTrainer(args=PrefixSharedDPOConfig(**settings), **given)
    assert trainer.is_deepspeed_enabled
    trainer.train()
    history = next(h for h in trainer.state.log_history if "loss" in h)
    (before, after), loss = keep.weights, history["loss"]
    return loss, history["rewards/margins"], {n: before[n] - after[n] for n in before}


def far_apart(one, other) -> dict:
    "How far two steps are apart."
    loss, margin, gradient = one
    other_loss, other_margin, other_gradient = other
    scale = max(g.abs().max() for g in gradient.values()).item()
    gap = max((gradient[n] - other_gradient[n]).abs().max() for n in gradient if n in other_gradient).item()
    return dict(loss=abs(loss - other_loss) / abs(loss), margin=abs(margin - other_margin), gradient=gap / scale,
        names=sorted(gradient) == sorted(other_gradient), scale=scale, weights=len(gradient))


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = {}
    for build in tiny_llava, tiny_qwen:
        for lora in False, True:
            name = f"{build.__name__}{'_lora' if lora else ''}"
            found[name] = far_apart(step("trl", build, lora), step("ours", build, lora))
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"{stage}.json").write_text(json.dumps(found, indent=1))
