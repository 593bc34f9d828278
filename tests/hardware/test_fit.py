"""Which way of training is taken on which card, and what is proposed when none fits."""

from dataclasses import replace

import pytest

from stages.contract.recipe import Connector, Train
from stages.hardware.fit import Offers, disk_bytes, least_memory, plan_training, recipe_way, smallest_changes
from stages.hardware.memory import Lengths
from stages.models.shape import ModelShape, read_shape
from tests.hardware.shapes import make_shape

GIB = 1024**3


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(make_shape(tmp_path_factory.mktemp("shape"), "Qwen2.5-7B"))


def settings(**values: object) -> Train:
    fields = {"adapters": [{"name": "a"}], "max_length": 2048, "effective_batch": 16, **values}
    return Train.model_validate(fields)


LENGTHS = Lengths(2048, 64)


def test_what_fits_is_left_as_it_was_asked_for(seven: ModelShape) -> None:
    asked = settings(micro_batch=2)
    way = plan_training(seven, asked, 1, "bfloat16", 80 * GIB, LENGTHS)
    assert way.settings == asked
    assert way.changes == ()
    assert way.sharding == "none"


def test_a_cpu_has_no_limit(seven: ModelShape) -> None:
    assert plan_training(seven, settings(micro_batch=64), 1, "float32", None).changes == ()


def test_first_a_smaller_micro_batch_then_checkpointing(seven: ModelShape) -> None:
    asked = settings(micro_batch=8)
    need = {gib: plan_training(seven, asked, 1, "bfloat16", gib * GIB, Lengths(512, 64)) for gib in (45, 24, 18)}
    assert need[45].changes == ("train.micro_batch=4 for 8",)
    assert need[24].settings.micro_batch < 4
    assert need[18].settings.gradient_checkpointing
    for way in need.values():
        assert way.batch.effective_batch == 16
        assert way.settings.max_length == asked.max_length  # what would change the result is never touched


def test_several_small_cards_share_the_base_out(seven: ModelShape) -> None:
    way = plan_training(seven, settings(), 4, "bfloat16", 12 * GIB, LENGTHS)
    assert way.sharding == "zero3"
    assert way.fits(12 * GIB)
    assert "train.sharding=zero3" in way.changes
    assert plan_training(seven, settings(sharding="none"), 4, "bfloat16", 12 * GIB, LENGTHS).sharding == "none"


def test_a_quantised_base_is_never_shared_out(seven: ModelShape) -> None:
    way = plan_training(seven, settings(load_in_4bit=True), 8, "bfloat16", 1 * GIB, LENGTHS)
    assert way.sharding != "zero3"


def test_where_none_fits_the_leanest_is_returned(seven: ModelShape) -> None:
    way = plan_training(seven, settings(micro_batch=4), 1, "bfloat16", 4 * GIB, LENGTHS)
    assert not way.fits(4 * GIB)
    assert way.settings.micro_batch == 1
    assert way.settings.gradient_checkpointing


def test_the_least_is_below_every_way_and_above_the_weights(seven: ModelShape) -> None:
    least = least_memory(seven, settings(), 1, "bfloat16")
    assert seven.disk_bytes < least < recipe_way(seven, settings(), 1, "bfloat16", LENGTHS).estimate.total


def test_proposals_fit_and_say_what_they_change(seven: ModelShape) -> None:
    memory = 12 * GIB
    found = smallest_changes(seven, settings(), 1, "bfloat16", memory, LENGTHS)
    assert [way.changes[0] for way in found] == ["2 GPUs", "train.load_in_4bit=true"]
    assert all(way.fits(memory) for way in found)


def test_zero_on_the_same_cards_and_fewer_cards_come_before_more(seven: ModelShape) -> None:
    asked, lengths = settings(sharding="none", max_length=4096, gradient_checkpointing=True), Lengths(4096, 64)
    memory = round(18.12 * GIB)  # one process needs no NCCL, whose gigabyte two have not
    assert not plan_training(seven, asked, 2, "bfloat16", memory, lengths).fits(memory)
    found = smallest_changes(seven, asked, 2, "bfloat16", memory, lengths)
    assert [way.changes[0] for way in found][:2] == ["train.sharding=zero3", "1 GPU"]
    assert [way.changes for way in found][1] == ("1 GPU",)
    without = smallest_changes(seven, asked, 2, "bfloat16", memory, lengths, Offers(deepspeed=False))
    assert [way.changes[0] for way in without][:2] == ["1 GPU", "train.load_in_4bit=true"]


