"""eval.py and lib/measure.py: every number counted again, files that no process count changes, what is refused."""

import random
import shutil

import pytest
import torch
from conftest import launch, make_model
from safetensors.torch import load_file, save_file
from test_data import byte_tokenizer
from test_scoring import GSM8K_ROWS, minillm_row

import eval as evaluation
from lib import decode, measure, models, runs, scoring
from lib.runs import UserError
from warmup_distill import first_mismatch

# ---------------------------------------------------------------------------------------------------------------------
# Decoding and distance
# ---------------------------------------------------------------------------------------------------------------------


def run_decode(model, prompts, choose, budget, eos=2):
    tokens = decode.Tokens(0, [eos], 22)
    return decode.decode(model, decode.prefill(model, prompts, tokens), choose, torch.tensor(budget), tokens)[0]


@pytest.mark.parametrize("size", [0, 2, 3])
def test_no_repeat_ngram_is_transformers_rule(size):
    """Greedy responses of unequal prompts and budgets are those of generate(), whose reach into the prompt included."""
    model, noise, budget = make_model("llama", 3), random.Random(0), [60, 60, 20, 40]
    prompts = [[noise.randrange(4, 22) for _ in range(n)] for n in (1, 5, 30, 12)]
    choose = measure.no_repeat_ngram(decode.greedy, prompts, size) if size else decode.greedy
    options = {"max_new_tokens": 60, "do_sample": False, "no_repeat_ngram_size": size, "eos_token_id": None}
    theirs = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    ours = run_decode(model, prompts, choose, budget, eos=999)
    assert ours == [response[:n] for response, n in zip(theirs, budget)]
    assert size or all(len(set(zip(r, r[1:], r[2:]))) < len(r) - 2 for r in ours), "they no longer repeat a 3-gram"


ETA, SEED = 1.0, 10
PROMPTS = [{"prompt_id": k, "ids": [1, *range(4, 5 + 2 * k)]} for k in range(5)]


@pytest.fixture
def distance(tokenizer):
    """distance(student, teacher, the rule) of 12 tokens, prompts by twos."""

    def run(student, teacher, rule=first_mismatch):
        settings = (PROMPTS, decode.Tokens(0, [2], 22), tokenizer, 12, 2, SEED)
        return measure.distance(student, teacher, *settings, runs.start_processes("cpu", 1), ETA, rule)

    return run


def test_distance_against_whole_forwards(distance, plain_models):
    """A slow twin: the same samples, one at a time and without a cache; KL as sums over the vocabulary, in float64."""
    result, wanted = distance(*plain_models), dict.fromkeys(("forward", "reverse", "above", "samples"), 0.0)
    tokens = 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt["prompt_id"]])
        choose = decode.sampler(SEED, decode.EVAL_STAGE, ids, ids * 0, ids * 0)
        response = run_decode(plain_models[0], [prompt["ids"]], choose, [12])[0]
        whole, first = torch.tensor([prompt["ids"] + response]), len(prompt["ids"]) - 1
        with torch.no_grad():
            q, p = (m(whole).logits[0, first:-1, :22].double().softmax(-1) for m in plain_models)
        margins = [(q[t, y] / p[t, y]).log().item() for t, y in enumerate(response)]
        cells = [(t, v) for t in range(len(response)) for v in range(22)]
        wanted["forward"] += sum((p[t, v] * (p[t, v] / q[t, v]).log()).item() for t, v in cells)
        wanted["reverse"] += sum((q[t, v] * (q[t, v] / p[t, v]).log()).item() for t, v in cells)
        wanted["above"] += sum(m > ETA for m in margins)
        wanted["samples"] += any(m > ETA for m in margins)
        tokens += len(response)
    assert 0 < wanted["above"] < tokens
    assert result["kl_teacher_student"] == pytest.approx(wanted["forward"] / tokens, rel=1e-4)
    assert result["kl_student_teacher"] == pytest.approx(wanted["reverse"] / tokens, rel=1e-4)
    assert result["replaced_tokens"] == pytest.approx(wanted["above"] / tokens)
    assert result["replaced_samples"] == pytest.approx(wanted["samples"] / len(PROMPTS))
    assert result["response_tokens"] == pytest.approx(tokens / len(PROMPTS))


@pytest.mark.parametrize("t_star, share", [(-1, 0.0), (0, 1.0)])
def test_the_rule_is_an_argument(distance, plain_models, t_star, share):
    """It is asked once a response, with log-probs (1, T), mask and eta; it decides replaced_samples and nothing else."""
    asked = []

    def rule(student_logprobs, teacher_logprobs, mask, eta):
        assert student_logprobs.shape == teacher_logprobs.shape == mask.shape and mask.all()
        asked.append((len(mask), eta))
        return torch.tensor([t_star])

    found, usual = distance(*plain_models, rule), distance(*plain_models)
    assert found == usual | {"replaced_samples": share} and asked == [(1, ETA)] * len(PROMPTS)


