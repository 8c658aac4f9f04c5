"""lm-evaluation-harness on a plain Hugging Face model: figures that others can compare with theirs."""

import copy
import difflib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from mrp_lens.edits import Edit
from mrp_lens.hf import attach
from mrp_lens.models import device_named, dtype_named
from mrp_lens.models.source import checked_config, find_folder, read_object, read_tokenizer, read_weights
from mrp_lens.utils.validation import check_one_of, check_positive

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:  # an optional extra, which `require_harness` asks for
    HFLM = object

# Where TransformerLens's `cfg.default_prepend_bos` is False; a model class of an export inherits from one of its base.
WITHOUT_BOS = frozenset(
    "BloomForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneForCausalLM GPTNeoXForCausalLM Glm4ForCausalLM "
    "Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM GraniteForCausalLM GraniteMoeForCausalLM "
    "GraniteMoeHybridForCausalLM MPTForCausalLM MiniMaxM2ForCausalLM MptForCausalLM NeoXForCausalLM PhiForCausalLM PhiMoEForCausalLM "
    "Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM "
    "Qwen3_5MoeForCausalLM RecurrentGemmaForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM".split()
)
BATCH_SIZE = 8

Bos = Literal["metrics", "tokenizer"]


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    edit: Edit | str | Path | None = None,
    tokenizer: Any = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    bos: Bos = "metrics",
    per_question: bool = False,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Score a Hugging Face model with lm-evaluation-harness (`pip install 'mrp_lens[harness]'`).

    The harness's `acc` takes the choice with the largest log-probability, `acc_norm` divides it by the choice's number of
    characters; `metrics.accuracy` divides by the number of tokens. Where every choice is one token, `acc` is that accuracy.

    Args:
        model: "demo", a folder (an exported one, or any Hugging Face folder), a name on the Hub, or a loaded Hugging
            Face model. A loaded one keeps its precision and device, and what is attached to it.
        tasks: names of tasks, groups or tags: `["wmdp", "mmlu"]`, or "wmdp,mmlu".
        edit: attached to the model meanwhile, by `mrp_lens.hf.attach`: an edit, or where it was saved.
        tokenizer: of a loaded model. None: the one in the folder that the model came from.
        include_path: folder with task definitions (YAML) of your own; a name found there is taken from there.
        limit: at most this many questions of each task. None: all.
        num_fewshot: solved examples before each question. None: as the task says.
        batch_size: texts in a pass. None: 8.
        bos: "metrics": a text starts with BOS where it does in `mrp_lens.metrics`: if the tokenizer has one and
            TransformerLens does not say that the architecture was trained without; whether the tokenizer adds it by
            itself does not matter. "tokenizer": what the tokenizer does by itself, the harness's own default.
        per_question: one row a question and metric, instead of one a task and metric.
        seed: of all that is drawn, such as solved examples. The global random states are left as they were.
        dtype: precision in which a folder is loaded.
        device: where a folder is loaded to. None: a GPU if there is one, else the CPU.
        trust_remote_code: run the code that lies in the folder, such as an export of the form "module".

    Returns:
        A row for each task and metric, groups and the tasks in them alike. Columns: `task`; `group` it is listed in, or
        ""; `metric`; `filter` of the answers ("none" for most); `value`; `stderr` (NaN where the harness gives none); `n`
        questions; `higher_is_better`. With `per_question`: `task`, `metric`, `filter`, `question` (its place in the
        task, from 0), `value`, `target`, and `answers`: the log-probability of each choice, or what was generated.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        FileNotFoundError: no folder at `include_path`.
        TypeError: a model that is none of these.
        ValueError: an edit that `attach` refuses, an unknown task, a number that is not above 0, a folder with code of its own without
            `trust_remote_code`, or no tokenizer.

    Example:
        >>> frame = evaluate("org/name", ["wmdp", "mmlu"], edit="runs/mine/edit")  # doctest: +SKIP
    """
    require_harness()
    check_one_of(Bos, bos=bos)
    check_positive(limit=limit, batch_size=batch_size)
    names = task_names(tasks)
    with _random_states_kept(), ExitStack() as stack:
        manager = task_manager(names, include_path)
        if isinstance(model, (str, Path)):
            model, found = load_hf(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            tokenizer = found if tokenizer is None else tokenizer
        else:
            tokenizer = _tokenizer_of(model, tokenizer)
        if edit is not None:
            stack.enter_context(attach(model, edit))
        stack.enter_context(_modes_kept(model))
        results = simple_evaluate(
            model=HarnessModel(model, tokenizer, batch_size=BATCH_SIZE if batch_size is None else batch_size, bos=bos),
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=per_question,
            **dict.fromkeys(["random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"], seed),
        )
    return pd.DataFrame(_question_rows(results) if per_question else _task_rows(results))


def require_harness() -> None:
    """Check that lm-evaluation-harness is there.

    Raises:
        ImportError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise ImportError("this needs lm-evaluation-harness: pip install 'mrp_lens[harness]'")


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The names in "wmdp,mmlu" or ["wmdp", "mmlu"].

    Raises:
        ValueError: there is none.
    """
    names = [name.strip() for entry in ([tasks] if isinstance(tasks, str) else tasks) for name in entry.split(",")]
    if not all(names) or not names:
        raise ValueError(f"no task in {tasks!r}; name some, such as 'wmdp,mmlu'")
    return list(dict.fromkeys(names))


def task_manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's catalogue of tasks, or that of the folder alone where it has all of them: reading the harness's own
    15,000 files takes longer than many a task.

    Raises:
        FileNotFoundError: no folder at `include_path`.
        ValueError: nothing of that name.
    """
    if include_path is None:
        folder, own = None, {}
    else:
        folder = Path(include_path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder at {folder}; include_path is a folder with task definitions (*.yaml)")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = manager.task_index
        if all(_complete(name, own) for name in names):
            return manager
    shipped = catalogue()
    for name in names:
        if name not in own and name not in shipped.task_index:
            alike = ", ".join(difflib.get_close_matches(name, [*own, *shipped.all_tasks], 3))
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}{f' (it has {alike})' if alike else ''}. A task of your own is a YAML file "
                "with that name under `task:`; give the folder it lies in as include_path. A file that cannot be read "
                "is passed over"
            )
    return shipped if folder is None else TaskManager(include_path=str(folder))


