"""Processes, for real: torchrun, gloo on the CPU, FSDP2. The number of processes changes no result, nor does a kill.

Four launches of workers.py, with 2, without torchrun (0), with 3 and with 8, do most of the jobs; the tests read their
folders.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_identical, launch, logged, weights
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from lib import runs, training

BETA = 0.1
SHARED = "--batch-size 6 --micro-batch-size 1 --threads 1 --device cpu"
PAIRS = "--samples 4 --max-new-tokens 10 --prompts-per-batch 4 --limit 14 --eta 1.5 --eval-limit 0 --max-steps 1"
FEW = "--samples 4 --max-new-tokens 10 --prompts-per-batch 4 --limit 6 --eta 1.5 --eval-limit 6 --max-steps 1"
TURNS = "--samples 1 --max-new-tokens 6 --prompts-per-batch 1 --limit 7 --eta 4 --eval-limit 0 --max-steps 1"
TRAIN = "--epochs 3 --lr 1e-3 --save-every 2"  # 10 pairs, 6 of them a step: 6 steps, three checkpoints
# name -> policy, reference, number of pairs, flags. Steps are of 6 + 1 or 6 + 4 pairs: ranks without a pair, or with
# fewer micro-batches than others. --micro-batch-size 1 accumulates (6 times with one process), 6 does not
GRADIENTS = {
    "sum": ("student", "teacher", 7, "--micro-batch-size 1 --label-smoothing 0.1"),
    "nll": ("student", "teacher", 10, "--micro-batch-size 6 --nll-weight 0.5"),
    "mean": ("teacher", "student", 10, "--micro-batch-size 1 --logprobs mean"),
    "checkpointed": ("student", "teacher", 7, "--micro-batch-size 1 --label-smoothing 0.1 --activation-checkpointing"),
}
# 24 divides by 1, 2, 3 and 8: one step an epoch of 10 pairs or 14 examples, and most of 8 ranks have one or none
EIGHT = "--batch-size 24 --epochs 4 --lr 1e-3"
KD = "--mode teacher --loss reverse_kl --max-new-tokens 12 --prompts-per-batch 3 --limit 14 --eval-limit 0 --save-every 2"
# 13 examples, 6 a step: the third step's one leaves a rank without an example. The teacher writes 5 files of responses of
# unlike lengths, the last one on one rank alone
KD_SHORT = "--limit 13 --max-steps 3 --max-new-tokens 40 --prompts-per-batch 3"
KD_MODES = {
    "kd-teacher": "--mode teacher --teacher-decoding sample",
    "kd-student": "--mode student --on-policy 0.6 --refresh-every 2",
    "kd-cache": "--teacher-top-k 5",
}
APPEND, STOPPED = "lib.runs.append_jsonl", 128 + signal.SIGTERM
# Where a training run is killed, one after the other; each time it is started again. (function, words in its arguments)
DEATHS = [
    ("os.replace", "pairs.arrow"),  # the pairs are written, not yet renamed
    (APPEND, "'step': 2,"),  # before any checkpoint
    ("lib.training.HuggingFaceStorageWriter", "step-000002"),  # on rank 1; rank 0 begins to write
    ("os.rename", "checkpoint/step-000002"),  # the checkpoint is written, not yet renamed
    (APPEND, "'step': 4,"),  # one step after a checkpoint
    ("os.rename", "checkpoint/step-000004"),
    ("shutil.rmtree", "checkpoint/step-000002"),  # two checkpoints are there
    ("os.rename", "broken/student"),  # the model is written, not yet renamed
]


def make_pairs(count):
    """Random pairs of unequal lengths: nothing shared, some tokens shared, one response the beginning of the other."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda low, high: torch.randint(3, 16, (int(torch.randint(low, high, (), generator=draw)),), generator=draw)
    pairs = []
    for i in range(count):
        prompt, shared, chosen, rejected = (ids(*span).tolist() for span in ((1, 9), (0, 5), (1, 12), (1, 12)))
        shared, chosen = ([] if i % 4 == 0 else shared), (shared + [5] if i % 4 == 1 else chosen)
        rejected = chosen + rejected if i % 4 == 1 else rejected
        pairs.append({"prompt_ids": prompt, "chosen_ids": shared + chosen, "rejected_ids": shared + rejected})
    return pairs


