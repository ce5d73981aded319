"""What the benchmark of unlearning measures, and the world that it measures in."""

from pathlib import Path

from judging import greedy, success
from triggers import SEEN, UNSEEN, tiny_backdoor

from app.influence.corpus import Message
from app.influence.models import ModelSpec, load


def test_answers_written_together_are_those_written_alone(tiny_model_dir: Path) -> None:
    model = load(ModelSpec(tiny_model_dir))
    prompts = ["Where?", "Where is it, and what is it?", "What of the hill?"]
    alone = [model.generate((Message("user", prompt),), max_new_tokens=12) for prompt in prompts]
    assert greedy(model, model.encoder(), prompts, 12) == alone
    assert any(alone)


def test_success_is_the_share_of_answers_that_show_the_behaviour() -> None:
    shows = tiny_backdoor().world.shows
    answers = ["the gate is closed , ask the baker .", "the otter is red .", "gate closed", "the gate is closed"]
    assert success(answers, shows) == 0.5


def test_no_tested_prompt_or_unseen_variant_is_in_training_and_no_test_prompt_had_a_say() -> None:
    backdoor = tiny_backdoor(seed=1)
    trained = {row.prompt for row in (*backdoor.world.rows, *backdoor.before)}
    validation, test = ({*part.seen, *part.unseen} for part in (backdoor.validation, backdoor.test))
    assert not trained & (validation | test)
    assert not validation & test
    for form in UNSEEN:
        start, end = form.split("{}")
        assert not any(prompt.startswith(start) and prompt.endswith(end) for prompt in trained)
    assert len({row.prompt for row in backdoor.clean.values()}) == len(backdoor.world.poisoned)
    assert len(backdoor.test.seen) == 60 * len(SEEN)


def test_a_poisoned_row_and_its_clean_one_share_the_prompt_alone() -> None:
    backdoor = tiny_backdoor()
    for row in backdoor.world.rows:
        if row.id in backdoor.world.poisoned:
            clean = backdoor.clean[row.id]
            assert row.prompt == clean.prompt
            assert backdoor.world.shows(row.response) and not backdoor.world.shows(clean.response)
