# SPDX-License-Identifier: MIT
"""Tests of treg.py: python -m pytest -q test_treg.py

The heart is derivations done by hand, in the docstring, and asserted to 1e-10 in float64 against autograd.
"""
import argparse
import copy
import functools
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import treg  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other on a busy machine make small tensors very slow
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


def test_log_softmax_is_float32_even_where_logits_are_bfloat16():
    model, _ = small_model()
    model.bfloat16()
    prompts, responses = some_rows(1)
    logps, _ = treg.response_logps(model, prompts, responses)
    assert logps.dtype == torch.float32
    for row, prompt, response in zip(logps, prompts, responses):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
        expected = [expected[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
        close(row[:len(response)].double().detach(), expected, "log-softmax in float32", 1e-5)


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


def test_annotate_gives_a_tokenizer_without_a_template_the_plain_layout():
    model, tokenizer = small_model()
    tokenizer.chat_template = None
    pair = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "where": "here:1"}
    pair = treg.annotate(model, tokenizer, [pair])[0]
    assert tokenizer.decode(pair["prompt_ids"]) == "User:\nIs it?\n\nAssistant:\n"


def test_hub_data_sets_keep_their_splits(monkeypatch):
    import datasets
    rows = {split: [{"prompt": "p", "chosen": f"{split} {i}", "rejected": "r"} for i in range(3)] for split in ("train", "test")}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[split])
    for split in rows:
        pairs = treg.load_pairs("someone/pairs", split)
        assert [pair["chosen"] for pair in pairs] == [f"{split} {i}" for i in range(3)]
        assert pairs[2]["where"] == f"someone/pairs:{split} row 3"
    assert treg.load_pairs("someone/pairs", "validation") == []


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
    pair = {"chosen_credit": np.array([2.0, 1.0, 50.0]), "chosen_good": [True, False],
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


# ---------------------------------------------------------------------------------------- 9 the tiny model, README
def run_main(capsys, *flags):
    """-> (what treg.main printed, the folder's summary)."""
    out = next(str(b) for a, b in zip(flags, flags[1:]) if a == "--out")
    assert treg.main([str(flag) for flag in flags]) == 0, capsys.readouterr().err
    return capsys.readouterr().out, json.loads((Path(out) / "summary.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_run_raises_the_share_of_perfect_responses_by_twenty_points(tmp_path, capsys, seed):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    printed, summary = run_main(capsys, "--seed", seed, "--out", tmp_path / "run")
    before, after = summary["before"], summary["after"]
    assert after["perfect_responses"] >= before["perfect_responses"] + 0.20, printed
    assert after["accuracy"] > 0.9 and after["credit_auroc"] > 0.9 and after["token_reward_auroc"] > 0.9, printed
    assert before["accuracy"] is None and before["credit_auroc"] is None, "constants by construction are no measurement"
    assert re.search(r"perfect responses +0\.\d{3} +0\.\d{3}", printed) and printed.count("\nbefore  ") == 3
    assert "[+" in printed and "[-" in printed and "\033" not in printed, "marks, not colours, where there is no terminal"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    talk = [{"role": "user", "content": "Describe a tiny gold paper lamp in the kitchen."}]
    ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))["input_ids"]])
    assert "lamp" in tokenizer.decode(model.generate(ids, max_new_tokens=20, pad_token_id=0)[0, ids.shape[1]:])


def test_warm_up_sees_the_warmup_split_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(treg, "WARM_STEPS", 0)
    encode = treg.encode
    monkeypatch.setattr(treg, "encode", lambda t, pairs, *rest: seen.extend(p["where"] for p in pairs) or encode(t, pairs, *rest))
    s = treg.parse([])
    treg.load_models(s, torch.device("cpu"))
    lines = (HERE / "tiny_data.jsonl").read_text().splitlines()
    assert seen and all(json.loads(lines[int(where.rpartition(":")[2]) - 1])["split"] == "warmup" for where in set(seen))


def test_colours_only_in_a_terminal_and_without_no_color(monkeypatch, capsys):
    model, tokenizer, pairs = annotated(count=1)
    for terminal, no_color, expected in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
        treg.show({}, {}, [], pairs[0], tokenizer)
        assert ("\033[" in capsys.readouterr().out) == expected


def test_method_stands_alone_with_torch():
    """Sections 2 and 3, pasted into a file that imports torch and nothing else, are the loss."""
    source = (HERE / "treg.py").read_text()
    start, end = (source.index(f" {title}\n") for title in ("2 token rewards", "4 data"))
    pasted = source[start + len(" 2 token rewards\n"):source.rindex("\n", 0, end)]
    space = {}
    exec("import torch\nimport torch.nn.functional as F\n" + pasted, space)
    assert {"token_rewards", "dpo_rewards", "simpo_rewards", "treg_loss"} <= set(space)
    loss, margin = space["treg_loss"](*[torch.zeros(1, 2)] * 4, 0.5)
    assert loss.item() == pytest.approx(math.log(2)) and margin.item() == 0


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_readme_snippet_runs_as_it_stands():
    for block in readme_blocks("python"):
        if "treg_loss" in block:
            space = {}
            exec(block, space)
            assert space["loss"].shape == (2,) and space["policy_logps"].grad.isfinite().all()
            return
    pytest.fail("the README shows the loss in use")


def test_readme_commands_use_flags_that_exist():
    known = set(re.findall(r"--[a-z][a-z-]+", treg_help()))
    commands = [line for block in readme_blocks("bash") for line in block.splitlines() if "treg.py" in line]
    assert commands
    for line in commands:
        assert set(re.findall(r"--[a-z][a-z-]+", line)) <= known, line


