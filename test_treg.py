# SPDX-License-Identifier: MIT
"""Tests of treg.py: python -m pytest -q test_treg.py

Part I, the paper, by hand: the derivation in the docstring, numbers that a pencil gives, asserted
to 1e-10 in float64, the gradient beside the value. Then the grading of a file of your own, with
TREG=student.py python -m pytest -q test_treg.py -x -k method.
    1 the paper    2 grading
Part II, the program: each section says what it guards, and a table in it is read as "this in, that
out". Every helper stands once.
    3 the tiny data    4 data    5 templates and tokens    6 models and sharing    7 log-probs
    8 training    9 evaluation    10 the run    11 the comparison    12 README    13 experiments
"""

import codecs
import contextlib
import copy
import ctypes
import datetime
import functools
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import treg  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other make small tensors very slow


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, hint, tolerance=1e-10):
    """torch.testing.assert_close; a failure begins with a hint for who writes treg.py anew."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float64)

    def message(_):
        if found.shape != expected.shape:
            return f"{hint}\nshape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        numbers = f"found {found.tolist()}, expected {expected.tolist()}"
        if torch.allclose(found.double(), expected, rtol=0, atol=1e-6):
            return f"only as exact as float32: keep the dtype of the arguments\n{numbers}\n{hint}"
        return f"{hint}\n{numbers}"

    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True, msg=message)


# =================================================================== Part I, the paper, by hand
# ------------------------------------------------------------------------ 1 the paper, by hand
# Guards sections 1 to 3 of treg.py: what r̂, r, z, w and L are, and what they do to every token.

# The README's example: two tokens of a chosen and of a rejected response, as log-probs.
BETTER = double([0.45, 0.1], [0.4, 0.3]).log()
WORSE = double([0.05, 0.3], [0.1, 0.7]).log()
POLICY = double([0.4, 0.8], [0.2, 0.2]).log()
REFERENCE = double([0.1, 0.2], [0.05, 0.8]).log()
MASK = torch.ones(2, 2, dtype=torch.bool)

GRADIENT = {
    "chosen": "the gradient of a chosen token should be −β·w·(1 + α·r̂)",
    "rejected": "the gradient of a rejected token should be +β·w·(1 − α·r̂)",
}
DETACHED = "did you detach the weight? and nothing else? (SimPO: β/|y|. Static: ½ for w beside α)"


def test_rewards_by_hand():
    """r̂ = σ(better − worse) − ½, and σ(log a − log b) = a / (a + b).

    chosen    .45 / .50 − ½ = .4    .1 / .4 − ½ = −.25
    rejected   .4 / .5 − ½ = .3     .3 / 1 − ½ = −.2

    r = β (log π − log π_ref), β = ½: ½ log 4 = ln 2 three times, and ½ log ¼ = −ln 2.
    ∂r/∂log π = β. π_ref is frozen, and so is r̂.
    """
    hat = treg.token_rewards(BETTER, WORSE, MASK)
    hint = "r̂ = σ(better − worse) − ½: is ½ subtracted? are better and worse swapped?"
    close(hat, [[0.4, -0.25], [0.3, -0.2]], hint)

    logps = POLICY.clone().requires_grad_()
    rewards = treg.dpo_rewards(logps, REFERENCE, MASK, 0.5)
    ln2 = math.log(2)
    hint = "r = β (log π − log π_ref): is β there? is the reference subtracted?"
    close(rewards, [[ln2, ln2], [ln2, -ln2]], hint)
    rewards.sum().backward()
    close(logps.grad, [[0.5, 0.5], [0.5, 0.5]], "∂r/∂log π = β")


# which r̂ count (chosen, rejected), α, weighting -> α w Σ r̂ r in units of ln 2, and ∂L/∂log π
BY_HAND = {
    "alpha 0": ((1, 1), 0.0, "sequence", 0.0, [[-0.1, -0.1], [0.1, 0.1]]),
    "chosen side": ((1, 0), 0.5, "sequence", 0.015, [[-0.12, -0.0875], [0.1, 0.1]]),
    "rejected side": ((0, 1), 0.5, "sequence", 0.05, [[-0.1, -0.1], [0.085, 0.11]]),
    "both sides": ((1, 1), 0.5, "sequence", 0.065, [[-0.12, -0.0875], [0.085, 0.11]]),
    "static": ((1, 1), 0.5, "static", 0.1625, [[-0.15, -0.06875], [0.0625, 0.125]]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_treg_loss_by_hand(case):
    """L = −log σ(z) − α w Σ r̂ r, with the rewards of the test above, α = ½.

    z = (ln 2 + ln 2) − (ln 2 − ln 2) = ln 4, so −log σ(z) = ln(1 + ¼) and w = σ(−z) = ⅕.
    Σ r̂ r = (.4 − .25) ln 2 = .15 ln 2 for chosen, (.3 + .2) ln 2 = .5 ln 2 for rejected.
    Times α w = ⅒: .015 ln 2 and .05 ln 2, together .065 ln 2.

    ∂L/∂log π = ∓β w = ∓⅒ for α = 0. The regulariser rescales it, token by token:
    chosen    −⅒ (1 + ½ · .4) = −.12     −⅒ (1 − ½ · .25) = −.0875
    rejected  +⅒ (1 − ½ · .3) = +.085    +⅒ (1 + ½ · .2) = +.11

    Static weighting has ½ for w beside α alone: .1625 ln 2, and ∓½ (⅕ ± ¼ r̂).
    """
    sides, alpha, weighting, regulariser, gradient = BY_HAND[case]
    hat = double([0.4, -0.25], [0.3, -0.2]) * double(sides).T
    logps = POLICY.clone().requires_grad_()
    chosen, rejected = treg.dpo_rewards(logps, REFERENCE, MASK, 0.5).split(1)
    loss, margin = treg.treg_loss(chosen, rejected, *hat.split(1), alpha, weighting=weighting)
    close(margin, [math.log(4)], "z = Σ r(chosen) − Σ r(rejected): sides swapped? means for sums?")
    hint = (
        f"{case}: L = −log σ(z) − α·w·Σ r̂·r: is α there? is w = σ(−z), not σ(z), and ½ if static? "
        "a sum over tokens, of both sides, with the same sign? a loss for each pair?"
    )
    close(loss, [math.log(5 / 4) - regulariser * math.log(2)], hint)
    loss.sum().backward()
    close(logps.grad[0], gradient[0], f"{case}: {GRADIENT['chosen']}: {DETACHED}")
    close(logps.grad[1], gradient[1], f"{case}: {GRADIENT['rejected']}: {DETACHED}")


def test_gamma_lowers_the_margin_and_raises_the_weight():
    """One token a side: r = 1 and 0, γ = 1 + ln 3, α = 1, r̂ = 1 and 0 (which is the SFT variant).

    z = 1 − 0 − γ = −ln 3, −log σ(z) = ln(1 + 3), w = σ(ln 3) = ¾, Σ r̂ r = 1: L = ln 4 − ¾.
    ∂L/∂r = −w (1 + 1) = −3/2 for the chosen token, and +w (1 − 0) = ¾ for the rejected one.
    """
    chosen = double([1.0]).requires_grad_()
    rejected = double([0.0]).requires_grad_()
    hats = double([1.0]), double([0.0])
    loss, margin = treg.treg_loss(chosen, rejected, *hats, 1.0, 1 + math.log(3))
    hint = "z = Σ r(chosen) − Σ r(rejected) − γ: is γ subtracted, in the returned margin too?"
    close(margin, [-math.log(3)], hint)
    close(loss, [math.log(4) - 0.75], "w = σ(−z), z has γ in it, once. Is r̂ clamped?")
    loss.sum().backward()
    close(chosen.grad, [[-1.5]], f"γ: {GRADIENT['chosen']}: {DETACHED}")
    close(rejected.grad, [[0.75]], f"γ: {GRADIENT['rejected']}: {DETACHED}")


def test_simpo_rewards_are_divided_by_the_length_of_the_response():
    """r = (β / |y|) log π. β = 2: |y| = 4 gives the factor ½, |y| = 1 the factor 2."""
    logps = double([-1.0, -2.0, -3.0, -4.0], [-1.5, 9.0, 9.0, 9.0]).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    rewards = treg.simpo_rewards(logps, mask, 2.0)
    hint = "r = (β / |y|) log π: divided by the number of tokens in the mask, not in the batch?"
    close(rewards, [[-0.5, -1.0, -1.5, -2.0], [-3.0, 0.0, 0.0, 0.0]], hint)
    rewards.sum().backward()
    close(logps.grad, [[0.5] * 4, [2.0, 0.0, 0.0, 0.0]], "∂r/∂log π = β / |y|")
    empty = treg.simpo_rewards(logps, torch.zeros_like(mask), 2.0)
    close(empty, [[0.0] * 4] * 2, "a row of padding alone: 0 / 0 is NaN, so let |y| be at least 1")


@pytest.mark.parametrize("algorithm, gamma", [("dpo", 0.0), ("simpo", 0.0), ("simpo", 0.8)])
@pytest.mark.parametrize("weighting", ["sequence", "static"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_gradient_identity(algorithm, gamma, weighting, alpha):
    """∂L/∂log π(chosen, t) = −s w (1 + α r̂_t), ∂L/∂log π(rejected, t) = +s w (1 − α r̂_t).

    From L = −log σ(z) − α w Σ r̂ r: −log σ has the derivative −σ(−z) = −w in z; z has +1 in each
    r(chosen, t) and −1 in each r(rejected, t); and with w constant, Σ r̂ r has r̂_t in r_t. At
    last ∂r_t/∂log π = s: β for DPO, β/|y| for SimPO. Static: the w beside α is ½.
    """
    beta = 0.7
    lengths = {"chosen": (3, 2), "rejected": (2, 4)}  # of two pairs
    generator = torch.Generator().manual_seed(3)
    logps, reference, hat, reward = {}, {}, {}, {}
    for side, sizes in lengths.items():
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        random = torch.rand(3, *mask.shape, generator=generator, dtype=torch.float64)
        logps[side] = (-3 * random[0]).requires_grad_()
        hat[side] = (4 * random[1] - 2) * mask  # beyond ½ too: the loss clamps nothing
        if algorithm == "dpo":
            reference[side] = -3 * random[2]
            reward[side] = treg.dpo_rewards(logps[side], reference[side], mask, beta)
        else:
            reference[side] = torch.zeros_like(hat[side])  # SimPO has none
            reward[side] = treg.simpo_rewards(logps[side], mask, beta)

    loss, margin = treg.treg_loss(*reward.values(), *hat.values(), alpha, gamma, weighting)
    loss.sum().backward()

    where = f"{algorithm}, {weighting}, α = {alpha}"
    for pair in range(2):
        z = -gamma
        agreement = 0.0
        tokens = []
        for side, sign in ("chosen", 1), ("rejected", -1):
            length = lengths[side][pair]
            s = beta if algorithm == "dpo" else beta / length
            for t in range(length):
                r = s * (logps[side][pair, t] - reference[side][pair, t]).item()
                hat_t = hat[side][pair, t].item()
                z += sign * r
                agreement += hat_t * r
                tokens.append((side, sign, t, s, hat_t))
        w = 1 / (1 + math.exp(z))
        v = w if weighting == "sequence" else 0.5
        value = math.log(1 + math.exp(-z)) - alpha * v * agreement
        close(margin[pair], z, f"{where}: z of one pair of two, summed over its own tokens")
        close(loss[pair], value, f"{where}: L of one pair of two: r̂ as it comes, never clamped?")
        for side, sign, t, s, hat_t in tokens:
            expected = -sign * s * (w + sign * v * alpha * hat_t)
            close(logps[side].grad[pair, t], expected, f"{where}: {GRADIENT[side]}: {DETACHED}")


@pytest.mark.parametrize("weighting", ["sequence", "static"])
def test_alpha_zero_is_bitwise_the_base_loss(weighting):
    """α = 0: L = −log σ(z), of z = −200 too, where σ underflows in float32. Bitwise in treg.py."""
    chosen, rejected, hat = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    chosen[0, 0] = -200.0
    loss, margin = treg.treg_loss(chosen, rejected, hat, hat, 0.0, 0.7, weighting)
    z = chosen.sum(-1) - rejected.sum(-1) - 0.7
    base = -torch.nn.functional.logsigmoid(z)
    tolerance = 0.0 if treg.treg_loss.__module__ == "treg" else 1e-4
    close(margin.double(), z, "α = 0: z of each pair", tolerance)
    hint = "α = 0 is −log σ(z) of each pair, 200 for z = −200, not inf: use logsigmoid or softplus"
    close(loss.double(), base, hint, tolerance)


def test_token_rewards_are_odd_and_bounded():
    """d = better − worse = ln 3: σ = ¾, r̂ = ¼, ∂r̂/∂better = σ(1 − σ) = 3/16. d = −ln 3: r̂ = −¼.

    Equal prompts, d = 0: r̂ = 0, no reward at all. d = ±1000: r̂ = ±½.
    """
    d = double([math.log(3), -math.log(3), 0.0, 1000.0, -1000.0])
    worse = double([-1.5, -2.5, -0.5, -2000.0, -1000.0])
    better = (worse + d).requires_grad_()
    rewards = treg.token_rewards(better, worse, torch.ones(1, 5, dtype=torch.bool))
    close(rewards[:, :3], [[0.25, -0.25, 0.0]], "swapped prompts change the sign, equal give 0")
    hint = "r̂ lies in [−½, ½]: exp of a log-prob underflows, take the difference first"
    close(rewards[:, 3:], [[0.5, -0.5]], hint)
    if rewards.requires_grad:  # r̂ is frozen: it may be a constant
        rewards.sum().backward()
        close(better.grad[:, :3], [[3 / 16, 3 / 16, 1 / 4]], "∂r̂/∂better = σ(1 − σ)")


@pytest.mark.parametrize("name", ["token_rewards", "dpo_rewards", "simpo_rewards"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("padding", [math.nan, math.inf, -1e30])
def test_padding_changes_no_value_and_no_gradient(name, kind, padding):
    """A mask may be bool, int or float: write mask.bool(). Where it is 0, anything may stand."""
    real = torch.tensor([[True, True, True], [True, False, False]])
    where = f"{name}, {kind} mask, padding of {padding}"
    results = []
    for mask, fill in (real, 0.0), (real.to(kind), padding):
        logps = double([-1.0, -2.0, -0.5], [-3.0, fill, fill]).requires_grad_()
        logps.grad = torch.zeros_like(logps)
        frozen = double([-1.5, -1.0, -0.7], [-2.0, fill, fill])
        before = frozen.clone()
        rest = {"token_rewards": (frozen, mask), "dpo_rewards": (frozen, mask, 0.5)}
        values = getattr(treg, name)(logps, *rest.get(name, (mask, 0.5)))
        close(frozen, before, f"{where}: the caller's tensors must not change", 0.0)
        if values.requires_grad:  # r̂ may be a constant
            values.sum().backward()
        results.append((values.detach(), logps.grad))
    (clean, clean_gradient), (values, gradient) = results
    hint = f"{where}: is the mask used, as mask.bool(), and not as a factor? NaN × 0 is NaN"
    close(values, clean * real, hint, 0.0)
    close(gradient, clean_gradient * real, f"{where}: mask before σ: a NaN's gradient is NaN", 0.0)


@pytest.mark.parametrize("style", treg.PROMPTS)
def test_contrastive_prompts_rewrite_the_last_user_message(style):
    """Of a text both prompts are texts; of messages they are messages, all but one unchanged."""
    better, worse = treg.contrastive_prompts("Name a bird.", "A crow.", style)
    for text in (better, worse):
        assert "Name a bird." in text, "both prompts show the prompt"
        assert ("A crow." in text) == (style == "revise"), "only revise shows the response"
    assert re.search("more helpful|is helpful", better), "(better, worse): are they swapped?"
    assert re.search("less helpful|unhelpful", worse), "(better, worse): are they swapped?"

    roles = "system", "user", "assistant", "user", "assistant"
    talk = [{"role": role, "content": "Name a bird."} for role in roles]
    before = copy.deepcopy(talk)
    both = treg.contrastive_prompts(talk, "A crow.", style)
    assert talk == before, "the caller's messages must not change: did you write into them?"
    for messages, text in zip(both, (better, worse), strict=True):
        assert [*map(type, messages)] == [dict] * 5, (
            "as many messages as before: those after the last *user* message stay too"
        )
        assert messages[4:] == talk[4:], "all others stay, after the last *user* message too"
        expected = [*talk[:3], {"role": "user", "content": text}, talk[4]]
        assert messages == expected, "the last user message is rewritten as a text is, no other"


def test_contrastive_prompts_take_texts_literally():
    """A {response}, a brace or a backslash within a prompt is just text."""
    style = {"better": "{response}|{prompt}|+", "worse": "{prompt}|-"}
    prompts = treg.contrastive_prompts("a {response} {0} \\1 %s", "b {prompt}", style)
    expected = ["b {prompt}|a {response} {0} \\1 %s|+", "a {response} {0} \\1 %s|-"]
    assert list(prompts) == expected, "a {response} in a prompt is text: fill both in one pass"


# --------------------------------------------------------------------- 2 grading a student's file
# Guards the grading: right code in any style passes, and each typical mistake meets its hint.
METHOD = {name: test for name, test in globals().items() if name.startswith("test_")}
for method_test in METHOD.values():
    method_test.method = True  # pytest -k finds attributes as it finds names

PUBLIC = ["contrastive_prompts", "token_rewards", "dpo_rewards", "simpo_rewards", "treg_loss"]
PUBLIC += ["response_logps", "annotate", "load_pairs", "credit_auroc"]
CRASHES = {  # words of an exception: what to look at
    "require grad|used in the graph": "no gradient reaches log π: detached, or under no_grad?",
    "in-place operation": "do not write into the arguments: they are the caller's",
    "No comparison pair": "the result should be a tensor",
    "unpack|iterat|0-d|zip": "treg_loss returns (loss, margin), and prompts are (better, worse)",
    "size of tensor": "T differs between the sides: sum each first; keepdim where a row is divided",
    "unhashable": "style is a name in PROMPTS, or itself a dict with better and worse",
    "[Bb]ool|mask|bitwise": "a mask may be bool, int or float: write mask.bool(), and ~ after it",
    "dtype|Float|Double": "keep the dtype of the arguments, here float64: is there a float32?",
}


def in_short(test):
    """The test, but it fails with a hint of a few lines and without a traceback."""

    @functools.wraps(test)
    def short(**values):
        try:
            return test(**values)
        except AssertionError as error:
            hint = str(error)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            frame = [frame for frame in frames if "site-packages" not in frame.filename][-1]
            known = [hint for words, hint in CRASHES.items() if re.search(words, str(error))]
            where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
            hint = "\n".join([*known[:1], f"{where}: {type(error).__name__}: {error}"])
        return pytest.fail("\n".join(hint.splitlines()[:3]), pytrace=False)

    return short


def graded(path):
    """-> treg with a student's public functions in place of its own, or a whole copy, changed."""
    student = sys.modules["student"] = types.ModuleType("student")
    student.__file__ = str(Path(path).resolve())
    try:
        exec(compile(Path(path).read_bytes(), student.__file__, "exec"), vars(student))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [f", line {f.lineno}" for f in frames if f.filename == student.__file__][-1:]
        reason = f"TREG={path}{''.join(line)}: {type(error).__name__}: {error}"
        raise pytest.Collector.CollectError(reason) from None
    ours = vars(treg)
    names = [name for name in PUBLIC if getattr(student, name, ours[name]) is not ours[name]]
    if not names:
        raise pytest.Collector.CollectError(f"TREG={path}: defines none of {', '.join(PUBLIC)}")
    warnings.warn(f"graded: {', '.join(names)} of {path}; all else is treg.py's", stacklevel=2)
    if {name for name in ours if not name.startswith("__")} <= vars(student).keys():
        sys.modules["treg"] = student
        return student
    for name in names:
        setattr(treg, name, getattr(student, name))
    return treg


if "TREG" in os.environ:
    treg = graded(os.environ["TREG"])
    globals().update({name: in_short(test) for name, test in METHOD.items()})
not_graded = pytest.mark.skipif("TREG" in os.environ, reason="others' ways are right too")


@not_graded
def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="static"):
        treg.treg_loss(*torch.zeros(4, 1, 1), 0.5, weighting="token")


# Correct code in another style. WRONG spoils it by one typical mistake at a time.
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
    return [prompt.join(part.replace("{response}", response) for part in parts[s]) for s in parts]

def token_rewards(better_logps, worse_logps, mask):
    d = (better_logps - worse_logps).masked_fill(mask == 0, 0)
    return 1 / (1 + torch.exp(-d)) - 1 / 2

def dpo_rewards(logps, ref_logps, mask, beta):
    return (beta * logps - beta * ref_logps.detach()).masked_fill(mask == 0, 0)

def simpo_rewards(logps, mask, beta):
    length = (mask != 0).sum(dim=1).clamp(min=1)
    return beta * logps.masked_fill(mask == 0, 0) / length.unsqueeze(1)

def treg_loss(chosen, rejected, chosen_hat, rejected_hat, alpha, gamma=0.0, weighting="sequence"):
    z = chosen.sum(dim=1) - rejected.sum(dim=1) - gamma
    with torch.no_grad():
        w = torch.sigmoid(-z) if weighting == "sequence" else torch.full_like(z, 0.5)
    agree = torch.einsum("bt,bt->b", chosen_hat, chosen)
    agree = agree + torch.einsum("bt,bt->b", rejected_hat, rejected)
    return F.softplus(-z) - alpha * w * agree, z
