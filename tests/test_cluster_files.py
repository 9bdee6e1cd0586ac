"""What is shipped in cluster/ is what Ray, Serve and raydistil take."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import TypeAdapter
from ray.serve.schema import ServeDeploySchema

from raydistil.serve.deployments import built
from raydistil.serve.ingress import FLAGS
from raydistil.serve.served import Wishes

FOLDER = Path(__file__).parents[1] / "cluster"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    found: dict[str, Any] = service["spec"]
    return found


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_application_is_one_that_serve_and_raydistil_take(spec: dict[str, Any]) -> None:
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert app.import_path == f"{built.__module__}:{built.__name__}"
    wishes = TypeAdapter(Wishes).validate_python(app.args)
    mounts = [mount["mountPath"] for mount in groups(spec)[0]["template"]["spec"]["containers"][0]["volumeMounts"]]
    assert wishes.keys is not None
    assert [str(Path(path).parent) for path in (wishes.run_dir, wishes.keys)] == mounts
    assert (
        wishes.shadow > 0
        and wishes.replicas.most + 1
        <= sum(  # the teacher has one, too
            group["maxReplicas"] * int(group["rayStartParams"]["num-cpus"]) for group in groups(spec)[1:]
        )
    )


def test_ray_wants_a_token_and_is_the_version_that_is_installed(spec: dict[str, Any]) -> None:
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterConfig"]["rayVersion"] == ray.__version__


def test_every_pod_has_the_ingress_that_raydistil_serve_starts(spec: dict[str, Any]) -> None:
    for group in groups(spec):
        (container,) = group["template"]["spec"]["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == FLAGS
        assert container["image"] == "raydistil:0.1.0"
        assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == {"runs", "keys"}


def test_the_image_copies_what_there_is() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((FOLDER.parent / name).exists() for name in line.split()[1:-1])
