"""A tour of one prompt through the steps of Warmup-Distill, in the terminal, with the numbers of a finished run.

    python -m tools.explain OUT PROMPT_ID [SAMPLE_ID] [--device cpu]

It reads what the run has stored (OUT/args.json, OUT/pairs/*.jsonl). Two things are computed again: the mismatch rule,
on the stored log-probs; and the DPO terms of one pair, as the paper writes them (two rows, [prompt + y+] and
[prompt + y-]) and as dpo.py computes them (one row, see "Exact prefix sharing" there). The latter are in float32
whatever the run's dtype was: the rounding of bfloat16 would hide what is to be seen.
Text from models is written as Python's repr: control characters, line ends and marks that turn the direction of writing
are escaped and do nothing to a terminal. Lines are at most 100 columns wide.
"""

import unicodedata
from argparse import Namespace
from pathlib import Path

import torch

import dpo
import warmup_distill
from lib import models, runs
from lib.runs import UserError
from tools import report

WIDTH = 100
INDENT = 18  # columns of a label
NEAR, ENDS = 5, 2  # rows of the table that are never folded: so many on each side of t*, and at each end

# ---------------------------------------------------------------------------------------------------------------------
# What the run has stored
# ---------------------------------------------------------------------------------------------------------------------


def read_samples(out, prompt_id):
    """The records of one prompt, in order. Files are read until it is found; one is in memory at a time."""
    files = sorted((Path(out) / "pairs").glob("*.jsonl"))
    if not files:
        raise UserError("there are no samples to explain", f"in {out}", "give the OUT of warmup_distill.py")
    seen = set()
    for file in files:
        records = runs.read_jsonl(file, runs.run_key(Path(out)))
        with report.reading("a file", f"in {file}"):
            found = [record for record in records if record["prompt_id"] == prompt_id]
            for record in found:
                report.STATUSES.index(record["status"])  # ValueError for one that is no word of ours
                record["sample_id"] = int(record["sample_id"])
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
    wanted = [record for record in records if sample_id in (None, record["sample_id"])]
    if not wanted:
        ids = spans([record["sample_id"] for record in records])
        raise UserError(f"there is no sample {sample_id}", f"of prompt {records[0]['prompt_id']}", f"give one of {ids}")
    return min(wanted, key=lambda record: (record["status"] != "kept", record["t_star"] < 0, record["sample_id"]))


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


def margins_of(record):
    """m_t = log q - log p of each token, nats, rounded as the log-probs in the file are."""
    return [round(q - p, 4) for q, p in zip(record["student_logprobs"], record["teacher_logprobs"])]


def explain_check(record, eta, tokenizer):
    """The table of margins, folded where little happens, and why t* is where it is."""
    ids, log_q, log_p = (record[key] for key in ("response_ids", "student_logprobs", "teacher_logprobs"))
    margins, t_star = margins_of(record), record["t_star"]
    heading(f"2. check   sample {record['sample_id']}: m_t = log q(y_t | x, y_<t) - log p(y_t | x, y_<t), nats")
    print(f"{'t':>5}  {'token':24}{'log q':>9}{'log p':>9}{'margin':>9}")
    centre = t_star if t_star >= 0 else margins.index(max(margins))
    rows = []
    for t, margin in enumerate(margins):
        mark = "  <- t*" if t == t_star else ""
        if margin > eta and t != t_star:
            mark = "  above eta, not the first" if max(margins[:t], default=eta) > eta else "  above eta"
        token = fit(token_text(tokenizer, ids[t]), 24)
        rows.append(f"{t:5}  {token}{log_q[t]:9.4f}{log_p[t]:9.4f}{margin:9.4f}{mark}")
    for start, end in ((centre + NEAR + 1, len(ids) - ENDS), (ENDS, centre - NEAR)):
        hidden = margins[start : max(start, end)]
        if len(hidden) > 1:  # one row is not worth folding
            above = sum(margin > eta for margin in hidden)
            tail = f", {above} above eta" if above else ""
            rows[start:end] = [f"       ... {len(hidden)} tokens, margins at most {max(hidden):.4f}{tail} ..."]
    print(*rows, "", *verdict(record, eta), sep="\n")


