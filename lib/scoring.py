"""Scores of one response (Rouge-L, the answer of a math problem) and statistics of many: spread, paired comparison.

rouge_score and math_verify are imported where they are used: training takes `is_correct` from here without them.
"""

import functools
import itertools
import logging
import math
import multiprocessing
import re
import resource
import statistics

import torch

from lib.runs import UserError

TITLES = {"rouge": "Rouge-L", "math": "accuracy"}

# ---------------------------------------------------------------------------------------------------------------------
# One response
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(response, references):
    """100 times the Rouge-L F measure of a response, the best over a list of references."""
    return 100 * max(rouge_scorer().score(reference, response)["rougeL"].fmeasure for reference in references)


FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")


def answer_of(text):
    r"""The part of a text that states its answer: the last \boxed{...}, else the line after the last ####, else all."""
    text = text.replace("\\$", "").replace("\\!", "").replace("{,}", ",")  # dollars, and two ways to write 1,000
    boxed = list(re.finditer(r"\\f?box(?:ed)?\s*", text))
    if boxed:
        rest, depth = text[boxed[-1].end() :], 0
        if not rest.startswith("{"):
            return "$" + re.split(r"[$\s]", rest)[0] + "$"
        for brace in re.finditer(r"(?<!\\)[{}]", rest):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return f"${rest[1 : brace.start()]}$"
        return ""  # the response ended inside its box
    return text.rpartition("####")[2].strip().split("\n")[0] if "####" in text else text


def final_number(text):
    r"""The last number in a text as a float, or None: "1,000" is 1000, "= 18.0" is 18, "$18" is 18, "\frac12" is 0.5.

    None, too, where the last digits are part of a formula, as in "\sqrt{2}", "4^2" and "3\frac12". Cheap: for training.
    """
    text = FRACTION.sub(lambda m: f" {m[1]}{m[2] or m[3]}/{m[4] or m[5]} ", text)
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    before, after = text[: found[-1].start()][-20:], text[found[-1].end() :]
    if re.search(r"([\^_{]|\\[A-Za-z]+)$", before) or re.match(r"\^|\s*\\(pi|sqrt|frac|cdot|times)", after):
        return None
    top, _, bottom = found[-1][0].replace(",", "").partition("/")
    top, bottom = float(top), float(bottom or 1)  # a looping model's thousand digits are inf here, never an exception
    if not (math.isfinite(top) and 0 < bottom < math.inf) or ("/" in found[-1][0] and re.search(r"\d\s+$", before)):
        return None
    return top / bottom


def is_correct(response, gold):
    """Whether a response's answer is the same number as the gold response's. Cheap: for use in training."""
    answer = final_number(answer_of(response))
    return answer is not None and answer == final_number(answer_of(gold))