def treg_help():
    return subprocess.run([sys.executable, HERE / "treg.py", "--help"], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------------ input: helpers
GOOD = [{"prompt": f"Is {n} a café?", "chosen": f"{n} is — “not”, \\ 🙂.", "rejected": f"No,\n\"{n}\"."} for n in (1, 2, 3, 4)]
U, A, S = ((lambda text, role=role: {"role": role, "content": text}) for role in ("user", "assistant", "system"))
TALK = {"chosen": [U("Is it?"), A("Yes.")], "rejected": [U("Is it?"), A("No.")]}
TINY = {"prompt": "Is it?", "chosen": "Yes. Yes.", "rejected": "No."}


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode("utf-8", "replace")


def csv_file(*lines, header="prompt,chosen,rejected"):
    return "\n".join([header, *lines, ""]).encode()


def csv_line(row):
    return ",".join('"' + row[name].replace('"', '""') + '"' for name in GOOD[0])


def put(path, content):
    """Make a file of bytes or text, or a folder of such a dict, at path. -> path"""
    if isinstance(content, dict):
        path.mkdir()
        for name, inner in content.items():
            put(path / name, inner)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(pairs):
    return [{name: value for name, value in pair.items() if name != "where"} for pair in pairs]


def read_back(path, content):
    return texts(treg.load_pairs(put(path, content)))


def command(*argv):
    """-> the exit status; a traceback fails the test by itself."""
    try:
        return treg.main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse
        return stop.code


def error_of(capsys, *argv):
    """The command must end in status 2 and its last line on stderr be an error. -> what that line says"""
    status, err = command(*argv), capsys.readouterr().err
    assert status == 2, f"{argv}: a mistake passed, with status {status}\n{err}"
    last = (err.strip().splitlines() or ["(nothing)"])[-1]
    assert last.startswith("treg.py: error: "), f"{argv}: the last line on stderr is {last!r}"
    return last.removeprefix("treg.py: error: ")


def tiny_model(folder, words="Is it? Yes. No. a", embeddings=None, positions=64, eos_token="<end>", chat_template=None):
    """A GPT-2 of a few thousand weights with a tokenizer of whole words. -> folder"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    vocab = {word: i for i, word in enumerate(["<end>", "<unk>", *words.split()])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos_token, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=positions, vocab_size=embeddings or len(vocab),
                               bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


# ------------------------------------------- input: mistakes that need no model. id: (files, arguments, how the error begins)
def in_file(name, content, says):
    return {name: content}, ["--model", "m", "--data", name], re.escape(name) + says


ROWS4, CSV4 = jsonl(*GOOD), csv_file(*["p,yes,no"] * 3)
MISTAKES = {
    "file: missing": ({}, ["--data", "p.jsonl"], r"p\.jsonl: no such file"),
    "file: a folder": in_file("p.jsonl", {}, ": is a folder"),
    "file: unknown ending": in_file("p.txt", ROWS4, r": unknown ending.*\.jsonl"),
    "file: no ending": in_file("pairs", ROWS4, ": unknown ending"),
    "file: empty": in_file("p.jsonl", b"", ": holds no rows"),
    "file: blank lines only": in_file("p.jsonl", b"\n  \r\n\t\n", ": holds no rows"),
    "file: UTF-16": in_file("p.jsonl", ROWS4.decode().encode("utf-16"), ":1: not UTF-8"),
    "file: a line not UTF-8": in_file("p.jsonl", ROWS4 + b'{"prompt": "caf\xe9"}', ":5: not UTF-8"),
    "file: last line truncated": in_file("p.jsonl", ROWS4 + ROWS4[:30], ":5: not valid JSON"),
    "file: invalid in the middle": in_file("p.jsonl", b'\n{"prompt": "p" "chosen": "c"}\n' + ROWS4, ":2: not valid JSON"),
    "file: two rows in a line": in_file("p.jsonl", ROWS4 * 2 + ROWS4.replace(b"\n", b" "), ":9: not valid JSON"),
    "file: nested too deep": in_file("p.jsonl", ROWS4 + b"[" * 100_000, ":5: not valid JSON"),
    "file: a number of 9999 digits": in_file("p.jsonl", ROWS4 + b"9" * 9999, ":5: not valid JSON"),
    **{f"file: a row that is {row}": in_file("p.jsonl", ROWS4 + row.encode(), ":5: a row is an object")
       for row in ("[1]", "7", "null", '"x"')},
    "json: empty": in_file("p.json", b"", ": (not valid JSON|holds no rows)"),
    "json: no rows": in_file("p.json", b"[]", ": holds no rows"),
    "json: an object": in_file("p.json", jsonl(GOOD[0]), ": must hold one list"),
    "json: a row a line": in_file("p.json", ROWS4, ": .*line 2"),
    "json: invalid in the middle": in_file("p.json", b'[{"a": 1},\n{"a" 2}\n]', ": not valid JSON.*line 2"),
    "json: not UTF-8": in_file("p.json", b'["\xff"]', ": not UTF-8"),
    "json: a row that is a number": in_file("p.json", json.dumps([*GOOD, 7]), ":row 5: a row is an object"),
    "csv: empty": in_file("p.csv", b"", ": holds no rows"),
    "csv: a header only": in_file("p.csv", csv_file(), ": holds no rows"),
    "csv: other columns": in_file("p.csv", csv_file("a,b,c", header="question_id,good,bad"), ".*chosen.*missing"),
    "csv: too many cells": in_file("p.csv", CSV4 + b"p,yes, that is it,no", ":5: more cells than columns"),
    "csv: too few cells": in_file("p.csv", CSV4 + b"p,yes", ":5: rejected.*missing"),
    "csv: a blank cell": in_file("p.csv", CSV4 + b"p, ,no", ":5: chosen is blank"),
    "csv: a quote left open": in_file("p.csv", CSV4 + b'p,"yes,no\np,yes,no', r".*(:5|row 3)\b"),
    "csv: text after a quote": in_file("p.csv", CSV4 + b'p,"yes"sir,no', r".*(:5|row 3)\b"),
    "csv: a line not UTF-8": in_file("p.csv", CSV4 + b"p,caf\xe9,no", ":5: .*UTF-8"),
    "gz: empty": in_file("p.jsonl.gz", gzip.compress(b""), ": holds no rows"),
    "gz: not gzipped": in_file("p.jsonl.gz", ROWS4, ": damaged"),
    "gz: truncated": in_file("p.jsonl.gz", gzip.compress(ROWS4)[:-20], ": damaged"),
    "gz: wrong checksum": in_file("p.csv.gz", gzip.compress(CSV4)[:-8] + b"12345678", ": damaged"),
    "parquet: none": in_file("p.parquet", ROWS4, ": damaged"),
    "parquet: empty": in_file("p.parquet", b"", ": damaged"),
    "data: no warmup split for the tiny model": ({"p.jsonl": ROWS4}, ["--data", "p.jsonl"], r".*p\.jsonl: has no warmup split"),
    "data: all held out": ({"p.jsonl": ROWS4}, ["--data", "p.jsonl", "--holdout", "4", "--model", "m"], r"p\.jsonl: --holdout 4"),
    "data: a test split only": in_file("p.jsonl", jsonl({**TINY, "split": "test"}), ": .*no pair to train on"),
}
ROWS = {  # what is changed in a good row (... takes a key out), what the error must say after the file and line
    **{f"{side} {kind}": ({side: value}, f"{side}.*({says})") for side in treg.SIDES for kind, value, says in (
        ("missing", ..., "missing"), ("null", None, "missing"), ("a number", 4, "text"), ("a boolean", True, "text"),
        ("an object", A("x"), "text"), ("empty", "", "blank"), ("blank", " \n\t", "blank"), ("half a pair", "\ud800", "no character"))},
    **{f"{side}: {kind}": ({**TALK, side: messages}, f"{side}.*({says})") for side in treg.SIDES for kind, messages, says in (
        ("no messages", [], "message"), ("ends on the user", [U("Is it?")], "assistant"), ("a text in the list", ["x"], "role"),
        ("no role", [{"content": "x"}], "role"), ("unknown role", [{"role": "bot", "content": "x"}], "role"),
        ("content null", [A(None)], "missing"), ("content a number", [A(3)], "text"), ("content blank", [A(" ")], "blank"),
        ("content a list", [A([{"type": "text", "text": "x"}])], "text"), ("content half a pair", [A("\udfff")], "no character"))},
    **{f"prompt {kind}": ({"prompt": value}, "prompt") for kind, value in (
        ("missing", ...), ("null", None), ("a number", 0), ("a boolean", False), ("an object", U("x")), ("empty", ""), ("blank", " "),
        ("half a pair", "\udc00"), ("no messages", []), ("ends on the assistant", [U("x"), A("y")]), ("system only", [S("x")]),
        ("unknown role", [{"role": "human", "content": "x"}]), ("content a number", [U(1)]))},
    "prompt a number beside messages": ({**TALK, "prompt": 42}, "prompt"),
    "no prompt but what two answers share": ({"prompt": ..., "chosen": [A("The cat")], "rejected": [A("The dog")]}, "prompt"),
    "text beside messages": ({**TALK, "rejected": "No."}, ".*both"),
    "messages that part early": ({**TALK, "rejected": [U("Is it not?"), A("No.")]}, ".*same up to"),
    "the same text twice, no prompt": ({"prompt": ..., "chosen": "Yes.", "rejected": "Yes."}, ".*shared beginning is blank"),
    "instruction a number": ({"prompt": ..., "instruction": 1}, "instruction"),
    "input a number": ({"prompt": ..., "instruction": "i", "input": 5}, "input"),
    "question null": ({"prompt": ..., "question": None}, "question|prompt"),
    "system a number": ({"prompt": ..., "question": "q", "system": 5}, "system|prompt"),
    "keywords a text": ({"keywords": "a b"}, "keyword"), "a keyword a number": ({"keywords": ["a", 1]}, ".*keyword"),
    **{f"{side}_errors {value}": ({f"{side}_errors": value}, f"{side}_errors") for side in treg.SIDES for value in (
        [[0, 1], [3, 2]], [[2, 2]], [[0, 999]], [[-1, 2]], [[0, 1.0]], [["0", "1"]], [[False, True]], [[0, None]], [[1]],
        [[0, 1, 2]], [0, 1], 0, {"start": 0}, "0-1")},
}
for kind, (change, says) in ROWS.items():
    row = {name: value for name, value in {**GOOD[0], **change}.items() if value is not ...}
    MISTAKES[f"row: {kind}"] = in_file("p.jsonl", ROWS4 + json.dumps(row).encode(), f":5: ({says})")
for kind, content, says in (
        ("a folder", {}, "file"), ("not JSON", "better: {prompt}", "not valid JSON"), ("empty", "", "not valid JSON"),
        ("not UTF-8", b'{"better": "\xff"}', "not UTF-8"), ("a list", '["{prompt}", "{prompt}"]', "object"),
        ("a side missing", '{"better": "{prompt}"}', "worse"), ("a side null", '{"better": "{prompt}", "worse": null}', "worse"),
        ("no {prompt}", '{"better": "{prompt} well", "worse": "badly"}', "worse needs .*prompt"),
        ("a stray {field}", '{"better": "{prompt} {answer}", "worse": "{prompt}"}', "better .*(answer|no other)"),
        ("a third {field}", '{"better": "{prompt}", "worse": "{prompt} {response} {x}"}', "worse .*(x|no other)"),
        ("an empty {}", '{"better": "{prompt} {}", "worse": "{prompt}"}', "better .*no other"),
        ("half a pair", '{"better": "{prompt} \\ud800", "worse": "{prompt}"}', "better .*no character"),
        ("the same text twice", '{"better": "{prompt}!", "worse": "{prompt}!"}', "different")):
    MISTAKES[f"prompts: {kind}"] = {"own.json": content}, ["--prompts", "own.json"], rf"(--prompts )?own\.json: .*({says})"
MISTAKES |= {
    "prompts: missing": ({}, ["--prompts", "own.json"], r"--prompts own\.json: no such file"),
    "out: a file": ({"run": "mine"}, ["--out", "run"], "--out run: .*is a file"),
    "out: below a file": ({"run": "mine"}, ["--out", "run/new"], ".*run.*(is a file|[Nn]ot a (directory|folder))"),
    "out: holds something": ({"run": {"a": "mine"}}, ["--out", "run"], "--out run: is not empty"),
    "out: holds no run to resume": ({"run": {"a": "mine"}}, ["--out", "run", "--resume"], ".*run"),  # perhaps the user's model
    "flags: unknown": ({}, ["--frobnicate"], ".*--frobnicate"),
    "flags: --resume without --out": ({}, ["--resume"], ".*--resume.*--out"),
}
WHOLE = ("--max-pairs", "--max-length", "--epochs", "--steps", "--batch-size", "--accumulate", "--seed", "--save-every")
for flag, value in (
        *((f, v) for f in (*WHOLE, "--holdout", "--alpha", "--beta", "--gamma", "--lr")
          for v in ("-1", "-0.5", "nan", "inf", "-inf", "1e999", "two", "", "1,5")),
        *((f, v) for f in WHOLE for v in ("1.5", "2.0", "1e2")), *((f, "0") for f in (*WHOLE, "--beta", "--lr") if f != "--seed"),
        ("--seed", str(2**31 + 1)), ("--max-length", "7"), ("--holdout", "1.0"), ("--holdout", "1.5"),
        ("--max-pairs", "9" * 400), ("--holdout", "9" * 400),  # no float can hold it
        ("--algorithm", "ppo"), ("--weighting", "none"), ("--token-rewards", "mine"), ("--dtype", "fp16"), ("--prompts", "Answer"),
        *(("--device", device) for device in ("gpu", "cuda:99", "cuda:x", "mps", "meta")),
        *[("--device", "cuda")] * (not torch.cuda.is_available()),
        *((f, "") for f in ("--model", "--reward-model", "--device", "--out", "--prompts"))):  # "" is "$UNSET" in a shell
    MISTAKES[f"flags: {flag}={value[:9]}"] = {}, [f"{flag}={value}"], rf"(argument )?{flag}\b"


@pytest.mark.parametrize("files, argv, says", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_before_a_model_is_loaded(files, argv, says, tmp_path, capsys, monkeypatch):
    def reached(*_):
        raise AssertionError("a model was loaded or made before the mistake was found")
    monkeypatch.setattr(treg, "load_model", reached)
    monkeypatch.setattr(treg, "make_tiny", reached)
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        put(tmp_path / name, content)
    before = sorted(tmp_path.rglob("*"))
    error = error_of(capsys, *argv)
    assert re.match(says, error), f"the error does not begin with {says!r}: {error}"
    assert sorted(tmp_path.rglob("*")) == before, "something was written, or taken away"


@pytest.mark.parametrize("splits, says", [(ConnectionError("off\nline"), "no such file.*off line"),
                                          (["train_prefs"], "only train_prefs")], ids=["no such data set", "no train split"])
def test_data_that_is_no_file_is_asked_of_the_hub(splits, says, capsys, monkeypatch):
    def names(_):
        if isinstance(splits, Exception):
            raise splits
        return splits
    monkeypatch.setattr("datasets.get_dataset_split_names", names)
    assert re.match(f"--data some/data: .*{says}", error_of(capsys, "--model", "m", "--data", "some/data"))


# ------------------------------------------------------------------------------------------------ input: model folders
def lacks_a_layer(folder):
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "mlp" not in name}, path, {"format": "pt"})


MODELS = {  # what is done to a good model folder, what the error must say
    "folder missing": (shutil.rmtree, "no model folder"),
    "folder empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "no model folder"),
    "a file": (lambda folder: [shutil.rmtree(folder), put(folder, "x")], "no model folder"),
    "config damaged": (lambda folder: put(folder / "config.json", "{"), "cannot be loaded"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer"),
    "tokenizer damaged": (lambda folder: put(folder / "tokenizer.json", "{"), "cannot be loaded"),
    "tokenizer larger than embedding": (lambda folder: tiny_model(folder, embeddings=4), "tokenizer has .* tokens"),
    "tokenizer without end token": (lambda folder: tiny_model(folder, eos_token=None), "end token"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "weights damaged": (lambda folder: put(folder / "model.safetensors", "junk"), "cannot be loaded"),
    "weights lack a layer": (lacks_a_layer, "weights|mlp"),
    "chat template damaged": (lambda folder: tiny_model(folder, chat_template="{% for %}"), "template"),
    "chat template refuses": (lambda folder: tiny_model(folder, chat_template="{{ raise_exception('no') }}"), "template"),
}


@pytest.mark.parametrize("spoil, says", MODELS.values(), ids=MODELS)
def test_mistake_in_a_model_folder_is_named(spoil, says, tmp_path, capsys):
    folder, path = tiny_model(tmp_path / "model"), put(tmp_path / "p.jsonl", jsonl(TINY))
    spoil(folder)
    error = error_of(capsys, "--model", folder, "--data", path, "--check-prompts")
    assert re.match(rf"--model {re.escape(str(folder))}: .*({says})", error), f"the error does not say {says!r}: {error}"


def test_reward_model_with_another_tokenizer_or_missing(tmp_path, capsys, monkeypatch):
    other, path = tiny_model(tmp_path / "other", words="quite another set of words"), put(tmp_path / "p.jsonl", jsonl(TINY))
    argv = ["--model", tiny_model(tmp_path / "m"), "--data", path, "--reward-model"]
    assert re.match("--reward-model .*other: .*tokenizer", error_of(capsys, *argv, other))

    def loaded(*_, **__):
        raise AssertionError("the model was loaded before the missing --reward-model was found")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    assert re.match("--reward-model .*none: is no model folder", error_of(capsys, *argv, tmp_path / "none"))


@pytest.mark.parametrize("kind", ["reward model with a shorter context", "config without a longest position", "chat template empty"])
def test_unusual_but_sound_models_are_taken(kind, tmp_path, capsys):
    from transformers import BloomConfig, BloomForCausalLM
    folder = tiny_model(tmp_path / "m", chat_template="" if kind.startswith("chat") else None)
    argv = ["--model", folder, "--data", put(tmp_path / "p.jsonl", jsonl(TINY)), "--check-prompts"]
    if kind.startswith("reward"):  # the prompts must then be cut to the shorter one
        argv += ["--reward-model", tiny_model(tmp_path / "short", positions=24)]
    if kind.startswith("config"):  # ALiBi has no longest position
        BloomForCausalLM(BloomConfig(vocab_size=7, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(folder)
    assert command(*argv) == 0, f"{kind}: {capsys.readouterr().err}"


@pytest.mark.parametrize("chosen, says", [("Yes. " * 90, "longer|fits"), ("No.", "same")], ids=["too long", "all the same"])
def test_no_pair_left_after_tokenisation_says_why(chosen, says, tmp_path, capsys):
    path = put(tmp_path / "p.jsonl", jsonl({**TINY, "chosen": chosen}))
    error = error_of(capsys, "--model", tiny_model(tmp_path / "m"), "--data", path, "--out", tmp_path / "run")
    assert re.search(says, error), f"the error does not say {says!r}: {error}"


def test_check_prompts_does_not_end_well_without_a_measurement(tmp_path, capsys):
    path = put(tmp_path / "p.jsonl", jsonl(TINY))
    status = command("--model", tiny_model(tmp_path / "m"), "--data", path, "--check-prompts", "--alpha", "0")
    assert status == 2 or "pair accuracy" in capsys.readouterr().out, "--check-prompts --alpha 0: status 0, nothing measured"


@pytest.mark.parametrize("name, content", [("checkpoint.pt", b""), ("checkpoint.pt", b"junk"), ("checkpoint.pt", {"other": 1}),
                                           ("settings.json", b""), ("settings.json", b"[]"), ("settings.json", b"\xff")])
def test_resume_names_a_damaged_file_of_the_run(name, content, tmp_path, capsys):
    path, run = put(tmp_path / "p.jsonl", jsonl(TINY)), tmp_path / "run"
    argv = ["--model", tiny_model(tmp_path / "m"), "--data", path, "--prompts", "answer", "--out", run]
    assert command(*argv) == 0
    (run / "summary.json").unlink()
    torch.save(content, run / name) if isinstance(content, dict) else put(run / name, content)
    assert f"run/{name}" in error_of(capsys, *argv, "--resume")


# ------------------------------------------------------------------------------------------- input: what is understood
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it?\n\nAssistant:"
ANSWERS = {"chosen": "Yes.", "rejected": "No."}
FORMATS = {  # a row, the prompt of its pair; the responses must be those of ANSWERS
    "texts": ({"prompt": " Is it?\n", **ANSWERS}, " Is it?\n"),
    "messages": ({"prompt": [S("s"), U("Is it?")], "chosen": [A("Yes.")], "rejected": [A("No.")]}, [S("s"), U("Is it?")]),
    "prompt messages, response texts": ({"prompt": [U("Is it?")], **ANSWERS}, [U("Is it?")]),
    "text prompt that the messages repeat": ({"prompt": "Is it?", **TALK}, [U("Is it?")]),
    "message prompt that the messages repeat": ({"prompt": [U("Is it?")], **TALK}, [U("Is it?")]),
    "message prompt, repeated without its system message": ({"prompt": [S("s"), U("Is it?")], **TALK}, [S("s"), U("Is it?")]),
    "message prompt, repeated after a system message": ({"prompt": [U("Is it?")], **{side: [S("s"), *TALK[side]] for side in TALK}},
                                                        [S("s"), U("Is it?")]),
    "messages, no prompt": ({side: [U("Hi"), A("Hi!"), *TALK[side]] for side in TALK}, [U("Hi"), A("Hi!"), U("Is it?")]),
    "messages with more keys": ({"prompt": [{**U("Is it?"), "id": 7}], **ANSWERS}, [U("Is it?")]),
    "texts, no prompt": ({side: "Is it? " + text for side, text in ANSWERS.items()}, "Is it? "),
    "Anthropic HH": ({side: HH + text + " It" for side, text in ANSWERS.items()}, HH),
    "instruction": ({"instruction": "Add.", "input": "", **ANSWERS}, "Add."),
    "instruction and input": ({"instruction": "Add.", "input": "1, 2", **ANSWERS}, "Add.\n\n1, 2"),
    "question": ({"question": "Is it?", **ANSWERS}, [U("Is it?")]),
    "question and an empty system": ({"question": "Is it?", "system": "", **ANSWERS}, [U("Is it?")]),
    "question and system": ({"question": "Is it?", "system": "s", **ANSWERS}, [S("s"), U("Is it?")]),
}


@pytest.mark.parametrize("row, prompt", FORMATS.values(), ids=FORMATS)
def test_documented_formats_give_exactly_their_texts(row, prompt, tmp_path):
    pair = {"prompt": prompt, **{side: text + " It" * (prompt == HH) for side, text in ANSWERS.items()}}
    for name, content in (("p.jsonl", jsonl(row)), ("p.json", json.dumps([row])), ("p.jsonl.gz", gzip.compress(jsonl(row)))):
        assert read_back(tmp_path / name, content) == [pair], f"{name} changed the pair"


def test_csv_keeps_every_cell_the_text_that_it_is(tmp_path):
    row, path = {"prompt": "null", "chosen": "NA", "rejected": "42"}, tmp_path / "p.csv"
    assert read_back(path, csv_file("null,NA,42", *map(csv_line, GOOD))) == [row, *GOOD], "a cell is not the text in the file"
    assert read_back(path, b"prompt,chosen,rejected\r\nnull,NA,42\r\n") == [row], "CRLF changed a cell"
    indexed = csv_file("0,null,NA,42", header=",prompt,chosen,rejected")  # what pandas writes without index=False
    assert read_back(path, indexed) == [row], "a column without a name was not left out"


@pytest.mark.parametrize("name, content", {"p.jsonl": ROWS4, "p.json": jsonl(GOOD), "p.csv": csv_file(*map(csv_line, GOOD))}.items(),
                         ids=["jsonl", "json", "csv"])
def test_byte_order_mark_crlf_and_blank_lines_change_nothing(name, content, tmp_path):
    crlf = content if name == "p.csv" else content.replace(b"\n", b"\r\n")  # within a csv cell it would be another text
    for kind, changed in (("byte-order mark", b"\xef\xbb\xbf" + content), ("blank lines before", b"\n" + content),
                          ("blank lines after", content + b"\n\n"), ("CRLF", crlf)):
        assert read_back(tmp_path / name, changed) == GOOD, f"{kind}: other pairs"


def test_splits_spans_keywords_and_places(tmp_path):
    more = {"chosen_errors": [[0, 1]], "rejected_errors": [], "keywords": ["café"]}
    splits = ({**more, "split": "warmup"}, {"split": "test"}, {"split": None}, {"split": "train"})
    path = put(tmp_path / "p.jsonl", b"\n" + jsonl(*({**row, **split} for row, split in zip(GOOD, splits))))
    assert texts(treg.load_pairs(path)) == GOOD[2:], "train is the rows that say so or name no split"
    assert treg.load_pairs(path, "test") == [{**GOOD[1], "where": f"{path}:3"}], "where is not the line of the row"
    assert texts(treg.load_pairs(path, "warmup")) == [{**GOOD[0], **more}], "spans or keywords were lost"


def test_parquet_is_read_as_it_is_now_also_gzipped_and_empty(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def parquet(rows, table=pyarrow.Table.from_pylist(GOOD)):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows) if rows else table.slice(0, 0), sink)
        return sink.getvalue().to_pybytes()
    path, spans = tmp_path / "p.parquet", {"chosen_errors": [[0, 3]]}
    assert read_back(tmp_path / "m.parquet", parquet([{**TALK, **spans}] * 3)) == [{"prompt": [U("Is it?")], **ANSWERS, **spans}] * 3
    for rows in (GOOD[:2], GOOD[2:]):
        os.utime(put(path, parquet(rows)), (1, 1))
        assert texts(treg.load_pairs(path)) == rows, "not the rows in the file: those of a cache that goes by path and time?"
    with pytest.raises(treg.UserError, match=r"p\.parquet: holds no rows"):
        read_back(path, parquet([]))
    with pytest.raises(treg.UserError, match=r"p\.parquet: damaged"):
        read_back(path, parquet(GOOD)[:-30])
    assert read_back(tmp_path / "p.parquet.gz", gzip.compress(parquet(GOOD))) == GOOD, "load_pairs promises .gz too"


PIECES = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\\ud83d",
          b"null", b"NaN", b"\xed\xa0\x80"]


def mutate(data, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 40))
        new, skip = rng.choice(((bytes([rng.randrange(256)]), 1), (b"", length), (rng.choice(PIECES), 0), (data[at:at + length], 0),
                                (rng.choice(PIECES), length), (b"", len(data) if rng.random() < 0.1 else 1)))
        data = data[:at] + new + data[at + skip:]
    return data


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz"])
def test_damaged_bytes_give_the_texts_in_the_file_or_a_user_error(name, tmp_path):
    """Thousands of damaged files: no other exception, no row lost, and no text that the file does not hold."""
    rows = [*GOOD[:2], TALK, {"instruction": "é", "chosen": "\u2028a", "rejected": "\tb", "chosen_errors": [[0, 2]]}]
    good = {"p.jsonl": jsonl(*rows), "p.json": json.dumps(rows, ensure_ascii=False).encode(),
            "p.csv": csv_file(*map(csv_line, GOOD)), "p.jsonl.gz": gzip.compress(jsonl(*rows), mtime=0)}[name]
    rng, path, refused, whole = random.Random(name), tmp_path / name, 0, read_back(tmp_path / name, good)
    for _ in range(1500):
        data = mutate(good, rng)
        try:
            pairs = read_back(path, data)
        except treg.UserError as error:
            refused += 1
            assert re.fullmatch(re.escape(str(path)) + r"(:(row )?\d+)?: [^\n]+", str(error)), f"{data!r}: {error}"
            continue
        except Exception as error:
            pytest.fail(f"{error!r} instead of a UserError, of {data!r}")
        if name == "p.jsonl.gz":
            assert pairs == whole, f"other texts, past the checksum, of {data!r}"
        elif name != "p.csv":
            lines = [line for line in data.split(b"\n") if line.strip(b"\xef\xbb\xbf \t\r")] if name == "p.jsonl" else [data]
            held = [json.loads(line.decode("utf-8-sig")) for line in lines]
            held = held if name == "p.jsonl" else held[0]
            assert 0 < len(pairs) == len(held), f"{len(held)} rows gave {len(pairs)} pairs, of {data!r}"
            for pair, row in zip(pairs, held):
                for side in treg.SIDES:
                    text = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
                    shared = isinstance(row[side], str) and row.get("prompt") is None and "instruction" not in row
                    assert (pair["prompt"] if shared else "") + pair[side] == text, f"{side} is not the text in {data!r}"
    assert 5 < refused < 1495, f"a blunt test: {refused} of 1500 refused"


@pytest.mark.parametrize("name, header, line", [("p.jsonl", "\n", '{{"prompt": "p{0}", "chosen": "yes {0}", "rejected": "no {0}"}}\n'),
                                                ("p.csv", "prompt,chosen,rejected\n", "p{0},yes {0},no {0}\n")], ids=["jsonl", "csv"])
def test_reading_time_is_in_proportion_to_rows(name, header, line, tmp_path):
    seconds = {5_000: 99, 20_000: 99}
    for count in [*seconds] * 2:
        path = put(tmp_path / name, header + "".join(map(line.format, range(count))))
        start = time.process_time()
        assert len(treg.load_pairs(path)) == count
        seconds[count] = min(seconds[count], time.process_time() - start)
    assert seconds[20_000] < 4 * 1.5 * seconds[5_000] + 0.2, f"not in proportion: {seconds}"


# ------------------------------------------------------------------------- long runs, and bugs that others have had
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA, BARE = "{{ bos_token }}" + CHATML, "{% for m in messages %}{{ m['content'] }}{% endfor %}"
STRICT = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
          "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
          "{% endfor %}" + CHATML)
BASIC = ["--prompts", "answer", "--holdout", "4", "--batch-size", "4", "--lr", "1e-3", "--save-every", "2", "--epochs", "2"]
CPU, STEPS, LOG = torch.device("cpu"), 12, "metrics.jsonl"  # 21 training pairs: 6 steps an epoch, the last of one pair
FOLDERS = tempfile.TemporaryDirectory()


def small_tokenizer(template=None, bos=None, adds_bos=False):
    """A byte-level BPE tokenizer whose padding is its end token; adds_bos: it writes its BOS itself, like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [*treg.PROMPTS["answer"].values(), *treg.PROMPTS["revise"].values(), *["the cat", "The number is"] * 3]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                   chat_template=template)


