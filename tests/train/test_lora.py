"""LoRA's layers for training against PEFT's own: losses and gradients, packed and alone; dropout; frozen layers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from stages.train.attention import Attention, missing_for, own_attention
from stages.train.base import checkpoint_layers
from stages.train.dropout import Dropout, row_numbers, sample_key
from stages.train.loop import Gradients
from stages.train.samples import TokenSequence
from stages.train.trainee import CAPTURED_TOKENS, LoraTrainee, has_own_dropout, hidden_alone

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2, biases": Qwen2Config(**SMALL),
    "qwen3, normed queries": Qwen3Config(**SMALL),
    "mistral, a window": MistralConfig(**SMALL, sliding_window=12),
    "gemma2, capped and windows": Gemma2Config(**SMALL, sliding_window=12, attn_implementation="eager"),
    "gemma3, windows": Gemma3TextConfig(**SMALL, sliding_window=12),
    "phi3, one product": Phi3Config(**SMALL),
    "gpt-oss, sinks": GptOssConfig(**SMALL, sliding_window=12, num_local_experts=4, attn_implementation="eager"),
}
LENGTHS = (7, 40, 23)


def adapted(base: Any) -> Any:
    """A model with LoRA that has learnt something. `base` is the model, or the config of a random one."""
    torch.manual_seed(0)
    model = base if isinstance(base, torch.nn.Module) else AutoModelForCausalLM.from_config(base)
    # PEFT finds no linear layers in a quantised base, and more than it can adapt in gpt-oss
    named = model is base or base.model_type == "gpt_oss"
    targets = r".*\.([qkvo]|gate|up|down)_proj" if named else "all-linear"
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def sequences() -> list[TokenSequence]:
    numbers = np.random.RandomState(1)
    return [TokenSequence(numbers.randint(1, 300, n).astype(np.int32), np.arange(n) > n // 2) for n in LENGTHS]


def by_peft(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of the sequences, one at a time, and the gradients, by PEFT and transformers alone."""
    total = 0.0
    for sequence in sequences():
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
        labels = torch.where(torch.from_numpy(sequence.learnt), tokens, -100)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100)
        loss.backward()
        total += float(loss.detach())
    return total, {n.replace(".default", ""): w.grad for n, w in model.named_parameters() if w.requires_grad}


def by_lorry(model: Any, dropout: float = 0.0, one_by_one: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by a pack, or one at a time."""
    trainee = LoraTrainee(model, dropout)
    Gradients(list(trainee.weights.values()))
    keys = [sample_key(0, 3, place) for place in range(len(LENGTHS))]
    packs = [[place] for place in range(len(LENGTHS))] if one_by_one else [list(range(len(LENGTHS)))]
    for pack in packs:
        chosen = [sequences()[place] for place in pack]
        trainee.add_gradients(trainee.prepare(chosen, [keys[place] for place in pack]), 1.0)
    return float(trainee.sums[0]), {name: weight.grad for name, weight in trainee.weights.items()}  # type: ignore[misc]


def compare(found: tuple[float, dict[str, Any]], wanted: tuple[float, dict[str, Any]], most: float = 1e-5) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm()) <= most * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_has_the_losses_and_gradients_of_its_samples_alone(name: str) -> None:
    compare(by_lorry(adapted(CONFIGS[name])), by_peft(adapted(CONFIGS[name])))


def test_in_bfloat16_gradients_are_as_exact_as_peft_s() -> None:
    """LoRA's products are in bfloat16 here and in float32 in PEFT; both read a base and hidden states in bfloat16."""

    def rounded() -> Any:
        model = adapted(CONFIGS["llama"])
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.bfloat16()
        return model

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradients[name].flatten() for name in sorted(gradients)])

    exact, own, peft_s = (
        flat(found[1]) for found in (by_peft(rounded().float()), by_lorry(rounded()), by_peft(rounded()))
    )
    errors = [float((one - exact).norm() / exact.norm()) for one in (own, peft_s)]
    assert errors[0] < 0.015 and errors[0] < 2 * errors[1], errors


