"""What every benchmark here needs: the project on the path, models of real shapes, CPU seconds, peak memory, ratios."""

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# hidden size, size between the two of the MLP, layers, heads, heads of keys and values, vocabulary
SHAPES = {
    "tiny": (32, 64, 2, 4, 2, 97),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "smollm2-6-layers": (576, 1536, 6, 9, 9, 49152),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
}


def add_arguments(parser, dtype="bfloat16", repeat=3):
    """Flags that all benchmarks share."""
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument("--threads", type=int, default=1)


def random_model(shape, dtype=torch.float32, device="cpu", seed=0, vocab=None, layers=None, std=0.05):
    """A random model of one of SHAPES; `vocab` and `layers` override the shape's."""
    width, between, depth, heads, kv_heads, vocab_size = SHAPES[shape]
    qwen = shape.startswith("qwen")
    config = (Qwen2Config if qwen else LlamaConfig)(
        vocab_size=vocab or vocab_size,
        hidden_size=width,
        intermediate_size=between,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config).to(device, dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no EOS: the benchmarks say where rows end
    return model


def clock(device="cpu"):
    """Seconds. On a CPU those of this process, which other processes disturb less: on one thread, wall time at rest."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def resident_gib():
    """This process's resident memory in GiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` then peak.gib above the start, peak.total_gib in all.

    On a CPU a thread reads the process's resident size every 10 ms; on a GPU it is the allocator's own peak.
    """

    def __init__(self, device="cpu"):
        self.device = device

    def __enter__(self):
        if self.device == "cpu":
            self.start = self.peak = resident_gib()
            self.done = threading.Event()
            self.watcher = threading.Thread(target=self.watch)
            self.watcher.start()
        else:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**30
        return self

    def watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, resident_gib())

    def __exit__(self, *_):
        if self.device == "cpu":
            self.done.set()
            self.watcher.join()
        else:
            self.peak = torch.cuda.max_memory_allocated() / 2**30
        self.gib, self.total_gib = self.peak - self.start, self.peak


def child(script, argv, *extra):
    """Runs a benchmark's script again in a process of its own; returns the JSON of its last line."""
    command = [sys.executable, script, *argv, *map(str, extra)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def spread(values):
    """{median, range} of a list of numbers."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def show(name, result, unit):
    """Prints one line of `spread`."""
    low, high = result["range"]
    print(f"{name:40} {low:10.3f} {result['median']:10.3f} {high:10.3f}  {unit}, min median max", flush=True)
