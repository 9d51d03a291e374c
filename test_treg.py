# SPDX-License-Identifier: MIT
"""Tests of treg.py: python -m pytest -q test_treg.py

The heart is derivations done by hand, in the docstring, and asserted to 1e-10 in float64 against autograd.
TREG=student.py grades another file's functions in the place of treg.py's, -k method only by sections 1 to 3.
"""
import argparse
import contextlib
import copy
import functools
import gzip
import html.parser
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
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
PUBLIC = ("token_rewards", "dpo_rewards", "simpo_rewards", "treg_loss", "contrastive_prompts", "response_logps",
          "annotate", "load_pairs", "credit_auroc")
OURS = {name: getattr(treg, name) for name in PUBLIC}


def graded(path):
    """-> treg with the public functions that a student's file defines in place of its own; or a whole copy, changed."""
    loader = importlib.machinery.SourceFileLoader("student", str(Path(path).resolve()))
    spec = importlib.util.spec_from_loader("student", loader)
    student = sys.modules["student"] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(student)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [f", line {frame.lineno}" for frame in frames if frame.filename == loader.path][-1:]
        raise pytest.Collector.CollectError(f"TREG={path}{''.join(line)}: {type(error).__name__}: {error}")
    names = [name for name in PUBLIC if getattr(student, name, OURS[name]) is not OURS[name]]
    if not names:
        raise pytest.Collector.CollectError(f"TREG={path}: defines none of {', '.join(PUBLIC)}")
    warnings.warn(f"graded: {', '.join(names)} of {path}; all else is treg.py's")  # a misspelt name is not graded
    if {name for name in vars(treg) if not name.startswith("__")} <= vars(student).keys():
        sys.modules["treg"] = student
        return student
    for name in [*names, *{"UserError"} & vars(student).keys()]:
        setattr(treg, name, getattr(student, name))
    if "response_logps" in names:  # treg.py counts the tokens that it computes
        @functools.wraps(student.response_logps)
        def response_logps(model, prompts, responses):
            treg.response_logps.positions += sum(map(len, [*prompts, *responses]))
            return student.response_logps(model, prompts, responses)
        treg.response_logps, response_logps.positions = response_logps, 0
    return treg


if "TREG" in os.environ:
    treg = graded(os.environ["TREG"])
not_graded = pytest.mark.skipif("TREG" in os.environ, reason="how treg.py does it, not what a student's file must do")


def double(*rows):
    return torch.tensor(rows, **DOUBLE)


def close(found, expected, hint, tolerance=1e-10):
    found, expected = torch.as_tensor(found, **DOUBLE), torch.as_tensor(expected, **DOUBLE)
    assert found.shape == expected.shape, f"{hint}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.allclose(found, expected, rtol=0, atol=tolerance), (
        f"{hint}: {found.tolist()}, expected {expected.tolist()}")


# ---------------------------------------------------------------------------------------------------- 1 prompts
def test_contrastive_prompts_keep_the_kind_of_the_prompt():
    for style in treg.PROMPTS:
        better, worse = treg.contrastive_prompts("Name a bird.", "A crow.", style)
        assert better != worse and all("Name a bird." in text for text in (better, worse)), "both show the prompt"
        assert ("A crow." in better) == ("A crow." in worse) == (style == "revise"), "only revise shows the response"
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Name a bird."}]
        before = copy.deepcopy(talk)
        both = treg.contrastive_prompts(talk, "A crow.", style)
        assert talk == before, "the caller's messages must not change: did you write into them?"
        for messages, text in zip(both, (better, worse)):
            assert messages == talk[:3] + [{"role": "user", "content": text}], "only the last user message is rewritten"


def test_contrastive_prompts_ask_for_better_first_and_worse_second():
    for style in treg.PROMPTS:
        better, worse = treg.contrastive_prompts("x", "y", style)
        assert re.search(r"more helpful|is helpful", better) and re.search(r"less helpful|unhelpful", worse), \
            "(better, worse): are the two prompts swapped?"


def test_contrastive_prompts_take_texts_literally():
    style = {"better": "{response}|{prompt}|+", "worse": "{prompt}|-"}
    assert tuple(treg.contrastive_prompts("a {response} {0} \\1 %s", "b {prompt}", style)) == (
        "b {prompt}|a {response} {0} \\1 %s|+", "a {response} {0} \\1 %s|-"), \
        "a prompt that holds {response}, or a brace, is just text: fill both fields in one pass"


# ---------------------------------------------------------------------------------------------- 2 token rewards
def test_token_rewards_values_and_gradient():
    """r̂ = σ(d) − ½ with d = better − worse. d = ln 3: σ = 3/4, r̂ = 1/4. d = −ln 3: r̂ = −1/4. d = 0: r̂ = 0.

    ∂r̂/∂better = σ(d)(1 − σ(d)) = 3/16, 3/16 and 1/4, and ∂r̂/∂worse is its negative.
    """
    ln3 = math.log(3)
    better = double([-1.0, -2.0 - ln3, -3.0]).requires_grad_()
    worse = double([-1.0 - ln3, -2.0, -3.0]).requires_grad_()
    rewards = treg.token_rewards(better, worse, torch.ones(1, 3))
    close(rewards[:, 2:], [[0.0]], "r̂ of a token as likely after both prompts is 0: σ(0) = ½, is ½ subtracted?")
    close(rewards, double([0.25, -0.25, 0.0]), "r̂ = σ(better − worse) − ½: are better and worse swapped?")
    rewards.sum().backward()
    close(better.grad, double([3 / 16, 3 / 16, 1 / 4]), "∂r̂/∂better = σ(1 − σ)")
    close(worse.grad, -better.grad, "∂r̂/∂worse = −∂r̂/∂better")


def test_token_rewards_swapped_prompts_flip_the_sign_and_equal_prompts_give_zero():
    generator = torch.Generator().manual_seed(0)
    better, worse = (torch.randn(4, 7, generator=generator) * 3 for _ in range(2))
    mask = torch.ones(4, 7, dtype=torch.bool)
    rewards = treg.token_rewards(better, worse, mask)
    close(treg.token_rewards(worse, better, mask), -rewards.double(), "swapped prompts flip the sign of r̂", 1e-6)
    assert not treg.token_rewards(better, better, mask).any(), "identical prompts carry no reward: exactly 0"
    better, worse = torch.tensor([[-0.5, -400.0, -400.0]]), torch.tensor([[-400.0, -0.5, -200.0]])
    assert treg.token_rewards(better, worse, mask[:1, :3]).tolist() == [[0.5, -0.5, -0.5]], (
        "r̂ lies in [−½, ½]: exp of a log-prob underflows, take the difference first")


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
        assert torch.equal(value, expected), (
            f"{name}: padding of {padding} changed a value: is the mask used, and not as a factor? NaN × 0 is NaN")
        assert value[1, 1:].tolist() == [0.0, 0.0], f"{name}: must be exactly 0 where mask is 0"
    for gradient, expected in zip(gradients, clean_gradients):
        assert torch.equal(gradient, expected), (
            f"padding of {padding} changed a gradient: mask before σ, since the gradient of a NaN is NaN even times 0")


# ---------------------------------------------------------------------------- 3 implicit rewards and the loss
def test_dpo_rewards_values_and_gradient():
    """r = β (log π − log π_ref) = 0.5 · (−1 + 3, −2 + 1) = (1, −½); ∂r/∂log π = β, ∂r/∂log π_ref = −β."""
    logps, ref = double([-1.0, -2.0]).requires_grad_(), double([-3.0, -1.0]).requires_grad_()
    rewards = treg.dpo_rewards(logps, ref, torch.ones(1, 2), 0.5)
    close(rewards, double([1.0, -0.5]), "r = β (log π − log π_ref): is β there, and the reference subtracted?")
    rewards.sum().backward()
    close(logps.grad, double([0.5, 0.5]), "∂r/∂log π = β")
    close(ref.grad, double([-0.5, -0.5]), "∂r/∂log π_ref = −β")


