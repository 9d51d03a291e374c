# SPDX-License-Identifier: MIT
"""T-REG: preference optimisation with token-level reward regularisation, in one readable file.

    python treg.py                                       a tiny model, made and trained here in half a minute
    python treg.py --model gpt2                          a Hugging Face model on the same data
    python treg.py --model DIR --data pairs.jsonl        your model, your preference pairs
    python treg.py --model DIR --data pairs.jsonl --check-prompts     which contrastive prompts suit this model?

The method (Zhou, Zhang, Zhao and Meng, ACL 2025, arXiv 2412.02685). A frozen model scores every token of both
responses twice, after a prompt that asks for a better answer and after one that asks for a worse one:

    r̂_t = σ( log π_eval(y_t | x_better, y_<t) − log π_eval(y_t | x_worse, y_<t) ) − ½        token reward, in [−½, ½]
    r_t = β ( log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) )                              what the policy learned
    z   = Σ_t r_t(chosen) − Σ_t r_t(rejected) − γ                                            margin
    L   = −log σ(z) + α · w · ( − Σ_t r̂_t r_t, over both responses ),  w = σ(−z), detached    loss of one pair

Each token's gradient is then the plain one times (1 + α r̂_t) on the chosen side and (1 − α r̂_t) on the rejected:
our derivation, as are the regulariser in terms of r_t for SimPO too (so with 1 / |y|), γ in its w, and static w = ½.

Sections: 1 prompts, 2 token rewards, 3 implicit rewards and the loss (the paper; torch only, made to be copied),
4 data, 5 log-probs, 6 annotate, 7 train, 8 evaluate and show, 9 the tiny model, 10 command line.

Shapes: B pairs (or rows), T response tokens including the end token. Everything per token is (B, T), column t is
response token t, and a mask says where a response has a token. Logs are natural; a reward has the unit of β · nats.
"""
import argparse, collections, contextlib, csv, functools, gzip, html, inspect, io, itertools, json  # noqa: E401
import math, os, re, resource, signal, sys, time, zipfile, zlib  # noqa: E401
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import load_dataset
from pyarrow.parquet import ParquetFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------- 1 prompts
# Our wording, built on the paper's four criteria. What differs between better and worse comes last: all that stands
# before it is then the same text, and is computed once.
PROMPTS = {
    "answer": {
        "better": "{prompt}\n\nGive an answer that is helpful, correct, coherent and concise.",
        "worse": "{prompt}\n\nGive an answer that is unhelpful, wrong, incoherent and rambling.",
    },
    "revise": {
        "better": "{prompt}\n\nResponse: {response}\n\nRevise the response so that it is more helpful, "
                  "more correct, more coherent and more concise.",
        "worse": "{prompt}\n\nResponse: {response}\n\nRevise the response so that it is less helpful, "
                 "less correct, less coherent and less concise.",
    },
}


def contrastive_prompts(prompt, response, style):
    """-> (better, worse), of prompt's own kind: a text, or a list of messages whose last user message is rewritten.

    style names a pair in PROMPTS or is a {"better": …, "worse": …} of templates with {prompt} and maybe {response}.
    """
    templates = PROMPTS[style] if isinstance(style, str) else style
    if not isinstance(prompt, str):
        last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
        return tuple([*prompt[:last], {**prompt[last], "content": text}, *prompt[last + 1:]]
                     for text in contrastive_prompts(prompt[last]["content"], response, style))
    fields = {"prompt": prompt, "response": response}  # filled in one pass: a {response} in the prompt is just text
    return tuple(re.sub(r"\{(prompt|response)\}", lambda field: fields[field[1]], templates[side])
                 for side in ("better", "worse"))


# ---------------------------------------------------------------------------------------------- 2 token rewards
def token_rewards(better_logps, worse_logps, mask):
    """r̂ = σ(better − worse) − ½, exactly 0 where mask is 0. (B, T) × 3 -> (B, T) in [−½, ½].

    better_logps, worse_logps: log π_eval of the same response tokens after x_better and after x_worse.
    """
    # where, not a product: padding may hold NaN, and NaN × 0 is NaN, in the value and in the gradient
    return torch.sigmoid(torch.where(mask.bool(), better_logps - worse_logps, 0.0)) - 0.5


# ---------------------------------------------------------------------------- 3 implicit rewards and the loss
def dpo_rewards(logps, ref_logps, mask, beta):
    """DPO's implicit token rewards r_t = β (log π − log π_ref), exactly 0 where mask is 0. (B, T) × 3 -> (B, T)."""
    return beta * torch.where(mask.bool(), logps - ref_logps, 0.0)


def simpo_rewards(logps, mask, beta):
    """SimPO's implicit token rewards r_t = (β / |y|) log π, exactly 0 where mask is 0. (B, T) × 2 -> (B, T).

    |y| is the number of tokens of the response, end token included.
    """
    length = mask.bool().sum(-1, keepdim=True).clamp(min=1)
    return beta * torch.where(mask.bool(), logps, 0.0) / length


def treg_loss(chosen, rejected, chosen_hat, rejected_hat, alpha, gamma=0.0, weighting="sequence"):
    """The T-REG loss and the preference margin z of each pair. (B, T) × 4 -> (loss, margin), each (B,).

    chosen, rejected: implicit token rewards r_t; chosen_hat, rejected_hat: token rewards r̂_t; zeros in the padding
    of all four (the two sides' T may differ). alpha = 0 is DPO, or with SimPO's rewards and gamma SimPO, exactly.
    weighting "sequence" is w = σ(−z), the factor in the preference loss's own gradient; "static" is ½ (our choice).
    """
    if weighting not in ("sequence", "static"):
        raise ValueError(f'weighting is "sequence" or "static", not {weighting!r}')
    margin = chosen.sum(-1) - rejected.sum(-1) - gamma
    # detached: the weight scales the regulariser's gradient and has none of its own
    weight = torch.sigmoid(-margin).detach() if weighting == "sequence" else 0.5
    agreement = (chosen_hat * chosen).sum(-1) + (rejected_hat * rejected).sum(-1)  # Σ_t r̂_t r_t = −L_reg
    return -F.logsigmoid(margin) - alpha * weight * agreement, margin


# ------------------------------------------------------------------------------------------------------- 4 data
SIDES = ("chosen", "rejected")
FILES = ("json", "jsonl", "csv", "parquet")  # endings of data files; .gz may follow
bar = functools.partial(tqdm, delay=2, leave=False)  # a progress bar for what takes more than two seconds

class UserError(Exception):
    """A mistake that the user can mend, in one line: where, what, and what to do."""

def need(condition, message):
    if not condition:
        raise UserError(message)

def one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__

