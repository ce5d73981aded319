"""KNN-Shapley (Jia et al., 2019) as pyDVL computes it, in a process and an environment of its own.

pyDVL 0.10.0 wants numpy below 2, which this project is beyond; so the environment is made once, beside the tables in
benchmarks/out, and arrays go to and fro as files. The value is exact for a k-nearest-neighbours classifier, so rows
need a class: where a response is text, that is its first token, and a row's place is the model's state before it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from app.influence.corpus import Example
from app.influence.models import LoadedModel

PYDVL = "pydvl==0.10.0"
HOME = Path(__file__).resolve().parent / "out" / PYDVL.replace("==", "-")
NEIGHBOURS = 5
PROGRAM = """
import sys
import numpy as np
from pydvl.valuation.dataset import Dataset
from pydvl.valuation.methods.knn_shapley import KNNShapleyValuation
from sklearn.neighbors import KNeighborsClassifier

given = np.load(sys.argv[1])
pool, test = Dataset(given["x"], given["y"]), Dataset(given["test_x"], given["test_y"])
method = KNNShapleyValuation(KNeighborsClassifier(int(given["k"])), test, progress=False)
result = method.fit(pool).result
values = np.empty(len(pool))
values[result.indices] = result.values
np.save(sys.argv[2], values)
"""


def knn_shapley(model: LoadedModel, rows: Sequence[Example], held: Sequence[Example]) -> torch.Tensor:
    """[rows]: the value of each row for a classifier of the validation rows' first response tokens."""
    (x, y), (test_x, test_y) = (_classified(model, some) for some in (rows, held))
    with tempfile.TemporaryDirectory() as name:
        given, found = Path(name) / "given.npz", Path(name) / "found.npy"
        np.savez(given, x=x, y=y, test_x=test_x, test_y=test_y, k=NEIGHBOURS)
        subprocess.run([_python(), "-W", "ignore", "-c", PROGRAM, given, found], check=True)
        return torch.from_numpy(np.load(found))


@torch.no_grad()
def _classified(model: LoadedModel, rows: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """([rows, d] unit states before the response's first token, [rows] that token)."""
    states = []
    for row in rows:
        ids = torch.tensor([row.ids[: row.positions[0]]])
        state = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
        states.append(state / state.norm())
    return torch.stack(states).numpy(), np.array([row.ids[row.positions[0]] for row in rows])


def _python() -> Path:
    python = HOME / "bin" / "python"
    if not (HOME / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PYDVL], check=True)
        (HOME / "ready").touch()
    return python
