# SPDX-License-Identifier: MIT
"""T-REG: preference optimisation with token-level reward regularisation.

    python treg.py                            a tiny model, made and trained
    python treg.py --model gpt2               a Hugging Face model, same data
    python treg.py --model DIR --data FILE    your model, your preference pairs
    python treg.py --model DIR --data FILE --check-prompts
                                              do the prompts suit this model?

The method (Zhou, Zhang, Zhao and Meng, ACL 2025, arXiv 2412.02685). A frozen model scores every
token of both responses twice, after a prompt that asks for a better answer and after one that asks
for a worse one. It is the language model itself, before training; it needs no reward head.

    r̂_t = σ( log π_eval(y_t | x_better, y_<t) − log π_eval(y_t | x_worse, y_<t) ) − ½
    r_t = β ( log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) )
    z   = Σ_t r_t(chosen) − Σ_t r_t(rejected) − γ
    L   = −log σ(z) − α · w · Σ_t r̂_t r_t, over both responses,      w = σ(−z), detached

r̂ is the token reward, in [−½, ½]. r is the token reward that the policy implies, DPO's here; the
last term of L is the regulariser: it pays for agreement of r with r̂. z is the margin, L the loss
of one pair. Since w is also the factor in the gradient of −log σ(z), T-REG rescales the gradient of
each token, by 1 + α r̂_t in the chosen response and by 1 − α r̂_t in the rejected one.

Our own derivation or choice, not the paper's: these two factors (they hold for sequence weighting,
not for static, where the w in L is the constant ½); this constant; the regulariser in terms of r_t
for SimPO too; γ in SimPO's w.

Reading order. Sections 1 to 3 are the paper: they need torch alone, and are made to be copied.
    1 prompts    2 token rewards    3 implicit rewards and the loss
After these stand small tools, for errors and printing: skip them.
Sections 4 to 6 put the paper to work; after these the method is whole.
    4 log-probs    5 annotate    6 train
The rest is what a program needs. The settings, s in the code, are explained in section 11.
    7 data    8 evaluate and show    9 the tiny model    10 compare    11 settings and run

Shapes: B pairs or rows, T response tokens, the end token included. What is per token is (B, T), or
(T,) for one response; column t is response token t; a mask says where a row has a token. Log-probs
are natural logarithms.
"""

import argparse
import contextlib
import csv
import ctypes
import gzip
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args, get_origin

if __name__ == "__main__":  # what follows takes some seconds; Ctrl-C ends it without a word
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("loading …", file=sys.stderr)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm complains in a notebook without ipywidgets
    from tqdm.auto import tqdm

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------- 1 prompts
# From an instruction and a response to two prompts: one asks for a better answer, one for a worse.
#
# Our wording, on the paper's four criteria. What differs between the two comes last: what stands
# before it is the same text, and is computed once.
PROMPTS = {
    "answer": {
        "better": "{prompt}\n\nGive an answer that is helpful, correct, coherent and concise.",
        "worse": "{prompt}\n\nGive an answer that is unhelpful, wrong, incoherent and rambling.",
    },
    "revise": {
        "better": "{prompt}\n\nResponse: {response}\n\nRevise the response so that it is "
        "more helpful, more correct, more coherent and more concise.",
        "worse": "{prompt}\n\nResponse: {response}\n\nRevise the response so that it is "
        "less helpful, less correct, less coherent and less concise.",
    },
}


def contrastive_prompts(prompt, response, style):
    """x_better and x_worse of the paper -> (better, worse), each of prompt's own kind.

    prompt: a text, or a list of {role, content} whose last user message is rewritten, no other.
    style: a name in PROMPTS, or {"better": …, "worse": …} with {prompt} and perhaps {response}.
    """
    templates = PROMPTS[style] if isinstance(style, str) else style
    if isinstance(prompt, str):
        # format does not look into what it fills in: a {response} in the prompt stays just text
        better = templates["better"].format(prompt=prompt, response=response)
        worse = templates["worse"].format(prompt=prompt, response=response)
        return better, worse
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    texts = contrastive_prompts(prompt[last]["content"], response, style)
    better, worse = ({**prompt[last], "content": text} for text in texts)
    before, after = prompt[:last], prompt[last + 1 :]
    return [*before, better, *after], [*before, worse, *after]


# ---------------------------------------------------------------------------------- 2 token rewards
# From the log-probs of the same tokens after the two prompts to the token rewards r̂.


def token_rewards(better_logps, worse_logps, mask):
    """r̂ = σ(better − worse) − ½, exactly 0 where mask is 0. (B, T) × 3 -> (B, T) in [−½, ½].

    better_logps, worse_logps: log π_eval of the response tokens after x_better and after x_worse.
    """
    # where, not a product: padding may hold NaN, and NaN × 0 is NaN. Below, where gradients flow,
    # it keeps them finite too
    difference = torch.where(mask.bool(), better_logps - worse_logps, 0.0)
    return torch.sigmoid(difference) - 0.5


# ----------------------------------------------------------------- 3 implicit rewards and the loss
# From the log-probs of the policy in training to its implicit token rewards r (one function for
# each algorithm), and from r and r̂ to the loss of a pair (the same lines for every algorithm).
#
# Why a log-ratio is a reward: the policy that maximises a reward, less β times its divergence from
# π_ref, has β log(π / π_ref) = reward, up to a term of the prompt alone. So any policy implies a
# reward. It is a sum over tokens, and r_t is one summand.


def dpo_rewards(logps, ref_logps, mask, beta):
    """DPO's r_t = β (log π − log π_ref), exactly 0 where mask is 0. (B, T) × 3 -> (B, T)."""
    return beta * torch.where(mask.bool(), logps - ref_logps, 0.0)


def simpo_rewards(logps, mask, beta):
    """SimPO's r_t = (β / |y|) log π, exactly 0 where mask is 0. (B, T) × 2 -> (B, T).

    |y| is the number of tokens of the response, the end token included.
    """
    length = mask.bool().sum(-1, keepdim=True).clamp(min=1)
    return beta * torch.where(mask.bool(), logps, 0.0) / length


def treg_loss(chosen, rejected, chosen_hat, rejected_hat, alpha, gamma=0.0, weighting="sequence"):
    """The T-REG loss L and the preference margin z. (B, T) × 4 -> (loss, margin), (B,) each.

    chosen, rejected: implicit token rewards r_t. chosen_hat, rejected_hat: token rewards r̂_t.
    All four hold zeros in their padding; the T of the two sides may differ.
    alpha = 0 is exactly DPO, or, with SimPO's rewards and gamma, SimPO.
    weighting: "sequence" is w = σ(−z), "static" is w = ½ (our choice). Another is a ValueError.
    """
    if weighting not in ("sequence", "static"):
        raise ValueError(f'weighting is "sequence" or "static", not {weighting!r}')
    margin = chosen.sum(-1) - rejected.sum(-1) - gamma
    # detached: the weight scales the regulariser's gradient and has none of its own
    weight = torch.sigmoid(-margin).detach() if weighting == "sequence" else 0.5
    # Σ_t r̂_t r_t over both responses, the paper's −L_reg: large where r and r̂ have the same sign
    agreement = (chosen_hat * chosen).sum(-1) + (rejected_hat * rejected).sum(-1)
    return -F.logsigmoid(margin) - alpha * weight * agreement, margin


# ------------------------------------------------------ small tools: errors, and what is printed


class UserError(Exception):
    """A mistake that the user can mend, in one line: where, what, and what to do."""


def need(condition, message):
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def refuse(bad):
    """UserError with the first five of these messages and the number of all, if there are any."""
    if bad:
        more = f"; and {len(bad) - 5} more, {len(bad)} rows in all" if len(bad) > 5 else ""
        raise UserError("; ".join(bad[:5]) + more)


def one_line(error):
    """The message of a library's error, and of what caused it, on one line."""
    texts = [" ".join(str(each).split())[:160] for each in (error, error.__cause__) if each]
    return ": ".join(filter(None, texts)) or type(error).__name__


def out_of_memory(error):
    """Did memory run out? A CPU and Apple's GPU have no kind of error for it, only words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return bool(re.search("out of memory|allocate memory", str(error)))


@contextlib.contextmanager
def explain(what, hint):
    """Within it a library's error becomes the user's, in one line: what failed, why, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every library has its own
        if out_of_memory(error):
            raise
        raise UserError(f"{what} ({one_line(error)}); {hint}") from None


def saving(path):
    """explain, for what writes a file of the run folder."""
    return explain(
        f"{path}: not saved", "if the disk is full make room, then --resume: nothing is lost"
    )


def loading(path):
    """explain, for what reads one."""
    return explain(f"{path}: damaged", "begin again in another --out")


def bar(items=None, delay=1, **options):
    """A progress bar, after a second, where standard error is a terminal or a notebook's."""
    off = None if hasattr(sys.stderr, "isatty") else True  # None: tqdm looks for a terminal
    return tqdm(items, delay=delay, leave=False, disable=off, **options)


def visible(text):
    """The text with its control characters spelled out: a terminal would obey them."""
    acting = ("Cc", "Cf", "Cs", "Zl", "Zp")
    kept = "\n\u200c\u200d"  # the last two join or part letters and emoji

    def spelled(character):
        acts = unicodedata.category(character) in acting and character not in kept
        return repr(character)[1:-1] if acts else character

    return "".join(map(spelled, str(text)))


def say(text, file=None):
    """Print a line, whatever the text holds and whatever standard output has become."""
    stream = file or sys.stdout
    with contextlib.suppress(ValueError, AttributeError):  # closed, or None
        text, encoding = visible(text), getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)


# -------------------------------------------------------------------------------------- 4 log-probs
# From a language model, prompts and responses (lists of token ids) to the log-probability of every
# response token. Nothing outside this section knows about trees, positions or attention masks.
#
# Rows that begin alike share their beginning: it is computed once. The prompt "Name a bird." with
# the responses "A crow." and "A bat." becomes a tree, written depth first into one row of nodes:
#
#     node       0      1    2       3          4      5
#     token      Name   a    bird.   A          crow   bat
#     position   0      1    2       3          4      4      its place in its own row
#     end        6      6    6       6          5      6      one past its last descendant
#     predicts               A, A    crow, bat  .      .      a token of each response
#
# A node attends to its ancestors and to itself, and node i is an ancestor of j if i < j < end of i.
# So "bat" does not see "crow" (4 < 5, but end of 4 is 5). The last token of a response is
# predicted and never read: nothing follows it.


def depth_first(rows):
    """Sorted lists of ids -> (ids, positions, ends) of the nodes, and the nodes of each row."""
    ids, positions, ends, paths = [], [], [], []
    before, path = [], []
    for row in rows:
        shared = len(os.path.commonprefix([before, row]))  # of any sequences, not of paths alone
        new = range(len(ids), len(ids) + len(row) - shared)
        ids += row[shared:]
        positions += range(shared, len(row))
        ends += [0] * len(new)
        path = [*path[:shared], *new]
        for node in path:
            ends[node] = len(ids)
        paths.append(path)
        before = row
    return ids, positions, ends, paths


LARGE_TREE = 512  # nodes; in a smaller one attention costs less than its branches' many calls


class TreeMask(torch.Tensor):
    """The attention mask of a tree; with it PyTorch's attention is computed branch by branch.

    A node sees nothing outside its own branch and the stem, which is all nodes before the first
    fork. The rest of the square of nodes × nodes is masked, and in a long row most of the work
    would go there. A model that has an attention of its own takes it for any other mask, and what
    is computed from it is an ordinary tensor.
    """

    @classmethod
    def of(cls, mask, ends):
        """A mask (1, 1, N, N), and one past the last descendant of each of the N nodes."""
        nodes = len(ends)
        stem = next((node for node, end in enumerate(ends) if end < nodes), nodes)
        tree = mask.as_subclass(cls)
        # made here, once: every layer keeps the masks that it is given for the gradient
        tree.sizes, tree.masks = [stem], [mask[..., :stem, :stem].contiguous()]
        start = stem
        while start < nodes:
            end = ends[start]
            seen = [*range(stem), *range(start, end)]
            tree.sizes.append(end - start)
            tree.masks.append(mask[..., start:end, seen])
            start = end
        return tree

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.scaled_dot_product_attention and isinstance(mask, cls):
                return attend_by_branch(mask, *args, **kwargs)
            result = function(*args, **kwargs)
            # transformers 4 takes all of it as a slice
            slices = function is torch.Tensor.__getitem__
            return args[0] if slices and result.shape == args[0].shape else result


def attend_by_branch(tree, query, key, value, **options):
    """scaled_dot_product_attention, (…, N, size of a head) × 3 -> the same, part by part.

    The stem sees itself alone, and a branch the stem and itself.
    """
    # split, whose gradient is put together at once: a slice's would be N nodes long for each part
    queries, keys, values = (each.split(tree.sizes, -2) for each in (query, key, value))
    results = []
    for part, mask in enumerate(tree.masks):
        seen = [0, part] if part else [0]
        own_keys = torch.cat([keys[i] for i in seen], -2)
        own_values = torch.cat([values[i] for i in seen], -2)
        options["attn_mask"] = mask
        results.append(
            F.scaled_dot_product_attention(queries[part], own_keys, own_values, **options)
        )
    return torch.cat(results, -2)


