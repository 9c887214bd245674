"""Evaluation: Rouge-L, math accuracy, teacher-student distance; mean and spread over seeds; paired comparison of runs.

    python eval.py --model OUT/student --data dolly selfinst vicuna sni unni --no-repeat-ngram-size 6 --template alpaca
    torchrun --nproc_per_node 8 eval.py --model A B --data gsm8k math --compare A B --distance TEACHER

Instruction following is scored as in MiniLLM (arXiv 2306.08543), DistiLLM and DSKD: five sets, sampled at temperature 1,
seeds 10 to 50, Rouge-L F with the stemmer, the best over the references, times 100. Math is scored by math-verify on
greedy responses, in percent; a greedy response needs no second seed, so the first one names its file.
Deviations from MiniLLM's protocol: a prompt is never cut (theirs loses its response marker after 256 tokens): one that
is over the limit is skipped and counted. They forbid repeated 6-grams: here it takes --no-repeat-ngram-size 6. Their
stream of random numbers differs with the number of GPUs; here that of a token depends on its position alone.

Every response is in OUT/eval/<model>/<set>-seed<seed>.jsonl with its score. A file that is there is done, so a killed
run continues. Batches are cut from the order of the prompts: files and table are the same for any number of processes.
"""

import argparse
import functools
import re
import statistics
from pathlib import Path

from lib import benchmarks, decode, measure, models, runs, scoring
from lib.runs import UserError
from warmup_distill import first_mismatch

# What all response files of one OUT/eval have in common
SETTINGS = ("temperature", "top_p", "max_new_tokens", "no_repeat_ngram_size", "batch_size", "dtype", "accept_changes")

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def model_name(path):
    """A model's path or hub id as the name of one folder: out/warmup/student -> out--warmup--student."""
    return re.sub(r"^\.+|[^\w.-]+", "--", str(path).strip("/"))


def read_stored(file, key, count):
    """The `count` rows of a file that was written with `key`, None without one."""
    return runs.read_jsonl(file, key, count) if file.exists() else None


def evaluate(path, sets, args, world, out, checker, teacher):
    """Makes the response and distance files of one model that are missing.

    sets: list of (Benchmark, examples). teacher: () -> the model of --distance, loaded once.
    Returns ({set: its line of the table}, {set: {seed: rows}}), the same on every rank.
    """
    tokenizer, tokens = models.shared_tokenizer(path, None, args.trust_remote_code)  # what ends a response: its own eos
    if args.distance is not None:
        models.shared_tokenizer(path, args.distance, args.trust_remote_code)  # raises an error unless it is one
    model = functools.cache(lambda: models.load_frozen(path, args, world, tokenizer))
    folder, table, results, done = out / model_name(path), {}, {}, 0
    content = str(runs.fingerprint(path))  # of the model as it is trained now
    world.first(lambda: folder.mkdir(parents=True, exist_ok=True))
    for benchmark, examples in sets:
        name, new_tokens = benchmark.name, args.max_new_tokens or (256 if benchmark.metric == "rouge" else 1024)
        limit = models.prompt_limit([path], args.max_prompt_tokens, new_tokens, args.trust_remote_code)
        prompts, skipped = benchmarks.encode(examples, tokenizer, args.template, limit)
        settings = (prompts, tokens, tokenizer, new_tokens, args.batch_size)
        results[name], questions = {}, [(prompt["prompt_id"], prompt["text"], prompt["gold"]) for prompt in prompts]
        key = runs.seal([benchmark.metric, questions], content)
        # A greedy response has no randomness: one seed is enough
        for seed in args.seeds if benchmark.metric == "rouge" else args.seeds[:1]:
            file = folder / f"{name}-seed{seed}.jsonl"
            rows = world.first(functools.partial(read_stored, file, key, len(prompts)))
            done += rows is not None
            if rows is None:
                rows = respond(model(), *settings, benchmark.metric, seed, args, world, checker, file.stem)
                world.first(functools.partial(runs.write_jsonl, file, rows, key))
            results[name][seed] = rows
        table[name] = {"metric": benchmark.metric, "skipped": skipped, "max_prompt_tokens": limit}
        table[name] |= scoring.summarise(results[name])
        if args.distance is not None:
            of = {"teacher": args.distance, "eta": args.eta}
            question = [of, runs.fingerprint(args.distance), args.seeds[0], [prompt["ids"] for prompt in prompts]]
            file = folder / f"{name}-distance-{runs.seal(question, content)}.json"
            rows = world.first(functools.partial(read_stored, file, content, 1))
            if rows is None:
                rows = [measure.distance(model(), teacher(), *settings, args.seeds[0], world, args.eta, first_mismatch)]
                world.first(functools.partial(runs.write_jsonl, file, rows, content))
            table[name]["distance"] = of | rows[0]
    if done:
        world.print(f"{path}: {done} response files were there already")
    return table, results


