"""What a run will need, before it is started: the --dry-run of warmup_distill.py, kd.py and dpo.py.

Shapes, memory of one GPU, steps, tokens, FLOPs, time and disk, from the models' config.json alone: a model is built on
torch's meta device, where it has shapes and no memory, so a folder without weights does, and so does a hub id. Data and
tokenizer are used where they can be read; otherwise prompts are as long as --max-prompt-tokens allows. Responses always
count in full length, every sample as a pair, every splice from the first token on: memory, tokens and time are upper
bounds, except for what ASSUMED says of the machine.

Not counted: the CUDA context, NCCL's buffers and the allocator's fragmentation (together 1 to 3 GB), the closing table.
The formulas are in costs.py.
"""

import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import common
import costs
import data
import models
import pairs
import toy
import training
from common import UserError, check_range

SAMPLED = 1000  # rows of the data that are tokenized, for their mean length

# ---------------------------------------------------------------------------------------------------------------------
# What is known of models and data before a run
# ---------------------------------------------------------------------------------------------------------------------


def read_or_none(read, *arguments):
    """read(*arguments), or None where that is a UserError: a plan does without what is not there yet."""
    try:
        return read(*arguments)
    except UserError:
        return None


def model_shape(args, name):
    """The `costs.Shape` of args.teacher, .student or .model; of the toy's, which need not have been built yet."""
    path = getattr(args, name)
    if path is None:  # check_args lets that pass for the toy alone
        path = f"out/toy/{name}"
        if not (Path(path) / "config.json").exists():
            path = toy.make_model(getattr(toy.Settings(), name), toy.make_tokenizer(), 0).config
    return costs.read_shape(path, args.trust_remote_code)


def read_lengths(args, student, gold=False):
    """What is known of --data: count of prompts, mean tokens of a prompt and a response, vocab, words on the source.

    gold: whether the data's responses count (kd.py). Means are of the first rows that are within the limits.
    """
    known = SimpleNamespace(count=args.limit or 1000, prompt=args.max_prompt_tokens, response=args.max_new_tokens)
    known.words = "the data cannot be read: " + ("--limit" if args.limit else "for every 1,000")
    source = SimpleNamespace(**{**vars(args), "data": args.data or "out/toy/train.jsonl"})
    tokenizer = read_or_none(models.load_tokenizer, student.path, args.trust_remote_code)
    known.vocab = len(tokenizer) if tokenizer else student.rows
    examples = read_or_none(data.read_examples, source)
    if examples:
        known.count, known.words = len(examples), "rows of the data; no tokenizer, so prompts in full length"
    if examples and tokenizer:
        first = list(itertools.islice(examples, SAMPLED))
        kept, _ = data.encode_prompts(first, tokenizer, args.template, args.max_prompt_tokens)
        if gold:  # with its eos token; kd.py leaves a longer one out
            texts = [prompt["gold"] or "" for prompt in kept]
            lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts]
            kept = [prompt for prompt, n in zip(kept, lengths) if n <= args.max_new_tokens] or kept
            known.response = min(args.max_new_tokens, sum(n for n in lengths if n <= args.max_new_tokens) / len(kept))
        known.count = round(len(examples) * len(kept) / len(first))
        known.prompt = sum(len(prompt["ids"]) for prompt in kept) / len(kept)
        known.words = "of the data, within the limits"
    return known


def read_pair_lengths(args, model):
    """The same of dpo.py's pairs: count, mean row, longest row, mean tokens that have logits, vocab, words."""
    tokenizer = read_or_none(models.load_tokenizer, model.path, args.trust_remote_code)
    known = SimpleNamespace(count=1000, row=768, longest=768, logits=512)
    known.words, known.vocab = "no file: for every 1,000", len(tokenizer) if tokenizer else model.rows
    if not Path(args.pairs).is_file():
        return known
    rows = pairs.read_pairs(args.pairs, tokenizer) if tokenizer else common.read_jsonl(args.pairs)
    known.count, known.words = len(rows), "of the file; no tokenizer, so 256 + 256 + 256 tokens are assumed"
    if rows and "chosen_ids" in rows[0]:
        shared = [pairs.shared_length(p["chosen_ids"], p["rejected_ids"]) for p in rows]
        suffixes = [len(p["chosen_ids"]) + len(p["rejected_ids"]) - 2 * s for p, s in zip(rows, shared)]
        lengths = [len(p["prompt_ids"]) + s + n for p, s, n in zip(rows, shared, suffixes)]
        if args.logprobs == "mean" or args.nll_weight > 0:  # then the shared tokens have logits, too
            suffixes = [n + s for n, s in zip(suffixes, shared)]
        known.row, known.longest = sum(lengths) / len(rows), max(lengths)
        known.logits, known.words = sum(suffixes) / len(rows), "of the file"
    return known


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


