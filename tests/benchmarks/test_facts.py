"""The world of facts: what a question shares with the row that it asks for."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import facts
from retraining import Laboratory, Recipe, fill

SMALL = Recipe(people=4, others=2, pretrained=2, asked=4, width=32, layers=1, pretraining_steps=3, epochs=1, batch=8)


def test_nameless_questions_share_no_rare_word_with_their_row() -> None:
    world = facts(people=12, others=10, pretrained=10, asked=20, seed=0)
    bags = {row.id: set(f"{row.prompt} {row.response}".split()) for row in world.rows}
    within = Counter(word for bag in bags.values() for word in bag)
    names = {word for pair in world.pairs for word in pair}
    for query in world.queries:
        shared = set(f"{query.prompt} {query.response}".split()) & bags[query.gold]
        rare = {word for word in shared if within[word] <= 3}
        assert bool(rare & names) == query.named


def test_no_fact_about_the_people_that_are_asked_about_is_in_the_pretraining() -> None:
    world = facts(people=12, others=10, pretrained=10, asked=20, seed=0)
    told = {word for row in world.pretraining for word in row.prompt.split()}
    assert not told & {word for pair in world.pairs for word in pair}


def test_a_bank_that_was_stopped_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    whole = fill(Laboratory(tmp_path / "a", SMALL), subsets=3, seeds=2)

    class Stop(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise Stop

    laboratory = Laboratory(tmp_path / "b", SMALL)
    with pytest.raises(Stop):
        fill(laboratory, subsets=3, seeds=2, tell=stop)
    left: list[int] = []
    resumed = fill(laboratory, subsets=3, seeds=2, tell=lambda done, of: left.append(of))
    assert left[0] == 3
    assert np.array_equal(resumed.losses, whole.losses)
    assert (whole.masks.sum(1) == len(laboratory.rows) // 2).all()


def test_retraining_follows_from_its_seed_and_the_rows_that_it_keeps(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, SMALL)
    everything = range(len(laboratory.rows))
    same, fewer = laboratory.losses(0, everything), laboratory.losses(0, list(everything)[:4])
    assert torch.equal(same, laboratory.losses(0, everything))
    assert not torch.equal(same, fewer)
