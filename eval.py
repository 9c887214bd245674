"""Evaluation: Rouge-L, math accuracy, teacher-student distance; mean and spread over seeds; paired comparison of runs.

    python eval.py --model OUT/student --data dolly selfinst vicuna sni unni --preset minillm
    torchrun --nproc_per_node 8 eval.py --model A B --data gsm8k math --compare A B --distance TEACHER
    python eval.py --compare OUT/eval/A OTHER/eval/B                                results that are there already

Instruction following is scored as in MiniLLM (arXiv 2306.08543), DistiLLM and DSKD: five sets, sampled at temperature 1,
seeds 10 to 50, Rouge-L F with the stemmer, the best over the references, times 100. Math is scored by math-verify on
greedy responses, in percent; a greedy response needs no second seed, so the first one names its file.
Deviations from MiniLLM's protocol: a prompt is never cut (theirs loses its response marker after 256 tokens): one that
is over the limit is skipped and counted. They forbid repeated 6-grams: off here, on with --preset minillm. Their stream
of random numbers differs with the number of GPUs; here every token's depends on its place alone.

Every response is in OUT/eval/<model>/<set>-seed<seed>.jsonl with its score. A file that is there is done, so a killed
run goes on. Batches are cut from the order of the prompts: files and table are the same for any number of processes.
"""

import argparse
import functools
import json
import math
import re
import statistics
from pathlib import Path

import torch.distributed as dist

import benchmarks
import common
import decode
import measure
import models
import run_folder
import scores
from common import UserError, check_range

# What all response files of one OUT/eval have in common
SETTINGS = ("temperature", "top_p", "max_new_tokens", "no_repeat_ngram_size", "batch_size", "dtype")
PRESETS = {"none": {}, "minillm": {"no_repeat_ngram_size": 6, "template": "alpaca"}}

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def model_name(path):
    """A model's path or hub id as the name of one folder: out/warmup/student -> out--warmup--student."""
    return re.sub(r"[^\w.-]+", "--", str(path).strip("/"))


def read_responses(file, path, metric, prompts):
    """The rows of a response file. Raises UserError if they are not of these prompts, or older than the model."""
    rows, todo = common.read_jsonl(file), "delete it or give another --out"
    keys = ("prompt_id", "prompt", "references", "metric")
    wanted = [(p["prompt_id"], p["text"], p["gold"], metric) for p in prompts]
    if [tuple(row.get(key) for key in keys) if isinstance(row, dict) else None for row in rows] != wanted:
        raise UserError("the responses are to other prompts or scored otherwise", f"in {file}", todo)
    if any(weights.stat().st_mtime > file.stat().st_mtime for weights in Path(path).glob("*.safetensors")):
        raise UserError("the responses are older than the model", f"in {file}", todo)
    return rows


def read_folder(folder, seeds=None):
    """{set: {seed: rows}} of all response files in a folder, of `seeds` alone if given."""
    results = {}
    for file in sorted(folder.glob("*-seed*.jsonl")):
        name, _, seed = file.stem.rpartition("-seed")
        if seed.isdigit() and (seeds is None or int(seed) in seeds):
            results.setdefault(name, {})[int(seed)] = common.read_jsonl(file)
    return results