@cache
def catalogue() -> Any:
    """The tasks that come with the harness."""
    return TaskManager()


def _complete(name: str, index: Mapping[str, Any]) -> bool:
    """Whether an index has a task, or a group with all that it refers to."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return not isinstance(members, list) or all(isinstance(m, str) and _complete(m, index) for m in members)


def load_hf(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A plain Hugging Face model in evaluation mode, and its tokenizer; the arguments as in `evaluate`.

    Raises:
        ValueError: an unknown dtype, no model there, weights that do not fill it, or code of its own without
            `trust_remote_code`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    precision, where = dtype_named(dtype), device_named(device)
    folder = find_folder(source)
    config = read_object(folder / "config.json")
    if "auto_map" not in config:
        checked_config(folder, str(source))
        return read_weights(folder, precision).to(where).eval(), read_tokenizer(folder)
    if not trust_remote_code:
        code = ", ".join(sorted(file.name for file in folder.glob("*.py")))
        raise ValueError(
            f"{source} brings code of its own ({code or 'see auto_map in its config.json'}) that loading it would run; read it, then pass "
            "trust_remote_code=True"
        )
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=precision, trust_remote_code=True, output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"the weights in {folder} do not fill its model: missing {sorted(report['missing_keys'])[:3]}, of another shape "
            f"{sorted(report['mismatched_keys'])[:3]}; export it again"
        )
    return model.to(where).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def _tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The tokenizer given, or the one in the folder of a loaded model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"the harness runs on Hugging Face models, got {type(model).__name__}; give 'demo', a folder, a Hub name or a loaded "
            "Hugging Face model. An edit made in TransformerLens gets there by edit=..., or by mrp_lens.hf.attach(hf_model, edit)"
        )
    if tokenizer is not None:
        return tokenizer
    name = str(getattr(model.config, "_name_or_path", ""))
    if not (name and Path(name).is_dir()):
        raise ValueError("a loaded Hugging Face model brings no tokenizer; pass evaluate(model, tasks, tokenizer=...)")
    return read_tokenizer(Path(name))


def prepends_bos(model: Any, tokenizer: Any) -> bool:
    """Whether `mrp_lens.metrics` starts a text with BOS on this model."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return tokenizer.bos_token_id is not None and not kinds & WITHOUT_BOS


