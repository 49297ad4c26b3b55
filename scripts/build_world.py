#!/usr/bin/env python3
"""Train the models of the embedded world and save them to data/world (see nbs/studies/85_world_models.ipynb).

    python scripts/build_world.py                 seeds 0, 1 and 2, one after the other
    python scripts/build_world.py --seed 1        one of them
    python scripts/build_world.py --out FOLDER    somewhere else (TITA_WORLD=FOLDER makes the package use it)
    python scripts/build_world.py --agreement     train nothing: measure anew how far rewards and bases agree
"""
import argparse
import shutil
from pathlib import Path
from tita.core import TitaError, cli

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--out", default=str(Path(__file__).parent.parent/"data"/"world"))
    p.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    p.add_argument("--overwrite", action="store_true")
    p.add_argument("--agreement", action="store_true", help="measure stored rewards")
    args = p.parse_args()
    if args.agreement:
        from tita.studies.own_reward import note_agreement
        for seed in args.seed:
            shared = note_agreement(Path(args.out)/f"seed{seed}", seed)
            print(f"seed {seed}: the reward shares {shared:.3f} of its base's probability")
        return
    for seed in args.seed:
        folder = Path(args.out)/f"seed{seed}"
        if folder.exists() and not (folder/"part.json").exists():  # a part is continued
            if not args.overwrite:
                raise TitaError(f"{folder} is there already; pass --overwrite to replace it, or another --out")
            shutil.rmtree(folder)
    import torch
    from tita.studies.world_models import build, write_card
    if args.threads:
        torch.set_num_threads(args.threads)
    for seed in args.seed:
        card = build(seed, args.out)
        print(f"seed {seed}: {card['seconds']} s, {card['scores']['base']}")
    print(write_card(args.out))

if __name__ == "__main__":
    main()
