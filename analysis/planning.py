"""How far `mrp-lens plan` is from what was measured, and what it says of models of all sizes:

    python -m analysis.planning --models demo ./my-checkpoint --dtypes float32 bfloat16 --lengths 48 128 --out runs/planning

Each fit runs in a process of its own, on the CPU, on texts of the embedded world that are cut at the length. What is measured is the
peak of its resident memory above what it was when the model was loaded, without what is mapped from files: the pages of a checkpoint
come in as they are read. glibc keeps freed blocks below 32 MiB for later, so that a process grows beyond what it holds: it is measured
as it comes (`resident_mib`), and with blocks returned at once (`measured_mib`, MALLOC_MMAP_THRESHOLD_=65536), which is what a plan
speaks of.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import mrp_lens as ml
from analysis.common.tables import markdown
from analysis.speed import peak_memory
from mrp_lens.cli.app import as_program
from mrp_lens.cli.run_folder import check_out
from mrp_lens.methods import METHODS
from mrp_lens.metrics.multiple_choice import encoded_choices
from mrp_lens.models import available_backends, encoder_for, is_bridge
from mrp_lens.runs.record import Run
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.io import write_text

JOBS = ("mrp", "rmu", "accuracy")
DOCUMENTS, SENTENCES, ASKED = 32, 30, 200
SHOWN = (
    *(
        "model",
        "billions",
        "active",
        "method",
        "rows",
        "phase",
        "weights",
        "caches",
        "activations",
        "logits",
        "optimizer",
    ),
    *("peak", "seconds", "largest", "devices"),
)
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: blocks from 64 KiB on come from the system and go back to it

_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "tie_word_embeddings": False, "max_position_embeddings": 8192}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dense 1B": (
        "LlamaConfig",
        _LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    ),
    "dense 8B": (
        "LlamaConfig",
        _LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "dense 70B": (
        "LlamaConfig",
        _LLAMA
        | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8},
    ),
    "experts 7B": ("OlmoeConfig", {"intermediate_size": 1024}),
    "experts 47B": ("MixtralConfig", {}),
    "experts 141B": (
        "MixtralConfig",
        {"hidden_size": 6144, "intermediate_size": 16_384, "num_hidden_layers": 56, "num_attention_heads": 48},
    ),
}


def method_of(name: str, *, read: bool, **settings: Any) -> Any:
    """The method with its defaults and these settings; `read`: with what the model writes."""
    kind: Any = METHODS[name]
    return kind(**settings, **({} if read else {"coverage": None}))


def job_of(model: ml.LensModel, name: str, length: int, steps: int, read: bool) -> Any:
    """A fit of so many steps, or a measure of accuracy."""
    world = ml.World()

    def texts(seed: int, name: str) -> ml.Corpus:
        sentences = ml.World(seed).ordinary("taught")
        starts = [7 * number % 300 for number in range(DOCUMENTS)]
        return ml.Corpus.from_texts([" ".join(sentences[start : start + SENTENCES]) for start in starts], name=name)

    forget, retain = texts(0, "forget"), texts(1, "retain")
    questions = world.questions("potions").spread(ASKED)
    if name == "accuracy":
        return lambda: ml.metrics.accuracy(model, questions, progress=False)
    method = method_of(name, read=read, steps=steps, max_length=length)
    return lambda: method.fit(model, forget, retain, progress=False)


def asked_tokens(model: ml.LensModel) -> tuple[int, float]:
    """Tokens of the longest question with its choice; and of the longest choice, on average: those of a question share passes."""
    questions = ml.World().questions("potions").spread(ASKED)
    rows = iter(encoded_choices(encoder_for(model), questions))
    asked = [[next(rows) for _ in question.choices] for question in questions.questions]
    longest = max(len(row.ids) for each in asked for row in each)
    return longest, fmean(max(sum(row.in_loss) for row in each) for each in asked)


def measure(words: Mapping[str, Any]) -> dict[str, Any]:
    """Load the model, do the job, and say what it took."""
    warnings.simplefilter("ignore")
    model = ml.load_model(words["model"], backend=words["backend"], dtype=words["dtype"], device="cpu")
    question, answer = asked_tokens(model)
    job = job_of(model, words["job"], words["length"], words["steps"], words["read"])
    return {
        "form": "bridge" if is_bridge(model) else "hooked",
        "peak": peak_memory(job),
        "question_length": question,
        "answer_length": answer,
    }


def in_process(words: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The same in a process of its own."""
    line = [sys.executable, "-m", "analysis.planning", "--one", json.dumps(dict(words))]
    ended = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compared(words: Mapping[str, Any], *, resident: bool = True) -> dict[str, Any]:
    """A row: what was planned and what was measured, in MiB."""
    found = in_process(words, RETURNED)
    method = [METHODS["rmu"]()] if words["job"] == "accuracy" else [method_of(words["job"], read=words["read"])]
    planned = ml.plan(
        words["model"],
        method,
        backend=found["form"],
        dtype=words["dtype"],
        documents=DOCUMENTS,
        max_length=words["length"],
        steps=words["steps"],
        questions=4 * ASKED,
        question_length=found["question_length"],
        answer_length=found["answer_length"],
        tflops=1.0,
    ).frame
    row = planned[planned["method"] == words["job"]].iloc[0]
    mib = float(row["working"]) * 1024
    return {
        **{key: words[key] for key in ("model", "dtype", "job", "length", "steps")},
        "form": found["form"],
        "phase": row["phase"],
        "planned_mib": mib,
        "measured_mib": found["peak"],
        "ratio": mib / found["peak"],
        **({"resident_mib": in_process(words, {})["peak"]} if resident else {}),
    }