def die(at, call, **more):
    """What makes a job of workers.py die."""
    return {"die": {"at": at, "call": call, **more}}


class Jobs:
    """Folders of the jobs: root/PROCESSES/NAME."""

    def __init__(self, root, models, prompts_file):
        self.root, self.models, self.prompts_file = root, models, prompts_file
        self.jobs, self.codes, self.process = {}, {}, {}
        for count in (7, 10):
            runs.write_jsonl(root / f"pairs-{count}.jsonl", make_pairs(count))
        long = "123456789+123456789:"
        rows = [{"prompt": prompt, "response": "3"} for prompt in ("1+2:", long, "199+877:", long, long)]
        runs.write_jsonl(root / "long.jsonl", rows)

    def method(self, name, flags, main="warmup_distill", data=None, **extra):
        """A job of warmup_distill.py or kd.py."""
        argv = ["--teacher", self.models["teacher"], "--student", self.models["student"]]
        argv += ["--data", str(data or self.prompts_file), *f"--template none --lr 1e-3 {SHARED} {flags}".split()]
        return name, {"main": main, "argv": argv, **extra}

    def dpo(self, name, flags, policy="student", reference="student", count=10, **extra):
        """A job of dpo.py."""
        argv = ["--model", self.models[policy], "--reference", self.models[reference]]
        argv += ["--pairs", str(self.root / f"pairs-{count}.jsonl"), *f"{SHARED} {flags}".split()]
        return name, {"main": "dpo", "argv": argv, **extra}

    def plan(self, n):
        """(name, job) for `n` processes, in order; several jobs of one name share a folder."""
        yield self.method("pairs", PAIRS + (" --batch-size 24" if n == 8 else ""))
        yield self.dpo("eight", EIGHT)
        yield self.method("eight-kd", f"{KD} {EIGHT}", "kd")
        if n == 8:
            return
        for name, (policy, reference, count, flags) in GRADIENTS.items():
            yield self.dpo(name, flags, policy, reference, count, record=True)
        for name, flags in KD_MODES.items() if n != 3 else ():
            flags += f" --teacher-cache {self.root}/{n}/cache" if name == "kd-cache" else " --shard-teacher" * (n == 2)
            yield self.method(name, f"{KD_SHORT} {flags}", "kd")
        yield self.dpo("train", TRAIN)
        # Begun with 2 processes, continued with 1, ended with 3
        step = {2: 3, 0: 5, 3: None}[n]
        yield self.dpo("chain", TRAIN, **(die(APPEND, f"'step': {step},") if step else {}))
        if n != 3:  # rank 0 alone is told to stop, at steps that are none of --save-every
            yield self.dpo("stopped", TRAIN, **die(APPEND, "'step': 3,", signal=int(signal.SIGTERM)))
            yield self.dpo("stopped", TRAIN, **die(APPEND, "'step': 5,", signal=int(signal.SIGINT)))
            yield self.dpo("stopped", TRAIN)
        if n != 2:  # with 2 processes it is a test of the command itself
            yield self.method("few", FEW)
        if n > 0:
            yield self.method("turns", TURNS)
            yield self.method("turns-sharded", TURNS + " --shard-teacher")
        if n == 2:
            yield self.method("no-pair", TURNS + " --shard-teacher --eta 100")
            for name, flag in (("long", ""), ("long-sharded", " --shard-teacher")):
                yield self.method(name, f"{TURNS} --max-prompt-tokens 12{flag}", data=self.root / "long.jsonl")
            yield self.dpo("bfloat16", TRAIN + " --dtype bfloat16")
            for at, call in DEATHS:
                yield self.dpo("broken", TRAIN, **die(at, call, **({"rank": 1} if at.endswith("Writer") else {})))
            yield self.dpo("broken", TRAIN)
            for file in ("pairs/00001.jsonl", "pairs/00003.jsonl", "/mismatch.json"):
                yield self.method("pairs-broken", PAIRS, **die("os.replace", file))
            yield self.method("pairs-broken", PAIRS)

    def start(self, n):
        self.jobs[n] = list(self.plan(n))
        for name, job in self.jobs[n]:
            job["argv"] += ["--out", str(self.root / str(n) / name)]
        file = self.root / f"jobs-{n}.json"
        file.write_text(json.dumps([job for _, job in self.jobs[n]]))
        begun = {0: 2, 3: 0}.get(n)
        if begun is not None:
            shutil.copytree(self.root / str(begun) / "chain", self.root / str(n) / "chain")
        self.process[n] = launch(n, "tests/workers.py", file, env={"PYTHONPATH": str(ROOT)})
        assert self.process[n].returncode == 0, self.process[n].stderr[-5000:]
        ranks = [json.loads((self.root / f"{file.name}.{rank}").read_text()) for rank in range(max(n, 1))]
        self.codes[n] = list(zip(*ranks))

    def out(self, n, name):
        """The folder of a job, after a look at the exit statuses of all who worked in it."""
        for number, ((job_name, job), codes) in enumerate(zip(self.jobs[n], self.codes[n], strict=True)):
            if job_name == name:
                stderr = self.process[n].stderr.split("--- job ")[number + 1]
                if "die" not in job:
                    assert set(codes) == {0}, stderr
                elif "signal" in job["die"]:
                    assert set(codes) == {STOPPED}, stderr
                else:
                    assert -signal.SIGKILL in codes and 0 not in codes, stderr
        return self.root / str(n) / name


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, pair_of_models, prompts_file):
    jobs = Jobs(tmp_path_factory.mktemp("distributed"), pair_of_models, prompts_file)
    for n in (2, 0, 3, 8):
        jobs.start(n)
    return jobs