"""
# what is right in STUDENT, a mistake for it, the test that catches it, words of its hint
WRONG = [
    ('("better", "worse")', '("worse", "better")', "last_user", "are they swapped"),
    ("dict(m) for", "m for", "last_user", "did you write into them"),
    ("prompt] for _", "prompt[: last + 1]] for _", "last_user", "after the last *user*"),
    ("[style] if isinstance(style, str) else style", "[style]", "literally", "itself a dict"),
    ("][-1]", "][0]", "last_user", "no other"),
    (".split", '.replace("{response}", response).split', "literally", "in one pass"),
    (" - 1 / 2", "", "rewards_by_hand", "is ½ subtracted"),
    ("better_logps - worse", "worse_logps - better", "rewards_by_hand", "swapped"),
    ("worse_logps)", "worse_logps).float()", "rewards_by_hand", "as exact as float32"),
    ("mask == 0", "~mask", "padding", "a mask may be bool, int or float"),
    (".masked_fill(mask == 0, 0)", " * mask", "padding", "NaN × 0 is NaN"),
    (").m", ").sigmoid().masked_fill(mask == 0, 0.5).logit().m", "padding", "before σ"),
    ("    d =", "    worse_logps[mask == 0] = 0; d =", "padding", "must not change"),
    ("torch.exp(-d)", "worse_logps.exp() / better_logps.exp()", "bounded", "difference first"),
    (" - beta * ref_logps.detach()", "", "rewards_by_hand", "is the reference subtracted"),
    ("* logps -", "* logps.detach() -", "rewards_by_hand", "no gradient reaches log π"),
    (".exp(-d)", ".exp(-d)[0]", "rewards_by_hand", "expected (2, 2)"),
    ("(mask != 0)", "torch.ones_like(mask)", "simpo", "not in the batch"),
    (".clamp(min=1)", "", "simpo", "0 / 0 is NaN"),
    ("chosen.sum(dim=1) - rejected", "rejected.sum(dim=1) - chosen", "by_hand", "swapped"),
    ("chosen.sum(dim=1) - rejected", "(chosen - rejected)", "identity", "T differs between"),
    ("- gamma", "+ gamma", "gamma", "is γ subtracted"),
    ("torch.sigmoid(-z)", "torch.sigmoid(z)", "by_hand", "not σ(z)"),
    ("* agree", "* agree / chosen.shape[1]", "by_hand", "a sum over tokens"),
    ("agree +", "agree -", "by_hand", "with the same sign"),
    ("agree, z", "agree, z + gamma", "gamma", "in the returned margin too"),
    ("agree, z", "agree", "by_hand", "returns (loss, margin)"),
    ("alpha * w", "w", "by_hand", "alpha 0: L = −log σ(z) − α·w·Σ r̂·r: is α there"),
    ("F.softplus(-z)", "-torch.log(torch.sigmoid(z))", "alpha_zero", "use logsigmoid"),
    ("torch.sigmoid(-z)", "torch.sigmoid(-z - gamma)", "gamma", "z has γ in it, once"),
    ("chosen_hat, chosen)", "chosen_hat.clamp(-1, 1), chosen)", "identity", "never clamped"),
    ("torch.no_grad()", "torch.enable_grad()", "by_hand", "did you detach the weight?"),
]


def parameters(test):
    """-> all keywords that pytest would call the test with."""
    tables = []
    for mark in getattr(test, "pytestmark", []):
        names, rows = mark.args
        rows = rows if ", " in names else [[value] for value in rows]
        tables.append([list(zip(names.split(", "), row, strict=True)) for row in rows])
    return [dict(itertools.chain(*rows)) for rows in itertools.product(*tables)]


def first_failure(source, monkeypatch):
    """-> (the first test of the method that this code fails, what it says)."""
    space = {}
    exec(source, space)
    for name in set(PUBLIC) & set(space):
        monkeypatch.setattr(treg, name, space[name])
    for name, test in METHOD.items():
        for values in parameters(test):
            try:
                in_short(test)(**values)
            except pytest.fail.Exception as failure:
                return name, failure.msg
    return "none", ""


@not_graded
@pytest.mark.parametrize("constant", ["", "@torch.no_grad()\n"])
def test_correct_code_in_another_style_passes(constant, monkeypatch):
    source = STUDENT.replace("def token_rewards", f"{constant}def token_rewards")
    assert first_failure(source, monkeypatch) == ("none", "")


@not_graded
@pytest.mark.parametrize("right, wrong, test, hint", WRONG)
def test_typical_mistake_meets_its_hint(right, wrong, test, hint, monkeypatch):
    assert right in STUDENT
    name, says = first_failure(STUDENT.replace(right, wrong, 1), monkeypatch)
    assert test in name and hint in says, f"{name}: {says}"


@not_graded
def test_a_graded_file_gets_short_hints(tmp_path):
    """One function, its weight not detached, in a process of its own."""
    imports, loss = re.search(r"(?s)(.*?)def con.*(def treg_loss.*)", STUDENT).groups()
    (tmp_path / "student.py").write_text(imports + loss.replace("no_grad", "enable_grad"))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "method", "-p", "no:cacheprovider"]
    options = {"capture_output": True, "text": True, "env": os.environ | {"TREG": "student.py"}}
    command += ["--rootdir", HERE, HERE / "test_treg.py"]  # -k finds names of folders too
    says = subprocess.run(command, cwd=tmp_path, **options).stdout
    assert "did you detach the weight?" in says, says
    assert "graded: treg_loss of student.py" in says, says
    failed, passed = (int(re.search(rf"(\d+) {word}", says)[1]) for word in ("failed", "passed"))
    assert failed + passed == sum(len(parameters(test)) for test in METHOD.values()), says
    assert len(says.splitlines()) < 5 * failed + 15, says


@not_graded
def test_what_cannot_be_graded_says_why(tmp_path):
    student = tmp_path / "student.py"
    for source, says in {
        "def f(:": "SyntaxError.*line 1",
        "\n1 / 0": "line 2: ZeroDivisionError",
        "def token_reward(): 0": "defines none of contrastive_prompts",
    }.items():
        student.write_text(source)
        with pytest.raises(pytest.Collector.CollectError, match=says):
            graded(student)


# =================================================================== Part II, the program
# ------------------------------------------------------------------------------- 3 the tiny data
# Guards tiny_data.jsonl: this generator makes it, with its labels and answers.
SLOTS = """
size tiny small large huge tall short
colour red blue green gold black white pink grey
material wooden paper glass stone brass clay woollen iron
object lamp clock chair vase basket statue kettle drum mirror box
place kitchen garden attic library cellar hall shed tower
"""
WORDS = {slot: words for slot, *words in map(str.split, SLOTS.strip().splitlines())}
SHAPES = [
    "There is a {size} {colour} {material} {object} in the {place}.",
    "In the {place} stands a {size} {material} {object}, painted {colour}.",
    "The {object} in the {place} is {size}, {colour} and {material}.",
    "A {colour} {object}, {size} and {material}, waits in the {place}.",
]
QUESTION = "Describe a {size} {colour} {material} {object} in the {place}."


def respond(rng, world):
    """-> (spans of the wrong words, the response); a slot is wrong with probability 0.3."""
    text, errors = "", []
    for part in re.split(r"\{(\w+)\}", rng.choice(SHAPES)):
        if part in WORDS:
            slot, start = part, len(text)
            part = world[slot]
            if rng.random() < 0.3:
                part = rng.choice([word for word in WORDS[slot] if word != part])
                errors.append([start, start + len(part)])
        text += part
    return errors, text


def tiny_data():
    """-> the text of tiny_data.jsonl: 1,500 prompts; of two responses the better one is chosen."""
    rng, seen, lines = random.Random(0), set(), []
    for split, count in {"warmup": 900, "train": 300, "validation": 150, "test": 150}.items():
        while count:
            world = {slot: rng.choice(words) for slot, words in WORDS.items()}
            prompt = QUESTION.format(**world)
            both = sorted([respond(rng, world), respond(rng, world)], key=lambda r: len(r[0]))
            if prompt in seen or len(both[0][0]) == len(both[1][0]):
                continue
            seen.add(prompt)
            count -= 1
            row = {"split": split, "prompt": prompt, "chosen": both[0][1], "rejected": both[1][1]}
            row |= {"chosen_errors": both[0][0], "rejected_errors": both[1][0]}
            if split in ("validation", "test"):
                row["answers"] = [shape.format(**world) for shape in SHAPES]
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def test_tiny_data_is_made_again_bit_for_bit():
    assert (HERE / "tiny_data.jsonl").read_bytes() == tiny_data().encode()


# ---------------------------------------------------------------------------------------- 4 data
# Guards the way from bytes to texts: each format gives exactly its prompt and its responses, no
# kind of file changes a text, no row vanishes, and what cannot be used is named by its place.


def message(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, S, TOOL = (functools.partial(message, r) for r in ("user", "assistant", "system", "tool"))
ASKED = [U("Is it?")]
LONGER = [U("Hi"), A("Hello"), *ASKED]
TEXTS = {"chosen": "Yes.", "rejected": "No."}
ROW = {"prompt": "Is it?", **TEXTS}
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"bird": "crow"}}}]
CALLED = [*ASKED, A("", tool_calls=CALL), TOOL("It is.")]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it?\n\nAssistant:"


def talk(*before):
    """The responses as message lists that begin with these messages."""
    return {side: [*before, A(text)] for side, text in TEXTS.items()}


def hh(before):
    """The responses as text that begins with this text."""
    return {side: before + text for side, text in TEXTS.items()}


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(*rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def read(path, content):
    """-> (prompt, chosen text, rejected text) of the pairs of a file with this content."""
    path.write_bytes(content)
    return [(pair.prompt, pair.chosen.text, pair.rejected.text) for pair in treg.load_pairs(path)]


FORMATS = [  # rows that have their prompt before the responses of TEXTS
    ({"prompt": " Is it?\n", **TEXTS}, [U(" Is it?\n")]),
    ({"instruction": "Add.", "input": "1", **TEXTS}, [U("Add.\n\n1")]),
    ({"prompt": ASKED, "chosen": [A("Yes.")], "rejected": A("No.")}, ASKED),
    ({"prompt": [U([{"text": "Is "}, {"type": "text", "text": "it?"}])], **TEXTS}, ASKED),
    ({"prompt": "Is it?", "messages": [*ASKED, A("Yes.")], **talk(*ASKED)}, ASKED),  # UltraFeedback
    *[({"prompt": text, **talk(*LONGER)}, LONGER) for text in ("Hi\n", "Is it?")],  # two turns
    (talk(S(""), *ASKED), ASKED),
    # nothing that the prompt does not hold
    ({**ROW, "question": "Is it?", "context": "it"}, ASKED),
    ({**ROW, "system": math.nan, "input": " ", "images": [], "query": {}, "label": True}, ASKED),
    (talk(*LONGER), LONGER),
    ({"instruction": "Is it?", "history": [["Hi", "Hello"]], **TEXTS}, LONGER),
    ({"prompt": CALLED, **TEXTS}, CALLED),
    (hh(HH.replace("\n", "\r\n") + " "), LONGER),
    ({"prompt": HH.removesuffix("Assistant:"), **TEXTS}, LONGER),
    ({"prompt": HH + " ", "chosen": " Yes.\n", "rejected": " No."}, LONGER),
    ({"prompt": HH, **hh(HH + " ")}, LONGER),
    (hh("Human: Is it?\nAssistant: "), ASKED),
    ({"prompt": [S("s"), *ASKED], **talk(*ASKED)}, [S("s"), *ASKED]),
    ({"system": "s", "question": "Is it?", **TEXTS}, [S("s"), *ASKED]),  # Orca
    ({"system": "s", **talk(*ASKED)}, [S("s"), *ASKED]),
]


@pytest.mark.parametrize("row, prompt", FORMATS, ids=[str(row)[:70] for row, _ in FORMATS])
def test_format_gives_exactly_its_texts(row, prompt, tmp_path):
    assert read(tmp_path / "p.jsonl", jsonl(row)) == [(prompt, "Yes.", "No.")]


def test_calls_thoughts_tools_spans_answers_and_places_come_along(tmp_path):
    call, tools = A("", tool_calls=CALL, reasoning_content="Hm."), [{"name": "look"}]
    first = {"prompt": ASKED, "chosen": [call], "rejected": "No.", "tools": json.dumps(tools)}
    second = {**ROW, "chosen_errors": [[0, 1], [2, 4]], "answers": "Yes.", "tools": tools}
    third, path = {**ROW, "answers": '["a", "b"]', "chosen_errors": []}, tmp_path / "p.jsonl"
    path.write_bytes(b"\n" + jsonl(first, second, third))
    first, second, third = treg.load_pairs(path)
    assert first.chosen.message == call and first.tools == second.tools == tools
    assert (second.chosen.errors, third.chosen.errors) == ([[0, 1], [2, 4]], [])
    assert (second.answers, third.answers) == (["Yes."], ["a", "b"])
    assert [first.where, second.where] == [f"{path}:2", f"{path}:3"]


GOOD = [{"prompt": f"“{n}”", "chosen": f"{n}, \\ 🙂", "rejected": f'N\n"{n}"'} for n in range(4)]
LINES = [f'“{n}”,"{n}, \\ 🙂","N\n""{n}"""\n' for n in range(4)]
TABLE = "".join(["prompt,chosen,rejected\n", *LINES]).encode()
FILES = [("p.jsonl", jsonl(*GOOD)), ("p.json", json.dumps(GOOD).encode()), ("p.csv", TABLE)]
FILES += [("p.json", jsonl(*GOOD)), ("p[1].parquet", parquet(*GOOD))]


@pytest.mark.parametrize("name, content", FILES, ids=["jsonl", "json", "csv", "lines", "parquet"])
def test_gzip_byte_order_mark_crlf_and_blank_lines_change_nothing(name, content, tmp_path):
    path = tmp_path / name
    right = [([U(row["prompt"])], row["chosen"], row["rejected"]) for row in GOOD]
    assert read(path, content) == right
    if "parquet" not in name:
        assert read(path, codecs.BOM_UTF8 + content) == right, "byte-order mark"
        assert read(path, b"\n \r\n" + content + b"\n\n") == right, "blank lines"
    if "json" in name:  # within a csv cell it would be another text
        assert read(path, content.replace(b"\n", b"\r\n")) == right, "CRLF"
    assert read(tmp_path / f"{name}.gz", gzip.compress(content)) == right


def test_parquet_fills_no_null_into_a_call_and_its_times_become_text(tmp_path):
    """Arrow has one form for all rows: an argument of one call is null in all others."""
    path, at, rows = tmp_path / "p.parquet", datetime.datetime(2026, 1, 2), []
    for arguments in ({"bird": "crow"}, {"n": 7}):
        look = {"name": "look", "arguments": arguments}
        chosen = A("", tool_calls=[{"function": look}])
        rows.append({**ROW, "prompt": U("Is it?", at=at), "chosen": chosen, "tools": [look]})
    path.write_bytes(parquet(*rows))
    for row, pair in zip(rows, treg.load_pairs(path), strict=True):
        assert pair.chosen.message == row["chosen"] and pair.tools == row["tools"]
        assert pair.prompt == [U("Is it?", at="2026-01-02 00:00:00")]


def test_csv_cell_stays_the_text_that_it_is(tmp_path):
    path, right = tmp_path / "p.csv", [([U("null")], "NA", "007")]
    assert read(path, b",prompt,chosen,rejected\n0,null,NA,007\n") == right, "pandas' index"
    assert read(path, b"prompt,chosen,rejected,,\r\nnull,NA,007,,\r\n") == right
    assert read(path, TABLE + b"p,%s,no\n" % (b"7" * 200_000))[-1][1] == "7" * 200_000


def test_data_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    hub = {"train": [ROW], "test": [ROW] * 2}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    assert treg.load_pairs("some/data", "test")[1].where == "some/data:test row 2"
    assert len(treg.load_pairs("some/data")) == 1
    del hub["train"]
    with pytest.raises(treg.UserError, match="--data some/data: no split train, only test"):
        treg.load_pairs("some/data")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: json.loads("off\nline"))
    with pytest.raises(treg.UserError, match="--data some/data: no such file.*Expecting value"):
        treg.load_pairs("some/data")


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    rows = [{**ROW, "split": split} for split in ("train", None, "", "Train", "dev", "dev")]
    rows[0]["source"] = "web"
    rows += [{**ROW, "chosen": ""}, {**ROW, "rejected": A(" \n")}, {**ROW, "chosen": "No."}]
    (tmp_path / "p.jsonl").write_bytes(jsonl(*rows))
    pairs, tokenizer = treg.load_pairs(tmp_path / "p.jsonl"), tokenizer_of()
    encoded = treg.encode(tokenizer, pairs)
    assert (len(pairs), len(encoded)) == (6, 3)
    said = capsys.readouterr().out
    assert "2 pairs dropped: a blank response" in said
    assert "1 pairs dropped: chosen and rejected are the same" in said
    assert "1 rows of split Train" in said and "2 rows of split dev" in said
    assert "columns that are not used: source\n" in said
    longest = max(len(r.prompt_ids) + len(r.ids) for r in treg.sides(encoded[:1]))
    kept = [len(treg.encode(tokenizer, pairs, None, longest - less)) for less in (0, 1)]
    assert kept == [3, 0], "as long as --max-length is not too long"


SIX_WRONG = b"{\n" + jsonl(ROW, *[{**ROW, "chosen": n} for n in range(3)], TEXTS, TEXTS)
MISTAKES = [  # a file's name and content, what the error says after the name
    ("p.txt", b"x", r": .*unknown ending.*\.jsonl"),
    ("p.jsonl", jsonl(ROW) + b'{"prompt": "caf\xe9"}', ":2: .*not UTF-8"),
    ("p.jsonl", b"[" * 100_000, ":1: not valid JSON"),
    ("p.jsonl", b'{"chosen": "a", "chosen": "b"}', ":1: .*chosen stands twice"),
    ("p.jsonl", jsonl(ROW, talk(*ASKED)), ":2: has no prompt column"),
    ("p.jsonl", SIX_WRONG, r":1: .*:3: .*:4: .*:5: .*:6: (?!.*:\d).*1 more, 6 rows in all"),
    ("p.json", b'{"data": []}', ":1: chosen is missing.*found nothing"),
    ("p.json", b'[{"a": 1},\n{"a" 2}\n]', ": not valid json.*line 2"),
    ("p.json", b'[{"a": 1, "a": 2}]', ": not valid json.*a stands twice"),
    ("p.json", b'[{"prompt": "a"}, 7]', ":row 1: .*:row 2: a row is an object"),
    ("p.csv", b"prompt,chosen,rejected\n", ": holds no rows"),
    ("p.csv", b'a,"%s\nb"\nc,d' % (b"b " * 999), ":row 1: chosen is .{,200}$"),
    ("p.csv", b"chosen,prompt,chosen\na,b,c", ": not valid csv.*chosen stands twice"),
    ("p.csv", TABLE + b"p,yes, sir,no", ":row 5: more cells than columns"),
    ("p.csv", TABLE + b'p,"yes,no\n', ": not valid csv .*row 5 .*mend"),
    ("p.csv", TABLE + b"p,caf\xe9,no", ":row 5: .*UTF-8"),
    ("p.jsonl.gz", jsonl(ROW), ": not valid jsonl"),
    ("p.parquet", parquet(ROW)[:-9], ": not valid parquet"),
    ("p.parquet", parquet({**ROW, "chosen": A(b"Yes.")}), ":row 1: chosen must be text"),
]
NONE = dict.fromkeys(ROW)  # takes the columns out
SPANS = [[2, 2]], [[0, 9]], [[-1, 2]], [[0, 1.0]], [[False, 1]], [[1]], [0], 5, "0"
FUNCTIONS = 5, ["f"], [{"function": "f"}], [{"function": {"name": None}}], [{"function": {}}]
CHANGES = [  # what is changed in ROW, how the error goes on after file and line
    *[({side: None}, f"{side} is missing.*found prompt, (chosen|rejected)") for side in TEXTS],
    ({"chosen": A("a", reasoning_content="\ud800")}, ".*must be text.*UTF-8"),
    *[({"chosen": [turn]}, "chosen .*role") for turn in ({"content": "x"}, message("bot", "x"))],
    ({"prompt": [A(False), *ASKED]}, "prompt .*content that is text"),
    ({"prompt": [U([{"type": "image"}])]}, "prompt .*content that is text"),
    ({"chosen": A("x", function_call={"name": "f"})}, "chosen .*not function_call"),
    ({"chosen": ASKED}, "chosen must end"),
    ({**NONE, **talk(*LONGER), "rejected": [*ASKED, *LONGER[1:], A("x")]}, "chosen and .* up to"),
    ({"prompt": HH, "chosen": " x\n\nHuman: And?\n\nAssistant: y"}, "a response holds turns"),
    ({**NONE, **hh("\n\nHuman:\n\nAssistant: ")}, "chosen.* blank"),
    ({"chosen": json.dumps([A("Yes.")], indent=1)}, "chosen is a list turned into text"),
    ({"chosen": str(A("Yes."))}, "chosen is a list turned into text"),
    ({**NONE, **TEXTS, "messages": ASKED}, "has no prompt.*found"),
    ({"prompt": 0}, "prompt must"),
    ({"prompt": LONGER[:2]}, "has no prompt.*found"),
    ({"prompt": "### Response:\n"}, "prompt ends like"),
    ({**talk(*LONGER), "prompt": [U("Hm"), *LONGER[1:]]}, "prompt and the messages before .* say"),
    ({"prompt": [S("s"), *ASKED], "system": "t"}, "has two system messages"),
    ({"prompt": [S("s")], **talk(S("t"), *ASKED)}, "prompt and the messages before the last say"),
    ({"question": "Was it?"}, "prompt and question say different"),
    ({"input": "1, 2"}, "the column input"),
    ({**NONE, **TEXTS, "instruction": "Add.", "input": 5}, "input must be text"),
    ({**NONE, **TEXTS, "instruction": [S(" ")], "input": "1"}, "the column input"),
    *[({"history": history}, "history must be") for history in (LONGER[:2], [["Hi", 5]])],
    ({"system": 5}, "system must be text"),
    ({"context": "It is."}, "the column context would not be seen"),
    ({"images": ["a.png"]}, "the column images would not be seen"),
    ({"chat_template_kwargs": {"thinking": False}}, "the column chat_template_kwargs would not be"),
    ({"messages": [S("Be brief."), *ASKED]}, "the column messages would not be seen"),
    *[({"tools": tools}, "tools must") for tools in FUNCTIONS],
    ({"answers": [4]}, "answers must be a list of texts"),
    ({**NONE, **hh(HH), "chosen_errors": [[0, 1]]}, "chosen_errors would shift"),
    *[({"chosen_errors": spans}, "chosen_errors must be a list") for spans in SPANS],
]
for change, says in CHANGES:
    row = json.dumps({**ROW, **change}).encode()
    MISTAKES.append(("p.jsonl", jsonl(ROW) + row, f":2: {says}"))
