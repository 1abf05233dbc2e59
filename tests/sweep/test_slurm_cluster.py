"""The cluster that the sweeps are tested on: it runs jobs, loses nodes and controllers, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_for

pytestmark = pytest.mark.slurm


def output(slurm: SlurmCluster, job: str) -> str:
    (file,) = slurm.folder.glob(f"{job}_*.out")
    return file.read_text()


def test_a_job_runs_on_a_gpu(slurm: SlurmCluster) -> None:
    job = slurm.sbatch("echo hello from $SLURMD_NODENAME with GPU $CUDA_VISIBLE_DEVICES", "--gpus-per-node=1")
    slurm.wait(job)
    assert output(slurm, job) == "hello from n1 with GPU 0\n"


def test_an_array_takes_the_four_gpus_and_no_more(slurm: SlurmCluster) -> None:
    job = slurm.sbatch("echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES; sleep 60", "--gpus-per-node=1", "--array=0-5")
    wait_for(lambda: list(slurm.states(job).values()).count("RUNNING") == 4, 30, "no four elements run")
    wait_for(lambda: len(given(slurm, job)) == 4, 30, "four elements should have written")
    assert given(slurm, job) == {"n1 0", "n1 1", "n2 0", "n2 1"}
    assert list(slurm.states(job).values()).count("PENDING") == 2


def given(slurm: SlurmCluster, job: str) -> set[str]:
    return {text.strip() for file in slurm.folder.glob(f"{job}_*.out") if (text := file.read_text())}


def test_one_element_of_an_array_is_cancelled_or_requeued(slurm: SlurmCluster) -> None:
    script = 'echo start $SLURM_RESTART_COUNT; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job = slurm.sbatch(script, "--array=0-1", "--open-mode=append")
    slurm.wait(job, "RUNNING")
    slurm.cancel(f"{job}_0")
    slurm.requeue(f"{job}_1")
    slurm.wait(f"{job}_0", "CANCELLED")
    slurm.wait(f"{job}_1")
    assert (slurm.folder / f"{job}_1.out").read_text().split("\n")[-2:] == ["start 1", ""]


def test_a_job_that_fails_says_so(slurm: SlurmCluster) -> None:
    job = slurm.sbatch("exit 3")
    slurm.wait(job, "FAILED")
    with pytest.raises(AssertionError, match=rf"job {job} should become COMPLETED and is {{'FAILED'}}"):
        slurm.wait(job)


def test_a_lost_node_takes_its_job_with_it_and_the_job_comes_back(slurm: SlurmCluster) -> None:
    job = slurm.sbatch('echo start $SLURM_RESTART_COUNT; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60', "--nodelist=n2")
    slurm.wait(job, "RUNNING")
    slurm.node_down("n2")
    assert slurm.node_states()["n2"].startswith("down")
    assert slurm.node_states()["n1"] == "idle"
    assert slurm.processes("SLURMD_NODENAME=n2") == []
    wait_for(lambda: slurm.states(job) == {job: "PENDING"}, 30, "the job is not requeued")
    slurm.node_up("n2")
    slurm.release(job)
    slurm.wait(job)


def test_jobs_survive_the_controller(slurm: SlurmCluster) -> None:
    job = slurm.sbatch("sleep 4; echo done")
    slurm.wait(job, "RUNNING")
    slurm.stop_controller()
    assert not slurm.answers()
    slurm.start_controller()
    slurm.wait(job)
    assert output(slurm, job) == "done\n"


def test_an_urgent_job_preempts(slurm: SlurmCluster) -> None:
    low = slurm.sbatch("sleep 60", "--nodelist=n1", "--gpus-per-node=2")
    slurm.wait(low, "RUNNING")
    urgent = slurm.sbatch("true", "--nodelist=n1", "--gpus-per-node=2", "--partition=urgent")
    slurm.wait(urgent)
    assert slurm.states(low)[low] in ("PENDING", "REQUEUED")


def test_there_is_no_accounting(slurm: SlurmCluster) -> None:
    done = subprocess.run(["sacct"], env=slurm.env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "accounting storage is disabled" in done.stderr


def test_two_clusters_side_by_side_and_nothing_is_left(slurm: SlurmCluster) -> None:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    other = SlurmCluster(folder, nodes=1, gpus=1)
    try:
        other.start()
        job = other.sbatch("sleep 600 & sleep 600")
        other.wait(job, "RUNNING")
        assert slurm.states(job) != other.states(job)
    finally:
        other.stop()
    assert other.processes() == []
    assert set(slurm.node_states().values()) == {"idle"}
    shutil.rmtree(folder)


KILLED = """\
import os, signal, sys
from pathlib import Path
from slurm_cluster import SlurmCluster
cluster = SlurmCluster(Path(sys.argv[1]), nodes=1, gpus=1)
cluster.start()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_test_run_leaves_no_daemon(slurm: SlurmCluster) -> None:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, folder], env=paths, check=False)
    assert done.returncode == -9
    marks = f"SLURM_CONF={folder}/slurm.conf"
    assert slurm.env["SLURM_CONF"] not in marks
    wait_for(lambda: not alive(marks), 20, "daemons outlive the test run")
    shutil.rmtree(folder)


def alive(mark: str) -> list[int]:
    from slurm_cluster import environments

    return [pid for pid, environment in environments() if mark in environment]