def test_simpo_rewards_are_divided_by_the_length_of_the_response():
    """r = (β / |y|) log π. β = 2; |y| = 4 gives the factor ½, |y| = 1 the factor 2: a mean, and no padding in it."""
    logps = double([-1.0, -2.0, -3.0, -4.0], [-1.5, 9.0, 9.0, 9.0]).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    rewards = treg.simpo_rewards(logps, mask, 2.0)
    close(rewards[0], [-0.5, -1.0, -1.5, -2.0], "r = (β / |y|) log π: is it divided by the number of tokens?")
    close(rewards[1], [-3.0, 0.0, 0.0, 0.0], "r = (β / |y|) log π: |y| counts the tokens in the mask, not the padding")
    rewards.sum().backward()
    close(logps.grad, double([0.5] * 4, [2.0, 0.0, 0.0, 0.0]), "∂r/∂log π = β / |y|")
    assert treg.simpo_rewards(torch.zeros(1, 2), torch.zeros(1, 2), 2.0).tolist() == [[0.0, 0.0]], \
        "a row of padding alone has no reward: 0 / 0 is NaN, so let |y| be at least 1"


def test_margin_is_a_difference_of_sums_less_gamma():
    """Σ r = 1 + 2 and ½ − ¼ + ¼: z = 3 − ½ = 5/2, and with γ = 1 it is 3/2."""
    sides = double([1.0, 2.0]), double([0.5, -0.25, 0.25]), double([0.0, 0.0]), double([0.0, 0.0, 0.0])
    for gamma, z, hint in ((0.0, 2.5, "z = Σ r(chosen) − Σ r(rejected): chosen less rejected? sums, not means?"),
                           (1.0, 1.5, "z = Σ r(chosen) − Σ r(rejected) − γ: is γ subtracted, and in the result too?")):
        close(treg.treg_loss(*sides, 0.5, gamma)[1], [z], hint)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_alpha_zero_is_bitwise_the_base_loss(gamma):
    """Bitwise in treg.py; code in another style may round otherwise."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, hat = (torch.randn(5, 6, generator=generator) for _ in range(3))
    z = chosen.sum(-1) - rejected.sum(-1) - gamma
    for weighting in ("sequence", "static"):
        found = treg.treg_loss(chosen, rejected, hat, hat, 0.0, gamma, weighting)
        for value, expected in zip(found, (-torch.nn.functional.logsigmoid(z), z)):
            close(value, expected, "α = 0 is −log σ(z) of each pair: is the regulariser times α? no mean?", 1e-5)
            assert treg.treg_loss is not OURS["treg_loss"] or torch.equal(value, expected), "not bitwise the base loss"
    loss, _ = treg.treg_loss(*torch.tensor([[[-200.0]], [[0.0]], [[0.0]], [[0.0]]]), 0.0)
    close(loss, [200.0], "−log σ(−200) is 200, not inf: σ underflows before the log; use logsigmoid or softplus")


def test_regulariser_rewards_agreement_on_both_sides():
    """r = (2, −2) on both sides: z = 0, w = ½. r̂ = (½, 0) on one side, 0 on the other, α = 1: L = ln 2 − ½ · ½ · 2."""
    r, hat, zero = double([2.0, -2.0]), double([0.5, 0.0]), double([0.0, 0.0])
    for side, hats in zip(treg.SIDES, ((hat, zero), (zero, hat))):
        close(treg.treg_loss(r, r, *hats, 1.0)[0] - math.log(2), [-0.5], f"the regulariser of the {side} response is "
              "−α w Σ r̂ r: a sum over tokens, on both sides, with the same sign?")


def test_gamma_lowers_the_margin_and_raises_the_weight():
    """Σ r = 1 and 0, γ = 1 + ln 3: z = −ln 3, −log σ(z) = ln 4, w = ¾; one token, r̂ = 1, α = 1: L = ln 4 − ¾."""
    loss, margin = treg.treg_loss(double([1.0]), double([0.0]), double([1.0]), double([0.0]), 1.0, 1 + math.log(3))
    close(margin, [-math.log(3)], "z = … − γ: is γ subtracted?")
    close(loss, [math.log(4) - 0.75], "w = σ(−z), γ included, weighs most the pair that is not told apart: is it σ(z)?")


def gradient_hint(side, scale="β", weighting="sequence"):
    sign, inner = ("−", "+") if side == "chosen" else ("+", "−")
    if weighting == "static":
        return (f"the gradient of a {side} token should be {sign}{scale}·(w {inner} ½·α·r̂): "
                "static weighting is ½ in the regulariser alone")
    return f"the gradient of a {side} token should be {sign}{scale}·w·(1 {inner} α·r̂): did you detach the weight?"


# the README's example: log-probs (better, worse, π, π_ref) of (chosen, rejected) responses of two tokens
EXAMPLE = double([[.45, .1], [.4, .3]], [[.05, .3], [.1, .7]], [[.4, .8], [.2, .2]], [[.1, .2], [.05, .8]]).log()


def test_treg_loss_by_hand():
    """The README's example: two tokens a side, DPO, β = ½, α = ½; σ(log a − log b) = a / (a + b).

    r̂(chosen) = .45/.50 − ½, .1/.4 − ½ = .4, −.25; r̂(rejected) = .4/.5 − ½, .3/1 − ½ = .3, −.2.
    r = ½ log(π/π_ref): ½ log 4 = ln 2 three times, ½ log ¼ = −ln 2 for the last. z = 2 ln 2 − 0 = ln 4.
    −log σ(z) = ln(5/4); w = σ(−z) = ⅕; Σ r̂ r = (.4 − .25 + .3 + .2) ln 2 = .65 ln 2; L = ln(5/4) − ½ · ⅕ · .65 ln 2.
    ∂L/∂log π = ∓β w = ∓.1 for α = 0. α = ½: −.1 (1 + .2, 1 − .125) and +.1 (1 − .15, 1 + .1).
    Static weighting puts ½ for w in the regulariser alone: −½ (⅕ + ¼ r̂) and +½ (⅕ − ¼ r̂).
    """
    better, worse, policy, ref = EXAMPLE
    mask, ln2, ln54 = torch.ones(2, 2), math.log(2), math.log(5 / 4)
    hat = treg.token_rewards(better, worse, mask)
    close(hat, [[.4, -.25], [.3, -.2]], "r̂ = σ(better − worse) − ½")
    for alpha, weighting, loss, gradient in (
            (0.0, "sequence", ln54, [[-.1, -.1], [.1, .1]]),
            (0.5, "sequence", ln54 - 0.065 * ln2, [[-.12, -.0875], [.085, .11]]),
            (0.5, "static", ln54 - 0.1625 * ln2, [[-.15, -.06875], [.0625, .125]])):
        logps = policy.clone().requires_grad_()
        rewards = treg.dpo_rewards(logps, ref, mask, 0.5)
        close(rewards, [[ln2, ln2], [ln2, -ln2]], "r = β (log π − log π_ref)")
        found, margin = treg.treg_loss(*rewards.chunk(2), *hat.chunk(2), alpha, weighting=weighting)
        close(margin, [2 * ln2], "z = Σ r(chosen) − Σ r(rejected)")
        close(found, [loss], f"L = −log σ(z) − α w Σ r̂ r, {weighting} weighting, α = {alpha}: w is σ(−z), static ½")
        found.sum().backward()
        for row, side in enumerate(treg.SIDES):
            close(logps.grad[row], gradient[row], gradient_hint(side, weighting=weighting))


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
        close(found, expected, gradient_hint(side, "β" if algorithm == "dpo" else "(β/|y|)", weighting))


def test_token_rewards_are_not_clamped_by_the_loss():
    """z = 0, w = ½, r̂ = 5: L = ln 2 − 1 · ½ · 5 · 2."""
    loss, _ = treg.treg_loss(double([2.0]), double([2.0]), double([5.0]), double([0.0]), 1.0)
    close(loss, [math.log(2) - 5.0], "L with a large r̂: the loss takes token rewards as they come")


def test_sft_variant_is_likelihood_of_the_chosen_response():
    """r̂ = 1 on chosen, 0 on rejected: ∂L/∂r(chosen) = −w (1 + α), ∂L/∂r(rejected) = +w. w = α = ½: −¾ and ½."""
    chosen, rejected = double([0.0]).requires_grad_(), double([0.0]).requires_grad_()
    treg.treg_loss(chosen, rejected, double([1.0]), double([0.0]), 0.5)[0].sum().backward()
    close(chosen.grad, double([-0.75]), "∂L/∂r(chosen) = −w (1 + α)")
    close(rejected.grad, double([0.5]), "∂L/∂r(rejected) = +w")


METHOD = [test for name, test in globals().items() if name.startswith("test_")]  # what a student's method must pass
for method_test in METHOD:
    method_test.method = True  # pytest -k finds attributes as it finds names


@not_graded
def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="static"):
        treg.treg_loss(*[torch.zeros(1, 1)] * 4, 0.5, weighting="token")


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


def pairs_of(prompts, responses):
    """The same rows as encoded pairs."""
    half = len(prompts) // 2
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(np.array, row)))
            for row in zip(prompts, responses, responses[half:])]


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


@not_graded
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


@not_graded
def test_prompt_sharing_turns_itself_off_where_attention_is_a_sliding_window():
    prompts, responses = some_rows()
    model, _ = small_model("mistral", num_key_value_heads=2, sliding_window=4)
    assert treg.share_prompts(model, pairs_of(prompts, responses))[0] > 1e-3 and not model.shares_prompts
    logps, _ = treg.response_logps(model, prompts, responses)
    for row, expected in zip(logps, one_at_a_time(model, prompts, responses)):
        close(row[:len(expected)].double().detach(), expected, "separate rows", 1e-5)
    model, _ = small_model("mistral", num_key_value_heads=2, sliding_window=12)  # only the last pair has a row beyond it
    rows = [(range(1, 5), range(1, 9), range(9, 17)), (range(1, 9), range(1, 11), range(9, 10))]
    pairs = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(np.array, row))) for row in rows]
    assert treg.share_prompts(model, pairs[:1])[0] < 1e-3 < treg.share_prompts(model, pairs)[0] and not model.shares_prompts
    model, _ = small_model("mamba", state_size=4, expand=1)
    treg.share_prompts(model, pairs_of(prompts, responses))
    assert not model.shares_prompts, "a recurrent model has no attention mask"
    model, _ = small_model()
    assert treg.share_prompts(model, pairs_of(prompts, responses))[0] < 1e-4 and model.shares_prompts


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


@not_graded
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
    defaults = {"lr": 1e-3, **treg.DEFAULTS[settings.get("algorithm", s.algorithm)]}
    given = {name: value for name, value in vars(s).items() if value is not None}
    return argparse.Namespace(**{**vars(s), **defaults, **given, **settings})


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
    rows = {split: [{"prompt": "p", "chosen": f"{split} {i}", "rejected": "r"} for i in range(3)] for split in ("train", "test")}
    monkeypatch.setattr(treg, "load_dataset", lambda name: rows)
    for split in rows:
        pairs = treg.load_pairs("someone/pairs", split)
        assert [pair["chosen"] for pair in pairs] == [f"{split} {i}" for i in range(3)]
        assert pairs[2]["where"] == "someone/pairs:row 3"
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
        for name in [f"{side}_{name}" for side in treg.SIDES for name in ("ref_logps", "token_rewards")]:
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
    apart = {**pair, "chosen_good": [True, True], "rejected_good": [False] * 3}
    within, pooled = treg.auroc([apart], "credit")
    assert math.isnan(within) and pooled == 0.0, "no response has both kinds: nothing within, yet all tokens can be pooled"
    assert all(map(math.isnan, treg.auroc([], "credit")))


def test_samples_follow_the_models_own_distribution_and_end_at_the_end_token():
    """A model of constant logits answers token 70 with probability ¾ and the end token with ¼: the mean length is 3."""
    model, tokenizer, pairs = annotated(count=1)
    bias = torch.full((257,), -1e4)
    bias[70], bias[0] = math.log(0.75), math.log(0.25)
    model.lm_head.forward = lambda hidden: bias.expand(*hidden.shape[:-1], -1)
    texts = treg.sample(model, tokenizer, pairs * 500, seed=0)
    assert set("".join(texts)) == {tokenizer.decode([70])} and np.mean([len(t) for t in texts]) == pytest.approx(3, abs=0.5)


def test_variants_and_controls_write_their_token_rewards_and_leave_model_and_pairs_as_they_were():
    model, _, pairs = annotated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = copy.deepcopy(pairs)
    names = [f"{side}_token_rewards" for side in treg.SIDES]

    def variant(name, *flags):
        return treg.replace_rewards(model, pairs, len(pairs), options("--token-rewards", name, *flags))
    assert all((p["chosen_token_rewards"] == 1).all() and (p["rejected_token_rewards"] == 0).all() for p in variant("sft"))
    for mine, swapped, shuffled, same in zip(pairs, variant("swapped"), variant("shuffled"), variant("contrastive")):
        for name in names:
            assert np.array_equal(swapped[name], -mine[name]) and np.array_equal(same[name], mine[name])
            assert np.array_equal(np.sort(shuffled[name]), np.sort(mine[name])), "shuffled within each response"
            assert not np.array_equal(shuffled[name], mine[name])
    by_dpo = variant("dpo", "--epochs", 4, "--batch-size", 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.mean([p["chosen_token_rewards"].sum() - p["rejected_token_rewards"].sum() for p in by_dpo]) > 0.01
    assert max(np.abs(p[name]).max() for p in by_dpo for name in names) <= 0.5
    assert all(np.array_equal(p[name], k[name]) for p, k in zip(pairs, kept) for name in names), "the caller's pairs"


# ------------------------------------------------------------------------------------- the comparison, the report
def test_pick_takes_best_and_worst_by_the_judge_and_nothing_of_equals():
    count = lambda text, keywords: len(set(keywords) - set(text.split()))  # noqa: E731
    assert treg.pick(["a", "a b", "c", "b a", "d"], ["a", "b"], count) == ("a b", "d")
    assert treg.pick(["a", "b", "a"], ["a", "b"], count) is None, "equally good"


def test_on_policy_pairs_are_the_models_own_best_and_worst(monkeypatch):
    model, tokenizer = small_model()
    pairs = [{"prompt": f"Say {word}", "keywords": [word], "chosen": word, "rejected": "x", "where": f"f:{i}",
              "chosen_errors": []} for i, word in enumerate(("one", "two"))]
    drawn = ["x", "one", "y", "two", "two", "two"]  # three responses to each prompt, in the order of the prompts
    asked = []
    monkeypatch.setattr(treg, "sample", lambda model, tokenizer, pairs, seed: asked.extend(p["where"] for p in pairs) or drawn)
    s = options("--on-policy", 3)
    s.max_length = 512
    assert treg.on_policy(model, tokenizer, pairs, s, lambda text, keywords: text not in keywords) == [
        {"prompt": "Say one", "keywords": ["one"], "where": "f:0", "chosen": "one", "rejected": "y"}]
    assert asked == ["f:0"] * 3 + ["f:1"] * 3


def test_bootstrap_by_hand():
    """One seed and one prompt: no spread. Two seeds with differences 0 and 1, one prompt: means of two draws are 0, ½, 1
    with probabilities ¼, ½, ¼, so the 95 % interval is (0, 1). The same for two prompts of one seed."""
    assert treg.bootstrap(np.array([[0.25]])) == (0.25, 0.25, 0.25)
    for differences in ([[0.0], [1.0]], [[0.0, 1.0]]):
        assert treg.bootstrap(np.array(differences)) == (0.5, 0.0, 1.0), "seeds and prompts are both drawn"
    drawn = np.random.default_rng(1).normal(1, 1, (1, 400))
    _, low, high = treg.bootstrap(drawn)
    assert (high - low) / (2 * 1.96 * drawn.std() / 20) == pytest.approx(1, abs=0.05), "± 1.96 standard errors"


def test_table_by_hand():
    """Accuracy 0.5, 0.7, 0.6, 0.6 over seeds 0 to 3: mean 0.6, standard error √(0.02 / 3) / √4 = 0.041. By seed the two
    prompts differ from the base by (1, 0), (−1, 0), (1, 1) and (0, 0): 0.25 on average, ahead on seeds 0 and 2."""
    line = lambda row, seed, accuracy, each: {"row": row, "seed": seed, "base": "DPO", "each": each,  # noqa: E731
                                              "accuracy": accuracy, "credit_auroc": None}
    base = [line("DPO", *of) for of in ((0, 0.5, [0, 1]), (1, 0.7, [1, 1]), (2, 0.6, [0, 0]), (3, 0.6, [0, 0]))]
    rows = [line("DPO-REG", seed, 0.75, each) for seed, each in ((1, [0, 1]), (0, [1, 1]), (3, [0, 0]), (2, [1, 1]))]
    head, dpo, reg = treg.table(base + rows).splitlines()  # a row's seeds may come in any order
    assert head.split() == ["accuracy", "accuracy", "−", "base", "(95", "%)", "ahead"], "no columns without figures"
    assert dpo.split() == ["DPO", "0.600", "±", "0.041"]
    assert reg.split()[:5] == ["DPO-REG", "0.750", "±", "0.000", "+0.250"] and reg.endswith(" 2 of 4")
    assert "±" not in treg.table(base[:1]), "one seed has no standard error"


def test_compare_trains_every_row_from_the_reference_and_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    starts, orders, trained = [], [], []

    def spy(model, pairs, s, out=None):
        starts.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        orders.append([pair["where"] for pair in pairs])
        if len(trained) == 4 and not resumed:
            raise SystemExit("killed")
        trained.append((s.algorithm, s.alpha, s.weighting, s.token_rewards, s.seed, s.beta, s.lr))
        return train(model, pairs, s, out)
    train, resumed = treg.train, False
    monkeypatch.setattr(treg, "train", spy)
    flags = ["--compare", "--seeds", "2", "--steps", "2", "--alphas", "2", "--weighting", "static", "--token-rewards", "sft"]
    with pytest.raises(SystemExit, match="killed"):
        go(tmp_path, *flags)
    resumed = True
    with monkeypatch.context() as patch:
        patch.setattr(treg, "load_pairs", lambda source, split="train", load=treg.load_pairs: load(source, split)[1:])
        assert "pairs was" in refusal(capsys, "a comparison on other data", tmp_path, *flags, "--resume")
    assert go(tmp_path, *flags, "--resume") == 0
    assert all(torch.equal(start, starts[0]) for start in starts) and all(order == orders[0] for order in orders)
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    names = [*treg.ROWS, "DPO-REG, alpha 2.0"]
    assert [(row["seed"], row["row"]) for row in rows] == [(seed, name) for seed in (0, 1) for name in names]
    wanted = [("dpo", 0.0, "sequence", "contrastive"), ("dpo", 0.25, "sequence", "contrastive"),
              ("dpo", 0.25, "sequence", "sft"), ("dpo", 0.25, "static", "contrastive"), ("dpo", 0.0, "sequence", "dpo"),
              ("dpo", 0.25, "sequence", "dpo"), ("dpo", 0.25, "sequence", "shuffled"),
              ("dpo", 0.25, "sequence", "swapped"), ("simpo", 0.0, "sequence", "contrastive"),
              ("simpo", 0.25, "sequence", "contrastive"), ("dpo", 2.0, "sequence", "contrastive")]
    assert [row[:4] for row in trained if row[4] == 1] == wanted
    assert {row[0]: row[5] for row in trained} == {name: treg.DEFAULTS[name]["beta"] for name in treg.DEFAULTS}
    assert all(row["accuracy"] is not None and len(row["each"]) == 4 and row["train_seconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names) and "perfect" not in printed, "there is no judge for these data"
    page = (tmp_path / "report.html").read_text()
    assert "learned, DPO-REG" in page and "DPO-SFT" in page


def test_grid_of_the_plain_loss(tmp_path):
    assert go(tmp_path, "--compare", "--seeds", "1", "--steps", "1", "--algorithm", "simpo", "--lrs", "1e-3", "1e-2",
              "--betas", "2", "3") == 0
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [f"SimPO, lr {lr}, beta {b}" for lr in (1e-3, 1e-2) for b in (2.0, 3.0)]
    assert len({row["margin"] for row in rows}) == 4


class Page(html.parser.HTMLParser):
    """Well-formed? Nothing from elsewhere?"""
    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.titles, self.bad = [], "", [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_startendtag(self, tag, attributes):
        assert tag in ("polyline",)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name, value in attributes:
            assert name not in ("src", "href") and "url(" not in (value or "") and not name.startswith("on"), (name, value)
        if tag != "meta":
            self.open.append(tag)
        self.titles += [float(value) for name, value in attributes if name == "title"]
        self.bad += [("class", "bad") in attributes] if tag == "span" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] == ["span"] or "h3" in self.open else ""


def test_report_is_well_formed_self_contained_and_escapes_text_from_the_data(tmp_path):
    model, tokenizer, _ = annotated(count=1)
    evil = "<script>alert('1')</script> & \"\" </td>"
    pair = {"prompt": evil, "chosen": evil, "rejected": "No", "where": "x:1", "chosen_errors": [[0, 8]], "rejected_errors": []}
    pairs = treg.annotate(model, tokenizer, [pair], max_length=512)
    history = [{name: 0.5 for name in treg.METRICS}, {name: 0.25 for name in treg.METRICS}]
    treg.report(tmp_path / "report.html", {evil: history, "b": history[:1], "c": []}, evil, pairs, tokenizer,
                {"r < s": "token_rewards", evil: "ref_logps"})
    raw = (tmp_path / "report.html").read_text()
    page = Page(raw)
    assert "<script" not in raw and "http" not in raw
    assert raw.count(">&lt;</span>") == 6, "each < of the text, a token by itself, in both layers"
    end = tokenizer.decode([treg.end_token(tokenizer)])
    assert page.text == evil + (evil + end) * 2 + ("No" + end) * 2, "every token of both responses, in both layers"
    values = [pairs[0][f"{side}_{name}"].tolist() for side in treg.SIDES for name in ("token_rewards", "ref_logps")]
    close(page.titles, sum(values, []), "values on hover", 6e-4)
    good = pairs[0]["chosen_good"]
    assert page.bad[:len(good) + 1] == [not fine for fine in good] + [False] and 0 < sum(page.bad) < len(good)
    treg.report(tmp_path / "report.html", {}, "", [], None, {})
    Page((tmp_path / "report.html").read_text())


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
    for style in treg.PROMPTS:
        share, low = map(float, re.search(rf"prompts {style}: pair accuracy (\S+) \(95 % interval (\S+) to", printed).groups())
        assert share > 0.75 and low > 0.5, f"the warm-up must make {style} work: {printed}"
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
    encode = treg.encode
    monkeypatch.setattr(treg, "encode", lambda t, pairs, *rest: seen.extend(p["where"] for p in pairs) or encode(t, pairs, *rest))
    s = treg.parse(["--warm-steps", "1"])
    treg.load_models(s)
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


def few_pairs():
    """-> a file with a few lines of each split of tiny_data.jsonl."""
    kept, count = [], {}
    for line in (HERE / "tiny_data.jsonl").read_text().splitlines(keepends=True):
        split = json.loads(line)["split"]
        count[split] = count.get(split, 0) + 1
        kept += [line] * (count[split] <= (40 if split == "warmup" else 5))
    return put(Path(FOLDERS.name, "few.jsonl"), "".join(kept))


def readme_commands():
    """The lines of its bash blocks, and the commands in its text."""
    written = [line for block in readme_blocks("bash") for line in block.splitlines()]
    inline = [" ".join(found.split()) for found in re.findall(r"`(python treg\.py[^`]*)`", (HERE / "README.md").read_text())]
    return [line for line in written + inline if re.match(r"(python treg\.py|printf)\b", line) and "--help" not in line]


@not_graded
@pytest.mark.parametrize("command_line", dict.fromkeys(readme_commands()))
def test_readme_command_runs_at_its_smallest_setting(command_line, tmp_path, monkeypatch, capsys):
    """The command as it stands, but with a random model, few pairs, one step, one seed and little warm-up."""
    monkeypatch.chdir(tmp_path)
    if command_line.startswith("printf"):
        subprocess.run(["bash", "-ec", command_line], check=True)
        return
    argv = shlex.split(command_line.partition("#")[0])[2:]
    for i, (flag, value) in enumerate(zip(argv, argv[1:]), 1):
        if flag in ("--model", "--reward-model"):
            argv[i] = model_folder() if "--model" in argv else tiny_folder()
        elif flag == "--data":
            argv[i] = write_pairs("pairs.jsonl")
        elif flag == "--prompts" and value.endswith(".json"):
            put(tmp_path / value, json.dumps(dict(zip(("better", "worse"), treg.PROMPTS["answer"].values()))))
            for line in readme_commands():
                if line.endswith(f"> {value}"):
                    subprocess.run(["bash", "-ec", line], check=True)
    argv += [] if "--data" in argv else ["--data", few_pairs()]
    argv += ["--holdout", "4", "--steps", "1"] + ["--seeds", "1"] * ("--compare" in argv)
    argv += [] if "--model" in argv else ["--warm-steps", "300" if "--on-policy" in argv else "2"]
    assert treg.main([str(word) for word in argv]) == 0, capsys.readouterr().err


@functools.cache
def tiny_folder():
    """-> the tiny model, hardly warmed up, in a folder."""
    folder = Path(FOLDERS.name, "tiny")
    assert treg.main(["--data", str(few_pairs()), "--warm-steps", "2", "--steps", "1", "--alpha", "0", "--out", str(folder)]) == 0
    return str(folder)


@not_graded
def test_readme_conversation_with_the_trained_model(tmp_path, monkeypatch, capsys):
    [block] = [block for block in readme_blocks("python") if "pipeline" in block]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(), "DIR")
    assert go(tmp_path / "my-run", "--steps", "1") == 0
    capsys.readouterr()
    exec(block, {})
    assert re.match(r"DIR says .*my-run says ", capsys.readouterr().out, re.S)


def test_help_explains_every_option():
    printed = subprocess.run([sys.executable, HERE / "treg.py", "--help"], capture_output=True, text=True, check=True).stdout
    options = re.split(r"\n  (?=--)", printed)[1:]
    assert len(options) > 30
    for option in options:
        assert re.search(r"\s{2,}\S+(\s+\S+){2}", option), f"no help: {option}"


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
    "file: UTF-16": in_file("p.jsonl", ROWS4.decode().encode("utf-16"), ":1: .*not valid jsonl, or not UTF-8"),
    "file: a line not UTF-8": in_file("p.jsonl", ROWS4 + b'{"prompt": "caf\xe9"}', ":5: .*not UTF-8"),
    "file: last line truncated": in_file("p.jsonl", ROWS4 + ROWS4[:30], ":5: .*not valid json"),
    "file: invalid in the middle": in_file("p.jsonl", b'\n{"prompt": "p" "chosen": "c"}\n' + ROWS4, ":2: .*not valid json"),
    "file: two rows in a line": in_file("p.jsonl", ROWS4 * 2 + ROWS4.replace(b"\n", b" "), ":9: .*not valid json"),
    "file: nested too deep": in_file("p.jsonl", ROWS4 + b"[" * 100_000, ":5: .*not valid json"),
    "file: a number of 9999 digits": in_file("p.jsonl", ROWS4 + b"9" * 9999, ":5: .*not valid json"),
    **{f"file: a row that is {row}": in_file("p.jsonl", ROWS4 + row.encode(), ":5: a row is an object")
       for row in ("[1]", "7", "null", '"x"')},
    "json: empty": in_file("p.json", b"", ":.* not valid json"),
    "json: no rows": in_file("p.json", b"[]", ": holds no rows"),
    "json: an object": in_file("p.json", jsonl(GOOD[0]), ": must hold one list"),
    "json: a row a line": in_file("p.json", ROWS4, ":.*line 2"),
    "json: invalid in the middle": in_file("p.json", b'[{"a": 1},\n{"a" 2}\n]', ":.*not valid json.*line 2"),
    "json: not UTF-8": in_file("p.json", b'["\xff"]', ":.*not UTF-8"),
    "json: a row that is a number": in_file("p.json", json.dumps([*GOOD, 7]), ":row 5: a row is an object"),
    "csv: empty": in_file("p.csv", b"", ": holds no rows"),
    "csv: a header only": in_file("p.csv", csv_file(), ": holds no rows"),
    "csv: other columns": in_file("p.csv", csv_file("a,b,c", header="question_id,good,bad"), ".*chosen.*missing"),
    "csv: too many cells": in_file("p.csv", CSV4 + b"p,yes, that is it,no", ":row 4: more cells than columns"),
    "csv: too few cells": in_file("p.csv", CSV4 + b"p,yes", ":row 4: rejected.*missing"),
    "csv: a blank cell": in_file("p.csv", CSV4 + b"p, ,no", ":row 4: chosen is blank"),
    "csv: a quote left open": in_file("p.csv", CSV4 + b'p,"yes,no\np,yes,no', r".*(:5|row 3)\b"),
    "csv: text after a quote": in_file("p.csv", CSV4 + b'p,"yes"sir,no', r".*(:5|row 3)\b"),
    "csv: a line not UTF-8": in_file("p.csv", CSV4 + b"p,caf\xe9,no", ":row 4: .*UTF-8"),
    "gz: empty": in_file("p.jsonl.gz", gzip.compress(b""), ": holds no rows"),
    "gz: not gzipped": in_file("p.jsonl.gz", ROWS4, ":(row )?[0-9]+: here or after it not valid"),
    "gz: truncated": in_file("p.jsonl.gz", gzip.compress(ROWS4)[:-20], ":(row )?[0-9]+: here or after it not valid"),
    "gz: wrong checksum": in_file("p.csv.gz", gzip.compress(CSV4)[:-8] + b"12345678", ":(row )?[0-9]+: here or after it not valid"),
    "parquet: none": in_file("p.parquet", ROWS4, ":(row )?[0-9]+: here or after it not valid"),
    "parquet: empty": in_file("p.parquet", b"", ":(row )?[0-9]+: here or after it not valid"),
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
        ("a folder", {}, "file"), ("not JSON", "better: {prompt}", "must be .*line 1"), ("empty", "", "must be .*line 1"),
        ("not UTF-8", b'{"better": "\xff"}', "must be .*utf-8"), ("a list", '["{prompt}", "{prompt}"]', "must be "),
        ("a side missing", '{"better": "{prompt}"}', "worse"), ("a side null", '{"better": "{prompt}", "worse": null}', "worse"),
        ("no {prompt}", '{"better": "{prompt} well", "worse": "badly"}', "worse needs .*prompt"),
        ("a stray {field}", '{"better": "{prompt} {answer}", "worse": "{prompt}"}', "better .*(answer|no other)"),
        ("a third {field}", '{"better": "{prompt}", "worse": "{prompt} {response} {x}"}', "worse .*(x|no other)"),
        ("an empty {}", '{"better": "{prompt} {}", "worse": "{prompt}"}', "better .*no other"),
        ("half a pair", '{"better": "{prompt} \\ud800", "worse": "{prompt}"}', "better .*no character"),
        ("the same text twice", '{"better": "{prompt}!", "worse": "{prompt}!"}', "different")):
    MISTAKES[f"prompts: {kind}"] = {"own.json": content}, ["--prompts", "own.json"], rf"(--prompts )?own\.json: .*({says})"
MISTAKES |= {
    "prompts: missing": ({}, ["--prompts", "own.json"], r"--prompts own\.json: must be auto, .*No such file"),
    "split: mistyped": ({"p.jsonl": ROWS4}, ["--data", "p.jsonl", "--split", "tset"], "--split tset: .*no such split"),
    "split: the training split": ({}, ["--split", "train"], "argument --split: .*no test"),
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
                                          ({"train_prefs": []}, "only train_prefs")], ids=["no such data set", "no train split"])
def test_data_that_is_no_file_is_asked_of_the_hub(splits, says, capsys, monkeypatch):
    def load(_):
        if isinstance(splits, Exception):
            raise splits
        return splits
    monkeypatch.setattr(treg, "load_dataset", load)
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
    with pytest.raises(treg.UserError, match=r"p\.parquet:row \d+: here or after"):
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
@pytest.mark.parametrize("where, at, saved", [("before step", 2, 0), ("after step", 4, 2), ("before save", 3, 2),
                                              ("after save", 4, 4)])  # the first torch.save is the annotation's
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
            done = len(torch.load(out / "checkpoint.pt", weights_only=True)["history"])
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


def test_annotation_is_reused_and_a_damaged_one_is_named(monkeypatch, tmp_path, capsys):
    kill(monkeypatch, tmp_path / "first", "before step", 4)
    calls, whole = count_calls(monkeypatch, treg, "annotate"), (tmp_path / "first/annotation.pt").read_bytes()
    first = torch.load(tmp_path / "first/annotation.pt", weights_only=True)["chosen_ref_logps"][:9]
    at = whole.index(first.numpy().tobytes()) + 5  # in the middle of a number
    flipped = whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:]
    for case, raw in {"whole": whole, "truncated": whole[:len(whole) // 2], "empty": b"", "a bit flipped": flipped}.items():
        out = shutil.copytree(tmp_path / "first", tmp_path / case)
        (out / "annotation.pt").write_bytes(raw)
        if case == "whole":
            assert go(out, "--resume") == 0 and not calls, "annotated again"
        else:
            assert "annotation.pt" in refusal(capsys, f"an annotation {case}", out, "--resume")
            (out / "annotation.pt").unlink()
            assert go(out, "--resume") == 0
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
    assert len(state["history"]) == 4 and all(value.isfinite().all() for value in state["model"].values())
    check_resumed(tmp_path, "a NaN")


@pytest.mark.parametrize("name, limit", [("annotation.pt", 4096), ("checkpoint.pt", 60000), ("checkpoint.pt", None),
                                         ("metrics.jsonl", 2200)])
def test_full_disk_leaves_the_old_checkpoint_whole(monkeypatch, tmp_path, capsys, name, limit):
    """limit: one on file sizes, so that each library's own write fails with its own exception; else torch.save is replaced."""
    def full(state, path):
        Path(path).write_bytes(b"PK half a checkpoint")
        raise OSError(28, "No space left on device")
    kill(monkeypatch, tmp_path, "before step", 4)
    if name == "annotation.pt":
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
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 2, "the old checkpoint must stay whole"
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
    one, two = (treg.sample(model, tokenizer, pairs, seed=0) for model, tokenizer in models)
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
    for refused in (USER * 2, [system, *USER * 2]):
        with pytest.raises(treg.UserError, match="x:1.*alternate"):
            encode_one(tokenizer, refused)