class Stages:
    """Collects a plan, a stage at a time: memory of one GPU, work of all, bytes on disk."""

    def __init__(self, script, args, size, vocab, **shapes):
        self.args, self.size, self.vocab = args, size, vocab
        small = args.dtype == "bfloat16" or (args.dtype == "auto" and args.device != "cpu")
        self.dtype = "bfloat16" if small else "float32"
        self.b = common.DTYPES[self.dtype].itemsize
        accumulation = training.accumulation_steps(args, SimpleNamespace(size=size))
        self.micro = args.batch_size // size // accumulation  # examples in one forward
        self.plan = {"script": script, "gpus": size, "dtype": self.dtype}
        self.plan |= {name: [] for name in ("facts", "memory", "work", "disk", "notes")}
        for name, shape in shapes.items():
            path = shape.path if len(shape.path) <= 40 else f"...{shape.path[-37:]}"
            text = f"{path}: {amount(shape.total, '')} parameters, {shape.layers} layers"
            self.fact(name, f"{text}, KV cache {amount(costs.cache_bytes(shape, self.b, 1, 1), 'B')} a token")
        self.fact("batch", f"{args.batch_size} = {size} processes x {accumulation} micro-batches x {self.micro}")

    def fact(self, name, text):
        self.plan["facts"].append((name, text))

    def memory(self, stage, *items):
        """items: (what, bytes); what is 0 is left out."""
        self.plan["memory"].append((stage, [item for item in items if item[1]]))

    def work(self, stage, steps, tokens, flops, seconds=None, bound="compute"):
        """One line of work, of all GPUs together. seconds: those of `flops` if not given."""
        seconds = costs.compute_seconds(flops, self.dtype, self.size) if seconds is None else seconds
        keys = ("stage", "steps", "tokens", "flops", "seconds", "bound")
        self.plan["work"].append(dict(zip(keys, (stage, steps, tokens, flops, seconds, bound))))

    def disk(self, what, count):
        self.plan["disk"].append((what, count))

    def weights(self, name, shape, shards=1):
        return f"weights of {name}", costs.weight_bytes(shape, self.b, shards) if shape else 0

    def cache(self, shape, rows, *updates):
        columns = costs.cache_columns(*updates)
        return f"KV cache, {rows} rows x {columns} columns", costs.cache_bytes(shape, self.b, rows, columns)

    def sampling(self, rows, top_p=1):
        return f"logits and sampling, {rows} x {self.vocab:,}", costs.sampling_bytes(rows, self.vocab, top_p)

    def decoding(self, stage, shape, batches, rows, prompt, tokens, shards=1):
        """`batches` times `rows` rows, of `tokens` tokens each behind `prompt`; prefills are little beside it."""
        turns = math.ceil(batches / self.size)
        seconds, bound = costs.decode_seconds(shape, self.b, self.dtype, rows, prompt, tokens, self.vocab, shards)
        total = batches * rows * tokens
        flops = costs.forward_flops(shape, total, prompt + tokens / 2, total, self.vocab)
        self.work(stage, turns * tokens, total, flops, turns * seconds, bound)

    def forwards(self, stage, shape, batches, tokens, length, logits):
        """`batches` forwards over `tokens` tokens in all, of which `logits` have logits, in rows of `length`."""
        self.work(stage, batches, tokens, costs.forward_flops(shape, tokens, length, logits, self.vocab))

    def training(self, stage, shape, known, masked, loss, beside=(), teacher_flops=0):
        """A training loop. known: count of examples, mean row, longest row, logits a row. beside: memory of others."""
        args, checkpointing = self.args, self.args.activation_checkpointing
        steps = args.max_steps or args.epochs * math.ceil(known.count / args.batch_size)
        examples = args.max_steps * args.batch_size or args.epochs * known.count
        self.fact(stage, f"{steps:,} steps; rows of up to {known.longest:,} tokens, {known.row:,.0f} on average")
        rows = shape, self.b, self.micro, known.longest, masked
        kept = (
            f"activations, {self.micro} rows x {known.longest} tokens",
            costs.training_activations(*rows, checkpointing),
        )
        tokens = self.micro * known.longest
        chunk = min(costs.head_rows(self.vocab, loss), tokens)
        head = (
            f"lm_head: {chunk} x {self.vocab:,} logits, loss, gradient",
            costs.head_bytes(*rows[:2], self.vocab, loss, tokens),
        )
        again = "one layer computed again, gradient of lm_head", costs.recomputed_bytes(*rows) + self.b * shape.head
        # A layer is computed again when the head is done: the larger of the two counts
        step = [kept, max(head, again, key=lambda item: item[1]) if checkpointing else head]
        for phase, items in costs.training_memory(stage, shape, self.b, self.size, beside, step):
            self.memory(phase, *items)
        tokens = examples * known.row
        flops = costs.training_flops(shape, tokens, known.row, examples * known.logits, self.vocab, checkpointing)
        self.work(stage, steps, tokens, flops + examples * teacher_flops)
        self.disk("checkpoint: weights, Adam (12 B a parameter; twice that while one is written)", 12 * shape.total)
        self.disk(f"student, {args.save_dtype}", common.DTYPES[args.save_dtype].itemsize * shape.total)

    def finish(self, trained, frozen):
        """Adds totals, and a node's host memory while models load: float32 copies are each rank's own; a file in the
        dtype that is asked for is mapped, once for all ranks."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", min(self.size, 8)))
        loads = [(trained, "float32"), *((shape, self.dtype) for shape in frozen)]
        copies = lambda shape, dtype: 1 if shape.dtype == dtype else local
        self.plan["host"] = max(copies(*load) * common.DTYPES[load[1]].itemsize * load[0].total for load in loads)
        self.plan["seconds"] = sum(line["seconds"] for line in self.plan["work"])
        return self.plan


def json_bytes(vocab, ids, logprobs, text):
    """Of JSON lists: an id and ", "; a log-prob of 4 decimals, "-0.0012, "; text at 4.5 bytes a token."""
    return (len(str(vocab)) + 2) * ids + 9 * logprobs + 4.5 * text


# ---------------------------------------------------------------------------------------------------------------------
# The three scripts
# ---------------------------------------------------------------------------------------------------------------------


def plan_warmup(args, size):
    """The plan of warmup_distill.py: sample, check, splice, DPO."""
    student, teacher = (model_shape(args, name) for name in ("student", "teacher"))
    known = read_lengths(args, student)
    stages = Stages("warmup_distill.py", args, size, known.vocab, teacher=teacher, student=student)
    n, longest, tokens = args.samples, args.max_prompt_tokens, args.max_new_tokens
    batches, rows = math.ceil(known.count / args.prompts_per_batch), min(known.count, args.prompts_per_batch) * n
    stages.fact("prompts", f"{known.count:,} ({known.words}), {known.prompt:.0f} tokens on average, {longest} at most")
    stages.fact("sampling", f"{batches:,} batches of {rows} rows, {longest} + {tokens} columns, + {tokens} to splice")
    shards, samples = size if args.shard_teacher else 1, known.count * n
    weights = [stages.weights("the teacher", teacher, shards), stages.weights("the student", student)]
    sampling, ones = stages.sampling(rows, args.top_p), [1] * (tokens - 1)  # the last token drawn is never fed
    forward = costs.scoring_bytes(teacher, stages.b, rows * tokens, longest + tokens, known.vocab)
    scoring = "activations of one layer and the mask, or a chunk of logits", forward
    hidden = "hidden states of the check", rows * (tokens + 1) * teacher.hidden * stages.b
    stages.memory("sample", *weights, stages.cache(student, rows, longest, *ones), sampling)
    stages.memory("check", *weights, stages.cache(teacher, rows, longest, tokens), scoring)
    stages.memory("splice", *weights, stages.cache(teacher, rows, longest, tokens, *ones), hidden, sampling)
    stages.decoding("sample", student, batches, rows, known.prompt, tokens)
    stages.forwards("check", teacher, batches, samples * tokens, known.prompt + tokens, samples * tokens)
    stages.decoding("splice", teacher, batches, rows, known.prompt, tokens, shards)
    row = known.prompt + 2 * tokens
    made = SimpleNamespace(count=samples, row=row, longest=longest + 2 * tokens, logits=2 * tokens)
    sample = json_bytes(known.vocab, known.prompt + 2 * tokens, 3 * tokens, known.prompt)
    stages.disk("pairs/*.jsonl", samples * sample)
    stages.disk("pairs.jsonl", samples * json_bytes(known.vocab, row, 0, row))
    plan_preferences(stages, student, teacher if args.reference == "teacher" else None, made)
    stages.plan["notes"].append("upper bounds: every sample a pair, as long as it may be, spliced at its first token")
    if args.keep.startswith("reward:"):
        stages.plan["notes"].append("the reward model of --keep is not counted")
    return stages.finish(student, [student, teacher])


def plan_dpo(args, size):
    """The plan of dpo.py."""
    model = model_shape(args, "model")
    known = read_pair_lengths(args, model)
    reference = costs.read_shape(args.reference, args.trust_remote_code) if args.reference else None
    shapes = {"model": model, "reference": reference} if reference else {"model": model}
    stages = Stages("dpo.py", args, size, known.vocab, **shapes)
    stages.fact("pairs", f"{known.count:,} ({known.words})")
    plan_preferences(stages, model, reference, known)
    return stages.finish(model, [])


def plan_preferences(stages, policy, reference, known):
    """`dpo.train`: the reference's log-probs of all pairs, then the steps. reference: None where it is the policy."""
    if reference:
        shards = 4 * (policy.total + reference.total) / stages.size
        gathered = stages.b * (reference.root + 3 * reference.block)
        rows = stages.micro * known.longest, known.longest
        forward = costs.scoring_bytes(reference, stages.b, *rows, stages.vocab)
        items = ("float32 weights of both / ranks", shards), ("gathered by FSDP", gathered)
        stages.memory("reference", *items, ("activations of one layer and the mask, or a chunk of logits", forward))
    batches = math.ceil(known.count / stages.micro)
    shape, logits = reference or policy, known.count * known.logits
    stages.forwards("reference", shape, batches, known.count * known.row, known.row, logits)
    stages.training("dpo", policy, known, True, "dpo")