class TokenLogps(torch.autograd.Function):
    """The log-probability of one token in each row of logits. (N, V), (N,) -> (N,) float32.

    ∂ log p(y) / ∂ logit_v = 1[v = y] − p(v), by hand, because tensors of N × V numbers are the
    largest of all: in its backward pass cross_entropy would hold three of them, and this holds one.
    """

    @staticmethod
    def forward(ctx, logits, tokens):
        logps = logits.log_softmax(-1, dtype=torch.float32)
        ctx.save_for_backward(logps, tokens)
        return logps.gather(-1, tokens[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logps, tokens = ctx.saved_tensors
        result = logps.exp_().mul_(-gradient[:, None])  # in place: it is not needed again
        result.scatter_add_(-1, tokens[:, None], gradient[:, None])
        return result, None


def unwrapped(model):
    """The model itself, where it may stand in a wrapper: LoRA's, or one for several GPUs."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def one_pass(model, prompts, responses):
    """One forward pass over the tree of these rows. -> log-probs (T,) of each response, a tuple."""
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    ids, positions, ends, paths = depth_first([rows[i] for i in order])
    nodes = dict(zip(order, paths, strict=True))  # back in the order of the rows
    sources, targets = [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        sources += nodes[i][len(prompt) - 1 :]  # the nodes that predict the response's tokens
        targets += response

    tensor = partial(torch.tensor, device=next(model.parameters()).device)
    inputs = {"input_ids": tensor([ids]), "use_cache": False}
    if len(rows) > 1:
        node, end = tensor(range(len(ids))), tensor(ends)
        sees = (node <= node[:, None]) & (node[:, None] < end)
        # in autocast's precision: else every layer would make a mask of its own from this one
        device = node.device.type
        autocast = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if autocast else torch.float32
        # numbers, not booleans: some architectures add the mask to the scores
        mask = torch.where(sees, 0.0, torch.finfo(kind).min).to(kind)[None, None]
        if len(ids) >= LARGE_TREE:
            mask = TreeMask.of(mask, ends)
        inputs |= {"attention_mask": mask, "position_ids": tensor([positions])}
    # the output head is most of a small model: it runs only where a response token is predicted
    sources, targets = tensor(sources), tensor(targets)
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        logits = model(**inputs, logits_to_keep=sources).logits[0]
    else:
        logits = model(**inputs).logits[0, sources]
    logps = TokenLogps.apply(logits, targets)
    return logps.split([len(response) for response in responses])


def response_logps(model, prompts, responses):
    """log π(y_t | x, y_<t) of each response after its prompt. -> (logps, mask), (B, T) each.

    prompts, responses: two lists of B lists of token ids, none empty. logps is float32, with zeros
    in the padding; mask is bool. With the attribute model.shares_prompts, which annotate sets, all
    rows go through one pass and share their beginnings; without it each row goes by itself.
    """
    if getattr(unwrapped(model), "shares_prompts", False):
        logps = one_pass(model, prompts, responses)
    else:
        pairs = zip(prompts, responses, strict=True)
        logps = [one_pass(model, [prompt], [response])[0] for prompt, response in pairs]
    mask = [torch.ones_like(row, dtype=torch.bool) for row in logps]
    return pad_sequence(logps, batch_first=True), pad_sequence(mask, batch_first=True)


def full_attention(model, length):
    """Is every layer plain causal attention, so that a mask can hide one response from another?

    Read from the architecture, for rows of at most length tokens; when in doubt, False.
    """
    config = model.config.get_text_config()
    settings = config.to_dict()
    # a state runs through the row, from one response into the next (Mamba); so does a convolution
    # (LFM2)
    if getattr(model, "_is_stateful", False):
        return False
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return False
    # other kinds of layers (Qwen3-Next; GPT-Neo's windows are of places in the tree), or a window
    # that a row does not fit into (Mistral)
    kinds = {*(settings.get("layer_types") or settings.get("attention_layers") or ())}
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    suffixes = ("window", "window_size", "window_len", "attention_chunk_size")
    windows = [value for name, value in settings.items() if name.endswith(suffixes)]
    # use_sliding_window is found too, and its True is no window of 1
    windowed = any(type(window) is int and 0 < window < length for window in windows)
    if windowed and settings.get("use_sliding_window", True):
        return False
    # positions that are turned by an angle which depends on the longest row (Phi-3's longrope)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    types = {part.get("rope_type", part.get("type", "default")) for part in ropes}
    return types <= {"default", "linear", "llama3", "yarn"}


@torch.no_grad()
def sharing_is_exact(model, prompts, responses):
    """May these rows share their beginnings? By the architecture, and by computing both ways."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    if not full_attention(model, max(map(len, rows))):
        return False
    try:
        together = one_pass(model, prompts, responses)
    except Exception as error:  # a model that takes no such mask or positions: each says it its way
        if out_of_memory(error):
            raise
        return False
    # two rows are enough: the longest would notice a window, and the last in the tree a response
    # that it must not see
    longest = rows.index(max(rows, key=len))
    last = rows.index(max(rows))
    for row in bar({longest, last}, desc="check sharing", unit=" rows"):
        [alone] = one_pass(model, [prompts[row]], [responses[row]])
        # rounding moves log-probs by 1e-5, a response that sees another by 1e-2 and more
        if not torch.allclose(alone, together[row], rtol=0, atol=1e-3):
            return False
    return True


# --------------------------------------------------------------------------------------- 5 annotate
# From preference pairs to annotated pairs: with the reference's log-probs and with token rewards.
# The reference is the policy before its first step, so one copy of the weights serves both.


@dataclass
class Response:
    """A response and what is known of its tokens; T of them, the last one the end token."""

    message: dict  # {"role": "assistant", "content": its text} and perhaps thoughts, tool calls
    errors: list | None = None  # labelled spans [start, end) of bad text, in characters
    # set by encode
    ids: torch.Tensor | None = None  # (T,) int32
    prompt_ids: torch.Tensor | None = None  # what stands before the response: x
    better_ids: torch.Tensor | None = None  # x_better
    worse_ids: torch.Tensor | None = None  # x_worse
    good: torch.Tensor | None = None  # (T,) bool: outside all labelled errors; None without labels
    # set by annotate
    ref_logps: torch.Tensor | None = None  # (T,) float32: log π_ref
    token_rewards: torch.Tensor | None = None  # (T,) float32: r̂
    # set by measure
    credit: torch.Tensor | None = None  # (T,) float32: learned credit, log π − log π_ref

    @property
    def text(self):
        return self.message["content"]


@dataclass
class Pair:
    """A prompt and two responses, of which the first is preferred."""

    prompt: list  # messages {"role", "content"}; the last one is the user's
    chosen: Response
    rejected: Response
    where: str = ""  # file and line, for messages
    tools: list | None = None  # function descriptions for the chat template
    answers: list | None = None  # accepted answers, for exact match
    # set by measure
    correct: float | None = None  # 1 if the chosen response has the higher reward, a tie is ½
    # set by evaluate
    samples: list = field(default_factory=list)  # responses drawn from the model
    score: float | None = None  # mean judgement of the samples


def sides(pairs):
    """The chosen responses of all pairs, then the rejected ones: the order of rows in a batch."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def copied(pair):
    """A copy of the pair whose responses can be written to; what they hold is shared."""
    return replace(pair, chosen=replace(pair.chosen), rejected=replace(pair.rejected))


def need_annotated(pairs):
    """UserError unless these are what annotate returns."""
    ready = all(response.ref_logps is not None for response in sides(pairs))
    need(ready, "the pairs are not annotated; give what annotate returns")


def have_token_rewards(pairs):
    """Are any of them not 0? With alpha 0 annotate makes none."""
    return any(response.token_rewards.any() for response in sides(pairs))


def id_lists(responses, name):
    """An attribute that holds token ids, of all responses, as lists."""
    return [getattr(response, name).tolist() for response in responses]


def end_tokens(pairs):
    """The ids of the end tokens of all responses: mostly one, a tool call may have another."""
    return sorted({response.ids[-1].item() for response in sides(pairs)})


def stacked(responses, name, device):
    """An attribute of all responses as one (B, T) tensor with zeros in the padding."""
    rows = [getattr(response, name) for response in responses]
    return pad_sequence(rows, batch_first=True).to(device)


def make_room(pairs, *names):
    """Set attributes of all responses to (T,) zeros, which unstacked overwrites.

    Not one by one between the passes: what stays would lie between what goes, and the holes of a
    heap are not filled again. Ten thousand pairs would hold gigabytes.
    """
    for response in sides(pairs):
        for name in names:
            setattr(response, name, torch.zeros(len(response.ids)))


def unstacked(responses, name, values):
    """Write the rows of (B, T) values, without their padding, into an attribute's tensors."""
    for response, row in zip(responses, values.float().cpu(), strict=True):
        getattr(response, name).copy_(row[: len(response.ids)])


def packs(pairs, limit):
    """Cut pairs into groups of about limit tokens, one for each forward pass."""
    pack, tokens = [], 0
    for pair in pairs:
        length = len(pair.chosen.prompt_ids) + len(pair.chosen.ids) + len(pair.rejected.ids)
        if pack and tokens + length > limit:
            yield pack
            pack, tokens = [], 0
        pack.append(pair)
        tokens += length
    if pack:
        yield pack


def policy_logps(model, pairs, dtype):
    """log π of both responses after the prompt, in the precision of training. -> (2B, T) × 2."""
    responses = sides(pairs)
    # The weights stay float32, or a step of 5e-7 would be rounded away; bf16 is for products only.
    # Without autocast's cache, which would be a second copy of the weights.
    with torch.autocast(
        model.device.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False
    ):
        return response_logps(model, id_lists(responses, "prompt_ids"), id_lists(responses, "ids"))


def scored_rows(pair):
    """All rows that are scored for a pair. -> [(ids of a prompt, ids of a response)], as lists."""
    rows = []
    for response in sides([pair]):
        for prompt in (response.prompt_ids, response.better_ids, response.worse_ids):
            if prompt is not None:
                rows.append((prompt.tolist(), response.ids.tolist()))
    return rows


def longest_row(pair):
    """The most tokens in a row that is scored for the pair."""
    return max(len(prompt) + len(response) for prompt, response in scored_rows(pair))


def check_vocabulary(model, pairs):
    """UserError if a token has no embedding. A tokenizer may have more that no text becomes."""
    largest = max(max(prompt + reply) for pair in pairs for prompt, reply in scored_rows(pair))
    size = model.get_input_embeddings().weight.shape[0]
    what = f"--model {model.name_or_path}: token {largest}, but embeddings of {size}"
    need(largest < size, f"{what}; the tokenizer is another model's")


def set_sharing(model, pairs):
    """Set model.shares_prompts: may rows share beginnings, those of these pairs and all before?"""
    base = unwrapped(model)
    if getattr(base, "shares_prompts", True):  # once False it stays False
        rows = scored_rows(max(pairs, key=longest_row))  # what goes wrong grows with length
        base.shares_prompts = sharing_is_exact(model, *zip(*rows, strict=True))
        if not base.shares_prompts:
            say("note: this architecture cannot share prompts: each response is computed alone")


@torch.no_grad()
def annotate(model, tokenizer, pairs, settings=None, reward_model=None, **changes):
    """-> encoded copies of the pairs with ref_logps and token_rewards, for train or other trainers.

    model: the untrained policy. pairs: from load_pairs, or encoded.
    reward_model: π_eval, a language model with the same tokenizer; by default the model itself.
    settings, changes: it uses prompts, token_rewards, alpha, dtype, max_length, pass_tokens and
    seed. What r̂ becomes, by token_rewards:
        contrastive   from the contrastive prompts
        shuffled      the same, permuted within each response
        swapped       the same, with the other sign
        sft           1 on the chosen response, 0 on the rejected
        dpo           as contrastive; compare replaces it
    No contrastive prompt is read with sft, nor with alpha 0, where the others are 0.
    UserError: a token has no embedding, or encoded pairs lack what these settings need.
    """
    s = resolve(settings, model, **changes)
    contrastive = s.alpha > 0 and s.token_rewards != "sft"
    if any(pair.chosen.ids is None for pair in pairs):
        style = read_prompts(s.prompts) if contrastive else None
        pairs = encode(tokenizer, pairs, style, s.max_length)
    elif any(pair.chosen.token_rewards is not None for pair in pairs):
        need("prompts" not in changes, "the pairs are annotated already; give those of load_pairs")
    ready = not contrastive or all(pair.chosen.better_ids is not None for pair in pairs)
    need(ready, "the pairs are encoded without contrastive prompts; give encode a style")
    if not pairs:
        return []
    pairs = [copied(pair) for pair in pairs]
    scorer = reward_model or model
    for each in {model, scorer}:
        check_vocabulary(each, pairs)
        set_sharing(each, pairs)
    make_room(pairs, "ref_logps", "token_rewards")
    for pack in bar(list(packs(pairs, s.pass_tokens)), desc="reference", unit=" passes"):
        # in the precision of training: before the first step log π − log π_ref is to be 0
        ref_logps, _ = policy_logps(model, pack, s.dtype)
        unstacked(sides(pack), "ref_logps", ref_logps)
    # packs counts a response once, and here it is read twice, after prompts that may hold it too
    scored = list(packs(pairs, s.pass_tokens // 3)) if contrastive else []
    for pack in bar(scored, desc="token rewards", unit=" passes"):
        responses = sides(pack)
        prompts = id_lists(responses, "better_ids") + id_lists(responses, "worse_ids")
        # float32 always: σ of a bfloat16 error is an error
        logps, mask = response_logps(scorer, prompts, id_lists(responses, "ids") * 2)
        hats = token_rewards(*logps.chunk(2), mask[: len(responses)])
        unstacked(responses, "token_rewards", hats)

    def finite(response):
        return (response.ref_logps + response.token_rewards).isfinite().all()

    # a token of probability 0 makes a loss that is not finite
    kept = [pair for pair in pairs if all(map(finite, sides([pair])))]
    if len(kept) < len(pairs):
        say(f"{len(pairs) - len(kept)} pairs dropped: the model gives a token probability 0")
    return kept if s.token_rewards == "dpo" else change_rewards(kept, s.token_rewards, s.seed)


def change_rewards(pairs, kind, seed):
    """-> copies of the annotated pairs with token rewards of another kind than "contrastive".

    Variants of the paper's: "sft", 1 on the chosen response, 0 on the rejected one; "dpo", those of
    a model trained with DPO, whose learned credit the pairs hold: σ(log π_DPO − log π_ref) − ½.
    Controls: "shuffled" within each response; "swapped", as if better and worse were exchanged.
    """
    rng = np.random.default_rng(seed)
    pairs = [copied(pair) for pair in pairs]
    # pair by pair, so that the first pairs come out the same however many follow
    for pair in pairs:
        for response in sides([pair]):
            hat = response.token_rewards
            if kind == "sft":
                response.token_rewards = torch.full_like(hat, response is pair.chosen)
            elif kind == "shuffled":
                response.token_rewards = hat[rng.permutation(len(hat))]
            elif kind == "swapped":
                response.token_rewards = -hat
            elif kind == "dpo":
                response.token_rewards = torch.sigmoid(response.credit) - 0.5
    return pairs


# ------------------------------------------------------------------------------------------ 6 train
# From annotated pairs to a trained model, in place: the loss of a batch, the schedule, the loop.


def losses(model, pairs, s):
    """-> (loss (B,), {metric: values (B,)}, learned credit (2B, T)).

    The learned credit of a token is log π − log π_ref: how much likelier training has made it. For
    DPO it is r_t / β. Its rows are the chosen responses, then the rejected ones.
    """
    logps, mask = policy_logps(model, pairs, s.dtype)
    responses = sides(pairs)
    ref_logps = stacked(responses, "ref_logps", logps.device)
    hats = stacked(responses, "token_rewards", logps.device)

    # an algorithm is its implicit token rewards; all that follows is the same
    if s.algorithm == "dpo":
        rewards = dpo_rewards(logps, ref_logps, mask, s.beta)
    else:
        rewards = simpo_rewards(logps, mask, s.beta)
    loss, margin = treg_loss(*rewards.chunk(2), *hats.chunk(2), s.alpha, s.gamma, s.weighting)

    weight = torch.sigmoid(-margin) if s.weighting == "sequence" else torch.full_like(margin, 0.5)
    chosen_agreement, rejected_agreement = (rewards * hats).sum(-1).chunk(2)
    chosen_logps, rejected_logps = logps.sum(-1).chunk(2)
    metrics = {
        "loss": loss,
        "margin": margin,
        "accuracy": 0.5 + 0.5 * torch.sign(margin + s.gamma),  # which reward is higher; a tie is ½
        "weight": weight,
        "agreement": chosen_agreement + rejected_agreement,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
    }
    metrics = {name: values.detach() for name, values in metrics.items()}
    return loss, metrics, (logps - ref_logps).detach()


def schedule(step, total):
    """Share of the peak learning rate: 10 % linear warm-up, then half a cosine, as in the paper."""
    warmup = max(1, round(0.1 * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


DIVERGED = "begin again with a smaller --lr and another --out"


def take_step(model, optimizer, batch, s, lr):
    """One optimiser step on the mean loss of the batch. -> the means of its metrics, a dict.

    UserError: loss or gradient are not finite; then no step is taken.
    """
    optimizer.zero_grad()  # a step that was interrupted may have left some
    totals = 0
    # each pass adds its share of the batch's mean: how the batch is cut changes no result
    for pack in packs(batch, s.pass_tokens):
        loss, metrics, _ = losses(model, pack, s)
        (loss.sum() / len(batch)).backward()
        totals = totals + torch.stack([*metrics.values()]).sum(1)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    row = dict(zip(metrics, (totals / len(batch)).tolist(), strict=True))
    if not math.isfinite(row["loss"] + norm):
        where = ", ".join(pair.where for pair in batch)
        values = f"loss {row['loss']:.4g}, gradient norm {norm:.4g}, learning rate {lr:.2g}"
        raise UserError(f"not finite: {values}, pairs {where}; {DIVERGED}")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()  # their memory is free for what comes between two steps
    return {**row, "grad_norm": norm, "lr": lr}


def batches(pairs, s):
    """Yield the pairs of each step, by the seed alone: a resumed run needs no random state."""
    generator = torch.Generator().manual_seed(s.seed)
    for _ in range(s.epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), s.batch_size):
            yield [pairs[i] for i in order[start : start + s.batch_size]]


def check_training(weights, pairs, alpha):
    """UserError for what train would accept and silently get wrong."""
    need_annotated(pairs)
    need(len(pairs), "no pairs to train on")
    scored = alpha == 0 or have_token_rewards(pairs)
    need(scored, "all token rewards are 0; annotate with alpha above 0, and prompts that differ")
    exact = all(weight.dtype in (torch.float32, torch.float64) for weight in weights)
    need(exact, "weights in half precision: a small step would be rounded away; make them float32")


def train(model, pairs, settings=None, out=None, heldout=(), **changes):
    """Train model in place on annotated pairs. -> one dict of metrics for each step.

    settings, changes: it uses those of the loss and of training. heldout: annotated pairs on which
    accuracy and margin are measured up to five times. out: a folder for metrics.jsonl and
    checkpoint.pt; if it has a checkpoint, training goes on from there.
    UserError: loss, gradient or weights are not finite any more; or the pairs, the weights or the
    checkpoint do not go with these settings.
    """
    s = resolve(settings, model, **changes)
    total = s.epochs * math.ceil(len(pairs) / s.batch_size)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    check_training(weights, pairs, s.alpha)
    optimizer = torch.optim.AdamW(weights, lr=s.lr, weight_decay=0.0, fused=True)
    history = resumed(Path(out), model, optimizer, s) if out else []
    saved = len(history)
    if saved:
        say(f"going on after step {saved} of {total}")
    steps = range(saved, total)
    steps = bar(steps, desc="train", unit=" steps", initial=saved, total=total, delay=0)
    to_come = itertools.islice(batches(pairs, s), saved, None)
    try:
        for step, batch in zip(steps, to_come, strict=True):
            row = {"step": step + 1}
            row |= take_step(model, optimizer, batch, s, lr=s.lr * schedule(step, total))
            last = step + 1 == total
            if last:  # the loss of a next step would tell, but there is none
                finite = torch.nn.utils.get_total_norm(weights).isfinite()
                need(finite, f"the last step left weights that are not finite; {DIVERGED}")
            if heldout and (last or (step + 1) % math.ceil(total / 5) == 0):
                metrics, _ = measure(model, heldout, s)
                row["heldout_accuracy"] = metrics["accuracy"].mean().item()
                row["heldout_margin"] = metrics["margin"].mean().item()
            history.append(row)
            steps.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            if out:
                append(Path(out) / "metrics.jsonl", row)
            if out and (last or (step + 1) % s.save_every == 0):
                save_checkpoint(Path(out), model, optimizer, history, s)
                saved = step + 1
    except KeyboardInterrupt as stop:
        if out:
            stop.args = (f"stopped; --resume {out} goes on after step {saved} of {total}",)
        raise
    except UserError as error:
        kept = f"; {out}/checkpoint.pt has the weights after step {saved}" if out and saved else ""
        raise UserError(f"step {step + 1}: {error}{kept}") from None
    finally:
        steps.close()
    return history


@torch.no_grad()
def measure(model, pairs, s):
    """-> ({metric: an array with a value for each pair}, copies of the pairs with credit)."""
    need_annotated(pairs)
    pairs = [copied(pair) for pair in pairs]
    make_room(pairs, "credit")
    columns = {}
    for pack in bar(list(packs(pairs, s.pass_tokens)), desc="measure", unit=" passes"):
        _, metrics, credit = losses(model, pack, s)
        unstacked(sides(pack), "credit", credit)
        for name, values in metrics.items():
            columns.setdefault(name, []).extend(values.tolist())
    for pair, correct in zip(pairs, columns["accuracy"], strict=True):
        pair.correct = correct
    return {name: np.array(column) for name, column in columns.items()}, pairs


# ------------------------------------------------------------------------------------------- 7 data
# From a file or a hub data set to pairs of texts (load_pairs); from these, a tokenizer and its chat
# template to pairs of token ids (encode).


def load_pairs(source, split="train"):
    """-> the pairs of one split of a .json, .jsonl, .csv or .parquet file, or of a hub data set.

    A file may be .gz. A row without a split is "train". Says what is left out, and why.
    UserError: names the rows that cannot be used, or what is wrong with the file.
    """
    splits = load_splits(source)
    need(split in splits, f"{source}: no split {split}, only {', '.join(splits)}")
    for name, pairs in splits.items():
        if name != split:
            say(f"{source}: {len(pairs)} rows of split {name} are left out")
    return splits[split]


def load_splits(source):
    """All splits of a source, as load_pairs reads them. -> {split: pairs}."""
    splits, bad, bare = {}, [], []  # bare: the rows without a prompt column
    unused = {}  # names of columns, in the order in which they are found
    for where, row in bar(read_rows(str(source)), desc="read", unit=" rows"):
        try:
            if isinstance(row, bytes):
                with explain("not valid JSON, or not UTF-8", "mend the line or take it out"):
                    row = json.loads(row, object_pairs_hook=without_twins)
            pair = read_pair(row)
        except UserError as error:
            bad.append(f"{where}: {error}")
            continue
        pair.where = where
        others = (name for name in row if name and name not in KNOWN)
        unused |= dict.fromkeys(name for name in others if given(row, name) is not None)
        if all(given(row, name) is None for name in PROMPT_COLUMNS):
            bare.append(where)
        split = given(row, "split")
        splits.setdefault("train" if split is None else str(split), []).append(pair)
    if len(bare) < sum(map(len, splits.values())):
        bad += [f"{where}: has no prompt column, as other rows have" for where in bare]
    refuse(bad)
    need(splits, f"{source}: holds no rows to use; a row {WANTED}")
    if unused:
        say(f"note: columns that are not used: {shorten(', '.join(unused))}")
    return splits


def read_rows(source):
    """Yield (where, row) for each row of a file or of all splits of a hub data set.

    A row is a dict; or the bytes of a line of JSON, so that one bad line does not hide the next.
    """
    path, kind = Path(source), source.removesuffix(".gz").rpartition(".")[2]
    known = kind in ("json", "jsonl", "csv", "parquet")
    if not known and not path.exists():
        yield from hub_rows(source)
        return
    what = f"{path}: no such file, or of unknown ending"
    need(known and path.is_file(), f"{what}; name a .json, .jsonl, .csv or .parquet file")
    with explain(f"{path}: not valid {kind}", "mend the file or write it again"):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        data = data.removeprefix(b"\xef\xbb\xbf")
        if kind == "parquet":
            # not by datasets, which takes brackets in a file's name for a pattern
            from pyarrow import parquet

            rows = map(from_arrow, parquet.read_table(io.BytesIO(data)).to_pylist())
        elif kind == "csv":
            # by the standard library: every cell stays the text that it is, "NA" and "007" too
            csv.field_size_limit(2**31 - 1)
            text = data.decode("utf-8", "surrogateescape").lstrip()
            rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            without_twins([(name, None) for name in rows.fieldnames or () if name])
        elif kind == "json" and data.lstrip().startswith(b"["):
            rows = json.loads(data, object_pairs_hook=without_twins)
        else:  # JSON Lines, which many tools write into a file that they call .json
            lines = enumerate(data.split(b"\n"), 1)  # bytes: only a newline ends a line
            yield from ((f"{path}:{i}", line) for i, line in lines if line.strip())
            return
        count = 0
        try:
            for row in rows:
                count += 1
                yield f"{path}:row {count}", row
        except csv.Error as error:
            raise ValueError(f"in row {count + 1} or after it: {error}") from None


def hub_rows(name):
    """Yield (where, row) for each row of all splits of a data set of the hub."""
    import datasets  # here, and not above: 80 MB that a run on a file does without

    datasets.disable_progress_bars()
    hint = "see whether the name is right and the hub can be reached"
    with explain(f"--data {name}: no such file, and the hub does not give it", hint):
        splits = datasets.load_dataset(name)
    found = ", ".join(splits)
    need("train" in splits, f"--data {name}: no split train, only {found}; save one as .jsonl")
    for split, rows in splits.items():
        for i, row in enumerate(rows, 1):
            yield f"{name}:{split} row {i}", {**from_arrow(row), "split": split}


def from_arrow(value):
    """A value without the nulls that Arrow fills in for what a row lacks and another has, as for
    an argument of a tool call."""
    if isinstance(value, dict):
        return {name: from_arrow(inner) for name, inner in value.items() if inner is not None}
    return [from_arrow(inner) for inner in value] if isinstance(value, list) else value


def without_twins(items):
    """Names and values -> a dict. A name that stands twice says two things."""
    twins = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
    if twins:
        raise ValueError(f"the name {', '.join(twins)} stands twice")
    return dict(items)


# From a row to a pair. Every format ends in the same: messages before, and two last messages.
WANTED = "needs chosen and rejected, and prompt"
PROMPT_COLUMNS = ("prompt", "instruction", "question")
SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")
# columns of formats that are not read here, and that would change what the model sees
UNREAD = ("query", "problem", "messages", "context", "system_prompt", "documents", "functions")
UNREAD += ("image", "images", "videos", "audio", "chat_template_kwargs", "system_message")
UNREAD += ("initial_reason_steps",)
KNOWN = {*PROMPT_COLUMNS, *UNREAD, "chosen", "rejected", "input", "system", "history", "tools"}
KNOWN |= {"chosen_errors", "rejected_errors", "answers", "split"}
# a list of messages that csv has turned into text
LISTED = re.compile(r"""(?s)\s*\[?\s*\{(?=.*['"](role|from)['"]:)(?=.*['"](content|value)['"]:)""")


def given(row, name):
    """The value of a column or a field; None where it is absent, null, NaN or blank."""
    value = row.get(name)
    if isinstance(value, float) and math.isnan(value):
        return None
    blank = not value.strip() if isinstance(value, str) else value in ([], {})
    return None if blank else value


def read_pair(row):
    """A row of any documented format -> a Pair of texts. UserError: it cannot be used, and why."""
    need(isinstance(row, dict), f"a row is an object; it {WANTED}")
    need(None not in row, "more cells than columns; quote cells that hold commas")
    columns = [str(name) for name in row if given(row, name) is not None]
    found = f"a row {WANTED}; found {shorten(', '.join(columns)) or 'nothing'}"
    for side in ("chosen", "rejected"):
        there = side in columns or isinstance(row.get(side), str)  # blank: encode drops the pair
        need(there, f"{side} is missing; {found}")
    chosen = read_turns(row["chosen"], "chosen", "assistant")
    rejected = read_turns(row["rejected"], "rejected", "assistant")
    alike = chosen[:-1] == rejected[:-1]
    need(alike, "chosen and rejected must be the same up to their last message")

    prompt = agreed(read_prompt(row), chosen[:-1])
    roles = [message["role"] for message in prompt]
    asks = "user" in roles and roles[-1] in ("user", "tool")
    need(asks, f"has no prompt that ends with a message of the user's; {found}")
    seen = "\n".join(message["content"] for message in prompt)
    for name in UNREAD:
        lost = name in columns and not all(text in seen for text in words_of(row[name]))
        need(not lost, f"the column {name} would not be seen; put it into the prompt")
    if dialogue(row.get("prompt")):  # its responses are stripped as its turns are
        for message in (chosen[-1], rejected[-1]):
            message["content"] = message["content"].strip()
            later = re.search(r"\n\n(Human|Assistant):", message["content"])
            need(not later, "a response holds turns of its own; give the last one alone")
    return Pair(
        prompt=prompt,
        chosen=read_response(chosen[-1], row, "chosen"),
        rejected=read_response(rejected[-1], row, "rejected"),
        tools=read_list(row, "tools", tool_name, "function descriptions, each with a name"),
        answers=read_list(row, "answers", lambda text: isinstance(text, str), "texts"),
    )


def words_of(value):
    """The texts in a column, the assistant's words left out."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [str(m.get("content")).strip() for m in value if m.get("role") != "assistant"]
    return [str(value).strip()]


def read_text(value, what):
    """The value, if it is a text that can be trained on; what it is called in the UserError."""
    sound = isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value)
    need(sound, f"{what} must be text, not blank, and saved as UTF-8; found {shorten(repr(value))}")
    return value


def read_list(row, name, sound, wanted):
    """A list in a column, perhaps as JSON, whose items are all sound; None where it is absent."""
    value = given(row, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with explain(f"{name} is a list turned into text", "save the data as .jsonl"):
            value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    fits = value is None or isinstance(value, list) and all(map(sound, value))
    need(fits, f"{name} must be a list of {wanted}")
    return value


def tool_name(tool):
    """The name in a function description; None: it has none, so it is no description."""
    about = tool.get("function", tool) if isinstance(tool, dict) else None
    name = about.get("name") if isinstance(about, dict) else None
    return name if isinstance(name, str) else None


def read_turns(value, what, role):
    """A text of role's, an HH dialogue, a message or a list of messages -> messages."""
    if isinstance(value, str):
        need(not LISTED.match(value), f"{what} is a list turned into text; save the data as .jsonl")
        turns = dialogue(value) or [{"role": role, "content": value}]
        if role == "user" and len(turns) == 1:
            ready = re.search(r"(?i)(Assistant|### Response):\s*\Z", value)
            need(not ready, f"{what} ends like a template; give the user's words alone")
    else:
        value = value if isinstance(value, list) else [value]
        turns = [read_message(message, what) for message in value]
        turns = [turn for turn in turns if turn["content"].strip() or turn["role"] != "system"]
    for turn in turns:
        if turn["role"] == "user":  # others may be blank
            read_text(turn["content"], what)
    for text in filter(str.strip, texts_in(turns)):
        read_text(text, what)
    if role == "user" and turns[-1:] == [{"role": "assistant", "content": ""}]:
        turns.pop()  # HH text ends with "Assistant:"
    ends = role == "user" or turns and turns[-1]["role"] == role
    need(ends, f"{what} must end with a message of the assistant's")
    return turns


def dialogue(text):
    """Text like "\\n\\nHuman: …\\n\\nAssistant: …", as in HH, -> its turns; other text -> None."""
    if not isinstance(text, str) or not re.match(r"\s*Human:", text):
        return None
    gap = r"\n\n" if "\n\nAssistant:" in text else r"\n"
    _, *parts = re.split(rf"(?:\A\s*|{gap})(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def read_message(message, what):
    """A message without its absent fields; a list of text parts becomes one text."""
    wanted = f"{what} must be text or messages, with a role of {', '.join(ROLES)}, content that is"
    wanted += f" text, and tool_calls, not function_call; found {shorten(repr(message))}"
    need(isinstance(message, dict), wanted)
    message = {name: message[name] for name in message if given(message, name) is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    sound = message.get("role") in ROLES and isinstance(content, str)
    need(sound and "function_call" not in message, wanted)
    others = {name: value for name, value in message.items() if name != "content"}
    # a time and the like become text: a run's folder keeps plain values
    return {**json.loads(json.dumps(others, default=str)), "content": content}


def read_prompt(row):
    """What all columns but the responses say of the prompt -> messages, perhaps none."""
    names = [name for name in PROMPT_COLUMNS if given(row, name) is not None]
    alike = len({str(row[name]).strip() for name in names}) < 2
    need(alike, f"{' and '.join(names)} say different things; take one of them out")
    turns = read_turns(row[names[0]], names[0], "user") if names else []
    if given(row, "input") is not None:
        fits = turns and names[:1] == ["instruction"]
        need(fits, "the column input goes with instruction alone")
        extra = read_text(row["input"], "input")
        turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{extra}"}
    before = []
    if given(row, "system") is not None:
        twice = any(turn["role"] in SYSTEM for turn in turns)
        need(not twice, "has two system messages; take one of them out")
        before.append({"role": "system", "content": read_text(row["system"], "system")})
    wanted = "[user's text, assistant's]"
    turns_of_two = read_list(row, "history", lambda t: isinstance(t, list) and len(t) == 2, wanted)
    for turn in turns_of_two or ():
        user, assistant = (read_text(text, "history") for text in turn)
        before += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return before + turns


def agreed(prompt, shared):
    """One prompt from what the columns say and what both message lists begin with.

    Where one says all that the other does, perhaps without the system message, it is that one:
    a prompt "And then?" beside message lists that begin with a talk which ends in "And then?".
    """

    def stripped(messages):
        return [{**message, "content": message["content"].strip()} for message in messages]

    starts = range(len(shared) - len(prompt) + 1)
    if any(stripped(shared[i : i + len(prompt)]) == stripped(prompt) for i in starts):
        return shared
    if prompt[len(prompt) - len(shared) :] == shared:
        return prompt
    if all(m["role"] in SYSTEM for m in prompt) and shared[0]["role"] not in SYSTEM:
        return prompt + shared
    raise UserError("prompt and the messages before the last say different things")


def read_response(message, row, side):
    """The last message of a side, and its error spans -> a Response."""
    text = message["content"]

    def is_span(span):
        whole = isinstance(span, list) and [type(end) for end in span] == [int, int]
        return whole and 0 <= span[0] < span[1] <= len(text)

    name = f"{side}_errors"
    errors = read_list(row, name, is_span, "[start, end) within the text")
    if row.get(name) == []:  # labelled, and without an error
        errors = []
    moved = errors is not None and isinstance(row[side], str) and text != row[side]
    need(not moved, f"{name} would shift; give prompt and responses apart")
    return Response(message, errors)


# The model's own chat template decides what stands before the assistant's words and after them. For
# <|im_start|>user↵Name a bird.<|im_end|>↵<|im_start|>assistant↵A crow.<|im_end|>↵
# the prompt is all before "A crow.", and the response is "A crow.<|im_end|>".
#
# A base model has no template: it gets this plain one, which is saved with the trained model.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
SNOWMAN = "☃"  # stands for the assistant's words, to see what the template writes around them


def merged(messages):
    """The messages with what the system says at the beginning of the user's first message."""
    system, *rest = messages
    first = next(i for i, message in enumerate(rest) if message["role"] == "user")
    rest[first] = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return rest


def parsed(message):
    """A message with the arguments of its tool calls as objects, where JSON has them as text."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        with contextlib.suppress(LookupError, TypeError, ValueError):
            arguments = json.loads(call["function"]["arguments"])
            call = {**call, "function": {**call["function"], "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def as_python(messages, text):
    """Does the text hold an object of these messages' tool calls in Python's form, {'a': True}?"""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    about = [call.get("function") for call in calls if isinstance(call, dict)]
    objects = [each.get("arguments") for each in about if isinstance(each, dict)]
    return any(isinstance(each, dict) and each and repr(each) in text for each in objects)


def as_parts(message):
    """A message for a template that takes no text as content, but a list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def in_template(tokenizer, messages, reply, tools=None):
    """-> (prompt, body, tail): all before the assistant's words, these words, all after them.

    reply: the assistant's message.
    UserError: the template refuses the messages, or leaves some of what they say out.
    """
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    ways = [messages]
    if messages[0]["role"] in SYSTEM:
        ways.append(merged(messages))
    mark = {"role": "assistant", "content": SNOWMAN}
    problems = []
    # dict: the messages as they are; a few templates want arguments as text
    for shape, way in itertools.product((parsed, dict, as_parts), ways):
        prompt = [shape(message) for message in way]
        try:
            whole = render([*prompt, shape(reply)])
            around = render([*prompt, shape(mark)])
            opened = render(prompt, add_generation_prompt=True)
        except Exception as error:  # jinja has many
            problems.append(f"the chat template refuses it: {one_line(error)}")
            continue
        said = [parsed(message) for message in way]
        if shape is parsed and as_python([*said, parsed(reply)], whole):
            continue  # it prints arguments without a filter, and so wants text
        head, _, tail = around.rpartition(SNOWMAN)
        words = ["", *(text for name, text in said_in(way[-1]) if name == "content")][-1]
        asked = head.rfind(words) + len(words)  # the template's own words begin here
        lost = left_out([*said, mark], around, tools)
        if repr(as_parts(mark)["content"]) in around:
            lost = "what is text in a list of parts"  # it writes the list as Python does
        elif lost and said[0]["role"] in SYSTEM and not left_out(said, opened, tools):
            # Mistral's write the system message into the user's, if that is the last message
            body = whole[len(head) : len(whole) - len(tail)]
            rest = left_out([*said[1:], mark], around, tools) or left_out([parsed(reply)], body)
            if whole == head + body + tail and not rest:
                return opened[: opened.rfind(words) + len(words)] + head[asked:], body, tail
        if lost:
            problems.append(f"the chat template leaves out {lost}")
            continue
        if not whole.endswith(tail):  # a tool call may end otherwise than an answer
            tail = last_token(tokenizer, whole, opened)
        return *split_reply(whole, head, tail, opened, asked, parsed(reply)), tail
    raise UserError(problems[0])


def last_token(tokenizer, whole, opened):
    """The end of a rendering from its last special token on.

    Without the generation prompt that some templates write even there; opened has it.
    """
    special = special_tokens(tokenizer)
    same = os.path.commonprefix([whole[::-1], opened[::-1]])[::-1]
    asks = min([same.find(token) for token in special if token in same], default=len(same))
    stop = len(whole) - len(same) + asks
    places = [whole.rfind(token, 0, stop) for token in special]
    return whole[max([place for place in places if place >= 0], default=len(whole)) :]


def split_reply(whole, head, tail, opened, asked, reply):
    """-> (prompt, body): the beginning of the whole rendering, and the assistant's words in it.

    head, tail: what stands around the snowman. opened: the rendering with a generation prompt.
    asked: where the user's words end in both. Three kinds of templates and replies meet here:
        the template writes the same around every reply (ChatML)          -> head, the reply
        it writes an empty <think></think> before a reply without thoughts (Qwen3), or a thought
        that the reply has in a field of its own, or its generation prompt opens <think>, and the
        reply has thoughts                                                -> opened, the rest
        it leaves thoughts out of what it writes (R1)                     -> opened, the reply
    """
    text = reply["content"].strip()
    tag = re.match(r"(<[^<>\s]+>|\[[A-Z_]+\])?", text)[0]  # such as <think>
    closing = tag and f"{tag[0]}/{tag[1:]}"
    for prompt in (head, opened):
        body = whole[len(prompt) : len(whole) - len(tail)]
        turn = prompt[asked:] + body
        once = all(turn.count(each) == text.count(each) for each in (tag, closing) if each)
        if whole == prompt + body + tail and once and not left_out([reply], turn):
            return prompt, body
    lost = left_out([{**reply, "content": ""}], "")
    need(not lost, f"the chat template leaves out {lost}")
    # the third kind: the reply as it is, after the prompt that the model is given; without the
    # empty block of thoughts, or its end alone, that some write even there
    prompt = opened if opened.startswith(head) else head
    block = tag and re.search(rf"({re.escape(tag)}\s*)?{re.escape(closing)}", prompt[asked:])
    if block:
        prompt = prompt[: asked + block.start()]
    if tag and prompt.rstrip().endswith(tag):  # what the prompt has opened is not written twice
        text = text.removeprefix(tag)
        text = text.removeprefix("\n") if prompt.endswith("\n") else text
    return prompt, text


def left_out(messages, text, tools=None):
    """What a rendered text does not say as often as messages and tools do, in words; or None."""
    said = [
        (f"{name} of the {message['role']}'s message", words)
        for message in messages
        for name, words in said_in(message)
    ]
    said += [(f"the tool {name}", name) for name in map(tool_name, tools or ())]
    for what, words in said:
        # one text may be part of another, and is then to be found in that one too
        forms = {words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}
        if sum(map(text.count, forms)) < sum(other.count(words) for _, other in said):
            return what
    return None


# a switch in a text, not a path; some templates (SmolLM3) obey it and take it out
SWITCH = re.compile(r"(?<!\S)/(?:no_)?think(?!\S)")


def said_in(message):
    """All that a template must write of a message. -> [(name of the field, text)]."""
    names = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
    texts = [(name, text) for name in names for text in texts_in(message.get(name))]
    parts = [(name, part) for name, text in texts for part in SWITCH.split(text)]
    return [(name, part.strip()) for name, part in parts if part.strip()]


def texts_in(value):
    """All texts and numbers within a value of JSON, but for types and ids, as of tool calls."""
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in ("type", "id")]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [json.dumps(value)]
    return [value] if isinstance(value, str) else []


def special_tokens(tokenizer):
    """The tokens that are no text: beginnings, ends, turns."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {token for token in [*added, *tokenizer.all_special_tokens] if token.strip()}


def end_token(tokenizer, tail):
    """-> (id of the end token, what stands before it) of what the template writes after a reply."""
    special = special_tokens(tokenizer)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    found = [token for token in special | added if token.strip() and token in tail]
    if not found:
        return tokenizer.eos_token_id, ""
    # the first and longest; one that is not marked as special only where there is no other
    end = min(found, key=lambda token: (token not in special, tail.find(token), -len(token)))
    return tokenizer.convert_tokens_to_ids(end), tail[: tail.find(end)]


# Turn markers of other models. With the tokenizer's own they tell a text that has been through a
# chat template. Thoughts and tool calls are not among them: a response may hold these.
MARKS = r"<\|\w[\w ]*\|>|<\|turn>|<turn\|>|\[\|\w+\|\]|<｜[^｜<>]+｜>|</s>|<(?:start|end)_of_turn>"
MARKS += r"|<(?:bos|eos)>|\[/?INST\]"
THOUGHTS = re.compile(r"</?\w*(?:think|tool|reason)\w*>|\[/?THINK\]", re.IGNORECASE)


def encode(tokenizer, pairs, style=None, max_length=1024):
    """-> copies of the pairs with token ids, and labels where they have error spans.

    style: also encode the contrastive prompts of this style. An end token that ends a response is
    taken off and counted: each gets exactly one. Dropped and counted are pairs whose responses are
    blank or the same, whose texts hold special tokens or markers of a chat template, or whose
    longest prompt and response have more than max_length tokens (a cut could change who won).
    A tokenizer without a chat template gets the plain one.
    UserError: names the rows that the chat template cannot take.
    """
    if not tokenizer.chat_template:
        # with the BOS before it if this tokenizer puts one before any text
        begins = tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE
        say("note: the tokenizer has no chat template; it gets a plain one, User: … Assistant: …")
    own = [token for token in special_tokens(tokenizer) if not THOUGHTS.fullmatch(token)]
    own.sort(key=len, reverse=True)
    marks = "|".join([MARKS, *map(re.escape, own)])
    # of its own only what ends turns: <filename> is one of SmolLM2's, and may end a sentence
    turns = f"{tokenizer.eos_token} {tokenizer.pad_token} {tokenizer.chat_template}"
    ends = "|".join([MARKS, *(re.escape(token) for token in own if token in turns)])
    find_end = lru_cache(partial(end_token, tokenizer))  # a tokenizer may have thousands to try
    dropped, cleaned, bad, encoded = Counter(), 0, [], []
    for pair in bar(pairs, desc="encode", unit=" pairs"):
        pair = copied(pair)
        for response in sides([pair]):
            text = response.text
            while end := re.search(rf"({ends})\s*\Z", text):
                text = text[: end.start()].rstrip()
            cleaned += text != response.text
            response.message = {**response.message, "content": text}
        try:
            reason = encode_pair(tokenizer, pair, style, max_length, marks, find_end)
        except UserError as error:
            bad.append(f"{pair.where}: {error}")
            continue
        if reason:
            dropped[reason] += 1
        else:
            encoded.append(pair)
    refuse(bad)
    if cleaned:
        say(f"{cleaned} responses ended in an end token, which was taken off")
    for reason, count in dropped.items():
        say(f"{count} pairs dropped: {reason}")
    return encoded


def encode_pair(tokenizer, pair, style, max_length, marks, find_end):
    """Set the ids of a pair. -> why it is not trained on, or None.

    find_end: end_token of this tokenizer, a function of what the template writes after a reply.
    """
    messages = [*pair.prompt, pair.chosen.message, pair.rejected.message]
    if not all(map(said_in, messages[-2:])):
        return "a blank response"
    texts = [text for message in messages for _, text in said_in(message)]
    if found := re.search(marks, "\n".join(texts)):
        return f"holds {found[0]}, a special token or of a chat template; give texts without"
    for response in sides([pair]):
        encode_response(tokenizer, pair, response, style, find_end)
    chosen, rejected = (r.prompt_ids.tolist() + r.ids.tolist() for r in sides([pair]))
    if chosen == rejected:
        return "chosen and rejected are the same"
    return f"longer than {max_length} tokens" if longest_row(pair) > max_length else None


def encode_response(tokenizer, pair, response, style, find_end):
    """Set a response's ids, the ids of its prompts and, where it has error spans, its labels."""
    reply = response.message
    prompt, body, tail = in_template(tokenizer, pair.prompt, reply, pair.tools)
    end, before_end = find_end(tail)
    need(end is not None, "no end token: set the tokenizer's eos_token")
    response.prompt_ids = tokenize_prompt(tokenizer, prompt)
    need(len(response.prompt_ids), "the prompt becomes no token")
    ids, offsets = ids_in_context(tokenizer, prompt, body + before_end)
    response.ids = torch.tensor([*ids, end], dtype=torch.int32)
    if response.errors is not None and offsets is not None:
        # the template may have put thoughts before the words, or taken spaces or a tag off them:
        # where "A crow" becomes "<think></think>A crow", all spans move by 15
        words = reply["content"].strip()
        at = body.rfind(words) if words in body else len(body) - len(words)
        moved = at - reply["content"].find(words)
        spans = [(start + moved, stop + moved) for start, stop in response.errors]
        good = [not any(a < stop and start < b for start, stop in spans) for a, b in offsets]
        response.good = torch.tensor([*good, True])
    if style is not None:
        both = contrastive_prompts(pair.prompt, reply["content"], style)
        better, worse = (in_template(tokenizer, way, reply, pair.tools)[0] for way in both)
        response.better_ids = tokenize_prompt(tokenizer, better)
        response.worse_ids = tokenize_prompt(tokenizer, worse)


def tokenize_prompt(tokenizer, prompt):
    """-> the ids (int32) that the model is given before it writes."""
    # a space that ends the prompt is part of the first word's token: the model is to write it
    ids = tokenizer(prompt.rstrip(" "), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)


def ids_in_context(tokenizer, prompt, body):
    """-> (ids of the body after the prompt, their offsets in the body or None)."""
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast}
    bare = prompt.rstrip(" ")
    text = prompt[len(bare) :] + body
    # where a token reaches across the boundary, the body stands after a newline, or by itself
    for before in (bare, "\n", ""):
        first = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        both = tokenizer(before + text, **options)
        if both["input_ids"][: len(first)] == first:
            break
    offsets = both.get("offset_mapping")
    if offsets is not None:
        skip = len(before) + len(text) - len(body)
        offsets = [(start - skip, stop - skip) for start, stop in offsets[len(first) :]]
    return both["input_ids"][len(first) :], offsets


# ---------------------------------------------------------------------------- 8 evaluate and show
# From a trained model and annotated held-out pairs to figures, samples and a page.


def credit_auroc(scores, is_good):
    """Probability that a good token outscores a bad one, ties ½; nan with one class only.

    scores, is_good: two arrays of one length. -> float.
    """
    scores, is_good = np.asarray(scores, dtype=float), np.asarray(is_good, dtype=bool)
    good, bad = scores[is_good][:, None], scores[~is_good][None, :]
    if not good.size or not bad.size:
        return math.nan
    return float(np.mean((good > bad) + 0.5 * (good == bad)))


def mean_auroc(pairs, name):
    """Mean credit AUROC within the responses that have good and bad tokens; nan if none has.

    A response whose values are all 0 does not count: nothing was measured, as with alpha 0.
    """
    labelled = [response for response in sides(pairs) if response.good is not None]
    scored = [response for response in labelled if getattr(response, name).any()]
    # [:-1]: the end token is in no error span, and is not scored
    values = [credit_auroc(getattr(r, name)[:-1], r.good[:-1]) for r in scored]
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def pair_accuracy(pairs):
    """-> (share of pairs whose chosen response has the higher mean r̂, low, high of its interval).

    Ties count ½; the interval is Wilson's, of 95 %.
    """
    gaps = torch.stack(
        [p.chosen.token_rewards.mean() - p.rejected.token_rewards.mean() for p in pairs]
    )
    share = (0.5 + 0.5 * torch.sign(gaps)).mean().item()
    n, z = len(pairs), 1.959964  # the normal distribution's 97.5 % quantile
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return share, (middle - half) / scale, (middle + half) / scale


def exact_match(pair, text):
    """The judge of data with answers: 1 if the text is one of them, else 0."""
    return float(text.strip() in map(str.strip, pair.answers))


@torch.no_grad()
def sample(model, tokenizer, pairs, seed, more=8):
    """One response a pair, drawn from the model's own distribution. -> list of texts.

    A sample may be `more` tokens longer than the longest chosen response of the pairs.
    """
    most = max(len(pair.chosen.ids) for pair in pairs) + more
    base = unwrapped(model)
    own = base.generation_config
    ends = all_ends(base, end_tokens(pairs))
    texts = []
    try:
        # the model's own settings (min_p, stop strings …) would bend the distribution
        base.generation_config = transformers.GenerationConfig()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(pairs), 128):
                texts += draw(model, tokenizer, pairs[start : start + 128], most, ends)
    finally:
        base.generation_config = own
    return texts


def all_ends(model, learned):
    """The ids at which the model stops: its own end tokens, then those it has learned besides."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return own + [end for end in learned if end not in own]


def draw(model, tokenizer, pairs, most, ends):
    """One batch of samples, of at most `most` tokens each."""
    prompts = [pair.chosen.prompt_ids.long() for pair in pairs]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = pad(prompts, padding_value=ends[-1]).to(model.device)
    most = max(1, min(most, positions(model) - ids.shape[1]))
    with bar(total=most, desc="sample", unit=" tokens") as done:

        def go_on(ids, scores):
            done.update()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        drawn = model.generate(
            input_ids=ids,
            attention_mask=pad([torch.ones_like(prompt) for prompt in prompts]).to(model.device),
            max_new_tokens=most,
            do_sample=True,
            top_k=0,
            eos_token_id=ends,
            pad_token_id=ends[-1],
            stopping_criteria=[go_on],  # called after every token
        )
    texts = []
    for row in drawn[:, ids.shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:stop], clean_up_tokenization_spaces=False))
    return texts


@torch.no_grad()
def evaluate(model, tokenizer, pairs, settings=None, judge=None, **changes):
    """-> (metrics, copies of the annotated pairs with learned credit, correct, samples and score).

    judge: a function of (pair, text), 0 to 1, of which the score is the mean over some responses
    (s.draws) that the model samples for each pair; by default exact match, if all pairs have
    answers. Without a judge one response is sampled for each of the first three pairs, to look at.
    metrics: accuracy, margin, credit_auroc, token_reward_auroc, score; None where there is none.
    """
    if not pairs:
        return {}, []
    s = resolve(settings, model, **changes)
    values, pairs = measure(model, pairs, s)
    metrics = {
        "accuracy": values["accuracy"].mean(),
        "margin": values["margin"].mean(),
        "credit_auroc": mean_auroc(pairs, "credit"),
        "token_reward_auroc": mean_auroc(pairs, "token_rewards"),
        "score": math.nan,
    }
    if judge is None and all(pair.answers for pair in pairs):
        judge = exact_match
    if judge:
        texts = sample(model, tokenizer, [p for p in pairs for _ in range(s.draws)], s.seed)
        for i, pair in enumerate(pairs):
            pair.samples = texts[i * s.draws : (i + 1) * s.draws]
            pair.score = float(np.mean([judge(pair, text) for text in pair.samples]))
        metrics["score"] = np.mean([pair.score for pair in pairs])
    else:
        texts = sample(model, tokenizer, pairs[:3], s.seed, more=64)
        for pair, text in zip(pairs, texts, strict=False):
            pair.samples = [text]
    # JSON has no nan
    metrics = {k: None if math.isnan(value) else float(value) for k, value in metrics.items()}
    return metrics, pairs


def shorten(text, width=72):
    """On one line, cut with "…"."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def show(summary, old_pairs, new_pairs, tokenizer):
    """Print what a run has changed: metrics, samples, token rewards. -> the metrics, as text."""
    lines = [f"{'':20s}  before   after"]
    for name, value in summary["after"].items():
        if value is not None:
            old = summary["before"].get(name)
            old = "–" if old is None else f"{old:.3f}"
            lines.append(f"{name.replace('_', ' '):20s}{old:>8s}{value:8.3f}")
    cost = "\nannotation {annotate_seconds:.1f} s, training {train_seconds:.1f} s".format(**summary)
    if summary["peak_memory_bytes"]:
        cost += f"; peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    text = "\n".join([*lines, cost])
    say(f"\n{text}")
    for old, new in zip(old_pairs[:3], new_pairs[:3], strict=True):
        say(f"\nprompt  {shorten(new.prompt[-1]['content'])}")
        say(f"before  {shorten(old.samples[0])}")
        say(f"after   {shorten(new.samples[0])}")
    if have_token_rewards(new_pairs):
        pair = new_pairs[0]
        say("\ntoken rewards ([+good], [-bad]: more than 0.1 from 0)")
        say(f"chosen    {bracketed(pair.chosen, tokenizer)}")
        say(f"rejected  {bracketed(pair.rejected, tokenizer)}")
    return text


def bracketed(response, tokenizer):
    """The tokens of a response, in brackets those whose token reward is far from 0."""
    texts = token_texts(tokenizer, response.ids.tolist())
    for i, reward in enumerate(response.token_rewards.tolist()):
        if abs(reward) > 0.1:
            texts[i] = f"[{'+' if reward > 0 else '-'}{texts[i]}]"
    return "".join(texts)


# The page: what was trained, learning curves, and every token coloured by its credit. Blue and
# orange stay apart for every kind of colour vision; layers of one unit have one scale.
CSS = """<style>.treg { font: 15px/1.5 sans-serif; color-scheme: light dark; background: Canvas;
color: CanvasText; overflow-wrap: anywhere; print-color-adjust: exact;
-webkit-print-color-adjust: exact } .treg pre { overflow-x: auto; line-height: 1.3 }
.treg .row { display: grid; grid-template-columns: 14em 1fr; gap: 0 1em; break-inside: avoid;
padding: 3px 0; border-top: 1px solid #8884; white-space: pre-wrap }
.treg .token { white-space: break-spaces; border: solid #8886; border-width: 0 1px 0 0;
padding: 2px 0 } .treg .error { text-decoration: underline wavy }
.treg .curves { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill,
minmax(min(100%, 22em), 1fr)) } .treg figure { margin: 0; break-inside: avoid }
.treg h3 { break-after: avoid }
.treg svg { width: 100%; max-width: 30em } .treg text { font-size: 12px; fill: currentColor }
.treg path { stroke: #8886 } .treg polyline { fill: none; stroke-width: 2 }
@media (max-width: 45em) { .treg .row { grid-template-columns: 1fr } }</style>"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>T-REG</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"></head>
<body style="max-width: 64em; margin: 1.5em auto; padding: 0 1em">
<div class="treg"><h1>T-REG</h1><p>{0}</p><pre>{1}</pre><h2>Learning curves</h2>
<p>By training step; a line has at most 60 points, each the mean of the steps around it.</p>
<div class="curves">{2}</div><h2>Tokens</h2></div>{3}</body></html>"""
LEGEND = """<p>Blue tokens have values above 0 (good), orange ones below. A wavy line: a labelled
error. Hover over a token for its value. Σ: the sum of a row. ⏎: a line break.</p>"""
BLUE, ORANGE = "30 110 230", "235 120 0"
CURVES = {  # what a figure shows; the second metric is dashed
    "loss": ["loss"],
    "margin": ["margin", "heldout_margin"],
    "accuracy": ["accuracy", "heldout_accuracy"],
    "log-probability of a response": ["chosen_logps", "rejected_logps"],
}


def escaped(text):
    """Text that HTML shows and does not obey."""
    return html.escape(visible(text))


def token_box(text, value, scale, error=False):
    """A token in HTML, coloured by its value; full colour at ±scale."""
    ink = BLUE if value > 0 else ORANGE
    tint = f"rgb({ink} / {0.7 * min(abs(value) / scale, 1):.2f})"
    kind = "token error" if error else "token"
    style = f'class="{kind}" style="background: {tint}" title="{value:+.3f}"'
    return f"<span {style}>{escaped(text)}</span>"


def token_texts(tokenizer, ids):
    """What each token adds to the text; ◌ for one whose character a later token completes."""

    def text_of(start, stop):
        return tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)

    # beside the last tokens alone: beside all of them the time would be the square of their number
    texts, start, done = [], 0, 0
    for stop in range(1, len(ids) + 1):
        before, text = (text_of(start, end).rstrip("\ufffd") for end in (done, stop))
        texts.append(text[len(before) :].replace("\n", "⏎") or "◌")
        if len(text) > len(before):
            if not text_of(done, stop).startswith("\ufffd"):  # part of a character
                start = done
            done = stop
    return texts


def html_row(label, content):
    """A label and HTML, side by side."""
    return f'<div class="row"><div>{escaped(label)}</div><div>{content}</div></div>'


def credit_map(pairs, tokenizer, layers):
    """The tokens of both responses of every pair, in a row for each layer. -> HTML, a text.

    layers: {label: (pairs, "token_rewards" or "credit")}; the pairs of a layer are these ones, or
    the same with the credit of another model. The scale of r̂ is ±½, of credit its largest value.
    """
    largest = [
        r.credit.abs().max() for of, name in layers.values() if name == "credit" for r in sides(of)
    ]
    scales = {"token_rewards": 0.5, "credit": float(max(largest, default=1.0)) or 1.0}
    parts = [CSS, '<div class="treg">', LEGEND]
    for label, (_, name) in layers.items():
        scale = scales[name]
        key = [token_box(f" {v:+.2f} ", v, scale) for v in np.linspace(-scale, scale, 5)]
        parts.append(html_row(label, "".join(key) + (" nats" if name == "credit" else "")))
    for i, pair in enumerate(pairs):
        parts.append(f"<h3>{escaped(pair.where)}</h3>")
        parts += [html_row(m["role"], escaped(m["content"])) for m in pair.prompt]
        for side in ("chosen", "rejected"):
            response = getattr(pair, side)
            texts = token_texts(tokenizer, response.ids.tolist())
            errors = [False] * len(texts) if response.good is None else (~response.good).tolist()
            for label, (of, name) in layers.items():
                values = getattr(getattr(of[i], side), name).tolist()
                scale = itertools.repeat(scales[name])
                boxes = "".join(map(token_box, texts, values, scale, errors))
                parts.append(html_row(f"{side}: {label}", f"{boxes} Σ {sum(values):+.3f}"))
    return "".join(parts) + "</div>"


def report(settings, text, curves, pairs, tokenizer, layers):
    """One page that needs no other file. curves: {name: history}, up to two. layers: credit_map."""
    figures = "".join(figure(what, metrics, curves) for what, metrics in CURVES.items())
    tokens = credit_map(pairs, tokenizer, layers)
    return PAGE.format(escaped(settings), escaped(text), figures, tokens)


def figure(title, metrics, curves):
    """An SVG of one or two metrics of each history, with axes; below it what each line is."""
    lines = []
    for ink, (name, history) in zip((BLUE, ORANGE), curves.items(), strict=False):
        for dash, metric in zip(("", "6 3"), metrics, strict=False):
            points = [(row["step"], row[metric]) for row in history if metric in row]
            if points:
                means = [part.mean(0) for part in np.array_split(points, min(len(points), 60))]
                lines.append((f"{name}, {metric.replace('_', ' ')}", ink, dash, means))
    steps, values = np.concatenate([points for *_, points in lines]).T
    last, low, high = steps.max(), values.min(), values.max()

    def place(step, value):
        return 60 + 250 * step / last, 160 - 145 * (value - low) / (high - low or 1)

    parts = [f'<figure><figcaption>{escaped(title)}</figcaption><svg viewBox="0 0 330 190">']
    for value in np.linspace(low, high, 5):
        x, y = place(0, value)
        parts.append(f'<path d="M{x} {y:.1f}h250"/>')
        parts.append(f'<text x="{x - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in np.linspace(0, last, 3):
        text = f'y="180" text-anchor="middle">{step:.0f}'
        parts.append(f'<text x="{place(step, low)[0]:.1f}" {text}</text>')
    legend = []
    for label, ink, dash, corners in lines:
        path = " ".join("{:.1f},{:.1f}".format(*place(*corner)) for corner in corners)
        stroke = f'stroke="rgb({ink})" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {stroke}/>')
        sign = "┅" if dash else "━"
        legend.append(f'<span style="color: rgb({ink})">{sign} {escaped(label)}</span>')
    return "".join(parts) + f"</svg><div>{'<br>'.join(legend)}</div></figure>"


# ------------------------------------------------------------------------------ 9 the tiny model
# From pairs to a small model that follows instructions of one kind: a stand-in for a pre-trained
# one, so that the whole program runs anywhere within a minute.


TINY = "(the tiny model)"  # its name, by which its own defaults are found


def make_tiny(pairs, seed, steps=2000, styles=tuple(PROMPTS)):
    """-> (model, tokenizer): a small GPT-2 with random weights, warmed up on these pairs alone.

    It learns to answer a prompt with either response, a better prompt with the chosen one and a
    worse prompt with the rejected one, for each of these styles.
    """
    tokenizer = tiny_tokenizer(pairs)
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256, "initializer_range": 0.1}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(name_or_path=TINY, vocab_size=len(tokenizer), **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.shares_prompts = True
    rows = []
    for style in styles:
        for pair in encode(tokenizer, pairs, style, max_length=256):
            chosen, rejected = pair.chosen, pair.rejected
            rows.append((chosen.prompt_ids.tolist(), chosen.ids.tolist()))
            rows.append((rejected.prompt_ids.tolist(), rejected.ids.tolist()))
            # the prompt of the other response: a revision improves on the rejected one, or spoils
            # the chosen one; if it repeated what it is shown, the model would learn to copy
            rows.append((rejected.better_ids.tolist(), chosen.ids.tolist()))
            rows.append((chosen.worse_ids.tolist(), rejected.ids.tolist()))
    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in bar(range(steps), desc="warm up", unit=" steps"):
        batch = [rows[i] for i in torch.randint(len(rows), (8,), generator=generator)]
        logps, mask = response_logps(model, *map(list, zip(*batch, strict=True)))
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def tiny_tokenizer(pairs):
    """Byte-level BPE, learned on these pairs."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = []
    for pair in pairs:
        for style in PROMPTS:
            for response in sides([pair]):
                for prompt in contrastive_prompts(pair.prompt, response.text, style):
                    texts += [f"User:\n{prompt[-1]['content']}\n\nAssistant:\n", response.text]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=PLAIN_TEMPLATE, **ends
    )


# ------------------------------------------------------------------------------------ 10 compare
# A variant is a name and the settings that it changes. The comparison trains every variant from
# the same reference on the same pairs in the same order, for each of some seeds.

VARIANTS = {  # the paper's table, and two controls
    "DPO": {"algorithm": "dpo", "alpha": 0.0},
    "DPO-REG": {"algorithm": "dpo"},
    "SimPO": {"algorithm": "simpo", "alpha": 0.0},
    "SimPO-REG": {"algorithm": "simpo"},
    "DPO-SFT": {"algorithm": "dpo", "token_rewards": "sft"},
    "static weighting": {"algorithm": "dpo", "weighting": "static"},
    "DPO reward": {"algorithm": "dpo", "token_rewards": "dpo"},
    "shuffled": {"algorithm": "dpo", "token_rewards": "shuffled"},
    "swapped": {"algorithm": "dpo", "token_rewards": "swapped"},
}


def read_variants(path):
    """Variants of one's own from a JSON file, {name: {setting: value}}; without a path VARIANTS."""
    if path is None:
        return VARIANTS
    known = {"algorithm", "alpha", "beta", "gamma", "weighting", "token_rewards", "prompts", "lr"}
    known |= {"epochs", "batch_size"}
    with explain(f"--variants {path}: not usable", 'it holds {"name": {"alpha": 0.5}, …}'):
        variants = json.loads(Path(path).read_text("utf-8"))
        need(variants, f"--variants {path}: holds no variant")
        for name, changes in variants.items():
            others = ", ".join({*changes} - known)
            need(not others, f"--variants {path}: {name}: cannot change {others}")
            try:
                read_prompts(replace(Settings(), **changes).prompts)
            except UserError as error:
                raise UserError(f"--variants {path}: {name}: {error}") from None
    return variants


def variant_settings(s, changes, model):
    """The settings of a variant. An lr, beta or gamma that is given for one algorithm does not
    suit the other, which gets its defaults."""
    if changes.get("algorithm", s.algorithm) != s.algorithm:
        s = replace(s, lr=None, beta=None, gamma=None)
    return resolve(s, model, **changes)


def compare(s, out, judge=None):
    """Train and evaluate every variant for each seed; print the table. -> results, a list of dicts.

    They are kept in out/compare.jsonl; a comparison that was stopped goes on after the last one.
    """
    path, kept = out / "compare.jsonl", out / "variants.json"
    variants = read_variants(kept if kept.exists() else s.variants)
    write(out / "settings.json", {"settings": asdict(s), "machine": machine(s)})
    write(kept, variants)
    results = read(path) if path.exists() else []
    done = {(result["seed"], result["variant"]) for result in results}
    seeds = range(s.seed, s.seed + s.compare)
    work = [(seed, name) for seed in seeds for name in variants if (seed, name) not in done]
    if done:
        say(f"going on after {len(done)} of {len(done) + len(work)} variants")
    styles = [changes.get("prompts", s.prompts) for changes in variants.values()]
    made, curves, shown = None, {}, {}
    for seed, name in bar(work, desc="compare", unit=" variants"):
        prompts = variants[name].get("prompts", s.prompts)
        # a model that is loaded is the same for all seeds, the tiny one is made anew for each
        start = f"start-{styles.index(prompts)}" + ("" if s.model else f"-{seed}")
        if start != made:
            # alpha 1: with 0 no contrastive prompt would be read
            begin = replace(s, seed=seed, prompts=prompts, token_rewards="contrastive", alpha=1.0)
            model, tokenizer, pairs, heldout, _ = prepare(begin, out / start)
            need(heldout, f"{s.data}: --compare needs pairs to evaluate on; see --holdout")
            weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            made = start
        variant = variant_settings(replace(s, seed=seed), variants[name], model)
        model.load_state_dict(weights)
        own, own_heldout = variant_rewards(model, pairs, heldout, variant)
        model.load_state_dict(weights)
        curves[name] = train(model, own, variant)
        metrics, shown[name] = evaluate(model, tokenizer, own_heldout, variant, judge)
        each = {p.where: p.correct if p.score is None else p.score for p in shown[name]}
        about = {"variant": name, "seed": seed, "algorithm": variant.algorithm}
        results.append({**about, "alpha": variant.alpha, **metrics, "each": each})
        write(path, results)
    text = table(results)
    say(f"\n{text}")
    if shown:  # else all was done before, and so was the page
        layers = {"token reward r̂": (heldout, "token_rewards")}
        first = dict([(name, curves[name]) for name in variants if name in curves][:2])
        for name in first:
            # other prompts may have dropped other pairs
            if [pair.where for pair in shown[name]] == [pair.where for pair in heldout]:
                layers[f"learned by {name}"] = (shown[name], "credit")
        page = report(describe(resolve(s, model)), text, first, heldout[:5], tokenizer, layers)
        write(out / "report.html", page)
    say(f"\n{out}: compare.jsonl, report.html, settings.json and variants.json")
    return results


def variant_rewards(model, pairs, heldout, s):
    """-> (pairs, held-out pairs) with the token rewards of these settings.

    "dpo" trains the model with DPO, to take them from it.
    """
    both = [pairs, heldout]
    if s.token_rewards == "dpo":
        dpo = variant_settings(s, {"algorithm": "dpo", "alpha": 0.0}, model)
        train(model, pairs, dpo)
        both = [measure(model, of, dpo)[1] for of in both]
    return [change_rewards(of, s.token_rewards, s.seed) for of in both]


def interval(differences):
    """-> (mean, low, high) of differences (seeds, prompts): its 95 % interval, for other seeds and
    other prompts too.

    Variances by the two-way analysis (seeds, prompts, what is left), degrees of freedom by
    Satterthwaite. nan with a single seed or prompt.
    """
    values = np.asarray(differences, dtype=float)
    (seeds, prompts), mean = values.shape, values.mean()
    if seeds < 2 or prompts < 2:
        return mean, math.nan, math.nan
    rows, columns = values.mean(1) - mean, values.mean(0) - mean
    rest = values - mean - rows[:, None] - columns[None, :]
    free = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    sums = [prompts * (rows**2).sum(), seeds * (columns**2).sum(), (rest**2).sum()]
    squares = np.array(sums) / free
    # seeds + prompts − rest estimates the variance of the mean, times seeds × prompts
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    if total <= 0:
        return mean, mean, mean
    v = total**2 / ((squares**2 / free).sum())
    # Student's quantile: √v tan θ has his distribution where θ has the density cos(θ)^(v − 1)
    angles = np.linspace(-math.pi / 2, math.pi / 2, 10_001)[1:-1]
    density = np.cos(angles) ** (v - 1)
    shares = np.cumsum(density) - density / 2
    t = math.sqrt(v) * math.tan(np.interp(0.975 * density.sum(), shares, angles))
    half = t * math.sqrt(total / (seeds * prompts))
    return mean, mean - half, mean + half


def table(results):
    """Results of compare -> text: means (± standard error) over seeds, differences to the base.

    The base of a variant is the one of its algorithm with alpha 0; differences are paired by seed
    and prompt. score stands first where there is a judge, else accuracy.
    """
    first = "accuracy" if results[0]["score"] is None else "score"
    columns = {first: first, "credit_auroc": "credit", "token_reward_auroc": "r̂"}
    columns = {n: title for n, title in columns.items() if all(r[n] is not None for r in results)}
    variants, bases = {}, {}
    for result in sorted(results, key=lambda result: result["seed"]):
        variants.setdefault(result["variant"], []).append(result)
        if result["alpha"] == 0:
            bases.setdefault(result["algorithm"], result["variant"])
    cells = [["", *columns.values(), "minus base (95 %)", "ahead"]]
    for name, of in variants.items():
        cells.append([name])
        for column in columns:
            cells[-1].append(f"{np.mean([result[column] for result in of]):.3f}")
        if len(of) > 1:
            spread = np.std([result[first] for result in of], ddof=1)
            cells[-1][1] += f"±{spread / math.sqrt(len(of)):.3f}"
        base = bases.get(of[0]["algorithm"], name)
        each = {result["seed"]: result["each"] for result in variants[base]}
        if base != name and all(result["seed"] in each for result in of):
            cells[-1] += difference([(result["each"], each[result["seed"]]) for result in of])
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def difference(seeds):
    """[(outcomes of a variant by pair, of its base)], one for each seed -> two cells of a table."""
    # longer prompts may have dropped other pairs
    shared = [pair for pair in seeds[0][0] if all(pair in a and pair in b for a, b in seeds)]
    if not shared:
        return ["no pair in common"]
    differences = np.array([[new[pair] - old[pair] for pair in shared] for new, old in seeds])
    mean, low, high = interval(differences)
    within = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
    ahead = int((differences.mean(1) > 0).sum())
    return [f"{mean:+.3f}{within}", f"{ahead} of {len(seeds)}"]


# ------------------------------------------------------------------------- 11 settings and run
# From a command line to a run folder. A field of Settings is a flag of the command line and a
# keyword of annotate, train and evaluate; help, default and range stand here and nowhere else.


def flag(default, help, low=None, high=1e12):
    """A field of Settings. low, high: its range."""
    shown = "" if default is None or default is False or "[" in help else f" [{default}]"
    about = {"help": (help + shown).replace("%", "%%"), "low": low, "high": high}
    return field(default=default, metadata=about)


TINY_DATA = str(Path(__file__).with_name("tiny_data.jsonl"))
KINDS = Literal["contrastive", "sft", "shuffled", "swapped", "dpo"]
# the groups of --help, by the setting that each begins with
GROUPS = {"model": "model and data", "algorithm": "the loss", "prompts": "the token rewards"}
GROUPS |= {"lr": "the training", "out": "the run", "compare": "experiments"}


@dataclass(frozen=True)
class Settings:
    """All settings of a run. None: resolve() finds the value. UserError: out of its range."""

    model: str | None = flag(None, "folder or hub name of a causal language model [a tiny one]")
    data: str = flag(TINY_DATA, "file of pairs or hub data set [tiny_data.jsonl beside treg.py]")
    split: str = flag("test", "split of the data to evaluate on")
    holdout: float = flag(0.1, "without such a split: share of the pairs, or from 1 on number", 0)
    max_pairs: int | None = flag(None, "train on at most this many pairs", 1)
    max_length: int = flag(1024, "in tokens; longer pairs are dropped", 8)
    draws: int = flag(4, "responses sampled for a held-out pair, where something judges them", 1)

    algorithm: Literal["dpo", "simpo"] = flag("dpo", "the preference loss")
    alpha: float = flag(0.25, "strength of the regulariser; 0 is plain DPO or SimPO", 0)
    beta: float | None = flag(None, "reward scale [dpo 0.1, simpo 2.5; the tiny model 1]", 1e-12)
    gamma: float | None = flag(None, "target margin [dpo 0, simpo 1]", 0)
    weighting: Literal["sequence", "static"] = flag("sequence", "w: the loss's own, or ½")

    prompts: str = flag("answer", "answer, revise, or a .json file with better and worse")
    check_prompts: bool = flag(False, "only measure how well prompts tell chosen from rejected")
    token_rewards: KINDS = flag(
        "contrastive", "of the prompts; 1 on chosen, 0 on rejected; two controls; of a DPO model"
    )

    lr: float | None = flag(None, "peak rate [5e-7 x sqrt(8e9 / parameters); tiny: tuned]", 1e-12)
    epochs: int | None = flag(None, "passes over the pairs [1; the tiny model 3]", 1)
    batch_size: int = flag(8, "pairs in an optimiser step", 1)
    pass_tokens: int | None = flag(
        None, "tokens in a forward pass: speed and memory, not the result [1024; on CUDA 4096]", 1
    )
    gradient_checkpointing: bool = flag(False, "less memory for about a third more time")
    dtype: Literal["fp32", "bf16"] = flag("fp32", "of matrix products; all else is fp32")
    seed: int = flag(0, "of all random numbers", 0, 2**31)

    out: str | None = flag(None, "new folder for model, metrics and report [runs/<time>]")
    save_every: int = flag(200, "steps between checkpoints", 1)
    resume: str | None = flag(None, "folder of a stopped run to go on with; no flag beside it")

    compare: int = flag(0, "train the paper's table and controls with this many seeds", 0, 1000)
    variants: str | None = flag(None, ".json file, {name: {setting: value}}, to compare instead")

    def __post_init__(self):
        for item in fields(self):
            name, value = f"--{item.name.replace('_', '-')}", getattr(self, item.name)
            low, high = item.metadata["low"], item.metadata["high"]
            kinds = get_args(item.type) or (item.type,)
            if get_origin(item.type) is Literal:
                need(value in kinds, f"{name}: must be one of {', '.join(kinds)}, not {value}")
            else:
                fits = isinstance(value, (*kinds, int) if float in kinds else kinds) and value != ""
                need(fits, f"{name}: must be of type {kinds[0].__name__}, not {value!r}")
            if low is not None and value is not None:
                need(low <= value <= high, f"{name}: must be from {low} to {high:g}, not {value}")
        need(self.split != "train", "--split: the pairs that are trained on are no test")


def resolve(settings, model, **changes):
    """-> Settings, by default all defaults, with these changes and without None where the value
    depends on the model or the algorithm."""
    s = replace(settings or Settings(), **changes)
    tiny = model.name_or_path == TINY
    dpo = s.algorithm == "dpo"
    if tiny:  # tuned for the plain losses on the validation split
        defaults = {"lr": 4e-4 if dpo else 2e-4, "beta": 1.0, "epochs": 3}
    else:  # 5e-7, published for 8e9 parameters, grows as the size falls, by its square root
        lr = float(f"{5e-7 * math.sqrt(8e9 / model.num_parameters()):.1e}")
        defaults = {"lr": lr, "beta": 0.1 if dpo else 2.5, "epochs": 1}
    defaults["gamma"] = 0.0 if dpo else 1.0
    # with few tokens in a pass a GPU spends its time on reading the weights
    defaults["pass_tokens"] = 4096 if model.device.type == "cuda" else 1024
    filled = {name: value for name, value in defaults.items() if getattr(s, name) is None}
    return replace(s, max_length=min(s.max_length, positions(model)), **filled)


def positions(model):
    """The largest number of tokens in a row that the model takes."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 10**9


def read_prompts(name):
    """--prompts -> a name in PROMPTS, or the templates of a .json file."""
    if name in PROMPTS:
        return name
    where = f"--prompts {name}"
    hint = "with better and worse, which hold {prompt}, perhaps {response}, and no other field"
    with explain(f"{where}: must be {', '.join(PROMPTS)} or a .json file", hint):
        style = json.loads(Path(name).read_text("utf-8"))
        style = {side: read_text(style[side], f"{where}: {side}") for side in ("better", "worse")}
        filled = contrastive_prompts(SNOWMAN, "", style)
        need(all(SNOWMAN in text for text in filled), f"{where}: must hold {{prompt}} in both")
    need(filled[0] != filled[1], f"{where}: better and worse must be different")
    return style


def best_device():
    """Where to compute: an NVIDIA GPU, else Apple's, else the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(name, checkpointing=False):
    """-> (model with float32 weights and no dropout, tokenizer).

    name: a folder or a hub name. UserError: it cannot be loaded, or is no causal language model.
    """
    where, path = f"--model {name}", Path(name)
    if path.exists() or name[0] in "./~":
        there = (path / "config.json").is_file()
        need(there, f"{where}: is no model folder: it has no config.json; name another")
    hint = "name a folder with model and tokenizer, or a hub name where the hub can be reached"
    with explain(f"{where}: cannot be loaded", hint):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        usual = hasattr(tokenizer, "is_fast")
        need(usual, f"{where}: has mistral-common's tokenizer, without a template; uninstall that")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        need(not config.is_encoder_decoder, f"{where}: is an encoder-decoder; name a causal model")
        full = getattr(config, "quantization_config", None) is None
        need(full, f"{where}: is quantised; name it in full precision, to train it and to save it")
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    lost = ", ".join(sorted(loaded["missing_keys"]))  # they would be random numbers
    need(not lost, f"{where}: weights missing: {lost}")
    need(tokenizer("a", add_special_tokens=False)["input_ids"], f"{where}: no tokenizer")
    if not tokenizer.is_fast:
        say("note: this tokenizer gives no offsets, so there are no credit figures")
    model.to(best_device()).eval()
    causal = not sees_the_future(model)
    need(causal, f"{where}: sees later tokens, as an encoder; name a causal model")
    if checkpointing:
        checkpoint_layers(model, where)
    return model, tokenizer


@torch.no_grad()
def sees_the_future(model):
    """Does a later token change the logits before it?"""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    ids %= model.get_input_embeddings().weight.shape[0]
    logits = [model(input_ids=row[None], use_cache=False).logits[0, :3].float() for row in ids]
    return not torch.allclose(*logits, atol=1e-4, equal_nan=True)


def checkpoint_layers(model, where):
    """Gradient checkpointing; not by transformers' switch, which wants training mode: dropout."""
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    need(layers, f"--gradient-checkpointing: {where} cannot do it; leave the flag out")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def held_out(pairs, holdout):
    """-> (pairs to train on, pairs to evaluate on). All pairs of one prompt are on one side.

    holdout: a share of the pairs, or from 1 on a number. Where that comes to a pair or more, at
    least one prompt is held out.
    """
    count = int(holdout if holdout >= 1 else holdout * len(pairs))
    prompts = {}
    for i, pair in enumerate(pairs):
        prompts.setdefault(repr(pair.prompt), []).append(i)
    groups, taken = [*prompts.values()], set()
    if len(groups) == 1:  # all pairs share it
        groups = [[i] for i in range(len(pairs))]
    for group in np.random.default_rng(0).permutation(len(groups)):  # seeds share a test
        if len(taken) + len(groups[group]) <= count:
            taken.update(groups[group])
    if count and not taken and groups:
        taken.update(min(groups, key=len))
    both = [], []
    for i, pair in enumerate(pairs):
        both[i in taken].append(pair)
    return both


def load_all(s):
    """-> (model, tokenizer, pairs to train on, pairs to evaluate on); none is encoded yet."""
    splits = load_splits(s.data)
    pairs, test = splits.get("train", []), splits.get(s.split, [])
    need(test or s.split == "test", f"--split {s.split}: {s.data} has no such split")
    used = {"train", s.split, *(() if s.model else ("warmup",))}
    for name in sorted({*splits} - used):
        say(f"note: {len(splits[name])} rows of split {name} are not used")
    if not test:
        pairs, test = held_out(pairs, s.holdout)
    need(pairs, f"{s.data}: --holdout {s.holdout:g} and other splits leave no pair to train on")
    if s.model:
        say(f"loading {s.model} …")
        model, tokenizer = load_model(s.model, s.gradient_checkpointing)
    else:
        need("warmup" in splits, f"{s.data}: no split warmup, to make the tiny model of; --model?")
        torch.set_num_threads(1)  # more wait for each other, and change its last digits
        model, tokenizer = make_tiny(splits["warmup"], s.seed)
    return model.to(best_device()), tokenizer, pairs[: s.max_pairs], test


def prompt_quality(pairs, name):
    """Say how well the token rewards tell chosen from rejected, and warn where they do not.

    -> (share of pairs that they tell apart, the low end of its interval).
    """
    share, low, high = pair_accuracy(pairs)
    within = f"95 % interval {low:.3f} to {high:.3f}, {len(pairs)} pairs"
    say(f"prompts {name}: pair accuracy {share:.3f} ({within})")
    auroc = mean_auroc(pairs, "token_rewards")
    if not math.isnan(auroc):
        say(f"prompts {name}: token reward AUROC {auroc:.3f} on the labelled errors")
    if high < 0.5:
        say("warning: rejected responses get higher rewards: are better and worse swapped?")
    elif low <= 0.5:
        say("warning: no better than chance on these pairs; try other --prompts, or --alpha 0")
    return share, low


def check_prompts(s):
    """--check-prompts: measure every style on up to 200 pairs, and end with advice."""
    model, tokenizer, pairs, _ = load_all(s)
    found = {}
    for name in dict.fromkeys([*PROMPTS, s.prompts]):
        changed = replace(s, prompts=name, alpha=1.0, token_rewards="contrastive")
        annotated = annotate(model, tokenizer, pairs[:200], changed)
        if annotated:
            found[name] = prompt_quality(annotated, name)
    need(found, f"{s.data}: no pair is left to measure")
    best = max(found, key=found.get)
    _, low = found[best]
    if low > 0.5:
        say(f"use --prompts {best}")
    else:
        say("none is better than chance on these pairs: give more, write prompts or use --alpha 0")


# What a run folder holds while it trains: settings.json, the untrained model in reference/, the
# annotated pairs in pairs.pt, metrics.jsonl and checkpoint.pt. Our files are written beside the old
# ones and renamed, so that at any instant each is whole: the old one or the new one.


def write(path, content):
    """Write values as the file's ending says, or else a text. UserError: the old file stays."""
    path = Path(path)
    if path.suffix == ".json":
        content = json.dumps(content, indent=2) + "\n"
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with saving(path):
            with open(temporary, "wb") as file:
                if path.suffix == ".pt":
                    torch.save(content, file)
                else:
                    file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())  # on the disk before it takes the old one's place
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path, row):
    """Add a line of JSON to a file."""
    with saving(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path, device="cpu"):
    """-> what write() was given; nothing is unpickled but plain values and tensors."""
    with loading(path):
        if path.suffix == ".pt":
            return torch.load(path, map_location=device, weights_only=True)
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines()]


