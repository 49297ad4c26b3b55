"Every notebook of nbs/runs in its smoke mode, with what must be true of its figures: see scripts/smoke_runs.py."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import smoke_runs
from tita.core import TitaError


def test_every_notebook_has_a_smoke_mode_and_figures_that_are_checked():
    assert smoke_runs.NAMES == sorted(smoke_runs.CHECKS)
    assert all((ROOT/f"scripts/params/smoke/{name}.yaml").is_file() for name in smoke_runs.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", smoke_runs.NAMES)
def test_smoke(name, tmp_path):
    told = smoke_runs.smoke(name, tmp_path)
    assert told["seconds"] > 0 and told["peak_mib"] > 100 and told["found"]


def test_wrong_figures_are_told(tmp_path):
    "A run that ended, and whose figures cannot be."
    (tmp_path/"metrics.json").write_text('{"steps": 6, "measures": {"pairs": {"value": 12}, "mentions": {"auc": 0.7}}}')
    with pytest.raises(TitaError, match="figures are wrong: 6 steps, 12 % ahead"):
        smoke_runs.check_train_reward(tmp_path)
