"""A tour of one prompt through the steps of Warmup-Distill, in the terminal, with the numbers of a finished run.

    python warmup_distill.py --explain PROMPT_ID [the run's --out]

It reads what the run has stored (OUT/args.json, OUT/pairs/*.jsonl) and computes one thing again: the DPO terms of one
pair, as the paper writes them (two rows, [prompt + y+] and [prompt + y-]) and as dpo.py computes them (one row, see
"Exact prefix sharing" there), in float32 whatever the run's dtype: bfloat16's rounding would hide what is to be seen.
Text from models is written as Python's repr: control characters, line ends and marks that turn the direction of writing
are escaped and do nothing to a terminal. Lines are at most 100 columns wide.
"""

import unicodedata
from argparse import Namespace
from pathlib import Path

import torch

import common
import dpo
import models
from common import UserError
from pairs import shared_length

WIDTH = 100
INDENT = 18  # of what stands behind a label
NEAR, ENDS = 5, 2  # tokens of the table that are never folded: so many on each side of t*, and at each end

# ---------------------------------------------------------------------------------------------------------------------
# What the run has stored
# ---------------------------------------------------------------------------------------------------------------------


def read_samples(out, prompt_id):
    """The records of one prompt, in order. Shards are read until it is found; one is in memory at a time."""
    files = sorted((Path(out) / "pairs").glob("*.jsonl"))
    if not files:
        raise UserError("there are no samples to explain", f"in {out}", "run without --explain first")
    seen = set()
    for file in files:
        records = common.read_jsonl(file)
        found = [record for record in records if record["prompt_id"] == prompt_id]
        if found and found[0]["status"] == "too_long":
            what = f"prompt {prompt_id} was skipped: it is over --max-prompt-tokens"
            raise UserError(what, f"in {file}", "explain another one")
        if found and "prompt_ids" not in found[0]:
            what = "the samples were written without their prompts' ids, by an older version"
            raise UserError(what, f"in {file}", "run again with another --out")
        if found:
            return sorted(found, key=lambda record: record["sample_id"])
        seen.update(record["prompt_id"] for record in records)
    what = f"the run has no prompt {prompt_id}, or not yet; it has {spans(sorted(seen))}"
    raise UserError(what, f"in {Path(out) / 'pairs'}", "give one of those")


def spans(numbers):
    """Sorted integers in few words: [0, 1, 2, 7] -> "0 to 2, 7"; no more than eight spans."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    words = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends)]
    return ", ".join(words if len(words) <= 8 else [*words[:4], "...", *words[-3:]])


def pick_sample(records, sample_id):
    """The given sample; by default the first kept one, or else the first with a mismatch, or else the first."""
    if sample_id is not None:
        for record in records:
            if record["sample_id"] == sample_id:
                return record
        ids = spans([record["sample_id"] for record in records])
        raise UserError(f"there is no sample {sample_id}", f"of prompt {records[0]['prompt_id']}", f"give one of {ids}")
    return min(records, key=lambda r: (r["status"] != "kept", r["t_star"] < 0, r["sample_id"]))


def run_arguments(args, out):
    """The run's own arguments where OUT/args.json has them: its samples were made with those, whatever is given now."""
    try:
        return Namespace(**{**vars(args), **common.read_json(Path(out) / "args.json")["args"], "device": args.device})
    except (OSError, ValueError, KeyError, TypeError):
        return args


# ---------------------------------------------------------------------------------------------------------------------
# Text for a terminal
# ---------------------------------------------------------------------------------------------------------------------


