# SPDX-License-Identifier: MIT
"""Tests of treg.py: python -m pytest -q test_treg.py

The heart is derivations done by hand, in the docstring, and asserted to 1e-10 in float64 against autograd.
"""
import argparse
import copy
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import treg  # noqa: E402

torch.set_num_threads(2)
DOUBLE = dict(dtype=torch.float64)


def double(*rows):
    return torch.tensor(rows, **DOUBLE)


def close(found, expected, hint, tolerance=1e-10):
    found, expected = torch.as_tensor(found, **DOUBLE), torch.as_tensor(expected, **DOUBLE)
    assert found.shape == expected.shape, f"{hint}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.allclose(found, expected, rtol=0, atol=tolerance), f"{hint}: {found.tolist()}, expected {expected.tolist()}"


# ---------------------------------------------------------------------------------------------------- 1 prompts
def test_contrastive_prompts_keep_the_kind_of_the_prompt():
    for style in treg.PROMPTS:
        better, worse = treg.contrastive_prompts("Name a bird.", "A crow.", style)
        assert better != worse and "Name a bird." in better and "Name a bird." in worse
        assert ("A crow." in better) == ("A crow." in worse) == (style == "revise")
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Name a bird."}]
        before = copy.deepcopy(talk)
        for messages, text in zip(treg.contrastive_prompts(talk, "A crow.", style), (better, worse)):
            assert messages == talk[:3] + [{"role": "user", "content": text}], "only the last user message is rewritten"
        assert talk == before, "the caller's messages must not change"


def test_contrastive_prompts_ask_for_better_first_and_worse_second():
    for style in treg.PROMPTS:
        better, worse = treg.contrastive_prompts("x", "y", style)
        assert re.search(r"more helpful|is helpful", better) and re.search(r"less helpful|unhelpful", worse)


def test_contrastive_prompts_take_texts_literally():
    style = {"better": "{response}|{prompt}|+", "worse": "{prompt}|-"}
    assert treg.contrastive_prompts("a {response} {0} \\1 %s", "b {prompt}", style) == (
        "b {prompt}|a {response} {0} \\1 %s|+", "a {response} {0} \\1 %s|-")


# ---------------------------------------------------------------------------------------------- 2 token rewards
def test_token_rewards_values_and_gradient():
    """r̂ = σ(d) − ½ with d = better − worse. d = ln 3: σ = 3/4, r̂ = 1/4. d = −ln 3: r̂ = −1/4. d = 0: r̂ = 0.

    ∂r̂/∂better = σ(d)(1 − σ(d)) = 3/16, 3/16 and 1/4, and ∂r̂/∂worse is its negative.
    """
    ln3 = math.log(3)
    better = double([-1.0, -2.0 - ln3, -3.0]).requires_grad_()
    worse = double([-1.0 - ln3, -2.0, -3.0]).requires_grad_()
    rewards = treg.token_rewards(better, worse, torch.ones(1, 3))
    close(rewards, double([0.25, -0.25, 0.0]), "r̂ = σ(better − worse) − ½")
    rewards.sum().backward()
    close(better.grad, double([3 / 16, 3 / 16, 1 / 4]), "∂r̂/∂better = σ(1 − σ)")
    close(worse.grad, -better.grad, "∂r̂/∂worse = −∂r̂/∂better")