def verdict(record, eta):
    """Lines that say why t* is where it is: the formula, or the rule if it is another one than the formula.

    The rule is `first_mismatch` as it is now, on the stored log-probs. It may have been another one when the run was
    made. So the formula is printed only if it holds for the stored t* and the rule finds the same t*.
    """
    q, p = (torch.tensor([record[f"{model}_logprobs"]], dtype=torch.float64) for model in ("student", "teacher"))
    t_now = warmup_distill.first_mismatch(q, p, torch.ones_like(q, dtype=torch.bool), eta).item()  # of (1, T)
    margins, t_star = margins_of(record), record["t_star"]
    place = t_star if t_star >= 0 else margins.index(max(margins))
    before = max(margins[:t_star] if t_star >= 0 else margins, default=eta)
    if t_now == t_star and before <= eta and t_star < 0:
        return [f"max m_t = m_{place} = {before:.4f} <= {eta} = eta: no mismatch, y stays untouched"]
    if t_now == t_star and before <= eta < margins[place]:
        lines = [f"before it  max m_t = {before:.4f} <= {eta} = eta"] if t_star > 0 else []
        filled = f"{q[0, t_star]:.4f} - ({p[0, t_star]:.4f}) = {margins[t_star]:.4f} > {eta} = eta"
        return [*lines, f"t* = min {{ t : m_t > eta }} = {t_star}:  m_{t_star} = {filled}"]
    which = f"the {'margin at t*' if t_star >= 0 else 'largest margin'} is {margins[place]:.4f}, eta is {eta}"
    lines = [f"t* = {t_star} was found by the rule of first_mismatch; {which}"]
    if t_now != t_star:
        lines.append(f"first_mismatch as it is now finds t* = {t_now}, not {t_star}: the code has changed since")
        if any(abs(margin - eta) < 1.5e-4 for margin in margins):
            lines.append("(or it is rounding: a margin is within 0.0001 nats of eta, and the file has four digits)")
    return lines if t_star >= 0 else [*lines, "no mismatch, y stays untouched"]


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
    shared = dpo.shared_length(record["chosen_ids"], record["response_ids"])
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
def pair_logps(path, record, average, tokenizer, device):
    """log pi(y+ | x), log pi(y- | x) under the model in `path`: {"plain": (2,), "exact": (2,)}, float64.

    plain: the model's own logits over [prompt + y], each response alone. exact: the row of `dpo.train`, whose sums
    leave the shared prefix out, unless `average` (--logprobs mean) needs it.
    """
    lm = models.load_model(path, torch.float32, device)
    vocab_size, plain = len(tokenizer), []
    responses = (record["chosen_ids"], record["response_ids"])
    for response in responses:
        row = torch.tensor([record["prompt_ids"] + response], device=device)
        logits = lm(input_ids=row, use_cache=False).logits[0, -len(response) - 1 : -1, :vocab_size]  # (T, V)
        logps = logits.log_softmax(-1).gather(-1, row[0, -len(response) :, None])  # (T, 1)
        plain.append(logps.double().mean() if average else logps.double().sum())
    pair = record | {"rejected_ids": record["response_ids"]}
    sums = dpo.PairModel(lm, vocab_size)(**dpo.collate_pairs([pair], tokenizer.pad_token_id, average, device))  # (1, 3)
    lengths = torch.tensor([[len(response) for response in responses]], device=device)
    exact = torch.cat(dpo.response_logps(sums, lengths, average))
    return {"plain": torch.stack(plain).cpu(), "exact": exact.double().cpu()}


def dpo_terms(policy, reference, beta, label_smoothing):
    """log pi and log pi_ref, (2,) each for y+ and y- -> {symbol: value} of the equation, the loss by `dpo.dpo_loss`."""
    losses, chosen, rejected = dpo.dpo_loss(*policy[:, None], *reference[:, None], beta, label_smoothing)
    z, ratios = chosen - rejected, policy - reference  # (1,), (2,)
    terms = {"pi+": policy[0], "pi-": policy[1], "ref+": reference[0], "ref-": reference[1]}
    terms |= {"D+": ratios[0], "D-": ratios[1], "D": ratios[0] - ratios[1], "z": z, "sigma": z.sigmoid(), "L": losses}
    # dL / dz = -((1 - eps) sigma(-z) - eps sigma(z)) = -(sigma(-z) - eps)
    terms["weight"] = (-z).sigmoid() - label_smoothing
    return {symbol: value.item() for symbol, value in terms.items()}