IDS = [f"{name}{says}" for name, _, says in MISTAKES]


@pytest.mark.parametrize("name, content, says", MISTAKES, ids=IDS)
def test_mistake_in_the_data_is_named_with_its_place(name, content, says, tmp_path):
    with pytest.raises(treg.UserError) as error:
        read(tmp_path / name, content)
    assert re.match(re.escape(str(tmp_path / name)) + says, str(error.value))
    assert "\n" not in str(error.value), "more than one line"


# ---------------------------------------------------------------------- 5 templates and tokens
# Guards the ids: a prompt is all that the model's own template writes before the words, a response
# is what the model itself would write, no text is lost and none is added. By the structures of real
# chat templates and of real tokenizers (of a few hundred tokens, learned here).

ALL, ENDFOR = "{% for m in messages %}", "{% endfor %}"
USERS = "{% if m['role'] == 'user' %}"
ANSWER = "{% elif m['role'] == 'assistant' %}"
HEAD, OPEN = "<|im_start|>{{ m['role'] }}\n", "{% if add_generation_prompt %}"
ASK = OPEN + "<|im_start|>assistant\n{% endif %}"
CHATML = ALL + HEAD + "{{ m['content'] }}<|im_end|>\n" + ENDFOR + ASK
# the last answer's thoughts are kept, or an empty block is written; earlier ones are dropped
QWEN3 = (
    ALL + HEAD + "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set thoughts = m['reasoning_content'] or parts[:-1] | join | replace('<think>', '') %}"
    "{% if loop.last %}<think>\n{{ thoughts | trim }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% for call in m['tool_calls'] %}{{ '\n' if m['content'] }}"
    "<tool_call>{{ '\n' }}{{ call['function'] | tojson }}\n</tool_call>" + ENDFOR
    + "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n" + ENDFOR + ASK
)  # fmt: skip
TEMPLATES = {
    "SmolLM2": CHATML,
    "Qwen3": QWEN3,
    "Qwen3-Thinking-2507": QWEN3.replace(ASK, ASK.replace("assistant\n", "assistant\n<think>\n")),
    "gpt-oss": ALL + USERS.replace("user", "assistant") + "{% if m['thinking'] %}<|start|>assistant"
    "<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>{% endif %}"
    "{% if m['tool_calls'] %}{% set f = m['tool_calls'][0]['function'] %}<|start|>assistant to="
    "functions.{{ f['name'] }}<|channel|>commentary json<|message|>{{ f['arguments'] | tojson }}"
    "<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% else %}<|start|>{{ m['role'] }}"
    "<|message|>{{ m['content'] }}<|end|>{% endif %}"
    + ENDFOR + OPEN + "<|start|>assistant{% endif %}",
    "DeepSeek-R1-Distill": "<s>" + ALL + USERS + "<｜User｜>{{ m['content'] }}" + ANSWER
    + "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}"
    "{{ m['content'] }}{% endif %}" + ENDFOR + OPEN + "<｜Assistant｜><think>\n{% endif %}",
    "DeepSeek-V3.2": "<s>" + ALL + USERS + "<｜User｜>{{ m['content'] }}" + ANSWER
    + "<｜Assistant｜></think>{{ m['content'] + eos_token }}{% endif %}"
    + ENDFOR + OPEN + "<｜Assistant｜></think>{% endif %}",
    "Mistral Nemo": "<s>{% if messages[0]['role'] == 'system' %}{% set system = messages[0]"
    "['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}" + ALL + USERS
    + "[INST] {{ (system if loop.last and system) ~ m['content'] }}[/INST]" + ANSWER
    + " {{ m['content'] }}</s>{% endif %}" + ENDFOR,
    "SmolLM3": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}<|im_start|>system\n{{ system | default('') | "
    "replace('/no_think', '') | trim }}<|im_end|>\n" + CHATML,
    "Llama 2": "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + ALL + USERS + "<s>[INST] {{ (system if loop.first and system) ~ m['content'] }} [/INST]"
    + ANSWER + " {{ m['content'].strip() }} </s>{% endif %}" + ENDFOR,
    "Gemma": "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}" + ALL + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n" + ENDFOR + OPEN + "<start_of_turn>model\n{% endif %}",
    "Phi-3, first": "<s>" + ALL + USERS + "<|user|>\n{{ m['content'] }}<|end|>\n<|assistant|>\n"
    + ANSWER + "{{ m['content'] }}<|end|>\n{% endif %}" + ENDFOR,
    "SmolVLM": "<|im_start|>" + ALL + "{{ m['role'] | capitalize }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}" + ENDFOR + "<|end|>\n" + ENDFOR + OPEN
    + "Assistant:{% endif %}",
}  # fmt: skip
SPECIAL = "<unk> <s> </s> <|im_start|> <|im_end|> <|start|> <|channel|> <|message|> <|end|> "
SPECIAL += "<|call|> <|return|> <｜User｜> <｜Assistant｜> <|start_header_id|> <|end_header_id|> "
SPECIAL = [*SPECIAL.split(), "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
TEXT = ["Name a bird. A crow. A bat is a bird. The user asks: 1, 22, 333. Give an answer! ünïcode"]
TEXT += ["Be kind.\n\nassistant\nthe cat sat", "<think>\nCrows fly.\n</think>\n\nA crow."]
TOKENIZERS = ["byte-level BPE", "SentencePiece BPE"]


@functools.cache
def trained(kind):
    """A tokenizer of the kind, as `tokenizers` has it."""
    options = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "byte-level BPE":  # GPT-2, SmolLM2, Qwen, Llama 3
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        texts = TEXT
    else:  # with a space before every text: Llama 2, Mistral, TinyLlama, Phi-3
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        raw.normalizer = normalizers.Sequence(steps)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        options["special_tokens"] = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
        texts = [f"▁{word}" for text in TEXT for word in text.split()]  # no piece holds a newline
    raw.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=450, **options))
    return raw


def tokenizer_of(template=CHATML, kind=TOKENIZERS[0], adds_bos=False):
    raw = Tokenizer.from_str(trained(kind).to_str())
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    made.chat_template = TEMPLATES.get(template, template)
    return made


ASK_BIRD, KIND, TALK = U("Name a bird."), S("Be kind."), [U("Hi!"), A("Hello.")]
THOUGHTS = "<think>\nCrows fly.\n</think>\n\nA crow."


def pair_of(chosen="A crow.", prompt=(ASK_BIRD,), rejected="A bat is a bird.", where="x:1", **more):
    tools = more.pop("tools", None)
    both = treg.Response(A(chosen, **more)), treg.Response(A(rejected))
    return treg.Pair([*prompt], *both, where, tools)


def encoded(tokenizer, *args, style=None, errors=None, **fields):
    """-> the chosen response of such a pair."""
    pair = pair_of(*args, **fields)
    pair.chosen.errors = errors
    return treg.encode(tokenizer, [pair], style)[0].chosen


def scored(template, *args, **fields):
    """-> the texts of the prompt and of what is scored, for the chosen response of such a pair."""
    tokenizer = tokenizer_of(template)
    response = encoded(tokenizer, *args, **fields)
    return tuple(tokenizer.decode(ids) for ids in (response.prompt_ids, response.ids))


# Template: (after the user's words, what is scored of a plain answer …; the same of an answer with
# thoughts of its own, where it differs).
IM, R1 = "<|im_end|>\n<|im_start|>assistant\n", "<｜Assistant｜>"
EMPTY, FINAL = "<think>\n\n</think>\n\n", "<|end|><|start|>assistant<|channel|>final<|message|>"
TURNS = {
    "SmolLM2": (IM, "…<|im_end|>"),
    "Qwen3": (IM + EMPTY, "…<|im_end|>", IM, "…<|im_end|>"),
    "Qwen3-Thinking-2507": (
        IM + EMPTY, "…<|im_end|>", IM + "<think>\n", THOUGHTS[8:] + "<|im_end|>"),
    "gpt-oss": (FINAL, "…<|return|>"),
    "DeepSeek-R1-Distill": (R1, "…</s>", R1 + "<think>\n", THOUGHTS[8:] + "</s>"),
    "DeepSeek-V3.2": (R1 + "</think>", "…</s>", R1, "…</s>"),
    "Mistral Nemo": ("[/INST]", " …</s>"),
    "SmolLM3": (IM, "…<|im_end|>"),
    "Llama 2": (" [/INST]", " … </s>"),  # a space belongs to the word that the model writes
    "Gemma": ("<end_of_turn>\n<start_of_turn>model\n", "…<end_of_turn>"),
    "Phi-3, first": ("<|end|>\n<|assistant|>\n", "…<|end|>"),
    "SmolVLM": ("<|end|>\nAssistant:", " …<|end|>"),
    None: ("\n\nAssistant:\n", "…</s>"),
}  # fmt: skip


@pytest.mark.parametrize("template", TURNS)
def test_prompt_is_what_the_template_writes_before_the_words(template):
    turn = TURNS[template]
    for answer, after, words in ("A crow.", *turn[:2]), (THOUGHTS, *turn[-2:]):
        prompt, response = scored(template, answer)
        assert prompt.partition("Name a bird.")[2] == after
        assert response == words.replace("…", answer)


ALWAYS_EMPTY = CHATML.replace("{{ m['c", "{{ '" + EMPTY + "' if m['role'] == 'assistant' }}{{ m['c")


@pytest.mark.parametrize("text", [THOUGHTS, "\n" + THOUGHTS, "<think>Crows fly.</think>A crow."])
@pytest.mark.parametrize("template", [*TEMPLATES, ALWAYS_EMPTY])
def test_own_thoughts_get_no_second_block(template, text):
    whole = "".join(scored(template, text))
    assert (whole.count("<think>"), whole.count("</think>")) == (1, 1), whole


TOOL_CALLED = '<tool_call>\n{"name": "look", "arguments": {"bird": "crow"}}\n</tool_call><|im_end|>'
COMMENTARY = ' to=functions.look<|channel|>commentary json<|message|>{"bird": "crow"}<|call|>'
ANALYSIS = "<|channel|>analysis<|message|>Crows fly." + FINAL
AS_TEXT = [{"function": {"name": "look", "arguments": '{"bird":"crow"}'}}]
# wants arguments as text; writes the head of a next turn always
TEXT_ONLY = CHATML.replace(
    "}}<|im_end|>",
    "}}{% for c in m['tool_calls'] %}{{ c['function']['name']"
    " + c['function']['arguments'] }}{% endfor %}<|im_end|>",
)
CROW, NOTHING = '{"bird": "crow"}', [{"function": {"name": "look", "arguments": "{}"}}]
PRINTS = TEXT_ONLY.replace(" + c", " ~ c")
NAME_AND_TEXT = 'A crow.look{"bird":"crow"}<|im_end|>'
ALWAYS_ASKS = TEMPLATES["gpt-oss"].replace(OPEN, "").removesuffix("{% endif %}")
FIELDS = {  # template, fields of the message, what is scored
    "Qwen3 reasoning": ("Qwen3", {"reasoning_content": "Crows fly."}, THOUGHTS + "<|im_end|>"),
    "gpt-oss thinking": ("gpt-oss", {"thinking": "Crows fly."}, ANALYSIS + "A crow.<|return|>"),
    "Qwen3 words and call": ("Qwen3", {"tool_calls": CALL}, "A crow.\n" + TOOL_CALLED),
    "gpt-oss call": ("gpt-oss", {"chosen": "", "tool_calls": CALL}, COMMENTARY),
    "arguments as JSON": ("gpt-oss", {"chosen": "", "tool_calls": AS_TEXT}, COMMENTARY),
    "no arguments": (
        "gpt-oss",
        {"chosen": "", "tool_calls": NOTHING},
        COMMENTARY.replace(CROW, "{}"),
    ),
    "a template that prints them": (PRINTS, {"tool_calls": AS_TEXT}, NAME_AND_TEXT),
    "a template that wants them so": (TEXT_ONLY, {"tool_calls": AS_TEXT}, NAME_AND_TEXT),
    "always a next turn": (ALWAYS_ASKS, {"chosen": "", "tool_calls": CALL}, COMMENTARY),
}


@pytest.mark.parametrize("template, fields, wanted", FIELDS.values(), ids=FIELDS)
def test_thoughts_and_calls_are_written_by_the_template(template, fields, wanted):
    assert scored(template, **fields)[1] == wanted


def test_tools_are_handed_to_the_template_whatever_they_hold():
    tools = [{"name": 'l"öök'}]
    prompt = scored("{{ tools | tojson }}" + CHATML, tools=tools)[0]
    assert prompt.startswith('[{"name": "l\\"öök"}]<|im_start|>')
    called = [ASK_BIRD, A("", tool_calls=AS_TEXT), TOOL("It is.")]
    assert '"arguments": {"bird": "crow"}}' in scored("Qwen3", prompt=called)[0], "twice JSON"
    odd = A("", tool_calls={"look": "crow"})
    assert treg.parsed(odd) is odd


@pytest.mark.parametrize("template", TURNS)
def test_system_message_is_seen_whatever_the_template(template):
    messages = [KIND, *TALK, ASK_BIRD]
    text, response = scored(template, prompt=messages)
    assert response == TURNS[template][1].replace("…", "A crow.")
    assert all(text.count(message["content"]) == 1 for message in messages)
    if template in ("Gemma", "Phi-3, first"):
        assert re.match(r"<s>\S*user\S*\nBe kind\.\n\nHi!", text), "merged into the user's first"
    if template == "Mistral Nemo":
        assert (
            text.rstrip() == "<s>[INST] Hi![/INST] Hello.</s>[INST] Be kind.\n\nName a bird.[/INST]"
        )


def test_a_switch_for_thoughts_is_no_text_but_a_path_is():
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nName"
    assert scored("SmolLM3", prompt=[S("Be kind. /no_think"), ASK_BIRD])[0].startswith(head)
    dropped = CHATML.replace("m['content']", "m['content'] | replace('/no_think', '')")
    prompt, _ = scored(dropped, "<b>So</b>.", [U("Be <b>s</b> /no_think")], "<b>No</b>.")
    assert prompt.endswith("Be <b>s</b> <|im_end|>\n<|im_start|>assistant\n"), (
        "words without the switch"
    )
    prompt = scored("SmolLM3", prompt=[S("See /bin/no_think."), ASK_BIRD])[0]
    assert "<|im_start|>user\nSee /bin/no_think.\n\nName" in prompt, "else merged: nothing is lost"


@pytest.mark.parametrize("system", ["a bird", "crow"])  # words of the user's, of the response
def test_lost_system_message_is_merged_into_the_users_though_its_words_stand_elsewhere(system):
    for earlier in [], [A("Hello.")]:
        prompt = scored("Phi-3, first", prompt=[S(system), *earlier, ASK_BIRD])[0]
        assert prompt.endswith(f"<|user|>\n{system}\n\nName a bird.<|end|>\n<|assistant|>\n")


CUT = CHATML.replace("m['content']", "m['content'][:9]")  # of a list of parts it writes it all
SWALLOW = CHATML.replace("{{ m['c", "{{ '' if m['role'] == 'assistant' else m['c")
SEVEN = [{"function": {"arguments": {"n": 7}}}]
LOSES = {  # template, the row, what the refusal names
    "thoughts": ("SmolLM2", {"reasoning_content": "Crows fly."}, "reasoning_content"),
    "earlier thoughts": ("Qwen3", {"prompt": [*TALK, A(THOUGHTS), ASK_BIRD]}, "of the assistant"),
    "the response, not a snowman": (SWALLOW, {"prompt": [U("Draw ☃.")]}, "response|assistant"),
    "a second system message": ("Phi-3, first", {"prompt": [KIND, KIND, ASK_BIRD]}, "system"),
    "a role order": ("Gemma", {"prompt": [ASK_BIRD, ASK_BIRD]}, "must alternate"),
    "a call's numbers": ("SmolLM2", {"tool_calls": SEVEN}, "tool_calls"),
    "a function call": ("SmolLM2", {"function_call": {"name": "look"}}, "function_call"),
    "a tool named as a word": ("SmolLM2", {"tools": [{"name": "bird"}]}, "tool"),
    "thoughts, and a system message": (
        "Mistral Nemo",
        {"prompt": [KIND, ASK_BIRD], "reasoning_content": "Crows."},
        "content of",
    ),
    "a text's end": (CUT, {}, "content of the user"),
    "all of it": (ALL + "{{ m['content'] }}" + ENDFOR, {"prompt": [U(" ")]}, "becomes no token"),
}


@pytest.mark.parametrize("template, row, says", LOSES.values(), ids=LOSES)
def test_row_is_refused_where_the_template_would_lose(template, row, says):
    with pytest.raises(treg.UserError, match=f"^x:1: .*{says}"):
        scored(template, **row)


ENDS = "</s> <|im_end|> <|eot_id|> <|end|> <|return|> <end_of_turn> <eos> <｜end▁of▁sentence｜>"
ENDS += " <turn|> [|endofturn|]"


@pytest.mark.parametrize("template", ["SmolLM2", "Llama 2", "Gemma", None])
@pytest.mark.parametrize("end", ENDS.split())
def test_response_gets_exactly_one_end_token(template, end, capsys):
    words = TURNS[template][1].replace("…", "A crow.")
    for after in ("", "\n", "\n\n" + end):
        assert scored(template, "A crow." + end + after)[1] == words
    assert capsys.readouterr().out.count("end token, which was taken off") == 3


def test_end_token_is_the_templates_though_not_marked_special():
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "<turn>"))
    tokenizer.add_tokens(["<turn>"])
    assert encoded(tokenizer).ids[-1] == tokenizer.convert_tokens_to_ids("<turn>")
    tokenizer.chat_template, tokenizer.eos_token = ALL + "{{ m['content'] }}" + ENDFOR, None
    with pytest.raises(treg.UserError, match="no end token"):
        encoded(tokenizer)


def test_a_special_token_that_ends_no_turn_is_not_taken_off(capsys):
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    assert not treg.encode(tokenizer, [pair_of("Run: git add <filename>")])
    assert "1 pairs dropped: holds <filename>" in capsys.readouterr().out
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<filename>")
    tokenizer.pad_token = "<unk>"
    found = encoded(tokenizer, "A crow.<filename><unk><unk>").ids
    assert tokenizer.decode(found) == "A crow.<filename>", "the template's own, and padding"


@pytest.mark.parametrize("text", ["[INST] Hi", "<|user|>\nHi", "<start_of_turn>u", "<|turn>user"])
def test_texts_that_have_been_through_a_template_are_dropped(text, capsys):
    thought = pair_of(reasoning_content=text)
    rows = [pair_of(prompt=[U(text)]), pair_of(text + "A crow."), thought, pair_of("<|im_end|>")]
    assert not treg.encode(tokenizer_of("Qwen3"), rows)
    said = capsys.readouterr().out
    assert "3 pairs dropped: holds" in said and "1 pairs dropped: a blank response" in said