# the settings that decide what the steps are; others may change before a run goes on
DECISIVE = ("algorithm", "alpha", "beta", "gamma", "weighting", "lr", "epochs", "batch_size")
DECISIVE += ("dtype", "seed")


def save_checkpoint(folder, model, optimizer, history, s):
    """Write what training needs to go on."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    write(folder / "checkpoint.pt", {**state, "settings": asdict(s)})


def resumed(folder, model, optimizer, s):
    """Take weights and the optimiser's state from a folder's checkpoint. -> the history till then.

    Without a checkpoint training begins. UserError: it is of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    history = []
    if path.exists():
        state = read(path, model.device)
        with loading(path):
            other = [name for name in DECISIVE if state["settings"][name] != getattr(s, name)]
            need(not other, f"{path}: is of another {', '.join(other)}; give another out")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]
    write(folder / "metrics.jsonl", history)  # lines of steps after the checkpoint go
    return history


def prepare(s, folder, judge=None):
    """All that training begins from. -> (model, tokenizer, pairs, held-out pairs, summary).

    Both kinds of pairs are annotated; the summary has the metrics of the untrained model. It is
    kept in the folder: a run that was stopped takes it from there, and needs no other file.
    """
    if (folder / "pairs.pt").exists():
        return load_prepared(s, folder)
    model, tokenizer, raw, raw_heldout = load_all(s)
    s = resolve(s, model)
    with stopwatch("annotate") as cost:
        pairs = annotate(model, tokenizer, raw, s)
        heldout = annotate(model, tokenizer, raw_heldout, s)
    need(pairs, f"{s.data}: no pair is left to train on")
    steps, size = s.epochs * math.ceil(len(pairs) / s.batch_size), model.num_parameters()
    say(f"model {s.model or 'tiny'}, {size / 1e6:.1f} million parameters, on {model.device.type}")
    say(f"{len(pairs)} pairs to train on, {len(heldout)} held out, {steps} steps of {s.batch_size}")
    if s.lr > 1e-5 and size > 1e8:
        say(f"warning: --lr {s.lr:g} suits adapters; to train all of this model, leave it out")
    if s.alpha > 0 and s.token_rewards == "contrastive":
        prompt_quality(pairs, s.prompts)
    before = {}
    if not s.compare:  # which shows nothing of the untrained model
        before, heldout = evaluate(model, tokenizer, heldout, s, judge)
    before.pop("credit_auroc", None)  # constants by construction: the model is its own reference
    if s.algorithm == "dpo":
        before.pop("accuracy", None)
        before.pop("margin", None)
    summary = {"before": before, **cost}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", {"settings": asdict(s), "machine": machine(s)})
    save_model(model, tokenizer, folder / "reference", end_tokens(pairs))
    state = {
        "pairs": [plain(pair) for pair in pairs],
        "heldout": [plain(pair) for pair in heldout],
        "summary": summary,
        "shares_prompts": model.shares_prompts,
    }
    write(folder / "pairs.pt", state)  # the last: it says that all is there
    return model, tokenizer, pairs, heldout, summary