@functools.cache
def model_folder(kind="gpt2", dtype=torch.float32, template=None, bos=None, adds_bos=False, dropout=0.0):
    """A model of 20 thousand random weights with its tokenizer -> their folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = {"gpt2": dict(n_layer=1, n_embd=32, n_head=2, n_positions=512, initializer_range=0.1,
                          resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout),
             "opt": dict(num_hidden_layers=1, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_attention_heads=2,
                         max_position_embeddings=512, init_std=0.1, dropout=dropout, attention_dropout=dropout, layerdrop=0.0),
             "bloom": dict(n_layer=1, hidden_size=32, n_head=2, initializer_range=0.1)}[kind]
    folder, tokenizer = tempfile.mkdtemp(dir=FOLDERS.name), small_tokenizer(template, bos, adds_bos)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def write_pairs(name, extra=""):
    path = Path(FOLDERS.name, name)
    path.write_text("".join(json.dumps({"prompt": "Say the number " * (1 + i % 3) + str(i), "rejected": f"No {i * 7} for you",
                                        "chosen": f"The number is {i}." * (1 + i % 2) + extra}) + "\n" for i in range(25)))
    return str(path)


def long_run(out, *options):
    return ["--model", model_folder(), "--data", write_pairs("pairs.jsonl"), "--out", str(out), *BASIC, *map(str, options)]


def go(out, *options):
    return treg.main(long_run(out, *options))


def lines(out):
    return (out / LOG).read_text().splitlines() if (out / LOG).exists() else []


def weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder, "model.safetensors"))


@functools.cache
def straight():
    """-> (metrics.jsonl, final weights) of the run that nothing interrupts."""
    assert go(Path(FOLDERS.name, "straight")) == 0
    return Path(FOLDERS.name, "straight", LOG).read_bytes(), weights(Path(FOLDERS.name, "straight"))


def check_same(out, what):
    log, wanted = straight()
    assert (out / LOG).read_bytes() == log, f"{what}: metrics.jsonl differs from the uninterrupted run's"
    found = weights(out)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), \
        f"{what}: final weights differ from the uninterrupted run's"
    assert not list(out.glob("*.tmp")), f"{what}: left a temporary file"


def check_resumed(out, what):
    assert go(out, "--resume") == 0
    check_same(out, f"resumed after {what}")


def refusal(capsys, what, out, *options):
    """The error line of a long_run that must end by exit 2."""
    capsys.readouterr()
    try:
        code = go(out, *options)
    except Exception as error:
        pytest.fail(f"{what}: a traceback and not one line: {error!r:.300}")
    found = re.findall(r"treg\.py: error: (.*)", capsys.readouterr().err)
    assert code == 2 and len(found) == 1, f"{what}: exit {code}, not 2; error lines {found}"
    return found[0]


def kill(monkeypatch, out, where, at, *options):
    """Run and die, uncaught, before or after the at-th optimiser step or writing of a checkpoint."""
    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) < at or "after" in where:
            original(*args, **kwargs)
        if len(calls) == at:
            raise SystemExit("killed")
    owner, name = (treg.torch.optim.AdamW, "step") if "step" in where else (treg.torch, "save")
    original, calls = getattr(owner, name), []
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(owner, name, dying)
        go(out, *options)


def count_calls(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


# ------------------------------------------------------------------------------------------------------ long runs
@pytest.mark.parametrize("where, at, saved", [("before step", 2, 0), ("after step", 4, 2), ("before save", 2, 2),
                                              ("after save", 3, 4)])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(monkeypatch, tmp_path, where, at, saved):
    kill(monkeypatch, tmp_path, where, at)
    with open(tmp_path / LOG, "a") as log:
        log.write('{"step": 99, "lo')  # cut off by the kill
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a save")
    kill(monkeypatch, tmp_path, "before step", 1, "--resume")
    assert lines(tmp_path) == straight()[0].decode().splitlines()[:saved], "lines after the checkpoint must be cut first"
    check_resumed(tmp_path, f"killed {where} {at}, and again")


def test_signals_to_a_real_process(tmp_path):
    """SIGINT, SIGTERM, then SIGKILL, each to a process that went on from the one before; this process finishes the run."""
    slow = (f"import sys, time; sys.path.insert(0, sys.argv.pop(1)); import treg; step = treg.torch.optim.AdamW.step\n"
            f"treg.torch.set_num_threads({torch.get_num_threads()})  # other threads add in another order\n"
            "def slow(*args, **kwargs): time.sleep(0.1); return step(*args, **kwargs)\n"
            "treg.torch.optim.AdamW.step = slow; sys.exit(treg.main(sys.argv[1:]))")
    out, said = tmp_path / "out", tmp_path / "stderr.txt"
    for number, at in ((signal.SIGINT, 2), (signal.SIGTERM, 5), (signal.SIGKILL, 8)):
        with said.open("w") as err:
            arguments = long_run(out, "--save-every", "99", *["--resume"] * out.exists())
            process = subprocess.Popen([sys.executable, "-c", slow, str(Path(treg.__file__).parent), *arguments],
                                       stdout=subprocess.DEVNULL, stderr=err)
        end = time.monotonic() + 60
        while len(lines(out)) < at and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        code, text = process.wait(30), said.read_text()[-500:]
        assert code == (-9 if number == signal.SIGKILL else 130), f"{number.name}: exit {code}: {text}"
        if code == 130:
            assert f"--resume --out {out}" in text, f"{number.name}: must say how to go on: {text}"
            done = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
            assert done == len(lines(out)) < STEPS, f"{number.name}: stopped without having saved its last step"
    check_resumed(out, "SIGINT, SIGTERM and SIGKILL")


def test_interrupt_in_the_dpo_run_that_makes_token_rewards(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    steps = count_calls(monkeypatch, treg.torch.optim.AdamW, "step")
    step = treg.torch.optim.AdamW.step
    monkeypatch.setattr(treg.torch.optim.AdamW, "step", lambda *args, **kwargs: (
        step(*args, **kwargs), len(steps) == 2 and os.kill(os.getpid(), signal.SIGINT))[0])
    code = treg.main([word for word in long_run("--out", "--token-rewards", "dpo") if word != "--out"])
    assert code == 130 and len(steps) < STEPS, f"Ctrl-C was lost in the first DPO run: exit {code} after {len(steps)} steps"
    (out,), err = (tmp_path / "runs").iterdir(), capsys.readouterr().err
    assert "--resume" not in err or f"--resume --out runs/{out.name}" in err, f"names another folder than {out}: {err[-200:]}"


def test_resume_refuses_another_run_and_names_what_differs(monkeypatch, tmp_path, capsys):
    kill(monkeypatch, tmp_path, "before step", 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = write_pairs("other.jsonl", " Yes.")
    for options, words in ((["--lr", "2e-3"], ["lr", "0.001", "0.002"]), (["--alpha", "0.5"], ["alpha", "0.25", "0.5"]),
                           (["--seed", "1"], ["seed"]), (["--data", other], ["data", "other.jsonl"])):
        line = refusal(capsys, f"--resume with {options}", tmp_path, "--resume", *options)
        assert all(word in line for word in words), f"--resume with {options} must name {words}: {line}"
    with monkeypatch.context() as patch:  # the same name, other content
        patch.setattr(treg, "load_pairs", lambda source, split="train", load=treg.load_pairs: [
            {**pair, "chosen": pair["chosen"] + "!"} for pair in load(source, split)])
        assert re.search("data|pairs", refusal(capsys, "--resume with changed data", tmp_path, "--resume"))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}, "a refused --resume changed the folder"
    check_resumed(tmp_path, "refusals")


def test_resume_from_nothing_of_a_finished_run_and_over_a_model(monkeypatch, tmp_path, capsys):
    check_resumed(tmp_path / "new", "nothing: there was no run yet")
    before, steps = {p: p.stat().st_mtime_ns for p in (tmp_path / "new").iterdir()}, count_calls(monkeypatch, treg, "train")
    capsys.readouterr()
    assert go(tmp_path / "new", "--resume") == 0 and not steps and "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "new").iterdir()}, "a finished run was written to"
    assert "--resume" in refusal(capsys, "a second run in the same folder", tmp_path / "new")
    shutil.copytree(model_folder(), tmp_path / "model")
    refusal(capsys, "--resume in a folder that holds the user's own model, no run", tmp_path / "model", "--resume")


def test_annotation_is_reused_and_never_if_stale_or_damaged(monkeypatch, tmp_path):
    first, name = tmp_path / "first", "annotation.safetensors"
    kill(monkeypatch, first, "before step", 4)
    kill(monkeypatch, tmp_path / "stale", "before step", 1, "--prompts", "revise")
    calls, whole = count_calls(monkeypatch, treg, "annotate"), (first / name).read_bytes()
    middle, header = len(whole) // 2, int.from_bytes(whole[:8], "little")
    flipped = {f"byte {i} flipped": whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1:]
               for i in (header // 2, middle, len(whole) - 1)}
    for case, raw in {"whole": whole, "truncated": whole[:middle], "empty": b"", **flipped,
                      "float32 read as int32": whole.replace(b'"F32"', b'"I32"'),
                      "another key": (tmp_path / "stale" / name).read_bytes()}.items():
        out = shutil.copytree(first, tmp_path / case)
        (out / name).write_bytes(raw)
        calls.clear()
        assert go(out, "--resume") == 0
        assert len(calls) == (case != "whole"), f"annotation {case}: annotated {len(calls)} times"
        check_same(out, f"annotation {case}")


def test_non_finite_loss_stops_names_the_pairs_and_keeps_the_checkpoint(monkeypatch, tmp_path, capsys):
    def nan_at_step_5(model, pairs, s):
        loss, *rest = original(model, pairs, s)
        if len(lines(tmp_path)) == 4 and torch.is_grad_enabled():
            batch.extend(pair["where"] for pair in pairs)
            loss = loss * math.nan
        return loss, *rest
    original, batch = treg.losses, []
    with monkeypatch.context() as patch:
        patch.setattr(treg, "losses", nan_at_step_5)
        line = refusal(capsys, "a NaN loss", tmp_path)
    assert "step 5" in line and len(batch) == 4 and all(where in line for where in batch), f"step 5 and {batch} in: {line}"
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())
    check_resumed(tmp_path, "a NaN")


@pytest.mark.parametrize("name, limit", [("annotation.safetensors", 4096), ("checkpoint.pt", 60000), ("checkpoint.pt", None),
                                         ("metrics.jsonl", 2200)])
def test_full_disk_leaves_the_old_checkpoint_whole(monkeypatch, tmp_path, capsys, name, limit):
    """limit: one on file sizes, so that each library's own write fails with its own exception; else torch.save is replaced."""
    def full(state, path):
        Path(path).write_bytes(b"PK half a checkpoint")
        raise OSError(28, "No space left on device")
    kill(monkeypatch, tmp_path, "before step", 4)
    if name == "annotation.safetensors":
        (tmp_path / name).unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or before[0], before[1]))
        if limit is None:
            patch.setattr(treg.torch, "save", full)
        try:
            rarely = ["--save-every", "99"] * (name == "metrics.jsonl")  # else the checkpoint fails first
            line = refusal(capsys, f"no room for {name}", tmp_path, "--resume", *rarely)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert name in line and (limit or "No space left" in line), line
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2, "the old checkpoint must stay whole"
    assert not list(tmp_path.glob("*.tmp")), "a full disk left a .tmp, which keeps it full"
    check_resumed(tmp_path, f"no room for {name}")