@pytest.mark.parametrize("which", [0, 1])
def test_distance_with_a_nan_names_the_prompt(distance, plain_models, which):
    """A token that is in prompt 4 alone has a NaN embedding; EOS comes first, so that it is in no response."""
    model = plain_models[which]
    model.base_model.embed_tokens.weight = torch.nn.Parameter(model.base_model.embed_tokens.weight.clone())
    model.base_model.embed_tokens.weight.data[12] = torch.nan
    ends = lambda logits, indices, step: torch.full_like(indices, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="NaN or infinite, for prompt 4, use"):
        patch.setattr(measure, "sampler", lambda *_: ends)
        distance(*plain_models)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """Two random models that can read English, and a file for each of two sets."""
    root, tokenizer = tmp_path_factory.mktemp("english"), byte_tokenizer(False)
    for name, seed in (("a", 1), ("b", 2)):
        make_model("llama", seed, rows=len(tokenizer), max_position_embeddings=1024).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [minillm_row(f"Say {k}", [f"{k}", f"number {k}"]) for k in range(1, 8)]
    runs.write_jsonl(root / "sni.jsonl", [minillm_row("x" * 500, "x"), *rows])  # the first is over the limit
    runs.write_jsonl(root / "gsm8k.jsonl", GSM8K_ROWS)
    return root


def command(english, out, *more, models="ab"):
    paths = " ".join(str(english / name) for name in models)
    flags = f"--model {paths} --data sni={english}/sni.jsonl gsm8k={english}/gsm8k.jsonl --threads 1 --device cpu"
    sizes = f"--max-new-tokens 12 --batch-size 2 --max-prompt-tokens 400 --seeds 10 20 --out {out}"
    return " ".join([flags, sizes, *map(str, more)]).split()


def whole_command(english, out):
    """With a distance and a comparison."""
    return command(english, out, f"--distance {english}/b --compare {english}/a {english}/b --resamples 200")


def files_of(out):
    """{name: content} of what is in OUT, but for args.json, which names OUT."""
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.name != "args.json"]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def one_process(english, tmp_path_factory):
    """OUT of a whole command in one process."""
    out = tmp_path_factory.mktemp("one")
    evaluation.main(whole_command(english, out))
    return out


def test_files_and_table(one_process, english):
    """Every number of the table is counted again from the response files."""
    table = runs.read_json(one_process / "eval/table.json")
    assert list(table["models"]) == [str(english / "a"), str(english / "b")]
    for path, model in table["models"].items():
        means = {"sni": {}, "gsm8k": {}}
        files = sorted((one_process / "eval" / evaluation.model_name(path)).glob("*.jsonl"))
        assert [f.name for f in files] == ["gsm8k-seed10.jsonl", "sni-seed10.jsonl", "sni-seed20.jsonl"]
        for file in files:
            name, seed = file.stem.split("-seed")
            rows = runs.read_jsonl(file)
            assert [row["prompt_id"] for row in rows] == list({"sni": range(1, 8), "gsm8k": range(3)}[name])
            for k, row in enumerate(rows, rows[0]["prompt_id"]):
                references = [f"{k}", f"number {k}"] if name == "sni" else [GSM8K_ROWS[k]["answer"]]
                assert row["references"] == references and row["prompt"].endswith("### Response:\n")
                assert name != "sni" or row["score"] == scoring.rouge_l(row["response"], references)
                assert row["ended"] or row["tokens"] == 12
            means[name][seed] = sum(row["score"] for row in rows) / len(rows)
        for name, seeds in means.items():
            summary, values = model["sets"][name], list(seeds.values())
            assert summary["seeds"] == pytest.approx(seeds)
            assert summary["mean"] == pytest.approx(sum(values) / len(values))
            spread = pytest.approx(abs(values[0] - values[-1]) / 2**0.5) if name == "sni" else None  # n - 1 = 1
            assert summary["std"] == spread and summary["skipped"] == {"sni": 1, "gsm8k": 0}[name]
        assert model["average"] == pytest.approx(sum(s["mean"] for s in model["sets"].values()) / 2)
    a, b = (model["sets"]["sni"] for model in table["models"].values())
    assert a["distance"]["kl_student_teacher"] > 0 == b["distance"]["kl_student_teacher"]
    assert table["compare"]["sets"]["sni"]["difference"] == pytest.approx(b["mean"] - a["mean"])


