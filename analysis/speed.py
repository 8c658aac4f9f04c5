"""What fits, a forward and a quiz cost: `python -m analysis.speed --out runs/speed`.

RMU at layer 7 of a 32-layer model, against the loop of the released code written plainly: two models, three full forwards a step,
gradients down to the embedding. MRP against a plain loop: logits everywhere, and the unedited model read in each step. NPO against the
loop of the released code: every weight trained, a copy of the model read in each step. A forward pass with MRP's hooks on two layers
against one without. A quiz against lm-evaluation-harness on the same questions, whose answers have to be
the same (with `--model FOLDER`, on that model instead of the demo; `pip install 'mrp_lens[harness]'`). Every figure is the median of
interleaved pairs of one run, since single timings on a shared machine mean little.
"""

import argparse
import copy
import gc
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from mrp_lens import Subspace
from mrp_lens.cli.app import as_program
from mrp_lens.cli.run_folder import check_out
from mrp_lens.data import Corpus, Questions, UnlearningTask
from mrp_lens.data.tokenization import Batches
from mrp_lens.edits import ProjectionEdit
from mrp_lens.evals.lm_eval import HarnessModel, load_hf
from mrp_lens.methods import NPO, RMU, UnconditionalMRP
from mrp_lens.metrics import choice_scores
from mrp_lens.metrics.multiple_choice import encoded_choices
from mrp_lens.models import available_backends, encoder_for, load_model, logits_of, mlp_out_weight
from mrp_lens.models.base import device_of, dtype_of
from mrp_lens.models.hooks import captured, hook_name, hooked
from mrp_lens.runs.record import Run

LAYERS, WIDTH, LAYER, BATCH, TOKENS = 32, 256, 7, 4, 128
COEFFICIENT, ALPHA = 6.5, 1200.0
PROJECTED, RANK = (16, 21, 26, 31), 16  # what MRP's fits project
QUIZ, CHOICES = 60, 128  # questions, and choices that are read at a time
TARGETS = {
    "rmu": "aim: at least 3x steps/s and at most 0.6x memory",
    "mrp": "aim: at least 3x steps/s",
    "npo": "aim: at least 3x steps/s and at most 0.5x memory",
    "forward": "aim: at most 1.05",
    "accuracy": "aim: at least 2x",
}


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
        retain_length=None,
        budget=None,
        coverage=None,
    )
    settings.fit(model, forget, retain, progress=False)