def evaluate(path, sets, args, world, out, checker, teacher):
    """Writes the response files of one model that are not there yet. Returns {set: counts, distance} for the table.

    sets: list of (Benchmark, examples). teacher: () -> the model of --distance, loaded once.
    """
    folder = out / model_name(path)
    tokenizer = models.load_tokenizer(path, args.trust_remote_code)
    eos_ids = models.model_eos_ids([path], tokenizer, args.trust_remote_code)
    if args.distance:
        theirs = models.load_tokenizer(args.distance, args.trust_remote_code)
        models.check_same_tokenizer(tokenizer, theirs, path, args.distance)
    jobs, table = [], {}
    for benchmark, examples in sets:
        new_tokens = args.max_new_tokens or benchmark.max_new_tokens
        limit = models.prompt_limit([path], args.max_prompt_tokens, new_tokens, args.trust_remote_code)
        prompts, skipped = benchmarks.encode(examples, tokenizer, args.template, limit)
        row = {"metric": benchmark.metric, "skipped": skipped, "max_prompt_tokens": limit}
        table[benchmark.name] = row
        settings = (prompts, tokenizer, eos_ids, new_tokens, args.batch_size)
        for seed in seeds_of(benchmark, args):
            file = folder / f"{benchmark.name}-seed{seed}.jsonl"
            if file.exists():
                read_responses(file, path, benchmark.metric, prompts)
            else:
                jobs.append((file, seed, benchmark, settings))
        if args.distance:
            question = {"teacher": args.distance, "eta": args.eta, "seed": args.seeds[0], "prompts": len(prompts)}
            question["content"] = [run_folder.fingerprint(p) for p in (path, args.distance)]  # as trained by now
            file = folder / f"{benchmark.name}-distance-{model_name(args.distance)}.json"
            try:
                answer = common.read_json(file) if file.exists() else {}
            except ValueError:  # damaged: measured again
                answer = {}
            if isinstance(answer, dict) and question.items() <= answer.items():
                row["distance"] = answer
            else:
                jobs.append((file, question, benchmark, settings))
    world.barrier()  # every rank has looked before the first one writes
    if not jobs:
        return table
    folder.mkdir(parents=True, exist_ok=True)
    model = models.load_model(path, models.compute_dtype(args.dtype, world), world.device, args.trust_remote_code)
    models.check_vocabulary(model, tokenizer, path)
    for file, task, benchmark, settings in jobs:
        if file.suffix == ".json":
            result = task | measure.distance(model, teacher(), *settings, args.eta, task["seed"], world)
            table[benchmark.name]["distance"] = result
            if world.rank == 0:
                common.write_json(file, result)
        else:
            rows = respond(model, *settings, benchmark.metric, task, args, world, checker, file.stem)
            if world.rank == 0:
                common.write_jsonl(file, rows)
    return table


def respond(model, prompts, tokenizer, eos_ids, max_new_tokens, batch_size, metric, seed, args, world, checker, title):
    """One scored response to each prompt, of all ranks, in order."""
    greedy = lambda batch: decode.greedy
    sampled = lambda batch: measure.sampler(batch, seed, args, world.device)
    chooser = greedy if metric == "math" else sampled
    rows = []
    for prompt, ids, text in measure.generate(
        model, prompts, chooser, tokenizer, eos_ids, max_new_tokens, batch_size, world, title
    ):
        score, check_failed = scores.score_response(text, prompt["gold"], metric, checker)
        rows.append(
            {
                "prompt_id": prompt["prompt_id"],
                "prompt": prompt["text"],
                "response": text,
                "score": score,
                "metric": metric,
                "references": prompt["gold"],
                "tokens": len(ids),
                "ended": ids[-1] in eos_ids,
                "check_failed": check_failed,
            }
        )
    parts = [None] * world.size
    dist.all_gather_object(parts, rows)
    return sorted((row for part in parts for row in part), key=lambda row: row["prompt_id"])


def seeds_of(benchmark, args):
    """The seeds of a set: all for sampled responses, the first for greedy ones, which have no randomness."""
    return args.seeds if benchmark.metric == "rouge" else args.seeds[:1]


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--model", nargs="+", default=[], help="folders or hub ids")
    parser.add_argument("--data", nargs="+", default=[], help=f"{', '.join(benchmarks.BENCHMARKS)}, NAME=FILE or FILE")
    parser.add_argument("--out", default="out", help="results go to OUT/eval")
    common.add_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--metric", choices=["rouge", "math"], help="of files that have none of the known names")
    group.add_argument("--limit", type=int, default=0, help="use the first LIMIT rows of each set; 0: all")
    group.add_argument("--template", choices=["auto", "chat", "alpaca", "none"], default="auto", help="as in training")
    group.add_argument("--max-prompt-tokens", type=int, default=1024, help="a longer prompt is skipped and counted")
    group = parser.add_argument_group("decoding; math is greedy")
    group.add_argument("--preset", choices=PRESETS, default="none", help="minillm: their decoding and template")
    group.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="one response a prompt each")
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    group.add_argument("--top-p", type=float, default=1.0, help="of sampling")
    group.add_argument("--max-new-tokens", type=int, default=0, help="0: 256, and 1024 for math")
    group.add_argument("--no-repeat-ngram-size", type=int, default=0, help="never sample an n-gram twice; 0: off")
    group.add_argument("--batch-size", type=int, default=32, help="prompts decoded at once by one process")
    group = parser.add_argument_group("comparisons")
    group.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two of --model, or folders of response files")
    group.add_argument("--resamples", type=int, default=10_000, help="of the paired bootstrap; --seed decides them")
    group.add_argument("--distance", metavar="TEACHER", help="measure each model's distance from this one")
    group.add_argument("--eta", type=float, default=4.0, help="threshold of the margin log q - log p, nats")
    preset = PRESETS[parser.parse_args(argv).preset]
    parser.set_defaults(**preset)
    return check_args(parser.parse_args(argv))


