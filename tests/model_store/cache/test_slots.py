"""What is counted of a slot's requests."""

from model_store.cache.slots import Usage


def test_answers_of_one_batch_are_one_run() -> None:
    """Answers are summed; those that began at the same time ran together."""
    usage = Usage()
    for began in (1.0, 1.0, 2.0):
        usage.note_answer(began, 0.5, 0.25, 0.125)
    assert (usage.answers, usage.batches, usage.last) == (3, 2, 2.0)
    assert (usage.answered_s, usage.queued_s, usage.ran_s) == (1.5, 0.75, 0.375)