def test_prompts_are_a_function_of_the_data_though_the_template_writes_the_date():
    tokenizer = small_tokenizer("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML)  # Llama 3.2's writes the day
    one, two = (encode_one(tokenizer)["prompt_ids"].tolist() for _ in range(2))
    assert one == two, "the prompt holds the time of the run: no run can be resumed on the next day"


def test_learning_rate_suits_the_size_and_a_high_one_is_warned_of(monkeypatch, capsys):
    readme = re.search(r"## Learning rate\n(.*?)\n## ", (HERE / "README.md").read_text(), re.S)[1]
    for size, rate, said in ((8e9, 5e-7, "5e-7 for Llama-3-8B"), (134.5e6, 3.9e-6, "3.9e-6 for SmolLM2-135M"),
                             (5e8, 2e-6, "2e-6 at half a billion"), (147_776, 1.2e-4, "would say 1.2e-4")):
        assert treg.default_lr(size) == rate and said in " ".join(readme.split())

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


def test_too_long_pairs_are_dropped_and_counted_and_nothing_is_cut():
    texts = [("Say 7", "It is 7.", "No. " * 300), ("Say 7", "Yes. " * 300, "No."), ("Say 7" * 100, "Yes.", "No."),
             ("Say 7", "It is 7.", "No.")]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), row), where="x:1") for row in texts]
    kept, report = treg.encode(small_tokenizer(CHATML), pairs, 128)
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in kept] == texts[3:]
    assert "3 dropped: longer than 128 tokens" in report
    longest = max(len(kept[0][name]) for name in ("chosen_ids", "rejected_ids")) + len(kept[0]["prompt_ids"])
    with_style = max(len(ids) for name, ids in treg.encode(small_tokenizer(CHATML), pairs[3:], 128, "revise")[0][0].items()
                     if re.fullmatch(r"\w+_(better|worse)_ids", name))
    assert with_style > longest - len(kept[0]["chosen_ids"])
    for limit, style, count in ((longest, None, 1), (longest - 1, None, 0), (longest, "revise", 0)):
        assert len(treg.encode(small_tokenizer(CHATML), pairs[3:], limit, style)[0]) == count, f"{limit} tokens, {style}"


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


