"""Continuous unlearning with MRP: three topics one after another, and one taken back.

`python -m analysis.requests --out runs/requests`
"""

import argparse
from pathlib import Path
from typing import Any

from mrp_lens import metrics
from mrp_lens.edit import Edit, ProjectionEdit
from mrp_lens.files import check_free
from mrp_lens.methods import MRP
from mrp_lens.model import load_model
from mrp_lens.runs import Run
from mrp_lens.world import World
from mrp_lens.world.scoring import untaught_accuracy, verdict


def topic_accuracies(model: Any, world: World, edit: Edit | None) -> dict[str, float]:
    """Accuracy on each topic's questions, all of its entities."""
    if edit is not None:
        with edit.applied(model):
            return topic_accuracies(model, world, None)
    table = metrics.accuracy(model, world.questions()).set_index("group")["accuracy"]
    return {topic: float(table.loc[topic]) for topic in world.topics}


def main() -> None:
    """Run the study, print its table and write it with a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/requests"), help="folder for the table and finding.md")
    parser.add_argument("--backend", default="auto", help="auto, hooked or bridge (default auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    arguments = parser.parse_args()
    check_free(arguments.out, overwrite=arguments.overwrite)
    world = World()
    model = load_model("demo", backend=arguments.backend)
    run = Run("analysis.requests", vars(arguments), arguments.seed)
    untaught = untaught_accuracy(model, world)
    gone = world.topics[:3]
    steps: dict[str, Edit | None] = {"unedited": None}
    edit: Edit | None = None
    for number, topic in enumerate(gone):
        retain = world.retain(without=gone[: number + 1])
        edit = MRP().fit(model, world.forget(topic), retain, seed=arguments.seed, after=edit, request=topic).edit
        steps[f"after {topic}"] = edit
    assert isinstance(edit, ProjectionEdit)
    steps[f"without {gone[1]}"] = edit.without(gone[1])
    for name, step in steps.items():
        run.rows.append({"method": name, **topic_accuracies(model, world, step), "untaught_accuracy": untaught})
        print(
            ", ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in run.rows[-1].items()
            )
        )
    text = finding(run.rows[-2], run.rows[-1], gone, world.topics[3], untaught)
    print(text)
    run.write(arguments.out, overwrite=arguments.overwrite, extras=[lambda folder: _write(folder / "finding.md", text)])


def finding(last: Any, dropped: Any, gone: tuple[str, ...], kept: str, untaught: float) -> str:
    """What the numbers say, in sentences."""
    verdicts = "; ".join(f"{topic} {last[topic]:.3f} ({verdict(last[topic], untaught)})" for topic in gone)
    back = "; ".join(f"{topic} {last[topic]:.3f} -> {dropped[topic]:.3f}" for topic in (*gone, kept))
    return (
        f"After three requests, never taught being {untaught:.3f}: {verdicts}; {kept}, to be kept, {last[kept]:.3f}.\n"
        f"Taking back the request on {gone[1]}: {back}.\n"
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
