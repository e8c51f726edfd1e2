"""The Dockerfile and the Kubernetes example: linters, versions, and names that exist."""

import fnmatch
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from helpers import LAUNCHERS, SOURCE_ROOT
from packaging.requirements import Requirement

DOCKER = SOURCE_ROOT / "docker"
REPOSITORY = SOURCE_ROOT.parent
# Extras that the image has.
EXTRAS = re.findall(r"\w+", re.findall(r"--editable .*?\[(.*?)\]", (DOCKER / "Dockerfile").read_text())[0])


def test_dockerfile_passes_the_linter():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_copied_files_are_in_the_build_context():
    text = (DOCKER / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)", text, re.M) for name in line.split()[:-1]]
    assert "requirements.txt" in copied
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().split("\n")
    included = [line[1:] for line in ignored if line.startswith("!")]
    for name in copied:
        assert (REPOSITORY / name).exists()
        assert name == "." or any(fnmatch.fnmatch(name, f"{top}*") for top in included)
    # Files that the build of the package reads.
    assert {"InternVL", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} == set(included)


def test_image_does_not_run_as_root():
    users = re.findall(r"^USER (.*)", (DOCKER / "Dockerfile").read_text(), re.M)
    assert users[-1].isdigit()
    assert int(users[-1]) > 0


def test_constraints_pin_every_dependency_to_an_allowed_version():
    check_constraints(DOCKER / "constraints.txt")


def test_constraints_of_the_installed_versions(tmp_path):
    script = tmp_path / "make_constraints.py"
    shutil.copy(DOCKER / script.name, script)
    subprocess.run([sys.executable, script], check=True, timeout=60)
    pinned = check_constraints(tmp_path / "constraints.txt")
    assert all(pinned[name] == version(name).partition("+")[0] for name in ("torch", "numpy"))
    assert pinned.keys() > {"jinja2", "sympy"}  # of an extra; of torch


def check_constraints(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for text in requires("m3llm"):
        requirement = Requirement(text)
        extras = [extra for extra in (*EXTRAS, "") if _applies(requirement, extra)]
        if extras:
            assert requirement.specifier.contains(pinned[requirement.name], prereleases=True), text
    return pinned


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def test_image_has_all_features():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == extras.keys() - {"dev", "flash"}  # flash needs a compiler
    pinned = (DOCKER / "constraints.txt").read_text()
    for text in itertools.chain.from_iterable(extras[name] for name in EXTRAS):
        assert f"\n{re.split('[^a-z0-9-]', text)[0]}==" in pinned, text


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    documents = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_manifests_match_the_kubernetes_schema(manifests):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in manifests.values():
        validator.validate(document, validator.latest_version(), strict=True)


def test_job_starts_the_launcher_with_its_variables(manifests):
    job, pod = manifests["Job"]["spec"], manifests["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    launcher = REPOSITORY / container["command"][-1].split()[-1]
    assert launcher.parent == LAUNCHERS
    assert launcher.is_file()
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    scripts = launcher.read_text() + (LAUNCHERS.parents[1] / "common.sh").read_text()
    assert all(re.search(rf"\b{name}\b", scripts) for name in variables.keys() - {"XDG_CACHE_HOME"})
    assert int(variables["NNODES"]) == job["completions"] == job["parallelism"]
    assert variables["GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # Host names of the pods of an Indexed Job: name-index.subdomain, through a headless service.
    name, service = manifests["Job"]["metadata"]["name"], manifests["Service"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": name})
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