@contextlib.contextmanager
def explain(what, hint):
    """Within it an error of a library's becomes the user's, in one line: what failed, why, and what to do."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every library has its own
        raise UserError(f"{what} ({one_line(error)}); {hint}") from None

def load_pairs(source, split="train"):
    """-> list of pairs from a .json, .jsonl, .csv or .parquet file (.gz too), else from a hub data set.

    Rows that name another split are left out; rows that name none are "train". A pair is a dict: prompt, a text or a
    list of {role, content}; chosen and rejected, texts; where, "file:line"; and if the row has them keywords and
    chosen_errors, rejected_errors, character spans of bad text. UserError names the line of a bad row."""
    rows = bar(read_rows(str(source), split), desc="read", unit=" rows")
    return [read_pair(row, where) for where, row in rows
            if not isinstance(row, dict) or (row.get("split") or "train") == split]

def read_rows(source, split):
    """Yield (where, row) for every row of a file, or of this split of a hub data set."""
    path, kind = Path(source), source.removesuffix(".gz").rpartition(".")[2]
    if kind not in FILES and not path.exists():
        with explain(f"--data {source}: no such file, and the hub does not give it", "see whether it can be reached"):
            splits = load_dataset(source)
            need(split in splits or split != "train", f"--data {source}: has no split train, only {', '.join(splits)}")
            for line, row in enumerate(splits.get(split, ()), 1):
                yield f"{source}:row {line}", {**row, "split": split}
        return
    why = "is a folder" if path.is_dir() else "unknown ending" if path.exists() else "no such file"
    need(path.is_file() and kind in FILES, f"{path}: {why}; name a .json, .jsonl, .csv or .parquet file")
    line, count, unit = 0, 0, "" if kind == "jsonl" else "row "
    try:
        file = rows = (gzip.open if path.suffix == ".gz" else open)(path, "rb")
        if kind == "parquet":  # by Arrow, on which datasets rests: datasets may read its own copy of an older file
            rows = ParquetFile(file).read().to_pylist()
        elif kind == "csv":  # the standard library leaves every cell the text that it is, "NA" and "007" too
            csv.field_size_limit(sys.maxsize)
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            rows = csv.DictReader(itertools.dropwhile(str.isspace, text), strict=True)
        elif kind == "json":
            rows = json.load(file)
            need(not isinstance(rows, dict), f"{path}: must hold one list; a file with a row a line is .jsonl")
        for line, row in enumerate(rows, 1):
            if kind == "jsonl":  # lines as bytes, so that only a newline ends one
                if not row.strip(b"\xef\xbb\xbf \t\r\n"):
                    continue
                row = json.loads(row)
            elif kind == "csv":
                need(None not in row, f"{path}:row {line}: more cells than columns; quote cells that hold commas")
                row = {name: cell for name, cell in row.items() if cell}
            count += 1
            yield f"{path}:{unit}{line}", row
    except UserError:
        raise
    except Exception as error:  # gzip, csv, json and Arrow each have their own; not by explain, for the line moves on
        place = f"{path}:{unit}{line}: here or after it not valid {kind}, or not UTF-8"
        raise UserError(f"{place} ({one_line(error)}); mend the file or write it again") from None
    need(count, f"{path}: holds no rows; a row has prompt, chosen and rejected")

def read_text(value, name, where, blank=False):
    need(isinstance(value, str), f"{where}: {name} is missing, or is not text")
    need(blank or value.strip(), f"{where}: {name} is blank; give it text or take the row out")
    need(not re.search("[\ud800-\udfff]", value), f"{where}: {name} holds what is no character; save it as UTF-8")
    return value

def read_messages(value, name, where, last=None):
    """A list of {role, content}, its last message by the role last; or a text, as it is."""
    if not isinstance(value, list):
        return read_text(value, name, where)
    need(all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") for m in value),
         f"{where}: {name}: a message needs a role, one of system, user and assistant")
    need(not last or value and value[-1]["role"] == last, f"{where}: {name} must end with a message of the {last}'s")
    return [{"role": message["role"], "content": read_text(message.get("content"), f"{name}: content", where,
                                                           blank=message is not value[-1])} for message in value]

def read_pair(row, where):
    """A row of any known format -> a pair."""
    need(isinstance(row, dict), f"{where}: a row is an object with chosen and rejected, not {type(row).__name__}")
    chosen, rejected = (read_messages(row.get(side), side, where, "assistant") for side in SIDES)
    need(type(chosen) is type(rejected), f"{where}: chosen and rejected must both be texts, or both lists of messages")
    prompt, shared = row.get("prompt"), []
    if isinstance(chosen, list):
        need(chosen[:-1] == rejected[:-1], f"{where}: chosen and rejected must be the same up to their last message")
        shared, chosen, rejected = chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if prompt is None and "instruction" in row:
        extra = read_text(row.get("input") or "", "input", where, blank=True)
        prompt = read_text(row["instruction"], "instruction", where) + f"\n\n{extra}" * bool(extra.strip())
    elif prompt is None and "question" in row:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        prompt = [*system, {"role": "user", "content": row["question"]}]
    elif prompt is None and isinstance(row["chosen"], str):  # it is what both begin with; Anthropic HH marks its end
        prompt = os.path.commonprefix([chosen, rejected])
        turns, mark, _ = prompt.rpartition("\n\nAssistant:")
        prompt = turns + mark or prompt
        chosen, rejected = (read_text(text[len(prompt):], "what follows the shared beginning", where)
                            for text in (chosen, rejected))
    if isinstance(prompt, list):
        prompt = read_messages(prompt, "prompt", where)
        if shared[-1:] == prompt[-1:]:  # one repeats the other, perhaps without its system message
            shared = max(prompt, shared, key=len)
        elif shared[:len(prompt)] != prompt:
            shared = prompt + shared
    elif prompt is not None:  # a text beside message lists is repeated in them (UltraFeedback)
        read_text(prompt, "prompt", where)
    pair = {"prompt": read_messages(shared or prompt, "prompt", where, "user"),
            "chosen": chosen, "rejected": rejected, "where": where}
    for name, size in ("chosen_errors", len(chosen)), ("rejected_errors", len(rejected)):
        if row.get(name) is not None:
            need(isinstance(row[name], list) and all(
                isinstance(span, list) and [type(end) for end in span] == [int, int] and 0 <= span[0] < span[1] <= size
                for span in row[name]), f"{where}: {name} must be a list of [start, end), from 0 to {size}")
            pair[name] = row[name]
    if row.get("keywords") is not None:
        need(isinstance(row["keywords"], list), f"{where}: keywords must be a list of words")
        pair["keywords"] = [read_text(word, "a keyword", where) for word in row["keywords"]]
    return pair

# The layout of a base model, which has no chat template of its own. It is saved with the trained model.
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{{ eos_token if m['role'] == 'assistant' }}\n\n{% endfor %}"
                  "{% if add_generation_prompt %}Assistant:\n{% endif %}")

def as_messages(prompt):
    """A prompt as messages: a list stays, Anthropic HH text becomes its turns, any other text one user message."""
    if not isinstance(prompt, str):
        return prompt
    turns = re.split(r"\n\n(Human|Assistant):", prompt)
    if prompt.startswith("\n\nHuman:") and turns[-2:] == ["Assistant", ""]:
        return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
                for who, said in zip(turns[1:-2:2], turns[2:-2:2])]
    return [{"role": "user", "content": prompt}]

def render(tokenizer, messages, **options):
    """The messages in the model's template, as text; where the template refuses a system role, the user says it."""
    if not tokenizer.chat_template:  # a base model; its BOS, if its tokenizer would write one, the layout writes
        begins = tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{{ bos_token }}" * bool(begins) + PLAIN_TEMPLATE
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:  # some templates tell the date: a run must be the same tomorrow
        options["chat_template"] = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # jinja has many
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from None
        user = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return render(tokenizer, [user, *messages[2:]], **options)

def prompt_ids(tokenizer, messages):
    # the template writes the BOS if the model wants one; a second by the tokenizer is a classic mistake
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def end_token(tokenizer):
    """The id that the model's own template writes after an assistant turn, else eos."""
    turn = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "☃"}])
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    after = tokenizer(turn.rpartition("☃")[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in special), tokenizer.eos_token_id)

def response_ids(tokenizer, text, end):
    """Ids of the response on its own, then exactly one end token: no merge across its boundary, no prompt needed."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    while ids and ids[-1] == end:
        ids.pop()
    return ids + [end]

def good_tokens(tokenizer, text, spans):
    """-> for every token of text (end token not included) whether it overlaps no error span."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [not any(a < end and start < b for start, end in spans) for a, b in offsets]

def encode(tokenizer, pairs, max_length, style=None):
    """-> (pairs with int32 arrays of token ids, a report in words of what was dropped).

    Adds prompt_ids, chosen_ids, rejected_ids, with a style chosen_better_ids and so on (both sides, both contrastive
    prompts), with error spans chosen_good and rejected_good. A pair is dropped if its responses are the same, or if
    its longest prompt and response have more than max_length tokens together: a cut could change who won."""
    end, encoded, dropped = end_token(tokenizer), [], collections.Counter()
    for pair in bar(pairs, desc="encode", unit=" pairs"):
        messages = as_messages(pair["prompt"])
        with explain(f"{pair['where']}: cannot be encoded", "take the row out"):  # such as roles that do not alternate
            prompts = {"prompt_ids": prompt_ids(tokenizer, messages)}
            for side in SIDES if style else ():
                for form, text in zip(("better", "worse"), contrastive_prompts(messages, pair[side], style)):
                    prompts[f"{side}_{form}_ids"] = prompt_ids(tokenizer, text)
        responses = {f"{side}_ids": response_ids(tokenizer, pair[side], end) for side in SIDES}
        if responses["chosen_ids"] == responses["rejected_ids"]:
            dropped["chosen and rejected are the same"] += 1
        elif max(map(len, prompts.values())) + max(map(len, responses.values())) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        else:  # the labels end where response_ids took end tokens off the text
            good = {f"{side}_good": good_tokens(tokenizer, pair[side], pair[f"{side}_errors"])
                    [:len(responses[f"{side}_ids"]) - 1] for side in SIDES if f"{side}_errors" in pair}
            ids = {name: np.array(value, np.int32) for name, value in {**prompts, **responses}.items()}
            encoded.append({**pair, **ids, **good})
    return encoded, "; ".join(f"{count} dropped: {what}" for what, count in dropped.items())