def test_what_is_dropped_does_not_depend_on_the_pack() -> None:
    whole, alone = (by_lorry(adapted(CONFIGS["llama"]), 0.3, one_by_one) for one_by_one in (False, True))
    compare(whole, alone)
    assert abs(whole[0] - by_lorry(adapted(CONFIGS["llama"]))[0]) > 1e-3, "something was dropped"


def test_the_share_of_dropped_inputs_is_the_probability() -> None:
    lengths = [500, 300, 200]
    for probability in (0.05, 0.5):
        keys = [sample_key(1, 2, place) for place in range(3)]
        keep = Dropout(probability, row_numbers(lengths, keys)).keep(11, 256).float()
        # four standard errors of a mean of as many coin tosses
        for share, count in ((keep.mean(), keep.numel()), *((row.mean(), 256) for row in keep[:3])):
            assert abs(float(share) - 1 + probability) < 4 * (probability * (1 - probability) / count) ** 0.5
        other = Dropout(probability, row_numbers(lengths, keys)).keep(40503, 256).float()
        neighbours = {"features": (keep[:, 1:], keep[:, :-1]), "tokens": (keep[1:], keep[:-1])}
        neighbours |= {"samples": (keep[:300], keep[500:800]), "modules": (keep, other)}
        for one, two in neighbours.values():
            share = float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])
            assert abs(share) < 4 * one.numel() ** -0.5, neighbours.keys()


def test_the_mean_over_masks_is_the_input() -> None:
    x = torch.randn(1, 64).expand(20_000, 64)
    dropped = Dropout(0.3, row_numbers([20_000], [sample_key(0, 0, 0)])).apply(x, 7)
    assert sorted((dropped[:, 0] / x[:, 0]).unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    error = (dropped.mean(0) - x[0]) / (x[0].abs() * (0.3 / 0.7 / len(x)) ** 0.5)
    assert float(error.abs().max()) < 4.5, "in standard errors of the mean"


def test_another_sample_of_the_pack_changes_no_gradient() -> None:
    trainee = LoraTrainee(adapted(CONFIGS["mistral, a window"]), 0.0)
    gradients = Gradients(list(trainee.weights.values()))
    first, second, third = sequences()
    silent = TokenSequence(second.tokens, np.zeros(len(second.tokens), bool))
    changed = TokenSequence(second.tokens[::-1].copy(), np.zeros(len(second.tokens), bool))
    found = []
    for other in (silent, changed):
        gradients.flat.zero_()
        trainee.add_gradients(trainee.prepare([first, other, third], [1, 2, 3]), 1.0)
        found.append(gradients.flat.clone())
    assert torch.allclose(found[0], found[1], atol=1e-7) and found[0].norm() > 0


def test_a_pass_has_the_same_padding_before_and_after_a_capture_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a resumed training, whose own capture fails later or not at all, has the same bits."""
    trainee = LoraTrainee(adapted(CONFIGS["mistral, a window"]), 0.0)
    Gradients(list(trainee.weights.values()))
    trainee._pads = trainee._captures = True
    tried, lengths, run = [], [], trainee._run

    def fail(shape: Any, tensors: Any) -> bool:
        tried.append(shape)
        trainee._stop_capturing()
        return False

    def record(tensors: Any, longest: int, factor: torch.Tensor) -> None:
        lengths.append((len(tensors.tokens), len(tensors.targets), longest))
        run(tensors, longest, factor)

    monkeypatch.setattr(trainee, "_capture", fail)
    monkeypatch.setattr(trainee, "_run", record)
    sums = []
    for _ in range(3):
        trainee.sums.zero_()
        trainee.add_gradients(trainee.prepare(sequences(), [1, 2, 3]), 1.0)
        sums.append(trainee.sums.tolist())
    assert lengths == [(128, 128, CAPTURED_TOKENS)] * 3
    assert len(tried) == 1, "the first pass compiles kernels and is never captured; after a failure none is"
    assert sums == [sums[0]] * 3
    assert sums[0][0] == pytest.approx(by_lorry(adapted(CONFIGS["mistral, a window"]))[0], rel=1e-5)


def test_a_pass_in_which_nothing_is_learnt_adds_nothing() -> None:
    """With a sharded base a process makes as many passes as the others, some of them such."""
    trainee = LoraTrainee(adapted(CONFIGS["mistral, a window"]), 0.0)
    gradients = Gradients(list(trainee.weights.values()))
    trainee.add_gradients(trainee.prepare([one.unlearnt() for one in sequences()], [1, 2, 3]), 1.0)
    assert trainee.sums.tolist() == [0, 0] and not gradients.flat.any()


def test_a_model_that_cannot_keep_samples_apart_trains_one_at_a_time() -> None:
    """Qwen3-Next's linear attention carries a state from token to token, over the boundaries of a pack."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=0,
    )
    alone = hidden_alone(adapted(config).get_base_model(), None, sequences())
    trainee = LoraTrainee(adapted(config), 0.0)
    trainee.check(alone, sequences())
    assert "differs by" in str(trainee.why_one_by_one) and not trainee.packs
    again = [trainee._hidden([sequence]) for sequence in sequences()]
    for one, other in zip(again, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5), "its own attention is back"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_others_may_be_packed(name: str) -> None:
    alone = hidden_alone(adapted(CONFIGS[name]).get_base_model(), None, sequences())
    trainee = LoraTrainee(adapted(CONFIGS[name]), 0.0)
    trainee.check(alone, sequences())
    assert trainee.packs and trainee.attention_facts == {"kernel": "plain"}