def plan_kd(args, size):
    """The plan of kd.py."""
    student = model_shape(args, "student")
    teacher = model_shape(args, "teacher") if args.kd_rate > 0 or args.mode == "teacher" else None
    known = read_lengths(args, student, gold=args.mode == "gold")
    shapes = {"teacher": teacher, "student": student} if teacher else {"student": student}
    stages = Stages("kd.py", args, size, known.vocab, **shapes)
    words = f"{known.count:,} ({known.words}), {known.prompt:.0f} + {known.response:.0f} tokens on average"
    stages.fact("examples", f"{words}, {args.max_prompt_tokens} + {args.max_new_tokens} at most")
    known.row, known.logits = known.prompt + known.response - 1, known.response  # the last token predicts nothing
    known.longest = args.max_prompt_tokens + args.max_new_tokens - 1
    weights = stages.weights("the teacher", teacher, size if args.shard_teacher else 1)
    if args.mode == "teacher":
        plan_responses(stages, "responses", teacher, known, known.count, weights)
        stages.disk("responses", known.count * json_bytes(known.vocab, known.response, 0, known.row))
    states = "the student's weights, gradients, Adam / ranks", 16 * student.total / size
    beside, teacher_flops = [], 0
    if args.kd_rate > 0 and args.teacher_cache:
        plan_teacher_cache(stages, teacher, known, weights)
    elif args.kd_rate > 0:
        hidden = stages.b * stages.micro * known.longest * teacher.hidden
        beside = [weights, ("hidden states of the teacher", hidden)]
        teacher_flops = costs.forward_flops(teacher, known.row, known.row, known.logits, known.vocab)
        forward = costs.forward_bytes(teacher, stages.b, stages.micro * known.longest, 0)
        stages.memory("kd, teacher", weights, states, ("activations of one layer", forward))
    if args.mode == "student":
        beside.append(stages.weights("the replica that samples", student))
        steps = args.max_steps or args.epochs * math.ceil(known.count / args.batch_size)
        plan_responses(stages, "sampling", student, known, steps * args.batch_size * args.on_policy, *beside, states)
    stages.training("kd", student, known, False, args.loss if args.kd_rate > 0 else "sft", beside, teacher_flops)
    return stages.finish(student, [teacher] if teacher else [])