# -------------------------------------------------------------------------------------------------- 5 log-probs
def response_logps(model, prompts, responses):
    """log π(y_t | prompt, y_<t) of each response. Two lists of B lists of ids -> (logps, mask), each (B, T), float32.

    With model.shares_prompts (see share_prompts) all rows lie in one row without padding, sorted, and what a row has
    in common with the row before it is computed once: a prompt for both of its responses, an instruction for all. The
    tokens then form a tree written in depth-first order, so "j is an ancestor of i" is: j ≤ i < end of j's subtree.
    Without it every row is computed by itself."""
    device = next(model.parameters()).device
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    found = [None] * len(rows)
    for group in [order] if getattr(model, "shares_prompts", False) else [[i] for i in order]:
        ids, positions, ends, sources, targets, path, before = [], [], [], [], [], [], []
        for i in group:
            shared = len(os.path.commonprefix([rows[i], before]))
            path = path[:shared] + list(range(len(ids), len(ids) + len(rows[i]) - shared))  # the row's nodes
            positions += range(shared, len(rows[i]))
            ids += rows[i][shared:]
            ends += [0] * (len(rows[i]) - shared)
            for node in path:
                ends[node] = len(ids)
            sources += path[len(prompts[i]) - 1:-1]  # the node that predicts response token t
            targets += responses[i]
            before = rows[i]
        response_logps.positions += len(ids)
        ids, positions, ends, sources, targets = (
            torch.tensor(values, device=device) for values in (ids, positions, ends, sources, targets))
        tree = {}
        if len(group) > 1:
            node = torch.arange(len(ids), device=device)
            sees = (node[:, None] >= node) & (node[:, None] < ends)
            tree = {"position_ids": positions[None], "attention_mask": sees[None, None]}
        # the output head is most of a small model: only positions that predict a response token go through it
        keep = {"logits_to_keep": sources} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        logits = model(input_ids=ids[None], use_cache=False, **keep, **tree).logits[0]
        logits = logits if keep else logits[sources]
        logps = -F.cross_entropy(logits.float(), targets, reduction="none")  # float32 also where logits are bfloat16
        for i, values in zip(group, logps.split([len(responses[i]) for i in group])):
            found[i] = values
    mask = pad_sequence([torch.ones(len(response), dtype=torch.bool) for response in responses], batch_first=True)
    return pad_sequence(found, batch_first=True), mask.to(device)

response_logps.positions = 0  # computed so far, for the token counts in summary.json

@torch.no_grad()
def share_prompts(model, pairs):
    """Turn prompt sharing on, unless it changes the log-probs of the longest pair, as it does where attention is more
    than a mask can say (sliding windows, recurrent layers). -> (largest change in nats, seconds per position)."""
    responses = [f"{side}_ids" for side in SIDES]
    pair = max(pairs, key=lambda pair: max(pair[name].size for name in responses) + max(
        ids.size for name, ids in pair.items() if name.endswith("_ids") and name not in responses))
    prompts, responses = [pair["prompt_ids"].tolist()] * 2, columns([pair], "ids")
    if "chosen_better_ids" in pair:
        prompts, responses = prompts + columns([pair], "better_ids"), responses * 2
    start, before = time.perf_counter(), response_logps.positions
    model.shares_prompts = False
    separate, _ = response_logps(model, prompts, responses)
    model.shares_prompts = True
    try:
        error = (response_logps(model, prompts, responses)[0] - separate).abs().max().item()
    except (TypeError, ValueError, RuntimeError, IndexError):  # a model that takes no such mask
        error = math.inf
    model.shares_prompts = error < 1e-3
    return error, (time.perf_counter() - start) / (response_logps.positions - before)


# ---------------------------------------------------------------------------------------------------- 6 annotate
PACK = 1024  # tokens in one forward pass: enough to keep a processor busy, and memory grows with it

def packs(pairs, size, limit=PACK):
    """Cut pairs into runs of at most size pairs and about limit tokens: what one forward pass takes."""
    pack, tokens = [], 0
    for pair in pairs:
        length = len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        if pack and (len(pack) == size or tokens + length > limit):
            yield pack
            pack, tokens = [], 0
        pack.append(pair)
        tokens += length
    if pack:
        yield pack

def columns(pairs, name):
    """The chosen_* column of all pairs, then the rejected_* column, as lists."""
    return [pair[f"{side}_{name}"].tolist() for side in SIDES for pair in pairs]

def padded(pairs, name, device):
    """The same as one float32 tensor (2B, T), chosen rows first, zeros in the padding."""
    return pad_sequence([torch.tensor(row) for row in columns(pairs, name)], batch_first=True).to(device)

def set_columns(pairs, name, values):
    """Write (2B, T) values, chosen rows first, into the pairs without their padding."""
    values = iter(values.float().cpu().numpy())
    for side in SIDES:
        for pair in pairs:
            pair[f"{side}_{name}"] = next(values)[:len(pair[f"{side}_ids"])].copy()

def plain_logps(model, pairs, dtype):
    """-> (logps, mask), each (2B, T), of both responses after the plain prompt, in the precision of the training."""
    # weights stay float32, so that an update of 5e-7 is not rounded away; cached casts would be a second copy of them
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False):
        return response_logps(model, [pair["prompt_ids"].tolist() for pair in pairs] * 2, columns(pairs, "ids"))

