"""One random model measured by mrp_lens and by the oracle: what agrees, what was refused, what is wrong."""

import copy
import io
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.edits import ConditionalProjectionEdit, Edit, Gate, ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import export_hf
from mrp_lens.methods import RMU
from mrp_lens.models import load_model, logits_of
from mrp_lens.models.hooks import hook_name
from tests.differential.models import Built, Recipe, build, documents, questions, text
from tests.differential.oracle import Plain, RmuSettings, rmu
from tests.differential.outcomes import DisagreementError, Outcome, outcome_of

EXACT = 1e-4  # nats, in float32
COARSE = 3.0  # in half precision: rms difference over that precision's own rounding, of the same tokens
FEW = 8.0  # the same for figures of a handful of tokens
MOVED = 1e-3  # RMU in float32: difference over the movement, both as norms
MEASURES = ("logits", "choices", "perplexity", "confidence", "projection", "rmu", "folded", "module", "untouched")
TEXTUAL = ("choices", "perplexity", "confidence", "rmu")
LAYOUTS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")  # exports know these


def trial(made: Recipe, wanted: Sequence[str] = MEASURES) -> dict[str, Outcome]:
    """Build the model and compare the wanted measures; "load" is always among the outcomes."""
    with quiet(), tempfile.TemporaryDirectory(prefix="differential-") as temporary:
        comparison = Comparison(made, Path(temporary))
        outcomes = {"load": outcome_of(comparison.load)}
        for measure in MEASURES:
            if measure in wanted and outcomes["load"].status == "ok":
                outcomes[measure] = outcome_of(getattr(comparison, measure))
        for measure, outcome in outcomes.items():
            if outcome.status == "refused" and not may_refuse(made, measure):
                outcomes[measure] = Outcome("wrong", f"refused for no known reason: {outcome.detail}", outcome.reason)
            elif outcome.status != "refused" and made.missing and measure in TEXTUAL:
                outcomes[measure] = Outcome("wrong", f"a figure for tokens beyond the embedding: {outcome.detail}")
        return outcomes


def may_refuse(made: Recipe, measure: str) -> bool:
    """Where a clear error is right; anywhere else an answer is owed."""
    if measure == "load":
        # TransformerLens has HookedTransformer for few settings. Its Bridge has no NeoX without biases, and multiplies
        # float32 by half precision in OLMo-2 where the rope rule scales attention.
        return (
            made.backend == "hooked"
            or (made.family == "gpt_neox" and made.config.get("attention_bias", True) is False)
            or (made.family == "olmo2" and made.dtype != "float32")
        )
    if made.missing and measure in TEXTUAL:
        return True  # the model cannot read the texts
    if measure == "folded":
        return made.family not in LAYOUTS or made.family == "gemma2"  # there norms stand behind the matrices
    if measure == "module":
        return made.family not in LAYOUTS
    return measure == "rmu" and made.family in ("mixtral", "qwen3_moe")  # no single output matrix