def explain_dpo(record, args, out, tokenizer, device):
    """The DPO terms of the pair, plain and exact, with numbers in the equation."""
    trained, average = (out / "student").exists(), args.logprobs == "mean"
    policy_path = str(out / "student") if trained else args.student
    reference_path = args.teacher if args.reference == "teacher" else args.student
    paths = (policy_path, reference_path)
    policy, reference = (pair_logps(path, record, average, tokenizer, device) for path in paths)
    heading("4. align   L = -log sigma(beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))])")
    show("pi", safe(policy_path) + ("" if trained else ", not trained yet"))
    show("pi_ref", safe(reference_path))
    eps = args.label_smoothing
    plain, exact = (dpo_terms(policy[way], reference[way], args.beta, eps) for way in ("plain", "exact"))
    titles = [f"log {model}({y} | x)" for model in ("pi", "pi_ref") for y in ("y+", "y-")]
    titles += ["D+ = log pi(y+) - log pi_ref(y+)", "D- = log pi(y-) - log pi_ref(y-)", "D+ - D-"]
    titles += ["z = beta (D+ - D-)", "sigma(z)", "L = -log sigma(z)", "weight of the gradient: sigma(-z)"]
    if eps:
        titles[-2:] = [f"L = -{1 - eps:g} log sigma(z) - {eps:g} log sigma(-z)", f"weight: sigma(-z) - {eps:g}"]
    print(f"\n{'':44}{'plain: two rows':>17}{'exact: one row':>17}{'difference':>13}")
    for title, symbol in zip(titles, plain, strict=True):
        print(f"{title:44}{plain[symbol]:17.6f}{exact[symbol]:17.6f}{exact[symbol] - plain[symbol]:13.1e}")
    note = "log-probs differ by the shared prefix, which one row leaves out: it cancels in D+ - D-"
    if average:
        note = "--logprobs mean: averages do not cancel, so one row has the shared prefix, too"
    print(f"({note})\n")
    for way, v in (("plain", plain), ("exact", exact)):
        ratios = f"({v['pi+']:.4f} - {v['ref+']:.4f}) - ({v['pi-']:.4f} - {v['ref-']:.4f})".replace("- -", "+ ")
        print(f"{way:{INDENT}}z = {args.beta:g} [{ratios}] = {v['z']:.6f}")
    gap = max(abs(plain[symbol] - exact[symbol]) for symbol in ("D", "z", "sigma", "L", "weight"))
    scale = max(1.0, *(abs(plain[symbol]) for symbol in ("pi+", "pi-", "ref+", "ref-")))
    cause = "rounding of float32" if gap < 1e-3 * scale else "MORE THAN ROUNDING"
    print(f"{'difference':{INDENT}}at most {gap:.1e} from D+ - D- on: {cause}")
    if args.nll_weight > 0:
        nll = -plain["pi+"] / (1 if average else len(record["chosen_ids"]))
        print(f"{'not in the paper':{INDENT}}+ {args.nll_weight:g} x {nll:.6f} nats a token, --nll-weight x NLL of y+")


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def explain(out, prompt_id, sample_id=None, device="cpu"):
    """Prints the tour of one prompt's samples and of one of its pairs."""
    out = Path(out)
    records = read_samples(out, prompt_id)
    record = pick_sample(records, sample_id)
    with report.reading("a run of warmup_distill.py", f"in {out / 'args.json'}"):
        args = Namespace(**runs.read_json(out / "args.json")["args"])
        if runs.read_json(out / "args.json")["inputs"][args.student] != runs.fingerprint(args.student):
            raise ValueError("its student is another model now")
        show("run", safe(str(out)))
        reference = safe(args.reference)[1:-1]
        show("settings", f"eta {args.eta:g}, beta {args.beta:g}, N {args.samples:d}, reference: the {reference}")
    tokenizer = models.load_tokenizer(args.student)
    explain_prompt(records, tokenizer)
    explain_check(record, args.eta, tokenizer)
    if record["t_star"] < 0:
        return
    explain_splice(record, tokenizer)
    if record["chosen_ids"] == record["response_ids"]:
        print("\ny+ is y-: there is nothing to prefer, and no pair")
        return
    explain_row(record)
    explain_dpo(record, args, out, tokenizer, torch.device(device))


def main(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.prog = "python -m tools.explain"
    parser.add_argument("out", help="folder of a run of warmup_distill.py")
    parser.add_argument("prompt_id", type=int, help="the prompt")
    parser.add_argument("sample_id", type=int, nargs="?", help="one of its samples; not given: the first that was kept")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    args = parser.parse_args(argv)
    world = runs.start_processes(args.device, threads=0)
    explain(args.out, args.prompt_id, args.sample_id, world.device)


if __name__ == "__main__":
    runs.run(main)