def test_token_rewards_swapped_prompts_flip_the_sign_and_equal_prompts_give_zero():
    generator = torch.Generator().manual_seed(0)
    better, worse = (torch.randn(4, 7, generator=generator) * 3 for _ in range(2))
    mask = torch.ones(4, 7, dtype=torch.bool)
    rewards = treg.token_rewards(better, worse, mask)
    assert torch.allclose(treg.token_rewards(worse, better, mask), -rewards, rtol=0, atol=1e-7)
    assert torch.equal(treg.token_rewards(better, better, mask), torch.zeros(4, 7)), "identical prompts carry no reward"
    extreme = treg.token_rewards(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]), mask[:1, :2])
    assert extreme.tolist() == [[0.5, -0.5]], "r̂ lies in [−½, ½]"


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("padding", [math.nan, math.inf, -1e30])
def test_padding_changes_no_value_and_no_gradient(kind, padding):
    """Rows of 3 and 1 tokens; what stands in the padding of the second must not matter, whatever the mask's type."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).to(kind)

    def all_three(fill):
        first = double([-1.0, -2.0, -0.5], [-3.0, fill, fill]).requires_grad_()
        second = double([-1.5, -1.0, -0.7], [-2.0, fill, fill]).requires_grad_()
        results = [treg.token_rewards(first, second, mask), treg.dpo_rewards(first, second, mask, 0.1),
                   treg.simpo_rewards(first, mask, 2.0)]
        sum(r.sum() * k for k, r in enumerate(results, 1)).backward()
        return results, (first.grad, second.grad)

    (values, gradients), (clean, clean_gradients) = all_three(padding), all_three(0.0)
    for name, value, expected in zip(("token_rewards", "dpo_rewards", "simpo_rewards"), values, clean):
        assert torch.equal(value, expected), f"{name}: padding of {padding} changed a value"
        assert value[1, 1:].tolist() == [0.0, 0.0], f"{name}: must be exactly 0 where mask is 0"
    for gradient, expected in zip(gradients, clean_gradients):
        assert torch.equal(gradient, expected), f"padding of {padding} changed a gradient"


# ---------------------------------------------------------------------------- 3 implicit rewards and the loss
def test_dpo_rewards_values_and_gradient():
    """r = β (log π − log π_ref) = 0.5 · (−1 + 3, −2 + 1) = (1, −½); ∂r/∂log π = β, ∂r/∂log π_ref = −β."""
    logps, ref = double([-1.0, -2.0]).requires_grad_(), double([-3.0, -1.0]).requires_grad_()
    rewards = treg.dpo_rewards(logps, ref, torch.ones(1, 2), 0.5)
    close(rewards, double([1.0, -0.5]), "r = β (log π − log π_ref)")
    rewards.sum().backward()
    close(logps.grad, double([0.5, 0.5]), "∂r/∂log π = β")
    close(ref.grad, double([-0.5, -0.5]), "∂r/∂log π_ref = −β")


def test_simpo_rewards_are_divided_by_the_length_of_the_response():
    """r = (β / |y|) log π. β = 2; |y| = 4 gives the factor ½, |y| = 1 the factor 2: a mean, not a sum, and no padding in it."""
    logps = double([-1.0, -2.0, -3.0, -4.0], [-1.5, 9.0, 9.0, 9.0]).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    rewards = treg.simpo_rewards(logps, mask, 2.0)
    close(rewards, double([-0.5, -1.0, -1.5, -2.0], [-3.0, 0.0, 0.0, 0.0]), "r = (β / |y|) log π")
    rewards.sum().backward()
    close(logps.grad, double([0.5] * 4, [2.0, 0.0, 0.0, 0.0]), "∂r/∂log π = β / |y|")
    assert treg.simpo_rewards(torch.zeros(1, 2), torch.zeros(1, 2), 2.0).tolist() == [[0.0, 0.0]], "no token, no reward"


def test_treg_loss_by_hand():
    """Two tokens a side: r(chosen) = (½, ½), r(rejected) = (¼, ¾ − ln 3); r̂ = (¼, −¼) and (−½, ½); α = ½, γ = 0.

    z = 1 − (1 − ln 3) = ln 3; −log σ(z) = ln(4/3); w = σ(−z) = ¼.
    Σ r̂ r = (⅛ − ⅛) + (−⅛ + ⅜ − ½ ln 3) = ¼ − ½ ln 3. L = ln(4/3) − ½ · ¼ · (¼ − ½ ln 3).
    w is detached, so ∂L/∂r(chosen, t) = −w (1 + α r̂_t) = −¼ (9/8, 7/8)
               and  ∂L/∂r(rejected, t) = +w (1 − α r̂_t) = +¼ (5/4, 3/4).
    Static weighting puts ½ for w in the regulariser alone: ∂L/∂r(chosen, t) = −¼ − ½ · ½ · r̂_t = −¼ ∓ 1/16.
    """
    ln3 = math.log(3)
    hats = double([0.25, -0.25]), double([-0.5, 0.5])
    for weighting, loss, chosen_gradient, rejected_gradient in (
            ("sequence", math.log(4 / 3) - (0.25 - 0.5 * ln3) / 8, [-9 / 32, -7 / 32], [5 / 16, 3 / 16]),
            ("static", math.log(4 / 3) - (0.25 - 0.5 * ln3) / 4, [-5 / 16, -3 / 16], [3 / 8, 1 / 8])):
        chosen, rejected = double([0.5, 0.5]).requires_grad_(), double([0.25, 0.75 - ln3]).requires_grad_()
        found, margin = treg.treg_loss(chosen, rejected, *hats, 0.5, weighting=weighting)
        close(margin, [ln3], "z = Σ r(chosen) − Σ r(rejected)")
        close(found, [loss], f"L, {weighting} weighting")
        found.sum().backward()
        close(chosen.grad, double(chosen_gradient), f"∂L/∂r(chosen), {weighting} weighting: −w (1 + α r̂); is w detached?")
        close(rejected.grad, double(rejected_gradient), f"∂L/∂r(rejected), {weighting} weighting: +w (1 − α r̂); is w detached?")


def identity(algorithm, alpha, gamma, weighting):
    """-> (∂L/∂log π of both sides by autograd, the same by the identity), rows of 3 and 2 against 2 and 4 tokens."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    logps = [-torch.rand(mask.shape, generator=generator, **DOUBLE) * 3 for mask in masks]
    refs = [-torch.rand(mask.shape, generator=generator, **DOUBLE) * 3 for mask in masks]
    hats = [(torch.rand(mask.shape, generator=generator, **DOUBLE) - 0.5) * mask for mask in masks]
    logps = [row.requires_grad_() for row in logps]
    if algorithm == "dpo":
        rewards = [treg.dpo_rewards(p, q, m, 0.3) for p, q, m in zip(logps, refs, masks)]
        scales = [0.3 * m.double() for m in masks]
    else:
        rewards = [treg.simpo_rewards(p, m, 1.7) for p, m in zip(logps, masks)]
        scales = [1.7 * m.double() / m.sum(-1, keepdim=True) for m in masks]
    loss, margin = treg.treg_loss(*rewards, *hats, alpha, gamma, weighting)
    loss.sum().backward()
    w = torch.sigmoid(-(rewards[0].sum(-1) - rewards[1].sum(-1) - gamma)).detach()[:, None]
    v = w if weighting == "sequence" else 0.5
    expected = [-scales[0] * (w + v * alpha * hats[0]), scales[1] * (w - v * alpha * hats[1])]
    return [row.grad for row in logps], expected