@pytest.mark.parametrize("template", [None, "Gemma"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_written_once(template, adds_bos):
    response = encoded(tokenizer_of(template, adds_bos=adds_bos), style="answer")
    wanted = 1 if template or adds_bos else 0
    for ids in (response.prompt_ids, response.better_ids, response.worse_ids):
        assert ids.tolist().count(1) == wanted and (ids[0] == 1) == bool(wanted)
    assert 1 not in response.ids


ANSWERS = ["A crow.", "1, 22 birds!", "ünï ☃", "A\n\n  crow.\n", " A crow.", "```py\n\tx = 1\n```"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_response_are_the_ids_of_the_whole_conversation(template, kind):
    tokenizer = tokenizer_of(template, kind)
    talks = [ASK_BIRD], [*TALK, ASK_BIRD], [U("☃  b:\n")]
    for talk, answer in itertools.product(talks, ANSWERS):
        messages = [*talk, A(answer)]
        if template == "SmolVLM":
            messages = [treg.as_parts(message) for message in messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = encoded(tokenizer, answer, talk)
        found = [*response.prompt_ids.tolist(), *response.ids.tolist()]
        assert found == whole[: len(found)], (answer, tokenizer.convert_ids_to_tokens(found))
        rest = tokenizer.decode(whole[len(found) :])
        assert not rest.strip(), f"the turn goes on with {rest!r} after what is scored"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_merge_across_the_boundary_changes_one_token(kind):
    tokenizer = tokenizer_of(ALL + "{{ m['content'] }}" + ENDFOR, kind)
    response = encoded(tokenizer, "ame a bird.", [U("A crow.\nN")])
    found = [*response.prompt_ids.tolist(), *response.ids.tolist()[:-1]]
    whole = tokenizer("A crow.\nName a bird.", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found) == "A crow.\nName a bird."
    assert whole != found and whole[-3:] == found[-3:] and whole[:3] == found[:3]


def test_a_response_is_encoded_by_itself_where_all_contexts_merge_with_it():
    """A tokenizer of two characters a token: "abc" and a newline both take the X along."""

    def tokenizer(text, **_):
        return {"input_ids": [text[i : i + 2] for i in range(0, len(text), 2)]}

    tokenizer.is_fast = False
    assert treg.ids_in_context(tokenizer, "abc", "XYZ") == (["XY", "Z"], None)
    assert treg.ids_in_context(tokenizer, "ab ", "XYZ") == ([" X", "YZ"], None), "in its context"


LABELS = {  # template, text, fields
    "trimmed": ("Gemma", "  A crow. ", {}),
    "after a space": ("Llama 2", "A crow.", {}),
    "own thoughts": ("DeepSeek-R1-Distill", THOUGHTS, {}),
    "after the same": ("Qwen3", "A crow.", {"reasoning_content": "A crow."}),
}


@pytest.mark.parametrize("template, text, fields", LABELS.values(), ids=LABELS)
def test_labels_are_on_the_tokens_of_their_words(template, text, fields):
    tokenizer, start = tokenizer_of(template), text.rindex(" crow")
    response = encoded(tokenizer, text, errors=[[start, start + 5]], **fields)
    [wrong] = torch.where(~response.good)
    assert tokenizer.decode(response.ids[wrong]) == " crow"
    after = tokenizer.decode(response.ids[wrong[-1] + 1 :])
    assert re.fullmatch(r"\. ?<[^<>]+>", after), "an earlier crow"


@pytest.mark.parametrize("template", ["Qwen3", "Gemma", "Llama 2", "SmolVLM"])
def test_contrastive_prompts_are_written_like_the_prompt(template):
    tokenizer = tokenizer_of(template)
    response = encoded(tokenizer, THOUGHTS, [KIND, ASK_BIRD], style="revise")
    texts = treg.contrastive_prompts("Name a bird.", THOUGHTS, "revise")
    prompt = tokenizer.decode(response.prompt_ids)
    found = [tokenizer.decode(ids) for ids in (response.better_ids, response.worse_ids)]
    assert found == [prompt.replace("Name a bird.", text) for text in texts]


def test_the_end_token_is_looked_up_once_for_all_pairs(monkeypatch):
    """Of Gemma's 6,000 added tokens a list for every response would take most of the time."""
    calls, special_tokens = [], treg.special_tokens
    monkeypatch.setattr(treg, "special_tokens", lambda t: calls.append(1) or special_tokens(t))
    treg.encode(tokenizer_of(), [pair_of()] * 9)
    assert len(calls) == 2


def test_a_long_run_of_spaces_takes_no_quadratic_time():
    start = time.process_time()
    treg.encode(tokenizer_of(), [pair_of("A" + " " * 20000 + "crow.")])
    assert time.process_time() - start < 2


# ------------------------------------------------------------------------ 6 models and sharing
# Guards that beginnings are shared only where that is exact, and are shared where it is. The oracle
# gives a model one row at a time.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
KINDS = {  # what a small model of these kinds needs besides
    "gptj": {"rotary_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.2},
    "gemma2": {"head_dim": 16},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "recurrent_gemma": {"lru_width": 32},
    "gpt_neo": {"num_layers": 2},
    "ctrl": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512, "dff": 48},
}


def model_of(kind="gpt2", **changes):
    """A model of random weights, large enough to tell right from wrong."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer_of()), **KINDS.get(kind, {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logps_by_hand(model, prompt, response):
    """log π of every response token: the row by itself, and nothing of treg.py."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


def rows_of(x=24, better=4, worse=6, chosen=9, rejected=12):
    """-> the prompts and responses of a pair, of so many tokens, as annotate scores them."""
    ids = torch.randint(3, 60, (5, 99), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = x, better, worse, chosen, rejected
    x, better, worse, chosen, rejected = (row[:n] for row, n in zip(ids, lengths, strict=True))
    return [x, x, x + better, x + better, x + worse, x + worse], [chosen, rejected] * 3


DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG = {"rope_scaling": LONG, "original_max_position_embeddings": 64}
SHARING = [
    *((kind, {}, True) for kind in ("llama", "gpt2", "gptj", "opt", "gemma2", "mixtral")),
    *((kind, {}, False) for kind in ("bloom", "recurrent_gemma")),
    ("gemma2", {"sliding_window": 20}, False),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 200, "max_window_layers": 0}, True),
    ("llama", DYNAMIC, False),
    ("phi3", LONG, False),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, False),  # a window in the tree
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
]


@pytest.mark.parametrize("kind, changes, shares", SHARING)
def test_beginnings_are_shared_where_and_only_where_that_is_exact(kind, changes, shares):
    model, rows = model_of(kind, **changes), rows_of()
    model.shares_prompts = treg.sharing_is_exact(model, *rows)
    assert model.shares_prompts == shares, f"{kind}: {'does not share' if shares else 'shares'}"
    with torch.no_grad():
        logps, mask = treg.response_logps(model, *rows)
        for i, row in enumerate(zip(*rows, strict=True)):
            close(logps[i][mask[i]].double(), logps_by_hand(model, *row), f"{kind}: row {i}", 1e-4)


@pytest.mark.parametrize("fault", ["none", "no mask", "a window", "the last of the tree"])
def test_what_no_rule_knows_of_is_found_by_computing(fault):
    """It ignores the mask; by itself it is wrong from 41 tokens on; its last node is wrong."""
    model, rows = model_of(), rows_of()
    forward = model.forward

    def faulty(input_ids, attention_mask=None, **rest):
        if fault == "no mask":
            attention_mask = None
        if fault == "a window" and attention_mask is None and input_ids.shape[1] > 40:
            input_ids = torch.full_like(input_ids, 5)
        found = forward(input_ids, attention_mask=attention_mask, **rest)
        if fault == "the last of the tree" and attention_mask is not None:
            found.logits[:, -1] = 0
        return found

    model.forward = faulty
    assert treg.sharing_is_exact(model, *rows) == (fault == "none")


@pytest.mark.parametrize("words", ["MPS backend out of memory", "CPU: can't allocate memory"])
def test_a_check_that_runs_out_of_memory_says_nothing_of_the_architecture(words):
    def forward(**_):
        raise RuntimeError(words)

    model = model_of()
    model.forward = forward
    with pytest.raises(RuntimeError, match=words):
        treg.sharing_is_exact(model, *rows_of())


def test_a_window_counts_from_the_rows_that_reach_it_and_for_good(capsys):
    model, tokenizer = model_of("mistral", sliding_window=60), tokenizer_of()
    assert treg.full_attention(model, 60) and not treg.full_attention(model, 61)
    short, long = [pair_of()], [pair_of(), pair_of("A crow. " * 30)]
    for pairs, shares in ((short, True), (long, False), (short, False)):
        treg.annotate(model, tokenizer, pairs, alpha=0.0)
        assert model.shares_prompts == shares
    assert "computed alone" in capsys.readouterr().out
    model = model_of("mistral", sliding_window=60)
    treg.annotate(model, tokenizer, short, alpha=1.0)
    assert not model.shares_prompts, "the contrastive prompts are longer than the prompt, and count"


# --------------------------------------------------------------------------------- 7 log-probs
# Guards section 4: column t is log π of response token t, whatever else is in the batch, in the
# tree or in the architecture.


class Bigram(torch.nn.Module):
    """A model of three tokens, 0 the end, that looks at the last token alone: P(next | last)."""

    def __init__(self):
        super().__init__()
        table = [[0.2, 0.3, 0.5], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1]]
        self.table = torch.nn.Parameter(torch.tensor(table).log())

    def forward(self, input_ids, **_):  # as xLSTM's it knows no logits_to_keep
        return types.SimpleNamespace(logits=self.table[input_ids])


def test_response_logps_by_hand():
    """Response 2 1 0 after 1: P(2|1), P(1|2), P(0|1) = .5, .3, .25. Response 0 after 2 1: .25.

    ∂ log P(next|last) / ∂ logits of last = 1 for next, less P(·|last). After 1 come 2, 0 and 0:
    (2, 0, 1) − 3 (.25, .25, .5). After 2 comes 1: (0, 1, 0) − (.6, .3, .1).
    """
    model = Bigram()
    logps, mask = treg.response_logps(model, [[1], [2, 1]], [[2, 1, 0], [0]])
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]], "the mask covers the response and its end token"
    expected = double([0.5, 0.3, 0.25, 0.25]).log()[0]
    hint = "column t is log π of response token t: is it shifted by one, or of the prompt?"
    close(logps[mask.bool()].double(), expected, hint, 1e-6)
    logps[mask.bool()].sum().backward()
    gradient = [[0.0] * 3, [1.25, -0.75, -0.5], [-0.6, 0.7, -0.1]]
    close(model.table.grad.double(), gradient, "1 for the token, less its probability", 1e-6)


# uneven rows, of which some are equal, begin like another or are its beginning
IN_ONE_BATCH = [
    *([[5, 6], [7, 8, 0]], [[5, 6], [7, 8]], [[5], [6, 7, 8]], [[5, 6], [7, 8, 0]]),
    *([[5, 6], [7, 9]], [[5, 6, 7], [8]], [[9], [7]], [[*range(11, 19)], [5, 6, 7, 8, 9, 10, 0]]),
]


@pytest.mark.parametrize("stem", [[], [3, 4]], ids=["", "stem"])
@pytest.mark.parametrize("large", [0, 512], ids=["by branch", "whole"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "mixtral"])
def test_response_logps_are_those_of_each_row_by_itself(kind, large, stem, monkeypatch):
    """Values, and gradients of a weighting of them, of separate rows and of a shared tree."""
    monkeypatch.setattr(treg, "LARGE_TREE", large)
    model = model_of(kind)
    rows = [[stem + prompt, response] for prompt, response in IN_ONE_BATCH]
    by_hand = [logps_by_hand(model, *row) for row in rows]
    wanted = torch.nn.utils.rnn.pad_sequence(by_hand, batch_first=True)
    weights = torch.linspace(-1, 2, wanted.numel()).view_as(wanted)

    def gradient(logps):
        model.zero_grad()
        (logps * weights).sum().backward()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    exact = gradient(wanted)
    for model.shares_prompts in (False, True):
        where = f"shared {model.shares_prompts}"
        logps, mask = treg.response_logps(model, *zip(*rows, strict=True))
        assert logps.dtype == torch.float32 and torch.equal(mask, wanted != 0)
        assert not logps[~mask].any(), "padding holds zeros"
        close(logps.double(), wanted.detach(), f"{where}: log π", 2e-5)
        assert (gradient(logps) - exact).norm() < 1e-4 * exact.norm(), where


def test_log_softmax_is_float32_where_logits_are_bfloat16():
    """A model in bfloat16, then one in float32 under autocast, as --dtype bf16 has it."""
    model = model_of().bfloat16()
    logps, _ = treg.response_logps(model, [[5, 6, 7]], [[8, 9, 0]])
    logits = model(torch.tensor([[5, 6, 7, 8, 9, 0]])).logits[0, 2:5].float()
    wanted = logits.log_softmax(-1)[[0, 1, 2], [8, 9, 0]]
    close(logps[0].double(), wanted.detach().double(), "log-softmax in float32", 1e-5)
    model, pairs = model_of(), {}
    for dtype in ("fp32", "bf16"):
        pairs[dtype] = treg.annotate(model, tokenizer_of(), text_pairs(1), dtype=dtype, alpha=0)
    exact, rough = (each[0].chosen.ref_logps for each in pairs.values())
    assert rough.dtype == torch.float32 and not torch.equal(rough, rough.bfloat16().float())
    assert 0 < (rough - exact).abs().max() < 1, "products are rounded"
    s = treg.resolve(None, model, dtype="bf16")
    _, metrics, credit = treg.losses(model, pairs["bf16"], s)
    assert not credit.any() and metrics["margin"] == 0, "the reference in the training's precision"


def test_a_shared_prompt_is_computed_once_and_the_head_only_where_a_token_is_predicted():
    """Within a wrapper for several GPUs too: without one DataParallel only hands on."""
    model, nodes, logits = model_of(), [], []
    for part, sizes in ((model.transformer.h[0].mlp, nodes), (model.lm_head, logits)):
        part.register_forward_hook(lambda _, args, out, sizes=sizes: sizes.append(out.shape[1]))
    for model.shares_prompts in (False, True):
        for wrapped in (model, torch.nn.DataParallel(model)):
            treg.response_logps(wrapped, [[5, 6, 7]] * 2, [[8, 9, 0], [8, 4, 0]])
    assert nodes == [5, 5] * 2 + [6] * 2, "5 6 7, 8, 9 and 4; the end is not read"
    assert logits == [3, 3] * 2 + [6] * 2


@pytest.mark.parametrize("kind", ["fp32", "bf16", "checkpointed"])
def test_attention_over_a_large_tree_is_computed_by_branch(kind, monkeypatch):
    """Stem 5 6 7, branches 8 3 and 9: queries × keys 3 × 3, 2 × 5 and 1 × 4 in each of two layers.

    With gradient checkpointing a layer is computed again in the backward pass, in the same way.
    """
    sizes, masks = [], []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if re.search("scaled_dot_product(?!.*backward)", str(operation)):
                sizes.append((args[0].shape[-2], args[1].shape[-2]))
                masks.append(kwargs["attn_mask"].data_ptr())
            return operation(*args, **(kwargs or {}))

    monkeypatch.setattr(treg, "LARGE_TREE", 6)
    model = model_of()
    model.shares_prompts = True
    if kind == "checkpointed":
        treg.checkpoint_layers(model, "")
    with Spy(), torch.autocast("cpu", torch.bfloat16, kind == "bf16", cache_enabled=False):
        for last in (9, 8):  # with 8 3 again there are five nodes, which is not large
            logps, _ = treg.response_logps(model, [[5, 6, 7]] * 2, [[8, 3, 0], [last, 0]])
            logps.sum().backward()
    layers = 4 if kind == "checkpointed" else 2
    assert sizes == [(3, 3), (2, 5), (1, 4)] * layers + [(5, 5)] * layers
    assert masks[:3] == masks[3:6], "a layer that had its own would keep them for the gradient"
    mask = treg.TreeMask.of(torch.zeros(1, 1, 2, 2), [2, 2])
    assert mask[:, :, :, :2] is mask, "all of it, as transformers 4 takes it"
    others = mask[:, :, :1], mask + 1, mask + torch.zeros(1, 2, 2, 2)
    assert {type(other) for other in others} == {torch.Tensor}, "what is made of it is no mask"


@pytest.mark.parametrize("kind, bytes_of_width", [("fp32", 84), ("bf16", 57), ("checkpointed", 4)])
def test_a_pass_keeps_for_its_gradient_what_the_readme_says(kind, bytes_of_width):
    """A token of a layer in the shape of Llama: so many bytes times the width. A logit: 4 bytes."""

    def kept(layers=1, vocabulary=512, tokens=90):
        wide = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
        model = model_of("llama", **wide, num_hidden_layers=layers, vocab_size=vocabulary)
        model.shares_prompts = True
        if kind == "checkpointed":
            treg.checkpoint_layers(model, "")
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        prompts, responses = rows_of(x=tokens, chosen=tokens, rejected=tokens)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, kind == "bf16", cache_enabled=False):
            logps, _ = treg.response_logps(model, prompts[:2], responses[:2])
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        return sum(sizes[at] for at in sizes.keys() - weights)

    if kind != "bf16":  # which keeps a rounded copy of the head too
        assert (kept(vocabulary=1024) - kept()) / 512 / 180 == pytest.approx(4, rel=0.02)
    layer, half = (kept(2, tokens=n) - kept(1, tokens=n) for n in (90, 45))
    assert (layer - half) / 135 / 256 == pytest.approx(bytes_of_width, rel=0.05)


# ---------------------------------------------------------------------------------- 8 training
# Guards sections 5 and 6: what annotate writes, which pairs are in a step, and that a step is
# exactly the one of the paper: mean gradient, clipped, AdamW, at the rate of this step.


def text_pairs(count=7):
    """Pairs of texts of uneven lengths."""
    pairs = []
    for i in range(count):
        prompt = [U("Say " * (1 + i % 3) + str(i))]
        pairs.append(pair_of(f"It is {i}." * (1 + i % 2), prompt, f"No {7 * i}!", f"pair {i}"))
    return pairs


def annotated(model):
    """Annotated pairs. Their references are moved: else margins, and so many mistakes, are 0."""
    pairs = treg.annotate(model, tokenizer_of(None), text_pairs())
    torch.manual_seed(1)
    for response in treg.sides(pairs):
        response.ref_logps = response.ref_logps - torch.rand(len(response.ids))
        response.token_rewards = torch.rand(len(response.ids)) - 0.5
    return pairs


def test_annotate_writes_the_reference_and_the_token_rewards_of_the_contrastive_prompts():
    """Of the model itself or of a reward model; the same whatever shares a forward pass."""
    model, other, tokenizer = model_of(), model_of("llama"), tokenizer_of(None)
    for scorer, tokens in ((None, 1), (None, 4096), (other, 4096)):
        texts, style = text_pairs(3), {"prompts": "revise", "pass_tokens": tokens}
        pairs = treg.annotate(model, tokenizer, texts, reward_model=scorer, **style)
        assert texts[0].chosen.ids is None, "the caller's pairs are left as they are"
        for response in treg.sides(pairs):
            names = ("ids", "prompt_ids", "better_ids", "worse_ids")
            ids, x, *both = (getattr(response, name).tolist() for name in names)
            with torch.no_grad():
                wanted = logps_by_hand(model, x, ids)
                better, worse = (logps_by_hand(scorer or model, prompt, ids) for prompt in both)
            close(response.ref_logps.double(), wanted, "log π_ref", 1e-4)
            hat = torch.sigmoid(better - worse) - 0.5
            close(response.token_rewards.double(), hat, "r̂ of this response", 1e-4)
            assert response.text in tokenizer.decode(both[1]), "revise shows its own response"
    plain = treg.annotate(model, tokenizer, text_pairs(3), alpha=0)
    assert not any(r.token_rewards.any() for r in treg.sides(plain)), "alpha 0 needs none"
    longer = text_pairs(2)
    longer[0].chosen.message["content"] *= 100
    kept = treg.annotate(model, tokenizer, longer)
    assert [pair.where for pair in kept] == ["pair 1"], "the model has 512 positions"
    bare = treg.encode(tokenizer, text_pairs(1))
    with pytest.raises(treg.UserError, match="without contrastive prompts"):
        treg.annotate(model, tokenizer, bare)
    [sft] = treg.annotate(model, tokenizer, bare, token_rewards="sft")  # which needs none
    assert sft.chosen.token_rewards.all() and not sft.rejected.token_rewards.any()
    assert bare[0].chosen.ref_logps is None, "encoded pairs are left as they are too"
    assert treg.annotate(model, tokenizer, [], prompts="revise") == []


def test_what_stays_of_a_pass_is_made_before_all_passes(monkeypatch):
    """Else small tensors that stay lie between large ones that go, and the heap only grows."""
    made, make_room, model = [], treg.make_room, model_of()
    monkeypatch.setattr(treg, "make_room", lambda *args: made.append(args[1:]) or make_room(*args))
    pairs = treg.annotate(model, tokenizer_of(None), text_pairs(), pass_tokens=1)
    treg.measure(model, pairs, treg.resolve(None, model, pass_tokens=1))
    assert made == [("ref_logps", "token_rewards"), ("credit",)], "once, not for every pass"
    room = pairs[0].chosen.ref_logps
    treg.unstacked([pairs[0].chosen], "ref_logps", torch.full((1, len(room)), 7.0))
    assert pairs[0].chosen.ref_logps is room and (room == 7).all(), "written into, not replaced"


def test_variants_and_controls_write_their_token_rewards_and_leave_the_pairs_as_they_were():
    pairs = annotated(model_of())
    before = [response.token_rewards.tolist() for response in treg.sides(pairs)]

    def changed(kind, pairs=pairs, seed=0):
        found = treg.sides(treg.change_rewards(pairs, kind, seed))
        return [response.token_rewards.tolist() for response in found]

    assert changed("sft") == [[float(i < 7)] * len(hat) for i, hat in enumerate(before)]
    assert changed("swapped") == [[-value for value in hat] for hat in before]
    shuffled = changed("shuffled")
    assert [*map(sorted, shuffled)] == [*map(sorted, before)], "within the response"
    assert all(new != old for new, old in zip(shuffled, before, strict=True))
    assert changed("shuffled", pairs[:2])[:2] == shuffled[:2], "the first by the seed alone"
    assert changed("shuffled", seed=1) != shuffled, "another seed, another order"
    assert changed("contrastive") == before, "the caller's pairs"


def loss_by_hand(model, pair, s):
    """-> (L, the metrics) of a pair, from log-probs of its own rows, in the model's precision."""
    sums, told, agreement = [], {}, 0
    for side in ("chosen", "rejected"):
        response = getattr(pair, side)
        logps = logps_by_hand(model, response.prompt_ids.tolist(), response.ids.tolist())
        dpo = s.algorithm == "dpo"
        reward = s.beta * (logps - response.ref_logps if dpo else logps / len(logps))
        sums.append(reward.sum())
        agreement = agreement + (response.token_rewards * reward).sum()
        told[f"{side}_logps"] = logps.sum().item()
    z = sums[0] - sums[1] - s.gamma
    w = torch.sigmoid(-z).item() if s.weighting == "sequence" else 0.5
    loss = -torch.nn.functional.logsigmoid(z) - s.alpha * w * agreement
    told |= {"loss": loss.item(), "margin": z.item(), "accuracy": float(z + s.gamma > 0)}
    return loss, told | {"weight": w, "agreement": agreement.item()}