def plain_mrp(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """MRP as one would write it: an unedited copy read in each step, logits at every position, gradients through every block."""
    unedited = copy.deepcopy(model)
    encoder = encoder_for(model)
    generator = torch.Generator().manual_seed(0)
    batches = [Batches(encoder.encode(corpus.documents), BATCH, generator) for corpus in (forget, retain)]
    rows = {hook_name(layer): torch.randn(RANK, WIDTH, generator=generator).requires_grad_() for layer in PROJECTED}
    optimizer = torch.optim.Adam(rows.values(), lr=0.01)

    def project(states: torch.Tensor, hook: Any, *, name: str) -> torch.Tensor:
        basis = torch.linalg.qr(rows[name].T)[0]
        return states - (states @ basis) @ basis.T

    def log_probabilities(of: Any, batch: Any) -> torch.Tensor:
        return logits_of(of, batch.tokens, batch.attention_mask)[:, :-1].log_softmax(-1)

    for _ in range(steps):
        forget_batch, retain_batch = (encoder.collate(next(rows)) for rows in batches)
        with hooked(model, [(name, partial(project, name=name)) for name in rows]):
            said = log_probabilities(model, forget_batch).gather(-1, forget_batch.tokens[:, 1:, None])[..., 0]
            losing = said.clamp(min=-5.0)[forget_batch.loss_mask[:, 1:]].mean()
            with torch.no_grad():
                before = log_probabilities(unedited, retain_batch)
            after = log_probabilities(model, retain_batch)
        kept = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
        loss = losing + 10.0 * kept[retain_batch.loss_mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_mrp(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """The same job through the library."""
    settings = UnconditionalMRP(
        layers=PROJECTED, rank=RANK, steps=steps, batch_size=BATCH, init="random", forget_loss="bounded"
    )
    settings.fit(model, forget, retain, progress=False)


def plain_npo(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """NPO as the released code has it (arXiv 2404.05868): an unedited copy read in each step, logits at every position, every weight
    trained with AdamW; the weights are as before afterwards."""
    unedited = copy.deepcopy(model)
    encoder = encoder_for(model)
    generator = torch.Generator().manual_seed(0)
    batches = [Batches(encoder.encode(corpus.documents), BATCH, generator) for corpus in (forget, retain)]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer, beta = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01), NPO().beta

    def losses_of(of: Any, batch: Any) -> torch.Tensor:
        predicted = logits_of(of, batch.tokens, batch.attention_mask)[:, :-1].float()
        said = torch.nn.functional.cross_entropy(predicted.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        return said * batch.loss_mask[:, 1:]

    for _ in range(steps):
        forget_batch, retain_batch = (encoder.collate(next(rows)) for rows in batches)
        with torch.no_grad():
            before = losses_of(unedited, forget_batch).sum(-1)
        margin = beta * (losses_of(model, forget_batch).sum(-1) - before)
        losing = -2 / beta * torch.nn.functional.logsigmoid(margin).mean()
        keeping = losses_of(model, retain_batch).sum() / retain_batch.loss_mask[:, 1:].sum()
        optimizer.zero_grad()
        (losing + keeping).backward()
        optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), unedited.parameters(), strict=True):
            parameter.copy_(value)
            parameter.grad = None
            parameter.requires_grad_(False)


def our_npo(model: Any, forget: Corpus, retain: Corpus, steps: int) -> None:
    """The same loss through the library, which trains the output matrices of a few MLPs."""
    NPO(steps=steps, batch_size=BATCH, retain_length=None).fit(model, forget, retain, progress=False)


def peak_memory(job: Callable[[], None]) -> float:
    """Peak memory of this process during a job above what it was before, in MiB (sampled every millisecond)."""
    gc.collect()
    _return_free_memory()
    before, peak, done = _held(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _held())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def _held() -> float:
    """Resident memory but for what is mapped from files, in MiB: the pages of a checkpoint come in when they are first read."""
    memory = psutil.Process().memory_info()
    return float(memory.rss - getattr(memory, "shared", 0)) / 2**20


def _return_free_memory() -> None:
    """Hand what the allocator keeps back to the system, so that the next peak starts from the same level."""
    import ctypes

    libc: Any = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)


def timed(job: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


Loop = Callable[[Any, Corpus, Corpus, int], None]


def compare_loops(
    name: str, library: Loop, written_plainly: Loop, model: Any, backend: str, *, pairs: int, steps: int
) -> dict[str, Any]:
    """Steps per second and peak memory of both loops, as medians over interleaved pairs."""
    forget, retain = make_texts(0, "forget"), make_texts(1, "retain")

    def ours() -> None:
        library(model, forget, retain, steps)

    def plain() -> None:
        written_plainly(model, forget, retain, steps)

    ours()
    plain()
    seconds = [(timed(ours), timed(plain)) for _ in range(pairs)]
    memory = [(peak_memory(ours), peak_memory(plain)) for _ in range(3)]
    return {
        "study": name,
        "backend": backend,
        "pairs": pairs,
        "steps_per_second": steps / median(a for a, _ in seconds),
        "plain_steps_per_second": steps / median(b for _, b in seconds),
        "speed_ratio": median(b / a for a, b in seconds),
        "memory_mib": median(a for a, _ in memory),
        "plain_memory_mib": median(b for _, b in memory),
        "memory_ratio": median(a / b for a, b in memory),
        "target": TARGETS[name],
    }


def compare_mrp(model: Any, backend: str, *, pairs: int, steps: int) -> dict[str, Any]:
    """Steps per second of both loops. Of ours those of a fit of three times the steps less one of as many: what a fit does once, such
    as keeping the states that no update changes, does not count."""
    forget, retain = make_texts(0, "forget"), make_texts(1, "retain")
    least = max(steps, -(-len(forget) // BATCH))  # so that every text is read once, or states are not kept

    def ours() -> float:
        return timed(lambda: our_mrp(model, forget, retain, 3 * least)) - timed(
            lambda: our_mrp(model, forget, retain, least)
        )

    def plain() -> float:
        return timed(lambda: plain_mrp(model, forget, retain, 2 * least))

    seconds = [(ours(), plain()) for _ in range(pairs)]
    return {
        "study": "mrp",
        "backend": backend,
        "pairs": pairs,
        "steps_per_second": 2 * least / median(a for a, _ in seconds),
        "plain_steps_per_second": 2 * least / median(b for _, b in seconds),
        "speed_ratio": median(b / a for a, b in seconds),
        "target": TARGETS["mrp"],
    }


def compare_accuracy(model: Any, folder: str, questions: Questions, backend: str, *, pairs: int) -> dict[str, Any]:
    """Seconds for the choices of a quiz, here and in lm-evaluation-harness.

    Raises:
        AssertionError: the two do not give every choice the same log-probability.
    """
    from lm_eval.api.instance import Instance

    hf_model, tokenizer = load_hf(folder, dtype=dtype_of(model), device=device_of(model))
    harness = HarnessModel(hf_model, tokenizer, batch_size=CHOICES, bos="metrics")
    asked = [(each.prompt, choice) for each in questions.questions for choice in each.choices]
    counts = [sum(row.in_loss) for row in encoded_choices(encoder_for(model), questions)]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]

    def ours() -> list[float]:
        scores = choice_scores(model, questions, batch_size=CHOICES, progress=False)
        return [float(each) for score in scores for each in score]

    def theirs() -> list[float]:
        found = harness.loglikelihood(requests, disable_tqdm=True)
        return [total / count for (total, _), count in zip(found, counts, strict=True)]

    allowed = 1e-3 if dtype_of(model) == torch.float32 else 0.2
    assert max(abs(a - b) for a, b in zip(ours(), theirs(), strict=True)) < allowed
    seconds = [(timed(ours), timed(theirs)) for _ in range(pairs)]
    return {
        "study": "accuracy",
        "backend": backend,
        "pairs": pairs,
        "questions": len(questions),
        "seconds": median(a for a, _ in seconds),
        "harness_seconds": median(b for _, b in seconds),
        "speed_ratio": median(b / a for a, b in seconds),
        "target": TARGETS["accuracy"],
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


def quiz(file: str | None) -> Questions:
    """The first questions of a file, or of the demo's quiz."""
    if file is None:
        return UnlearningTask.from_world("potions").quiz(limit=QUIZ)["forget"]
    asked = Questions.from_file(file, prompt="Question: {question}\nAnswer:")
    return replace(asked, questions=asked.questions[:QUIZ])


def add(run: Run, row: dict[str, Any]) -> None:
    """A row of the table, which is printed at once."""
    run.rows.append(row)
    shown = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print(", ".join(shown), flush=True)


def main() -> None:
    """Run the study and print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for summary.json and table.csv")
    parser.add_argument(
        "--pairs", type=int, default=40, help="pairs of forwards (default 40); an eighth as many pairs of fits"
    )
    parser.add_argument("--steps", type=int, default=5, help="updates in each fit (default 5)")
    parser.add_argument("--model", default="demo", help="that answers the quiz (default demo)")
    parser.add_argument("--dtype", default="float32", help="of that model")
    parser.add_argument(
        "--questions", help="a file of questions (question, choices, answer) for it; the demo has its own"
    )
    parser.add_argument("--studies", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    arguments = parser.parse_args()
    check_out(arguments.out, overwrite=arguments.overwrite)
    warnings.filterwarnings("ignore", message=".*longer than")  # every text is, so that all batches are alike
    run = Run("analysis.speed", vars(arguments), seed=0)
    fits, forwards = max(3, arguments.pairs // 8), arguments.pairs
    loops = partial(compare_loops, pairs=fits, steps=arguments.steps)
    with tempfile.TemporaryDirectory() as temporary:
        make_model(Path(temporary))
        for backend in available_backends():
            if set(arguments.studies) != {"accuracy"}:
                model = load_model(temporary, backend=backend)
                jobs: dict[str, Callable[[], dict[str, Any]]] = {
                    "rmu": partial(loops, "rmu", our_rmu, plain_rmu, model, backend),
                    "npo": partial(loops, "npo", our_npo, plain_npo, model, backend),
                    "mrp": partial(compare_mrp, model, backend, pairs=fits, steps=arguments.steps),
                    "forward": partial(compare_forward, model, backend, pairs=forwards),
                }
                for name, job in jobs.items():
                    if name in arguments.studies:
                        add(run, job())
                del model, jobs
            if "accuracy" in arguments.studies:
                model = load_model(arguments.model, backend=backend, dtype=arguments.dtype)
                add(run, compare_accuracy(model, arguments.model, quiz(arguments.questions), backend, pairs=fits))
                del model
    run.write(arguments.out, overwrite=arguments.overwrite)


if __name__ == "__main__":
    as_program("analysis.speed", main)