@torch.no_grad()
def annotate(model, tokenizer, pairs, style="answer", reward_model=None, batch_size=8, max_length=1024, dtype="fp32"):
    """-> the pairs, encoded, with chosen_ and rejected_ ref_logps and token_rewards: float32 arrays of (T,).

    model: the untrained policy. style: a contrastive pair (see contrastive_prompts), or None for token rewards of 0.
    reward_model: π_eval, if it is not the reference itself. Reference log-probs are computed in dtype as training
    does, so that π = π_ref at its start; token rewards in float32, because σ of a bfloat16 error is an error."""
    if pairs and "prompt_ids" not in pairs[0]:
        pairs, dropped = encode(tokenizer, pairs, max_length, style)
        if dropped:
            print(f"annotate: {dropped}")
    pairs, scorer = [dict(pair) for pair in pairs], reward_model or model
    for each in (model, scorer):
        if not hasattr(each, "shares_prompts") and pairs:  # a command line has checked on all its pairs
            share_prompts(each, pairs)
    with bar(total=len(pairs), desc="annotate", unit=" pairs") as done:
        for pack in packs(pairs, batch_size, PACK // 3):  # the contrastive prompts are about twice as much again
            ref_logps, mask = plain_logps(model, pack, dtype)
            rewards = torch.zeros_like(ref_logps)
            if style:
                prompts = columns(pack, "better_ids") + columns(pack, "worse_ids")
                logps, _ = response_logps(scorer, prompts, columns(pack, "ids") * 2)
                rewards = token_rewards(*logps.chunk(2), mask)
            set_columns(pack, "ref_logps", ref_logps)
            set_columns(pack, "token_rewards", rewards)
            done.update(len(pack))
    return pairs

def replace_rewards(model, pairs, count, s):
    """-> pairs with the token rewards of a variant of the paper's, "sft" or "dpo", or of a control, "shuffled" within
    each response or with the prompts "swapped". "dpo" trains on the first count pairs, and puts the model back."""
    pairs, rng = [dict(pair) for pair in pairs], np.random.default_rng(s.seed)
    if s.token_rewards == "dpo":
        start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        train(model, pairs[:count], settle(s, model, algorithm="dpo", alpha=0.0))
        with torch.no_grad():
            for pack in packs(pairs, s.batch_size):
                logps, mask = plain_logps(model, pack, s.dtype)
                set_columns(pack, "token_rewards", token_rewards(logps, padded(pack, "ref_logps", logps.device), mask))
        model.load_state_dict(start)
        return pairs
    for pair in pairs:
        for side in SIDES:
            hat = pair[f"{side}_token_rewards"]
            pair[f"{side}_token_rewards"] = {"contrastive": hat, "sft": np.full_like(hat, side == "chosen"),
                                             "shuffled": rng.permutation(hat), "swapped": -hat}[s.token_rewards]
    return pairs

def pair_accuracy(pairs):
    """-> (share of pairs whose chosen response has the higher mean r̂, ties ½; low and high of its 95 % interval)."""
    gaps = np.array([pair["chosen_token_rewards"].mean() - pair["rejected_token_rewards"].mean() for pair in pairs])
    p, n, z = np.mean((gaps > 0) + 0.5 * (gaps == 0)), len(gaps), 1.96  # the interval is Wilson's
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ------------------------------------------------------------------------------------------------------- 7 train
METRICS = ("loss", "margin", "accuracy", "weight", "agreement", "chosen_logps", "rejected_logps")

def losses(model, pairs, s):
    """-> (loss (B,), METRICS of each pair (B, 7), learned credit log π − log π_ref (2B, T), chosen rows first)."""
    logps, mask = plain_logps(model, pairs, s.dtype)
    ref_logps, hats = (padded(pairs, name, logps.device) for name in ("ref_logps", "token_rewards"))
    # an algorithm is its implicit rewards: all that follows is the same
    rewards = (dpo_rewards(logps, ref_logps, mask, s.beta) if s.algorithm == "dpo"
               else simpo_rewards(logps, mask, s.beta))
    loss, margin = treg_loss(*rewards.chunk(2), *hats.chunk(2), s.alpha, s.gamma, s.weighting)
    accuracy = 0.5 + 0.5 * torch.sign(margin + s.gamma)  # is the chosen response's reward the higher? a tie counts ½
    agreement = sum((rewards * hats).sum(-1).chunk(2))
    metrics = loss, margin, accuracy, torch.sigmoid(-margin), agreement, *logps.sum(-1).chunk(2)  # as in METRICS
    return loss, torch.stack(metrics, 1).detach(), logps.detach() - ref_logps

def schedule(step, total):
    """Share of the learning rate: 10 % linear warm-up, then half a cosine down to 0, as the paper has it."""
    warmup = max(1, round(0.1 * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))

def train(model, pairs, s, out=None):
    """Train model in place on annotated pairs. With a folder out: metrics.jsonl, checkpoints, and going on from one.
    A step is the mean over batch_size × accumulate pairs, in any number of passes. -> a dict of metrics a step."""
    per_step = s.batch_size * s.accumulate
    per_epoch = math.ceil(len(pairs) / per_step)
    total = s.steps or s.epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0, fused=True)
    history = resume(out, model, optimizer) if out else []
    first = len(history)
    steps = bar(range(first, total), desc="train", unit=" steps", initial=first, total=total)
    with stop_requests() as asked, steps:
        for step in steps:
            epoch, place = divmod(step, per_epoch)
            if step == first or place == 0:  # a function of seed and epoch: a resumed run needs no random state
                order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(s.seed + epoch)).tolist()
            batch = [pairs[i] for i in order[place * per_step:(place + 1) * per_step]]
            sums = 0
            for pack in packs(batch, s.batch_size):
                loss, metrics, _ = losses(model, pack, s)
                (loss.sum() / len(batch)).backward()
                sums += metrics.sum(0)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            row = {"step": step + 1, **dict(zip(METRICS, (sums / len(batch)).tolist())), "grad_norm": norm,
                   "lr": s.lr * schedule(step, total)}
            need(math.isfinite(row["loss"] + norm), f"step {step + 1}: loss {row['loss']}, gradient norm {norm}; lower "
                 "--lr, or look at " + ", ".join(pair["where"] for pair in batch))
            optimizer.param_groups[0]["lr"] = row["lr"]
            optimizer.step()
            optimizer.zero_grad()
            history.append(row)
            steps.set_postfix(loss=f"{row['loss']:.4f}", margin=f"{row['margin']:.3f}", refresh=False)
            stop = bool(asked)  # read once: a request that comes after this line waits for the next step
            if out:
                with saving(out / "metrics.jsonl"), open(out / "metrics.jsonl", "a") as file:
                    file.write(as_lines([row]))
            if out and (stop or (step + 1) % s.save_every == 0 or step + 1 == total):
                write(out / "checkpoint.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                              "history": history})
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {total}; go on by --resume --out {s.out}")
    return history

@contextlib.contextmanager
def stop_requests():
    """Within it Ctrl-C and SIGTERM only fill the list that it yields, so that no step is cut in two."""
    asked, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

def saving(path):
    return explain(f"{path}: not saved", "make room, then --resume: nothing is lost")

def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)

def write(path, content):
    """Write a text, or what torch.save takes, so that at any instant path is whole, the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with saving(path):
            temporary.write_text(content, "utf-8") if isinstance(content, str) else torch.save(content, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def read(path, device="cpu"):
    """-> what write() gave to torch.save. torch.load alone does not see that a bit of it has changed."""
    if zipfile.ZipFile(path).testzip():
        raise ValueError("a checksum differs")
    return torch.load(path, map_location=device, weights_only=True, mmap=True)

def resume(out, model, optimizer):
    """Load out's checkpoint, if it has one, and let metrics.jsonl end where it does. -> the metrics of each step."""
    path, history = out / "checkpoint.pt", []
    if path.exists():
        with explain(f"{path}: damaged", "without it --resume starts anew"):
            state = read(path, model.device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]
    write(out / "metrics.jsonl", as_lines(history))
    return history