def respond(model, prompts, tokens, tokenizer, max_new_tokens, batch_size, metric, seed, args, world, checker, title):
    """One scored response to each prompt, of all ranks, in order."""

    def chooser(batch):
        if metric == "math":
            return decode.greedy
        return measure.sampler(batch, seed, world.device, args.temperature, args.top_p, args.no_repeat_ngram_size)

    settings, rows = (tokens, tokenizer, max_new_tokens, batch_size, world, title), []
    for batch, responses, texts in measure.generate(model, prompts, chooser, *settings):
        for prompt, ids, text in zip(batch, responses, texts):
            score, check_failed = scoring.score_response(text, prompt["gold"], metric, checker)
            row = {"prompt_id": prompt["prompt_id"], "prompt": prompt["text"], "response": text, "score": score}
            row |= {"metric": metric, "references": prompt["gold"], "tokens": len(ids)}
            rows.append(row | {"ended": ids[-1] in tokens.eos_ids, "check_failed": check_failed})
    return sorted((row for part in world.gather(rows) for row in part), key=lambda row: row["prompt_id"])


def print_table(table):
    """The table as Markdown, then what it leaves out, then the comparison."""
    details = []
    for number, (model, row) in enumerate(table["models"].items()):
        if number == 0:
            titles = [f"{name} ({scoring.TITLES[s['metric']]})" for name, s in row["sets"].items()]
            print("\n| model | " + " | ".join([*titles, "average"]) + " |\n|" + "---|" * (len(titles) + 2))
        cells = [model]
        for name, s in row["sets"].items():
            cells.append(f"{s['mean']:.2f}" + ("" if s["std"] is None else f" ± {s['std']:.2f}"))
            details.append(
                f"{model}, {name}: {s['examples']} examples, {len(s['seeds'])} seed(s); {s['skipped']} prompts over the "
                f"limit of {s['max_prompt_tokens']} tokens skipped; {s['unfinished']:.1%} of responses cut at the token "
                f"limit; {s['check_failed']} answers scored 0 because their check hung or crashed"
            )
            if "distance" in s:
                columns = [(title, s["distance"].get(c)) for c, title in measure.COLUMNS.items()]
                numbers = [f"{title} {value:.4f}" for title, value in columns if value is not None]
                question = "from {teacher}, eta {eta:g}".format(**s["distance"])
                details.append(f"{model}, {name}, {question}: {', '.join(numbers)}")
        print("| " + " | ".join([*cells, f"{row['average']:.2f}"]) + " |")
    print(*details, sep="\n", end="\n" if details else "")
    if "compare" in table:
        print("\n{b} minus {a}, {resamples} resamples".format(**table["compare"]))
        for name, c in table["compare"]["sets"].items():
            numbers = f"{c['difference']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]"
            favour = f"{c['share']:.1%} of resamples in favour, {c['examples']} examples"
            print(f"{runs.printable(name)}: {numbers}, {favour}")


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="folders or hub ids")
    names = ", ".join(benchmarks.BENCHMARKS)
    parser.add_argument("--data", nargs="+", required=True, help=f"{names}, NAME=FILE or FILE")
    parser.add_argument("--out", default="out", help="results go to OUT/eval")
    runs.add_arguments(parser)
    add = parser.add_argument_group("prompts").add_argument
    add("--metric", choices=["rouge", "math"], help="of files that have none of the known names")
    add("--limit", type=runs.LIMIT, default=0, help="use the first LIMIT rows of each set; 0: all")
    add("--template", choices=["auto", "chat", "alpaca", "none"], default="auto", help="as in training")
    add("--max-prompt-tokens", type=runs.COUNT, default=1024, help="longer ones are skipped, counted")
    add = parser.add_argument_group("decoding; math is greedy").add_argument
    add("--seeds", type=runs.SEED, nargs="+", default=[10, 20, 30, 40, 50], help="a response for each")
    add("--temperature", type=runs.TEMPERATURE, default=1.0, help="of sampling")
    add("--top-p", type=runs.TOP_P, default=1.0, help="of sampling")
    add("--max-new-tokens", type=runs.LIMIT, default=0, help="0: 256, and 1024 for math")
    ngram = runs.ranged(int, lambda x: x == 0 or x >= 2, "0, or 2 or more")
    add("--no-repeat-ngram-size", type=ngram, default=0, help="never sample an n-gram twice; 0: off, MiniLLM: 6")
    add("--batch-size", type=runs.COUNT, default=32, help="prompts decoded at once by one process")
    add = parser.add_argument_group("comparisons").add_argument
    add("--compare", nargs=2, metavar=("A", "B"), default=[], help="two of --model")
    add("--resamples", type=runs.COUNT, default=10_000, help="of the paired bootstrap, from --seed")
    add("--distance", metavar="TEACHER", help="measure each model's distance from this one")
    add("--eta", type=runs.NATS, default=4.0, help="threshold of the margin log q - log p, nats")
    args = parser.parse_args(argv)
    if not set(args.compare) <= set(args.model):
        parser.error(f"--compare is {' '.join(args.compare)}: name two of --model")
    check_once("--model", [model_name(path) for path in args.model])
    check_once("--seeds", args.seeds)
    return args


