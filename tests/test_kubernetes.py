"""profiles/kubernetes and storage: dry runs, a run whose files are kept in S3, and pods that share no file system.

Store and cluster are small stand-ins on the loopback interface; the storage plugin and the executor are the real ones.
"""

import importlib.util
import os
import shutil
import subprocess
from unittest import mock

import pytest
import yaml

from tests import kubernetes_api, s3
from tests.conftest import REPOSITORY
from tests.test_workflow import Folder, jobs

CELLS = "results/smoke/cells.parquet"
VICTIM = "results/smoke/images/victims/cifar10/preactresnet18/fst/badnets@0.05/seed0/metrics.json"
STORED = ["--default-storage-provider", "s3", "--default-storage-prefix", "s3://cupel-test/run"]

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_s3")),
    reason="needs the plugins for Kubernetes and S3: pip install '.[cluster]'")


class Remote(Folder):
    """A copy of the repository whose files are kept in a store, with the prepared data set already there."""

    def __init__(self, path, data, bucket, address, **environment):
        super().__init__(path, data)
        self.set(papers=["fst"], data={"folder": "data"})
        self.store = bucket / "run"
        self.keep(data / "images" / "cifar10")
        self.environment = {**s3.ENVIRONMENT, "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": address, **environment}
        # what pods are given is what git tracks
        subprocess.run("git init -q . && git add .", cwd=path, shell=True, check=True)

    def keep(self, prepared):
        """Put a prepared data set of images into the store."""
        kept = self.store / "data" / "images" / prepared.name
        kept.mkdir(parents=True)
        for file in prepared.iterdir():
            os.link(file, kept / file.name)

    def run(self, *arguments):
        with mock.patch.dict(os.environ, self.environment):
            return super().run(*arguments)


@pytest.fixture
def remote(tmp_path, cifar10):
    store = tmp_path / "store"
    (store / "cupel-test").mkdir(parents=True)
    with s3.store(store) as address, kubernetes_api.cluster(tmp_path / "cluster") as (cluster, config):
        folder = Remote(tmp_path / "run", cifar10.parents[1].resolve(), store / "cupel-test", address, KUBECONFIG=str(config))
        folder.cluster = cluster
        folder.edit("profiles/kubernetes/profile.v9+.yaml", "s3://my-bucket/cupel", "s3://cupel-test/run")
        yield folder


def test_the_profile_plans(remote):
    output = remote.finish("-n", "--workflow-profile", "profiles/kubernetes", "--", CELLS)
    planned = jobs(output)
    planned.pop("prepare_images", None)  # planned where the data set is younger than its record
    assert planned == {"gather_cells": 1, "poison": 1, "purify": 2, "train_victim": 1}
    assert "s3://cupel-test/run/results/smoke/cells.parquet (send to storage)" in output
    assert not remote.cluster.jobs


def test_the_whole_report_plans_from_a_store(remote):
    output = remote.finish("-n", "--workflow-profile", "profiles/kubernetes")
    assert jobs(output)["index"] == 1 and "prepare_images" not in jobs(output)


def test_what_no_store_keeps_is_refused(remote):
    remote.set(papers=["fst", "crow"], report={"allow_missing": True})
    code, output = remote.run("-n", *STORED)
    assert code and "config.yaml: not with files in a store: crow, report.allow_missing, see" in output


def test_what_the_profile_replaces_stands_in_it():
    """Settings of profiles/default hold on a cluster too, but for cores, patience, and the disk of a pod."""
    def read(name):
        return yaml.safe_load((REPOSITORY / "profiles" / name / "profile.v9+.yaml").read_text())

    own = ("cores", "latency-wait", "logger", "default-resources")
    kept = {key: value for key, value in read("default").items() if key not in own}
    for name in ("slurm", "kubernetes", "generic"):
        assert all(read(name)[key] == value for key, value in kept.items())
        own, there = (read(profile)["default-resources"] for profile in ("default", name))
        assert {**own, "disk_mb": there["disk_mb"]}.items() <= there.items()


def timeless(folder):
    """Metrics of a run, without those that are times."""
    found = folder.metrics()
    for record in found.values():
        record["rows"] = [row for row in record.get("rows", []) if row["metric"] != "seconds_per_epoch"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"papers": ["fst"]}, {"papers": ["ims", "proper_interpretability"], "jobs": "victim"}],
                         ids=["cells", "victims"])
def test_a_run_with_all_files_in_a_store_equals_a_local_one(remote, tmp_path, mnist, asked):
    remote.keep(mnist)
    local = Folder(tmp_path / "local", remote.data)
    local.set(**asked)
    local.finish("--", CELLS)
    remote.set(**asked)
    remote.finish(*STORED)
    assert (remote.store / "results" / "smoke" / "index.html").is_file() and not (remote.path / "results").exists()
    shutil.copytree(remote.store / "results", remote.path / "results")
    assert timeless(remote) == timeless(local)
    shutil.rmtree(remote.path / "results")
    assert "Nothing to be done" in remote.finish("-n", *STORED)


@pytest.mark.slow
def test_pods_make_a_victim(remote, tmp_path):
    local = Folder(tmp_path / "local", remote.data)
    assert local.run("--", VICTIM)[0] == 0
    code, output = remote.run("--workflow-profile", "profiles/kubernetes", "--seconds-between-status-checks", "1", "--", VICTIM)
    assert code == 0, output[-3000:] + "\n".join(map(remote.cluster.log, remote.cluster.jobs))
    assert len(remote.cluster.jobs) == 2 and not remote.cluster.refused
    containers = [job["spec"]["template"]["spec"]["containers"][0] for job in remote.cluster.jobs.values()]
    assert {container["workingDir"] for container in containers} == {"/workdir"}  # as envs/Dockerfile expects
    gpus = [container["resources"]["limits"].get("nvidia.com/gpu") for container in containers]
    assert gpus == [None, "1"]
    assert [container["resources"]["requests"]["memory"] for container in containers] == ["2000M", "4000M"]
    shutil.copytree(remote.store / "results", remote.path / "results")
    assert remote.metrics() == local.metrics()


@pytest.mark.slow
def test_without_limits_a_gpu_would_be_refused(remote):
    """Why the profile says `scale: 0`."""
    remote.edit("profiles/kubernetes/profile.v9+.yaml", "  scale: 0", "  scale: 1")
    remote.run("--workflow-profile", "profiles/kubernetes", "--set-resources", "poison:gpu=1", "--", VICTIM)
    assert "Limit must be set" in remote.cluster.refused[0]