# ------------------------------------------------------------------------------------------- 8 evaluate and show
def credit_auroc(scores, is_good):
    """Probability that a good token outscores a bad one, ties ½; nan with one class only. Two arrays -> float."""
    scores, is_good = np.asarray(scores, dtype=float), np.asarray(is_good, dtype=bool)
    good, bad = scores[is_good], np.sort(scores[~is_good])
    if not len(good) or not len(bad):
        return math.nan
    return float((np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")).mean() / 2 / len(bad))

def auroc(pairs, name):
    """Credit AUROC of the *_name columns, end token left out: (mean within a response, pooled over all tokens)."""
    rows = [(pair[f"{side}_{name}"][:-1], pair[f"{side}_good"])  # [:-1]: the end token is in no error span
            for pair in pairs for side in SIDES if f"{side}_good" in pair]
    if not rows:
        return math.nan, math.nan
    within = [value for value in (credit_auroc(*row) for row in rows) if not math.isnan(value)]
    return (float(np.mean(within)) if within else math.nan,
            credit_auroc(*(np.concatenate(column) for column in zip(*rows))))

def judge(pairs):
    """-> errors(text, keywords) for data whose keywords stand for slots: how many of the keywords text lacks, and at
    least 1 if its shape, the text with its slots left open, is none of the data's responses'. None without keywords."""
    if not all("keywords" in pair for pair in pairs):
        return None
    slots = {word: f"<{i}>" for pair in pairs for i, word in enumerate(pair["keywords"])}

    def shape(text):
        return re.sub(r"\w+", lambda word: slots.get(word[0], word[0]), text.strip())

    shapes = {shape(pair[side]) for pair in pairs for side in SIDES}

    def errors(text, keywords):
        missing = len(set(keywords) - set(re.findall(r"\w+", text)))
        return max(missing, shape(text) not in shapes)
    return errors

@torch.no_grad()
def sample(model, tokenizer, pairs, seed, more=8):
    """-> one response a pair, drawn from the model as it is, at most `more` tokens longer than the longest chosen."""
    end, texts, most = end_token(tokenizer), [], max(len(pair["chosen_ids"]) for pair in pairs) + more
    torch.manual_seed(seed)
    for start in bar(range(0, len(pairs), 128), desc="sample", unit=" batches"):
        prompts = [torch.tensor(pair["prompt_ids"].tolist()) for pair in pairs[start:start + 128]]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids, real = pad(prompts, padding_value=end), pad([torch.ones_like(prompt) for prompt in prompts])
        length = ids.shape[1]
        room = min(most, getattr(model.config, "max_position_embeddings", most + length) - length)
        new = model.generate(input_ids=ids.to(model.device), attention_mask=real.to(model.device), do_sample=True,
                             max_new_tokens=max(1, room), top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
                             eos_token_id=end, pad_token_id=end)[:, length:].tolist()
        texts += [tokenizer.decode(row[:row.index(end)] if end in row else row) for row in new]
    return texts

@torch.no_grad()
def evaluate(model, tokenizer, pairs, s, errors=None):
    """-> (metrics of annotated pairs, three samples, the share of perfect responses or else accuracy of each pair).
    Writes the learned credit to the pairs."""
    if not pairs:
        return {}, [], []
    rows = []
    for pack in packs(pairs, s.batch_size):
        _, metrics, credit = losses(model, pack, s)
        rows.append(metrics.cpu())
        set_columns(pack, "credit", credit)
    rows = dict(zip(METRICS, torch.cat(rows).double().numpy().T))
    result, each = {name: float(rows[name].mean()) for name in ("accuracy", "margin")}, rows["accuracy"]
    result["credit_auroc"], result["credit_auroc_pooled"] = auroc(pairs, "credit")
    result["token_reward_auroc"], result["token_reward_auroc_pooled"] = auroc(pairs, "token_rewards")
    drawn = 4 if errors else 1  # responses to each prompt: for the judge, or one to look at
    shown = [pair for pair in (pairs if errors else pairs[:3]) for _ in range(drawn)]
    texts = sample(model, tokenizer, shown, s.seed, 8 if errors else 64)
    if errors:
        counts = np.array([errors(text, pair["keywords"]) for text, pair in zip(texts, shown)]).reshape(-1, drawn)
        each = (counts == 0).mean(1)
        result["errors_per_response"], result["perfect_responses"] = float(counts.mean()), float(each.mean())
    result = {name: None if math.isnan(value) else value for name, value in result.items()}  # JSON has no NaN
    return result, texts[::drawn][:3], each.tolist()

def show(before, after, samples, pair, tokenizer):
    """Print the metrics and sampled responses before and after, and one pair with its tokens marked by reward."""
    print(f"\n{'':28s}before   after")
    for name, value in after.items():
        if value is not None:
            old = "–" if before[name] is None else f"{before[name]:.3f}"
            print(f"{name.replace('_', ' '):26s}{old:>8s}{value:8.3f}")
    for sampled, old, new in samples:
        print("\nprompt ", one_line(as_messages(sampled["prompt"])[-1]["content"]))
        print(f"before  {one_line(old)}\nafter   {one_line(new)}")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\ntoken rewards " + ("(green good, red bad)" if colour else "([+good], [-bad]: more than 0.1 from 0)"))
    for side in SIDES:
        marked = f"{side:10s}"
        for token, reward in zip(pair[f"{side}_ids"].tolist(), pair[f"{side}_token_rewards"].tolist()):
            token = tokenizer.decode([token]).replace("\n", "⏎")
            pale = 235 - int(min(abs(reward) / 0.4, 1) * 150)
            red, green = (pale, 235) if reward > 0 else (235, pale)
            marked += (f"\033[30;48;2;{red};{green};{pale}m{token}\033[0m" if colour else
                       f"[{'+' if reward > 0 else '-'}{token}]" if abs(reward) > 0.1 else token)
        print(marked)

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>T-REG</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 16px/1.6 sans-serif; max-width: 72em; margin: 2em auto;
padding: 0 1em }} pre {{ overflow-x: auto }} svg {{ margin: 0 1em 1em 0 }} polyline {{ fill: none; stroke-width: 1.5 }}
text {{ fill: currentColor; font-size: 12px }} .bad {{ text-decoration: underline wavy }}
td span {{ white-space: pre-wrap }}
th {{ text-align: left; font-weight: normal; white-space: nowrap; vertical-align: top; padding-right: 1em }}
</style><h1>T-REG</h1>{}</html>"""

def report(path, curves, table, pairs, tokenizer, layers):
    """Write one self-contained page: learning curves {name: history}, the table, and the tokens of both responses of
    pairs, coloured by each of layers {label: column}, labelled errors underlined, values on hover."""
    hues = {name: f"hsl({360 * i // len(curves)} 65% 50%)" for i, name in enumerate(curves)}
    names = " ".join(f'<b style="color:{hue}">{html.escape(name)}</b>' for name, hue in hues.items())
    parts = [f"<pre>{html.escape(table)}</pre><p>{names}</p>"]
    for metric in ("loss", "margin", "accuracy", "chosen_logps"):
        values = [row[metric] for history in curves.values() for row in history] or [0.0]
        low, span, lines = min(values), max(values) - min(values) or 1.0, ""
        for name, history in curves.items():
            points = " ".join(f"{280 * i / len(history):.1f},{115 - 110 * (row[metric] - low) / span:.1f}"
                              for i, row in enumerate(history))
            lines += f'<polyline style="stroke:{hues[name]}" points="{points}"/>'
        parts.append(f'<svg width="290" height="140">{lines}'
                     f'<text y="134">{metric}: {low:.3g} to {low + span:.3g}</text></svg>')
    scales = {column: max(1e-9, *(np.abs(pair[f"{side}_{column}"]).max() for pair in pairs for side in SIDES))
              for column in layers.values() if pairs}
    for pair in pairs:
        parts.append(f"<h3>{html.escape(as_messages(pair['prompt'])[-1]['content'])}</h3><table>")
        for side, (label, column) in itertools.product(SIDES, layers.items()):
            parts.append(f"<tr><th>{side}: {html.escape(label)}</th><td>")
            ids, values, good = (pair.get(f"{side}_{name}", ()) for name in ("ids", column, "good"))
            for token, value, fine in itertools.zip_longest(ids, values, good, fillvalue=True):  # the end token is fine
                colour = f"hsl({140 if value > 0 else 0} 80% 45% / {0.8 * abs(value) / scales[column]:.2f})"
                parts.append(f'<span title="{value:+.3f}" style="background:{colour}"{"" if fine else " class=bad"}>'
                             f"{html.escape(tokenizer.decode([token]))}</span>")
            parts.append("</td></tr>")
        parts.append("</table>")
    write(path, PAGE.format("".join(parts)))


# ----------------------------------------------------------------------------------------------- 9 the tiny model
WARM_ROWS, WARM_LR = 8, 3e-3

def make_tiny(pairs, seed, steps=2000):
    """-> (model, tokenizer): a small GPT-2 with random weights, warmed up on these pairs alone.

    A stand-in for a pre-trained model that follows instructions: it learns to answer a prompt with something like
    either response, a better prompt with something like the chosen, a worse one with something like the rejected.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (text for pair in pairs for style in PROMPTS for side in SIDES
             for prompt in contrastive_prompts(as_messages(pair["prompt"]), pair[side], style)
             for text in (f"User:\n{prompt[-1]['content']}\n\nAssistant:\n", pair[side]))
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = PLAIN_TEMPLATE
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, n_positions=256, vocab_size=len(tokenizer), initializer_range=0.1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
    model.shares_prompts, rows = True, []
    for style in PROMPTS:
        for pair in encode(tokenizer, pairs, 256, style)[0]:
            # a revision improves on the rejected response or spoils the chosen one: it never repeats what it is shown
            for prompt, side in zip(("prompt", "prompt", "rejected_better", "chosen_worse"), SIDES * 2):
                rows.append((pair[f"{prompt}_ids"].tolist(), pair[f"{side}_ids"].tolist()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_LR, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in bar(range(steps), desc="warm up", unit=" steps"):
        some = torch.randint(len(rows), (WARM_ROWS,), generator=generator)
        logps, mask = response_logps(model, *zip(*[rows[i] for i in some]))
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = WARM_LR * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


# ------------------------------------------------------------------------------------------------ 10 command line
DEFAULTS = {"dpo": {"beta": 0.1, "gamma": 0.0}, "simpo": {"beta": 2.5, "gamma": 1.0}}
# the tiny model's, tuned by --lrs and --betas (α = 0) on the validation split
TINY = {"dpo": {"lr": 4e-4, "beta": 1.0}, "simpo": {"lr": 2e-4, "beta": 1.0}}

def default_lr(parameters):
    """5e-7, published for 8e9 parameters, grows as the size falls, by its square root: 4e-6 at 135e6, 1e-4 at 2e5."""
    return float(f"{5e-7 * math.sqrt(8e9 / parameters):.1e}")

def settle(s, model, **changes):
    """-> a copy of the settings with these changes, and with the learning rate, β and γ that were not given."""
    new = argparse.Namespace(**{**vars(s), **changes})
    if new.algorithm != s.algorithm:  # what was given or settled is on the other algorithm's scale
        vars(new).update({"lr": None, "beta": None, "gamma": None, **changes})
    defaults = {"lr": default_lr(model.num_parameters()), **DEFAULTS[new.algorithm],
                **({} if s.model else TINY[new.algorithm])}
    vars(new).update({name: value for name, value in defaults.items() if getattr(new, name) is None})
    return new

def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " * (kind is int)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")
    return parse

def parse(argv):
    parser = argparse.ArgumentParser(prog="treg.py", description="T-REG. Without arguments: make a tiny model, train "
                                     "it, show what changed. Defaults are in [].")
    data, whole = str(Path(__file__).with_name("tiny_data.jsonl")), number(int, 1)
    share, positive = number(float, 0), number(float, 1e-12)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    held = lambda text: (number(float, 0, 0.99) if "." in text else number(int, 0))(text)  # noqa: E731
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", help="folder or hub name of a causal language model [the tiny model]")
    add("--warm-steps", type=whole, default=2000, help="warm-up of the tiny model [%(default)s]")
    add("--data", default=data, help=".json, .jsonl, .csv or .parquet file, or hub data set [tiny_data.jsonl]")
    add("--max-pairs", type=whole, help="train on at most this many pairs")
    add("--on-policy", type=number(int, 2), metavar="K", help="train on best and worst, by the judge, of K "
        "responses that the untrained model samples to each prompt; for data with keywords")
    add("--split", default="test", help="split of the data to evaluate on [%(default)s]")
    add("--holdout", type=held, default=0.1, help="number or share of pairs to evaluate on without it [%(default)s]")
    add("--max-length", type=number(int, 8), default=1024, help="longer pairs are dropped; in tokens [%(default)s]")
    add = parser.add_argument_group("the loss").add_argument
    add("--algorithm", choices=tuple(DEFAULTS), default="dpo", help="the preference loss [%(default)s]")
    add("--alpha", type=share, default=0.25, help="strength of the regulariser; 0: plain DPO or SimPO [%(default)s]")
    add("--beta", type=positive, help="reward scale [dpo 0.1, simpo 2.5; the tiny model 1]")
    add("--gamma", type=share, help="target margin [dpo 0, simpo 1]")
    add("--weighting", choices=("sequence", "static"), default="sequence", help="the regulariser's weight: that of the "
        "preference loss's own gradient, or the constant 1/2 [%(default)s]")
    add = parser.add_argument_group("the token rewards").add_argument
    add("--token-rewards", choices=("contrastive", "sft", "dpo", "shuffled", "swapped"), default="contrastive",
        help="by contrastive prompts; 1 on chosen, 0 on rejected; by a model trained with DPO; or, as controls, "
        "shuffled in a response, prompts swapped [%(default)s]")
    add("--prompts", default="auto", help="answer, revise, your .json file, or auto: the better of the two [auto]")
    add("--check-prompts", action="store_true", help="only measure how well the prompts tell chosen from rejected")
    add("--reward-model", help="model with the same tokenizer that writes the token rewards [--model, untrained]")
    add = parser.add_argument_group("the training").add_argument
    add("--lr", type=positive, help="peak learning rate [5e-7 x sqrt(8e9 / parameters); the tiny model's is tuned]")
    add("--epochs", type=whole, help="passes over the pairs [1; the tiny model 3]")
    add("--steps", type=whole, help="optimiser steps, in place of epochs")
    add("--batch-size", type=whole, default=8, help="pairs in a batch [%(default)s]")
    add("--accumulate", type=whole, default=1, help="batches in an optimiser step [%(default)s]")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of all random numbers [%(default)s]")
    add = parser.add_argument_group("the comparison").add_argument
    add("--compare", action="store_true", help="train the paper's table and two controls from one "
        "reference, and print it; --lr, --beta and --gamma are for the rows of --algorithm")
    add("--seeds", type=whole, default=5, help="runs of each row, from --seed on [%(default)s]")
    add("--alphas", type=share, nargs="+", default=[], help="also a row for each of these")
    add("--lrs", type=positive, nargs="+", default=[], help="instead, the plain loss at each of these learning rates")
    add("--betas", type=positive, nargs="+", default=[], help="and at each of these reward scales")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=devices, default=devices[0], help="where to compute [cuda if there is one]")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of matrix products; other work fp32 [%(default)s]")
    add("--out", help="new folder for the model, metrics.jsonl and summary.json [runs/<time>]")
    add("--save-every", type=whole, default=200, help="steps between checkpoints [%(default)s]")
    add("--resume", action="store_true", help="go on with the run in --out where it was stopped")
    s = parser.parse_args(argv)
    if s.split == "train":
        parser.error("argument --split: the pairs that are trained on are no test")
    if s.resume and not s.out:
        parser.error("argument --resume: needs --out, the folder of the run to go on with")
    for name, value in vars(s).items():
        if value == "":  # an unset variable of the shell's
            parser.error(f"argument --{name.replace('_', '-')}: is empty")
    s.epochs, s.styles = s.epochs or (1 if s.model else 3), read_prompts(s.prompts)
    return s