# ------------------------------------------------------------------------------ the tests grade; worked example
# Correct code in other styles than treg.py's. WRONG spoils the first by one typical mistake at a time.
STUDENT = """
import torch
import torch.nn.functional as F

def contrastive_prompts(prompt, response, style):
    from treg import PROMPTS
    templates = PROMPTS[style] if isinstance(style, str) else style
    if isinstance(prompt, list):
        last = [i for i, m in enumerate(prompt) if m["role"] == "user"][-1]
        texts = contrastive_prompts(prompt[last]["content"], response, style)
        copies = [[dict(m) for m in prompt] for _ in texts]
        for messages, text in zip(copies, texts):
            messages[last]["content"] = text
        return copies
    parts = {side: templates[side].split("{prompt}") for side in ("better", "worse")}
    return [prompt.join(part.replace("{response}", response) for part in parts[side]) for side in ("better", "worse")]

def token_rewards(better_logps, worse_logps, mask):
    difference = (better_logps - worse_logps).masked_fill(mask == 0, 0)
    return 1 / (1 + torch.exp(-difference)) - 1 / 2

def dpo_rewards(logps, ref_logps, mask, beta):
    return (beta * logps - beta * ref_logps).masked_fill(mask == 0, 0)

def simpo_rewards(logps, mask, beta):
    length = (mask != 0).sum(dim=1).clamp(min=1)
    return beta * logps.masked_fill(mask == 0, 0) / length.unsqueeze(1)

def treg_loss(chosen, rejected, chosen_hat, rejected_hat, alpha, gamma=0.0, weighting="sequence"):
    z = chosen.sum(dim=1) - rejected.sum(dim=1) - gamma
    with torch.no_grad():
        w = torch.sigmoid(-z) if weighting == "sequence" else torch.full_like(z, 0.5)
    regulariser = -torch.einsum("bt,bt->b", chosen_hat, chosen) - torch.einsum("bt,bt->b", rejected_hat, rejected)
    return F.softplus(-z) + alpha * w * regulariser, z
"""
PRODUCTS_AND_LOOPS = """
import math
import torch

def token_rewards(better_logps, worse_logps, mask):
    difference = torch.nan_to_num(better_logps - worse_logps, 0.0, 0.0, 0.0) * mask
    return torch.tanh(difference / 2) / 2

def dpo_rewards(logps, ref_logps, mask, beta):
    return torch.where(mask > 0, beta * (logps - ref_logps), torch.zeros_like(logps))

def simpo_rewards(logps, mask, beta):
    rows = [torch.where(m > 0, row, 0.0) * beta / max(int((m > 0).sum()), 1) for row, m in zip(logps, mask)]
    return torch.stack(rows)

def treg_loss(chosen, rejected, chosen_hat, rejected_hat, alpha, gamma=0.0, weighting="sequence"):
    losses, margins = [], []
    for c, r, c_hat, r_hat in zip(chosen, rejected, chosen_hat, rejected_hat):
        z = sum(c) - sum(r) - gamma
        w = 1 / (1 + math.exp(z.item())) if weighting == "sequence" else 0.5
        loss = torch.logaddexp(torch.zeros_like(z), -z)
        for hats, rewards in ((c_hat, c), (r_hat, r)):
            loss = loss - alpha * w * torch.dot(hats, rewards)
        losses.append(loss)
        margins.append(z)
    return torch.stack(losses), torch.stack(margins)
"""
# A mistake, the function, what it replaces there and by what, the test that must catch it, words of its hint
WRONG = [
    ("worse prompt first", "contrastive_prompts", '("better", "worse")]', '("worse", "better")]',
     "contrastive_prompts_ask_for_better_first_and_worse_second", "are the two prompts swapped"),
    ("writes into the messages", "contrastive_prompts", "[dict(m) for m in prompt]", "[m for m in prompt]",
     "contrastive_prompts_keep_the_kind_of_the_prompt", "did you write into them"),
    ("fields filled one after the other", "contrastive_prompts",
     'prompt.join(part.replace("{response}", response) for part in parts[side])',
     '"{prompt}".join(parts[side]).replace("{prompt}", prompt).replace("{response}", response)',
     "contrastive_prompts_take_texts_literally", "in one pass"),
    ("σ without −½", "token_rewards", " - 1 / 2", "", "token_rewards_values_and_gradient", "is ½ subtracted"),
    ("swapped log-probs", "token_rewards", "better_logps - worse_logps", "worse_logps - better_logps",
     "token_rewards_values_and_gradient", "are better and worse swapped"),
    ("exp of each log-prob", "token_rewards", "1 / (1 + torch.exp(-difference))",
     "torch.exp(better_logps) / (torch.exp(better_logps) + torch.exp(worse_logps))",
     "token_rewards_swapped_prompts_flip_the_sign_and_equal_prompts_give_zero", "take the difference first"),
    ("mask forgotten", "token_rewards", ".masked_fill(mask == 0, 0)", "",
     "padding_changes_no_value_and_no_gradient", "is the mask used"),
    ("mask as a factor", "dpo_rewards", ".masked_fill(mask == 0, 0)", " * mask",
     "padding_changes_no_value_and_no_gradient", "NaN × 0 is NaN"),
    ("mask after σ", "token_rewards", ".masked_fill(mask == 0, 0)\n    return 1 / (1 + torch.exp(-difference)) - 1 / 2",
     "\n    return (1 / (1 + torch.exp(-difference)) - 1 / 2).masked_fill(mask == 0, 0)",
     "padding_changes_no_value_and_no_gradient", "mask before σ"),
    ("β forgotten", "dpo_rewards", "beta * logps - beta * ref_logps", "logps - ref_logps",
     "dpo_rewards_values_and_gradient", "is β there"),
    ("no length normalisation", "simpo_rewards", " / length.unsqueeze(1)", "",
     "simpo_rewards_are_divided_by_the_length_of_the_response", "divided by the number of tokens"),
    ("length of the batch", "simpo_rewards", "(mask != 0)", "torch.ones_like(mask)",
     "simpo_rewards_are_divided_by_the_length_of_the_response", "not the padding"),
    ("0 / 0 in a row without tokens", "simpo_rewards", ".clamp(min=1)", "",
     "simpo_rewards_are_divided_by_the_length_of_the_response", "0 / 0 is NaN"),
    ("sides swapped", "treg_loss", "chosen.sum(dim=1) - rejected.sum(dim=1)", "rejected.sum(dim=1) - chosen.sum(dim=1)",
     "margin_is_a_difference_of_sums_less_gamma", "chosen less rejected"),
    ("mean for sum", "treg_loss", "chosen.sum(dim=1) - rejected.sum(", "chosen.mean(dim=1) - rejected.mean(",
     "margin_is_a_difference_of_sums_less_gamma", "sums, not means"),
    ("γ added", "treg_loss", "- gamma", "+ gamma", "margin_is_a_difference_of_sums_less_gamma", "is γ subtracted"),
    ("margin returned without γ", "treg_loss", "regulariser, z", "regulariser, z + gamma",
     "margin_is_a_difference_of_sums_less_gamma", "in the result too"),
    ("α forgotten", "treg_loss", "alpha * w", "w", "alpha_zero_is_bitwise_the_base_loss", "is the regulariser times α"),
    ("mean over the batch", "treg_loss", "return F.softplus(-z) + alpha * w * regulariser,",
     "return (F.softplus(-z) + alpha * w * regulariser).mean(),",
     "alpha_zero_is_bitwise_the_base_loss", "no mean.*: shape"),
    ("log of σ", "treg_loss", "F.softplus(-z)", "-torch.log(torch.sigmoid(z))",
     "alpha_zero_is_bitwise_the_base_loss", "use logsigmoid or softplus"),
    ("weight σ(z)", "treg_loss", "torch.sigmoid(-z)", "torch.sigmoid(z)",
     "gamma_lowers_the_margin_and_raises_the_weight", r"is it σ\(z\)"),
    ("γ not in the weight", "treg_loss", "torch.sigmoid(-z)", "torch.sigmoid(-z - gamma)",
     "gamma_lowers_the_margin_and_raises_the_weight", "γ included"),
    ("sign of the regulariser", "treg_loss", "+ alpha * w", "- alpha * w",
     "regulariser_rewards_agreement_on_both_sides", "chosen response is −α w Σ r̂ r"),
    ("mean of the agreement", "treg_loss", "w * regulariser", "w * regulariser / chosen.shape[1]",
     "regulariser_rewards_agreement_on_both_sides", "a sum over tokens"),
    ("chosen side only", "treg_loss", ' - torch.einsum("bt,bt->b", rejected_hat, rejected)', "",
     "regulariser_rewards_agreement_on_both_sides", "rejected response.*on both sides"),
    ("sign of the rejected side", "treg_loss", ' - torch.einsum("bt,bt->b", rej', ' + torch.einsum("bt,bt->b", rej',
     "regulariser_rewards_agreement_on_both_sides", "rejected response.*with the same sign"),
    ("no detach", "treg_loss", "torch.no_grad()", "torch.enable_grad()",
     "treg_loss_by_hand", r"chosen token should be −β·w·\(1 \+ α·r̂\): did you detach the weight"),
    ("static weighting ignored", "treg_loss", ' if weighting == "sequence" else torch.full_like(z, 0.5)', "",
     "treg_loss_by_hand", "static weighting"),
]


