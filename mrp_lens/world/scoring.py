"""What a model knows of the world: the figures that the demo and the studies share."""

from collections.abc import Sequence

from mrp_lens import metrics
from mrp_lens.corpus import Questions
from mrp_lens.model import LensModel
from mrp_lens.world.facts import World

ABSENT_WITHIN = 0.05
"""A topic counts as absent if its accuracy is this close to the accuracy on facts that were never taught."""


def score(model: LensModel, world: World, forgotten: Sequence[str]) -> dict[str, float | str]:
    """Accuracy on the forgotten topics, on the others, on withheld facts, and perplexity of unseen sentences.

    Args:
        model: with the edit on, if there is one.
        world: that the model was taught.
        forgotten: topics; the others are scored on entities that no retain corpus mentions.

    Returns:
        `forget_accuracy` with `forget_low`, `forget_high` (95% bootstrap interval over questions);
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


def verdict(accuracy: float, untaught: float) -> str:
    """ "absent": as if never taught; "suppressed": pushed below that, hence still known; "known": above it.

    Raises:
        ValueError: an accuracy that is NaN, which is none of these.
    """
    if accuracy != accuracy or untaught != untaught:
        raise ValueError(f"an accuracy of {accuracy} against {untaught} says nothing; measure both")
    if abs(accuracy - untaught) <= ABSENT_WITHIN:
        return "absent"
    return "suppressed" if accuracy < untaught else "known"


def _join(world: World, topics: Sequence[str], *, half: int | None) -> Questions:
    questions = [question for topic in topics for question in world.questions(topic, half=half).questions]
    return Questions(tuple(questions), "world")