def table() -> pd.DataFrame:
    """What a fit of MRP and of RMU needs in models of all sizes, in bfloat16 on devices of 80 GiB, one document a pass and all."""
    import transformers

    rows = []
    for name, (kind, settings) in MODELS.items():
        config = getattr(transformers, kind)(**settings)
        for micro_batch in (None, 1):
            planned = ml.plan(
                config,
                ["mrp", "rmu"],
                backend="bridge",
                dtype="bfloat16",
                device_memory="80GiB",
                tflops=300.0,
                micro_batch=micro_batch,
            )
            active = planned.sizes.active_parameters / 1e9
            total = planned.sizes.n_parameters / 1e9
            rows += [{"model": name, "billions": total, "active": active, **row} for row in rows_of(planned.frame)]
    return pd.DataFrame(rows)


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo"], help="to fit (default demo)")
    parser.add_argument("--backends", nargs="+", default=list(available_backends()), help="hooked, bridge")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16")
    parser.add_argument("--lengths", nargs="+", type=int, default=[48, 128], help="tokens of a text (default 48 128)")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--steps", type=int, default=3, help="updates (default 3)")
    parser.add_argument(
        "--no-coverage", action="store_true", help="fits read the corpora alone, which saves hours on a CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/planning"), help="folder for summary.json and table.csv")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    check_out(arguments.out, overwrite=arguments.overwrite)
    run = Run("analysis.planning", vars(arguments), seed=0)
    jobs = [
        {"model": model, "backend": backend, "dtype": dtype, "job": job, "length": length}
        for model in arguments.models
        for backend in arguments.backends
        for dtype in arguments.dtypes
        for job in arguments.jobs
        for length in (arguments.lengths[:1] if job == "accuracy" else arguments.lengths)
    ]
    for job in tqdm(jobs, desc="fits"):
        run.rows.append(compared({**job, "steps": arguments.steps, "read": not arguments.no_coverage}))
    sizes = table()
    tables = [pd.DataFrame(run.rows), sizes[sizes["method"] != "accuracy"][list(SHOWN)]]
    text = "\n\n".join(markdown(shown(frame)) for frame in tables if len(frame))
    print(text)
    files = {"finding.md": text, "plans.csv": sizes.to_csv(index=False)}

    def write(folder: Path) -> None:
        for name, content in files.items():
            write_text(folder / name, content)

    run.write(arguments.out, overwrite=arguments.overwrite, extras=[write])


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, of three digits."""
    return frame.map(
        lambda value: (
            "" if value is None or value != value else f"{value:.3g}" if isinstance(value, float) else str(value)
        )
    )


if __name__ == "__main__":
    as_program("analysis.planning", main)