class HarnessModel(HFLM):  # type: ignore[misc]
    """The harness's class for Hugging Face models, with a say over BOS.

    The harness's own `add_bos_token=True` leaves BOS to the tokenizer, and does nothing where that adds none.

    Args:
        model: the Hugging Face model.
        tokenizer: its tokenizer, of which a copy is used: the harness may set a padding token.
        batch_size: texts in a pass.
        bos: "metrics" or "tokenizer", as in `evaluate`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, bos: Bos) -> None:
        own = copy.deepcopy(tokenizer)
        with _quiet(HFLM.__module__):  # it warns that the model is a model, and not the name of one
            super().__init__(model, tokenizer=own, backend="causal", batch_size=batch_size, softmax_dtype="float32")
        self.own_bos = bos == "metrics"
        self.start = [own.bos_token_id] if self.own_bos and prepends_bos(model, own) else []

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text; of one that is too long (`left_truncate_len`) BOS and the end."""
        if not self.own_bos:
            return super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
        start = self.start if add_special_tokens is not False else []
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        ids = ids[1:] if start and ids[:1] == start else ids  # a chat template's BOS is as good as ours
        room = options.get("left_truncate_len")
        return start + (ids[max(0, len(ids) + len(start) - room) :] if room else ids)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: the harness puts a BOS of its own in front of them, behind which ours would count as a token of the text."""
        start, self.start = self.start, []
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.start = start
        return found

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        """Of a text that is too long BOS and the end are read, as the library's own metrics do; the harness reads the end alone."""
        kept = []
        for texts, context, continuation in requests:
            over = len(context) + len(continuation) - (self.max_length + 1)
            if self.start and over > 0 and context[: len(self.start)] == self.start:
                context = self.start + context[len(self.start) + over :]
            kept.append((texts, context, continuation))
        return super()._loglikelihood_tokens(kept, **options)

    def tok_batch_encode(self, strings: list[str], padding_side: str = "left", **options: Any) -> Any:
        """Token ids and attention mask of a batch that generation starts from."""
        if not self.own_bos:
            return super().tok_batch_encode(strings, padding_side=padding_side, **options)
        rows = [self.tok_encode(string, left_truncate_len=options.get("left_truncate_len")) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]


def _task_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    parents = {child: group for group, children in results["group_subtasks"].items() for child in children}
    rows = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
                continue
            stderr = figures.get(f"{metric}_stderr,{answer_filter}")
            rows.append(
                {
                    "task": task,
                    "group": parents.get(task, ""),
                    "metric": metric,
                    "filter": answer_filter,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float, np.number)) else float("nan"),
                    "n": int(figures["sample_len"]),
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                }
            )
    return rows


def _question_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "metric": metric,
            "filter": sample["filter"],
            "question": sample["doc_id"],
            "value": sample[metric],
            "target": sample["target"],
            # of a choice's (log-probability, whether it is what the model would have said) the first
            "answers": [a[0] if isinstance(a, (tuple, list)) else a for a in sample["filtered_resps"]],
        }
        for task, samples in results["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
    ]


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds the generators of Python, numpy and torch."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _modes_kept(model: Any) -> Iterator[None]:
    """The harness puts a model into evaluation mode, and ties its unembedding to the embedding again."""
    modes = [(module, module.training) for module in model.modules()]
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger that reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
