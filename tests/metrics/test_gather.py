import pytest

from lightning_attn.metrics import gather_by_id
from lightning_attn.metrics.gather import add_record


def test_one_process_sorts_by_id():
    records = {5: "e", 2: "b", 9: "i"}
    gathered = gather_by_id(records)
    assert list(gathered.items()) == [(2, "b"), (5, "e"), (9, "i")]
    assert gathered is not records


def test_of_a_repeated_sample_the_first_record_counts():
    records = {}
    add_record(records, 3, "first")
    add_record(records, 3, "second")
    assert records == {3: "first"}


def test_an_id_of_two_samples_is_refused():
    records = {}
    add_record(records, 3, ("hypothesis", "reference"), same=lambda record: record[1])
    add_record(records, 3, ("other", "reference"), same=lambda record: record[1])
    with pytest.raises(ValueError, match=r"sample id 3 belongs to two different samples, 'reference' and 'another'"):
        add_record(records, 3, ("other", "another"), same=lambda record: record[1])


# Unequal numbers and a repeated sample; then a rank without any.
RECORDS_OF_RANK = [({7: "r0", 1: "r0", 4: "r0"}, {}), ({4: "r1", 0: "r1"}, {2: "r1"})]


def _gather(rank: int) -> list[object]:
    results: list[object] = [list(gather_by_id(records).items()) for records in RECORDS_OF_RANK[rank]]
    try:
        gather_by_id(RECORDS_OF_RANK[rank][0], same=lambda record: record)
    except ValueError as error:
        results += [str(error)]
    return results


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_every_rank_gets_the_union_and_the_lowest_rank_wins(on_two_ranks):
    for unequal, empty, error in on_two_ranks(_gather):
        assert unequal == [[0, "r1"], [1, "r0"], [4, "r0"], [7, "r0"]]
        assert empty == [[2, "r1"]]
        assert error.startswith("sample id 4 belongs to two different samples, 'r0' and 'r1'")