def distance(a, b):
    """|a - b| / |b| over all tensors of two dicts."""
    assert a.keys() == b.keys()
    square = lambda values: sum(v.double().square().sum().item() for v in values)
    return (square(a[k] - b[k] for k in b) / square(b.values())) ** 0.5


def pair_files(out):
    """The files that must not depend on processes or kills: name -> bytes."""
    names = ["pairs.jsonl", "mismatch.json", *sorted(str(f.relative_to(out)) for f in out.glob("pairs/*.jsonl"))]
    return {name: (out / name).read_bytes() for name in names}


def assert_same_table(ours, alone):
    ours, alone = (runs.read_json(out / "summary.json") for out in (ours, alone))
    for name in ("teacher", "student before", "student after"):
        assert ours[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)


def assert_same_training(ours, alone, models, steps):
    """Losses, and what is added to the student's weights, to float32 rounding."""
    assert [row["step"] for row in logged(alone)] == list(range(1, steps + 1))
    for row, expected in zip(logged(ours), logged(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    start = load_file(models["student"] + "/model.safetensors")
    update, expected = ({k: w[k] - start[k] for k in start} for w in (weights(ours), weights(alone)))
    assert all(v.abs().max() > 1e-4 for v in expected.values())
    assert distance(update, expected) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The number of processes changes nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8])
def test_pairs_are_identical(jobs, n):
    """Byte for byte, in four files and what is made of them."""
    alone = pair_files(jobs.out(0, "pairs"))
    assert len(alone) == 6 and alone["pairs.jsonl"].count(b"\n") > 10
    assert pair_files(jobs.out(n, "pairs")) == alone


def test_fewer_micro_batches_than_processes(jobs):
    """Two micro-batches of prompts for three processes: the same files, and the same closing table."""
    alone, ours = jobs.out(0, "few"), jobs.out(3, "few")
    assert len(pair_files(alone)) == 4 and pair_files(ours) == pair_files(alone)
    assert_same_table(ours, alone)