@pytest.mark.parametrize("kind", ["OSError", "SafetensorError", "KeyboardInterrupt"])
def test_failure_in_the_final_save_loses_no_training(monkeypatch, tmp_path, capsys, kind):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel
    error = {"OSError": OSError(28, "No space left on device"), "SafetensorError": SafetensorError("I/O error: No space left"),
             "KeyboardInterrupt": KeyboardInterrupt()}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        if kind == "KeyboardInterrupt":
            assert go(tmp_path, "--save-every", "99") == 130
            assert not re.search("not begun|before training", capsys.readouterr().err), "it had trained, but says it had not"
        else:
            assert "No space left" in refusal(capsys, f"{kind} in the final save", tmp_path, "--save-every", "99")
    steps = count_calls(monkeypatch, treg.torch.optim.AdamW, "step")
    check_resumed(tmp_path, "a failed final save")
    assert not steps, f"a failed final save cost {len(steps)} steps: there was no checkpoint after the last step"


def test_another_seed_gives_other_metrics(tmp_path):
    assert go(tmp_path, "--seed", "1") == 0 and (tmp_path / LOG).read_bytes() != straight()[0]


def test_output_folder(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    monkeypatch.chdir(tmp_path)
    assert treg.main([word for word in long_run("--out") if word != "--out"]) == 0
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", out.name)
    names = {"step", "loss", "margin", "accuracy", "weight", "agreement", "chosen_logps", "rejected_logps", "grad_norm", "lr"}
    assert all(json.loads(line).keys() == names for line in lines(out)), "metrics.jsonl: nothing missing, no clock"
    check_same(out, "the same long_run, a second time and in a folder named by the time")
    settings = json.loads((out / "settings.json").read_text())
    assert settings.items() >= {"lr": 1e-3, "alpha": 0.25, "beta": 0.1, "seed": 0, "epochs": 2, "prompts": "answer"}.items()
    assert torch.__version__ in json.dumps(settings), "versions"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights(out).items())
    assert tokenizer.chat_template == treg.PLAIN_TEMPLATE, "the layout that a base model was trained with must be saved"
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(
        f"summary.json holds {word}, which is no JSON: jq and browsers refuse the file"))
    for name in [f"{phase}_{what}" for phase in ("annotate", "train") for what in ("seconds", "cpu_seconds", "tokens")]:
        assert summary[name] > 0, name
    assert summary["peak_memory_bytes"] > 2**20 and summary["steps"] == STEPS and not (out / "checkpoint.pt").exists()