# gradients near AdamW's ε, never clipped, so that scale tells; often clipped; the other algorithm
STEPS = {
    "tiny": ({"beta": 1e-7, "lr": 1e-2}, 10**6),
    "large": ({"beta": 0.5, "lr": 1e-3, "weighting": "static"}, 1),
    "simpo": ({"beta": 2.0, "lr": 1e-3, "algorithm": "simpo", "gamma": 0.5}, 64),
}


@pytest.mark.parametrize("case", STEPS)
def test_an_optimiser_step_by_hand(case):
    """Seven pairs in batches of 4 and 3, ten steps, a warm-up of one, against float64.

    g: mean gradient of the batch's pairs, times min(1, 1 / ‖g‖).
    m = .9 m + .1 g,  v = .999 v + .001 g²,  step k from 1: m / (1 − .9ᵏ), v / (1 − .999ᵏ)
    weights −= rate · m̂ / (√v̂ + 1e-8); rate / peak: 1, then ½ + ½ cos(π j / 9) for j = 0 … 8.
    """
    changes, pass_tokens = STEPS[case]
    model = model_of("llama", num_hidden_layers=1)
    pairs = annotated(model)
    s = treg.resolve(None, model, alpha=0.5, epochs=5, batch_size=4, seed=1, **changes)
    exact = copy.deepcopy(model).double()
    weights = [*exact.parameters()]
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)  # of a loss that somebody looked at in a notebook
    history = treg.train(model, pairs, s, pass_tokens=pass_tokens)

    theta = torch.nn.utils.parameters_to_vector(weights).detach()
    m = v = 0
    for k, (batch, row) in enumerate(zip(treg.batches(pairs, s), history, strict=True), 1):
        losses, metrics = zip(*[loss_by_hand(exact, pair, s) for pair in batch], strict=True)
        gradients = torch.autograd.grad(sum(losses) / len(batch), weights)
        g = torch.nn.utils.parameters_to_vector(gradients)
        rate = s.lr * (1.0 if k == 1 else 0.5 + 0.5 * math.cos(math.pi * (k - 2) / 9))
        told = {name: np.mean([each[name] for each in metrics]) for name in metrics[0]}
        told |= {"step": k, "grad_norm": g.norm().item(), "lr": rate}
        assert row == pytest.approx(told, rel=2e-3, abs=1e-6), case
        g = g / max(1.0, g.norm())
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        theta -= rate * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        torch.nn.utils.vector_to_parameters(theta, weights)
    norms = [row["grad_norm"] for row in history]
    as_it_should_be = {"tiny": max(norms) < 1e-5, "large": norms[2] > 1}
    assert as_it_should_be.get(case, True), f"another case than it says: gradient norms {norms}"
    found = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (found - theta).abs().max() < 5e-3 * s.lr, f"{case}: another weight after ten steps"


def test_an_epoch_has_every_pair_once_in_an_order_of_its_own():
    orders = []
    for seed in (0, 1):
        batches = [*treg.batches(range(7), treg.Settings(seed=seed, epochs=5, batch_size=4))]
        assert [len(batch) for batch in batches] == [4, 3] * 5
        orders += [(*batches[i], *batches[i + 1]) for i in range(0, 10, 2)]
    assert all(sorted(order) == [*range(7)] for order in orders)
    assert len({*orders}) == 10, "each epoch of each seed its own order"


def test_what_would_train_on_something_else_in_silence_is_refused(tmp_path):
    model, tokenizer = model_of(num_hidden_layers=1), tokenizer_of(None)
    texts, plain = text_pairs(), treg.annotate(model, tokenizer, text_pairs(), alpha=0)
    train = functools.partial(treg.train, model, plain, out=tmp_path)
    train(alpha=0)
    train(alpha=0, pass_tokens=1, save_every=1)  # which change no step
    for call, says in (
        (lambda: treg.train(model, texts), "not annotated"),
        (lambda: treg.evaluate(model, tokenizer, texts), "not annotated"),
        (train, "annotate with alpha above 0"),
        (lambda: treg.train(model, []), "no pairs"),
        (lambda: treg.annotate(model, tokenizer, plain, prompts="revise"), "annotated already"),
        (lambda: train(alpha=0, beta=1.0, seed=1), "is of another beta, seed; give another out"),
        (lambda: treg.train(model.bfloat16(), plain, alpha=0), "half precision"),
    ):
        with pytest.raises(treg.UserError, match=says):
            call()


def test_schedule_warms_up_then_falls_to_zero():
    """20 steps: 2 of warm-up at ½ and 1, then ½ + ½ cos(π k / 18)."""
    shares = [treg.schedule(step, 20) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[11] == pytest.approx(0.5)
    assert shares[19] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 18))
    assert treg.schedule(0, 1) == 1.0


@pytest.mark.parametrize("at", [3, 4], ids=["a loss of NaN", "weights of the last step"])
def test_divergence_names_the_pairs_and_keeps_the_last_good_checkpoint(at, tmp_path, monkeypatch):
    model = model_of()
    pairs, s = annotated(model), treg.Settings(epochs=1, batch_size=2, save_every=2)
    batch = [*treg.batches(pairs, s)][2]
    if at == 3:
        batch[0].chosen.ref_logps *= math.nan
    else:
        monkeypatch.setattr(treg, "schedule", lambda step, total: math.inf if step == 3 else 1.0)
    with pytest.raises(treg.UserError, match=rf"step {at}:.*checkpoint\.pt.* step 2") as found:
        treg.train(model, pairs, s, str(tmp_path))
    assert at == 4 or all(pair.where in str(found.value) for pair in batch)
    state = treg.read(tmp_path / "checkpoint.pt")
    assert len(state["history"]) == 2 and all(w.isfinite().all() for w in state["model"].values())


# -------------------------------------------------------------------------------- 9 evaluation
# Guards section 8 and the figures of 10: each is shown against a world whose right values a pencil
# gives.

VOCABULARY = ["<end>", "<unk>", "User:", "Assistant:", "a", "b", "c", "d"]
TRAINED = [1 / 16, 1 / 96, 1 / 96, 1 / 96, 1 / 2, 1 / 4, 1 / 8, 1 / 32]


def pencil_world():
    """-> (model, tokenizer, annotated pairs): a GPT-2 whose next token does not look back.

    The reference gives every word ⅛. Then the model has learned TRAINED: the credit of a, b, c, d
    and the end is 2, 1, 0, −2 and −1, in units of ln 2.
    """
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **ends)
    model = model_of(hidden_size=8, vocab_size=8, eos_token_id=0, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(8)[0])  # the last state, whatever was read
        model.lm_head.weight.zero_()
    texts = ("a b", "c d"), ("b a", "a b"), ("d a c c", "a b d")
    pairs = [pair_of(chosen, [U("a")], rejected) for chosen, rejected in texts]
    for pair in pairs:
        pair.answers = ["a", "b a\n"]
    pairs[2].chosen.errors, pairs[2].rejected.errors = [[0, 1], [4, 5]], [[0, 1]]
    pairs = treg.annotate(model, tokenizer, pairs)
    model.lm_head.weight.data[:, 0] = torch.tensor(TRAINED).log()
    return model, tokenizer, pairs


def test_metrics_of_evaluate_by_hand(monkeypatch):
    """In units of ln 2, β = 1.

    R = 2 + 1 − 1 = 2 against 0 − 2 − 1 = −3: z = 5, right. The same R: z = 0, a tie.
    R = −2 + 2 + 0 + 0 − 1 = −1 against 2 + 1 − 2 − 1 = 0: z = −1, wrong. Accuracy ½, mean z 4/3.
    Chosen d a c c, d and the first c are errors: good 2, 0 against bad −2, 0: 3½ of 4. Rejected
    a b d, a is the error: 1, −2 against 2: 0 of 2. The end is in neither. Mean 7/16.
    r̂ is .2 for a, .3 for the end, else −.1: good a, c against bad d, c: 3 of 4; 0 of 2. Mean 3/8.
    """
    model, tokenizer, pairs = pencil_world()
    for response in treg.sides(pairs):
        response.token_rewards = torch.tensor([0.3, 0, 0, 0, 0.2, -0.1, -0.1, -0.1])[response.ids]
    texts = ["a", "b", "b a ", "a b", "c", "c", "c", "c", "a", "a", "b", "b"]
    asked = []
    monkeypatch.setattr(treg, "sample", lambda *args, **_: asked.append(args[2:]) or texts)
    found, shown = treg.evaluate(model, tokenizer, pairs, beta=1.0, seed=5)
    [(of, seed)] = asked
    assert [pair.chosen.text for pair in of][3:9] == ["a b", *["b a"] * 4, "d a c c"] and seed == 5
    wanted = {"accuracy": 0.5, "margin": 4 / 3 * math.log(2), "score": (2 + 0 + 2) / 12}
    wanted |= {"credit_auroc": 7 / 16, "token_reward_auroc": 3 / 8}
    assert found == pytest.approx(wanted, abs=1e-6)
    assert [pair.correct for pair in shown] == [1.0, 0.5, 0.0]
    assert [pair.score for pair in shown] == [0.5, 0.0, 0.5] and shown[0].samples == texts[:4]
    credit = torch.tensor([-2.0, 2, 0, 0, -1]) * math.log(2)
    assert torch.allclose(shown[2].chosen.credit, credit, atol=1e-6)
    assert pairs[0].chosen.credit is None and pairs[0].score is None, "the caller's pairs"
    for pair in pairs:
        pair.answers = pair.chosen.good = pair.rejected.good = None
    bare, shown = treg.evaluate(model, tokenizer, pairs, algorithm="simpo")
    assert torch.allclose(shown[2].chosen.credit, credit, atol=1e-6), "of SimPO as of DPO"
    assert bare["score"] is bare["credit_auroc"] is bare["token_reward_auroc"] is None


def test_pairs_with_a_token_of_probability_zero_are_dropped():
    model, tokenizer, pairs = pencil_world()
    model.lm_head.weight.data[VOCABULARY.index("c"), 0] = -math.inf
    assert [pair.chosen.text for pair in treg.annotate(model, tokenizer, pairs)] == ["b a"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_shown_as_they_are(kind):
    """Transformers 4 takes the space before a comma away, as Llama 3's tokenizer asks it to."""
    tokenizer, text = tokenizer_of(kind=kind), "A crow , a bat ünï 字🙂." * 299
    tokenizer.clean_up_tokenization_spaces = True
    start = time.process_time()
    texts = treg.token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(texts).replace("◌", "") == text
    assert time.process_time() - start < 2, "the square of their number"


def test_pair_accuracy_by_hand():
    """Mean r̂ higher, lower, a tie: ½. Wilson: ± z √(¼ / 3 + z² / 36) / (1 + z² / 3), z = 1.96."""
    pairs = text_pairs(3)
    rewards = (([0.4], [0.1, 0.3]), ([0.0], [0.2]), ([0.1], [0.1]))
    for pair, both in zip(pairs, rewards, strict=True):
        pair.chosen.token_rewards, pair.rejected.token_rewards = map(torch.tensor, both)
    half = 1.95996 * math.sqrt(0.25 / 3 + 3.84146 / 36) / (1 + 3.84146 / 3)
    assert treg.pair_accuracy(pairs) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)


def test_the_page_by_hand():
    """A token of half its scale has half of the full tint, .35: blue above 0 and orange below.

    Steps 1, 2 and 3 lie at x = 60 + 250 step / 3; values 1, 2 and 5 at y = 160 − 145 (v − 1) / 4.
    """
    for value, ink in (0.25, treg.BLUE), (-0.25, treg.ORANGE):
        box = treg.token_box("<a>", value, 0.5, error=value < 0)
        assert f"rgb({ink} / 0.35)" in box and f'title="{value:+.3f}"' in box and "&lt;a&gt;" in box
        assert ("error" in box) == (value < 0)
    history = [{"step": step, "loss": loss} for step, loss in ((1, 1.0), (2, 2.0), (3, 5.0))]
    drawn = treg.figure("a title", ["loss", "none"], {"a run": history})
    assert 'points="143.3,160.0 226.7,123.8 310.0,15.0"' in drawn and "a run, loss" in drawn
    model, tokenizer, pairs = pencil_world()
    _, pairs = treg.measure(model, pairs[2:], treg.resolve(None, model))
    layers = {"r̂": (pairs, "token_rewards"), "learned": (pairs, "credit")}
    page = treg.credit_map(pairs, tokenizer, layers)
    assert page.count('class="token error"') == 2 * 3, "d, c and a, in both layers"
    assert f"rgb({treg.ORANGE} / 0.70)" in page, "the largest credit, −2 ln 2, has the full tint"
    assert f"Σ {-math.log(2):+.3f}" in page, "−2 + 2 + 0 + 0 − 1, in units of ln 2"


def test_credit_auroc_by_hand():
    """Good 3, 1, 2 against bad 1, 2: 3 beats both, 1 ties one, 2 beats one and ties one: 4 of 6."""
    assert treg.credit_auroc([3, 1, 1, 2, 2], [1, 1, 0, 0, 1]) == pytest.approx(4 / 6)
    assert math.isnan(treg.credit_auroc([1, 2], [True, True]))
    assert math.isnan(treg.credit_auroc([1, 2], [False, False]))


def test_samples_follow_the_models_own_distribution_and_no_generation_config():
    """Up to the end token, without it; of 3,000 the first word has its share ± 4 standard errors.

    The number of words is k with (15/16)^k / 16, cut at two words and eight more: mean 6.6.
    """
    model, tokenizer, pairs = pencil_world()
    own, state = model.generation_config, torch.get_rng_state()
    texts = treg.sample(model, tokenizer, pairs[:1] * 3000, 0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers"
    rows = [text.split() for text in texts]
    firsts = [row[0] if row else "<end>" for row in rows]
    for word, share in zip(VOCABULARY, TRAINED, strict=True):
        error = 4 * math.sqrt(share * (1 - share) / 3000)
        assert firsts.count(word) / 3000 == pytest.approx(share, abs=error), word
    assert not any("<end>" in row for row in rows)
    assert max(map(len, rows)) == 3 + 8, "as many as the longest chosen response, and eight"
    mean = sum((15 / 16) ** k for k in range(1, 12))
    assert np.mean([len(row) for row in rows]) == pytest.approx(mean, abs=0.3)
    few = pairs[:1] * 128
    assert texts[:128] != treg.sample(model, tokenizer, few, 1), "another seed"
    odd = {"min_p": 0.9, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "stop_strings": ["a"]}
    odd |= {"max_new_tokens": 2, "num_return_sequences": 2, "return_dict_in_generate": True}
    for name, value in odd.items():
        setattr(own, name, value)
        assert texts[:128] == treg.sample(model, tokenizer, few, 0), name
    assert model.generation_config is own, "its own settings come back"
    own.eos_token_id = VOCABULARY.index("a")
    texts = treg.sample(model, tokenizer, few, 0)
    assert not any("a" in text.split() for text in texts), "its own end token is one too"


def test_samples_do_not_depend_on_the_padding_of_their_prompts():
    """A model that is all but certain says the same by itself and beside a longer prompt.

    One that is quite uncertain uses all tokens, not the 50 likeliest (the library's default).
    """
    model, tokenizer = model_of(tie_word_embeddings=False), tokenizer_of(None)
    model.lm_head.weight.data *= 1000
    pairs = treg.encode(tokenizer, text_pairs(4))
    together = treg.sample(model, tokenizer, pairs, 0, more=0)
    assert len({*together}) == 4
    most = max(len(pair.chosen.ids) for pair in pairs)
    for pair, text in zip(pairs, together, strict=True):
        more = most - len(pair.chosen.ids)
        assert treg.sample(model, tokenizer, [pair], 0, more=more) == [text]
    model.lm_head.weight.data.zero_()
    texts = treg.sample(model, tokenizer, pairs * 50, 0)
    assert len({*"".join(texts)}) > 60


def test_interval_by_hand():
    """Seeds alone differ, 1 to 5: 3 ± t(4) √(2.5 / 5). Prompts alone, 0 or 1: ½ ± t(29) s / √30.

    Both, 0 to 4: the mean squares are 12½ and 12½, 4 ± t(25² / (2 · 12½² / 4) = 8) √(25 / 25).
    What is left, ±1 in turn, has the mean square 120 / 87, more than the prompts' 30 / 29. It takes
    nothing off them, but 1.034² / (1.034² / 29 + 1.379² / 87) = 18.2 degrees of freedom are left:
    ½ ± t(18.2) s / √30. By itself it is no spread of seeds or of prompts, so there is none.
    """
    mean, low, high = treg.interval(np.arange(1, 6)[:, None] * np.ones((1, 7)))
    assert (mean, high - mean) == pytest.approx((3, 2.776 * math.sqrt(0.5)), abs=1e-3)
    prompts, left = np.ones((4, 1)) * (np.arange(30) % 2), (-1.0) ** np.indices((4, 30)).sum(0)
    for values, t in (prompts, 2.045), (prompts + left, 2.100):
        half = t * math.sqrt(30 / 4 / 29 / 30)
        assert treg.interval(values) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-3)
    both = treg.interval(np.add.outer(range(5), range(5)))
    assert both == pytest.approx((4, 4 - 2.306, 4 + 2.306), abs=1e-3)
    assert treg.interval(left) == (0, 0, 0)
    assert treg.interval(np.full((2, 2), 0.25)) == (0.25, 0.25, 0.25)
    assert math.isnan(treg.interval(np.ones((1, 5)))[1])


def test_table_by_hand():
    """Scores .5, .7, .6, .6 over four seeds: mean .6, standard error √(.02 / 3) / √4 = .041.

    By seed the two prompts differ from DPO by (1, 0), (−1, 0), (1, 1), (0, 0): .25, ahead in two.
    From SimPO by (1, 0) each: .5, and no spread over seeds.
    """

    def results(name, algorithm, alpha, scores, each):
        row = {"variant": name, "algorithm": algorithm, "alpha": alpha, "accuracy": 9.0}
        row |= {"credit_auroc": 0.75, "token_reward_auroc": None}
        for seed, (score, right) in enumerate(zip(scores, each, strict=True)):
            yield {**row, "seed": seed, "score": score, "each": dict(zip("ab", right, strict=True))}

    low = [[0, 1], [1, 1], [0, 0], [0, 0]]
    high = [[1, 1], [0, 1], [1, 1], [0, 0]]
    rows = [*results("DPO", "dpo", 0.0, [0.5, 0.7, 0.6, 0.6], low)]
    rows += results("DPO-REG", "dpo", 0.25, [0.75] * 4, high)
    rows[0]["each"]["c"] = rows[4]["each"]["d"] = 1  # the other's longer prompts have dropped it
    rows += results("plain SimPO", "simpo", 0.0, [0.5] * 4, [[0, 1]] * 4)
    rows += results("SimPO-REG", "simpo", 0.25, [0.5] * 4, [[1, 1]] * 4)
    head, *lines = treg.table(rows).splitlines()
    assert head.split() == ["score", "credit", "minus", "base", "(95", "%)", "ahead"]
    assert lines[0].split() == ["DPO", "0.600±0.041", "0.750"]
    assert lines[1].split()[:4] == ["DPO-REG", "0.750±0.000", "0.750", "+0.250"]
    assert lines[1].endswith("  2 of 4") and lines[2].split()[:2] == ["plain", "SimPO"]
    assert "+0.500 (" in lines[3] and lines[3].endswith("  4 of 4")
    shuffled = [rows[i] for i in (4, 6, 5, 7, 3, 1, 0, 2)]
    assert {*treg.table(shuffled).splitlines()} == {*treg.table(rows[:8]).splitlines()}
    assert "±" not in treg.table(rows[:1]), "one seed has no standard error"


# ----------------------------------------------------------------------------------- 10 the run
# Guards section 11: a run that dies anywhere goes on to the same end, files are whole, nothing in
# a file is executed, and a mistake is one line.
TEMPORARY = tempfile.TemporaryDirectory()


@functools.cache
def model_folder(kind="gpt2", dtype=torch.float32, **changes):
    folder = tempfile.mkdtemp(dir=TEMPORARY.name)
    model_of(kind, num_hidden_layers=1, **changes).to(dtype).save_pretrained(folder)
    tokenizer_of(None).save_pretrained(folder)
    return Path(folder)


@functools.cache
def data_file():
    rows = []
    for pair in text_pairs(25):
        rows.append({"prompt": pair.prompt[0]["content"], "chosen": pair.chosen.text})
        rows[-1] |= {"rejected": pair.rejected.text, "rejected_errors": [[0, 2]]}
    path = Path(tempfile.mkdtemp(dir=TEMPORARY.name), "pairs.jsonl")
    path.write_bytes(jsonl(*rows))
    return path


def words(out, *more, model=None, data=None):
    """The command line of a run of 21 pairs and 12 steps; the last of an epoch has one pair."""
    line = ["--model", model or model_folder(), "--data", data or data_file()]
    line += ["--out", out] if out else []
    line += ["--holdout", 4, "--batch-size", 4, "--epochs", 2, "--lr", 1e-3, "--save-every", 2]
    return [*line, *more]


