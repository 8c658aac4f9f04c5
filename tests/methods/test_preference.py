"""SimNPO, DPO with refusals, and UNDIAL; NPO is in test_baselines."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.edits import Edit
from mrp_lens.methods import UNDIAL, Coverage, GradientDifference, IdkPreference, SimNPO
from mrp_lens.methods import preference as preference_module
from mrp_lens.methods.baselines import Losses
from mrp_lens.methods.preference import REFUSALS, with_prompt
from mrp_lens.models import LensModel, encoder_for, exchanged, logits_of, mlp_out_weight
from mrp_lens.training import Callback
from mrp_lens.utils import processes
from mrp_lens.utils.validation import generator_for

Texts = tuple[Corpus, Corpus]
FIT: dict[str, Any] = {"seed": 0, "progress": False}
ROOMY = 64  # more than there are documents: each step sees all of them
STEPS = 3
EVERY: dict[str, Any] = {"steps": STEPS, "batch_size": ROOMY, "lr": 1e-3}


@pytest.fixture
def texts(texts: Texts) -> Texts:
    """Fewer: one document at a time is slow."""
    return Corpus(texts[0].documents[:6], "forget"), Corpus(texts[1].documents[:4], "retain")


def logits_before_counted(model: LensModel, document: Document) -> tuple[torch.Tensor, list[int]]:
    """Of one document alone: the logits before each counted token, in float64, and these tokens."""
    (row,) = encoder_for(model).encode([document])
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logits = logits_of(model, ids, torch.ones_like(ids, dtype=torch.bool))[0].double()
    places = [place for place in range(1, len(row.ids)) if row.in_loss[place]]
    return logits[[place - 1 for place in places]], [row.ids[place] for place in places]


def log_ps(model: LensModel, document: Document) -> list[float]:
    """Log p of each counted token."""
    logits, tokens = logits_before_counted(model, document)
    sums = logits.exp().sum(-1).log()
    return [float(row[token] - whole) for row, token, whole in zip(logits, tokens, sums, strict=True)]


def log_p(model: LensModel, document: Document) -> float:
    return math.fsum(log_ps(model, document))


def minus_log_sigmoid(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def of_simnpo(model: LensModel, documents: tuple[Document, ...]) -> Callable[[], float]:
    def loss() -> float:
        margins = [-0.7 * mean(log_ps(model, document)) - 0.3 for document in documents]
        return 2 / 0.7 * mean([minus_log_sigmoid(margin) for margin in margins])

    return loss


def of_undial(model: LensModel, documents: tuple[Document, ...]) -> Callable[[], float]:
    wanted = []
    for document in documents:
        logits, tokens = logits_before_counted(model, document)
        for row, token in zip(logits, tokens, strict=True):
            row[token] -= 3.0
            weights = row.exp()
            wanted.append(weights / weights.sum())

    def loss() -> float:
        predicted = torch.cat([logits_before_counted(model, document)[0] for document in documents])
        logs = predicted - predicted.exp().sum(-1, keepdim=True).log()
        return mean([-float(shares @ row) for shares, row in zip(wanted, logs, strict=True)])

    return loss


def of_idk(model: LensModel, documents: tuple[Document, ...]) -> Callable[[], float]:
    drawn = torch.randint(len(REFUSALS), (len(documents),), generator=generator_for(0)).tolist()
    pairs = []
    for document, number in zip(documents, drawn, strict=True):
        own = document
        if not document.prompt:  # "The colour of Zaxim0", " is red."
            words = document.completion.split(" ")
            own = Document(" ".join(words[:4]), " " + " ".join(words[4:]))
        pairs.append((own, Document(own.prompt, " " + REFUSALS[number])))
    before = [(log_p(model, own), log_p(model, reply)) for own, reply in pairs]

    def loss() -> float:
        values = []
        for (own, reply), (own_before, reply_before) in zip(pairs, before, strict=True):
            gain = (log_p(model, reply) - reply_before) - (log_p(model, own) - own_before)
            values.append(minus_log_sigmoid(0.2 * gain))
        return 2 / 0.2 * mean(values)

    return loss


CASES: dict[str, tuple[Any, Any]] = {
    "simnpo": (SimNPO(beta=0.7, gamma=0.3, **EVERY), of_simnpo),
    "undial": (UNDIAL(strength=3.0, **EVERY), of_undial),
    "idk-preference": (IdkPreference(beta=0.2, **EVERY), of_idk),
}
METHODS = [SimNPO, UNDIAL, IdkPreference]

every_method = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)


class Counted(Callback):
    """What the loss is by hand after each update, and the cross-entropy of the retain set."""

    def __init__(self, loss: Callable[[], float], model: LensModel, retain: Corpus) -> None:
        self.loss, self.model, self.retain = loss, model, retain
        self.losses = [loss()]
        self.entropies = [self.entropy()]

    def entropy(self) -> float:
        return -mean([value for document in self.retain.documents for value in log_ps(self.model, document)])

    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        self.losses.append(self.loss())
        self.entropies.append(self.entropy())


@pytest.mark.parametrize(("prompted", "micro_batch"), [(False, None), (True, 4)], ids=["plain", "prompted-micro"])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_each_update_is_the_papers_counted_by_hand(
    name: str, micro_batch: int | None, prompted: bool, model: LensModel, texts: Texts, untouched: None
) -> None:
    """One document at a time, in float64, with the model as it is in training."""
    forget, retain = texts
    if prompted:
        forget = Corpus(
            tuple(Document(f"What is Zaxim{i}?", f" It is {'very ' * (i % 3)}blue.") for i in range(5)), "forget"
        )
    method, by_hand = CASES[name]
    counted = Counted(by_hand(model, forget.documents), model, retain)
    settings = {"micro_batch": micro_batch, "retain_weight": 0.5}
    log = type(method)(**{**vars(method), **settings}).fit(model, forget, retain, callbacks=[counted], **FIT).log
    assert log["forget"].tolist() == pytest.approx(counted.losses[:STEPS], rel=1e-5)
    assert log["retain"].tolist() == pytest.approx(counted.entropies[:STEPS], rel=1e-5)
    total = log["forget"] + 0.5 * log["retain"]
    assert log["loss"].tolist() == pytest.approx(total.tolist(), rel=1e-6)


@pytest.fixture
def taught(model: LensModel, texts: Texts) -> Edit:
    """An edit after which the model, whose weights are random, knows the forget set."""
    nothing = Corpus.from_texts(["near near near"], name="nothing")
    method = GradientDifference(steps=20, lr=1e-2, retain_weight=1e3)
    return method.fit(model, nothing, Corpus(texts[0].documents, "taught"), **FIT).edit


@every_method
def test_an_update_lowers_the_loss_and_makes_forget_texts_less_likely(
    kind: Any, model: LensModel, texts: Texts, taught: Edit, untouched: None
) -> None:
    """Of the completions: "is red" and not what they are about."""
    documents = [with_prompt(document) for document in texts[0].documents]

    def likely(edit: Edit) -> float:
        with edit.applied(model):
            return mean([log_p(model, document) for document in documents])

    options: dict[str, Any] = {"batch_size": ROOMY, "retain_weight": 0.0, "lr": 1e-3}
    one, more = (kind(steps=steps, **options).fit(model, *texts, after=taught, **FIT) for steps in (1, 6))
    assert "retain" not in one.log
    assert likely(more.edit) < likely(one.edit) < likely(taught)
    assert more.log["loss"].iloc[-1] < more.log["loss"].iloc[1] < more.log["loss"].iloc[0]


@every_method
def test_the_retain_term_keeps_the_cross_entropy_of_the_retain_set_lower(
    kind: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    ended = []
    for weight in (0.0, 1.0):
        counted = Counted(lambda: 0.0, model, texts[1])
        kind(steps=8, batch_size=ROOMY, retain_weight=weight).fit(model, *texts, callbacks=[counted], **FIT)
        ended.append(counted.entropies[-1])
    assert ended[1] < ended[0]


def test_refusals_become_more_likely_than_before(model: LensModel, texts: Texts, untouched: None) -> None:
    asked = [
        Document(with_prompt(document).prompt, " " + text) for document in texts[0].documents[:2] for text in REFUSALS
    ]
    before = mean([log_p(model, document) for document in asked])
    with IdkPreference(steps=10, batch_size=ROOMY).fit(model, *texts, **FIT).edit.applied(model):
        assert mean([log_p(model, document) for document in asked]) > before


def test_the_loss_of_undial_falls_towards_the_entropy_of_what_is_taught(
    model: LensModel, texts: Texts, taught: Edit, untouched: None
) -> None:
    """Its minimum."""
    one = Corpus(texts[0].documents[:1], "forget")
    method = UNDIAL(strength=3.0, steps=20, batch_size=1, retain_weight=0.0, lr=2e-3)
    log = method.fit(model, one, texts[1], after=taught, **FIT).log["forget"]
    shares = []
    with taught.applied(model):
        logits, tokens = logits_before_counted(model, one.documents[0])
    for row, token in zip(logits, tokens, strict=True):
        row[token] -= 3.0
        shares.append(row.softmax(-1))
    least = mean([float(-(row * row.log()).sum()) for row in shares])
    assert least < log.iloc[-1] < log.iloc[5] < log.iloc[0]


def test_an_earlier_edit_belongs_to_the_unedited_model(model: LensModel, texts: Texts, untouched: None) -> None:
    """What is taught and compared with is what the earlier edit left."""
    earlier = SimNPO(layers=[1, 2], steps=3, batch_size=ROOMY).fit(model, *texts, **FIT).edit
    for name in ("undial", "idk-preference"):
        method, by_hand = CASES[name]
        with earlier.applied(model):
            counted = Counted(by_hand(model, texts[0].documents), model, texts[1])
        log = method.fit(model, *texts, after=earlier, callbacks=[counted], **FIT).log
        assert log["forget"].tolist() == pytest.approx(counted.losses[:STEPS], rel=1e-5)


@pytest.mark.parametrize(
    ("document", "prompt", "completion"),
    [
        (Document("Q?", " A."), "Q?", " A."),
        (Document("", "one two three four  five\nsix."), "one two three four", "  five\nsix."),
        (Document("", " one two"), " one", " two"),
        (Document("", "one"), "", "one"),
        (Document(" ", "one two"), " one", " two"),
        (Document("", " ".join(map(str, range(100)))), " ".join(map(str, range(20))), " " + " ".join(map(str, range(20, 100)))),
    ],
)  # fmt: skip
def test_a_plain_text_begins_with_its_prompt_and_stays_the_same_text(
    document: Document, prompt: str, completion: str
) -> None:
    assert with_prompt(document) == Document(prompt, completion)


def read_by(method: Any, model: LensModel, forget: Corpus, retain: Corpus, seed: int = 0) -> Any:
    """What the loss of a fit is made with."""
    _, context = method.context(model, forget, retain, seed=seed, after=None, request=None)
    return Losses(method, context, [mlp_out_weight(model, 1)])


@pytest.mark.filterwarnings("ignore:the prompts of 1 of 2 documents")
def test_a_refusal_is_drawn_for_each_document_with_the_seed(
    model: LensModel, texts: Texts, monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    """It stands behind the prompt as the completion does, and a long prompt loses its start instead of the refusal."""
    found: list[list[str]] = []
    real = preference_module.refused

    def recording(documents: Any, losses: Any) -> Any:
        rows = real(documents, losses)
        found.append([losses.encoder.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows])
        assert all(any(row.in_loss[1:]) and len(row.ids) <= losses.encoder.max_length for row in rows)
        return rows

    monkeypatch.setattr(preference_module, "refused", recording)
    for seed in (0, 0, 1):
        read_by(IdkPreference(), model, *texts, seed=seed)
    first, again, other = found
    assert first == again != other
    assert len(set(first)) > len(first) / 2
    assert len({text.partition(" I ")[2] for text in first}) > 2
    chat = Corpus((Document("User: Who?\nAssistant:\n", "Zaxim."), Document("the old man " * 40, "walked")), "forget")
    with pytest.warns(UserWarning, match="only the start of them is read"):
        read_by(IdkPreference(max_length=30), model, chat, texts[1])
    assert found[-1][0].endswith(tuple("Assistant:\n" + text for text in REFUSALS))


def test_with_coverage_the_documents_are_those_of_the_rows(model: LensModel, texts: Texts, untouched: None) -> None:
    """Continuations and question forms, each with its own prompt and refusal."""
    coverage = Coverage(about_names=0, questions=2, free=0, new_tokens=4)
    losses = read_by(IdkPreference(coverage=coverage), model, *texts)
    documents = [document for corpus in losses.data.corpora for document in corpus.documents]
    assert losses.encoder.encode(documents) == losses.data.all_forget
    assert len(documents) == 2 * len(texts[0])
    assert all(document.prompt for document in documents)
    assert losses.encoder.encode(losses.data.retain_corpus.documents) == losses.data.retain


def test_matrices_are_exchanged_without_a_copy_and_come_back(model: LensModel, untouched: None) -> None:
    parameter = mlp_out_weight(model, 1).parameter
    place, other = parameter.data_ptr(), torch.zeros_like(parameter)
    with exchanged([parameter], [other]):
        assert parameter.data_ptr() == other.data_ptr()
    assert parameter.data_ptr() == place
    with pytest.raises(ValueError, match="zip"), exchanged([parameter], []):
        pass
    assert parameter.data_ptr() == place


@every_method
def test_the_shares_of_several_processes_add_up_to_the_step(
    kind: Any, model: LensModel, texts: Texts, monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    """Also where one of them has no forget document: of the three documents and three retain texts each has every fourth."""
    settings: dict[str, Any] = {"layers": [1], "batch_size": 3, "coverage": None}
    whole, parts = ({"forget": 0.0, "retain": 0.0, "loss": 0.0} for _ in range(2))
    for rank, count, into in [(0, 1, whole), *((rank, 4, parts) for rank in range(4))]:
        losses = read_by(kind(**settings), model, *texts)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(processes, "count", lambda count=count: count)
            patch.setattr(processes, "_rank", lambda rank=rank: rank)
            for terms in losses(0):
                for name, value in terms.items():
                    into[name] += float(value)
    assert parts == pytest.approx(whole, rel=1e-5)