def plan_responses(stages, stage, shape, known, count, *items):
    """kd.py writes `count` responses, --prompts-per-batch at once; on-policy ones no more at once than it needs."""
    args = stages.args
    wanted = args.on_policy * args.batch_size * args.refresh_every if stage == "sampling" else known.count
    rows = max(1, min(args.prompts_per_batch, round(wanted)))
    cache = stages.cache(shape, rows, args.max_prompt_tokens, *[1] * (args.max_new_tokens - 1))
    stages.memory(stage, *items, cache, stages.sampling(rows))
    shards = stages.size if args.shard_teacher and stage == "responses" else 1
    batches = math.ceil(count / rows)
    stages.decoding(stage, shape, batches, rows, known.prompt, args.max_new_tokens, shards)


def plan_teacher_cache(stages, teacher, known, weights):
    """--teacher-cache is made once: of a token, id and log-prob (4 + 4 B) of each of the top k, and the rest (4 B)."""
    args = stages.args
    rows, top_k = min(known.count, args.prompts_per_batch), min(args.teacher_top_k, known.vocab)
    forward = costs.forward_bytes(teacher, stages.b, rows * known.longest, 0)
    stages.memory("teacher cache", weights, ("activations of one layer", forward))
    tokens, batches = known.count * known.row, math.ceil(known.count / rows)
    stages.forwards("teacher cache", teacher, batches, tokens, known.row, known.count * known.logits)
    stages.disk(f"teacher cache, top {top_k}", known.count * known.logits * (8 * top_k + 4))