def test_a_window_that_only_masks_know_is_found_though_no_sample_is_longer() -> None:
    """Qwen2-MoE gives its window to no attention function."""
    config = Qwen2MoeConfig(**SMALL, use_sliding_window=True, sliding_window=100, max_window_layers=0, num_experts=4)
    alone = hidden_alone(adapted(config).get_base_model(), None, sequences())
    trainee = LoraTrainee(adapted(config), 0.0)
    trainee.check(alone, sequences())
    why = "only the model's masks know its window of 100 tokens"
    if transformers.__version__ < "5":
        why = "the model does not pass on where samples begin"
    assert trainee.attention_facts == {"kernel": "the model's own", "one sample a pass": why}


def test_a_model_that_looks_ahead_is_refused() -> None:
    query = torch.randn(1, 2, 5, 8)
    for module, named in ((SimpleNamespace(is_causal=False), {}), (SimpleNamespace(), {"is_causal": False})):
        with pytest.raises(ValueError, match="looks ahead"):
            Attention("plain").attend(module, query, query, query, None, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_attention_that_packs_are_checked_against_knows_all_that_the_config_asks_for(name: str) -> None:
    chosen = own_attention(CONFIGS[name])
    assert chosen == ("eager" if name.startswith(("gemma2", "gpt-oss")) else "sdpa")
    AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=chosen)


def test_each_faster_kernel_has_a_reason() -> None:
    assert missing_for("flash-attn-4", (8, 0), torch.float16) == "needs compute capability 9.0, this GPU has 8.0"
    assert missing_for("flash-attn-4", (9, 0), torch.float16) == "flash_attn.cute is not installed"
    assert missing_for("varlen", (9, 0), torch.float32) == "computes in 16 bits only"
    assert missing_for("efficient", (7, 0), torch.float32) is None


@pytest.mark.parametrize(("dropped", "kept"), [(0.2, True), (0.0, False)])
def test_a_base_with_dropout_of_its_own_drops_the_same_when_layers_are_computed_again(
    dropped: float, kept: bool
) -> None:
    found = []
    for layers in (0, 2):
        model = adapted(LlamaConfig(**SMALL, attention_dropout=dropped)).train()
        assert has_own_dropout(model.get_base_model()) == kept
        checkpoint_layers(model.get_base_model(), layers)
        torch.manual_seed(5)
        found.append(by_lorry(model))
    compare(*found)
    torch.manual_seed(6)
    again = by_lorry(adapted(LlamaConfig(**SMALL, attention_dropout=dropped)).train())
    assert (abs(again[0] - found[0][0]) > 1e-3) == kept, "something was dropped"