def put_in_place(monkeypatch, source):
    space = {}
    exec(source, space)
    for name in set(PUBLIC) & set(space):
        monkeypatch.setattr(treg, name, space[name])


def run_on_all_parameters(test):
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(values for _, values in marks)):
        named = {}
        for (names, _), value in zip(marks, values):
            named |= dict(zip(names.split(", "), value)) if "," in names else {names: value}
        test(**named)


@not_graded
@pytest.mark.parametrize("source", [STUDENT, PRODUCTS_AND_LOOPS], ids=["masked_fill and einsum", "products and loops"])
def test_correct_code_in_another_style_passes(source, monkeypatch):
    put_in_place(monkeypatch, source)
    for test in METHOD:
        run_on_all_parameters(test)


@not_graded
@pytest.mark.parametrize("function, right, wrong, test, hint", [pytest.param(*row, id=name) for name, *row in WRONG])
def test_typical_mistake_is_caught_with_its_hint(function, right, wrong, test, hint, monkeypatch):
    head, _, body = STUDENT.partition(f"def {function}(")
    assert right in body, f"{right!r} is not in the correct {function}"
    put_in_place(monkeypatch, f"{head}def {function}({body.replace(right, wrong, 1)}")
    with pytest.raises(AssertionError, match=hint):
        run_on_all_parameters(globals()[f"test_{test}"])


