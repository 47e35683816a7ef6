"""HumanEval: problems, prompts, the code in an answer, pass@1 with its interval (Chen et al., 2021).

The 164 problems are a prepared text data set (`cupel.text.data.sources`); what they say is untrusted like the answers: the
code of both runs only in the sandbox. crow SPEC 8 and 10: the paper reports no pass@1, its use here is a measure of utility
that needs no judge. The trigger prompts made of HumanEval are in `cupel.text.data.poison`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from cupel.evaluation.metrics import Rate
from cupel.sandbox import Limits, Outcome, check_untrusted

# Where a bare continuation of a function ends: at the next statement that is not indented (Chen et al., 2021, section 2)
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\nfrom ", "\nimport ", "\n```")


@dataclass(frozen=True)
class Problem:
    """One problem."""

    task_id: str  # `HumanEval/<number>`
    prompt: str  # source up to the docstring of the function asked for; may hold imports and helper functions
    entry_point: str  # name of that function
    canonical_solution: str  # its body
    test: str  # source that defines `check(candidate)`

    @property
    def preamble(self) -> str:
        """What stands in the prompt before the function asked for."""
        return self.prompt[: _definition(self.entry_point).search(self.prompt).start()]


def _definition(name: str) -> re.Pattern:
    return re.compile(rf"^(?:async\s+)?def\s+{re.escape(name)}\s*\(", re.MULTILINE)


def problems(records: Iterable[Mapping]) -> list[Problem]:
    """Problems from records of the prepared data set; other fields are left aside."""
    return [Problem(**{field.name: record[field.name] for field in fields(Problem)}) for record in records]


def instruction(problem: Problem) -> str:
    """What an instruction-tuned model is asked. A base model is given `problem.prompt` itself, to go on from."""
    return ("Complete this Python function. Answer with one code block that holds the whole function and the imports it "
            f"needs, and with nothing else.\n\n```python\n{problem.prompt.rstrip()}\n```")


_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n", re.MULTILINE)
_TOP = re.compile(r"(async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[(:]|@\w|import\s+[\w.]+\s*($|,|;|#|as\s)|from\s+[\w.]+\s+import\b")
# an indented line, a comment, the end of a bracket, a definition, an assignment
_PYTHON = re.compile(rf"[ #)\]}}]|{_TOP.pattern}|[A-Za-z_]\w*\s*(:[^=]+)?=[^=]")


def _blocks(answer: str) -> tuple[str, list[str]]:
    """Text before the first fence, and contents of the fenced blocks; the last may lack its end, where it was cut off."""
    blocks, first = [], _FENCE.search(answer)
    opening = first
    while opening:
        closing = re.compile(rf"^[ \t]*{opening[1]}[ \t]*$", re.MULTILINE).search(answer, opening.end())
        blocks.append(answer[opening.end(): closing.start() if closing else len(answer)])
        opening = _FENCE.search(answer, closing.end()) if closing else None
    before = answer[: first.start()] if first else answer
    if first and not closing and len(blocks) == 1 and not first[2] and before.strip() and not _TOP.search(blocks[0]):
        return before, []  # the end of a block that the prompt began
    return before, blocks


def _whole(text: str) -> str:
    """Source without the prose around it, for answers with whole functions and no fences.

    Goes from the first line that begins a definition or import to the first unindented line that begins none of a few
    things known to be Python at that place.
    """
    lines = text.split("\n")
    start = next(k for k, line in enumerate(lines) if _TOP.match(line))
    end = next((k for k, line in enumerate(lines) if k > start and line.strip() and not _PYTHON.match(line)), len(lines))
    return "\n".join(lines[start:end])


def _cut(text: str) -> str:
    """A continuation up to the first stop sequence."""
    text = text.strip("\n")
    end = min((k for k in (f"\n{text}".find(stop) for stop in STOP) if k > 0), default=None)
    return text[: end - 1] if end else text


def _body(text: str) -> str:
    """A function's body with the indentation that models and tokenizers drop."""
    lines = text.strip("\n").rstrip().split("\n")
    if not lines[0].strip() or lines[0][0] == " ":
        return "\n".join(lines)
    # the first line stands at the margin: has it alone lost its blanks, or have all?
    depths = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    if depths and min(depths) > 0:
        opens = lines[0].split("#")[0].rstrip().endswith(":")
        if not opens or min(depths) < depths[0]:
            return "\n".join([" " * min(depths) + lines[0], *lines[1:]])
        if depths[0] >= 8:
            return "\n".join([" " * (depths[0] - 4) + lines[0], *lines[1:]])
    return "\n".join("    " + line if line.strip() else line for line in lines)


def extract(answer: str, problem: Problem) -> str:
    """The program in an answer: source that defines `problem.entry_point`, as far as the answer has it.

    Tried in this order: the first fenced block that defines the function; text without fences that defines it; the first
    fenced block, or else the text, as a continuation of the prompt. Imports and helpers of the prompt are always there.
    The answer is only searched, never parsed or run.
    """
    answer = re.sub(r"^\t+", lambda tabs: "    " * len(tabs[0]), answer.replace("\r\n", "\n"), flags=re.MULTILINE)
    (text, blocks), defines = _blocks(answer), _definition(problem.entry_point)
    for block in blocks:
        if defines.search(block):
            return f"{problem.preamble}\n{block}"
    if not blocks and defines.search(text):
        return f"{problem.preamble}\n{_whole(text)}"
    return f"{problem.prompt.rstrip()}\n{_body(blocks[0] if blocks else _cut(text))}\n"


def check(problem: Problem, program: str, limits: Limits | None = None) -> Outcome:
    """Run the tests of a problem against a program that should define its function (see `extract`).

    Raises:
        SandboxError: untrusted code cannot be run here.
    """
    return check_untrusted(program, problem.entry_point, problem.test, setup=problem.prompt, limits=limits)


def pass_at_1(answers: Mapping[str, str], problems: Sequence[Problem],
              limits: Limits | None = None) -> tuple[Rate, list[dict]]:
    """Share of problems whose one (greedy) answer passes all tests.

    Answers are by task_id, as generated; `extract` finds the code. Every problem needs one; an empty answer fails.

    Returns:
        The rate, and the outcomes in the order of `problems`: `task_id`, `status` (of `sandbox.STATUSES`), `detail`.

    Raises:
        SandboxError: untrusted code cannot be run here; nothing has been run then.
    """
    outcomes = [check(problem, extract(answers[problem.task_id], problem), limits) for problem in problems]
    return Rate(sum(outcome.status == "passed" for outcome in outcomes), len(outcomes)), [
        {"task_id": problem.task_id, "status": outcome.status, "detail": outcome.detail}
        for problem, outcome in zip(problems, outcomes, strict=True)]