def command(*argv):
    """-> (exit status, all that is printed)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = treg.main([str(word) for word in argv])
    return status, said.getvalue()


def done(*argv):
    status, said = command(*argv)
    assert status == 0, said
    return said


def refusal(*argv):
    """The command must end in status 2 and say why in one line, the last. -> that line"""
    status, said = command(*argv)
    *_, line = said.splitlines() or [""]
    assert status == 2 and line.startswith("treg.py: error: "), f"{status}: {said}"
    assert said.count("treg.py: error") == 1 and len(line) < 600, said
    return line.removeprefix("treg.py: error: ")


def history(out, name="metrics.jsonl"):
    return [json.loads(line) for line in Path(out, name).read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN


def end_of(out):
    """What two runs that are the same have in common, to the last bit."""
    weights = {name: w.tolist() for name, w in load_file(out / "model.safetensors").items()}
    return history(out), weights, summary_of(out)["after"], {path.name for path in out.iterdir()}


@functools.cache
def straight():
    """The folder of a run that nothing interrupts."""
    out = Path(TEMPORARY.name, "straight")
    done(*words(out))
    return out


def killed(owner, name, at, *argv):
    """Run in a process that ends without a word before call number `at`; half through a save."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            original, calls = getattr(owner, name), itertools.count(1)

            def dying(*args, **kwargs):
                if next(calls) < at:
                    return original(*args, **kwargs)
                if name == "save":  # torch.save(state, file)
                    args[1].write(b"PK half of it")
                    args[1].flush()
                return os._exit(9)

            setattr(owner, name, dying)
            command(*argv)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WEXITSTATUS(status) == 9, f"{name} was not called {at} times"


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was killed before step 4; two steps are saved."""
    killed(treg, "take_step", 4, *words(tmp_path / "stopped"))
    return tmp_path / "stopped"


def goes_on(out):
    done("--resume", out)
    assert end_of(out) == end_of(straight())


# where it dies, and how many steps are saved then; None: data and model are still needed
KILLS = {
    "in its first write": (os, "replace", 1, None),
    "the annotated pairs are half written": (torch, "save", 1, None),
    "before the second step": (treg, "take_step", 2, 0),
    "a checkpoint is half written": (torch, "save", 3, 2),
    "the model is saved, the summary not": (treg, "report", 1, 12),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(where, tmp_path):
    *place, saved = KILLS[where]
    out, data = tmp_path / "out", shutil.copy(data_file(), tmp_path)
    model = shutil.copytree(model_folder(), tmp_path / "m")
    argv = words(out, model=model, data=data)
    killed(*place, *argv)
    if saved is not None:
        shutil.rmtree(model)
        os.unlink(data)
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')  # cut off
        killed(treg, "evaluate" if saved == 12 else "take_step", 1, "--resume", out)
        assert len(history(out)) == saved, "lines after the checkpoint go"
    elif not (out / "settings.json").exists():
        assert "--out" in refusal("--resume", out), "nothing is saved: it must be begun anew"
        done(*argv)
    goes_on(out)


def test_a_resumed_run_shares_beginnings_only_if_it_did_before(stopped, tmp_path):
    killed(treg, "take_step", 1, *words(tmp_path / "out", model=model_folder("bloom")))
    for out, shares in (tmp_path / "out", False), (stopped, True):
        assert treg.load_prepared(treg.read_settings(out), out)[0].shares_prompts == shares


def test_a_run_keeps_others_out_and_interrupted_says_from_where_it_goes_on(tmp_path, monkeypatch):
    out, others, calls, step = tmp_path / "out", [], itertools.count(1), treg.take_step

    def interrupted(*args, **kwargs):
        if next(calls) == 4:
            others.extend([refusal("--resume", out), refusal(*words(out))])
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(treg, "take_step", interrupted)
    status, said = command(*words(out))
    assert "another process" in others[0] and "name a new folder" in others[1]
    assert "21 pairs to train on, 4 held out, 12 steps of 4" in said
    assert status == 130 and f"--resume {out} goes on after step 2 of 12" in said
    goes_on(out)


def test_a_run_folder_holds_what_others_load(tmp_path, monkeypatch):
    out = straight()
    tokenizer, summary = transformers.AutoTokenizer.from_pretrained(out), summary_of(out)
    assert tokenizer.chat_template == treg.PLAIN_TEMPLATE, "a base model's layout is saved"
    measured = {row["step"]: row for row in history(out) if "heldout_margin" in row}
    assert [*measured] == [3, 6, 9, 12]
    for name in ("accuracy", "margin"):
        assert measured[12][f"heldout_{name}"] == pytest.approx(summary["after"][name]), name
    for name in ("annotate_seconds", "annotate_cpu_seconds", "train_seconds", "train_cpu_seconds"):
        assert summary[name] > 0
    assert summary["peak_memory_bytes"] > 2**20 and (summary["pairs"], summary["steps"]) == (21, 12)
    assert "accuracy" not in summary["before"], "a constant by construction is no measurement"
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings == summary["settings"] and (settings["lr"], settings["beta"]) == (1e-3, 0.1)
    before = end_of(out)
    assert not {"checkpoint.pt", "reference", ".lock", "settings.json.tmp"} & before[-1]
    assert "is finished" in done("--resume", out) and end_of(out) == before
    assert "is not empty" in refusal(*words(out))
    assert "no other flag" in refusal("--resume", out, "--lr", 1)
    assert "holds no run" in refusal("--resume", model_folder())
    monkeypatch.chdir(tmp_path)
    assert "is no model folder" in refusal(*words("out", model="./none"))
    assert not Path("out").exists(), "nothing came of it"
    for _ in range(2):
        done(*words(None, "--epochs", 1, "--holdout", 0))
    assert len([*Path("runs").glob("*/summary.json")]) == 2, "two runs in one second"


def test_which_pairs_are_trained_on_and_which_are_held_out(tmp_path, capsys):
    """Those of --split; without it --holdout, a share or a number, the same for every seed."""
    splits, path = ["train"] * 6 + ["test"] * 2 + ["dev"] * 3 + ["Train"], tmp_path / "p.jsonl"
    path.write_bytes(jsonl(*[{**ROW, "split": split} for split in splits]))

    def places(data, **flags):
        s = treg.Settings(model=str(model_folder()), data=str(data), **flags)
        return [[int(p.where.rpartition(":")[2]) for p in of] for of in treg.load_all(s)[2:]]

    for split, test, unused in ("test", [7, 8], "dev"), ("dev", [9, 10, 11], "test"):
        assert places(path, split=split) == [[1, 2, 3, 4, 5, 6], test]
        said = capsys.readouterr().out
        assert "1 rows of split Train are not used" in said
        assert f"rows of split {unused} are not used" in said
    train, test = places(data_file(), holdout=0.2)
    assert len(test) == 5 and sorted(train + test) == [*range(1, 26)]
    assert places(data_file(), holdout=5, seed=1, max_pairs=3) == [train[:3], test]
    assert len(places(data_file(), holdout=1)[1]) == 1, "a number, not the share of all"
    path.write_bytes(jsonl(*[{**ROW, "prompt": f"Is it {i // 4}?"} for i in range(40)]))
    prompts = [{(i - 1) // 4 for i in of} for of in places(path, holdout=10)]
    assert [len(of) for of in prompts] == [8, 2] and not prompts[0] & prompts[1], "of one prompt"
    path.write_bytes(jsonl(*[{**ROW, "prompt": f"Is it {i // 4}?"} for i in range(42)]))
    assert [len(of) for of in places(path, holdout=1)] == [40, 2], "at least the smallest"
    path.write_bytes(jsonl(*[ROW] * 10))
    assert [len(of) for of in places(path, holdout=3)] == [7, 3], "there is but one prompt"


def test_a_full_disk_leaves_the_old_checkpoint_whole(stopped, monkeypatch):
    def full(path, mode="a", **options):  # for a line of metrics.jsonl, and for fsync
        if mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    for owner, name in (os, "fsync"), (treg, "open"):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full, raising=False)
            assert re.search("not saved .*No space left", refusal("--resume", stopped)), name
        assert not [*stopped.glob("*.tmp")], "half a file keeps the disk full"
    assert len(treg.read(stopped / "checkpoint.pt")["history"]) == 2
    goes_on(stopped)


def test_nothing_is_unpickled_and_damage_is_named(stopped):
    bomb = f"cos\nsystem\n(S'touch {stopped.parent}/executed'\ntR.".encode()
    packed, other = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:  # as torch.save does it
        file.writestr("archive/data.pkl", bomb)
        file.writestr("archive/version", "3\n")
    torch.save({"other": 1}, other)
    settings = (b"", b"[]", b"\xff", b'{"settings": {"x": 1}}')
    tensors = (b"", bomb, packed.getvalue(), other.getvalue())
    files = {"settings.json": settings, "checkpoint.pt": tensors, "pairs.pt": tensors}
    for name, contents in files.items():
        whole = (stopped / name).read_bytes()
        for content in (*contents, whole[: len(whole) // 2]):
            (stopped / name).write_bytes(content)
            line = refusal("--resume", stopped)
            assert re.match(rf"{re.escape(str(stopped))}(/{name})?: damaged", line), content[:20]
        (stopped / name).write_bytes(whole)
    assert not (stopped.parent / "executed").exists(), "code that a file of the run hides"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_model_folder_runs(name, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    kinds = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    if name == "tokenizer_config.json":
        kinds = {"AutoTokenizer": [None, "evil.T"]}
    evil = {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": kinds}
    (folder / name).write_text(json.dumps(evil))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the library asks unless told False
    command(*words(tmp_path / "out", model=folder))
    assert not (tmp_path / "executed").exists()


BERT, FP8 = transformers.BertConfig(**SIZES, vocab_size=500), {"quant_method": "fp8"}
FOLDERS = {  # what is saved over a model folder, or the file that goes; what must be said
    "no config": ("config.json", "is no model folder"),
    "no weights": ("model.safetensors", "cannot be loaded"),
    "no tokenizer": ("tok*", "tokenizer|load"),
    "a layer missing": (lambda: model_of().config, r"weights missing: .*h\.1\.mlp\.c_fc\.weight"),
    "fewer embeddings": (lambda: model_of(vocab_size=347), "token 347, but embeddings of 347"),
    "quantised": (lambda: transformers.GPT2Config(quantization_config=FP8), "is quantised"),
    "an encoder": (lambda: transformers.BertForMaskedLM(BERT), "sees later tokens, as an encoder"),
    "an encoder-decoder": (transformers.T5Config, "is an encoder-decoder"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_mistake_in_a_model_folder_is_named(case, tmp_path):
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    new, says = FOLDERS[case]
    if callable(new):
        new().save_pretrained(folder)
    else:
        for path in folder.glob(new):
            path.unlink()
    line = refusal(*words(tmp_path / "out", "--check-prompts", model=folder))
    assert re.match(rf"--model {re.escape(str(folder))}: .*({says})", line), line


FLAGS = {  # flags of which one cannot be, and what the line must say
    "--aplha 1": "--aplha",
    "--beta -1": "--beta: must be from",
    "--lr nan": "--lr: must be from",
    "--prompts polite": "--prompts polite: must be answer, revise",
    "--split train": "--split: the pairs",
    "--split dev": "--split dev: .* has no such split",
    "--holdout 99": "leave no pair to train on",
    "--token-rewards dpo": "for --compare alone",
    "--data none.jsonl": "none.jsonl: no such file",
    f"--out {__file__}": "--out .*: cannot be made .*File exists",
    # the test writes what stands in braces into v.json
    '--variants {"a":{}}': "--variants: goes with --compare",
    "--compare 1 --variants none.json": "--variants none.json: not usable",
    '--compare 1 --variants {"a":1}': "--variants v.json: not usable",
    "--compare 1 --variants {}": "v.json: holds no variant",
    '--compare 1 --variants {"a":{"seed":1,"model":"b"}}': "a: cannot change (seed, m|model, s)",
    '--compare 1 --variants {"a":{"alpha":-1}}': "v.json: a: --alpha: must be from",
    '--compare 1 --variants {"a":{"epochs":1.5}}': "v.json: a: --epochs: must be of type int",
    '--compare 1 --variants {"a":{"weighting":"w"}}': "v.json: a: --weighting: must be one of",
    '--compare 1 --variants {"a":{"prompts":"rude"}}': "v.json: a: --prompts rude: must be",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_mistake_is_one_line_before_a_model_is_loaded(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(treg, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    *argv, last = flags.split()
    if last.startswith("{"):
        Path("v.json").write_text(last)
        last = "v.json"
    line = refusal(*words("out"), *argv, last)
    assert re.search(FLAGS[flags], line), line


def test_prompts_no_better_than_chance_and_a_high_rate_are_warned_of(tmp_path, monkeypatch):
    """--check-prompts measures every style, --alpha 0 or not, and ends with the best one."""
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('{"better": "{prompt} well", "worse": "{prompt} ill"}')
    poor, good, swapped = (0.6, 0.45, 0.7), (0.9, 0.8, 0.95), (0.3, 0.1, 0.4)
    found = itertools.chain([poor, good, swapped, good], itertools.repeat(poor))
    hats = []
    monkeypatch.setattr(treg, "pair_accuracy", lambda pairs: hats.append(pairs) or next(found))
    check = words("out", "--check-prompts", "--alpha", 0, "--prompts", "own.json")
    said = done(*check)
    assert said.count("no better than chance") == 1 == said.count("are better and worse swapped?")
    assert said.endswith("use --prompts revise\n") and not Path("out").exists()
    styles = {str(treg.sides(pairs)[0].token_rewards) for pairs in hats}
    assert len(styles) == 3, "r̂ of every style"
    assert "chance" not in done(*words("out"))
    assert done(*check).endswith("give more, write prompts or use --alpha 0\n")
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self: 2 * 10**8)
    assert "warning: --lr 0.001" in done(*words("other", "--epochs", 1))


def test_help_explains_every_field(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        treg.main(["--help"])
    said = capsys.readouterr().out
    for name, field in treg.Settings.__dataclass_fields__.items():
        assert re.search(rf"--{name.replace('_', '-')}\s", said), name
        assert "".join(field.metadata["help"].split("[%")[0].split()) in "".join(said.split()), name
    assert "[1024]" in said and "[None]" not in said and "==SUPPRESS" not in said
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit, match="0"):  # it has no ½
        treg.main(["--help"])


def test_checkpointing_computes_layers_anew_and_changes_nothing(stopped, tmp_path, monkeypatch):
    flag, counts = "--gradient-checkpointing", []
    mlp = transformers.models.gpt2.modeling_gpt2.GPT2MLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda *args: counts.append(1) or forward(*args))

    def layers(*argv):
        """How often a layer is computed by a command."""
        counts.clear()
        done(*argv)
        return len(counts)

    out, resumed = tmp_path / "out", tmp_path / "resumed"
    assert layers(*words(out, flag)) > layers(*words(tmp_path / "plain")) > 0
    for row, wanted in zip(history(out), history(straight()), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    killed(treg, "take_step", 4, *words(resumed, flag))
    assert layers("--resume", resumed) > layers("--resume", stopped), "when resumed too"
    pairs = treg.encode(tokenizer_of(None), text_pairs(4))
    models = [treg.load_model(str(model_folder()), on)[0] for on in (False, True)]
    texts = [treg.sample(model, tokenizer_of(None), pairs, 0) for model in models]
    assert texts[0] == texts[1], "checkpointed layers drop the key-value cache"
    line = refusal(*words(tmp_path / "other", flag, model=model_folder("openai-gpt")))
    assert flag in line and "cannot do it" in line


HALF = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"], 0.5)
STARTS = {  # of what model, with what flag, how far from loss ln 2, margin 0 and weight ½
    "dropout": (HALF, "--gradient-checkpointing", 1e-5),
    "dropout by a flag of its own": ({"kind": "opt", **HALF, "dropout": 0.5}, "--seed=0", 1e-5),
    "a model in bf16": ({"dtype": torch.bfloat16}, "--seed=0", 0.01),
    "products in bf16": ({}, "--dtype=bf16", 0.01),
}


@pytest.mark.parametrize("case", STARTS)
def test_dpo_starts_at_the_reference_and_rounds_no_small_update_away(case, tmp_path):
    about, flag, error = STARTS[case]
    model = model_folder(**about)
    done(*words(tmp_path, flag, "--lr", 5e-7, "--epochs", 1, model=model))
    wanted = {"loss": math.log(2), "margin": 0, "weight": 0.5, "agreement": 0}
    first = history(tmp_path)[0]
    assert {name: first[name] for name in wanted} == pytest.approx(wanted, abs=error)
    before, after = (load_file(of / "model.safetensors") for of in (model, tmp_path))
    moved = torch.cat([(after[name] - before[name].float()).abs().flatten() for name in after])
    assert (moved > 0).float().mean() > 0.5 and moved.max() < 5e-6
    assert {w.dtype for w in after.values()} == {torch.float32}


def test_the_saved_model_stops_at_every_end_token_that_it_has_learned(tmp_path, monkeypatch):
    """Its own, its template's and that of a call; settings that nothing reads are not saved."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(), "model")
    (tokenizer := tokenizer_of("gpt-oss")).save_pretrained("model")
    own = {"eos_token_id": 7, "do_sample": False, "temperature": 0.0}
    Path("model/generation_config.json").write_text(json.dumps(own))
    row = {"chosen": [A("", tool_calls=CALL)], "rejected": "?"}
    Path("p.jsonl").write_bytes(jsonl(*[{"prompt": f"{i}", **row} for i in range(12)]))
    killed(treg, "take_step", 2, *words("out", model="model", data="p.jsonl"))
    done("--resume", "out")
    saved = json.loads(Path("out/generation_config.json").read_text())
    learned = tokenizer.convert_tokens_to_ids(["<|call|>", "<|return|>"])
    assert saved["eos_token_id"] == [7, *sorted(learned)] and not saved.get("do_sample")


def test_tokenizers_without_offsets_train_without_credit_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marks = sorted({*"SayItisNo!. User: Assistant: 0123456789"} - {" "})
    vocab = ["<unk>"] + [mark + end for mark in marks for end in ("@@", "")] + ["\n"]
    Path("v.json").write_text(json.dumps({mark: i for i, mark in enumerate(vocab)}))
    Path("m.txt").write_text("#version\n")
    ends = {"unk_token": "<unk>", "eos_token": "<unk>"}
    transformers.CTRLTokenizer("v.json", "m.txt", **ends).save_pretrained("m")
    model_of("ctrl", vocab_size=len(vocab)).save_pretrained("m")
    said = done(*words("o", "--alpha", 0, "--epochs", 1, model="m"))
    assert "gives no offsets, so there are no credit figures" in said
    assert summary_of(Path("o"))["after"]["credit_auroc"] is None


def test_plain_dpo_shows_no_token_rewards(tmp_path):
    said = done(*words(tmp_path, "--alpha", 0, "--epochs", 1))
    assert "no token rewards" in said and said.count("token reward") == 1
    assert summary_of(tmp_path)["after"]["token_reward_auroc"] is None


def test_out_of_memory_gets_advice_and_a_bug_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(treg, "take_step", lambda *args, **kwargs: torch.empty(2**58))
    assert "out of memory; begin again with" in refusal(*words(tmp_path / "out"))
    assert treg.out_of_memory(MemoryError()) and treg.out_of_memory(torch.OutOfMemoryError())
    monkeypatch.setattr(treg, "take_step", lambda *args, **kwargs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        command(*words(tmp_path / "other"))


COUNT = """
import resource, torch, treg
treg.keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_a_freed_tensor_leaves_its_memory_to_the_next():
    """One of 64 MiB has 16,384 pages of 4 KiB; when it is made again, mostly none is new."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    found = subprocess.run([sys.executable, "-c", COUNT], cwd=HERE, capture_output=True, text=True)
    first, *_, last = map(int, found.stdout.split()[9:])
    assert last - first < 5 * 2**14, "new pages in ten times"


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signal to one process")
@pytest.mark.parametrize("loading", [True, False], ids=["while it loads", "later"])
def test_ctrl_c_ends_it_without_a_traceback(loading, tmp_path):
    """By the signal itself; later the program catches it, for what it has to say of --resume."""
    options = {"text": True, "encoding": "utf-8", "cwd": tmp_path}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-u", treg.__file__], **options) as process:
        assert process.stderr.readline() == "loading …\n"
        if not loading:
            assert "split validation" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    wanted = (-signal.SIGINT, "") if loading else (130, "treg.py: stopped\n")
    assert (process.returncode, said) == wanted


def test_control_characters_are_shown_and_not_obeyed(tmp_path):
    escape = "\x1b]0;owned\x07 \u202e"
    data = tmp_path / f"p{escape}.jsonl"
    data.write_bytes(jsonl(*[{**ROW, "prompt": f"Say {escape} 7"}] * 6))
    said = done(*words(tmp_path / f"out{escape}", data=data))
    said += refusal(*words(tmp_path / "out", data=tmp_path / f"none{escape}.jsonl"))
    said += refusal(*words(tmp_path / "out"), f"--{escape}")
    said += (tmp_path / f"out{escape}" / "report.html").read_text()
    assert not re.search("[\x1b\x07\u202e]", said) and r"\x1b]0;owned" in said


@pytest.mark.parametrize("kind", ["None", "OutStream", "cp1252", "closed"])
def test_main_works_in_a_thread_whatever_standard_output_is(kind, tmp_path, monkeypatch):
    streams = {"None": None, "cp1252": io.TextIOWrapper(io.BytesIO(), "cp1252")}
    streams["OutStream"] = type("OutStream", (io.TextIOBase,), {"write": lambda _, text: 1})()
    streams["closed"] = io.StringIO()
    streams["closed"].close()
    for name in ("stdout",) if kind == "closed" else ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, streams[kind])
    argv, statuses = [str(word) for word in words(tmp_path / "out", "--epochs", 1)], []
    thread = threading.Thread(target=lambda: statuses.append(treg.main(argv)))
    thread.start()
    thread.join()
    treg.tqdm.set_lock(threading.RLock())  # a bar that fails keeps its lock, and all would hang
    assert statuses == [0]