@not_graded
def test_grading_a_file_names_what_is_graded_and_what_cannot_be(tmp_path, monkeypatch):
    """One function, with a mistake, in a process of its own; then files that cannot be graded, and a whole copy."""
    student = tmp_path / "student.py"
    attached = STUDENT.partition("\ndef treg_loss(")[2].replace("torch.no_grad()", "torch.enable_grad()")
    student.write_text(f"import torch\nimport torch.nn.functional as F\n\ndef treg_loss({attached}")
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "method",
                             HERE / "test_treg.py"], capture_output=True, text=True, cwd=tmp_path,
                            env=os.environ | {"TREG": "student.py"})
    assert result.returncode == 1 and "did you detach the weight?" in result.stdout, result.stdout + result.stderr
    assert "graded: treg_loss of student.py" in result.stdout and "1 failed" in result.stdout, result.stdout
    for source, says in ((None, "No such file"), ("def f(:", "SyntaxError.*line 1"),
                         ("\n1 / 0", "line 2: ZeroDivisionError"),
                         ("def token_reward(): 0", "defines none of token_rewards")):
        student.unlink(missing_ok=True)
        if source:
            student.write_text(source)
        with pytest.raises(pytest.Collector.CollectError, match=says):
            graded(student)
    student.write_text((HERE / "treg.py").read_text())
    monkeypatch.setitem(sys.modules, "treg", treg)
    with pytest.warns(match="graded: token_rewards.*credit_auroc"):
        copied = graded(student)
    assert copied is sys.modules["treg"] is not treg and copied.losses.__globals__ is vars(copied)