def check_once(flag, values):
    """Raises UserError where a flag has a value twice."""
    if len(set(values)) < len(values):
        raise UserError(f"{flag} is {' '.join(map(str, values))}", "on the command line", "give each only once")


def main(argv=None):
    args = parse_args(argv)
    world, out = runs.start_processes(args.device, args.threads), Path(args.out) / "eval"
    found = [benchmarks.find(spec, args.metric) for spec in args.data]
    check_once("--data", [benchmark.name for benchmark in found])
    sets = [(benchmark, benchmarks.load(benchmark, args.limit)) for benchmark in found]
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings["dtype"] = str(models.compute_dtype(args.dtype, world.device)).removeprefix("torch.")
    runs.start_run(out, argparse.Namespace(**settings), world)

    @functools.cache
    def teacher():
        tokenizer = models.load_tokenizer(args.distance, args.trust_remote_code)
        return models.load_frozen(args.distance, args, world, tokenizer)

    checker, table, results = scoring.AnswerChecker(), {"models": {}}, {}
    for path in args.model:
        lines, results[path] = evaluate(path, sets, args, world, out, checker, teacher)
        table["models"][path] = {"sets": lines, "average": statistics.fmean(s["mean"] for s in lines.values())}
    checker.close()
    if world.rank > 0:
        return
    if args.compare:
        a, b = args.compare
        table["compare"] = {"a": a, "b": b, "resamples": args.resamples}
        table["compare"]["sets"] = scoring.compare(results[a], results[b], args.resamples, args.seed)
    runs.write_json(out / "table.json", table, indent=1)
    print_table(table)


if __name__ == "__main__":
    runs.run(main)
