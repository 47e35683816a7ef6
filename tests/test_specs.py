"""References to the SPECs: `<key> SPEC 10.8` stands for item 10.8 of the SPEC.md in the folder `<key>` of workflow/papers.

The key may be left out where a folder on the file's own path is named by it. A reference without a number is to the file.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPERS = ROOT / "workflow" / "papers"
SPECS = {path.parent.name: path for path in PAPERS.rglob("SPEC.md")}

PART = r"(?:\d+(?:\.\d+)*|E\d+)\b"
PARTS = rf"{PART}(?:(?:[,;]| and| to) {PART})*"
REFERENCE = re.compile(rf"(?:\b(?P<key>{'|'.join(SPECS)}) )?\bSPEC\b(?!\.md)(?: (?P<parts>{PARTS}))?")
HEADING = re.compile(r"#{2,} (\d+(?:\.\d+)*)\.? ")
ITEM = re.compile(r"(\d+)\. |(\d+\.\d+) |\| (E\d+) \|")


def numbers(spec: str) -> set[str]:
    """What a SPEC can be cited by: headings, items of numbered lists below them, rows of the table of experiments."""
    found, section = set(), None
    for line in spec.splitlines():
        if heading := HEADING.match(line):
            section = heading[1]
            found.add(section)
        elif section and (item := ITEM.match(line)):
            found.add(f"{section}.{item[1]}" if item[1] else item[2] or item[3])
    return found


NUMBERS = {key: numbers(path.read_text(encoding="utf-8")) for key, path in SPECS.items()}


def expand(parts: str) -> list[str]:
    """"2.5 to 2.7, 9" as 2.5, 2.6, 2.7, 9."""
    found = []
    for link, part in re.findall(rf"(to )?({PART})", parts):
        if link:
            *start, first = found[-1].split(".")
            found += [".".join([*start, str(number)]) for number in range(int(first) + 1, int(part.split(".")[-1]))]
        found.append(part)
    return found


def unresolved(path: Path, text: str) -> list[str]:
    """The references in a file's text that lead nowhere, each with file and line."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for reference in REFERENCE.finditer(line):
            key = reference["key"] or next((part for part in path.parts if part in SPECS), None)
            if key is None:
                found.append(f"{path}:{number}: {reference[0]!r} does not say whose; write one of {', '.join(SPECS)} before it")
            else:
                found += [f"{path}:{number}: {key} SPEC has no {part}" for part in expand(reference["parts"] or "")
                          if part not in NUMBERS[key]]
    return found


def test_every_reference_to_a_spec_resolves():
    tracked = subprocess.run(["git", "grep", "-lIw", "SPEC"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = [Path(line) for line in tracked.stdout.splitlines() if line != "tests/test_specs.py"]
    assert len(files) > 50
    wrong = [fault for path in files for fault in unresolved(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("line, folder, faults", [
    ("crow SPEC 10.1, 11.4.6; fst SPEC 2 and 7", "docs", []),
    ("bye SPEC 2.5 to 2.7: 3 layers", "docs", []),
    ("proper_interpretability SPEC 3.1; E1, E2", "docs", []),
    ("(ims SPEC 10.8 and 99, 10.9)", "docs", ["ims SPEC has no 99"]),
    ("crow SPEC 10.17 to 10.20", "docs", ["crow SPEC has no 10.19", "crow SPEC has no 10.20"]),
    ("SPEC 10.8", "workflow/papers/ims", []),
    ("SPEC 2.9", "docs/results/demo/fst", ["fst SPEC has no 2.9"]),
    ("as in the SPEC", "docs", ["'SPEC' does not say whose; write one of"]),
])
def test_a_reference_is_taken_apart(line, folder, faults):
    found = unresolved(Path(folder) / "file.md", f"first\n{line}")
    assert len(found) == len(faults)
    assert all(one.startswith(f"{folder}/file.md:2: {fault}") for one, fault in zip(found, faults, strict=True))