def test_a_run_goes_on_where_there_are_other_threads_and_no_module_resource(stopped, monkeypatch):
    text = (stopped / "settings.json").read_text().replace('"threads": 1', '"threads": 99')
    (stopped / "settings.json").write_text(text)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    runpy.run_path(treg.__file__)
    assert "threads was 99 and is 1" in done("--resume", stopped)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads = [treg.machine(treg.Settings(model=name))["threads"] for name in ("DIR", None)]
    assert threads == [2, 1], "the tiny model is computed with one"
    assert end_of(stopped) == end_of(straight())
    assert summary_of(stopped)["peak_memory_bytes"] is None


# ---------------------------------------------------------------------------- 11 the comparison
# Guards sections 9 and 10: variants are trained from the same weights on the same pairs, a
# comparison that dies goes on, and the method does something.


def test_compare_trains_every_variant_from_the_reference(tmp_path, monkeypatch):
    starts, orders, settings, hats, learned, train = [], set(), [], [], [], treg.train

    def spy(model, pairs, s, *args, **kwargs):
        starts.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        orders.add(tuple(pair.where for pair in pairs))
        loss = (s.algorithm, s.alpha, s.weighting, s.token_rewards)
        settings.append((*loss, s.beta, s.gamma, s.lr))
        hats.append([response.token_rewards for response in treg.sides(pairs)])
        rows = train(model, pairs, s, *args, **kwargs)
        learned.append(treg.sides(treg.measure(model, pairs, s)[1]))
        return rows

    monkeypatch.setattr(treg, "train", spy)
    said = done(*words(tmp_path / "out", "--epochs", 1, "--max-pairs", 8, "--compare", 2))
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert len(orders) == 1, "the same pairs in the same order"
    dpo = (0.1, 0.0, 1e-3)
    simpo = (2.5, 1.0, float(f"{5e-7 * math.sqrt(8e9 / len(starts[0])):.1e}"))  # --lr is for DPO
    wanted = [("dpo", alpha, "sequence", "contrastive", *dpo) for alpha in (0.0, 0.25)]
    wanted += [("simpo", alpha, "sequence", "contrastive", *simpo) for alpha in (0.0, 0.25)]
    wanted += [("dpo", 0.25, "sequence", "sft", *dpo)]
    wanted += [("dpo", 0.25, "static", "contrastive", *dpo), ("dpo", 0.0, "sequence", "dpo", *dpo)]
    wanted += [("dpo", 0.25, "sequence", name, *dpo) for name in ("dpo", "shuffled", "swapped")]
    assert settings == wanted * 2
    by_dpo = [torch.sigmoid(response.credit) - 0.5 for response in learned[6]]
    for call, rewards in ((7, by_dpo), (9, [-hat for hat in hats[1]]), (2, hats[1]), (3, hats[1])):
        assert all(map(functools.partial(torch.allclose, atol=1e-6), hats[call], rewards)), call
    results = history(tmp_path / "out", "compare.jsonl")
    work = [(seed, name) for seed in (0, 1) for name in treg.VARIANTS]
    assert [(result["seed"], result["variant"]) for result in results] == work
    assert "learned by DPO-REG" in (tmp_path / "out/report.html").read_text()
    table = re.search(r"\n +accuracy.*swapped[^\n]*", said, re.S)[0]
    assert [re.split("  +", line)[0] for line in table.splitlines()[2:]] == [*treg.VARIANTS]
    lines = (tmp_path / "out/compare.jsonl").read_text().splitlines(keepends=True)
    for count in (17, 18):
        (tmp_path / "out/compare.jsonl").write_text("".join(lines[:count]))
        assert table in done("--resume", tmp_path / "out"), f"it goes on after {count}"
    [start] = (tmp_path / "out").glob("start-*")  # one reference for all seeds
    before = treg.read(start / "pairs.pt")["summary"]["before"]
    assert before == {}, "nothing is evaluated but the variants"


def test_the_page_shows_no_credit_of_other_pairs(tmp_path):
    """The prompts of `revise` are longer: --max-length drops pairs that DPO was measured on."""
    (tmp_path / "v.json").write_text('{"DPO": {"alpha": 0}, "other": {"prompts": "revise"}}')
    flags = ["--compare", 1, "--variants", tmp_path / "v.json", "--max-length", 134]
    done(*words(tmp_path / "out", "--epochs", 1, *flags))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "learned by other" in page and "learned by DPO" not in page


def test_a_comparison_with_variants_and_a_judge_of_ones_own_goes_on(tmp_path, monkeypatch):
    """With the tiny model, whose own learning rate must come back."""
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('{"better": "{prompt} well", "worse": "{prompt} ill"}')
    variants = {"small": {"lr": 1e-5, "alpha": 0}, "large": {"beta": 0.5}}
    variants |= {kind: {"prompts": kind} for kind in ("revise", "own.json")}
    variants["again"] = {"beta": 0.5}
    Path("v.json").write_text(json.dumps(variants))
    lines = Path(treg.TINY_DATA).read_text("utf-8").splitlines(keepends=True)
    Path("p.jsonl").write_text("".join(lines[:30] + lines[900:916] + lines[-4:]))
    monkeypatch.setattr(treg, "make_tiny", functools.partial(treg.make_tiny, steps=0))
    calls, rates, hats, train = itertools.count(1), [], [], treg.train

    def interrupted(model, pairs, s, **options):
        if next(calls) == 5:
            raise KeyboardInterrupt
        rates.append((s.lr, s.beta))
        hats.append(tuple(pairs[0].chosen.token_rewards.tolist()))
        return train(model, pairs, s, **options)

    monkeypatch.setattr(treg, "train", interrupted)
    argv = ["--compare", 1, "--variants", "v.json", "--data", "p.jsonl", "--out", "out"]
    killed(os, "replace", 2, *argv)  # before it has a copy of the variants
    with pytest.raises(KeyboardInterrupt, match="--resume out goes on"):
        treg.run(treg.Settings(resume="out"), judge=lambda pair, text: 0.25)
    Path("v.json").unlink()
    Path("p.jsonl").unlink()
    treg.run(treg.Settings(resume="out"), judge=lambda pair, text: 0.25)
    results = history("out", "compare.jsonl")
    assert [result["variant"] for result in results] == [*variants]
    assert results[4] | {"variant": "large"} == results[1], "the same before and after"
    assert {result["score"] for result in results} == {0.25}
    assert [*results[0]["each"].values()] == [0.25] * 4
    assert rates == [(1e-5, 1.0), (4e-4, 0.5), (4e-4, 1.0), (4e-4, 1.0), (4e-4, 0.5)]
    assert hats[0] == hats[1] == hats[4] and len({*hats}) == 3, "r̂ of its own prompts"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_raises_the_score_by_a_fifth(seed, tmp_path, monkeypatch):
    """To save time with a third of the warm-up and of the test, and half of the training."""
    lines = Path(treg.TINY_DATA).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[300:-110]))
    monkeypatch.setattr(treg, "make_tiny", functools.partial(treg.make_tiny, steps=700))
    flags = ["--data", tmp_path / "data.jsonl", "--max-pairs", 140, "--out", tmp_path / "run"]
    said = done("--seed", seed, *flags)
    before, after = (summary_of(tmp_path / "run")[when] for when in ("before", "after"))
    assert after["score"] >= before["score"] + 0.2, said
    assert after["accuracy"] > 0.8 and after["credit_auroc"] > 0.85, said
    assert float(re.search(r"prompts answer: .* interval (\S+) to", said)[1]) > 0.5