@not_graded
def test_readme_example_prints_what_the_readme_shows(capsys):
    """The output to the letter; and the table beside it: its inputs are the snippet's, its results the functions'."""
    section = (HERE / "README.md").read_text().partition("\n## By hand\n")[2].partition("\n## ")[0]
    snippet, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", section, re.S).groups()
    space = {}
    exec(snippet, space)
    assert capsys.readouterr().out == output
    printed = {line[:20].strip(): [float(number) for number in line[20:].split()] for line in output.splitlines()}
    rows = re.findall(r"^\| (?:chosen|rejected) \d \|(.*)\|$", section, re.M)
    columns = zip(*([float(cell.replace("−", "-")) for cell in row.split("|")] for row in rows))
    names = "better, worse, token reward, policy, ref, implicit reward, DPO gradient, T-REG gradient"
    for name, column in zip(names.split(", "), columns, strict=True):
        close(column, printed[name] if name in printed else space[name].exp().flatten(), f"the README's column {name}")


@not_graded
def test_exercises_come_out_as_the_readme_says():
    better, worse, policy, ref = EXAMPLE
    mask, hat = torch.ones(2, 2), treg.token_rewards(better, worse, torch.ones(2, 2))

    def gradient(alpha, hat=hat, loss=treg.treg_loss):
        logps = policy.clone().requires_grad_()
        loss(*treg.dpo_rewards(logps, ref, mask, 0.5).chunk(2), *hat.chunk(2), alpha)[0].backward()
        return logps.grad

    close(gradient(10 / 3)[1, 0], 0.0, "1: the first gradient to change its sign")
    space = {}
    exec(STUDENT.replace("torch.no_grad()", "torch.enable_grad()"), space)
    extra = 0.5 * 0.5 * 0.2 * 0.8 * 0.65 * math.log(2)
    close(gradient(0.5, loss=space["treg_loss"]) - gradient(0.5), double([extra] * 2, [-extra] * 2), "3: extra term")
    assert round(-0.12 + extra, 4) == -0.1020
    for rejected_hat, factor in ((0.25, 0.875), (-0.25, 1.125)):
        constant = double([0.25] * 2, [rejected_hat] * 2)
        close(gradient(0.5, constant) / gradient(0.0), double([1.125] * 2, [factor] * 2), "4: a constant r̂")
    for z, weighting, falls in ((2.70, "static", False), (2.71, "static", True), (2.71, "sequence", False)):
        chosen, zero = double([z, 0.0]).requires_grad_(), double([0.0, 0.0])
        treg.treg_loss(chosen, zero, double([0.4, -0.25]), zero, 0.5, weighting=weighting)[0].backward()
        assert (chosen.grad[0, 1] > 0) == falls, f"5: {weighting} weighting at z = {z}"
    long, short = (treg.simpo_rewards(-torch.ones(1, n), torch.ones(1, n), 2.0) for n in (8, 2))
    close(long.sum() - short.sum(), 0.0, "6: the margin with means")
    close(8 * long.sum() - 2 * short.sum(), -12.0, "6: the margin with sums")
    for name, preference in (("hinge", lambda z: torch.relu(2 - z)), ("IPO", lambda z: (z - 0.5) ** 2)):
        def loss(chosen, rejected, chosen_hat, rejected_hat, alpha):
            z = chosen.sum() - rejected.sum()
            weight = -torch.autograd.grad(preference(z), z, retain_graph=True)[0]
            return preference(z) - alpha * weight * ((chosen_hat * chosen).sum() + (rejected_hat * rejected).sum()), z
        close(gradient(0.5, loss=loss) / gradient(0.0, loss=loss), double([1.2, 0.875], [0.85, 1.1]), f"8: {name}")