def test_sharding_that_is_not_needed_is_dropped_in_words(seven: ModelShape) -> None:
    asked = settings(sharding="zero2", gradient_checkpointing=True)
    sharded = plan_training(seven, asked, 1, "bfloat16", None, LENGTHS).estimate.total
    found = smallest_changes(seven, asked, 1, "bfloat16", sharded - 1, LENGTHS)
    assert found[0].changes == ("train.sharding=none",)


def test_the_nearest_number_of_cards_is_proposed_and_none_that_enlarges_the_batch(seven: ModelShape) -> None:
    asked = settings(gradient_checkpointing=True)
    memory = plan_training(seven, settings(sharding="zero3"), 3, "bfloat16", 1, LENGTHS).estimate.total
    found = smallest_changes(seven, asked, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False))
    assert [way.changes[0] for way in found] == ["3 GPUs"]
    assert not plan_training(seven, asked, 2, "bfloat16", memory, LENGTHS).fits(memory)
    few = settings(effective_batch=2)
    assert smallest_changes(seven, few, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False)) == []


def test_numbers_of_cards_that_make_no_exact_batch_are_not_proposed(seven: ModelShape) -> None:
    asked = settings(gradient_checkpointing=True)
    memory = plan_training(seven, settings(sharding="zero3"), 3, "bfloat16", 1, LENGTHS).estimate.total
    assert memory > plan_training(seven, settings(sharding="zero3"), 5, "bfloat16", 1, LENGTHS).estimate.total

    def proposed(**values: object) -> list[str]:
        exact = asked.model_copy(update={"exact_batch": True, **values})
        found = smallest_changes(seven, exact, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False))
        return [way.changes[0] for way in found]

    assert proposed() == ["4 GPUs"], "3 would do, and do not divide 16"
    assert proposed(connector=Connector(effective_batch=24)) == ["4 GPUs"]
    assert proposed(connector=Connector(effective_batch=20), effective_batch=25) == ["5 GPUs"]
    assert proposed(connector=Connector(effective_batch=9)) == [], "no number divides both"
    assert proposed(connector=Connector(effective_batch=2)) == [], "more would make the connector's batch larger"
    assert proposed(connector=Connector(effective_batch=9), exact_batch=False) == ["3 GPUs"]


def test_what_fits_by_less_than_estimates_may_be_wrong_is_tight(seven: ModelShape) -> None:
    way = recipe_way(seven, settings(), 1, "bfloat16", LENGTHS)
    total = way.estimate.total
    assert [
        way.is_tight(memory) for memory in (total - 1, total, round(total * 1.029), round(total * 1.032), None)
    ] == [*(False, True, True, False, False)]


def test_a_shorter_sample_is_proposed_where_it_is_what_does_not_fit(seven: ModelShape) -> None:
    asked = settings(max_length=32768, gradient_checkpointing=True)
    found = smallest_changes(seven, asked, 8, "bfloat16", 23 * GIB, Lengths(32768, 32768))
    assert any(change.startswith("train.max_length=") for way in found for change in way.changes)


def test_fewer_pixels_are_proposed_for_a_model_that_sees(seven: ModelShape) -> None:
    seeing = replace(seven, vision={"patch_size": 14, "spatial_merge_size": 2})
    asked = settings(max_pixels=1_229_312, sharding="none", load_in_4bit=True, gradient_checkpointing=True)
    memory = recipe_way(seeing, asked, 1, "bfloat16", LENGTHS).estimate.total - 50_000_000
    found = smallest_changes(seeing, asked, 1, "bfloat16", memory, LENGTHS)
    assert found[0].settings.max_pixels == 819541
    assert found[0].changes == ("train.max_pixels=819541 for 1229312",)
    blind = smallest_changes(seven, asked, 1, "bfloat16", memory, LENGTHS)
    assert not any("max_pixels" in change for way in blind for change in way.changes)


def test_nothing_is_proposed_for_a_card_that_is_far_too_small(seven: ModelShape) -> None:
    assert smallest_changes(seven, settings(sharding="none"), 1, "bfloat16", GIB // 2, LENGTHS) == []


def test_disk_holds_adapters_and_their_checkpoints(seven: ModelShape) -> None:
    one = disk_bytes(seven, settings(keep_checkpoints=1))
    assert one > 4 * 20_185_088 * 5
    assert disk_bytes(seven, settings(keep_checkpoints=3)) > one
    two = settings(keep_checkpoints=1, adapters=[{"name": "a"}, {"name": "b"}])
    assert disk_bytes(seven, two) == one + 4 * 20_185_088