def same_answer(response, gold):
    """Whether math-verify finds the response's answer equal to the gold one. May hang, and may take the process along."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off
    read = lambda text: parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
    answer, wanted = (answer_of(text).strip() for text in (response, gold))
    return bool(answer) and verify(read(wanted), read(answer), timeout_seconds=None)


def verdict(compare, response, gold):
    """compare(response, gold) as True or False, or None if it raises."""
    try:
        return bool(compare(response, gold))
    except ImportError:
        raise
    except Exception:  # noqa: BLE001 - any error concerns this example alone
        return None


class AnswerChecker:
    """`same_answer` in a process of its own: one that hangs or crashes costs one example, and a new process follows.

    math-verify's own limit is an alarm signal, which waits for as long as one big-number operation takes.
    """

    def __init__(self, compare=same_answer, seconds=10.0, memory=8 << 30):
        self.compare, self.seconds, self.memory = compare, seconds, memory
        self.process = None  # a pool of one

    def close(self):
        if self.process is not None:
            self.process.terminate()
            self.process = None

    def __call__(self, response, gold):
        """True or False, or None if there is no answer within `seconds`, as after a crash."""
        try:
            if self.process is None:
                context = multiprocessing.get_context("spawn")  # a fork would inherit locks and GPU handles
                # An answer like 2^10000000000 is then a MemoryError, and not the machine's end
                limit = [resource.RLIMIT_DATA, (self.memory, self.memory)]
                self.process = context.Pool(1, resource.setrlimit, limit)
                self.process.apply_async(verdict, [self.compare, "", ""]).get(60)  # its imports do not count
            return self.process.apply_async(verdict, [self.compare, response, gold]).get(self.seconds)
        except multiprocessing.TimeoutError:
            self.close()
            return None


def score_response(response, references, metric, checker):
    """(score in 0..100, whether the checker failed on it): the best over the references."""
    if metric == "rouge":
        return rouge_l(response, references), False
    verdicts = [checker(response, gold) for gold in references]
    return 100.0 * any(verdicts), None in verdicts and not any(verdicts)


# ---------------------------------------------------------------------------------------------------------------------
# Many responses
# ---------------------------------------------------------------------------------------------------------------------


def paired_bootstrap(differences, resamples, seed):
    """Means of `differences` over resamples of its examples, drawn with replacement (Koehn, EMNLP 2004).

    differences: (N,), score of B minus score of A on the same example. Returns (resamples,) float64: what the mean
    difference might have been with N other examples. A pure function of its arguments; at most 2^22 draws exist at once.
    """
    differences = differences.double()
    generator = torch.Generator().manual_seed(seed)
    size, means = len(differences), []
    rows = max(1, (1 << 22) // size)
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), size)
        means.append(differences[torch.randint(size, shape, generator=generator)].mean(-1))
    return torch.cat(means)


def interval(difference, means):
    """The observed difference, the 95% interval of resampled ones, and the share of them above 0 (a tie counts half)."""
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    share = ((means > 0).double() + 0.5 * (means == 0)).mean().item()
    return {"difference": difference, "low": low, "high": high, "share": share}


def example_scores(results):
    """{seed: rows} of one set -> {prompt_id: its mean score over the seeds}."""
    scores = {}
    for row in itertools.chain(*results.values()):
        scores.setdefault(row["prompt_id"], []).append(row["score"])
    return {prompt_id: statistics.fmean(values) for prompt_id, values in scores.items()}


def compare(a, b, resamples, seed):
    """Paired comparison of two models' results, each {set: {seed: rows}} of one run: B minus A, per set and over all sets.

    An example's score is its mean over seeds. "all" is the mean over sets of the sets' means; it is resampled within
    each set (stratified), so that no resample has more of one set than another.
    """
    results, strata = {}, []
    for k, name in enumerate(sorted(a)):
        scores_a, scores_b = example_scores(a[name]), example_scores(b[name])
        both = sorted(scores_a.keys() & scores_b.keys())  # a prompt too long for one model's tokenizer is in neither
        if not both:
            raise UserError(f"no prompt of {name} fits both models", "in --compare", "raise --max-prompt-tokens")
        differences = torch.tensor([scores_b[i] - scores_a[i] for i in both], dtype=torch.float64)
        means = paired_bootstrap(differences, resamples, seed + k)  # another seed: strata are independent
        results[name] = {"examples": len(both), **interval(differences.mean().item(), means)}
        strata.append(means)
    observed = statistics.fmean(result["difference"] for result in results.values())
    examples = sum(result["examples"] for result in results.values())
    return results | {"all": {"examples": examples, **interval(observed, torch.stack(strata).mean(0))}}


def summarise(results):
    """{seed: rows} -> means per seed, their mean and standard deviation (n - 1; None for one seed), and counts."""
    seeds = {seed: statistics.fmean(row["score"] for row in rows) for seed, rows in results.items()}
    rows = [row for rows in results.values() for row in rows]
    return {
        "mean": statistics.fmean(seeds.values()),
        "std": statistics.stdev(seeds.values()) if len(seeds) > 1 else None,
        "seeds": seeds,
        "examples": len(rows) // len(seeds),
        "unfinished": sum(not row["ended"] for row in rows) / len(rows),
        "check_failed": sum(row["check_failed"] for row in rows),
    }