@pytest.mark.parametrize("algorithm, gamma", [("dpo", 0.0), ("simpo", 0.0), ("simpo", 0.8)])
@pytest.mark.parametrize("weighting", ["sequence", "static"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_gradient_identity(algorithm, gamma, weighting, alpha):
    """∂L/∂log π(chosen, t) = −s w (1 + α r̂_t), ∂L/∂log π(rejected, t) = +s w (1 − α r̂_t), s = β or β/|y|.

    From L = −log σ(z) − α w Σ r̂ r: −log σ has the derivative −σ(−z) = −w in z, z has +1 in each r(chosen, t) and −1
    in each r(rejected, t), and with w constant Σ r̂ r has r̂_t in r_t. Static: the w before α is ½.
    """
    for found, expected, side in zip(*identity(algorithm, alpha, gamma, weighting), treg.SIDES):
        close(found, expected, f"gradient of a {side} token, {algorithm}, {weighting} weighting")


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_alpha_zero_is_bitwise_the_base_loss(gamma):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, hat = (torch.randn(5, 6, generator=generator) for _ in range(3))
    for weighting in ("sequence", "static"):
        loss, margin = treg.treg_loss(chosen, rejected, hat, hat, 0.0, gamma, weighting)
        assert torch.equal(loss, -torch.nn.functional.logsigmoid(chosen.sum(-1) - rejected.sum(-1) - gamma))
        assert torch.equal(margin, chosen.sum(-1) - rejected.sum(-1) - gamma)


def test_gamma_lowers_the_margin_and_raises_the_weight():
    """Σ r = 1 and 0, γ = 1 + ln 3: z = −ln 3, −log σ(z) = ln 4, w = ¾; r̂ = 1 on the one chosen token, α = 1: L = ln 4 − ¾."""
    loss, margin = treg.treg_loss(double([1.0]), double([0.0]), double([1.0]), double([0.0]), 1.0, 1 + math.log(3))
    close(margin, [-math.log(3)], "z = … − γ")
    close(loss, [math.log(4) - 0.75], "w = σ(−z), γ included")


def test_token_rewards_are_not_clamped_by_the_loss():
    """z = 0, w = ½, r̂ = 5: L = ln 2 − 1 · ½ · 5 · 2."""
    loss, _ = treg.treg_loss(double([2.0]), double([2.0]), double([5.0]), double([0.0]), 1.0)
    close(loss, [math.log(2) - 5.0], "L with a large r̂")


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="static"):
        treg.treg_loss(*[torch.zeros(1, 1)] * 4, 0.5, weighting="token")


def test_sft_variant_is_likelihood_of_the_chosen_response():
    """r̂ = 1 on chosen, 0 on rejected: ∂L/∂r(chosen) = −w (1 + α), ∂L/∂r(rejected) = +w. z = 0: w = ½, α = ½: −¾ and ½."""
    chosen, rejected = double([0.0]).requires_grad_(), double([0.0]).requires_grad_()
    treg.treg_loss(chosen, rejected, double([1.0]), double([0.0]), 0.5)[0].sum().backward()
    close(chosen.grad, double([-0.75]), "∂L/∂r(chosen)")
    close(rejected.grad, double([0.5]), "∂L/∂r(rejected)")


# ------------------------------------------------------------------------------------------------------- 4 data
SLOTS = {
    "size": "tiny small large huge tall short".split(),
    "colour": "red blue green gold black white pink grey".split(),
    "material": "wooden paper glass stone brass clay woollen iron".split(),
    "object": "lamp clock chair vase basket statue kettle drum mirror box".split(),
    "place": "kitchen garden attic library cellar hall shed tower".split(),
}
SHAPES = [
    "There is a {size} {colour} {material} {object} in the {place}.",
    "In the {place} stands a {size} {material} {object}, painted {colour}.",
    "The {object} in the {place} is {size}, {colour} and {material}.",
    "A {colour} {object}, {size} and {material}, waits in the {place}.",
]


def respond(rng, world):
    """-> (a response in one of the shapes, each slot wrong with probability 0.3; the spans of its wrong words)."""
    text, errors = "", []
    for part in re.split(r"(\{\w+\})", rng.choice(SHAPES)):
        if part.startswith("{"):
            right, start = world[part[1:-1]], len(text)
            part = rng.choice([word for word in SLOTS[part[1:-1]] if word != right]) if rng.random() < 0.3 else right
            errors += [[start, start + len(part)]] * (part != right)
        text += part
    return text, errors


def tiny_data():
    """-> the text of tiny_data.jsonl: 1,500 prompts, each once, with the better of two responses as the chosen one."""
    rng, seen, lines = random.Random(0), set(), []
    for split, count in {"warmup": 900, "train": 300, "validation": 150, "test": 150}.items():
        while count:
            world = {slot: rng.choice(words) for slot, words in SLOTS.items()}
            prompt = "Describe a {size} {colour} {material} {object} in the {place}.".format(**world)
            chosen, rejected = sorted((respond(rng, world), respond(rng, world)), key=lambda said: len(said[1]))
            if prompt in seen or len(chosen[1]) == len(rejected[1]):
                continue
            seen.add(prompt)
            count -= 1
            lines.append(json.dumps({"split": split, "prompt": prompt, "chosen": chosen[0], "rejected": rejected[0],
                                     "chosen_errors": chosen[1], "rejected_errors": rejected[1],
                                     "keywords": list(world.values())}) + "\n")
    return "".join(lines)


def test_tiny_data_is_made_again_bit_for_bit():
    """To write it anew: python -c "import test_treg; open('tiny_data.jsonl', 'w').write(test_treg.tiny_data())"."""
    assert (HERE / "tiny_data.jsonl").read_bytes() == tiny_data().encode()


def test_tiny_data_splits_share_no_prompt_and_chosen_has_fewer_errors():
    splits = {split: treg.load_pairs(HERE / "tiny_data.jsonl", split) for split in ("warmup", "train", "validation", "test")}
    prompts = [pair["prompt"] for pairs in splits.values() for pair in pairs]
    assert len(set(prompts)) == len(prompts) == 1500
    errors = treg.judge(splits["train"])
    for pair in splits["test"]:
        wrong = [errors(pair[side], pair["keywords"]) for side in treg.SIDES]
        assert wrong == [len(pair[f"{side}_errors"]) for side in treg.SIDES] and wrong[0] < wrong[1]
    assert 0.2 < np.mean([bool(pair["chosen_errors"]) for pair in splits["train"]]) < 0.8, "chosen is not always perfect"


def test_judge_counts_wrong_words_and_unknown_shapes():
    pairs = [{"keywords": ["red", "box"], "chosen": "A red box.", "rejected": "The box is red."},
             {"keywords": ["blue", "cup"], "chosen": "A blue cup.", "rejected": "The cup is red."}]
    errors = treg.judge(pairs)
    for text, expected in {"A red box.": 0, " The box is red.\n": 0, "A blue box.": 1, "The cup is blue.": 2,
                           "A box red.": 1, "Red box!": 1, "A red box. A red box.": 1, "": 2}.items():
        assert errors(text, ["red", "box"]) == expected, text


def test_good_tokens_are_those_that_overlap_no_error_span():
    model, tokenizer = small_model()
    text = "A red lamp, tiny and red."
    good = treg.good_tokens(tokenizer, text, [[2, 5], [12, 14]])
    pieces = [tokenizer.decode([i]) for i in treg.response_ids(tokenizer, text, treg.end_token(tokenizer))][:-1]
    assert len(good) == len(pieces)
    end = 0
    for piece, is_good in zip(pieces, good):
        start, end = end + len(piece) - len(piece.lstrip()), end + len(piece)
        assert is_good == (not (start < 5 and 2 < end or start < 14 and 12 < end)), f"{piece!r} at {start}"


# -------------------------------------------------------------------------------------------------- 5 log-probs
def small_model(kind="gpt2", tokenizer=None, **extra):
    """-> (a random model of about 50,000 parameters, large enough in its weights to tell right from wrong; tokenizer)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<|end|>", *letters])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = treg.PLAIN_TEMPLATE
    config = AutoConfig.for_model(kind, **{**dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2), **extra})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def some_rows(count=3, seed=0):
    """-> prompts twice, then two responses a prompt, of uneven lengths, some beginning alike."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(1, 257) for _ in range(n)]
    prompts = [ids(rng.randint(3, 12)) for _ in range(count)]
    chosen = [ids(rng.randint(1, 9)) + [0] for _ in prompts]
    rejected = [c[:2] + ids(rng.randint(1, 9)) + [0] for c in chosen]
    return prompts * 2, chosen + rejected


def one_at_a_time(model, prompts, responses):
    """The naive oracle: for each response token one forward pass over all that stands before it."""
    rows = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses):
            rows.append([model(torch.tensor([prompt + response[:t]])).logits[0, -1].log_softmax(-1)[token].item()
                         for t, token in enumerate(response)])
    return rows


