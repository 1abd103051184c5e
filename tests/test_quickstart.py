"""quickstart.ipynb, run from top to bottom on a small dataset in a folder that is read-only."""

import json
import re
import shutil

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

SCRIPTS = {"baseline_eval.py", "train.py", "predict.py", "data_Exploration/dataset_Description.py"}


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "quickstart.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_settings(source, **settings):
    """The first cell with other values."""
    for name, value in settings.items():
        source, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.M)
        assert found == 1, name
    return source


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def n_pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_as_it_is_kept(notebook):
    cells = code_cells(notebook)
    assert len(cells) == 12
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert all(len(cell.source.splitlines()) <= 14 for cell in cells)
    source = "\n".join(cell.source for cell in cells)
    commands = re.findall(r"^!\{sys.executable\} (\S+\.py)", source, re.M)
    assert set(commands) == SCRIPTS


def test_from_top_to_bottom(notebook, small, tmp_path, monkeypatch):
    data = shutil.copytree(small, tmp_path / "input", ignore=shutil.ignore_patterns(".cache"))
    data.chmod(0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = tmp_path / "the runs"  # a space, as in folders of a mounted drive
    cells = code_cells(notebook)
    cells[0].source = with_settings(
        cells[0].source,
        DATA_ROOT=str(data),
        TRAINING="--epochs 2 --batch_size 12",
        RUNS=str(runs),
    )
    resources = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    )
    client.execute()  # raises if a cell raises

    # A command that fails does not raise: it says so.
    for cell in cells:
        assert not re.search(r"^(error: |Traceback|usage: )", printed(cell), re.M), printed(cell)
    assert [n_pictures(cell) for cell in cells] == [0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1]

    # Each run has the time in its name: before-120000, train-120030, after-120100.
    names = {
        path.parent.name.split("-")[0]: path.parent.name for path in runs.glob("*/result.json")
    }
    assert set(names) == {"before", "train", "after"}
    assert "48 images of 6 classes" in printed(cells[2])
    assert names["before"] in printed(cells[7]) and names["after"] in printed(cells[7])
    result = json.loads((runs / names["train"] / "result.json").read_text())
    assert result["epochs"] == 2
    assert printed(cells[11]).count("%  ") == 5, "five names"
    assert not (data / ".cache").exists(), "the data is left as it was"