def test_two_processes_write_the_same_bytes(one_process, english, tmp_path):
    """Response files, distances, comparison and table; 4 and 2 batches over 2 processes."""
    done = launch(2, "eval.py", *whole_command(english, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert files_of(one_process) == files_of(tmp_path / "two")
    assert "| model | sni (Rouge-L) | gsm8k (accuracy) | average |" in done.stdout
    assert "sni: 7 examples, 2 seed(s); 1 prompts over the limit of 400 tokens skipped" in done.stdout


def test_a_killed_run_goes_on(one_process, english, monkeypatch, capsys):
    """A file that is there is not made again, and is announced; one that is missing is made, with the same content."""
    before, made, respond = files_of(one_process), [], evaluation.respond
    (one_process / "eval" / evaluation.model_name(english / "b") / "sni-seed20.jsonl").unlink()
    monkeypatch.setattr(evaluation, "respond", lambda *args: made.append(args[-1]) or respond(*args))
    evaluation.main(whole_command(english, one_process))
    printed = capsys.readouterr().out
    assert made == ["sni-seed20"] and files_of(one_process) == before
    assert f"{english}/a: 3 response files were there already" in printed
    assert f"{english}/b: 2 response files were there already" in printed
    monkeypatch.setattr(models, "load_model", None)  # nothing to do: no model is loaded
    evaluation.main(whole_command(english, one_process))
    assert files_of(one_process) == before


def test_seeds_differ_and_greedy_does_not_depend_on_them(one_process, english, tmp_path):
    """One model alone, without a distance: the same response files."""
    evaluation.main(command(english, tmp_path, models="a"))
    name = evaluation.model_name(english / "a")
    assert files_of(tmp_path / "eval" / name).items() <= files_of(one_process / "eval" / name).items()
    ten, twenty = (runs.read_jsonl(tmp_path / "eval" / name / f"sni-seed{s}.jsonl") for s in (10, 20))
    assert [row["response"] for row in ten] != [row["response"] for row in twenty]


@pytest.mark.parametrize("name", ["sni", "gsm8k"])
def test_a_nan_names_the_prompt(english, tmp_path, name):
    """One character, in no earlier prompt, has a NaN embedding. No response file is written, sampled or greedy."""
    shutil.copytree(english / "a", folder := tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    character, prompt_id = {"sni": ("2", 2), "gsm8k": (",", 1)}[name]
    weights["model.embed_tokens.weight"][byte_tokenizer(False).convert_tokens_to_ids(character)] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    argv = f"--model {folder} --data {name}={english}/{name}.jsonl --out {tmp_path}/out --threads 1 --device cpu"
    with pytest.raises(UserError, match=f"a model's output is NaN or infinite, for prompt {prompt_id}, use"):
        evaluation.main([*argv.split(), "--max-new-tokens", "1"])
    assert not list(tmp_path.glob("out/eval/*/*.jsonl"))


def test_results_of_something_else_are_refused(one_process, english):
    """Other settings, other prompts, or a model trained since: never scored as if they were this run's."""
    weights = english / "a" / "model.safetensors"
    for flags, message in (
        ("--temperature 0.5", "temperature: 1.0 there, 0.5 now"),
        ("--limit 2", "of another run, model or data"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.main(command(english, one_process, flags))
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + bytes(4))  # trained further, at the same time
    with pytest.raises(
        UserError, match="the line was changed, or is of another run, model or data, in .* line 1, delete"
    ):
        evaluation.main(command(english, one_process))
    weights.write_bytes(before)


def test_damaged_results_are_refused(one_process, english, tmp_path):
    """A distance that was edited."""
    out = shutil.copytree(one_process, tmp_path / "out")
    file = next((out / "eval").glob("*/*-distance-*.json"))
    file.write_text(file.read_text().replace('"kl_teacher_student": ', '"kl_teacher_student": 1'))
    with pytest.raises(UserError, match="the line was changed, .*-distance-.* line 1, delete"):
        evaluation.main(whole_command(english, out))


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--model m", "required: --data"),
        ("--data dolly --compare a b", "required: --model"),
        ("--model m --data dolly --compare m n", "--compare is m n: name two of --model, on the command line"),
        ("--model m --data dolly dolly", "--data is dolly dolly"),
        ("--model m m --data dolly", "--model is m m"),
        ("--model m --data dolly --seeds 1 1", "--seeds is 1 1"),
        (f"--model m --data dolly --seeds {2**64}", f"argument --seeds: {2**64} is not"),
    ],
)
def test_bad_flags_are_refused(argv, message):
    """Ranges of single flags are in test_errors.py."""
    with pytest.raises(UserError, match=message):
        evaluation.main(argv.split())


def test_a_context_too_short_is_refused(english, tmp_path):
    with pytest.raises(UserError, match="leave no room for a prompt"):
        evaluation.main(command(english, tmp_path, "--max-new-tokens", 1024))