def describe(s):
    """The settings that matter, on a line."""
    loss = f"{s.algorithm}, alpha {s.alpha:g}, beta {s.beta:g}, gamma {s.gamma:g}"
    if s.alpha == 0:
        return f"{loss}, lr {s.lr:g}, no token rewards"
    loss += f", {s.weighting} weighting, lr {s.lr:g}"
    return f"{loss}, {s.token_rewards} token rewards, prompts {s.prompts}"


def load_prepared(s, folder):
    """-> what prepare has kept in a folder; the model is the untrained one."""
    say(f"loading {folder} …")
    state = read(folder / "pairs.pt")
    with loading(folder / "pairs.pt"):
        pairs = [as_pair(values) for values in state["pairs"]]
        heldout = [as_pair(values) for values in state["heldout"]]
    model, tokenizer = load_model(str(folder / "reference"), s.gradient_checkpointing)
    model.shares_prompts = state["shares_prompts"]
    model.name_or_path = model.config.name_or_path = s.model or TINY  # by which resolve knows it
    if not s.model:
        torch.set_num_threads(1)  # as when it was made
    return model, tokenizer, pairs, heldout, state["summary"]


def plain(pair):
    """A pair as plain values, without the contrastive prompts: they have been read."""
    pair = copied(pair)
    for response in sides([pair]):
        response.better_ids = response.worse_ids = None
    return asdict(pair)


