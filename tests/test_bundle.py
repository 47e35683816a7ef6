"""Bundles: parts that split and join, refusals, whose packages are taken, and a run with the network denied."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import yaml

from cupel import bundle, bundle_unpack
from cupel.bundle import Entry
from cupel.files import digest
from cupel.images.datasets import load
from tests.conftest import REPOSITORY


def unpack(folder, *arguments, python=(sys.executable,), **environment):
    """Run a bundle's own script with variables of the environment; (exit code, output)."""
    done = subprocess.run([*python, str(folder / "unpack.py"), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def repository(path, dependencies=()):
    """A small repository without git."""
    (path / "workflow").mkdir(parents=True)
    (path / "pyproject.toml").write_text(f"[project]\ndependencies = {list(dependencies)}\n")
    (path / "workflow" / "tool.py").write_text("print(1)\n")
    (path / "workflow" / "tool.py").chmod(0o755)
    (path / "empty.txt").touch()
    for ignored in ("results/a.csv", ".venv/b.py", "workflow/__pycache__/c.pyc"):
        (path / ignored).parent.mkdir(parents=True, exist_ok=True)
        (path / ignored).write_text("no source")
    return path


@pytest.fixture
def small(tmp_path):
    """A bundle of parts of 8 KiB: sources, data files of four and two chunks, twins among them, two weights."""
    root = repository(tmp_path / "repository")
    draw = np.random.default_rng(0)
    carried = []
    for name, size, kind in (("data/x.npy", 20000, "data"), ("data/twin.npy", 20000, "data"), ("data/y.npy", 6700, "data"),
                             ("results/w.safetensors", 5000, "weights"), (f"results/{'deep' * 30}.npz", 100, "weights")):
        file = tmp_path / "carried" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(draw.bytes(size) if "twin" not in name else (tmp_path / "carried/data/x.npy").read_bytes())
        carried.append(Entry(name, file, kind))
    folder = tmp_path / "bundle"
    manifest = bundle.make(folder, root=root, scale="smoke", config={"scale": "smoke"}, carried=carried, part_bytes=8192)
    return folder, manifest, carried


def forge(folder, change):
    """Change a manifest and make its checksum right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = bundle_unpack.manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge_part(folder, number, change):
    """Let `change(tar, members)` write a part anew, and make the checksums right again."""
    path = folder / f"part-{number:03d}.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
        change(tar)
    forge(folder, lambda m: m["parts"][number].update(size=path.stat().st_size, sha256=digest(path)))


def tree(folder):
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and bundle_unpack.STATE not in path.parts}


def test_splitting_and_joining(small, tmp_path):
    folder, manifest, carried = small
    parts = sorted(folder.glob("part-*.tar"))
    assert len(parts) > 5 and max(part.stat().st_size for part in parts) <= 8192
    chunks = {file["path"]: len(file["chunks"]) for file in manifest["files"]}
    assert chunks["data/x.npy"] == 4 and chunks["data/y.npy"] == 2
    assert chunks["results/w.safetensors"] == chunks["empty.txt"] == 1
    assert all(tarfile.is_tarfile(part) for part in parts)
    assert set(chunks) == {"pyproject.toml", "workflow/tool.py", "empty.txt", bundle.CONFIG, *(e.path for e in carried)}
    into = tmp_path / "there"
    code, output = unpack(folder, "--into", into)
    assert code == 0, output
    assert tree(into) == {file["path"]: file["sha256"] for file in manifest["files"]}
    assert all(digest(into / entry.path) == digest(entry.source) for entry in carried)
    assert os.access(into / "workflow/tool.py", os.X_OK) and not os.access(into / "empty.txt", os.X_OK)
    assert not list((into / bundle_unpack.STATE).glob("*.partial"))
    age = {path: (into / path).stat().st_mtime for path in chunks}
    assert age["workflow/tool.py"] < age["data/x.npy"] < age["results/w.safetensors"]
    before = {path: (into / path).stat().st_mtime_ns for path in chunks}
    code, output = unpack(folder, "--into", into)
    assert code == 0 and "0 written now" in output
    assert before == {path: (into / path).stat().st_mtime_ns for path in chunks}


def test_equal_content_makes_an_equal_bundle(small, tmp_path):
    folder, manifest, carried = small
    again = bundle.make(tmp_path / "again", root=tmp_path / "repository", scale="smoke", config={"scale": "smoke"},
                        carried=carried, part_bytes=8192)
    assert again["sha256"] == manifest["sha256"] and tree(tmp_path / "again") == tree(folder)


def test_parts_may_come_one_by_one_and_go_again(small, tmp_path):
    folder, manifest, _ = small
    into, desk = tmp_path / "there", tmp_path / "desk"
    desk.mkdir()
    order = np.random.default_rng(1).permutation([part["name"] for part in manifest["parts"]]).tolist()
    for number, name in enumerate(order):
        shutil.copy(folder / name, desk / name)
        code, output = unpack(folder, "--into", into, "--parts", desk)
        (desk / name).unlink()
        assert code == (0 if number == len(order) - 1 else 2), output
        assert {name for name in order if f"{name} is missing" in output} == set(order[number + 1:])
        assert "damaged" not in output
    assert tree(into) == {file["path"]: file["sha256"] for file in manifest["files"]}


def test_damaged_and_missing_parts_are_named(small, tmp_path):
    folder, manifest, _ = small
    names = [part["name"] for part in manifest["parts"]]
    content = bytearray((folder / names[1]).read_bytes())
    content[2000] ^= 1
    (folder / names[1]).write_bytes(content)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-512])
    (folder / names[3]).unlink()
    code, output = unpack(folder, "--into", tmp_path / "there", "--install", "--run", "-n")
    assert code == 2
    assert f"{names[1]} is damaged: its sha256" in output and f"{names[2]} is damaged" in output
    assert f"{names[3]} is missing" in output and "Traceback" not in output
    assert not any(f"{name} is" in output for name in [names[0], *names[4:]])
    found = tree(tmp_path / "there")
    wanted = {file["path"]: file["sha256"] for file in manifest["files"]}
    assert found and all(wanted[path] == sha for path, sha in found.items())


def test_a_damaged_manifest_is_refused(small, tmp_path):
    folder, _, _ = small
    text = (folder / "manifest.json").read_text()
    for content in (text.replace('"smoke"', '"smokf"'), text[:-9], "[]"):
        (folder / "manifest.json").write_text(content)
        code, output = unpack(folder, "--into", tmp_path / "there")
        assert code == 2 and "manifest.json is damaged" in output and "Traceback" not in output
    assert not (tmp_path / "there").exists()


def test_a_damaged_file_is_unpacked_again_an_edited_source_is_kept(small, tmp_path):
    folder, _, _ = small
    into = tmp_path / "there"
    assert unpack(folder, "--into", into)[0] == 0
    (into / "data/x.npy").write_bytes(b"x" * 20000)
    (into / "workflow/tool.py").write_text("print(2)\n")
    code, output = unpack(folder, "--into", into)
    assert code == 0 and "1 written now" in output and "kept as changed on this machine: workflow/tool.py" in output
    assert (into / "workflow/tool.py").read_text() == "print(2)\n"
    assert digest(into / "data/x.npy") == digest(into / "data/twin.npy")


BAD = ("../out.txt", "/tmp/out.txt", "a/../../out.txt", "a//b", "./a", "", "a\\..\\b", "C:/x", ".bundle/time")


@pytest.mark.parametrize("path", BAD)
def test_paths_that_lead_out_are_refused(small, tmp_path, path):
    folder, _, carried = small
    forge(folder, lambda m: m["files"][0].update(path=path))
    code, output = unpack(folder, "--into", tmp_path / "there")
    assert code == 1 and "is refused" in output and not (tmp_path / "there").exists()
    with pytest.raises(ValueError, match="refused"):
        bundle.make(tmp_path / "other", root=tmp_path / "repository", scale="smoke", config={},
                    carried=[Entry(path, carried[0].source, "data")])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(small, tmp_path, kind):
    folder, _, _ = small

    def add(tar):
        info = tarfile.TarInfo("workflow/link")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)

    forge_part(folder, 0, add)
    code, output = unpack(folder, "--into", tmp_path / "there")
    assert code == 1 and "part-000.tar: member 'workflow/link' is no regular file" in output
    assert tree(tmp_path / "there") == {}


def test_members_that_nobody_announced_are_refused(small, tmp_path):
    folder, _, _ = small
    forge_part(folder, 0, lambda tar: tar.addfile(tarfile.TarInfo("../more.txt")))
    code, output = unpack(folder, "--into", tmp_path / "there")
    assert code == 1 and "member '../more.txt' is not in the manifest" in output and tree(tmp_path / "there") == {}


def test_a_link_on_the_machine_leads_nothing_out(small, tmp_path):
    folder, _, _ = small
    (tmp_path / "there").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "there" / "data").symlink_to(tmp_path / "outside")
    code, output = unpack(folder, "--into", tmp_path / "there")
    assert code == 1 and "through a link: refused" in output and not list((tmp_path / "outside").iterdir())


def test_settings_that_cannot_work_are_refused(tmp_path):
    root = repository(tmp_path / "repository")
    with pytest.raises(ValueError, match=r"parts of 1024 bytes cannot hold.*part_mb"):
        bundle.make(tmp_path / "bundle", root=root, scale="smoke", config={}, part_bytes=1024)
    twice = [Entry("workflow/tool.py", root / "empty.txt", "data")]
    with pytest.raises(ValueError, match=r"workflow/tool.py would be twice"):
        bundle.make(tmp_path / "bundle", root=root, scale="smoke", config={}, carried=twice)
    assert not (tmp_path / "bundle" / "manifest.json").exists()


def test_sources_are_what_a_run_uses():
    files = bundle.source_files(REPOSITORY)
    assert {"Snakefile", "config.yaml", "workflow/cupel/bundle.py", "workflow/rules/bundle.smk", "pyproject.toml"} <= set(files)
    assert not [path for path in files if path.split("/")[0] in (".venv", ".git", "data", "results", "bundle")]


def test_folders_of_this_machine_do_not_travel():
    parameters = [{"alpha": 0.2, "picture": "/m/triggers/a.png"}, {"pattern": "/m/b.npy", "other": "/elsewhere/c.npy"}]
    assert bundle.mirror_files(parameters, "/m") == {"mirror/b.npy": "/m/b.npy", "mirror/triggers/a.png": "/m/triggers/a.png"}
    assert bundle.mirror_files(parameters, None) == {}
    config = {"scale": "demo", "results": "/scratch/results", "plugins": ["/home/me/mine.py"], "device": "auto",
              "data": {"folder": "/scratch/data", "mirror": "/m", "cache": "/scratch/cache", "sources": ["mirror"]}}
    assert bundle.carried_config(config, True) == {
        "scale": "demo", "results": "results", "plugins": ["plugins/mine.py"], "device": "auto",
        "data": {"folder": "data", "mirror": "mirror", "cache": None, "sources": ["mirror"]}}


# ----------------------------------------------------------------------------------------------------------------- packages


def wheel(folder, name, version, needs=(), tag="py3-none-any"):
    """A wheel of one module that knows its version."""
    path = folder / f"{name}-{version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {f"{name}.py": f"version = {version!r}\n",
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                                 + "".join(f"Requires-Dist: {need}\n" for need in needs),
             f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"}
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as pack:
        for file, content in files.items():
            pack.writestr(file, content)
    return path


def have(folder, name, version, needs=()):
    """A package of the machine: its wheel, unpacked."""
    with zipfile.ZipFile(wheel(folder.parent / "unpacked", name, version, needs)) as pack:
        pack.extractall(folder)


@pytest.fixture
def machine(tmp_path):
    """Makes a bundle of wheels for a project."""
    def build(dependencies, *wheels):
        folder = tmp_path / "bundle"
        bundle.make(folder, root=repository(tmp_path / "repository", dependencies), scale="smoke", config={}, wheels=wheels)
        return folder

    return build


def versions_seen(site, own, *names):
    code = f"import {', '.join(names)}; print({', '.join(f'{name}.version' for name in names)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{own}"})
    return done.stdout.split()


def test_the_machines_own_packages_are_preferred_where_they_serve(machine, tmp_path):
    own, made, site = tmp_path / "own", tmp_path / "wheels", tmp_path / "site"
    have(own, "fakea", "1.5")                        # serves: stays, though the bundle's is newer
    have(own, "fakeb", "1.0")                        # too old for the project
    have(own, "fakec", "1.0", ["fakeb<2"])           # would serve, but not beside the wheel of fakeb
    have(own, "faked", "1.0", ["nowhere>=1"])        # serves; what it lacks itself is the machine's affair
    folder = machine(["fakea>=1", "fakeb>=2", "fakec", "faked", "fakee ; python_version < '3'"],
                     wheel(made, "fakea", "2.0"), wheel(made, "fakeb", "2.1", ["fakef>=3"]), wheel(made, "fakec", "2.0"),
                     wheel(made, "faked", "2.0"), wheel(made, "fakef", "3.1"), wheel(made, "fakeg", "1.0"))
    arguments = ("--into", tmp_path / "there", "--install", site)
    code, output = unpack(folder, *arguments, PYTHONPATH=str(own))
    assert code == 0, output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith("fake")}
    assert rows == {"fakea": ["1.5", "2.0", "this", "machine's"], "fakeb": ["1.0", "2.1", "bundle"],
                    "fakec": ["1.0", "2.0", "bundle"], "faked": ["1.0", "2.0", "this", "machine's"],
                    "fakef": ["-", "3.1", "bundle"]}
    assert "faked needs nowhere" in output and "3 wheels installed" in output
    assert versions_seen(site, own, "fakea", "fakeb", "fakec", "fakef") == ["1.5", "2.1", "2.0", "3.1"]
    assert not list(site.glob("fakeg*")) and not list(site.glob("fakea*"))
    # again, with the site in reach: it is not mistaken for the machine's own
    code, output = unpack(folder, *arguments, PYTHONPATH=f"{site}{os.pathsep}{own}")
    assert code == 0 and "3 wheels are installed" in output, output


def test_packages_that_nobody_has_are_named(machine, tmp_path):
    own, made = tmp_path / "own", tmp_path / "wheels"
    have(own, "faketorch", "2.1.0+cu121")
    folder = machine(["faketorch>=2.11,<3", "fakea", "fakeb"], wheel(made, "fakeb", "1.0", tag="cp27-cp27m-win32"))
    code, output = unpack(folder, "--into", tmp_path / "there", "--install", tmp_path / "site", PYTHONPATH=str(own))
    assert code == 3 and "nothing was installed" in output and not (tmp_path / "site").exists()
    for text in ("cupel needs faketorch<3,>=2.11: this machine has 2.1.0+cu121, the bundle has none",
                 "cupel needs fakea: this machine has none", "fakeb-1.0-cp27-cp27m-win32.whl does not fit Python 3"):
        assert text in output, output
    code, output = unpack(folder, "--into", tmp_path / "there", "--run", "-n", PYTHONPATH=str(own))
    assert code == 3 and "cupel needs fakea" in output


def test_local_versions_serve_and_foreign_folders_are_left_alone(machine, tmp_path):
    own, site = tmp_path / "own", tmp_path / "site"
    have(own, "faketorch", "2.11.0+cu130", ["fakesympy<1.14"])
    have(own, "fakesympy", "1.13")
    folder = machine(["faketorch>=2.11,<3"])
    site.mkdir()
    (site / "thesis.tex").write_text("\\section{}")
    arguments = ("--into", tmp_path / "there", "--install", site)
    code, output = unpack(folder, *arguments, PYTHONPATH=str(own))
    assert code == 1 and "not empty and was not made by this script" in output and (site / "thesis.tex").exists()
    (site / "thesis.tex").unlink()
    code, output = unpack(folder, *arguments, PYTHONPATH=str(own))
    assert code == 0 and "0 wheels installed" in output, output


def test_pins_of_another_python(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==2.4.6 ; python_full_version < '3.12'\nnumpy==2.5.5 ; python_full_version >= '3.12'\n"
                           "aiohttp==3.14.5 ; python_full_version == '3.12.*'\nColorama==0.4.6 ; sys_platform == 'win32'\n")
    new, old = (bundle.read_pins(constraints, bundle.target_environment(python)) for python in ("3.12", "3.11.7"))
    assert new == {"numpy": "2.5.5", "aiohttp": "3.14.5"} and old == {"numpy": "2.4.6"}
    constraints.write_text("numpy>=2\n")
    with pytest.raises(ValueError, match="numpy>=2: expected one line name==version"):
        bundle.read_pins(constraints, bundle.target_environment("3.12"))


def test_wheels_are_followed_through_their_metadata(tmp_path, monkeypatch):
    """The download itself is pip's; here pip is a folder of wheels."""
    shop = tmp_path / "shop"
    for made in (("fakea", "1.0", ["fakeb[fast]>=1", "torch", "fakex ; sys_platform == 'win32'"]), ("fakec", "3.0"),
                 ("fakeb", "2.0", ["fakec ; extra == 'fast'", "faked ; extra == 'slow'", "nvidia-cuda"]), ("faked", "1.0")):
        wheel(shop, *made)
    (tmp_path / "constraints.txt").write_text("fakea==1.0\nfakeb==2.0\nfakec==3.0\nfaked==1.0\ntorch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["fakea>=1", "torch"]\n')

    def fetch(folder, pins, python, platforms):
        for pin in pins:
            shutil.copy(shop / f"{pin.replace('==', '-')}-py3-none-any.whl", folder)

    monkeypatch.setattr(bundle, "_fetch", fetch)
    wheel(tmp_path / "wheels", "fakez", "1.0")  # of an earlier download
    settings = {"pyproject": tmp_path / "pyproject.toml", "constraints": tmp_path / "constraints.txt",
                "python": "3.12", "platforms": [], "skip": ["torch", "nvidia-*"]}
    found = bundle.download_wheels(tmp_path / "wheels", **settings)
    assert [path.name.partition("-")[0] for path in found] == ["fakea", "fakeb", "fakec"]
    assert sorted((tmp_path / "wheels").iterdir()) == found
    (tmp_path / "constraints.txt").write_text("fakea==1.0\n")
    with pytest.raises(ValueError, match=r"pins no version for Python 3.12 of: fakeb"):
        bundle.download_wheels(tmp_path / "wheels", **settings)


# ------------------------------------------------------------------------------------------------------- without a network

PROBE = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"


@pytest.fixture(scope="session")
def denied(tmp_path_factory):
    """(prefix of a command, environment) under which Python reaches no network: a namespace of its own, else a socket
    module that refuses."""
    for prefix in (("unshare", "-rn"), ("unshare", "-n")):
        if shutil.which("unshare") and not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            return prefix, {}
    folder = tmp_path_factory.mktemp("denied")
    (folder / "sitecustomize.py").write_text(
        "import socket\ndef refuse(*_):\n    raise OSError('the network is denied')\n"
        "class Socket(socket.socket):\n    connect = connect_ex = refuse\n"
        "socket.socket, socket.getaddrinfo = Socket, refuse\n")
    environment = {"PYTHONPATH": str(folder)}
    reached = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False,
                             env={**os.environ, **environment})
    if "the network is denied" not in reached.stderr:
        pytest.skip("needs `unshare -n`, or a Python that reads sitecustomize, to deny the network")
    return (), environment


@pytest.fixture(scope="module")
def excerpt(cifar10, tmp_path_factory):
    """The first images of CIFAR-10 as a prepared data set, elsewhere than in the repository."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "cifar10").mkdir()
    shutil.copy(cifar10 / "manifest.json", folder / "cifar10")
    for split, size in (("train", 1500), ("test", 400)):
        part = load(cifar10, split)
        np.save(folder / "cifar10" / f"{split}_images.npy", part.images[:size])
        np.save(folder / "cifar10" / f"{split}_labels.npy", part.labels[:size])
    return folder


def test_end_to_end_without_a_network(denied, excerpt, tmp_path):
    prefix, environment = denied
    environment = {**environment, "OMP_NUM_THREADS": "1", "CUPEL_CACHE": str(tmp_path / "cache")}
    probe = subprocess.run([*prefix, sys.executable, "-c", PROBE], capture_output=True, check=False,
                           env={**os.environ, **environment})
    assert probe.returncode != 0, "the network is not denied"

    # made where there is one
    home = tmp_path / "home"
    home.mkdir()
    for path in bundle.source_files(REPOSITORY):
        if path.split("/")[0] in ("Snakefile", "config.yaml", "profiles", "workflow", "pyproject.toml", "envs"):
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, home / path)  # scripts younger than the data would prepare it again
    settings = yaml.safe_load((home / "config.yaml").read_text())
    settings |= {"scale": "smoke", "data": {"folder": str(excerpt), "cache": str(tmp_path / "cache")},
                 "bundle": {"wheels": False, "part_mb": 1.5, "with": ["victims"]}}
    (home / "config.yaml").write_text(yaml.safe_dump(settings))
    carried = home / "results/smoke/victims/cifar10/preactresnet18/fst/blended@0.1/seed0"
    carried.mkdir(parents=True)
    for name in ("poison.npz", "model.safetensors", "trigger.npz", "metrics.json", "history.csv"):
        (carried / name).write_text(name)
    (carried.parent / "half").mkdir()
    (carried.parent / "half" / "metrics.json").write_text("{}")
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "1"]
    done = subprocess.run([*snakemake, "bundle"], cwd=home, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "PYTHONPATH": str(home / "workflow")})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    made = home / "bundle" / "smoke"
    manifest = json.loads((made / "manifest.json").read_text())
    kinds = {kind: [f["path"] for f in manifest["files"] if f["kind"] == kind] for kind in bundle.KINDS}
    carried_data = {f["path"]: f["sha256"] for f in manifest["files"] if f["kind"] == "data"}
    assert carried_data == {f"data/{path}": sha for path, sha in tree(excerpt).items()} and len(carried_data) == 5
    assert len(kinds["weights"]) == 5 and len(manifest["parts"]) > 3
    assert max(part.stat().st_size for part in made.glob("part-*.tar")) <= 1.5 * 2**20
    assert manifest["scale"] == "smoke" and manifest["commit"] and manifest["versions"]["torch"]

    # carried to where there is none
    away = tmp_path / "away"
    shutil.move(made, away)
    python = (*prefix, sys.executable)
    victim = "results/smoke/victims/cifar10/preactresnet18/{}/seed0/metrics.json"
    code, output = unpack(away, "--run", "--", "-n", python=python, **environment)
    assert code == 0, output[-3000:]
    assert "train_victim" in output and "prepare_dataset" not in output.partition("Job stats:")[2].partition("total")[0]
    code, output = unpack(away, "--run", "-n", "--", victim.format("fst/blended@0.1"), python=python, **environment)
    assert code == 0 and "Nothing to be done" in output, output[-3000:]
    code, output = unpack(away, "--run", "--", "--cores", "1", victim.format("fst/badnets@0.05"), python=python, **environment)
    assert code == 0, output[-3000:]
    record = json.loads((away / "cupel" / victim.format("fst/badnets@0.05")).read_text())
    assert record["status"] == "ok" and record["asr_n"] > 0 and not (tmp_path / "cache").exists()
