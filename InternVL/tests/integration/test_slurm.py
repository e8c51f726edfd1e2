"""The SLURM job script on a temporary cluster with two nodes: it saves, is requeued, and resumes exactly."""

import os
import re
import signal
import subprocess
import time

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT, changed_weights
from slurm_cluster import SlurmCluster, missing_requirement

SCRIPT = SOURCE_ROOT / "internvl_chat/shell/slurm/m3llm.sbatch"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "submit this script with sbatch"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6"},
            "job arrays are not supported: the tasks would share OUTPUT_DIR",
        ),
    ],
)
def test_jobs_that_cannot_run(variables, message):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(
        ["bash", SCRIPT, "lora"], capture_output=True, text=True, env=environment | variables
    )
    assert result.returncode == 2
    assert result.stderr == f"m3llm.sbatch: {message}\n"


# Stand-ins for SLURM's commands. The job runs until it gets a signal, and ends before the signal is handled.
COMMANDS = {
    "srun": """trap 'touch ended' EXIT; printf '%s\n' "$@" > arguments
        until [[ -f stop ]]; do sleep 0.05; done; exit "$CODE" """,
    "scancel": "touch stop; until [[ -f ended ]]; do sleep 0.05; done; sleep 0.2",
    "scontrol": f"""[[ $1 != requeue ]] || touch requeued
        printf '   JobState=RUNNING\n   Command={SCRIPT} lora\n'""",
}


@pytest.mark.parametrize("code", [0, 138])
def test_job_that_ends_while_a_signal_is_handled(tmp_path, code):
    """A finished job is not requeued."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip
    script = subprocess.Popen(["bash", SCRIPT, "lora"], cwd=tmp_path, env=environment)
    while not (tmp_path / "arguments").exists():
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(HANG_SECONDS) == code
    assert (tmp_path / "requeued").exists() == (code == 138)
    # Otherwise, `sbatch --export=NAMES` would start a separate run on each node.
    assert "--export=ALL" in (tmp_path / "arguments").read_text().splitlines()


@pytest.fixture(scope="module")
def cluster():
    if reason := missing_requirement():
        pytest.skip(f"no SLURM cluster: {reason}")
    with SlurmCluster(nodes=2) as running:
        yield running


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Submit from a temporary folder; return a function that reads a log in it."""
    monkeypatch.chdir(tmp_path)
    return lambda name: (tmp_path / name).read_text() if (tmp_path / name).exists() else ""


@pytest.mark.slow
def test_invalid_arguments(cluster, logs):
    job = cluster.submit(str(SCRIPT), "Lora")
    cluster.wait_until(lambda: cluster.field(job, "JobState") == "FAILED")
    assert cluster.field(job, "ExitCode") == "2:0"
    assert "the first argument must be lora or full, found 'Lora'" in logs(f"m3llm-{job}.log")


@pytest.mark.slow
def test_interrupted_job_is_requeued_and_resumes(cluster, logs, node_run, undisturbed, tmp_path, metrics):
    """Interrupted by SIGTERM, by SIGUSR1 as before the time limit, and by a job with a higher priority."""
    (options, variables), out = node_run, tmp_path / "out"
    environment = {**variables(out), "NPROC": "1", "MASTER_ADDR": "127.0.0.1"}
    options = [*options, "--overwrite_output_dir", "True"]  # applies only to the first start
    job = cluster.submit("--nodes=2", str(SCRIPT), "full", *options, **environment)
    interruptions = [
        ("scancel", "--signal=TERM", str(job)),
        ("scancel", "--batch", "--signal=USR1", str(job)),
        ("sbatch", "--partition=high", "--output=/dev/null", "--wrap=true"),
    ]
    step = 0
    for restarts, command in enumerate(interruptions, start=1):
        cluster.wait_until(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > step + 1)  # noqa: B023
        cluster.run(*command)
        cluster.wait_until(lambda: int(cluster.field(job, "Restarts")) == restarts)  # noqa: B023
        cluster.wait_until(lambda: cluster.field(job, "JobState") == "PENDING")
        step = len(metrics(out))
        assert (out / f"checkpoint-{step}").is_dir()
    cluster.wait_until(lambda: cluster.field(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
    job_log, first, second = (logs(f"m3llm-{job}{name}.log") for name in ("", "-node0", "-node1"))
    assert cluster.field(job, "JobState") == "COMPLETED", job_log + first + second
    for code in (143, 138):
        assert f"stopped by a signal (exit code {code}); requeueing job {job}" in job_log
    assert first.count(f"resuming from {out}/checkpoint-") == len(interruptions)
    assert f"finished: the model is in {out}" in first and "finished" not in second
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(undisturbed)]
    assert (out / "ledger.jsonl").read_text() == (undisturbed / "ledger.jsonl").read_text()
    assert not changed_weights(undisturbed, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "number", "end"),
    [([], [], "CANCELLED"), ([], ["--signal=INT"], "130:0"), (["--no-requeue"], ["--signal=TERM"], "143:0")],
    ids=["scancel", "SIGINT", "no-requeue"],
)
def test_job_is_not_requeued(cluster, logs, node_run, tmp_path, flags, number, end):
    (options, variables), out = node_run, tmp_path / "out"
    job = cluster.submit(*flags, str(SCRIPT), "lora", *options, **variables(out))
    cluster.wait_until((out / "checkpoint-5").is_dir)
    cluster.run("scancel", *number, str(job))
    cluster.wait_until(lambda: cluster.field(job, "JobState") in ("CANCELLED", "FAILED"))
    assert end in (cluster.field(job, "JobState"), cluster.field(job, "ExitCode"))
    assert cluster.field(job, "Restarts") == "0"
    assert re.search(r"stopped by SIG\w+ after step", logs(f"m3llm-{job}-node0.log"))