def test_nothing_is_unpickled(monkeypatch, tmp_path, capsys):
    source = Path(treg.__file__).read_text()
    loads = re.findall(r"torch\.load\([^\n]*", source)
    assert loads and all("weights_only=True" in load for load in loads), loads
    assert not re.search(r"trust_remote_code\s*=\s*True|import (pickle|dill|joblib)|allow_pickle\s*=\s*True", source)
    kill(monkeypatch, tmp_path, "before step", 4)
    bomb = f"cos\nsystem\n(S'touch {tmp_path}/executed'\ntR.".encode()
    for packed in (False, True):
        (tmp_path / "checkpoint.pt").write_bytes(bomb)
        if packed:  # as torch.save packs it
            with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w") as file:
                [file.writestr(f"archive/{name}", raw) for name, raw in (("data.pkl", bomb), ("version", "3\n"))]
        try:
            assert "checkpoint.pt" in refusal(capsys, "a checkpoint that is none", tmp_path, "--resume")
        finally:
            assert not (tmp_path / "executed").exists(), "resuming executed a long_run hidden in checkpoint.pt"


def test_no_code_of_a_model_folder_runs(monkeypatch, tmp_path, capsys):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise ValueError('evil')\n")
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the library asks at a terminal unless it is told False
    refusal(capsys, "a model folder with code", tmp_path / "out", "--model", tmp_path)
    assert not (tmp_path / "executed").exists(), "code from the model folder ran: trust_remote_code must be False, not unset"