def test_the_tiny_model_is_a_function_of_the_seed():
    pairs = treg.load_pairs(treg.TINY_DATA, "warmup")[:20]
    one, same, other = (treg.make_tiny(pairs, seed, steps=0)[0] for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_warm_up_repeats_no_response_that_its_prompt_shows(monkeypatch):
    """Else the model would learn to copy, and `revise` would rank good tokens below bad ones."""
    rows, logps = [], treg.response_logps

    def spy(model, *batch):
        rows.extend(zip(*batch, strict=True))
        return logps(model, *batch)

    monkeypatch.setattr(treg, "response_logps", spy)
    pairs = treg.load_splits(treg.TINY_DATA)["warmup"][:4]
    _, tokenizer = treg.make_tiny(pairs, 0, steps=20)
    texts = [(tokenizer.decode(prompt), tokenizer.decode(ids[:-1])) for prompt, ids in rows]
    shown = [(prompt, response) for prompt, response in texts if "Response:" in prompt]
    assert len(shown) > 20 and not any(response in prompt for prompt, response in shown)


# ----------------------------------------------------------------------------------- 12 README
# Guards README.md: every command, snippet, answer and name in it is true.
README = (HERE / "README.md").read_text(encoding="utf-8")
README_LINES = re.findall(r"`(python treg[^`]*)`", README) + README.splitlines()
README_COMMANDS = {line for line in README_LINES if re.match("python treg.py(?! --help)", line)}
EXAMPLE = re.findall(r"^\| (?:chosen|rejected) \d \|(.*)\|$", README, re.M)  # the table by hand
EXAMPLE = [[float(cell.replace("−", "-")) for cell in row.split("|")] for row in EXAMPLE]
EXAMPLE = torch.tensor(EXAMPLE, dtype=torch.float64).T.reshape(8, 2, 2)  # its columns


def snippet(words, language="python"):
    """The one block of this language in README.md that holds these words."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    [block] = [block for block in found if words in block]
    return block


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all the files that README.md names, as small as can be."""
    folder = tmp_path_factory.mktemp("readme")
    rows = (HERE / "tiny_data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kinds = ("warmup", 40), ("train", 44), ("test", 6)
    few = [[row for row in rows if f'"{kind}"' in row][:count] for kind, count in kinds]
    better, worse = treg.PROMPTS["answer"].values()
    texts = {
        "few.jsonl": "".join(sum(few, [])),
        "pairs.jsonl": "".join(few[1]),
        "alphas.json": snippet("DPO-REG", "json"),
        "mine.json": json.dumps({"better": worse, "worse": better}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    model, tokenizer = treg.make_tiny(treg.load_pairs(folder / "few.jsonl", "warmup"), 0, steps=2)
    for name in ("DIR", "my-run"):
        treg.save_model(model, tokenizer, folder / name, [0])
    return folder


@pytest.fixture
def at_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(treg, "make_tiny", functools.partial(treg.make_tiny, steps=2))


@pytest.mark.parametrize("command", sorted(README_COMMANDS))
def test_readme_command_runs_at_its_smallest_setting(command, at_place, tmp_path):
    out, argv = str(tmp_path / "out"), shlex.split(command)[2:]
    small = ["--max-pairs", "4", "--holdout", "4", "--epochs", "1", "--out", out]
    if "--resume" in argv:
        done("--model", "DIR", "--data", "pairs.jsonl", *small)
        argv[argv.index("--resume") + 1] = out
    else:
        argv += small if "--data" in argv else ["--data", "few.jsonl", *small]
        argv += ["--compare", "1"] if "--compare" in argv else []
    done(*argv)


def test_the_example_prints_the_table_by_hand(capsys):
    exec(snippet("def show("), {})
    lines = capsys.readouterr().out.splitlines()
    found = {line[:20].strip(): [float(value) for value in line[20:].split()] for line in lines}
    for name, column in ("token reward", 2), ("DPO gradient", 6), ("T-REG gradient", 7):
        assert found[name] == EXAMPLE[column].flatten().tolist(), name
    assert found["weight"] == [0.2] and found["factor"] == [1.2, 0.875, 0.85, 1.1]


def test_readme_conversation(at_place, capsys):
    exec(snippet("pipeline"), {})
    assert "'role': 'assistant'" in capsys.readouterr().out


def test_readme_notebook_shows_the_tokens(at_place):
    shell = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    cell = shell.InteractiveShell(history_manager=None).run_cell(snippet("credit_map(heldout"))
    cell.raise_error()
    assert 'class="token' in cell.result.data


def test_readme_lora_recipe_saves_what_it_trained(at_place):
    pytest.importorskip("peft", reason="the README's LoRA recipe needs peft")
    exec(snippet("LoraConfig"), space := {})
    assert space["history"][0]["loss"] == pytest.approx(math.log(2)), "it begins as the reference"
    merged = space["policy"].base_model.model.state_dict()
    saved, before = (treg.load_model(name)[0].state_dict() for name in ("my-lora", "DIR"))
    assert all(torch.equal(saved[name], merged[name]) for name in saved)
    assert not all(torch.equal(saved[name], before[name]) for name in saved), "it has learned"
    model, tokenizer = treg.load_model("DIR")
    policy, own = space["get_peft_model"](model, space["lora"]), model.generation_config
    treg.sample(policy, tokenizer, space["pairs"][:2], 0)
    assert model.generation_config is own, "its own settings come back"


@pytest.mark.parametrize("algorithm, beta, gamma", [("dpo", 0.1, 0.0), ("simpo", 1.0, 0.5)])
def test_trl_recipe_has_the_losses_of_train(
    algorithm, beta, gamma, at_place, monkeypatch, tmp_path
):
    """Two epochs in batches of 4 in the order of the file, at one learning rate."""
    pytest.importorskip("trl", reason="the README's TRL recipe needs trl")
    loss = {"algorithm": algorithm, "beta": beta, "gamma": gamma, "alpha": 0.5}
    model, tokenizer = treg.load_model("DIR")
    pairs = treg.annotate(model, tokenizer, treg.load_pairs("pairs.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
        patch.setattr(treg, "schedule", lambda step, total: 1.0)
        ours = treg.train(model, pairs, **loss, epochs=2, batch_size=4, lr=1e-4)
    script = tmp_path / "trl_treg.py"
    script.write_text(snippet("DPOTrainer"), encoding="utf-8")
    flags = "--use_cpu --bf16=False --model=DIR --data=pairs.jsonl --learning_rate=1e-4 "
    flags += "--lr_scheduler_type=constant "
    flags += "--num_train_epochs=2 --per_device_train_batch_size=4 --logging_steps=1 "
    flags += f"--train_sampling_strategy=sequential --save_strategy=no --output_dir={algorithm}"
    argv = ["trl_treg.py", *flags.split(), *(f"--{name}={value}" for name, value in loss.items())]
    monkeypatch.setenv("CI", "1")  # TRL reports no run of a test
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(script), run_name="__main__")
    history = json.loads(Path(algorithm, "trainer_state.json").read_text())["log_history"]
    theirs = [row["loss"] for row in history if "loss" in row]
    assert theirs == pytest.approx([row["loss"] for row in ours], abs=1e-6) and len(ours) == 22
    assert ours[11]["loss"] < ours[0]["loss"] - 0.01, "they did learn: the same pairs again"


def gradient(alpha, hat=None, loss=treg.treg_loss):
    """∂L/∂log π in README.md's example: chosen 1, chosen 2, rejected 1, rejected 2."""
    hat = EXAMPLE[2] if hat is None else torch.tensor(hat).double()
    logps = EXAMPLE[3].log().requires_grad_()
    rewards = treg.dpo_rewards(logps, EXAMPLE[4].log(), torch.ones(2, 2), 0.5)
    loss(*rewards.chunk(2), *hat.chunk(2), alpha)[0].backward()
    return logps.grad.flatten()


def test_exercises_come_out_as_the_readme_says():
    dpo = gradient(0.0)
    assert abs(gradient(10 / 3)[2]) < 1e-9 and gradient(3.0)[2] > 0 > gradient(3.0)[1], "1"
    source = inspect.getsource(treg.treg_loss).replace(".detach()", "")
    exec(source, space := {"torch": torch, "F": torch.nn.functional})
    extra = 0.5 * 0.5 * 0.2 * 0.8 * 0.65 * math.log(2) * torch.tensor([1, 1, -1, -1])
    found = gradient(0.5, loss=space["treg_loss"])
    assert torch.allclose(found, gradient(0.5) + extra) and round(found[0].item(), 4) == -0.1020
    for rejected_hat, factor in (0.25, 0.875), (-0.25, 1.125):
        found = gradient(0.5, [[0.25] * 2, [rejected_hat] * 2]) / dpo
        assert found.tolist() == pytest.approx([1.125, 1.125, factor, factor]), "1"
    for z, weighting, down in (2.7, "static", 0), (2.71, "static", 1), (9.0, "sequence", 0):
        chosen, none = torch.tensor([[z, 0.0]], requires_grad=True), torch.zeros(1, 2)
        hat = torch.tensor([[0.4, -0.25]])
        treg.treg_loss(chosen, none, hat, none, 0.5, weighting=weighting)[0].backward()
        assert (chosen.grad[0, 1] > 0) == down, f"4: {weighting}, z = {z}"
    long, short = (treg.simpo_rewards(-torch.ones(1, n), torch.ones(1, n), 2.0) for n in (8, 2))
    assert long.sum() - short.sum() == 0 and 8 * long.sum() - 2 * short.sum() == -12, "5"
    for preference in (lambda z: torch.relu(2 - z)), (lambda z: (z - 0.5) ** 2):

        def loss(chosen, rejected, chosen_hat, rejected_hat, alpha, preference=preference):
            z = chosen.sum() - rejected.sum()
            weight = -torch.autograd.grad(preference(z), z, retain_graph=True)[0]
            agreement = (chosen_hat * chosen + rejected_hat * rejected).sum()
            return preference(z) - alpha * weight * agreement, z

        factors = gradient(0.5, loss=loss) / gradient(0.0, loss=loss)
        assert factors.tolist() == pytest.approx([1.2, 0.875, 0.85, 1.1]), "7"


def test_what_the_readme_names_exists():
    graded = re.search(r"functions that it defines \((.*?)\)", README, re.S)[1]
    functions = re.findall(r"^\|.*?\| `(\w+)`", README, re.M) + re.findall(r"`(\w+)`", graded)
    assert {"response_logps", "treg_loss", "annotate", "losses"} <= set(functions)
    assert all(hasattr(treg, name) for name in functions if not name.startswith("test_"))
    tests = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("t*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"\ndef {name}(" in tests, name
    flags = {f"--{name.replace('_', '-')}" for name in treg.Settings.__dataclass_fields__}
    assert set(re.findall(r"(?<=`)--[a-z-]+", README)) - {"--use"} <= flags
    heads = [head.lower().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", README, re.M)]
    for anchor in re.findall(r"\]\(#([^)]*)\)", README):
        assert anchor in [re.sub(r"[^\w-]", "", head) for head in heads], anchor


# ----------------------------------------------------------------- 13 the experiments of README.md
# What README.md shows beyond a run of treg.py: `python test_treg.py` with the name of one of these
# functions and its arguments.


def picture(epochs=23):
    """r̂ of a held-out response, and what DPO and DPO-REG have learned of it from 40 pairs: bars.

    Words of which all three know nothing, and which are right, are left out.
    """
    torch.set_num_threads(1)
    splits = treg.load_splits(treg.TINY_DATA)
    model, tokenizer = treg.make_tiny(splits["warmup"], seed=0)
    pairs = treg.annotate(model, tokenizer, splits["train"][:40], alpha=1.0)
    layers = treg.annotate(model, tokenizer, splits["test"][:1], alpha=1.0)
    for alpha in (0.0, 1.0):  # DPO, DPO-REG
        policy = copy.deepcopy(model)
        treg.train(policy, pairs, alpha=alpha, epochs=epochs, lr=2e-4)
        layers += treg.evaluate(policy, tokenizer, layers[:1], alpha=alpha)[1]

    def bar(value, full):
        cells = "█" * min(6, round(6 * abs(value) / full))
        return f"{value:+6.2f} " + (f"{cells:>6}│      " if value < 0 else f"      │{cells:<6}")

    print(f"{'rejected':11}{'r̂':20} {'learned by DPO':20} learned by DPO-REG")
    hat, dpo, reg = (pair.rejected for pair in layers)
    for i, text in enumerate(treg.token_texts(tokenizer, hat.ids.tolist())):
        values = hat.token_rewards[i].item(), dpo.credit[i].item(), reg.credit[i].item()
        if hat.good[i] and max(map(abs, values)) < 0.05:
            continue
        text = text.strip() if hat.good[i] else f"[{text.strip()}]"
        print(" ".join([f"{text:9}", *map(bar, values, (0.5, 2, 2))]).rstrip())


# An instruction, and a pattern that an answer has which follows it.
BULLET = r"^\s*([-*•]|\d+[.)]) "
RULES = {
    "List exactly three facts about {} as bullet points.": (
        rf"(?ms)\A(?!(.*?{BULLET}){{4}})(.*?{BULLET}){{3}}"
    ),
    "Write one sentence about {} that ends with the word today.": r"\btoday\W*$",
    "Write one sentence about {} that begins with the word People.": r"^People\b",
    "Tell me about {} in fewer than twelve words.": r"^(\S+(\s+\S+){0,10})?$",
    "Write one sentence about {} that contains the word old and not the word new.": (
        r"(?s)^(?!.*\bnew\b).*\bold\b"
    ),
    'Describe {} as a JSON object with the keys "name" and "use".': (
        r'\{\s*"name":\s*"[^"]*",\s*"use":\s*"[^"]*"\s*\}'
    ),
    "Write one sentence about {} without the word the.": r"(?is)^(?!.*\bthe\b).",
    "Write one sentence about {} that contains a number in digits.": r"\d",
}
BLAMED = {  # words of an instruction, and the words of an answer that break it
    "without the word the": r"(?i)\b(the)\b",
    "not the word new": r"\b(new)\b",
    "fewer than twelve": r"(?s)^\s*(?:\S+\s+){11}(.+)",
}
TOPICS = """
bread rivers winter cats music gardens trains maps honey chess rain books horses tea bridges sleep
paper apples dogs mountains clocks salt ships birds wool shoes fire milk sand bees windows coffee
snow lamps wheels soup cows glass tents coins forests kites boats roses
"""
OWN_PROMPTS = {
    "better": "{prompt}\n\nFollow the instruction to the letter.",
    "worse": "{prompt}\n\nBreak the instruction in a way that is easy to see.",
}


def follows(pair, text):
    """The judge: does the text do what the pair's prompt asks for? -> 1.0 or 0.0."""
    asked = pair.prompt[-1]["content"]
    [rule] = [rule for kind, rule in RULES.items() if re.fullmatch(kind.format(r"\w+"), asked)]
    return float(bool(re.search(rule, text.strip())))


def on_policy(model, topics):
    """-> rows of data: of four answers of the model to each instruction the best and the worst."""
    model, tokenizer = treg.load_model(model)
    prompts = [kind.format(topic) for topic in topics for kind in RULES]
    asked = [treg.read_pair({"prompt": p, "chosen": "a", "rejected": "b"}) for p in prompts]
    four = [pair for pair in treg.encode(tokenizer, asked) for _ in range(4)]
    texts = treg.sample(model, tokenizer, four, seed=0, more=46)
    rows = []
    for i, pair in enumerate(asked):
        split = (["train"] * 25 + ["validation"] * 6 + ["test"] * 13)[44 * i // len(asked)]
        answers = texts[4 * i : 4 * i + 4]
        worst, *_, best = sorted(answers, key=lambda text: follows(pair, text))
        if split != "train" or follows(pair, worst) < follows(pair, best):
            row = {"split": split, "prompt": prompts[i], "chosen": best, "rejected": worst}
            for side in ("chosen", "rejected"):
                row[f"{side}_errors"] = [
                    match.span(1)
                    for words, pattern in BLAMED.items()
                    for match in re.finditer(pattern, row[side])
                    if words in prompts[i]
                ]
            rows.append(row)
    return rows


def real(model, folder, topics=TOPICS, seeds=3):
    """A real model on instructions that a pattern can check; a run that was stopped goes on."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, blamed, own = (folder / name for name in ("on_policy.jsonl", "blamed.jsonl", "own.json"))
    if not data.exists():
        rows = on_policy(model, topics.split())
        treg.write(data, [{k: v for k, v in row.items() if "errors" not in k} for row in rows])
        about = [row for row in rows if any(words in row["prompt"] for words in BLAMED)]
        treg.write(blamed, [row | {"split": "train"} for row in about])
        treg.write(own, OWN_PROMPTS)

    def compared(name, split, variants, seeds):
        out, listed = folder / name, folder / f"{name}.json"
        treg.write(listed, variants)
        about = {"model": model, "data": str(data), "variants": str(listed), "out": str(out)}
        about |= {"split": split, "compare": seeds, "batch_size": 4, "draws": 2}
        begun = (out / "settings.json").exists()
        treg.run(treg.Settings(**({"resume": str(out)} if begun else about)), follows)
        return history(out, "compare.jsonl")

    rates = itertools.product(("dpo", "simpo"), (1e-5, 3e-5, 1e-4))
    tuning = {f"{of} {lr:g}": {"algorithm": of, "alpha": 0, "lr": lr} for of, lr in rates}
    tuned = sorted(compared("tune", "validation", tuning, 1), key=lambda result: result["score"])
    best = {of["algorithm"]: tuning[of["variant"]]["lr"] for of in tuned}  # the last is the best
    names = "DPO", "DPO-REG", "SimPO", "SimPO-REG", "shuffled", "swapped"
    variants = {name: treg.VARIANTS[name] for name in names}
    variants = {name: of | {"lr": best[of["algorithm"]]} for name, of in variants.items()}
    compared("final", "test", variants, seeds)
    treg.run(treg.Settings(model=model, data=str(blamed), prompts=str(own), check_prompts=True))


def cost(layers, width, most, *flags):
    """Seconds and memory of a Llama of random weights, by pairs, length of prompt and of response.

    Flags are treg.py's. Where trl is installed, the seconds of its plain DPO too, which read the
    reference while they train, with layers checkpointed (its default) and not.
    """
    wide = int(width)
    folder = Path(tempfile.mkdtemp())
    data = Path(tempfile.mkdtemp(), "pairs.jsonl")
    sizes = {"hidden_size": wide, "intermediate_size": 11 * wide // 4, "vocab_size": 8192}
    sizes |= {"num_attention_heads": wide // 32, "num_hidden_layers": int(layers)}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=8192)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    treg.tiny_tokenizer(treg.load_splits(treg.TINY_DATA)["warmup"]).save_pretrained(folder)

    def text(tokens):
        return "".join(random.choices([" red", " blue", " gold", " stone", " paper"], k=tokens))

    def ran(*argv):
        argv = [sys.executable, *map(str, argv)]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def ours():
        out = Path(tempfile.mkdtemp())
        about = ["--model", folder, "--data", data, "--max-length", 8192, "--holdout", 0]
        ran(treg.__file__, *about, "--out", out, *flags)
        s = json.loads((out / "summary.json").read_text())
        spent = f"{s['annotate_seconds']:8.1f} s{s['train_seconds']:8.1f} s"
        return spent + f"{(s['peak_memory_bytes'] or math.nan) / 2**30:7.2f} GiB"

    def trls(checkpointed):
        about = {"model_name_or_path": folder, "dataset_name": data.parent, "dtype": "float32"}
        about |= {"output_dir": tempfile.mkdtemp(), "save_strategy": "no", "max_length": 8192}
        about |= {"per_device_train_batch_size": 8, "num_train_epochs": 1}
        about |= {"bf16": "bf16" in flags, "gradient_checkpointing": checkpointed}
        about |= {"use_cpu": not torch.cuda.is_available()}
        said = ran("-m", "trl.scripts.dpo", *[f"--{name}={value}" for name, value in about.items()])
        return re.search("'train_runtime': '?([0-9.]+)", said)[1] + " s"

    print(" pairs  prompt  response  annotate     train      peak")
    few = min(int(most), 16)
    rows = [(n, 16, 16) for n in (100, 1000, 10000) if n <= int(most)]
    rows += [(few, 64, n) for n in (64, 256, 1024, 2048)]
    rows += [(few, n, 64) for n in (256, 1024, 2048)]
    for pairs, prompt, response in rows:
        sides = {"prompt": prompt, "chosen": response, "rejected": response}
        treg.write(data, [{k: text(n) for k, n in sides.items()} for _ in range(pairs)])
        line = f"{pairs:6}{prompt:8}{response:10} {ours()}"
        if importlib.util.find_spec("trl"):
            line += f"  TRL: {trls(True)}, {trls(False)}"
        print(line, flush=True)


# The map of "Does it work?" goes on where it was stopped. Here an answer is K sentences of the tiny
# world, and a preference says which of two has fewer wrong words: the longer the answers, the less
# it says of each word.
#
# What T-REG's claim predicts, written down before the map was run. Gain: the share of sampled
# sentences without an error, minus that of tuned DPO, over the same seeds and prompts.
#   1. The gain of DPO-REG with α = 1 grows, over the cells (K, pairs), with the credit that DPO
#      leaves open, 1 − its credit AUROC: Spearman's rank correlation above 0, one-sided, by
#      permutation of the cells, at 5 %. (Nothing else is tested.)
#   2. With shuffled token rewards the gain is 0.
#   3. With better and worse swapped it is below 0.
MAP_LENGTHS = (1, 2, 4)
MAP_SIZES = (40, 100, 300, 1000)
MAP_VARIANTS = {
    "DPO": {"alpha": 0.0},
    "α = ¼": {"alpha": 0.25},
    "α = 1": {"alpha": 1.0},
    "shuffled": {"alpha": 1.0, "token_rewards": "shuffled"},
    "swapped": {"alpha": 1.0, "token_rewards": "swapped"},
}
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
BETAS = (0.3, 1.0, 3.0)


def wrong_in(sentences):
    """How many words are wrong in what respond() gave for some sentences."""
    return sum(len(errors) for errors, _ in sentences)


def long_answers(k, split, count):
    """-> pairs whose prompts ask for k sentences.

    For each sentence there are two, as in the tiny data, and each answer takes one of them at
    random. But in the warm-up one answer takes the better of every two: what the model knows of
    good and bad sentences is to be the same for every k.
    """
    rng, pairs = random.Random(f"{k} {split}"), []
    while len(pairs) < count:
        worlds = [{slot: rng.choice(words) for slot, words in WORDS.items()} for _ in range(k)]
        twice = [[respond(rng, world), respond(rng, world)] for world in worlds]
        if split == "warmup":
            twice = [sorted(two, key=lambda one: len(one[0])) for two in twice]
        chosen, rejected = sorted(zip(*twice, strict=True), key=wrong_in)
        if wrong_in(chosen) == wrong_in(rejected):
            continue
        row = {"prompt": " ".join(map(QUESTION.format_map, worlds))}
        for side, sentences in ("chosen", chosen), ("rejected", rejected):
            row[side] = " ".join(text for _, text in sentences)
            row[f"{side}_errors"], start = [], 0
            for errors, text in sentences:
                row[f"{side}_errors"] += [[start + a, start + b] for a, b in errors]
                start += len(text) + 1
        pairs.append(treg.read_pair(row))
    return pairs


def words_to_change(said, right):
    """The least number of words to change, add or take out to make one list the other."""
    row = list(range(len(right) + 1))
    for i, word in enumerate(said, 1):
        before, row = row, [i]
        for j, wanted in enumerate(right, 1):
            row.append(min(before[j - 1] + (word != wanted), before[j] + 1, row[j - 1] + 1))
    return row[-1]


def errors_by_sentence(pair, text):
    """-> for each sentence that the prompt asks for, how many words of the text's are wrong.

    That is the distance to the nearest of the right sentences, and at most the number of its words.
    """
    worlds = re.findall(re.sub(r"\{\w+\}", r"(\\w+)", QUESTION), pair.prompt[-1]["content"])
    sentences = [*re.findall(r"[^.]+\.?", text), *[""] * len(worlds)]
    counts = []
    for values, sentence in zip(worlds, sentences, strict=False):
        world = dict(zip(WORDS, values, strict=True))
        right = [shape.format_map(world).split() for shape in SHAPES]
        counts.append(min(min(words_to_change(sentence.split(), r), len(r)) for r in right))
    return counts


class Runs:
    """All runs with answers of k sentences: a reference for each seed, and a file of results."""

    def __init__(self, folder, k, most, heldout, warm_steps, done):
        self.k, self.warm_steps, self.done = k, warm_steps, done
        counts = {"warmup": 900, "train": most, "validation": heldout, "test": heldout}
        self.splits = {split: long_answers(k, split, count) for split, count in counts.items()}
        self.reference = functools.cache(self.make_reference)
        self.path = Path(folder) / f"map-{k}.jsonl"
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.results = {row["name"]: row for row in map(json.loads, lines)}

    def make_reference(self, seed):
        """-> (model, tokenizer, its weights, {split: annotated pairs})."""
        made = treg.make_tiny(self.splits["warmup"], seed, self.warm_steps, styles=["answer"])
        weights = {name: weight.clone() for name, weight in made[0].state_dict().items()}
        splits = [split for split in self.splits if split != "warmup"]
        pairs = {split: treg.annotate(*made, self.splits[split], alpha=1.0) for split in splits}
        return *made, weights, pairs

    def result(self, size, split, seed, variant, lr, beta):
        """Train a variant on the first pairs and judge it on a split; no run is done twice."""
        name = f"{size} {split} {seed} {variant} {lr} {beta}"
        if name not in self.results:
            model, tokenizer, weights, pairs = self.reference(seed)
            s = treg.Settings(lr=lr, beta=beta, seed=seed, **MAP_VARIANTS[variant])
            train, heldout = (
                treg.change_rewards(of, s.token_rewards, seed)
                for of in (pairs["train"][:size], pairs[split])
            )
            model.load_state_dict(weights)
            # about 114 steps, whatever the number of pairs
            treg.train(model, train, s, epochs=max(1, round(912 / size)))
            metrics, judged = treg.evaluate(model, tokenizer, heldout, s, lambda *_: 0, draws=2)
            errors = [[errors_by_sentence(p, text) for text in p.samples] for p in judged]
            row = {"name": name, "credit": metrics["credit_auroc"]}
            row |= {"accuracy": metrics["accuracy"], "r_hat": metrics["token_reward_auroc"]}
            row["errors"] = np.mean(errors, (1, 2)).tolist()
            row["perfect"] = (np.array(errors) == 0).mean((1, 2)).tolist()
            treg.append(self.path, row)
            self.results[name] = row
        self.done.update()
        return self.results[name]

    def tuned(self, size):
        """Rate, then β, of plain DPO with the most perfect sentences of validation, two seeds."""

        def perfect(lr, beta):
            of = [self.result(size, "validation", seed, "DPO", lr, beta) for seed in (0, 1)]
            return np.mean([row["perfect"] for row in of])

        lr = max(RATES, key=lambda lr: perfect(lr, 1.0))
        return lr, max(BETAS, key=lambda beta: perfect(lr, beta))


def rank_test(x, y, times=10_000):
    """-> (Spearman's correlation, how often a random order of y gives as much: one-sided p)."""
    # the rank of a value is the mean place of all that are equal to it
    x, y = ([np.mean(np.flatnonzero(np.sort(v) == one)) for one in v] for v in (x, y))
    rng, found = np.random.default_rng(0), np.corrcoef(x, y)[0, 1]  # nan if all are equal
    random_ones = [np.corrcoef(x, rng.permutation(y))[0, 1] for _ in range(times)]
    return found, (1 + sum(one >= found - 1e-12 for one in random_ones)) / (times + 1)


def make_map(folder, lengths=MAP_LENGTHS, sizes=MAP_SIZES, seeds=8, heldout=150, warm_steps=2000):
    """Run, or finish, all cells; print the map and its test. -> the cells, dicts."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    each = 2 * (len(RATES) + len(BETAS)) + seeds * len(MAP_VARIANTS)
    cells = []
    with treg.bar(total=len(lengths) * len(sizes) * each, desc="map", unit=" runs") as done:
        for k in lengths:
            runs = Runs(folder, k, max(sizes), heldout, warm_steps, done)
            for size in sizes:
                lr, beta = runs.tuned(size)
                cell = {"k": k, "pairs": size}
                of = {
                    variant: [
                        runs.result(size, "test", seed, variant, lr, beta) for seed in range(seeds)
                    ]
                    for variant in MAP_VARIANTS
                }
                for name in ("perfect", "errors", "credit", "r_hat"):
                    cell[name] = float(np.mean([row[name] for row in of["DPO"]]))
                for variant in [*MAP_VARIANTS][1:]:
                    for name in ("perfect", "errors"):
                        both = zip(of[variant], of["DPO"], strict=True)
                        gains = [np.subtract(one[name], dpo[name]) for one, dpo in both]
                        cell[f"{variant} {name}"] = treg.interval(gains)
                cells.append(cell)
    gains = [f"{variant} perfect" for variant in MAP_VARIANTS if variant != "DPO"]
    gains.append("α = 1 errors")
    head = "  K  pairs    DPO  credit     r̂  errors"
    print(head + "".join(name.removesuffix(" perfect").rjust(14) for name in gains))
    for cell in cells:
        line = "{k:3d}{pairs:7d}{perfect:7.3f}{credit:8.3f}{r_hat:7.3f}{errors:8.3f}".format(**cell)
        for name in gains:
            mean, _, high = cell[name]
            line += f"{mean:+.3f}±{high - mean:.3f}".rjust(14)
        print(line)
    opened = [1 - cell["credit"] for cell in cells]
    rho, p = rank_test(opened, [cell["α = 1 perfect"][0] for cell in cells])
    print(f"\nrank correlation of gain (α = 1) and open credit {rho:+.2f}, p = {p:.4f}")
    return cells


def test_the_map_is_made_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    trained, train = [], treg.train

    def one_epoch(model, pairs, s, epochs):
        trained.append(len(pairs) * epochs)
        return train(model, pairs, s, epochs=1)

    monkeypatch.setattr(treg, "train", one_epoch)
    monkeypatch.setattr(sys.modules[__name__], "RATES", (1e-3, 2e-3))
    small = {"lengths": [2], "sizes": [8, 16], "seeds": 2, "heldout": 4, "warm_steps": 2}
    cells = make_map(tmp_path, **small)
    said = capsys.readouterr().out
    assert "rank correlation" in said and [cell["pairs"] for cell in cells] == [8, 16]
    assert {*trained} == {912}, "as many pairs are seen whatever their number"
    lines = (tmp_path / "map-2.jsonl").read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == len(trained) == 2 * (2 * (2 + 2) + 2 * len(MAP_VARIANTS))
    (tmp_path / "map-2.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    trained.clear()
    make_map(tmp_path, **small)
    assert capsys.readouterr().out == said and len(trained) == 1


def test_long_answers_are_judged_sentence_by_sentence():
    for split, wrong_side in ("train", "chosen"), ("warmup", "rejected"):
        for pair in long_answers(3, split, 20):
            counts = {}
            for side in ("chosen", "rejected"):
                response = getattr(pair, side)
                counts[side] = sum(errors_by_sentence(pair, response.text))
                assert counts[side] == len(response.errors), "an error is one wrong word"
            assert counts["chosen"] < counts["rejected"], wrong_side
    [right, wrong] = (
        "There is a tiny red iron lamp in the hall.",
        "There is a red iron lamp in hall.",
    )
    pair = treg.Pair([{"content": "Describe a tiny red iron lamp in the hall. " * 2}], None, None)
    assert errors_by_sentence(pair, f"{right} {wrong} {wrong}") == [0, 2]
    assert errors_by_sentence(pair, right) == [0, 10], "a sentence that is missing"


def test_rank_correlation_by_hand():
    """Ranks 1 2 3 4 and 1 2 4 3: 1 − 6 · (0 + 0 + 1 + 1) / (4 · 15) = 0.8; 4 of 24 orders do so."""
    rho, p = rank_test([1, 2, 3, 9], [0.1, 0.2, 0.9, 0.3])
    assert rho == pytest.approx(0.8) and p == pytest.approx(4 / 24, abs=0.015)


@pytest.mark.parametrize(
    "words, right, wrong",
    [
        ("exactly three facts", "- a\n- b\n- c", "- a\n- b"),
        ("exactly three facts", "Facts:\n\n1. a\n2. b\n3. c", "- a\n- b\n- c\n- d"),
        ("ends with the word today", "Bread is made today.", "Today bread is made."),
        ("begins with the word People", "People eat bread.", "All People eat bread."),
        ("fewer than twelve words", "a " * 11, "a " * 12),
        ("word old and not", "An old\nbread.", "An old bread,\na new bread."),
        ("JSON object", '{"name": "bread", "use": "food"}', '{"name": "bread"}'),
        ("without the word the", "Bread is food.", "Bread is\nthe best."),
        ("number in digits", "2 loaves", "two loaves"),
    ],
)
def test_the_judge_of_the_real_model_by_hand(words, right, wrong):
    [asked] = [kind.format("bread") for kind in RULES if words in kind]
    pair = treg.read_pair({"prompt": asked, "chosen": "a", "rejected": "b"})
    assert (follows(pair, right), follows(pair, wrong)) == (1, 0)


def test_the_experiments_run_at_their_smallest(at_place, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(treg, "TINY_DATA", "few.jsonl")
    picture(epochs=1)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head in README.splitlines()
    assert all(line.count("│") == 3 for line in lines) and any("[" in line for line in lines)

    coin = lambda pair, text: float(len(text) % 2)  # noqa: E731  the model follows no instruction
    monkeypatch.setattr(sys.modules[__name__], "follows", coin)
    real("DIR", tmp_path, topics="bread rivers cats tea salt maps", seeds=1)
    said = capsys.readouterr().out
    assert "SimPO-REG" in said and "prompts own.json" in said.replace(f"{tmp_path}/", "")
    rows = history(tmp_path, "blamed.jsonl")
    assert {row["split"] for row in rows} == {"train"} and any(row["chosen_errors"] for row in rows)
    real("DIR", tmp_path, seeds=1)
    assert capsys.readouterr().out.count("going on after 6 of 6 variants") == 2

    def run(argv, **_):
        said = "{'train_runtime': '1.5'}" if "trl.scripts.dpo" in argv else done(*argv[2:])
        return types.SimpleNamespace(stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    cost(1, 32, 100, "--batch-size", 50, "--max-pairs", 8)
    head, first, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[2] for row in rows][:3] == ["64", "256", "1024"]
    trl = r"(  TRL: 1\.5 s, 1\.5 s)?"
    assert re.fullmatch(rf" +100 +16 +16 +[\d.]+ s +[\d.]+ s +[\d.]+ GiB{trl}", first)
    found = re.search(BLAMED["fewer than twelve"], " ".join("abcdefghijklmn"))
    assert found[1] == "l m n", "the twelfth word and all after it"


if __name__ == "__main__":
    experiments = {"picture": picture, "real": real, "map": make_map, "cost": cost}
    if len(sys.argv) < 2 or sys.argv[1] not in experiments:
        sys.exit(f"python test_treg.py {'|'.join(experiments)} …: see README.md")
    transformers.logging.set_verbosity_error()
    experiments[sys.argv[1]](*sys.argv[2:])
