"""How much of the invented world a model knows: of the topics it was to forget, of the others, and of what nothing taught it."""

from collections.abc import Sequence

from mrp_lens import metrics
from mrp_lens.data import Questions
from mrp_lens.data.world.facts import World
from mrp_lens.models import LensModel


def score(model: LensModel, world: World, forgotten: Sequence[str]) -> dict[str, float | str]:
    """Accuracy on the forgotten topics, on the others, on withheld facts, and perplexity of unseen sentences.

    Args:
        model: with the edit on, if there is one.
        world: that the model was taught.
        forgotten: topics; the others are scored on entities that no retain corpus mentions.

    Returns:
        `forget_accuracy` with `forget_low`, `forget_high` (95%, as of `metrics.accuracy`);
        `retain_accuracy` (mean of the other topics), `worst_topic_accuracy`, `worst_topic`; `text_perplexity`.

    Raises:
        ValueError: no forgotten topic, or none that stays.
    """
    others = [topic for topic in world.topics if topic not in forgotten]
    if not forgotten or not others:
        raise ValueError(
            f"forgotten must be some of the topics {', '.join(world.topics)} and leave some, got {list(forgotten)}"
        )
    known = metrics.accuracy(model, _join(world, forgotten, half=None)).iloc[0]
    kept = metrics.accuracy(model, _join(world, others, half=1)).set_index("group")["accuracy"]
    kept = kept.drop("all", errors="ignore")
    return {
        "forget_accuracy": float(known["accuracy"]),
        "forget_low": float(known["low"]),
        "forget_high": float(known["high"]),
        "retain_accuracy": float(kept.mean()),
        "worst_topic_accuracy": float(kept.min()),
        "worst_topic": str(kept.idxmin()),
        "text_perplexity": float(metrics.perplexity(model, world.text())["perplexity"].iloc[0]),
    }


def untaught_accuracy(model: LensModel, world: World) -> float:
    """The control: the unedited model's accuracy on the withheld facts of all topics, which nothing ever taught it."""
    return float(metrics.accuracy(model, world.questions(taught=False))["accuracy"].iloc[0])


def _join(world: World, topics: Sequence[str], *, half: int | None) -> Questions:
    questions = [question for topic in topics for question in world.questions(topic, half=half).questions]
    return Questions(tuple(questions), "world")