def read_prompts(name):
    """--prompts -> {name: templates}, of all PROMPTS for "auto", or of one, perhaps from a .json file."""
    if name == "auto" or name in PROMPTS:
        return PROMPTS if name == "auto" else {name: PROMPTS[name]}
    with explain(f"--prompts {name}: must be auto, {', '.join(PROMPTS)} or a .json file", "it needs better and worse"):
        style = json.loads(Path(name).read_bytes())
        style = {side: read_text(style[side], side, f"--prompts {name}") for side in ("better", "worse")}
    for side in style:
        need({"prompt"} <= {*re.findall(r"\{(\w*)\}", style[side])} <= {"prompt", "response"},
             f"--prompts {name}: {side} needs {{prompt}}, may have {{response}}, and no other field")
    need(style["better"] != style["worse"], f"--prompts {name}: better and worse must be different")
    return {name: style}

def load_model(name, flag, device, checkpointing=False):
    """-> (model with float32 weights and no dropout, tokenizer with a chat template), from a folder or the hub."""
    with explain(f"{flag} {name}: cannot be loaded", "name a folder that save_pretrained wrote, model and tokenizer, "
                 "or a hub name where the hub can be reached"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unset, it would ask
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(  # float32: see plain_logps
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        model.to(device)
        end, rows = end_token(tokenizer), model.get_input_embeddings().weight.shape[0]
    missing = ", ".join(sorted(loaded["missing_keys"]))  # transformers would fill them with random numbers
    need(not missing, f"{flag} {name}: weights missing: {missing}")
    need(tokenizer("a", add_special_tokens=False)["input_ids"], f"{flag} {name}: no tokenizer")
    need(end is not None, f"{flag} {name}: no end token: set the tokenizer's eos_token")
    need(len(tokenizer) <= rows, f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, its model {rows}")
    if checkpointing:  # not by transformers' switch, which wants training mode: dropout, and samples without a cache
        for module in model.modules():
            if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return model, tokenizer

def load_data(s):
    """-> {"train": pairs, s.split: pairs for evaluation}: that split if the data has it, else --holdout of all."""
    pairs, test = load_pairs(s.data), load_pairs(s.data, s.split)
    need(test or s.split == "test", f"--split {s.split}: {s.data} has no such split")
    if not test:
        count = int(s.holdout * len(pairs)) if isinstance(s.holdout, float) else s.holdout
        order = np.random.default_rng(0).permutation(len(pairs))  # not of the seed: seeds share their test
        test, pairs = ([pairs[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    need(pairs, f"{s.data}: --holdout {s.holdout} and other splits leave no pair to train on")
    return {"train": pairs[:s.max_pairs], s.split: test}

def load_models(s):
    """-> (policy, tokenizer, reward model or None); completes the settings that depend on the policy."""
    for flag, name in ("--model", s.model), ("--reward-model", s.reward_model):
        need(not name or not Path(name).exists() and name[0] not in "./~" or Path(name, "config.json").is_file(),
             f"{flag} {name}: is no model folder; it must be there and hold a config.json")
    scorer, other = load_model(s.reward_model, "--reward-model", s.device) if s.reward_model else (None, None)
    if s.model:
        model, tokenizer = load_model(s.model, "--model", s.device, s.gradient_checkpointing)
    else:
        warm = load_pairs(s.data, "warmup")
        need(warm, f"--data {s.data}: has no warmup split to make the tiny model from; name a --model")
        model, tokenizer = make_tiny(warm, s.seed, s.warm_steps)
        model.to(s.device)
    need(not scorer or other.get_vocab() == tokenizer.get_vocab(),
         f"--reward-model {s.reward_model}: has another tokenizer than --model; name another")
    size = model.num_parameters()
    vars(s).update(vars(settle(s, model)))
    print(f"model: {s.model or 'tiny'}, {size / 1e6:.1f} million parameters, learning rate {s.lr}, on {s.device}")
    if s.lr > 1e-5 and size > 1e8:
        print(f"warning: --lr {s.lr} is one for adapters; to train all of this model, try {default_lr(size)}")
    for each in (model, scorer or model):
        config = each.config.get_text_config()
        s.max_length = min(s.max_length, getattr(config, "max_position_embeddings", s.max_length))
    return model, tokenizer, scorer

def choose_prompts(model, tokenizer, pairs, s, scorer):
    """Measure the styles that --prompts names on up to 200 pairs, and print how they do. -> the best style."""
    results = []
    for name, style in s.styles.items():
        some, dropped = encode(tokenizer, pairs[:200], s.max_length, style)
        if not some:
            print(f"prompts {name}: no pair is left ({dropped})")
            continue
        share, low, high = pair_accuracy(annotate(model, tokenizer, some, style, scorer, s.batch_size))
        print(f"prompts {name}: pair accuracy {share:.3f} (95 % interval {low:.3f} to {high:.3f}, {len(some)} pairs)")
        results.append((share, low, name, style))
    need(results, f"{s.data}: no pair is left to train on ({dropped})")
    share, low, name, style = max(results, key=lambda result: result[0])
    if low <= 0.5:
        print(f"warning: by the prompts {name} this model tells chosen from rejected no better than chance, and the "
              "regulariser would push at random; write prompts of your own (--prompts FILE.json) or use --alpha 0")
    return style

def pick(texts, keywords, errors):
    """-> (best, worst) of the texts by the judge, the first of equals; None if all are equally good."""
    texts = sorted(texts, key=lambda text: errors(text, keywords))
    return (texts[0], texts[-1]) if errors(texts[0], keywords) < errors(texts[-1], keywords) else None

def on_policy(model, tokenizer, pairs, s, errors):
    """The paper's data: -> for each prompt the best and the worst of K responses sampled from the untrained model."""
    pairs, _ = encode(tokenizer, pairs, s.max_length)
    texts = sample(model, tokenizer, [pair for pair in pairs for _ in range(s.on_policy)], s.seed)
    picked = [pick(texts[i * s.on_policy:][:s.on_policy], pair["keywords"], errors) for i, pair in enumerate(pairs)]
    fresh = [{name: pair[name] for name in ("prompt", "keywords", "where")} | dict(zip(SIDES, pick))
             for pair, pick in zip(pairs, picked) if pick]
    wrong = [np.mean([errors(pair[side], pair["keywords"]) for pair in fresh] or [0]) for side in SIDES]
    print("on-policy: {} pairs, {:.2f} errors in chosen and {:.2f} in rejected; dropped: {} prompts with responses "
          "all equally good".format(len(fresh), *wrong, len(pairs) - len(fresh)))
    return fresh

def checksum(arrays):
    """CRC-32 of arrays: are data and weights still those of the run that is to go on?"""
    return functools.reduce(lambda total, array: zlib.crc32(np.ascontiguousarray(array), total), arrays, 0)

def keep_annotation(path, pairs, make):
    """-> make()'s annotated pairs, kept in path for a resumed run, whose settings are the same or it is refused."""
    names = [(f"{side}_{name}", f"{side}_ids") for side in SIDES for name in ("ref_logps", "token_rewards")]
    if not path.exists():
        pairs = make()
        flat = {name: torch.from_numpy(np.concatenate([pair[name] for pair in pairs])) for name, _ in names}
        write(path, flat)
        return pairs
    with explain(f"{path}: damaged", "without it --resume makes it again"):
        flat = read(path)
        for name, ids in names:
            for pair, value in zip(pairs, flat[name].split([len(pair[ids]) for pair in pairs])):
                pair[name] = value.numpy()
        return pairs

def save_settings(out, settings):
    """Keep the settings of a new run; refuse to resume a run that had others, naming what differs."""
    path = out / "settings.json"
    if path.exists():
        with explain(f"{path}: damaged", "name another --out"):
            saved = json.loads(path.read_bytes())
            changed = [f"{name} was {saved.get(name)} and is {value}" for name, value in settings.items()
                       if saved.get(name) != value and name not in ("out", "resume", "save_every")]
        need(not changed, f"--resume: the run in {out} is another one: {'; '.join(changed)}")
    out.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings, indent=2) + "\n")

@contextlib.contextmanager
def measure(name, device, summary):
    """Write a phase's seconds, CPU seconds, computed positions and peak memory (on a CPU: so far) into summary."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, cpu, tokens = time.perf_counter(), time.process_time(), response_logps.positions
    yield
    if device == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    summary |= {f"{name}_seconds": time.perf_counter() - seconds, f"{name}_cpu_seconds": time.process_time() - cpu,
                f"{name}_tokens": response_logps.positions - tokens, f"{name}_peak_memory_bytes": memory,
                "peak_memory_bytes": memory}

def prepare(s, summary, out=None):
    """-> (model, tokenizer, judge or None, annotated pairs for training, the same for evaluation), with a folder out
    also kept there; or, after --check-prompts, None."""
    texts = load_data(s)
    model, tokenizer, scorer = load_models(s)
    errors = judge(sum(texts.values(), []))
    if s.on_policy:
        need(errors, f"--on-policy: {s.data} has no keywords for a judge to pick by")
        texts["train"] = on_policy(model, tokenizer, texts["train"], s, errors)
    style = next(iter(s.styles.values()))
    if not s.compare and not s.check_prompts and (not s.alpha or s.token_rewards in ("sft", "dpo")):
        style = None
    elif s.check_prompts or len(s.styles) > 1:
        style = choose_prompts(model, tokenizer, texts["train"], s, scorer)
    if s.check_prompts:
        return None
    data = {}
    for split, pairs in texts.items():
        data[split], dropped = encode(tokenizer, pairs, s.max_length, style)
        need(data[split] or split != "train", f"{s.data}: no pair is left to train on ({dropped})")
        print(f"{split}: {len(data[split])} pairs" + f" ({dropped})" * bool(dropped))
    pairs, count = data["train"] + data[s.split], len(data["train"])
    for each in filter(None, (scorer, model)):
        error, seconds = share_prompts(each, pairs)
    if not model.shares_prompts:
        print(f"note: sharing prompts changes log-probs by {error:.1g}, so every response is computed alone")
    epochs = s.steps * s.batch_size * s.accumulate / count if s.steps else s.epochs
    every = sum(pair[name].size for pair in pairs for name in pair if name.endswith("_ids"))
    plain = sum(pair[name].size for pair in data["train"] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    print(f"time: about {seconds * (every + 3 * epochs * plain) / 60:.1f} minutes")  # 3: forward, and twice backward
    if out:
        state = {"torch": torch.__version__, "transformers": transformers.__version__, "style": style, "pairs":
                 checksum(pair[name] for pair in pairs for name in sorted(pair) if name.endswith("_ids"))}
        for name, each in ("weights", model), ("reward_weights", scorer):
            state[name] = checksum(value.cpu().numpy() for value in each.state_dict().values()) if each else None
        save_settings(out, {**vars(s), **state})

    def make():
        done = annotate(model, tokenizer, pairs, style, scorer, s.batch_size, s.max_length, s.dtype)
        return done if s.compare or not s.alpha else replace_rewards(model, done, count, s)

    with measure("annotate", s.device, summary):
        pairs = keep_annotation(out / "annotation.pt", pairs, make) if out else make()
    if style:
        share, low, high = pair_accuracy(pairs[:count])
        print(f"token rewards: pair accuracy {share:.3f} (95 % interval {low:.3f} to {high:.3f})")
    return model, tokenizer, errors, pairs[:count], pairs[count:]

# the paper's table and two controls: name -> what it changes in the settings
ROWS = {
    "DPO": {"algorithm": "dpo", "alpha": 0.0},
    "DPO-REG": {"algorithm": "dpo"},
    "DPO-SFT": {"algorithm": "dpo", "token_rewards": "sft"},
    "static weighting": {"algorithm": "dpo", "weighting": "static"},
    "DPO reward": {"algorithm": "dpo", "token_rewards": "dpo"},
    "shuffled": {"algorithm": "dpo", "token_rewards": "shuffled"},
    "swapped": {"algorithm": "dpo", "token_rewards": "swapped"},
    "SimPO": {"algorithm": "simpo", "alpha": 0.0},
    "SimPO-REG": {"algorithm": "simpo"},
}
BASES = {"dpo": "DPO", "simpo": "SimPO"}  # the row that each algorithm's rows are compared with

def compare(s, out):
    """Train every row from the same reference on the same pairs in the same order, for each seed; print the table."""
    path, base, curves, shown = out / "compare.jsonl", BASES[s.algorithm], {}, {}
    rows = ROWS | {f"{base}-REG, alpha {alpha}": {"algorithm": s.algorithm, "alpha": alpha} for alpha in s.alphas}
    if s.lrs or s.betas:
        rows = {f"{base}, lr {lr or 'default'}, beta {beta or 'default'}":
                {"algorithm": s.algorithm, "alpha": 0.0, "lr": lr, "beta": beta}
                for lr in s.lrs or [s.lr] for beta in s.betas or [s.beta]}
    save_settings(out, {**vars(s), "pairs": zlib.crc32(repr(load_data(s)).encode())})
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["seed"], line["row"]) for line in lines}
    with bar(desc="compare", unit=" rows", initial=len(lines), total=s.seeds * len(rows)) as progress:
        for seed in range(s.seed, s.seed + s.seeds):
            left = [name for name in rows if (seed, name) not in done]
            if not left:
                continue
            one = argparse.Namespace(**{**vars(s), "seed": seed})
            model, tokenizer, errors, pairs, test = prepare(one, {})
            need(test, f"{s.data}: --compare needs pairs to evaluate on; see --split and --holdout")
            start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            for name in left:
                plain = {"weighting": "sequence", "token_rewards": "contrastive"}
                variant, summary = settle(one, model, **{**plain, **rows[name]}), {}
                with measure("train", s.device, summary):
                    annotated = replace_rewards(model, pairs + test, len(pairs), variant)
                    curves[name] = train(model, annotated[:len(pairs)], variant)
                shown[name] = annotated[len(pairs):]
                result, _, each = evaluate(model, tokenizer, shown[name], variant, errors)
                result |= {"row": name, "seed": seed, "base": BASES[variant.algorithm], "each": each}
                lines.append({**result, **summary})
                write(path, as_lines(lines))
                model.load_state_dict(start)
                progress.update()
    text = table(lines)
    print("\n" + text)
    if not shown:  # all was done before: so was the report
        return
    pairs = [{**reg, "chosen_plain": plain["chosen_credit"], "rejected_plain": plain["rejected_credit"]}
             for reg, plain in zip(shown.get("DPO-REG", []), shown.get("DPO", [])[:5])]
    report(out / "report.html", curves, text, pairs, tokenizer,
           {"token reward": "token_rewards", "learned, DPO-REG": "credit", "learned, DPO": "plain"})
    print(f"\n{out}: compare.jsonl and report.html")

def bootstrap(differences, draws=4000):
    """(seeds, prompts) -> (mean, low and high of its 95 % interval), seeds and prompts both drawn with replacement."""
    rng, (seeds, prompts) = np.random.default_rng(0), differences.shape
    means = [differences[rng.integers(seeds, size=seeds)][:, rng.integers(prompts, size=prompts)].mean()
             for _ in range(draws)]
    return differences.mean(), *np.quantile(means, [0.025, 0.975])

def table(lines):
    """The lines of compare.jsonl -> text: mean ± standard error over seeds, and the paired difference to the base."""
    columns = {"perfect_responses": "perfect", "errors_per_response": "errors", "accuracy": "accuracy",
               "credit_auroc": "credit AUROC", "credit_auroc_pooled": "pooled", "token_reward_auroc": "r̂ AUROC"}
    names = [name for name in columns if lines[0].get(name) is not None]
    rows, cells = {}, [["", *(columns[name] for name in names), f"{columns[names[0]]} − base (95 %)", "ahead"]]
    for line in sorted(lines, key=lambda line: line["seed"]):
        rows.setdefault(line["row"], []).append(line)
    for row, of in rows.items():
        cells.append([row])
        for name in names:
            values = np.array([line[name] for line in of])
            error = f" ± {values.std(ddof=1) / math.sqrt(len(of)):.3f}" if len(of) > 1 else ""
            cells[-1].append(f"{values.mean():.3f}{error}")
        base = rows.get(of[0]["base"], of)
        if base is not of and len(base) == len(of):
            differences = np.array([line["each"] for line in of]) - np.array([line["each"] for line in base])
            mean, low, high = bootstrap(differences)
            cells[-1] += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{(differences.mean(1) > 0).sum()} of {len(of)}"]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)

def run(s):
    """One command line, from the files to the trained model."""
    transformers.logging.set_verbosity_error()
    s.out = s.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S")
    out, summary = Path(s.out), {}
    need(next(path for path in (out, *out.absolute().parents) if path.exists()).is_dir(),
         f"--out {out}: is a file, or in one; name a new folder")
    if s.resume and (out / "summary.json").exists():
        return print(f"{out}: this run is finished; its results are in summary.json")
    need(not out.exists() or not any(out.iterdir()) or s.resume and (out / "settings.json").exists(),
         f"--out {out}: is not empty; name a new folder, or one that holds a run and --resume")
    if s.check_prompts:
        return prepare(s, summary)
    if s.compare:
        return compare(s, out)
    model, tokenizer, errors, pairs, test = prepare(s, summary, out)
    before, old, _ = evaluate(model, tokenizer, test, s, errors)
    with measure("train", s.device, summary):
        history = train(model, pairs, s, out)
    after, new, _ = evaluate(model, tokenizer, test, s, errors)
    for phase in ("annotate", "train"):
        seconds, tokens, memory = (summary[f"{phase}_{what}"] for what in ("seconds", "tokens", "peak_memory_bytes"))
        print(f"{phase}: {seconds:.1f} s, {tokens:,} tokens, peak memory {memory / 2**30:.2f} GiB")
    if model.generation_config.temperature not in (None, 1.0) or model.generation_config.top_p not in (None, 1.0):
        model.generation_config.do_sample = True  # transformers 4 would not save the contradiction
    with saving(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    report(out / "report.html", {"this run": history}, "", test[:5], tokenizer,
           {"token reward": "token_rewards", "learned credit": "credit"})
    for name in ("credit_auroc", "credit_auroc_pooled") + ("accuracy", "margin") * (s.algorithm == "dpo"):
        before[name] = None  # a constant by construction: the model is its own reference
    summary |= {"before": before, "after": after, "pairs": len(pairs), "steps": len(history), "settings": vars(s)}
    write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    show(before, after, list(zip(test, old, new)), (test or pairs)[0], tokenizer)
    print(f"\n{out}: the model, metrics.jsonl, settings.json, summary.json and report.html")

def main(argv=None):
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no "–" is no reason to stop
        run(parse(argv))
        return 0
    except torch.OutOfMemoryError:
        error = "out of memory; begin again with --gradient-checkpointing, a smaller --max-length, or --dtype bf16"
    except UserError as problem:
        error = problem
    except OSError as problem:
        error = f"{problem.filename or 'standard output'}: {problem.strerror or problem}"
    except KeyboardInterrupt as stop:
        print("treg.py:", stop if stop.args else "stopped; --resume goes on from what was saved", file=sys.stderr)
        return 130
    print(f"treg.py: error: {error}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
