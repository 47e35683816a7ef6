"""Every attack of the image bench through the workflow, at scale smoke."""

import pandas as pd
import pytest

from tests.test_workflow import Folder


@pytest.mark.slow
def test_zoo_at_smoke_scale(tmp_path, cifar10):
    folder = Folder(tmp_path / "zoo", cifar10.parents[1].resolve())
    folder.finish("--", "zoo")
    table = pd.read_csv(folder.path / "results/smoke/zoo/victims.csv")
    assert len(table) == 12 and table.acc_twin.notna().all()
    # at this size a network may be too bad for an attack to be prepared on: that is a failed row with its reason, no crash
    failed = table[table.status != "ok"].reason.astype(str)
    assert failed.str.len().gt(20).all() and len(failed) <= 3
    batchwise = table[table.attack.isin(["wanet", "bpp", "inputaware"])]
    assert (batchwise.rate_reached > 0).all()
