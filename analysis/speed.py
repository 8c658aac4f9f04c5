"""What a fit and a forward cost: `python -m analysis.speed --out runs/speed`.

RMU at layer 7 of a 32-layer model, against the loop of the released code written plainly: two models, three full
forwards a step, gradients down to the embedding. And a forward pass with MRP's hooks on two layers against one without.
Every figure is the median of interleaved pairs of one run, since single timings on a shared machine mean little.
"""

import argparse
import copy
import gc
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from mrp_lens import Subspace
from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches
from mrp_lens.edits import ProjectionEdit
from mrp_lens.methods import RMU
from mrp_lens.models import available_backends, encoder_for, load_model, logits_of, mlp_out_weight
from mrp_lens.models.hooks import captured, hook_name
from mrp_lens.runs.record import Run
from mrp_lens.utils.io import check_free

LAYERS, WIDTH, LAYER, BATCH, TOKENS = 32, 256, 7, 4, 128
COEFFICIENT, ALPHA = 6.5, 1200.0
TARGETS = {"rmu": "aim: at least 3x steps/s and at most 0.6x memory", "forward": "aim: at most 1.05"}


def make_model(folder: Path) -> None:
    """A random Llama with 32 layers, with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "mrp_lens" / "data" / "world" / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=int(2.75 * WIDTH),
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_texts(seed: int, name: str) -> Corpus:
    """Documents of about as many tokens as the context holds."""
    from mrp_lens.data.world import World

    sentences = World(seed).ordinary("taught")
    return Corpus.from_texts([" ".join(sentences[i : i + 20]) for i in range(0, 400, 20)], name=name)


def plain_rmu(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """The released loop: an updated and a frozen model, three full forwards a step, every parameter with gradient."""
    frozen_model = copy.deepcopy(model)
    encoder = encoder_for(model)
    generator = torch.Generator().manual_seed(0)
    batches = [Batches(encoder.encode(corpus.documents), BATCH, generator) for corpus in (forget, retain)]
    direction = torch.rand(WIDTH, generator=generator)
    target = COEFFICIENT * direction / direction.norm()
    trained = [mlp_out_weight(model, layer).parameter for layer in (LAYER - 2, LAYER - 1, LAYER)]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0)
    hook = hook_name(LAYER)
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def states(of: Any, batch: Any) -> torch.Tensor:
        with captured(of, [hook]) as store:
            logits_of(of, batch.tokens, batch.attention_mask)
        return store[hook]

    for _ in range(steps):
        forget_batch, retain_batch = (encoder.collate(next(rows)) for rows in batches)
        loss = torch.nn.functional.mse_loss(states(model, forget_batch), target.expand(*forget_batch.tokens.shape, -1))
        with torch.no_grad():
            kept = states(frozen_model, retain_batch)
        loss = loss + ALPHA * torch.nn.functional.mse_loss(states(model, retain_batch), kept)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def our_rmu(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """The same job through the library."""
    settings = RMU(
        layer=LAYER,
        steering_coeff=COEFFICIENT,
        alpha=ALPHA,
        lr=5e-5,
        steps=steps,
        batch_size=BATCH,
        errors="absolute",
        positions="all",
        budget=None,
        coverage=None,
    )
    settings.fit(model, forget, retain, progress=False)


def peak_memory(job: Callable[[], None]) -> float:
    """Peak resident memory of this process during a job above what it was before, in MiB (sampled every millisecond)."""
    gc.collect()
    _return_free_memory()
    before, peak, done = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def _resident() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def _return_free_memory() -> None:
    """Hand what the allocator keeps back to the system, so that the next peak starts from the same level."""
    import ctypes

    libc: Any = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)


def timed(job: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def compare_rmu(model: Any, backend: str, *, pairs: int, steps: int) -> dict[str, Any]:
    """Steps per second and peak memory of both loops, as medians over interleaved pairs."""
    forget, retain = make_texts(0, "forget"), make_texts(1, "retain")

    def ours() -> None:
        our_rmu(model, forget, retain, steps)

    def plain() -> None:
        plain_rmu(model, forget, retain, steps)

    ours()
    plain()
    seconds = [(timed(ours), timed(plain)) for _ in range(pairs)]
    memory = [(peak_memory(ours), peak_memory(plain)) for _ in range(3)]
    return {
        "study": "rmu",
        "backend": backend,
        "pairs": pairs,
        "steps_per_second": steps / median(a for a, _ in seconds),
        "plain_steps_per_second": steps / median(b for _, b in seconds),
        "speed_ratio": median(b / a for a, b in seconds),
        "memory_mib": median(a for a, _ in memory),
        "plain_memory_mib": median(b for _, b in memory),
        "memory_ratio": median(a / b for a, b in memory),
        "target": TARGETS["rmu"],
    }


def compare_forward(model: Any, backend: str, *, pairs: int) -> dict[str, Any]:
    """A forward pass with rank-8 projections on two layers over one without."""
    tokens = torch.randint(3, model.cfg.d_vocab, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    edit = ProjectionEdit({hook_name(layer): Subspace.random(8, WIDTH, seed=layer) for layer in (LAYER, 2 * LAYER)})

    def forward() -> None:
        with torch.no_grad():
            logits_of(model, tokens, mask)

    forward()
    ratios = []
    for number in range(pairs):
        plain = timed(forward) if number % 2 else 0.0
        with edit.applied(model):
            hooked_seconds = timed(forward)
        plain = plain or timed(forward)
        ratios.append(hooked_seconds / plain)
    return {
        "study": "forward",
        "backend": backend,
        "pairs": pairs,
        "ratio": median(ratios),
        "target": TARGETS["forward"],
    }


def main() -> None:
    """Run the study and print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for summary.json and table.csv")
    parser.add_argument(
        "--pairs", type=int, default=40, help="pairs of forwards (default 40); an eighth as many pairs of fits"
    )
    parser.add_argument("--steps", type=int, default=5, help="updates in each fit (default 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    arguments = parser.parse_args()
    check_free(arguments.out, overwrite=arguments.overwrite)
    warnings.filterwarnings("ignore", message=".*longer than")  # every text is, so that all batches are alike
    run = Run("analysis.speed", vars(arguments), seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        make_model(Path(temporary))
        for backend in available_backends():
            model = load_model(temporary, backend=backend)
            run.rows.append(compare_rmu(model, backend, pairs=max(3, arguments.pairs // 8), steps=arguments.steps))
            run.rows.append(compare_forward(model, backend, pairs=arguments.pairs))
            for row in run.rows[-2:]:
                print(
                    ", ".join(
                        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()
                    )
                )
            del model
    run.write(arguments.out, overwrite=arguments.overwrite)


if __name__ == "__main__":
    main()
