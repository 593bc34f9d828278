"""Which way of training is taken on which card, and what is proposed when none fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.recipe import Connector, Train
from stages.hardware.fit import Offers, disk_bytes, least_memory, plan_training, recipe_way, smallest_changes
from stages.hardware.memory import Lengths, estimate_memory
from stages.hardware.step import StepPlan
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


def test_on_a_large_card_passes_are_long_and_nothing_is_checkpointed(seven: ModelShape) -> None:
    asked = settings()
    way = plan_training(seven, asked, 1, "bfloat16", 80 * GIB, LENGTHS)
    assert way.settings == asked
    assert way.changes == ()
    assert way.sharding == "none"
    assert way.step == StepPlan(16, 1, 16_384)
    short = plan_training(seven, asked, 1, "bfloat16", 80 * GIB, Lengths(300, 64, mean=200.0, deviation=50.0))
    assert short.step.pass_tokens == 16 * 200 + 3 * 4 * 50, "16 samples are not longer"
    assert plan_training(seven, asked, 2, "bfloat16", 80 * GIB, Lengths(300, 64)).step == StepPlan(16, 2, 8 * 300)


def test_a_cpu_has_no_limit_and_short_passes(seven: ModelShape) -> None:
    way = plan_training(seven, settings(), 1, "float32", None, Lengths(300, 64))
    assert (way.changes, way.step) == ((), StepPlan(16, 1, 2048))
    assert plan_training(seven, settings(), 1, "float32", None).step.pass_tokens == 2048


def test_with_less_memory_passes_get_shorter_and_more_layers_are_checkpointed(seven: ModelShape) -> None:
    asked = settings()
    lengths = Lengths(512, 64)
    need = {gib: plan_training(seven, asked, 1, "bfloat16", gib * GIB, lengths) for gib in (68, 40, 26, 20, 16.6)}
    assert {gib: (way.step.pass_tokens, way.step.checkpointed_layers) for gib, way in need.items()} == {
        **{68: (8192, 0), 40: (4096, 0), 26: (4096, 7), 20: (4096, 21), 16.6: (2048, 28)}
    }
    assert need[68].changes == ()
    assert need[40].changes == ("passes of at most 4,096 tokens for 8,192",)
    assert need[20].changes == ("passes of at most 4,096 tokens for 8,192", "21 checkpointed layers")
    for gib, way in need.items():
        assert way.fits(gib * GIB)
        assert way.step.effective_batch == 16
        assert way.settings == asked  # what would change the result is never touched


def test_the_fastest_way_that_fits_is_taken(seven: ModelShape) -> None:
    """A pass of twice the tokens is worth a fourth of the layers, and less so the longer it is."""
    for gib in range(16, 70):
        way = plan_training(seven, settings(), 1, "bfloat16", gib * GIB, LENGTHS)
        for tokens in (2048, 4096, 8192, 16_384):
            for layers in (0, 7, 14, 21, 28):
                other = StepPlan(16, 1, tokens, layers)
                faster = _time(other) < _time(way.step) - 1e-9
                need = estimate_memory(seven, settings(), other, "bfloat16", "none", LENGTHS).total
                assert not (faster and need <= gib * GIB), (gib, str(way.step), str(other))


def _time(step: StepPlan) -> float:
    return (1 + step.checkpointed_layers / 28 / 3) * (1 + 400 / step.pass_tokens)


def test_all_layers_are_checkpointed_where_the_recipe_says_so(seven: ModelShape) -> None:
    asked = settings(gradient_checkpointing=True)
    for gib in (17, 40, 139):
        way = plan_training(seven, asked, 1, "bfloat16", gib * GIB, LENGTHS)
        assert way.step.checkpointed_layers == 28
        assert not any("layers" in change for change in way.changes), "as it was asked for"


def test_a_sample_longer_than_any_pass_has_one_of_its_own(seven: ModelShape) -> None:
    way = plan_training(seven, settings(max_length=30_000), 1, "bfloat16", 139 * GIB, Lengths(30_000, 64))
    assert way.step.pass_tokens == 30_000


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
    way = plan_training(seven, settings(), 1, "bfloat16", 4 * GIB, LENGTHS)
    assert not way.fits(4 * GIB)
    assert way.step == StepPlan(16, 1, 2048, 28)


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
    memory = plan_training(
        seven, asked, 1, "bfloat16", 1, lengths
    ).estimate.total  # one process needs no NCCL, whose gigabyte two have not
    assert not plan_training(seven, asked, 2, "bfloat16", memory, lengths).fits(memory)
    found = smallest_changes(seven, asked, 2, "bfloat16", memory, lengths)
    assert [way.changes[0] for way in found][:2] == ["train.sharding=zero3", "1 GPU"]
    assert [way.changes for way in found][1] == ("1 GPU",)
    without = smallest_changes(seven, asked, 2, "bfloat16", memory, lengths, Offers(deepspeed=False))
    assert [way.changes[0] for way in without][:2] == ["1 GPU", "train.load_in_4bit=true"]


def test_sharding_that_is_not_needed_is_dropped_in_words(tmp_path: Path) -> None:
    """A small base takes less whole than in parts with whole layers beside them."""
    small, asked = read_shape(make_shape(tmp_path, "Qwen2.5-0.5B")), settings(sharding="zero3")
    sharded = plan_training(small, asked, 2, "bfloat16", 1, LENGTHS).estimate.total
    found = smallest_changes(small, asked, 2, "bfloat16", sharded - 1, LENGTHS)
    assert found[0].changes == ("train.sharding=none",)


def test_the_nearest_number_of_cards_is_proposed_and_none_that_enlarges_the_batch(seven: ModelShape) -> None:
    asked = settings(gradient_checkpointing=True)
    memory = plan_training(seven, settings(sharding="zero3"), 3, "bfloat16", 1, LENGTHS).estimate.total
    found = smallest_changes(seven, asked, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False))
    assert [way.changes[0] for way in found] == ["3 GPUs"]
    assert not plan_training(seven, asked, 2, "bfloat16", memory, LENGTHS).fits(memory)
    few = settings(effective_batch=2)
    assert smallest_changes(seven, few, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False)) == []


def test_any_number_of_cards_is_proposed_up_to_the_samples_of_a_step(seven: ModelShape) -> None:
    asked = settings(gradient_checkpointing=True)
    memory = plan_training(seven, settings(sharding="zero3"), 3, "bfloat16", 1, LENGTHS).estimate.total

    def proposed(**values: object) -> list[str]:
        chosen = asked.model_copy(update=values)
        found = smallest_changes(seven, chosen, 1, "bfloat16", memory, LENGTHS, Offers(bitsandbytes=False))
        return [way.changes[0] for way in found]

    assert proposed() == ["3 GPUs"], "3 do not divide 16, and need not"
    assert proposed(connector=Connector(effective_batch=9)) == ["3 GPUs"]
    assert proposed(connector=Connector(effective_batch=2)) == [], "a third would get no sample of the connector's"


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
