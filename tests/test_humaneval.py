"""HumanEval: code out of answers, pass@1."""

import json
import textwrap

import pytest

from cupel import sandbox
from cupel.evaluation.metrics import Rate
from cupel.sandbox import Limits, SandboxError, refusal
from cupel.text.data import sources
from cupel.text.humaneval import STOP, Problem, check, extract, instruction, pass_at_1, problems

sandboxed = pytest.mark.skipif(bool(refusal()), reason=f"untrusted code cannot be isolated: {refusal()}")

TOY = Problem("HumanEval/0", '''from typing import List


def helper(x):
    return 2 * x


def double_all(items: List[int]):
    """ Double each.
    >>> double_all([1])
    [2]
    """
''', "double_all", "    return [helper(item) for item in items]\n", """

METADATA = {}


def check(candidate):
    assert candidate([1, 2]) == [2, 4]
    assert helper(2) == 4
""")
BODY = "    result = []\n    for item in items:\n        result.append(helper(item))\n    return result\n"
WHOLE = TOY.prompt + BODY


@pytest.fixture(scope="module")
def real(mirror, tmp_path_factory):
    folder = tmp_path_factory.mktemp("humaneval")
    sources.prepare("humaneval", folder, kinds=("mirror",), mirror=mirror)
    return problems(sources.load(folder))


def test_problems_are_those_of_the_paper(real):
    assert [problem.task_id for problem in real] == [f"HumanEval/{k}" for k in range(164)]
    assert all(problem.prompt.startswith(problem.preamble) for problem in real)
    # the four prompts with a helper function, and no other, keep a definition before the one asked for
    assert [problem.task_id for problem in real if "def " in problem.preamble] == [f"HumanEval/{k}" for k in (10, 32, 38, 50)]


def test_prompt():
    asked = instruction(TOY)
    assert TOY.prompt.rstrip() in asked and asked.count("```") == 2


def answers():
    """Forms of a right answer, as models give them."""
    dedented = textwrap.dedent(BODY)
    return {
        "continuation": BODY,
        "first indentation lost": BODY.strip(),
        "first line opens a block": "for item in items:\n        item\n    return [helper(item) for item in items]",
        "first line opens a bracket": "return [\n        helper(item)\n        for item in items\n    ]",
        "one line": "return [2 * item for item in items]",
        "tabs": BODY.replace("    ", "\t"),
        "goes on with a test": BODY + "\n\nprint(double_all([1]))\nassert False\n",
        "goes on with a function": BODY + "\n\ndef other(:\n    pass\n",
        "goes on with a comment": BODY + "\n# Test: (\n",
        "goes on with a script": BODY + "\nif __name__ == '__main__':\n    1 / 0\n",
        "closes a fence it never opened": BODY + "```\nThis works because (...)",
        "fence": f"Here it is:\n\n```python\n{WHOLE}```\nIt doubles each item (and more).",
        "fence without language": f"```\n{WHOLE}```",
        "fence with tildes": f"~~~py\n{WHOLE}~~~",
        "fence, windows": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
        "fence without end": f"```python\n{WHOLE}",
        "fence without imports and helper": "```python\ndef double_all(items: List[int]):\n" + BODY + "```",
        "fence with body": f"```python\n{BODY}```",
        "fence with dedented body": f"```python\n{dedented}```",
        "second fence": f"Run\n```sh\npip install x\n```\nthen\n```python\n{WHOLE}```",
        "fence and example": f"```python\n{WHOLE}```\nUse:\n```python\nprint(double_all([1]))\n1 / 0\n```",
        "fence with example for scripts": f"```python\n{WHOLE}\nif __name__ == '__main__':\n    1 / 0\n```",
        "long fence": f"````python\n{WHOLE}\n# ```\n````",
        "whole function": WHOLE,
        "whole function in prose": f"Sure! from here on it is easy:\n\n{WHOLE}\nThis function works (I hope).",
        "whole function and constant": WHOLE.replace("helper(item)", "FACTOR * item") + "\nFACTOR = 2\n",
        "whole function, fence never opened": f"{WHOLE}```\n",
    }