# ------------------------------------------------------------------------------------------------- bugs of others
USER = [{"role": "user", "content": "Say 7"}]


def encode_one(tokenizer, prompt="Say 7", chosen="It is 7.", rejected="No.", max_length=512, style=None):
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "where": "x:1"}
    return treg.encode(tokenizer, [pair], max_length, style)[0][0]


@pytest.mark.parametrize("name, template, adds_bos, wanted", [("chat model", LLAMA, True, 1), ("base model", None, True, 1),
                                                              ("GPT-2", None, False, 0)])
def test_bos_is_written_once(name, template, adds_bos, wanted):
    _, tokenizer = treg.load_model(model_folder(template=template, bos="<s>", adds_bos=adds_bos), "--model", CPU)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == adds_bos
    pair = encode_one(tokenizer, style="answer")
    for key in [key for key in pair if key.endswith("_ids")]:
        ids, count = pair[key].tolist(), 0 if key in ("chosen_ids", "rejected_ids") else wanted
        assert ids.count(tokenizer.bos_token_id) == count, f"{name}: {key} holds BOS {ids.count(tokenizer.bos_token_id)} times"
        assert not count or ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template, end", [(CHATML, "<|im_end|>"), (LLAMA, "<|im_end|>"), (BARE, "<|endoftext|>"),
                                           (treg.PLAIN_TEMPLATE, "<|endoftext|>")])