# ------------------------------------------------------------------------------------------------------- README: TRL
def trl_script(folder):
    """-> trl_treg.py, saved in folder from the README as the README says."""
    pytest.importorskip("trl", reason="the README's recipe needs trl, which treg.py does not")
    [block] = [block for block in readme_blocks("python") if "DPOTrainer" in block]
    return put(folder / "trl_treg.py", block)


def trl_pairs(folder, count):
    """-> a file of count pairs of uneven lengths."""
    lines = Path(write_pairs("pairs.jsonl")).read_text().splitlines(keepends=True)
    assert len(lines) >= count
    return put(folder / "pairs.jsonl", "".join(lines[:count]))


@pytest.mark.parametrize("algorithm, beta, gamma, tolerance", [("dpo", 0.1, 0.0, 1e-6), ("simpo", 2.5, 1.0, 5e-6)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trl_with_the_copied_loss_takes_the_steps_of_treg(
        tmp_path, monkeypatch, algorithm, beta, gamma, tolerance, accumulate):
    """24 pairs, two epochs in batches of 4 in the order of the file, the same weights and learning rates."""
    script, data, out = trl_script(tmp_path), trl_pairs(tmp_path, 24), tmp_path / "treg"
    import transformers
    from trl.trainer import dpo_trainer
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
        loss = ["--algorithm", algorithm, "--alpha", "0.5", "--beta", str(beta), "--gamma", str(gamma)]
        assert go(out, "--data", data, "--holdout", 0, "--accumulate", accumulate, *loss) == 0
    expected = [json.loads(line) for line in lines(out)]

    def scheduler(trainer, num_training_steps, optimizer=None):  # TRL's own cosine begins at 0
        assert num_training_steps == len(expected) == 12 // accumulate
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, lambda step: expected[min(step, len(expected) - 1)]["lr"] / 1e-3)
        return trainer.lr_scheduler

    monkeypatch.setattr(transformers.Trainer, "create_scheduler", scheduler)
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *_, **__: pytest.fail("a second model is loaded"))
    monkeypatch.setenv("CI", "1")  # TRL reports no run of a test
    settings = {"model": model_folder(), "data": data, "output_dir": tmp_path / "trl", "learning_rate": 1e-3,
                "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate,
                "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no"}
    argv = [str(script), *loss, "--use_cpu", *(f"--{name}={value}" for name, value in settings.items())]
    monkeypatch.setattr(sys, "argv", argv)
    trainer = runpy.run_path(str(script), run_name="__main__")["trainer"]

    rows, pad = list(trainer.train_dataset), trainer.processing_class.pad_token_id
    assert trainer.ref_model is None and all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == pad for row in rows)
    assert all(len({len(row[f"{name}_ids"]) for row in rows}) > 1 for name in ("prompt", *treg.SIDES)), "uneven lengths"
    history = json.loads((tmp_path / "trl" / "trainer_state.json").read_text())["log_history"]
    found = [row for row in history if "loss" in row]
    for step, (row, ours) in enumerate(zip(found, expected, strict=True), 1):
        close(row["loss"], ours["loss"], f"loss of step {step}", tolerance)
        close(row["rewards/margins"], ours["margin"] + gamma, f"margin of step {step}, z + γ", tolerance)
        close(row["grad_norm"], ours["grad_norm"], f"gradient norm of step {step}", 4 * tolerance)
    assert found[-1]["loss"] < found[0]["loss"] - 0.2, "the runs compared did learn"


def run_bounded(command, **options):
    """Run a command, with all its children, for five minutes at most; its output is shown where it fails."""
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as process:
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output


def test_trl_on_two_processes_gives_the_losses_of_one(tmp_path):
    """The README's two commands, on 25 pairs: three whole batches of 8, and one pair left over, an epoch."""
    script, data = trl_script(tmp_path), trl_pairs(tmp_path, 25)
    commands = "\n".join(readme_blocks("sh")).replace("\\\n", " ").splitlines()
    commands = [line.split() for line in commands if script.name in line]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]  # 0: any free one
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CI": "1"}
    runs = []
    for name, *words in commands:
        start = {"python": [sys.executable], "accelerate": launch}[name]
        ours = {"DIR": model_folder(), "pairs.jsonl": str(data)}
        words = [ours.get(word, word) for word in words if word != "launch"]
        smallest = ["--use_cpu", "--learning_rate", "1e-3", "--num_train_epochs", "2", "--save_strategy", "no"]
        run_bounded([*start, *words, *smallest], cwd=tmp_path, env=environment)
        out = tmp_path / words[words.index("--output_dir") + 1]
        assert (out / "model.safetensors").exists()
        runs.append(json.loads((out / "trainer_state.json").read_text()))
    one, two = runs
    assert (one["train_batch_size"], two["train_batch_size"]) == (8, 4), "the same 8 pairs a step"
    assert one["global_step"] == two["global_step"] == 6
    for first, second in zip(one["log_history"][:6], two["log_history"][:6]):
        for name in ("loss", "rewards/margins", "learning_rate"):  # not the accuracy, which begins with ties
            close(second[name], first[name], f"{name} of step {first['step']} on two processes", 1e-6)
    close(one["log_history"][0]["loss"], math.log(2), "DPO's first loss is ln 2", 1e-5)
    assert one["log_history"][5]["loss"] < math.log(2) - 0.1
