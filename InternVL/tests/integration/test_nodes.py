"""Two nodes, each in its own network namespace: a run survives the loss of a node, and a node can join it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import HANG_SECONDS, LAUNCHERS, changed_weights

TOLERANCE = 1e-5  # with a different number of ranks, losses differ in the summation order


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True)


class Node:
    """A network namespace, connected with the other node, in which a launcher runs."""

    def __init__(self, rank, log):
        self.rank, self.name, self.log = rank, f"m3llm-{os.getpid()}-{rank}", log
        self.address = f"10.213.7.{rank + 1}"

    def start(self, options, variables, number):
        """Start the launcher; `number` is NNODES."""
        variables = variables | {
            "NPROC": "1", "NNODES": number, "NODE_RANK": str(self.rank), "MASTER_ADDR": "10.213.7.1",
            "RDZV_BACKEND": "c10d", "MAX_RESTARTS": "2",
            # Both namespaces have the name of this host, which is not an address of either.
            "PET_LOCAL_ADDR": self.address, "GLOO_SOCKET_IFNAME": "eth0",
            "PET_RDZV_CONF": "keep_alive_interval=1,last_call_timeout=5",
        }  # fmt: skip
        launcher = ["bash", str(LAUNCHERS / "M3LLM-fulldata-fullmodel.sh"), *options]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launcher],
                env=os.environ | variables, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def trainer(self):
        """The training process."""
        children = psutil.Process(self.process.pid).children()
        return next(p for p in children if "internvl_chat.train.distributed.launch" not in p.cmdline())

    def end(self):
        """Wait for the launcher; return its exit code and its output."""
        code = self.process.wait(HANG_SECONDS)
        return code, self.log.read_text()

    def kill(self):
        """Kill all processes of the node at once, as in a power failure."""
        shown = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in map(int, shown.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)


@pytest.fixture
def nodes(tmp_path):
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need root and ip (apt install iproute2)")
    both = [Node(rank, tmp_path / f"node{rank}.log") for rank in range(2)]
    first, second = (node.name for node in both)
    try:
        for node in both:
            ip("netns", "add", node.name)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
        for node in both:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", node.name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces do not work here: {error.stderr.strip()}")
    else:
        yield both
    finally:
        for node in both:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.kill()
                ip("netns", "delete", node.name)


def wait_until(condition, *nodes):
    began = time.monotonic()
    while not condition():
        assert all(node.process.poll() is None for node in nodes), [node.log.read_text() for node in nodes]
        assert time.monotonic() - began < HANG_SECONDS
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["2", "1:2"], ids=["replaced node", "one node fewer"])
def test_run_continues_after_a_node_is_killed(nodes, node_run, undisturbed, tmp_path, metrics, number):
    """With NNODES=2, the run waits until the node is started again; with 1:2, it continues without it."""
    (options, variables), (first, second), out = node_run, nodes, tmp_path / "out"
    for node in nodes:
        node.start(options, variables(out), number)
    wait_until((out / "checkpoint-10").is_dir, *nodes)
    second.kill()
    assert second.end()[0] == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    if number == "2":
        second.start(options, variables(out), number)
        code, output = second.end()
        assert code == 0, output
    code, output = first.end()
    assert code == 0, output
    assert "another rank has failed" in output and f"resuming from {out}/checkpoint-" in output
    losses, expected = ([row["loss"] for row in metrics(folder)] for folder in (out, undisturbed))
    if number == "2":
        assert losses == expected
        assert not changed_weights(undisturbed, out)
    else:
        assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert (out / "ledger.jsonl").read_text() == (undisturbed / "ledger.jsonl").read_text()


@pytest.mark.slow
def test_run_uses_a_node_that_joins(nodes, node_run, undisturbed, tmp_path, metrics):
    """torchrun stops the ranks; they save, so that no step is lost, and restart on both nodes."""
    (options, variables), (first, second), out = node_run, nodes, tmp_path / "out"
    first.start(options, variables(out), "1:2")
    wait_until((out / "checkpoint-5").is_dir, first)
    trainer = first.trainer()
    trainer.suspend()  # otherwise, the run could end before the second node has started
    second.start(options, variables(out), "1:2")

    def is_told_to_stop():
        status = Path(f"/proc/{trainer.pid}/status").read_text()
        pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
        return pending >> (signal.SIGTERM - 1) & 1

    wait_until(is_told_to_stop, *nodes)
    done = len(metrics(out))
    trainer.resume()
    for node in nodes:
        code, output = node.end()
        assert code == 0, output
    output = first.log.read_text() + second.log.read_text()
    found = re.search(rf"resuming from {out}/checkpoint-(\d+)", output)
    assert int(found[1]) in (done, done + 1)
    losses, expected = ([row["loss"] for row in metrics(folder)] for folder in (out, undisturbed))
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert (out / "ledger.jsonl").read_text() == (undisturbed / "ledger.jsonl").read_text()