def as_pair(values):
    """What plain() made -> a pair."""
    responses = {side: Response(**values[side]) for side in ("chosen", "rejected")}
    return Pair(**{**values, **responses})


def machine(s):
    """What the last digits of a run depend on."""
    threads = torch.get_num_threads() if s.model else 1  # the tiny model is computed with one
    return {
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_settings(folder):
    """-> the Settings of the run in a folder. Says what of the machine has changed since."""
    path = folder / "settings.json"
    need(path.is_file(), f"--resume {folder}: holds no run to go on with; begin it by --out")
    content = read(path)
    with loading(path):
        s, then = Settings(**content["settings"]), content["machine"]
    for name, value in machine(s).items():
        if value != then.get(name):
            say(f"note: {name} was {then.get(name)} and is {value}: last digits may differ")
    return s


@contextlib.contextmanager
def run_folder(s):
    """Within it the run's folder is there, and nobody else's. -> (its path, its settings)."""
    if s.resume:
        out = Path(s.resume)
        s = read_settings(out)
    else:
        out = Path(s.out or datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S.%f"))
        with explain(f"--out {out}: cannot be made", "name a new folder"):
            out.mkdir(parents=True, exist_ok=True)
        # what a run leaves that was killed in its first write
        rest = {path.name for path in out.iterdir()} - {"settings.json.tmp", ".lock"}
        need(not rest, f"--out {out}: is not empty; name a new folder, or go on by --resume {out}")
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{out}: another process is at work there; name another --out") from None
    try:
        yield out, s
    except KeyboardInterrupt as stop:
        if not stop.args and (out / "settings.json").exists():
            stop.args = (f"stopped; --resume {out} goes on",)
        raise
    finally:
        lock.release()
        (out / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            out.rmdir()  # if nothing came of it


@contextlib.contextmanager
def stopwatch(what):
    """-> a dict that gets the seconds, and the CPU seconds of all threads, spent within it."""
    cost, seconds, cpu = {}, time.perf_counter(), time.process_time()
    yield cost
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cost[f"{what}_seconds"] = time.perf_counter() - seconds
    cost[f"{what}_cpu_seconds"] = time.process_time() - cpu


def peak_memory():
    """The most bytes in use so far, on the GPU or of the process; None where nobody can tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
    return None


def run(s, judge=None):
    """One command line, from the files to a trained model in its folder.

    judge: a function of (pair, text), 0 to 1; see evaluate.
    """
    alone = not s.resume or s == Settings(resume=s.resume)
    need(alone, "--resume: takes no other flag, the folder has them all")
    read_prompts(s.prompts)
    read_variants(s.variants)
    need(s.compare or not s.variants, "--variants: goes with --compare")
    if s.check_prompts:
        check_prompts(s)
        return
    with run_folder(s) as (out, s):
        if (out / "summary.json").exists():
            say(f"{out}: this run is finished; its results are in summary.json")
        elif s.compare:
            compare(s, out, judge)
        else:
            run_once(s, out, judge)


def run_once(s, out, judge):
    """Prepare, train, evaluate, save and show one model, from wherever the folder has got to."""
    need(s.token_rewards != "dpo", "--token-rewards dpo: is for --compare alone")
    model, tokenizer, pairs, untrained, summary = prepare(s, out, judge)
    s = resolve(s, model)
    say(textwrap.fill(describe(s), 80))
    with stopwatch("train") as cost:
        history = train(model, pairs, s, out, untrained)
    after, heldout = evaluate(model, tokenizer, untrained, s, judge)
    save_model(model, tokenizer, out, end_tokens(pairs))
    summary |= {
        "after": after,
        "pairs": len(pairs),
        "steps": len(history),
        **cost,
        "peak_memory_bytes": peak_memory(),
        "settings": asdict(s),
    }
    text = show(summary, untrained, heldout, tokenizer)
    layers = {"token reward r̂": (heldout, "token_rewards"), "learned credit": (heldout, "credit")}
    page = report(describe(s), text, {"this run": history}, heldout[:5], tokenizer, layers)
    write(out / "report.html", page)
    write(out / "summary.json", summary)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(out / "reference", ignore_errors=True)
    say(f"\n{out}: the model, metrics.jsonl, settings.json, summary.json and report.html")


def save_model(model, tokenizer, out, learned):
    """Write a folder that from_pretrained loads; the model stops at the end tokens it learned."""
    ends = all_ends(model, learned)
    model.generation_config.eos_token_id = ends
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # it sets what it does not read (a temperature, without sampling), and could not be saved
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    with saving(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def parse(argv):
    """A command line -> Settings."""
    parser = argparse.ArgumentParser(
        prog="treg.py",
        usage="python treg.py [--model DIR] [--data FILE] …",
        description=__doc__.partition("The method")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for item in fields(Settings):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        kinds = get_args(item.type) or (item.type,)  # float | None: a float
        if item.type is bool:
            how = {"action": "store_true"}
        elif get_origin(item.type) is Literal:
            how = {"choices": kinds}
        else:
            how = {"type": kinds[0], "metavar": "X" if kinds[0] is str else "N"}
        name = f"--{item.name.replace('_', '-')}"
        group.add_argument(name, default=item.default, help=item.metadata["help"], **how)
    # an error is one line, as all others
    parser.error = lambda message: need(False, f"{message}; see --help")
    return Settings(**vars(parser.parse_args(argv)))


def keep_freed_memory():
    """Keep the memory of freed tensors for the next ones, where C's library is glibc.

    It would give large blocks back to the system, which fills every page of a new one with zeros.
    With a small model that is up to 30 % of the CPU time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another library, or Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap is not given back


def main(argv=None):
    """The command line. -> exit status. In a notebook: main(["--model", …])."""
    keep_freed_memory()
    with contextlib.suppress(AttributeError, ValueError):  # standard output is another, or closed
        sys.stdout.reconfigure(errors="replace")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt as stop:
        say(f"treg.py: {stop if stop.args else 'stopped'}", sys.stderr)
        return 130
    except UserError as problem:
        error = str(problem)
    except OSError as problem:
        error = f"{problem.filename or 'standard output'}: {problem.strerror or problem}"
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        error = "out of memory; begin again with --gradient-checkpointing, a smaller --pass-tokens "
        error += "or --max-length, or --dtype bf16"
    say(f"treg.py: error: {error}", sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.exit(main())
