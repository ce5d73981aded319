"""The exchange with the peers' drivers, and that a peer's failure is a row and not the end."""

import sys
from pathlib import Path

import peers
import pytest
from peers import Entry, Failed, Peer, run, write_job

sys.path.insert(0, str(peers.DRIVERS))
from exchange import IGNORED, batches, padded, read_samples, write_samples


def test_samples_come_back_with_their_targets_as_labels(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.npz", [[5, 6, 7], [8]], [[False, True, True], [True]])
    first, second = read_samples(tmp_path / "s.npz")
    assert (first.ids, first.labels, first.targets) == ([5, 6, 7], [IGNORED, 6, 7], 2)
    assert (second.ids, second.labels) == ([8], [8])
    assert padded([first, second])["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert padded([first, second])["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_hold_every_sample_within_the_budget(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.npz", [[1] * many for many in (3, 9, 4, 1)], [[True] * many for many in (3, 9, 4, 1)])
    samples = read_samples(tmp_path / "s.npz")
    found = batches(samples, budget=10)
    assert sorted(at for batch in found for at in batch) == [0, 1, 2, 3]
    assert all(len(b) == 1 or len(b) * max(len(samples[at].ids) for at in b) <= 10 for b in found)


def test_a_driver_that_fails_is_told_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text("raise RuntimeError('no such thing')\n", encoding="utf-8")
    monkeypatch.setitem(peers.PEERS, "broken", Peer(str(driver)))
    entry = Entry("broken", "broken", "any")
    write_job(tmp_path, entry, tmp_path)
    with pytest.raises(Failed, match="RuntimeError: no such thing"):
        run(entry, tmp_path, threads=1)


def test_every_entry_has_a_driver() -> None:
    for entry in (*peers.ANSWERS, *peers.COST):
        assert (peers.DRIVERS / peers.PEERS[entry.peer].driver).is_file()
