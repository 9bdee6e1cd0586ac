"""What the README and the shipped configurations say is so."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from raydistil.cli import app
from raydistil.config import Config, load_config
from raydistil.masking import MaskingConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
JOBS = sorted((ROOT / "jobs").glob("*.toml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path, []).name == path.stem


def test_the_readmes_configuration_loads() -> None:
    """The first one is whole; the others are parts of such a file."""
    first, *parts = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    for part in ("", *parts):
        assert Config.model_validate(tomllib.loads(first + part)).task == "classification"


def test_the_readme_names_commands_and_files_that_exist() -> None:
    rows = re.findall(r"\| `raydistil ([a-z |\\]+?)(?: [A-Z_]+)?` \|", README)
    named = {name for row in rows for name in re.findall("[a-z]+", row)}
    assert named == set(app.commands)
    for job in re.findall(r"jobs/[a-z-]+\.toml", README):
        assert (ROOT / job).exists(), job


def test_the_distilbert_recipe_is_the_published_one() -> None:
    config = load_config(ROOT / "jobs" / "distilbert.toml", [])
    assert config.distill is not None
    assert config.student.layers == (0, 2, 4, 7, 9, 11)
    loss = config.distill.loss
    assert (loss.kd, loss.temperature, loss.task, loss.cosine, loss.kd_positions) == (5, 2, 2, 1, "all")
    assert config.masking == MaskingConfig(kind="frequency", share=0.15, smoothing=0.7)
    assert (config.distill.lr, config.distill.betas, config.distill.eps) == (5e-4, (0.9, 0.98), 1e-6)
    assert (config.distill.weight_decay, config.distill.warmup_share, config.distill.clip) == (0, 0.05, 5)
    assert (config.distill.micro_batch_size, config.distill.accumulation, config.distill.epochs) == (5, 50, 3)


def raydistil(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAYDISTIL_CACHE": os.environ["RAYDISTIL_CACHE"]}
    command = [sys.executable, "-m", "raydistil", *arguments, "--set", f"output_dir={folder}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_check_of_the_quickstart_passes(tmp_path: Path) -> None:
    done = raydistil("check", "jobs/quickstart.toml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"]


@pytest.mark.slow
def test_the_quickstart_on_fewer_rows(tmp_path: Path) -> None:
    """The README's command as a user types it, with real weights; only the sizes are smaller."""
    small = ["corpus.max_rows_per_label=150", "finetune.epochs=1", "distill.epochs=3", "evaluate.latency_rounds=10"]
    overrides = [word for key in small for word in ("--set", key)]
    done = raydistil("run", "jobs/quickstart.toml", "--json", *overrides, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    promised = "teacher_score student_score retention teacher_params student_params speedup wall_s student_dir"
    assert set(promised.split()) <= report.keys()
    assert report["stages"]["distill"]["teacher_builds"] == 1
    assert report["stages"]["distill"]["overlap_s"] > 0
    assert (report["teacher_params"], report["student_params"]) == (22_715_526, 17_392_134)
