import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from settings import write

from raydistil.train import SPINS

# On a cluster of its own: the one that tests share has been there all along.
SCRIPT = """
import json, os, sys, time
import psutil, ray
from raydistil import warm
from raydistil.cluster import connected
from raydistil.config.cluster import ClusterConfig

class Asked:
    def __call__(self):
        return os.getpid(), all(module in sys.modules for module in warm.MODULES["teacher"])

def own():
    return os.getpid()

def idle(role):
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::IDLE" in process.cmdline()[0] and process.environ().get("RAYDISTIL_ROLE") == role:
                found.append(process.pid)
        except (psutil.Error, IndexError):
            pass
    return found

def pids(role, count):
    while len(found := idle(role)) < count:
        time.sleep(0.1)
    return found

with connected(ClusterConfig()):
    warm.with_training(ClusterConfig(), 1)
    teachers, readers = pids("teacher", 1), pids("reader", 1)
    options = {"num_cpus": 1, "runtime_env": warm.environment("teacher")}
    first, second = (ray.remote(Asked).options(**options).remote() for _ in range(2))
    asked = ray.get([first.__call__.remote(), second.__call__.remote()])
    read = ray.remote(own).options(num_cpus=0.25, runtime_env=warm.environment("reader"))
    print(json.dumps({"teachers": teachers, "readers": readers, "asked": asked, "read": ray.get(read.remote())}))
"""


@pytest.mark.slow
def test_a_teacher_and_a_reader_find_a_process_that_has_imported_what_they_need() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["readers"] == [seen["read"]]
    assert len(seen["teachers"]) == 1, "no more processes than teachers"
    given = [imported for pid, imported in seen["asked"] if pid in seen["teachers"]]
    assert given == [True], "one of the two actors was given the process that was made for it"


@pytest.mark.slow
def test_a_run_starts_no_process_beside_those_that_were_warmed(
    tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """What Ray Train hands on to its actors must be known before they are: else Ray starts others for them. The student
    shares its cores with the teacher, and knows it; its threads alone are in front."""
    config = write(tmp_path / "run.toml", {
        "output_dir": str(tmp_path), "task": "mlm", "corpus.source": str(corpus_file), "tokens.length": 16,
        "teacher.model": tiny_teacher, "student.layers": [0, 2], "distill.epochs": 1,
    })  # fmt: skip
    seen: dict[str, set[int]] = {"reader": set(), "teacher": set()}
    spins, policies = set(), dict[str, set[int]]()
    driver = psutil.Popen([sys.executable, "-m", "raydistil", "distill", str(config)], stderr=subprocess.DEVNULL)
    while driver.poll() is None:
        for process in driver.children(recursive=True):
            with suppress(psutil.Error, OSError, IndexError):
                role = process.environ().get("RAYDISTIL_ROLE")
                if role is not None:
                    seen[role].add(process.pid)
                title = process.cmdline()[0]
                kind = title.partition("(")[0].partition(".")[0] if title.startswith("ray::") else Path(title).name
                policies.setdefault(kind, set()).update(
                    os.sched_getscheduler(thread.id) for thread in process.threads()
                )
                if kind == "ray::RayTrainWorker":
                    spins.add(process.environ().get(SPINS))
        time.sleep(0.1)
    assert driver.returncode == 0
    assert {role: len(pids) for role, pids in seen.items()} == {"reader": 1, "teacher": 1}
    assert spins == {"5000"}
    assert policies["raylet"] == policies["ray::SplitCoordinator"] == {os.SCHED_BATCH}
    assert policies["ray::MapWorker"] == {os.SCHED_BATCH, os.SCHED_IDLE}
    assert policies["ray::RayTrainWorker"] == {os.SCHED_BATCH, os.SCHED_OTHER}