@sandboxed
@pytest.mark.parametrize("name", answers())
def test_code_in_answers(name):
    program = extract(answers()[name], TOY)
    outcome = check(TOY, program)
    assert outcome.status == "passed", (program, outcome)


@pytest.mark.parametrize("answer", ["", "   \n", "```", "```python\n```", "I cannot do that.", "```python", "\n```\n```\n",
                                    "def (", "\t", "x\n```\n", "def double_all(", "(" * 10_000, "```" * 1000])
def test_any_text_is_an_answer(answer):
    assert "double_all" in extract(answer, TOY)


def test_stop_sequences_end_what_follows():
    for stop in STOP:
        assert stop not in extract(BODY.rstrip() + f"{stop}x", TOY)[len(TOY.prompt):]


@sandboxed
def test_ten_canonical_solutions_pass(real):
    chosen = [real[k] for k in (0, 10, 32, 33, 38, 50, 53, 64, 115, 163)]  # with helpers, imports, random tests
    rate, outcomes = pass_at_1({problem.task_id: problem.canonical_solution for problem in chosen}, chosen)
    assert rate == Rate(10, 10), outcomes


@sandboxed
@pytest.mark.slow
@pytest.mark.parametrize("form", ["continuation", "first indentation lost", "fence", "fence with dedented body",
                                  "whole in prose"])
def test_all_canonical_solutions_pass(real, form):
    forms = {"continuation": lambda p: p.canonical_solution, "first indentation lost": lambda p: p.canonical_solution.strip(),
             "fence": lambda p: f"Sure:\n```python\n{p.prompt}{p.canonical_solution}```\n",
             "fence with dedented body": lambda p: f"```\n{textwrap.dedent(p.canonical_solution)}```",
             "whole in prose": lambda p: f"Sure.\n\n{p.prompt}{p.canonical_solution}\n\nThis works.\n"}
    rate, outcomes = pass_at_1({problem.task_id: forms[form](problem) for problem in real}, real)
    assert rate == Rate(164, 164), [o for o in outcomes if o["status"] != "passed"]


@sandboxed
@pytest.mark.slow
def test_no_empty_answer_passes(real):
    assert pass_at_1({problem.task_id: "    pass" for problem in real}, real)[0] == Rate(0, 164)


@sandboxed
def test_pass_at_1():
    def other(number, **changes):
        return Problem(**(vars(TOY) | {"task_id": f"HumanEval/{number}"} | changes))

    asked = [other(k) for k in range(6)]
    given = {"HumanEval/0": BODY, "HumanEval/1": "    return items", "HumanEval/2": "", "HumanEval/3": "    while True: pass",
             "HumanEval/4": "    import os\n    os._exit(0)", "HumanEval/5": "    import socket\n    socket.socket()"}
    rate, outcomes = pass_at_1(given, asked, Limits(cpu=1, seconds=5))
    assert [outcome["task_id"] for outcome in outcomes] == [problem.task_id for problem in asked]
    statuses = [outcome["status"] for outcome in outcomes]
    assert statuses == ["passed", "failed", "failed", "timeout", "failed", "failed"] and rate == Rate(1, 6)
    assert json.loads(json.dumps(outcomes)) == outcomes


def test_nothing_runs_where_it_cannot_be_isolated(monkeypatch):
    def none():
        raise SandboxError("no namespaces here")

    monkeypatch.setattr(sandbox, "bwrap", none)
    monkeypatch.setattr(sandbox, "_check", lambda *_: pytest.fail("something was run"))
    with pytest.raises(SandboxError, match="no namespaces here"):
        pass_at_1({"HumanEval/0": BODY}, [TOY])


def test_records_of_the_prepared_set():
    assert problems([vars(TOY) | {"id": "HumanEval/0"}]) == [TOY]