def columns(text):
    """How many columns of a terminal a text fills: two for a wide character, none for a combining accent."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def safe(text):
    """repr, with letters of right-to-left scripts escaped, too: a terminal would turn round the line they are in."""
    turns = lambda c: unicodedata.bidirectional(c) in ("R", "AL", "AN")
    return "".join(ascii(c)[1:-1] if turns(c) else c for c in repr(text))


def token_text(tokenizer, token_id):
    """One token as `safe` text; a token that is only part of a character, as the tokenizer spells it."""
    text = tokenizer.decode([token_id])
    return safe(tokenizer.convert_ids_to_tokens(token_id) if "\ufffd" in text or not text else text)


def fit(text, width):
    """A text in exactly `width` columns, cut if it is longer."""
    if columns(text) > width:
        while columns(text) > width - 3:
            text = text[:-1]
        text += "..."
    return text + " " * (width - columns(text))


def show(label, text):
    """Prints a label and a text, which goes on below its own beginning; the middle of a very long one is left out."""
    line, room = "", WIDTH - INDENT
    if len(text) > 8 * room:
        text = f"{text[: 4 * room]} ... {len(text) - 8 * room} characters ... {text[-4 * room :]}"
    for character in text:
        if columns(line + character) > room:
            print(f"{label:{INDENT}}{line}")
            label, line = "", ""
        line += character
    print(f"{label:{INDENT}}{line}")


def heading(text):
    print(f"\n{text}\n{'-' * min(WIDTH, len(text))}")


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3
# ---------------------------------------------------------------------------------------------------------------------


def explain_prompt(records, tokenizer):
    """The prompt, and a line for each of its samples."""
    ids = records[0]["prompt_ids"]
    heading(f"Prompt {records[0]['prompt_id']}: x, {len(ids)} tokens")
    show("text", safe(tokenizer.decode(ids)))
    show("ids", " ".join(map(str, ids if len(ids) <= 48 else [*ids[:24], f"... {len(ids) - 48} more ...", *ids[-24:]])))
    heading("1. sample   y ~ q(. | x); t* is found in step 2, status by steps 2 and 3")
    print(f"{'sample':>6}  {'status':10}{'t*':>5}{'tokens':>8}  response")
    for record in records:
        t = record["t_star"] if record["t_star"] >= 0 else "-"
        start = f"{record['sample_id']:6}  {record['status']:10}{t:>5}{len(record['response_ids']):8}  "
        print(start + fit(safe(tokenizer.decode(record["response_ids"])), WIDTH - len(start)).rstrip())


def explain_check(record, eta, tokenizer):
    """The table of margins, folded where little happens, and the rule with its numbers."""
    ids, log_q, log_p = (record[key] for key in ("response_ids", "student_logprobs", "teacher_logprobs"))
    margins, t_star = [q - p for q, p in zip(log_q, log_p)], record["t_star"]
    heading(f"2. check   sample {record['sample_id']}: m_t = log q(y_t | x, y_<t) - log p(y_t | x, y_<t), nats")
    print(f"{'t':>5}  {'token':24}{'log q':>9}{'log p':>9}{'margin':>9}")
    centre = t_star if t_star >= 0 else max(range(len(ids)), key=margins.__getitem__)
    is_shown = lambda t: abs(t - centre) <= NEAR or t < ENDS or t >= len(ids) - ENDS
    t = 0
    while t < len(ids):
        end = next((k for k in range(t, len(ids)) if is_shown(k)), len(ids))
        if end - t > 1:  # one row is not worth folding
            above = sum(m > eta for m in margins[t:end])
            tail = f", {above} above eta" if above else ""
            print(f"{'':7}... {end - t} tokens, margins at most {max(margins[t:end]):.4f}{tail} ...")
            t = end
            continue
        mark = "  <- t*" if t == t_star else "  above eta, not the first" * (margins[t] > eta)
        row = f"{t:5}  {fit(token_text(tokenizer, ids[t]), 24)}{log_q[t]:9.4f}{log_p[t]:9.4f}{margins[t]:9.4f}"
        print(row + mark)
        t += 1
    print()
    if t_star < 0:
        print(f"max m_t = m_{centre} = {margins[centre]:.4f} <= {eta} = eta: no mismatch, y stays untouched")
        return
    if t_star > 0:
        print(f"before it  max m_t = {max(margins[:t_star]):.4f} <= {eta} = eta")
    q, p = log_q[t_star], log_p[t_star]
    print(f"t* = min {{ t : m_t > eta }} = {t_star}:  m_{t_star} = {q:.4f} - ({p:.4f}) = {q - p:.4f} > {eta} = eta")


def explain_splice(record, tokenizer):
    """The two responses of a pair, in their parts, and the row they become."""
    rejected, chosen, position = record["response_ids"], record["chosen_ids"], record["prefix_len"]
    text = lambda ids: safe(tokenizer.decode(ids))
    replaced = position == record["t_star"]
    heading(f"3. splice   y+ = y_<{position} followed by what p samples from there on; y- = y")
    show(f"kept y_<{position}", text(rejected[:position]))
    if replaced:
        show(f"replaced y_{position}", token_text(tokenizer, rejected[position]))
    show("student's rest", text(rejected[position + replaced :]))
    show(f"teacher from {position}", text(chosen[position:]))
    show(f"y+, {len(chosen)} tokens", text(chosen))
    show(f"y-, {len(rejected)} tokens", text(rejected))
    print(f"{'status':{INDENT}}{record['status']}{'' if record['status'] == 'kept' else ': not a pair of the run'}")


def explain_row(record):
    """The one row of exact prefix sharing, and what it saves."""
    prompt, chosen, rejected = (len(record[key]) for key in ("prompt_ids", "chosen_ids", "response_ids"))
    shared = shared_length(record["chosen_ids"], record["response_ids"])
    start, end = prompt + shared, prompt + chosen
    two, one = 2 * prompt + chosen + rejected, end + rejected - shared
    heading("Exact prefix sharing: one row instead of two")
    print(f"[ prompt + y_<{shared} | chosen suffix | rejected suffix ]")
    print(f"{'tokens':{INDENT}}[ {prompt} + {shared} | {chosen - shared} | {rejected - shared} ] = {one}")
    print(f"{'position ids':{INDENT}}[ 0 to {start - 1} | from {start} | {start} again ]; rejected does not see chosen")
    sums = f"({prompt} + {chosen}) + ({prompt} + {rejected}) = {two}"
    print(f"{'two rows':{INDENT}}{sums}; saved {start}, {start / two:.0%}")
    if shared > record["prefix_len"]:
        again = shared - record["prefix_len"]
        print(f"{'':{INDENT}}(the teacher wrote {again} of the student's tokens from {record['prefix_len']} on again)")


# ---------------------------------------------------------------------------------------------------------------------
# Step 4
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pair_logps(path, pair, args, tokenizer, device):
    """log pi(y+ | x), log pi(y- | x) under the model in `path`, (2, 2) float64: row 0 plain, row 1 exact.

    plain: the model's own logits over [prompt + y], each response alone. exact: the row of `dpo.train`, whose sums
    leave the shared prefix out, unless --logprobs mean needs it.
    """
    lm = models.load_model(path, torch.float32, device, args.trust_remote_code)
    vocab_size, average, plain = len(tokenizer), args.logprobs == "mean", []
    for response in (pair["chosen_ids"], pair["rejected_ids"]):
        row = torch.tensor([pair["prompt_ids"] + response], device=device)
        logits = lm(input_ids=row, use_cache=False).logits[0, -len(response) - 1 : -1, :vocab_size]  # (T, V)
        logps = logits.log_softmax(-1).gather(-1, row[0, -len(response) :, None])  # (T, 1)
        plain.append(logps.double().mean() if average else logps.double().sum())
    batch = dpo.collate_pairs([pair], tokenizer.pad_token_id, average, device)
    sums = dpo.PairModel(lm, vocab_size)(**batch)  # (1, 3)
    lengths = torch.tensor([[len(pair["chosen_ids"]), len(pair["rejected_ids"])]], device=device)
    exact = torch.cat(dpo.response_logps(sums, lengths, average))
    return torch.stack([torch.stack(plain), exact.double()]).cpu()


def dpo_terms(policy, reference, args):
    """log pi and log pi_ref, (2,) each for y+ and y- -> what the equation makes of them, by `dpo.dpo_loss`."""
    losses, chosen, rejected = dpo.dpo_loss(*policy[:, None], *reference[:, None], args.beta, args.label_smoothing)
    z = (chosen - rejected).item()
    values = [*policy.tolist(), *reference.tolist(), *(policy - reference).tolist()]
    # dL / dz = -((1 - eps) sigma(-z) - eps sigma(z)) = -(sigma(-z) - eps)
    sigma = torch.tensor(z, dtype=torch.float64).sigmoid().item()
    return [*values, z / args.beta, z, sigma, losses.item(), 1 - sigma - args.label_smoothing]


def explain_dpo(record, args, out, tokenizer, device):
    """The DPO terms of the pair, plain and exact, with numbers in the equation."""
    pair = {"prompt_ids": record["prompt_ids"], "chosen_ids": record["chosen_ids"]}
    pair["rejected_ids"] = record["response_ids"]
    trained = (out / "student").exists()
    policy_path = str(out / "student") if trained else args.student
    reference_path = args.teacher if args.reference == "teacher" else args.student
    policy = pair_logps(policy_path, pair, args, tokenizer, device)
    reference = policy
    if reference_path != policy_path:
        reference = pair_logps(reference_path, pair, args, tokenizer, device)
    heading("4. align   L = -log sigma(beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))])")
    show("pi", f"{policy_path}{'' if trained else ', not trained yet'}")
    show("pi_ref", str(reference_path))
    if args.logprobs == "mean":
        print("--logprobs mean: averages do not cancel, so the exact row adds the shared tokens, too")
    names = [f"log {model}({y} | x)" for model in ("pi", "pi_ref") for y in ("y+", "y-")]
    names += ["D+ = log pi(y+) - log pi_ref(y+)", "D- = log pi(y-) - log pi_ref(y-)", "D+ - D-"]
    names += ["z = beta (D+ - D-)", "sigma(z)", "L = -log sigma(z)", "weight of the gradient: sigma(-z)"]
    if args.label_smoothing:
        eps = args.label_smoothing
        names[-2:] = [f"L = -{1 - eps:g} log sigma(z) - {eps:g} log sigma(-z)", f"weight: sigma(-z) - {eps:g}"]
    plain, exact = (dpo_terms(policy[way], reference[way], args) for way in (0, 1))
    print(f"\n{'':44}{'plain: two rows':>17}{'exact: one row':>17}{'difference':>13}")
    for name, a, b in zip(names, plain, exact):
        print(f"{name:44}{a:17.6f}{b:17.6f}{b - a:13.1e}")
    if args.logprobs == "sum":
        print("(log-probs differ by the shared prefix, which one row leaves out: it cancels in D+ - D-)")
    print()
    for way, v in (("plain", plain), ("exact", exact)):
        filled = f"{args.beta:g} [({v[0]:.4f} - {v[2]:.4f}) - ({v[1]:.4f} - {v[3]:.4f})]".replace("- -", "+ ")
        print(f"{way:{INDENT}}z = {filled} = {v[7]:.6f}")
        print(f"{'':{INDENT}}L = {v[9]:.6f}")
    gap = max(abs(a - b) for a, b in zip(plain[6:], exact[6:]))
    verdict = "rounding of float32" if gap < 1e-3 * max(1.0, *map(abs, plain[:4])) else "MORE THAN ROUNDING"
    print(f"{'difference':{INDENT}}at most {gap:.1e} from D+ - D- on: {verdict}")
    if args.nll_weight > 0:
        nll = -plain[0] / (1 if args.logprobs == "mean" else len(pair["chosen_ids"]))
        print(
            f"{'not in the paper':{INDENT}}  + --nll-weight {args.nll_weight:g} x (-log pi(y+ | x) a token = {nll:.6f})"
        )


def explain(args, out, prompt_id, sample_id=None):
    """Walks through one prompt's samples and one of its pairs. args: of `warmup_distill.parse_args`. One process."""
    out = Path(out)
    records = read_samples(out, prompt_id)
    record, args = pick_sample(records, sample_id), run_arguments(args, out)
    tokenizer = models.load_tokenizer(args.student, args.trust_remote_code)
    use_gpu = args.device != "cpu" and torch.cuda.is_available()
    show("run", str(out))
    show("settings", f"eta {args.eta:g}, beta {args.beta:g}, N {args.samples}, reference: the {args.reference}")
    explain_prompt(records, tokenizer)
    explain_check(record, args.eta, tokenizer)
    if record["t_star"] < 0:
        return
    explain_splice(record, tokenizer)
    if record["chosen_ids"] == record["response_ids"]:
        print("\ny+ is y-: there is nothing to prefer, and no pair")
        return
    explain_row(record)
    explain_dpo(record, args, out, tokenizer, torch.device("cuda" if use_gpu else "cpu"))