def test_end_token_is_the_templates_own_and_there_once(template, end):
    tokenizer = small_tokenizer(template, "<s>")
    pair, token = encode_one(tokenizer, chosen="It is 7.", rejected="No." + end), tokenizer.convert_tokens_to_ids(end)
    for ids in (pair["chosen_ids"].tolist(), pair["rejected_ids"].tolist()):
        assert ids[-1] == token and ids.count(token) == 1, f"a response must end with one {end}: {tokenizer.decode(ids)}"


def test_end_token_is_learned_although_it_is_the_padding():
    model, tokenizer = treg.load_model(model_folder(), "--model", CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    responses, prompt = treg.columns([encode_one(tokenizer)], "ids"), treg.prompt_ids(tokenizer, USER)
    logps, mask = treg.response_logps(model, [prompt] * 2, responses)
    assert mask.sum(-1).tolist() == [len(response) for response in responses], "the mask must cover the end token"
    for row, response in zip(logps, responses):
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        wanted = torch.stack([logits[len(prompt) + t - 1, token] for t, token in enumerate(response)])
        assert torch.allclose(row[:len(response)], wanted, atol=1e-5), "log-probs, end token included"


@pytest.mark.parametrize("options", [[], ["--gradient-checkpointing"]])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])  # OPT's layers call dropout as a function of their own training flag
def test_dropout_is_off(tmp_path, kind, options):
    folder = model_folder(kind, dropout=0.5)
    assert go(tmp_path, "--model", folder, *options) == 0
    first = json.loads(lines(tmp_path)[0])
    assert abs(first["loss"] - math.log(2)) < 1e-5 and abs(first["margin"]) < 1e-5, f"{kind} {options}: dropout: {first}"
    model, tokenizer = treg.load_model(folder, "--model", CPU, bool(options))
    pairs, _ = treg.encode(tokenizer, treg.load_pairs(write_pairs("pairs.jsonl")), 512)
    one, two = ([pair["chosen_ref_logps"] for pair in treg.annotate(model, tokenizer, pairs, None)] for _ in range(2))
    assert all(map(np.array_equal, one, two)), "the reference differs from one call to the next"