@dataclass
class Comparison:
    """A recipe's model on both sides."""

    made: Recipe
    folder: Path
    own: dict[str, float] = field(default_factory=dict)

    @cached_property
    def built(self) -> Built:
        return build(self.made, self.folder / "model")

    @cached_property
    def draw(self) -> random.Random:
        return random.Random(f"settings of {self.made.seed}")

    @property
    def half(self) -> bool:
        return self.made.dtype != "float32"

    def plain(self, folder: Path | None = None, dtype: str | None = None, **options: Any) -> Plain:
        """A model as anybody would load it."""
        where = folder or self.built.folder
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, dtype or self.made.dtype), attn_implementation="eager", **options
        )
        return Plain(model.eval(), self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        return self.built.tokenizer if self.made.memory else AutoTokenizer.from_pretrained(self.built.folder)

    @cached_property
    def reference(self) -> Plain:
        return self.plain()

    @cached_property
    def wide(self) -> Plain:
        """In float32: how far it is from `reference` is the precision's own rounding."""
        return self.plain(dtype="float32") if self.half else self.reference

    @cached_property
    def documents(self) -> list[tuple[str, str]]:
        return documents(self.made, random.Random(f"documents of {self.made.seed}"))

    @cached_property
    def questions(self) -> list[tuple[str, list[str]]]:
        return questions(self.made, random.Random(f"questions of {self.made.seed}"))

    @cached_property
    def rows(self) -> list[list[int]]:
        """The documents' ids; random ones where the embedding has no rows for them."""
        if self.made.missing:
            generator = torch.Generator().manual_seed(self.made.seed)
            return torch.randint(int(self.reference.model.config.vocab_size), (3, 40), generator=generator).tolist()
        return [self.reference.row(*document).ids for document in self.documents]

    @cached_property
    def rounding(self) -> float:
        """Root mean square difference of a log-probability in this precision from float32, on the documents."""
        return self.rounding_between(self.reference, self.wide)

    def rounding_between(self, coarse: Plain, fine: Plain) -> float:
        if not self.half:
            return 0.0
        return rms([coarse.log_probabilities(ids) - fine.log_probabilities(ids) for ids in self.rows])

    def load(self) -> str:
        """The model, by the class that the recipe names."""
        made, built = self.made, self.built
        before = tokenizer_state(built.tokenizer), {k: v.clone() for k, v in built.hf_model.state_dict().items()}
        kind, dtype = made.backend, getattr(torch, made.dtype)
        if made.memory:
            self.model = load_model(built.hf_model, tokenizer=built.tokenizer, backend=kind, dtype=dtype, device="cpu")
        else:
            self.model = load_model(built.folder, backend=kind, dtype=dtype, device="cpu")
        if tokenizer_state(built.tokenizer) != before[0]:
            raise DisagreementError(
                f"the caller's tokenizer was changed: {before[0]} -> {tokenizer_state(built.tokenizer)}"
            )
        if not all(torch.equal(before[1][name], values) for name, values in built.hf_model.state_dict().items()):
            raise DisagreementError("the caller's model was changed")
        return type(self.model).__name__

    def logits(self) -> str:
        return self.compare_logits(self.reference, self.rounding)

    def compare_logits(self, reference: Plain, rounding: float) -> str:
        """A padded batch against each row alone."""
        side = self.draw.choice(("left", "right"))
        width = max(map(len, self.rows))
        gaps = [width - len(ids) for ids in self.rows]
        pad = self.draw.randrange(3)
        padded = [
            [pad] * gap + ids if side == "left" else ids + [pad] * gap for ids, gap in zip(self.rows, gaps, strict=True)
        ]
        masks = [
            [False] * gap + [True] * len(ids) if side == "left" else [True] * len(ids) + [False] * gap
            for ids, gap in zip(self.rows, gaps, strict=True)
        ]
        mask = torch.tensor(masks)
        with torch.no_grad():
            got = logits_of(self.model, torch.tensor(padded), mask).float().log_softmax(-1)
        return self.close(
            [got[i][mask[i]] - reference.log_probabilities(ids) for i, ids in enumerate(self.rows)], rounding, side
        )

    def close(self, differences: Sequence[Tensor], rounding: float, what: str) -> str:
        """In float32 the largest difference counts, in half precision their root mean square over its own rounding."""
        if not all(bool(torch.isfinite(d).all()) for d in differences):
            raise DisagreementError(f"{what}: not finite")
        off = rms(differences) if self.half else max(float(d.abs().max()) for d in differences)
        allowed = COARSE * rounding + 1e-6 if self.half else EXACT
        if not off <= allowed:
            raise DisagreementError(f"{what}: off by {off:.3g}, allowed {allowed:.3g}")
        return f"{what} {off:.1e} of {allowed:.1e}"

    def near(self, got: Sequence[float], want: Sequence[float], what: str) -> str:
        """As `close`, for a few figures in nats or logits."""
        a, b = np.array(got, dtype=float), np.array(want, dtype=float)
        if a.shape != b.shape:
            raise DisagreementError(f"{what}: {a.shape} figures instead of {b.shape}")
        off = np.abs(a - b) if self.half else np.abs(a - b) / np.maximum(1.0, np.abs(b))
        allowed = FEW * self.rounding + 1e-6 if self.half else EXACT
        worst = float(np.sqrt((off**2).mean())) if self.half else float(off.max())
        if not worst <= allowed:
            raise DisagreementError(
                f"{what}: got {a.round(5).tolist()}, want {b.round(5).tolist()} (allowed {allowed:.3g})"
            )
        return f"{what} {worst:.1e} of {allowed:.1e}"

    def quiz(self) -> Questions:
        asked = enumerate(self.questions)
        return Questions(tuple(Question(p, tuple(c), n % len(c), group="ab"[n % 2]) for n, (p, c) in asked), "quiz")

    def corpus(self) -> Corpus:
        return Corpus(tuple(Document(*document) for document in self.documents), "documents")

    def choices(self) -> str:
        scores = metrics.choice_scores(self.model, self.quiz(), batch_size=self.draw.choice((1, 3, 128)))
        want = [[self.reference.choice_score(p, c) for c in choices] for p, choices in self.questions]
        detail = self.near(np.concatenate(scores).tolist(), list(chain.from_iterable(want)), "scores")
        table = metrics.accuracy(self.model, self.quiz()).set_index("group")
        right = [float(np.argmax(score) == n % len(score)) for n, score in enumerate(scores)]
        if abs(float(table.loc["all", "accuracy"]) - float(np.mean(right))) > 1e-9:
            raise DisagreementError(f"accuracy {table.loc['all', 'accuracy']!r} of {right}")
        chosen = [float(np.exp(row[n % len(row)])) for n, row in enumerate(want)]
        return detail + self.near(
            [float(table.loc["all", "answer_probability"])], [float(np.mean(chosen))], ", probability"
        )

    def perplexity(self) -> str:
        row = metrics.perplexity(self.model, self.corpus(), batch_size=self.draw.choice((1, 3, 128))).iloc[0]
        surprise, count = self.reference.mean_surprise(self.documents)
        if int(row["tokens"]) != count:
            raise DisagreementError(f"{row['tokens']} tokens counted instead of {count}")
        return self.near([float(np.log(row["perplexity"]))], [surprise], "log perplexity")

    def confidence(self) -> str:
        """Token by token: what is written, where that does not hang on rounding; else the right answer."""
        mode = "forced" if self.half else self.draw.choice(("forced", "generated"))
        tokens = self.draw.choice((1, 3, 5))
        asked = self.corpus() if mode == "forced" else self.quiz()
        frame = metrics.token_confidence(
            self.model,
            asked,
            mode=mode,
            tokens=tokens,
            batch_size=self.draw.choice((1, 2, 64)),
            padding=self.draw.choice(("left", "right")),
        )
        plain = self.reference
        if mode == "forced":
            want = [plain.confidence(*document, tokens) for document in self.documents]
        else:
            want = [plain.greedy(prompt, tokens) for prompt, _ in self.questions]
        got: list[list[Any]] = [[] for _ in want]
        for entry in frame.itertuples():
            figures = [entry.max_logit, entry.max_probability, entry.entropy, entry.margin, entry.probability]
            got[int(entry.question)].append((entry.token, figures))
        details = []
        for mine, theirs in zip(got, want, strict=True):
            sure = next(
                (i for i, (_, figures) in enumerate(theirs) if mode == "generated" and figures[3] < 1e-3), len(theirs)
            )
            tied = sure < len(theirs)
            if not tied and len(mine) != len(theirs):
                raise DisagreementError(f"{mode}: {len(mine)} tokens measured instead of {len(theirs)}")
            texts = [str(self.tokenizer.decode([token])) for token, _ in theirs[:sure]]
            if [token for token, _ in mine[:sure]] != texts:
                raise DisagreementError(f"{mode}: tokens {[token for token, _ in mine]} instead of {texts}")
            figures = list(chain.from_iterable(f for _, f in mine[:sure]))
            wanted = list(chain.from_iterable(f for _, f in theirs[:sure]))
            details.append(self.near(figures, wanted, mode) if figures else "")
        return max(details)

    @cached_property
    def known(self) -> bool:
        """Whether attention, MLP and matrices of this family are known to the oracle and to mrp_lens."""
        return self.made.family in LAYOUTS

    def random_projection(self, places: Sequence[tuple[int, str]]) -> ProjectionEdit:
        rank = self.draw.randint(1, 3)
        return ProjectionEdit(
            {
                hook_name(layer, site): Subspace.random(rank, self.made.width, seed=self.made.seed + number)
                for number, (layer, site) in enumerate(places)
            }
        )

    def perhaps_gated(self, edit: ProjectionEdit) -> ProjectionEdit:
        """The edit, or one whose subspaces are removed from some states only."""
        if self.draw.random() < 0.5:
            return edit
        generator = torch.Generator().manual_seed(self.made.seed)
        gates = {
            hook: Gate(torch.randn(self.made.width, generator=generator), self.draw.uniform(-0.2, 0.2), sharpness=5.0)
            for hook in edit.hook_names
        }
        return ConditionalProjectionEdit(edit.subspaces(), gates)

    def places(self, sites: Sequence[str], count: int) -> list[tuple[int, str]]:
        every = [(layer, site) for layer in range(self.made.layers) for site in sites]
        if self.made.family == "gpt_neox" and self.made.config["use_parallel_residual"]:
            every = [place for place in every if place[1] != "resid_mid"]
        return sorted(self.draw.sample(every, min(count, len(every))))

    def hooked_by_hand(self, edit: Edit, plain: Plain) -> Plain:
        """A copy with the edit's projections and matrices on."""
        other = Plain(copy.deepcopy(plain.model), plain.tokenizer)
        state = dict(other.model.named_parameters())
        for part in edit.parts:
            if isinstance(part, ProjectionEdit):
                for hook, subspace in part.subspaces().items():
                    _, layer, site = hook.replace("hook_", "").split(".")
                    gate = part.gates("edit").get(hook)
                    numbers = None if gate is None else (gate.direction, gate.threshold, gate.sharpness)
                    other.project(int(layer), site, subspace.basis, numbers)
            else:
                with torch.no_grad():
                    for name, values in part.to_parts()[1].items():
                        state[name].copy_(values)
        return other

    def projection(self) -> str:
        sites = (
            ("resid_post", "resid_pre", "attn_out", "mlp_out", "resid_mid")
            if self.known
            else ("resid_post", "resid_pre")
        )
        edit = self.perhaps_gated(self.random_projection(self.places(sites, self.draw.randint(1, 3))))
        reference = self.hooked_by_hand(edit, self.reference)
        wide = self.hooked_by_hand(edit, self.wide) if self.half else reference
        with edit.applied(self.model):
            detail = self.compare_logits(reference, self.rounding_between(reference, wide))
        return f"{detail} at {', '.join(edit.hook_names)}"

    @cached_property
    def texts_of_fit(self) -> tuple[list[str], list[str]]:
        draw = random.Random(f"texts of {self.made.seed}")
        longest = max(self.made.window + 4, 16)
        return tuple(  # type: ignore[return-value]
            [text(draw, draw.randint(3, longest), self.made.added) for _ in range(count)] for count in (3, 5)
        )

    def rmu(self) -> str:
        """Three steps of RMU; a large eps, so that the matrices show the size of the gradient and not only its sign."""
        forget, retain = self.texts_of_fit
        layer = self.draw.randrange(self.made.layers)
        settings = RmuSettings(
            layer=layer,
            coefficient=self.draw.choice((2.0, 6.5)),
            alpha=self.draw.choice((3.0, 100.0)),
            lr=0.05,
            eps=0.1,
            steps=3,
            batch_size=self.draw.choice((1, 2, 8)),
        )
        method = RMU(
            layer=layer,
            steering_coeff=settings.coefficient,
            alpha=settings.alpha,
            lr=settings.lr,
            eps=settings.eps,
            steps=settings.steps,
            batch_size=settings.batch_size,
            errors="absolute",
            budget=None,
            coverage=None,
            micro_batch=self.draw.choice((None, 1)),
            padding=self.draw.choice(("left", "right")),
            shuffle=False,
        )
        fit = method.fit(
            self.model,
            Corpus.from_texts(forget),
            Corpus.from_texts(retain, name="retain"),
            seed=self.made.seed,
            progress=False,
        )
        self.rmu_edit = fit.edit
        direction = fit.direction
        if abs(float(direction.norm()) - 1) > 1e-5 or float(direction.min()) < 0:
            raise DisagreementError(f"the direction is no unit vector of entries from U[0, 1): {direction}")
        want, log = rmu(self.reference, forget, retain, direction, settings)
        got = dict(fit.edit.to_parts()[1])
        if got.keys() != want.keys():
            raise DisagreementError(f"matrices {sorted(got)} instead of {sorted(want)}")
        start = dict(self.reference.model.named_parameters())
        moved = norm([want[name] - start[name].float() for name in want])
        off = norm([want[name] - got[name] for name in want]) / moved
        allowed = MOVED
        fine = log
        if self.half:
            reference, fine = rmu(self.wide, forget, retain, direction, settings)
            allowed = COARSE * norm([want[name] - reference[name] for name in want]) / moved + MOVED
        if not off <= allowed:
            raise DisagreementError(f"RMU's matrices are off by {off:.3g} of how far they moved, allowed {allowed:.3g}")
        for name in ("forget", "retain"):
            mine, theirs = fit.log[name].to_numpy(float), np.array([step[name] for step in log])
            room = 1e-4 + (COARSE * np.abs(theirs - [step[name] for step in fine]).max() if self.half else 0.0)
            room = room * 10 if self.half else room
            if not np.all(np.abs(mine - theirs) <= room * np.maximum(1.0, theirs)):
                raise DisagreementError(f"RMU's {name} loss {mine.tolist()} instead of {theirs.tolist()}")
        return f"off {off:.1e} of {allowed:.1e}"

    def folded(self) -> str:
        """A projection that folds, over RMU's matrices now and then; written, loaded plainly, compared with the hooks."""
        if self.draw.random() < (0.7 if self.reference.model.config.tie_word_embeddings else 0.3):
            edit: Edit = self.random_projection([(0, "resid_pre")])
        else:
            edit = self.random_projection(self.places(("attn_out", "mlp_out"), 2))
        learned = getattr(self, "rmu_edit", None)
        if learned is not None and self.draw.random() < 0.5:
            edit = learned + edit
        return self.exported(edit, "folded")

    def module(self) -> str:
        edit = self.random_projection(self.places(("resid_post", "resid_pre", "mlp_out"), 2))
        return self.exported(self.perhaps_gated(edit), "module")

    def exported(self, edit: Edit, form: str) -> str:
        made, out = self.made, self.folder / form
        base = self.built.folder if made.memory else None
        # A folded matrix is rounded to the files' precision, which is compared in that precision.
        report = export_hf(self.model, edit, out, form, verify=False, base=base, progress=False)  # type: ignore[arg-type]
        if report.form != form:
            raise DisagreementError(f"form {report.form} instead of {form}")
        precision = made.dtype if made.stored == "float32" else made.stored
        coarse = precision != "float32"
        with dynamic_modules(self.folder / "modules"):
            options = {"trust_remote_code": True} if form == "module" else {}
            exported = self.plain(out, dtype=precision, **options)
        base_plain = self.reference if precision == made.dtype else self.plain(dtype=precision)
        reference = self.hooked_by_hand(edit, base_plain)
        differences = [exported.log_probabilities(ids) - reference.log_probabilities(ids) for ids in self.rows]
        if not coarse:
            off, allowed = max(float(d.abs().max()) for d in differences), EXACT
        else:
            fine = self.hooked_by_hand(edit, self.plain(dtype="float32"))
            rounding = [reference.log_probabilities(ids) - fine.log_probabilities(ids) for ids in self.rows]
            off, allowed = rms(differences), COARSE * rms(rounding) + 1e-6
        if not off <= allowed:
            raise DisagreementError(f"{form} export of {edit!r}: off by {off:.3g}, allowed {allowed:.3g}")
        return f"{form} {off:.1e} of {allowed:.1e}"

    def untouched(self) -> str:
        """After everything the model still computes what it computed."""
        return self.compare_logits(self.reference, self.rounding)


@contextmanager
def dynamic_modules(folder: Path) -> Iterator[None]:
    """Code of an exported folder is imported from a place that goes with the trial, and is forgotten with it.

    transformers looks a class up by what its file says: one that stays imported would serve a later export with the
    same code, whose `save_pretrained` then copies a file that is gone.
    """
    import transformers.dynamic_module_utils as dynamic

    before, dynamic.HF_MODULES_CACHE = dynamic.HF_MODULES_CACHE, str(folder)
    modules, paths = dict(sys.modules), list(sys.path)
    try:
        yield
    finally:
        dynamic.HF_MODULES_CACHE = before
        sys.path[:] = paths
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            if name in modules:
                sys.modules[name] = modules[name]
            else:
                del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, progress bars and what TransformerLens prints."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    return (
        len(tokenizer),
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer("The old man")["input_ids"],
    )


def rms(differences: Sequence[Tensor]) -> float:
    return float(torch.cat([d.double().flatten() for d in differences]).square().mean().sqrt())


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())
