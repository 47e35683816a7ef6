"""A server that speaks as much Kubernetes as Snakemake's executor asks for, and runs the pods of its jobs as processes.

Like pods, they start in an empty folder of their own and see no file of the one who submitted them.
"""

import base64
import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import served


class Cluster:
    """Jobs by name, as they were submitted, and the processes of their pods."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.pods, self.secrets, self.refused = folder, {}, {}, {}, []
        tools = folder / "bin"
        tools.mkdir(parents=True)
        # a pod installs the storage plugin when it starts; here it has been
        (tools / "pip").write_text("#!/bin/sh\nexit 0\n")
        (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)

    def refusal(self, job: dict) -> str:
        """What the real server would say against a job: extended resources need limits, equal to the requests."""
        resources = job["spec"]["template"]["spec"]["containers"][0]["resources"]
        for name, wanted in resources["requests"].items():
            if "/" in name and (resources.get("limits") or {}).get(name) != wanted:
                return f"{name}: Limit must be set for non overcommitable resources"
        return ""

    def submit(self, job: dict) -> None:
        """Start the pod."""
        name, container = job["metadata"]["name"], job["spec"]["template"]["spec"]["containers"][0]
        self.jobs[name] = job
        workdir = self.folder / name
        workdir.mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SNAKEMAKE_", "PYTHONPATH"))}
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(workdir / "workflow"),
                        "OMP_NUM_THREADS": "1"}  # the second as the image sets it
        for variable in container.get("env", []):
            reference = variable["valueFrom"]["secretKeyRef"]
            environment[variable["name"]] = base64.b64decode(self.secrets[reference["name"]][reference["key"]]).decode()
        with open(self.folder / f"{name}.log", "w") as log:
            self.pods[name] = subprocess.Popen([*container["command"], *container["args"]], cwd=workdir, env=environment,
                                               stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def status(self, name: str) -> dict:
        """Of a job."""
        code = self.pods[name].poll()
        return {} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}

    def end(self) -> None:
        """Kill what runs."""
        for pod in self.pods.values():
            if pod.poll() is None:
                os.killpg(pod.pid, 9)
            pod.wait()

    def log(self, name: str) -> str:
        """What a pod printed."""
        return (self.folder / f"{name}.log").read_text()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_):
        pass

    def _answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return json.loads(text) if text else {}

    def do_POST(self):
        content = self._body()
        if self.path.endswith("/secrets"):
            self.cluster.secrets[content["metadata"]["name"]] = content.get("data", {})
        elif self.path.endswith("/jobs"):
            if reason := self.cluster.refusal(content):
                self.cluster.refused.append(reason)
                return self._answer({"kind": "Status", "status": "Failure", "message": reason}, 422)
            self.cluster.submit(content)
        self._answer(content, 201)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.endswith("/pods"):
            return self._answer({"kind": "PodList", "items": []})
        name = path.removesuffix("/status").rpartition("/")[2]
        if name not in self.cluster.jobs:
            return self._answer({"kind": "Status", "status": "Failure"}, 404)
        self._answer({**self.cluster.jobs[name], "status": self.cluster.status(name)})

    def do_DELETE(self):
        self._body()
        self._answer({"kind": "Status", "status": "Success"})


@contextlib.contextmanager
def cluster(folder: Path):
    """A cluster and the path of its kubeconfig."""
    made = Cluster(folder)
    with served(type("Handler", (_Handler,), {"cluster": made})) as address:
        config = folder / "kubeconfig"
        config.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": address}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {}}]}))
        try:
            yield made, config
        finally:
            made.end()
            shutil.rmtree(folder / "bin")