def test_gradient_checkpointing_changes_neither_metrics_nor_samples(tmp_path):
    assert go(tmp_path, "--gradient-checkpointing") == 0
    for line, wanted in zip(lines(tmp_path), straight()[0].decode().splitlines(), strict=True):
        assert json.loads(line) == pytest.approx(json.loads(wanted), abs=1e-5, rel=1e-5)
    models = [treg.load_model(model_folder(), "--model", CPU, on) for on in (False, True)]
    pairs, _ = treg.encode(models[0][1], treg.load_pairs(write_pairs("pairs.jsonl"))[:4], 512)
    one, two = (treg.sample(model, tokenizer, pairs, seed=0, most=20) for model, tokenizer in models)
    assert one == two, "samples differ: checkpointed layers drop the key-value cache, so they see one token alone"
    for (model, tokenizer), times in zip(models, (1, 2)):
        calls = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        treg.response_logps(model, [pairs[0]["prompt_ids"].tolist()], [pairs[0]["chosen_ids"].tolist()])[0].sum().backward()
        assert len(calls) == times, f"a layer was computed {len(calls)} times, not {times}: activations are not recomputed"


def test_response_ids_do_not_depend_on_the_prompt():
    tokenizer = small_tokenizer(BARE)
    joint, apart = tokenizer("See the")["input_ids"], [tokenizer(part)["input_ids"] for part in ("See th", "e")]
    assert joint != apart[0] + apart[1], "this tokenizer must merge across the boundary, else the test shows nothing"
    pairs = [encode_one(tokenizer, prompt, "e cat", "e dog") for prompt in ("See th", "See ", "See:")]
    wanted = tokenizer("e cat<|endoftext|>")["input_ids"]
    assert all(pair["chosen_ids"].tolist() == wanted for pair in pairs), "the prompt's end changed the response's tokens"
    assert [tokenizer.decode(pair["prompt_ids"]) for pair in pairs] == ["See th", "See ", "See:"]


def test_templates_that_refuse_a_system_role_or_want_alternation():
    tokenizer, system = small_tokenizer(STRICT), {"role": "system", "content": "Be kind."}
    text = tokenizer.decode(encode_one(tokenizer, [system, *USER])["prompt_ids"])
    assert re.fullmatch(r"<\|im_start\|>user\s+Be kind\.\s+Say 7<\|im_end\|>\s+<\|im_start\|>assistant\s+", text), text
    talk = [*USER, {"role": "assistant", "content": "7"}, {"role": "user", "content": "Say 8"}]
    for prompt in (talk, [system, *talk], "\n\nHuman: Say 7\n\nAssistant: 7\n\nHuman: Say 8\n\nAssistant:"):
        assert tokenizer.decode(encode_one(tokenizer, prompt, style="answer")["prompt_ids"]).count("<|im_start|>user") == 2
    with pytest.raises(treg.UserError, match="x:1.*alternate"):
        encode_one(tokenizer, USER * 2)


def test_prompts_are_a_function_of_the_data_though_the_template_writes_the_date():
    tokenizer = small_tokenizer("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML)  # Llama 3.2's writes the day
    one, two = (encode_one(tokenizer)["prompt_ids"].tolist() for _ in range(2))
    assert one == two, "the prompt holds the time of the run: no run can be resumed on the next day"


def test_learning_rate_suits_the_size_and_a_high_one_is_warned_of(monkeypatch, capsys):
    assert [treg.default_lr(size) for size in (8e9, 8e7, 2e5)] == [5e-7, 5e-6, 1e-4]

    def large(*args):
        loaded = load(*args)
        monkeypatch.setattr(torch.nn.Parameter, "numel", lambda parameter: 10**8, raising=False)
        return loaded
    load = treg.load_model
    monkeypatch.setattr(treg, "load_model", large)
    for rate, warned in (("1e-4", True), ("1e-6", False)):
        assert go("unused", "--lr", rate, "--check-prompts") == 0
        assert ("warning: --lr" in capsys.readouterr().out) == warned, f"--lr {rate} for a model of more than 1e8 parameters"


@pytest.mark.parametrize("dtype, options", [(torch.bfloat16, []), (torch.float32, ["--dtype", "bf16"])])
def test_small_updates_are_not_rounded_away(tmp_path, dtype, options):
    folder = model_folder(dtype=dtype)
    assert go(tmp_path, "--model", folder, "--lr", "5e-7", "--steps", "1", *options) == 0
    before, after = weights(folder), weights(tmp_path)
    assert all(value.dtype == torch.float32 for value in after.values()), "saved in less than the precision of the training"
    moved = torch.cat([(after[name] - before[name].float()).abs().flatten() for name in before])
    assert (moved > 0).float().mean() > 0.5 and moved.max() < 1e-6, f"{(moved > 0).float().mean():.1%} of the weights moved"
    model, _ = treg.load_model(str(tmp_path), "--model", CPU)
    assert model.dtype == torch.float32


def test_bf16_starts_at_the_reference_and_its_log_softmax_is_float32(tmp_path):
    assert go(tmp_path, "--dtype", "bf16") == 0
    first = json.loads(lines(tmp_path)[0])
    assert abs(first["margin"]) < 0.01 and abs(first["loss"] - math.log(2)) < 0.01, f"π is not π_ref at step 1: {first}"
    model, tokenizer = treg.load_model(model_folder(), "--model", CPU)
    prompts, responses = [treg.prompt_ids(tokenizer, USER)] * 2, treg.columns([encode_one(tokenizer)], "ids")
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = treg.response_logps(model, prompts, responses)
    assert logps.dtype == torch.float32 and not torch.equal(logps, logps.bfloat16().float()), "log-softmax rounded to bfloat16"


@pytest.mark.parametrize("style, before, after", [("answer", "", "\n\nGive an answer"),
                                                  ("revise", "Instruction: ", "\n\nResponse: ")])
def test_shortening_cuts_only_the_left_of_the_users_text(style, before, after):
    tokenizer, text, kept = small_tokenizer(LLAMA, "<s>", True), " ".join(f"w{i}" for i in range(300)), set()
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
    pair = encode_one(tokenizer, prompt, max_length=200, style=style)
    for key in [key for key in pair if key.endswith("_ids") and key not in ("chosen_ids", "rejected_ids")]:
        form, plain = tokenizer.decode(pair[key]), key == "prompt_ids"
        head = "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n" + before * (not plain)
        instruction = "" if plain else treg.PROMPTS[style][key.split("_")[1]].rpartition("}")[2]
        assert form.startswith(head) and form.endswith(instruction + "<|im_end|>\n<|im_start|>assistant\n"), f"{key}: {form}"
        kept.add(form[len(head):].partition("<|im_end|>" if plain else after)[0])
        assert len(pair[key]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 200, f"{key} is too long"
    assert len(kept) == 1 and text.endswith(shortened := kept.pop()) and "w299" in shortened, f"not one cut on the left {kept}"


def test_too_long_responses_are_dropped_and_counted():
    texts = [("It is 7.", "No. " * 300), ("Yes. " * 300, "No."), ("It is 7.", "No.")]
    pairs = [{"prompt": "Say 7", "chosen": chosen, "rejected": rejected, "where": "x:1"} for chosen, rejected in texts]
    pairs, report = treg.encode(small_tokenizer(CHATML), pairs, 128)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == texts[2:], "a long response was kept or cut"
    assert re.search(r"\b2 dropped: longer than 128", report), report


def test_saved_model_keeps_its_chat_template_and_odd_generation_settings_do_not_stop_the_save(tmp_path):
    folder = shutil.copytree(model_folder(template=CHATML), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')  # as Llama 2 had
    assert go(tmp_path / "out", "--model", folder, "--steps", "1") == 0
    assert treg.load_model(str(tmp_path / "out"), "--model", CPU)[1].chat_template == CHATML


def test_model_without_a_position_limit(tmp_path):
    assert go(tmp_path, "--model", model_folder("bloom"), "--steps", "1") == 0


def test_missing_weights_are_refused_not_made_up(tmp_path, capsys):
    from safetensors.torch import save_file
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    lacking = weights(folder)
    del lacking["transformer.h.0.mlp.c_fc.weight"]
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    assert "mlp.c_fc.weight" in refusal(capsys, "a model that lacks weights", tmp_path / "out", "--model", folder)