def check_args(args):
    """Raises UserError for values that make no sense."""
    if bool(args.model) != bool(args.data) or not (args.model or args.compare):
        raise UserError("--model and --data go together", "on the command line", "give both, or --compare alone")
    if args.distance and not args.model:
        raise UserError("--distance needs --model and --data", "on the command line", "give them")
    rules = {
        "above 0": (lambda x: 0 < x < math.inf, ["temperature"]),
        "in (0, 1]": (lambda x: 0 < x <= 1, ["top_p"]),
        "of 0 or more": (lambda x: x >= 0, ["max_new_tokens", "limit"]),
        "of 0, or 2 or more": (lambda x: x == 0 or x >= 2, ["no_repeat_ngram_size"]),
        "of 1 or more": (lambda x: x >= 1, ["batch_size", "resamples"]),
        "in nats, such as 4": (math.isfinite, ["eta"]),
    }
    common.check_ranges(args, rules)
    for seed in (args.seed, *args.seeds):
        check_range("--seed and --seeds", seed, 0 <= seed < 1 << 62, "from 0 to 2^62 - 1")
    for flag, values in (("model", list(map(model_name, args.model))), ("data", args.data), ("seeds", args.seeds)):
        check_range(f"--{flag}", " ".join(map(str, values)), len(set(values)) == len(values), "only once")
    return args


def comparand(name, args, out):
    """The folder of response files that one name of --compare means."""
    folder = out / model_name(name) if name in args.model else Path(name)
    if name not in args.model and not list(folder.glob("*-seed*.jsonl")):
        raise UserError(f"{name} is no --model and no folder of response files", "in --compare", "name one of these")
    return folder


def main(argv=None):
    args = parse_args(argv)
    world = common.start_processes(args.device, args.threads)
    out = Path(args.out) / "eval"
    found = [benchmarks.find(spec, args.metric) for spec in args.data]
    names = [benchmark.name for benchmark in found]
    check_range("--data", " ".join(args.data), len(set(names)) == len(names), "with each name once")
    for metric in {benchmark.metric for benchmark in found}:
        scores.check_installed(metric)
    sets = [(benchmark, benchmarks.load(benchmark, args.limit)) for benchmark in found]
    folders = [comparand(name, args, out) for name in args.compare or ()]
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings["dtype"] = str(models.compute_dtype(args.dtype, world)).removeprefix("torch.")
    if args.model:
        run_folder.start_run(out, argparse.Namespace(**settings))
    elif world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def teacher():
        dtype = models.compute_dtype(args.dtype, world)
        model = models.load_model(args.distance, dtype, world.device, args.trust_remote_code)
        models.check_vocabulary(model, models.load_tokenizer(args.distance, args.trust_remote_code), args.distance)
        return model

    checker = scores.AnswerChecker()
    table = {"models": {}}
    for path in args.model:
        table["models"][path] = {"sets": evaluate(path, sets, args, world, out, checker, teacher)}
    checker.close()
    world.barrier()
    if world.rank > 0:
        return
    for path, model in table["models"].items():
        for benchmark, _ in sets:
            results = read_folder(out / model_name(path), seeds_of(benchmark, args))[benchmark.name]
            model["sets"][benchmark.name] |= scores.summarise(results)
        model["average"] = statistics.fmean(s["mean"] for s in model["sets"].values())
    if args.compare:
        a, b = (read_folder(f, args.seeds if n in args.model else None) for f, n in zip(folders, args.compare))
        table["compare"] = {"a": args.compare[0], "b": args.compare[1], "resamples": args.resamples}
        table["compare"]["sets"] = scores.compare(a, b, args.resamples, args.seed)
    common.write_atomic(out / ("table.json" if args.model else "compare.json"), json.dumps(table, indent=1) + "\n")
    scores.print_table(table)


if __name__ == "__main__":
    common.run(main)
