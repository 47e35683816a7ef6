"""All programs of tests/hostile.py against the sandbox."""

import pytest

from tests.faults.record import shorten, trial

sandbox = pytest.importorskip("cupel.sandbox", reason="this version has no sandbox")
hostile = pytest.importorskip("tests.hostile")

pytestmark = pytest.mark.skipif(bool(sandbox.refusal()), reason=f"untrusted code cannot be isolated: {sandbox.refusal()}")


@pytest.mark.parametrize("name", [*hostile.HOSTILE, *hostile.FORGERIES])
def test_hostile(name):
    kind, must = ("program", hostile.HOSTILE[name][1]) if name in hostile.HOSTILE else ("forgery", hostile.FORGERIES[name][1])
    with trial("sandbox", f"{kind}: {name}", must) as row:
        outcome, harm = hostile.attack(name)
        assert not harm, "; ".join(harm)
        row.happened, row.message = f"no harm, ended as {outcome.status}", shorten(outcome.detail)