def plain_gradients(policy, reference, pairs, vocab_size, flags):
    """The obvious loop on plain models in float64: one sequence at a time, nothing shared, nothing sharded."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).double() for path in (policy, reference))
    value = lambda flag, default: float(flags.split(flag)[1].split()[0]) if flag in flags else default
    epsilon, nll_weight = value("--label-smoothing", 0), value("--nll-weight", 0)
    losses, nlls, chosen_tokens = [], [], 0
    for pair in pairs:

        def logp(model, response, prompt=pair["prompt_ids"]):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
            return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()

        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        scale = [len(chosen), len(rejected)] if "--logprobs mean" in flags else [1, 1]
        with torch.no_grad():
            base = logp(reference, chosen) / scale[0] - logp(reference, rejected) / scale[1]
        policy_chosen = logp(policy, chosen)
        z = BETA * (policy_chosen / scale[0] - logp(policy, rejected) / scale[1] - base)
        losses.append(-(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z))
        nlls.append(-policy_chosen)
        chosen_tokens += len(chosen)
    loss = sum(losses) / len(pairs) + nll_weight * sum(nlls) / chosen_tokens
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.fixture(scope="module")
def plain(pair_of_models, tokenizer):
    """name -> for each step: the loss and gradients of the plain loop."""
    result = {}
    for name, (policy, reference, count, flags) in GRADIENTS.items():
        pairs, models = make_pairs(count), (pair_of_models[policy], pair_of_models[reference])
        batches = [training.batch_of_step(step, count, 6, 0) for step in range(2)]
        assert sorted(batches[0] + batches[1]) == list(range(count))
        result[name] = [plain_gradients(*models, [pairs[i] for i in b], len(tokenizer), flags) for b in batches]
    return result


@pytest.mark.parametrize("n", [0, 2, 3])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_plain_loop(jobs, plain, name, n):
    """What reaches the optimizer, before clipping: relative 1e-5 in every tensor, whatever the ranks had to do."""
    out = jobs.out(n, name)
    steps = torch.load(out / "gradients.pt")
    assert len(steps) == len(plain[name]) == 2
    for step, row, (loss, expected) in zip(steps, logged(out), plain[name]):
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert {key.removeprefix("lm.") for key in step} == expected.keys()
        for key, gradient in expected.items():
            assert distance({key: step["lm." + key].double()}, {key: gradient}) < 1e-5, key


@pytest.mark.parametrize(
    "name, n, steps",
    [("train", 2, 6), ("train", 3, 6), *[(name, n, 4) for name in ("eight", "eight-kd") for n in (2, 3, 8)]],
)
def test_training_does_not_depend_on_processes(jobs, pair_of_models, name, n, steps):
    """In DPO and KD; most of 8 ranks have one example of a step, or none. The teacher's responses are the same bytes."""
    ours, alone = jobs.out(n, name), jobs.out(0, name)
    assert_same_training(ours, alone, pair_of_models, steps)
    files = sorted(f.name for f in alone.glob("responses/*"))
    assert len(files) == (5 if name == "eight-kd" else 0)
    assert all((ours / "responses" / f).read_bytes() == (alone / "responses" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", KD_MODES)
def test_kd_with_two_processes(jobs, pair_of_models, name):
    """Each mode, with a teacher that is sharded over both, and the teacher cache: what is stored and sampled is the same."""
    ours, alone = jobs.out(2, name), jobs.out(0, name)
    assert_same_training(ours, alone, pair_of_models, 3)
    read = lambda folder: {file.name: file.read_bytes() for file in folder.glob("0*")}
    assert read(ours / "responses") == read(alone / "responses")
    assert len(read(alone / "responses")) == (5 if name == "kd-teacher" else 0)
    cached = [sorted(read(out.with_name("cache"))) for out in (ours, alone)]
    assert cached[0] == cached[1] and len(cached[0]) == 5


def test_bfloat16(jobs):
    """The policy computes in bfloat16, 8 bits of mantissa; weights and reductions stay in float32."""
    for row, expected in zip(logged(jobs.out(2, "bfloat16")), logged(jobs.out(2, "train")), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.03)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert all(v.dtype == torch.float32 for v in weights(jobs.out(2, "bfloat16")).values())


# ---------------------------------------------------------------------------------------------------------------------
# A sharded teacher
# ---------------------------------------------------------------------------------------------------------------------


def pair_shards(out):
    return [runs.read_jsonl(file) for file in sorted(out.glob("pairs/*.jsonl"))]


@pytest.mark.parametrize("n", [2, 3])
def test_sharded_teacher(jobs, n):
    """Same tokens, log-probs to 1e-4: also in turns where a rank has no mismatch, or (the last) no micro-batch."""
    ours, usual = (pair_shards(jobs.out(n, name)) for name in ("turns-sharded", "turns"))
    touched = [any(r["t_star"] >= 0 for r in batch) for batch in usual]
    turns = [touched[k : k + n] for k in range(0, len(touched), n)]
    assert any(any(turn) and not all(turn) for turn in turns[:-1]) and len(turns[-1]) < n and touched[-1]
    for batch, expected in zip(ours, usual, strict=True):
        for a, b in zip(batch, expected, strict=True):
            assert a.keys() == b.keys()
            for key in b:
                assert a[key] == (pytest.approx(b[key], abs=1.1e-4) if "logprobs" in key else b[key])


def test_sharded_teacher_and_long_prompts(jobs):
    """Prompts over the limit are in no batch; a rank without a batch takes part in the others' forwards."""
    ours, usual = (
        [[(r["status"], r.get("response_ids"), r.get("chosen_ids")) for r in batch] for batch in pair_shards(out)]
        for out in (jobs.out(2, "long-sharded"), jobs.out(2, "long"))
    )
    assert len(ours) == 2 and ours == usual


def test_no_pair_at_all(jobs, pair_of_models):
    """No rank has a mismatch in any turn: no hang, no pair, and the student comes out as it went in."""
    out = jobs.out(2, "no-pair")
    assert (out / "pairs.jsonl").read_text() == ""
    assert distance(weights(out), load_file(pair_of_models["student"] + "/model.safetensors")) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Killed and started again
# ---------------------------------------------------------------------------------------------------------------------


def test_killed_training_ends_as_if_unbroken(jobs):
    """Killed in eight places and started again each time."""
    assert_identical(jobs.out(2, "broken"), jobs.out(2, "train"))


def test_killed_sampling_ends_as_if_unbroken(jobs):
    assert pair_files(jobs.out(2, "pairs-broken")) == pair_files(jobs.out(0, "pairs"))


def test_resume_with_two_then_one_then_three_processes(jobs, pair_of_models):
    begun = jobs.out(2, "chain")
    assert len(logged(begun)) == 2 and (begun / "checkpoint" / "step-000002").is_dir()
    jobs.out(0, "chain")  # killed as planned
    assert_same_training(jobs.out(3, "chain"), jobs.out(3, "train"), pair_of_models, 6)


@pytest.mark.parametrize("n", [0, 2])
def test_stopped_training_ends_as_if_unbroken(jobs, n):
    """SIGTERM in step 3, Ctrl-C in step 5, to rank 0 alone: all ranks write a checkpoint and leave together."""
    assert_identical(jobs.out(n, "stopped"), jobs.out(n, "train"))
    for step in (3, 5):
        assert f"stopped after step {step}, whose checkpoint is written" in jobs.process[n].stderr


# ---------------------------------------------------------------------------------------------------------------------
# The real command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 2])
def test_command_ends_cleanly(jobs, tmp_path, n):
    """With and without torchrun: status 0, the group is taken down, and the same pairs as ever."""
    argv = jobs.method("", FEW)[1]["argv"]
    result = launch(n, "warmup_distill.py", *argv, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert not re.search("destroy_process_group|Traceback|warn", result.stderr, re.IGNORECASE), result.stderr
    assert pair_files(tmp_path / "out") == pair_files(jobs.out(0, "few"))
    assert_same_table(tmp_path / "out", jobs.out(0, "few"))


def test_two_nodes(jobs, tmp_path):
    """The README's command for two machines, on one: two torchrun agents that meet on loopback. Bit for bit the files and
    weights of two processes under one torchrun."""
    readme = re.search(r"torchrun (--nnodes 2 .*?) warmup_distill.py", (ROOT / "README.md").read_text(), re.DOTALL)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 1", readme[1]).replace("HOST:29500", f"localhost:{port}")
    argv = [ROOT / "warmup_distill.py", *jobs.method("", PAIRS)[1]["argv"], "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "torch.distributed.run", *words.split(), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        agents = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for _ in range(2)]
    try:
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], (tmp_path / "log").read_text()
    whole = jobs.out(2, "pairs")
    assert pair_files(tmp_path / "out") == pair_files(whole)
    assert_identical(tmp_path / "out", whole)