def plan(args, world_size):
    """What a run of `world_size` processes will need, a dict of plain values. args: of any of the three parse_args."""
    make = plan_dpo if hasattr(args, "model") else plan_kd if hasattr(args, "kd_rate") else plan_warmup
    return make(args, world_size)


def amount(value, unit):
    """A number for a reader: amount(15.2e9, "B") -> "15.2 GB"; seconds become min and h."""
    if unit == "s":
        scale, unit = next((k, u) for k, u in ((3600, "h"), (60, "min"), (1, "s")) if value >= k or k == 1)
        return f"{value / scale:.3g} {unit}"
    power = min(5, max(0, int(math.log10(max(1, value)) / 3)))
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def print_plan(plan):
    """The plan as aligned tables, to the terminal."""
    print(f"{plan['script']} on {plan['gpus']} GPUs, {plan['dtype']}; nothing is run")
    for name, text in plan["facts"]:
        print(f"{name:14}{text}")
    print("\nmemory of one GPU")
    for stage, items in plan["memory"]:
        for k, (what, size) in enumerate(items):
            print(f"{stage if k == 0 else '':14}{what:68}{amount(size, 'B'):>10}")
        print(f"{'':14}{'together':68}{amount(sum(size for _, size in items), 'B'):>10}")
    print(f"{'host':14}{'memory of a node while models load':68}{amount(plan['host'], 'B'):>10}")
    print(f"\n{'work of all GPUs':18}{'steps':>12}{'tokens':>18}{'operations':>14}{'time':>12}   bound by")
    for line in plan["work"]:
        numbers = f"{line['steps']:12,}{line['tokens']:18,.0f}{amount(line['flops'], 'FLOP'):>14}"
        print(f"{line['stage']:18}{numbers}{amount(line['seconds'], 's'):>12}   {line['bound']}")
    print(f"{'together':18}{'':44}{amount(plan['seconds'], 's'):>12}")
    print("\ndisk")
    for what, size in plan["disk"]:
        print(f"{what:82}{amount(size, 'B'):>10}")
    machine = costs.ASSUMED["device"], costs.ASSUMED["flops"][plan["dtype"]] / 1e12, costs.ASSUMED["bandwidth"] / 1e12
    shares = costs.ASSUMED["flops_share"], costs.ASSUMED["bandwidth_share"], 1e3 * costs.ASSUMED["launch"]
    assumed = (
        "assumed: {0}, {1:.0f} TFLOP/s, of which {3:.0%}; {2:.2f} TB/s, of which {4:.0%}; {5:.1f} ms a layer a step"
    )
    missing = "not counted: 1 to 3 GB of CUDA context, NCCL and fragmentation; the closing table"
    print("", *plan["notes"], assumed.format(*machine, *shares), missing, sep="\n")


def dry_run(args):
    """What --dry-run does: prints the plan for its number of processes, or for those that torchrun has started."""
    check_range("--dry-run", args.dry_run, args.dry_run >= 0, "of 1 or more processes, or none")
    if int(os.environ.get("RANK", "0")) == 0:
        print_plan(plan(args, args.dry_run or int(os.environ.get("WORLD_SIZE", "1"))))