def one_pass(model, prompt, response):
    """The same by one pass over prompt and response, for longer ones."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [logps[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]


KINDS = {"gpt2": {}, "llama": {"num_key_value_heads": 2}, "qwen2": {"num_key_value_heads": 2}, "gpt_neox": {}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_response_logps_against_one_token_at_a_time(kind, shared):
    model, _ = small_model(kind, **KINDS[kind])
    model.shares_prompts = shared
    prompts, responses = some_rows()
    logps, mask = treg.response_logps(model, prompts, responses)
    assert logps.dtype == torch.float32 and logps.shape == mask.shape == (6, max(map(len, responses)))
    for row, real, response, expected in zip(logps, mask, responses, one_at_a_time(model, prompts, responses)):
        assert real.tolist() == [t < len(response) for t in range(len(real))], "the mask covers the response and its end token"
        close(row[:len(response)].double().detach(), expected, "column t is log π of response token t", 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prompts_give_the_gradients_of_separate_rows(kind):
    gradients, positions = [], []
    for shared in (False, True):
        model, _ = small_model(kind, **KINDS[kind])
        model.shares_prompts = shared
        prompts, responses = some_rows()
        before = treg.response_logps.positions
        logps, mask = treg.response_logps(model, prompts, responses)
        positions.append(treg.response_logps.positions - before)
        (logps * mask * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert positions[1] <= positions[0] - sum(map(len, prompts)) // 2, "a prompt shared by two responses is computed once"


def test_log_probs_do_not_depend_on_the_batch():
    model, _ = small_model()
    model.shares_prompts = True
    prompts, responses = some_rows(6)
    together, _ = treg.response_logps(model, prompts, responses)
    for i in range(len(prompts)):
        alone, _ = treg.response_logps(model, prompts[i:i + 1], responses[i:i + 1])
        close(together[i, :len(responses[i])].double().detach(), alone[0].double().detach(), "a row in another batch", 1e-5)


def test_equal_rows_and_rows_that_begin_another_are_told_apart():
    model, _ = small_model()
    prompts, responses = [[5, 6]] * 4, [[7, 8, 0], [7, 8], [7, 8, 0], [7, 9]]
    for model.shares_prompts in (False, True):
        logps, _ = treg.response_logps(model, prompts, responses)
        for row, expected in zip(logps, one_at_a_time(model, prompts, responses)):
            close(row[:len(expected)].double().detach(), expected, "equal beginnings", 1e-5)


def test_prompt_sharing_turns_itself_off_where_attention_is_a_sliding_window():
    prompts, responses = some_rows()
    model, _ = small_model("mistral", num_key_value_heads=2, sliding_window=4)
    assert treg.share_prompts(model, prompts, responses) > 1e-3 and not model.shares_prompts
    logps, _ = treg.response_logps(model, prompts, responses)
    for row, expected in zip(logps, one_at_a_time(model, prompts, responses)):
        close(row[:len(expected)].double().detach(), expected, "separate rows", 1e-5)
    model, _ = small_model("mamba", state_size=4, expand=1)
    treg.share_prompts(model, prompts, responses)
    assert not model.shares_prompts, "a recurrent model has no attention mask"
    model, _ = small_model()
    assert treg.share_prompts(model, prompts, responses) < 1e-4 and model.shares_prompts


def test_logits_exist_only_where_a_response_token_is_predicted():
    model, _ = small_model()
    prompts, responses = some_rows()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2]))
    for model.shares_prompts in (True, False):
        seen.clear()
        treg.response_logps(model, prompts, responses)
        assert sum(seen) == sum(map(len, responses))


# ------------------------------------------------------------------------------ 6 annotate, 7 train, 8 evaluate
def options(*flags, **settings):
    """The settings of a command line, as run() completes them."""
    s = treg.parse(["--model", "unused", *map(str, flags)])
    s.lr = s.lr or 1e-3
    return argparse.Namespace(**{**vars(s), **settings})


def annotated(kind="gpt2", count=7, **settings):
    """-> (model, tokenizer, count pairs with reference log-probs and token rewards)."""
    model, tokenizer = small_model(kind, **KINDS[kind])
    model.shares_prompts = True
    pairs = treg.load_pairs(HERE / "tiny_data.jsonl")[:count]
    return model, tokenizer, treg.annotate(model, tokenizer, pairs, max_length=512, **settings)


def test_annotate_gives_columns_that_other_trainers_can_use():
    model, tokenizer, pairs = annotated()
    end = treg.end_token(tokenizer)
    for pair in pairs:
        for side in treg.SIDES:
            ids = pair[f"{side}_ids"].tolist()
            assert tokenizer.decode(ids[:-1]) == pair[side] and ids[-1] == end and ids.count(end) == 1
            better, worse = treg.contrastive_prompts(treg.as_messages(pair["prompt"]), pair[side], "answer")
            logps = [one_pass(model, treg.prompt_ids(tokenizer, m), ids)
                     for m in (treg.as_messages(pair["prompt"]), better, worse)]
            close(pair[f"{side}_ref_logps"], logps[0], "reference log-probs after the plain prompt", 2e-5)
            close(pair[f"{side}_token_rewards"], 1 / (1 + np.exp(np.subtract(logps[2], logps[1]))) - 0.5,
                  "r̂ = σ(better − worse) − ½, the end token included", 2e-5)
            assert np.abs(pair[f"{side}_token_rewards"]).max() > 1e-3


def test_revision_prompts_show_each_response_its_own_text():
    model, tokenizer, pairs = annotated(style="revise", count=2)
    for pair in pairs:
        for side, other in zip(treg.SIDES, treg.SIDES[::-1]):
            for form in ("better", "worse"):
                text = tokenizer.decode(pair[f"{side}_{form}_ids"])
                assert pair[side] in text and pair[other] not in text, f"{form} prompt of the {side} response"


def test_token_rewards_come_from_the_reward_model_if_there_is_one():
    model, tokenizer, pairs = annotated()
    scorer, _ = small_model("llama", **KINDS["llama"])
    other = treg.annotate(model, tokenizer, pairs, reward_model=scorer)
    for mine, its in zip(pairs, other):
        assert np.allclose(mine["chosen_ref_logps"], its["chosen_ref_logps"], atol=1e-5)
        assert not np.allclose(mine["chosen_token_rewards"], its["chosen_token_rewards"], atol=1e-2)


def test_annotation_does_not_depend_on_the_batch():
    results = [annotated(batch_size=size)[2] for size in (1, 7)]
    for one, seven in zip(*results):
        for name in treg.ANNOTATION:
            close(one[name], seven[name].astype(float), name, 1e-5)


def test_pair_accuracy_and_its_interval_by_hand():
    """Mean r̂ higher, lower, equal: accuracy (1 + 0 + ½) / 3 = ½. Wilson at n = 3, z = 1.96: ½ ± z √(¼/3 + z²/36) / (1 + z²/3)."""
    pairs = [{"chosen_token_rewards": np.array(c), "rejected_token_rewards": np.array(r)}
             for c, r in (([0.1, 0.3], [0.1]), ([0.0], [0.1, 0.2]), ([0.1], [0.1, 0.1]))]
    half = 1.96 * math.sqrt(0.25 / 3 + 1.96**2 / 36) / (1 + 1.96**2 / 3)
    assert treg.pair_accuracy(pairs) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-12)


@pytest.mark.parametrize("algorithm", ["dpo", "simpo"])
def test_losses_pair_each_response_with_its_own_mask_reference_and_reward(algorithm):
    """The batched loss is that of every pair by itself, from the naive log-probs."""
    model, _, pairs = annotated()
    s = options("--algorithm", algorithm, "--alpha", 0.5, "--beta", 0.7)
    for pair in pairs:  # as if trained: else DPO's margin is 0 whatever is paired with what
        for side in treg.SIDES:
            pair[f"{side}_ref_logps"] = pair[f"{side}_ref_logps"] - np.linspace(0, 1, len(pair[f"{side}_ids"]), dtype=np.float32)
    loss, metrics, _ = treg.losses(model, pairs, s)
    for i, pair in enumerate(pairs):
        rewards = []
        for side in treg.SIDES:
            ids = pair[f"{side}_ids"].tolist()
            logps = double(one_pass(model, pair["prompt_ids"].tolist(), ids))
            ones = torch.ones_like(logps)
            rewards.append(treg.dpo_rewards(logps, double(pair[f"{side}_ref_logps"].tolist()), ones, 0.7)
                           if algorithm == "dpo" else treg.simpo_rewards(logps, ones, 0.7))
        hats = [double(pair[f"{side}_token_rewards"].tolist()) for side in treg.SIDES]
        expected, margin = treg.treg_loss(*rewards, *hats, 0.5, s.gamma)
        close(loss[i].item(), expected[0].item(), f"loss of pair {i}", 1e-4)
        close(metrics[i, 1].item(), margin[0].item(), f"margin of pair {i}", 1e-4)
        agreement = sum((r * h).sum().item() for r, h in zip(rewards, hats))
        close(metrics[i, 4].item(), agreement, f"agreement of pair {i}", 1e-4)


def test_accuracy_counts_a_tie_half_and_leaves_gamma_out(monkeypatch):
    """z = Σr(chosen) − Σr(rejected) − γ = −½, −1, −1½ at γ = 1: the chosen reward is higher, the same, lower."""
    model, _, pairs = annotated(count=3)
    monkeypatch.setattr(treg, "treg_loss", lambda *_: (torch.zeros(3), torch.tensor([-0.5, -1.0, -1.5])))
    metrics = treg.losses(model, pairs, options("--algorithm", "simpo", "--gamma", 1.0))[1]
    assert metrics[:, treg.METRICS.index("accuracy")].tolist() == [1.0, 0.5, 0.0]


def train_here(pairs_and_model=None, out=None, **settings):
    model, _, pairs = pairs_and_model or annotated()
    if out:
        out.mkdir(exist_ok=True)
    treg.train(model, pairs, options(**settings), out)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_first_step_of_dpo_has_margin_zero_loss_ln_two_and_weight_half(tmp_path):
    train_here(out=tmp_path, alpha=0.5, batch_size=4)
    first = read_metrics(tmp_path)[0]
    assert first["step"] == 1 and abs(first["loss"] - math.log(2)) < 1e-5, "is the reference the untrained policy?"
    assert abs(first["margin"]) < 1e-5 and abs(first["weight"] - 0.5) < 1e-5 and abs(first["agreement"]) < 1e-5


@pytest.mark.parametrize("algorithm", ["dpo", "simpo"])
def test_accumulation_takes_the_step_of_one_large_batch_last_partial_batch_included(tmp_path, algorithm, monkeypatch):
    """7 pairs, 4 a step, so that the second step has 3: batches of 4, 2 and 1 give the same metrics and weights."""
    # plain gradient descent: Adam would hide a wrong scale
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    runs = {}
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        out = tmp_path / f"{batch}x{accumulate}"
        runs[out] = train_here(out=out, algorithm=algorithm, alpha=0.5, batch_size=batch, accumulate=accumulate)
    first, *others = runs
    assert len(read_metrics(first)) == 2, "two steps: the last three pairs are not lost"
    for out in others:
        for a, b in zip(read_metrics(first), read_metrics(out)):
            a["accuracy"] = b["accuracy"] = 0  # in DPO's first step a tie up to rounding
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6), f"{out.name} took another step than {first.name}"
        assert (runs[out] - runs[first]).abs().max() < 1e-6


def test_a_step_is_the_mean_over_pairs_of_the_gradient(tmp_path):
    """The logged loss and gradient norm of a step of three pairs against the mean of the three losses, by autograd."""
    model, tokenizer, pairs = annotated(count=3)
    s = options(alpha=0.5, batch_size=1, accumulate=3, beta=0.7)
    loss = torch.cat([treg.losses(model, [pair], s)[0] for pair in pairs]).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    train_here((annotated(count=3)), out=tmp_path, alpha=0.5, batch_size=1, accumulate=3, beta=0.7)
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert read_metrics(tmp_path)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_training_raises_the_margin_and_every_pair_is_seen_once_an_epoch(tmp_path, monkeypatch):
    seen, losses = [], treg.losses
    monkeypatch.setattr(treg, "losses", lambda model, pack, s: seen.extend(p["where"] for p in pack) or losses(model, pack, s))
    train_here(out=tmp_path, epochs=3, batch_size=2)
    epochs = [seen[i:i + 7] for i in range(0, 21, 7)]
    assert len(seen) == 21 and all(len(set(epoch)) == 7 for epoch in epochs) and epochs[0] != epochs[1]
    assert read_metrics(tmp_path)[-1]["margin"] > 0.01


def test_schedule_warms_up_then_falls_to_zero():
    """20 steps: 2 of warm-up at ½ and 1, then ½ + ½ cos(π k / 18)."""
    shares = [treg.schedule(step, 20) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[11] == pytest.approx(0.5) and 0 < shares[-1] < 0.01
    assert treg.schedule(0, 1) == 1.0


def test_cost_grows_with_tokens_and_not_with_the_longest_row():
    """Eight pairs, one response doubled: the tokens computed grow by that response and by no padding."""
    model, _, pairs = annotated(count=8)
    counts = []
    for _ in range(2):
        before = treg.response_logps.positions
        treg.losses(model, pairs, options())
        counts.append(treg.response_logps.positions - before)
        for name in ("ids", "ref_logps", "token_rewards"):
            pairs[0][f"chosen_{name}"] = np.tile(pairs[0][f"chosen_{name}"], 2)
    assert counts[1] - counts[0] == len(pairs[0]["chosen_ids"]) // 4 and counts[1] < 1.3 * counts[0]


def test_credit_auroc_by_hand():
    """Good 3, 1, 2 against bad 1, 2: 3 beats both (2), 1 ties one (½), 2 beats one and ties one (1½): 4 of 6."""
    assert treg.credit_auroc([3, 1, 1, 2, 2], [1, 1, 0, 0, 1]) == pytest.approx(4 / 6)
    assert treg.credit_auroc([1, 2], [True, False]) == 0 and treg.credit_auroc([2, 1], [True, False]) == 1
    assert math.isnan(treg.credit_auroc([1, 2], [True, True])) and math.isnan(treg.credit_auroc([], []))


def test_auroc_leaves_the_end_token_out_and_averages_within_responses():
    """Responses of 2 and 3 tokens and the end token: within, AUROC 1 and ½; pooled, good (2, 9) against bad (1, 8, 10): 3 of 6."""
    pair = {"chosen_credit": np.array([2.0, 1.0, -99.0]), "chosen_good": [True, False],
            "rejected_credit": np.array([8.0, 9.0, 10.0, 99.0]), "rejected_good": [False, True, False]}
    assert treg.auroc([pair], "credit") == (0.75, 0.5)


def test_samples_follow_the_models_own_distribution_and_end_at_the_end_token():
    """A model of constant logits answers token 70 with probability ¾ and the end token with ¼: the mean length is 3."""
    model, tokenizer, pairs = annotated(count=1)
    bias = torch.full((257,), -1e4)
    bias[70], bias[0] = math.log(0.75), math.log(0.25)
    model.lm_head.forward = lambda hidden: bias.expand(*hidden.shape[:-1], -1)
    texts = treg.sample(model, tokenizer, pairs * 500, seed=0, most=40)
    assert set("".join(texts)) == {tokenizer.decode([70])} and np.mean([len(t) for t in texts]) == pytest.approx(3, abs=0.5)


def test_variants_write_their_token_rewards_and_leave_the_model_as_it_was():
    model, _, pairs = annotated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    treg.variant_rewards(model, pairs, pairs, options("--token-rewards", "sft"))
    assert all((p["chosen_token_rewards"] == 1).all() and (p["rejected_token_rewards"] == 0).all() for p in pairs)
    treg.variant_rewards(model, pairs, pairs, options("--token-rewards", "dpo", "--epochs", 4, "--batch-size", 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.mean([p["chosen_token_rewards"].sum() - p["rejected_token_rewards"].sum() for p in pairs]) > 0.01
    assert max(np.abs(p[f"{side}_token_rewards"]).max() for p in pairs for side in treg.SIDES) <= 0.5
